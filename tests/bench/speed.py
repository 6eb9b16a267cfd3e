"""Speed beside transformers' own Phi of the same shape, in the same run.

    python tests/bench/speed.py            # hidden 512 x 8 layers; every place and precision: a quarter of an hour
    python tests/bench/speed.py --rapido       # two precisions, fewer repetitions: about five minutes
    python tests/bench/speed.py --tamanos      # decoding with tables of 2.6e5, 2.6e6 and 2.6e7 slots
    python tests/bench/speed.py --phi1         # Phi-1's own shape, as "auto" opens it: 12 GB of RAM, ten minutes
    python tests/bench/speed.py --gigante      # a table larger than most RAM, opened and read cold: 36 GB of disk
    python tests/bench/speed.py --frias        # 8 GB of rows that no pass finds in the disk's cache
    python tests/bench/speed.py --json medidas.json

Each repetition measures plain Phi and every variant, one after the other, so that what else the machine does falls on
all. What is printed are medians; a ratio is the median of the ratios within a repetition. Tokens are drawn at random,
which is the worst case: every n-gram is new. "Slots" are table rows per layer, all heads together.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PhiConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engram.console import SpanishParser, gigabytes, run_script, spanish
from phi1_engram import (
    CACHE,
    TABLE_FILE,
    EngramHash,
    EngramTable,
    PhiEngramConfig,
    PhiEngramForCausalLM,
    PhiRotaryEmbedding,
    TableFile,
    choose_place,
    head_primes,
    pack,
    write_table,
)

SMALL = dict(
    vocab_size=51200, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
    eos_token_id=50256,
)  # fmt: skip
PLACES = ("ram", "disco")
PHI_1 = dict(vocab_size=51200, eos_token_id=50256)  # PhiConfig's defaults are its shape
MEMORY = dict(n_embed_per_ngram=512, n_head_per_ngram=8, engram_tokenizer_compression=False)
D_HEAD = 64
ROWS = 256_000  # per head: 4.1 million slots
DECODED = 32  # tokens per decoding measurement
BLOCK = 131_071  # rows drawn for a table that is filled in memory; a prime, so that a wrong offset meets other rows
# Opens a checkpoint as a new process does, and tells seconds, peak and resident memory beyond the libraries'.
OPENER = """
import re, sys, time
import torch, transformers, phi1_engram
from pathlib import Path
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before, start = kilobytes("VmRSS"), time.perf_counter()
if sys.argv[2] == "plain":
    model = transformers.PhiForCausalLM.from_pretrained(sys.argv[1])
else:
    model = phi1_engram.PhiEngramForCausalLM.from_pretrained(sys.argv[1], engram_storage=sys.argv[2])
seconds = time.perf_counter() - start
print(seconds, (kilobytes("VmHWM") - before) / 1e3, (kilobytes("VmRSS") - before) / 1e3)
"""


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def pair(shape: dict, layers: list[int], device="cpu", dtype=torch.float32):
    """Plain Phi, and Phi with a memory that has no rows yet, on the very same weights."""
    torch.manual_seed(0)
    with torch.device(device):
        plain = AutoModelForCausalLM.from_config(PhiConfig(**shape), dtype=dtype).eval()
    with torch.device("meta"):  # no second copy
        ours = PhiEngramForCausalLM(config(shape, layers, ROWS), empty_tables=True).eval()
    for layer_id in layers:
        engram = ours.model.layers[layer_id].engram.to_empty(device=device).apply(ours._init_weights)
        torch.nn.init.normal_(engram.conv.weight, 0, 0.02)
        engram.to(dtype)
    ours.model.rotary_emb = PhiRotaryEmbedding(ours.config).to(device)
    ours.model.engram_hash.to_empty(device=device).reset_buffers()
    ours.load_state_dict(plain.state_dict(), strict=False, assign=True)
    return plain, ours


def config(shape: dict, layers: list[int], rows: int) -> PhiEngramConfig:
    return PhiEngramConfig(**shape, **MEMORY, engram_layer_ids=layers, engram_vocab_size=[rows, rows])


def write_tables(ours, folder, rows: int, dtype: torch.dtype):
    """The files of a memory with every row filled, `rows` per head, written a part at a time."""
    Path(folder).mkdir()
    for layer_id, primes in zip(ours.config.engram_layer_ids, head_primes(with_rows(ours, rows))):
        # One block of numbers, again and again: what is measured does not look at them.
        block = pack(torch.randn(2**17, D_HEAD) * 0.02, dtype)
        n_rows = sum(map(sum, primes))
        chunks = (block[: min(2**17, n_rows - first)] for first in range(0, n_rows, 2**17))
        key, mate = f"model.engram_tables.{layer_id}.weight", ours._mate(layer_id)
        write_table(Path(folder, TABLE_FILE.format(layer_id)), key, chunks, dtype, n_rows, D_HEAD, mate)


def with_rows(ours, rows: int) -> PhiEngramConfig:
    return PhiEngramConfig.from_dict({**ours.config.to_dict(), "engram_vocab_size": [rows, rows]})


def write_backbone(ours, folder, rows: int):
    """The rest of the checkpoint whose tables lie in `folder`."""
    other = PhiEngramForCausalLM(with_rows(ours, rows), empty_tables=True)
    unlike = "engram_hash", "engram_tables"
    state = {name: tensor for name, tensor in ours.state_dict().items() if not any(part in name for part in unlike)}
    other.load_state_dict(state, strict=False)
    PreTrainedModel.save_pretrained(other, folder)


def filled(n_rows: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """Rows in host memory, every page of them written: the first BLOCK of them again and again."""
    weight = torch.empty(n_rows, D_HEAD, dtype=dtype)
    block = (torch.randn(BLOCK, D_HEAD) * 0.02).to(dtype)
    for rows in weight.split(BLOCK):
        rows.copy_(block[: len(rows)])
    return torch.nn.Parameter(weight, requires_grad=False)


class Variant:
    """The memory in one place and precision; the backbone is shared. Without a folder its rows are in no file."""

    def __init__(self, ours, folder, rows, place, prefetch=True):
        settings = with_rows(ours, rows)
        self.ours, self.hash, self.tables = ours, EngramHash(settings), torch.nn.ModuleDict()
        self.hash.reset_buffers()
        self.hash.to(ours.device)
        for layer_id, primes in zip(settings.engram_layer_ids, head_primes(settings)):
            table = self.tables[str(layer_id)] = EngramTable(sum(map(sum, primes)), D_HEAD, empty=True)
            if folder is None:
                table.weight = filled(table.n_rows, ours.dtype)
            else:
                path = Path(folder, TABLE_FILE.format(layer_id))
                table.file = TableFile(path, f"model.engram_tables.{layer_id}.weight", table.n_rows, D_HEAD)
            table.settle(place)
            table.prefetches = prefetch
            if place == "gpu":
                table.to(ours.device)

    def __call__(self):
        self.ours.model.engram_hash, self.ours.model.engram_tables = self.hash, self.tables
        self.ours.model.use_memory = True
        return self.ours


def turned_off(ours):
    def model():
        ours.model.use_memory = False
        return ours

    return model


# ----------------------------------------------------------------------------------------------------------------------
# Measurements: seconds
# ----------------------------------------------------------------------------------------------------------------------


def wait_for(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def prefill(model, batch: int, length: int) -> float:
    """One forward pass over fresh tokens, last logits only as in `generate`."""
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)
    wait_for(model)
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    wait_for(model)
    return time.perf_counter() - start


@torch.inference_mode()
def decode(model, batch: int, tokens: int = DECODED) -> float:
    """Per token, after a prompt of 64: the next token is drawn at random, so that rows are new ones."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, model.config.vocab_size, (batch, 64 + tokens), device=model.device)
    model(ids[:, :64], **{CACHE: cache}, logits_to_keep=1)
    wait_for(model)
    start = time.perf_counter()
    for i in range(64, 64 + tokens):
        model(ids[:, i : i + 1], **{CACHE: cache}).logits[:, -1:].argmax(-1)
    wait_for(model)
    return (time.perf_counter() - start) / tokens


@torch.no_grad()
def greedy(model, ids, tokens: int, cache: str | None = None):
    """ids [B, T] -> [B, T + tokens]."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        cache_implementation=cache, pad_token_id=0,
    )  # fmt: skip


def with_static_cache(model, tokens: int) -> float:
    """Per token of `generate`, after a prompt of 64, which counts too. On a card transformers compiles the model."""
    ids = torch.randint(0, model.config.vocab_size, (1, 64), device=model.device)
    wait_for(model)
    start = time.perf_counter()
    greedy(model, ids, tokens, "static")
    wait_for(model)
    return (time.perf_counter() - start) / tokens


def compare(measure, models: dict, repetitions: int, *arguments) -> dict:
    """{name: {"seconds", "ratio", "quartiles", "times"}}; ratios are to the first of `models`."""
    times = {name: [] for name in models}
    for _ in range(repetitions + 1):  # the first warms up
        for name, model in models.items():
            times[name].append(measure(model(), *arguments))
    first, rows = next(iter(times.values()))[1:], {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values[1:], first)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows[name] = dict(seconds=statistics.median(values[1:]), ratio=quartiles[1], quartiles=quartiles[::2])
        rows[name]["times"] = values[1:]
    return rows


def table(title: str, results: dict):
    """Print {measurement: {variant: row}} with a line per variant."""
    names = list(next(iter(results.values())))
    print(f"\n{title}\n\n| | " + " | ".join(results) + " |\n|" + " --- |" * (len(results) + 1))
    for name in names:
        cells = []
        for measurement, rows in results.items():
            row = rows[name]
            speed = f"{spanish(row['seconds'] * 1e3, 1)} ms"
            if "prefill" in measurement:
                batch, length = map(int, re.findall(r"\d+", measurement))
                speed = f"{spanish(batch * length / row['seconds'])} tokens/s"
            low, high = (spanish(ratio, 2) for ratio in row["quartiles"])
            cells.append(speed if name == names[0] else f"{speed}, **{spanish(row['ratio'], 3)}** ({low}–{high})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def opening(folder, place: str, repetitions: int = 3) -> dict:
    """Medians of a new process that opens `folder`, whose files are warm: seconds, and MB of memory."""
    here = str(Path(__file__).resolve().parents[2])
    runs = []
    for _ in range(repetitions):
        done = subprocess.run(
            [sys.executable, "-c", OPENER, str(folder), place], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": here},
        )  # fmt: skip
        runs.append([float(value) for value in done.stdout.split()[-3:]])
    seconds, peak, resident = (statistics.median(values) for values in zip(*runs))
    return dict(seconds=seconds, peak=peak, resident=resident)


def reading(folder, repetitions: int = 3) -> float:
    """Seconds that it takes just to read the tables' bytes, warm, into memory that nothing has filled before."""
    times = []
    for _ in range(repetitions + 1):  # the first warms up
        start, kept = time.perf_counter(), []
        for path in Path(folder).glob("model-engram-*.safetensors"):
            with open(path, "rb", buffering=0) as file:
                kept.append(torch.empty(path.stat().st_size, dtype=torch.uint8))
                data = memoryview(kept[-1].numpy())
                while data:
                    data = data[file.readinto(data) :]
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ----------------------------------------------------------------------------------------------------------------------
# What is measured
# ----------------------------------------------------------------------------------------------------------------------


def small(results, work, quick):
    plain, ours = pair(SMALL, [1, 4])
    precisions = ["float32", "int8"] if quick else ["float32", "float16", "bfloat16", "int8"]
    print("Escribiendo las tablas …", flush=True)
    for precision in precisions:
        write_tables(ours, work / precision, ROWS, getattr(torch, precision))
        write_backbone(ours, work / precision, ROWS)
    plain.save_pretrained(work / "plain")

    places = {f"{place}, {name}": Variant(ours, work / name, ROWS, place) for name in precisions for place in PLACES}
    last = precisions[-1]
    places[f"disco, {last}, sin adelantar la lectura"] = Variant(ours, work / last, ROWS, "disco", prefetch=False)
    models = {"Phi de transformers": lambda: plain, "memoria apagada": turned_off(ours), **places}
    repetitions = 7 if quick else 11
    measured = results["512x8"] = {}
    for name, measure, arguments in (
        ("prefill 1×512", prefill, (1, 512)), ("prefill 4×512", prefill, (4, 512)),
        ("decodificar, lote 1", decode, (1,)), ("decodificar, lote 8", decode, (8,)),
    ):  # fmt: skip
        measured[name] = compare(measure, models, repetitions, *arguments)
    table("512 × 8 capas, memoria en 1 y 4, 4,1 millones de filas por capa; entre paréntesis, cuartiles", measured)

    print("\n| abrir | segundos | más que Phi y leer los bytes | memoria máxima | memoria después |")
    print("| --- | --- | --- | --- | --- |")
    rows = results["abrir"] = {"Phi de transformers": opening(work / "plain", "plain")}
    for name in precisions:
        read = reading(work / name)
        for place in PLACES:
            row = rows[f"{place}, {name}"] = opening(work / name, place)
            row["beyond"] = row["seconds"] - rows["Phi de transformers"]["seconds"] - read * (place != "disco")
    for name, row in rows.items():
        beyond = f"{spanish(row['beyond'], 2)} s" if "beyond" in row else ""
        size = " | ".join(f"{spanish(row[key])} MB" for key in ("peak", "resident"))
        print(f"| {name} | {spanish(row['seconds'], 2)} s | {beyond} | {size} |", flush=True)


def by_slots(results, work, quick):
    """Decoding with tables of different sizes, against the smallest."""
    _, ours = pair(SMALL, [1, 4])
    sizes = [260_000, 2_600_000, 26_000_000]
    for size in sizes:
        write_tables(ours, work / f"slots-{size}", size // 16, torch.int8)
    measured = results["slots"] = {}
    for place in PLACES:
        models = {f"{size:.1e} filas": Variant(ours, work / f"slots-{size}", size // 16, place) for size in sizes}
        measured[f"{place}, int8, decodificar, lote 1"] = compare(decode, models, 15 if quick else 31, 1)
    table("Según el tamaño de la tabla (filas por capa)", measured)


def phi_1(results, work, quick):
    plain, ours = pair(PHI_1, [1, 15])
    write_tables(ours, work / "phi1", ROWS, torch.float16)
    size = sum(path.stat().st_size for path in (work / "phi1").iterdir())
    place, reason = choose_place("auto", size, 0, True)
    print(f"auto: {place}, {reason}", flush=True)
    variant = Variant(ours, work / "phi1", ROWS, place)

    models = {"Phi de transformers": lambda: plain, "memoria apagada": turned_off(ours)}
    models[f"auto ({place}), float16"] = variant
    measured = results["phi-1"] = {
        "prefill 1×256": compare(prefill, models, 3 if quick else 7, 1, 256),
        "decodificar, lote 1": compare(lambda model: decode(model, 1, 4), models, 3 if quick else 7),
    }
    table("La forma de Phi-1 (1.400 millones, float32), memoria en 1 y 15; entre paréntesis, cuartiles", measured)


def giant(results, work, quick):
    """2.6e8 slots, int8: 17.7 GB per layer, more than the RAM keeps of it."""
    plain, ours = pair(SMALL, [1, 4])
    print("Escribiendo 35 GB …", flush=True)
    rows = 260_000_000 // 16
    write_tables(ours, work / "giant", rows, torch.int8)
    write_backbone(ours, work / "giant", rows)
    plain.save_pretrained(work / "plain")
    alone, row = opening(work / "plain", "plain"), opening(work / "giant", "disco")
    size = sum(path.stat().st_size for path in (work / "giant").glob("model-engram-*"))
    row["beyond"], row["bytes"] = row["seconds"] - alone["seconds"], size
    print(
        f"Abrir {gigabytes(size)}: {spanish(row['seconds'], 2)} s, {spanish(row['beyond'], 2)} s más que Phi solo; "
        f"memoria {spanish(row['resident'] - alone['resident'])} MB más que Phi solo.", flush=True
    )  # fmt: skip
    results["giant"] = {"abrir": row}
    giant = {name: Variant(ours, work / "giant", rows, "disco", name == "adelantando la lectura")
             for name in ("sin adelantar la lectura", "adelantando la lectura")}  # fmt: skip
    for path in (work / "giant").glob("model-engram-*"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    models = {"Phi de transformers": lambda: plain, **giant}
    measured = prefill_and_decode(models)
    results["giant"] |= measured
    table("2,6e8 filas por capa, int8, en disco y frías", measured)


def prefill_and_decode(models: dict) -> dict:
    wanted = ("prefill 1×512", prefill, (1, 512)), ("decodificar, lote 1", decode, (1,))
    return {name: compare(measure, models, 9, *arguments) for name, measure, arguments in wanted}


def cold(results, work, quick):
    """6e7 slots, int8: 4.1 GB per layer, dropped from the disk's cache before each pass."""
    plain, ours = pair(SMALL, [1, 4])
    rows = 60_000_000 // 16
    print("Escribiendo 8 GB …", flush=True)
    write_tables(ours, work / "cold", rows, torch.int8)
    files = [*(work / "cold").glob("model-engram-*")]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not written yet cannot be dropped

    def dropped(variant):
        def model():
            for path in files:
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return variant()

        return model

    ahead, later = (Variant(ours, work / "cold", rows, "disco", prefetch) for prefetch in (True, False))
    models = {"Phi de transformers": lambda: plain, "adelantando la lectura": dropped(ahead)}
    results["cold"] = prefill_and_decode({**models, "sin adelantar la lectura": dropped(later)})
    table("6e7 filas por capa (8 GB), int8, en disco y frías en cada pasada", results["cold"])


def main(argv=None):
    parser = SpanishParser(
        description="Velocidad de Phi con memoria frente al Phi de transformers, en la misma ejecución.",
        epilog="Ejemplo: python tests/bench/speed.py --rapido --json medidas.json",
    )
    parser.add_argument("--rapido", action="store_true", help="menos variantes y repeticiones: unos cinco minutos")
    parser.add_argument("--tamanos", "--tamaños", action="store_true", help="decodificar con tablas de tres tamaños")
    parser.add_argument("--phi1", action="store_true", help="la forma de Phi-1 en vez de 512 × 8: unos 12 GB de RAM")
    parser.add_argument("--gigante", action="store_true", help="una tabla de 35 GB en disco, leída en frío")
    parser.add_argument("--frias", "--frías", action="store_true", help="8 GB de filas que ninguna pasada halla leídas")
    parser.add_argument("--carpeta", help="dónde escribir las tablas (por defecto, la temporal del sistema)")
    parser.add_argument("--json", metavar="ARCHIVO", help="guardar también las medidas")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} hilos"
    print(f"{machine}; float32.", flush=True)
    results = {"machine": machine}
    with tempfile.TemporaryDirectory(dir=options.carpeta) as work:
        chosen = {phi_1: options.phi1, giant: options.gigante, by_slots: options.tamanos, cold: options.frias}
        run = next((run for run, wanted in chosen.items() if wanted), small)
        run(results, Path(work), options.rapido)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
