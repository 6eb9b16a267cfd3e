"""Does the memory pay? A study on real code, row by row: a row that is done is kept, and never run twice.

    python tests/study/small.py                      # says which rows are done, and runs the missing ones in order
    python tests/study/small.py --fila engram-s0     # one row
    python tests/study/small.py --tabla              # the tables of tests/study/RESULTADOS.md

Every row goes on from one base, a Phi of the demo's shape trained from scratch on Python's standard library (made once,
in ~/.cache/phi-engram/estudio/). Seeds vary the memory's first projections and the order of the further text, never
the base. Rows are appended to tests/study/results.jsonl: delete a line there to run its row again. On a processor of
another kind the tokenizer orders its ties differently, and the base is another: its rows go to a file of their own
(--resultados), and are compared with one another. On glibc,
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 in front saves a fifth of the time.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from torch import nn
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
import engram.demo as demo
import engram.optimizers as optimizers
import engram.processes as processes
import engram.training as training
from engram.console import SpanishParser, UserError, run_script, spanish
from engram.corpus import Corpus, batch_at
from engram.folders import whole_folder
from engram.graft import load_phi_1_with_engram
from engram.rows import TrainedTables
from engram.steps import evaluate, run_steps
from engram.texts import HELD_OUT_SHARE, Skipped, standard_library, text_files

RESULTS = Path(__file__).with_name("results.jsonl")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi-engram" / "estudio"
# The same 16 blocks a step as in one micro-batch, in four: it stays in a small processor's cache.
RECIPE = replace(demo.DEMO_RECIPE, batch=4, accumulate=4, memory_rates=(2.5e-3,) * 2, table_rates=(2e-2,) * 2)
BASE_STEPS = 1200
# Steps of both phases: a tenth of them with Phi frozen, which lost less than a third did.
SHORT, LONG = (20, 180), (40, 360)
DOMAIN_TOKENS = 1_500_000  # of a package, at most
SEEDS = (0, 1, 2)
ROW_SIZE = 0.1  # root mean square of rows that do not begin at zero
WARM_BLOCKS = 4096  # of the training text, from which rows begin warm


# ---------- The rows, in the order in which they are run ----------

def study_rows() -> dict[str, dict]:
    """{name: settings}. `kind` says which function below makes the row; the rest are its arguments."""
    rows = {"corpus-stdlib": dict(kind="corpus", domain="stdlib"), "base": dict(kind="base")}

    def engram(name, steps=SHORT, seed=0, rate=RECIPE.backbone_rate, **settings):
        rows[name] = dict(kind="engram", steps=steps, seed=seed, rate=rate, **settings)

    # Equal tokens: rates on seed 0, of which the other seeds take the best.
    for rate in (1e-3, 5e-4, 2e-3, 4e-3):
        rows[f"control-largo-{rate:g}"] = dict(kind="control", steps=sum(LONG), rate=rate, seed=0)
    for rate in (1e-3, 2e-3, 4e-3):
        engram(f"engram-largo-{rate:g}", LONG, rate=rate)
    for seed in SEEDS[1:]:
        engram(f"engram-s{seed}", LONG, seed, rate=None)
        rows[f"control-s{seed}"] = dict(kind="control", steps=sum(LONG), seed=seed)
    rows["control-ancho"] = dict(kind="control", steps=sum(LONG), seed=0, wide=True)
    # Equal wall-clock.
    rows["ritmo"] = dict(kind="pace")
    for seed in SEEDS:
        rows[f"reloj-s{seed}"] = dict(kind="control", seed=seed)
    domain_rows(rows, "sympy")
    # What matters.
    for rate in (2e-3, 1e-3, 4e-3, 5e-4):
        rows[f"control-corto-{rate:g}"] = dict(kind="control", steps=sum(SHORT), rate=rate, seed=0)
    engram("engram-corto")
    engram("sin-compresion", config=dict(engram_tokenizer_compression=False))
    engram("fases-0-200", (0, 200))
    engram("fases-65-135", (65, 135))
    engram("fases-65-135-siguiente", (65, 135), begin="next")
    engram("fases-130-270", (130, 270))
    engram("ordenes-2", config=dict(max_ngram_size=2, engram_vocab_size=[20000]))
    engram("ordenes-234", config=dict(max_ngram_size=4, engram_vocab_size=[20000] * 3))
    for rows_per_head in (200, 2000, 200000):
        engram(f"filas-{rows_per_head}", config=dict(engram_vocab_size=[rows_per_head] * 2))
    for layers in ([1], [0], [2], [3], [0, 1], [1, 3]):
        engram("capas-" + "-".join(map(str, layers)), config=dict(layer_ids=layers))
    engram("sin-puerta", without="gate")
    engram("sin-conv", without="conv")
    engram("tasa-x1", recipe=dict(table_rates=(1e-3, 1e-3)))
    engram("tasa-x5", recipe=dict(table_rates=(5e-3, 5e-3)))
    engram("tasa-x25", recipe=dict(table_rates=(2.5e-2, 2.5e-2)))
    engram("filas-azar", begin="random")
    engram("filas-tokens", begin="tokens")
    engram("filas-estados", begin="states")
    engram("filas-siguiente", begin="next")
    engram("estado-fila", recipe=dict(row_state="fila"))
    for size in (256, 64, 32):
        engram(f"d-{size}", config=dict(n_embed_per_ngram=size))
    for heads in (16, 4):
        engram(f"cabezas-{heads}", config=dict(n_head_per_ngram=heads))
    engram("con-sesgo", config=dict(engram_bias=True))
    for name in SEVERAL_SEEDS:
        for seed in SEEDS[1:]:
            rows[f"{name}-s{seed}"] = dict(rows[name], seed=seed)
    return rows


# Rows of what matters that are worth more than one seed.
SEVERAL_SEEDS = ("engram-corto", "fases-0-200", "sin-compresion", "sin-puerta", "sin-conv")


# What is trained in a new domain, and the rates tried on seed 0 (for the memory: factors of the demo's).
METHODS = {
    "memoria": (1, 0.3, 3, 10), "lora": (3e-3, 1e-2, 3e-2), "ancho": (3e-3, 1e-2, 3e-2), "todo": (1e-3, 2e-3, 4e-3),
}  # fmt: skip


def domain_rows(rows, domain):
    """Each method at both its rates for seed 0, backbone frozen but in "todo"; the other seeds take the best."""
    rows[f"corpus-{domain}"] = dict(kind="corpus", domain=domain)
    rows[f"{domain}-base"] = dict(kind="adapt", domain=domain, method="nada", seed=0)
    for method, rates in METHODS.items():
        for rate in rates:
            rows[f"{domain}-{method}-{rate:g}"] = dict(kind="adapt", domain=domain, method=method, rate=rate, seed=0)
    for seed in SEEDS[1:]:
        for method in METHODS:
            rows[f"{domain}-{method}-s{seed}"] = dict(kind="adapt", domain=domain, method=method, seed=seed)


# ---------- Results kept ----------

def read_results(path=None) -> dict[str, dict]:
    """{name: row} of the rows that are done."""
    path = path or RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["fila"]: row for row in map(json.loads, lines)}


def run_row(name: str, settings: dict, path=None) -> dict:
    """Run one row and append it to the results on the disk, or return the one that is there."""
    path = path or RESULTS
    done = read_results(path)
    if name in done:
        return done[name]
    print(f"\n=== {name}: {settings}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    measured = KINDS[settings["kind"]](**{key: value for key, value in settings.items() if key != "kind"})
    row = dict(fila=name, **{**settings, **measured}, threads=torch.get_num_threads(), commit=commit)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print({key: value for key, value in row.items() if key != "left_out"}, flush=True)
    return row


def best_rate(prefix: str) -> float:
    """The rate with the lowest loss among the seed-0 rows done whose name is `prefix` and a rate."""
    done = [row for row in read_results().values() if row["fila"].startswith(prefix) and "rate" in study_rows().get(
        row["fila"], {})]  # fmt: skip
    if not done:
        raise UserError(f"Falta elegir la tasa: ejecuta antes una fila {prefix}…, o todas sin --fila.")
    return min(done, key=lambda row: row["loss"])["rate"]


# ---------- Corpora: near-duplicates of the training text are no test ----------

def shingles(text: str, size: int = 5) -> set[int]:
    """Hashes of every `size` consecutive lines that are not blank, without their indentation."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {hash(tuple(lines[i : i + size])) for i in range(max(1, len(lines) - size + 1))}


def near_duplicates(held_out: list[str], training, share: float = 0.2) -> dict[int, float]:
    """{index in held_out: share of its distinct 5-line shingles that occur in training}, where that is >= `share`."""
    seen = set().union(*map(shingles, training))
    shares = {i: len(own & seen) / len(own) for i, own in enumerate(map(shingles, held_out))}
    return {i: found for i, found in shares.items() if found >= share}


def package_code(package: str) -> Path:
    """A copy of an installed package's .py files, without its tests."""
    folder = CACHE / "dominios" / package
    if not folder.exists():
        source = importlib.util.find_spec(package).submodule_search_locations[0]

        def unwanted(where, names):
            return [
                name
                for name in names
                if name in ("test", "tests", "testing", "benchmarks", "__pycache__")
                or (Path(where, name).is_file() and not name.endswith(".py"))
            ]

        with whole_folder(folder) as temporary:
            shutil.copytree(source, temporary, ignore=unwanted, dirs_exist_ok=True)
    return folder


def files_of(domain: str, tokenizer):
    """Whole files of a domain as {name: (text, ids)}, of training and held out, and a digest of all.

    prepare_corpus also holds out the end of long files, which the base of these rows has been trained on.
    """
    source, parts, count, digest = standard_library(), ({}, {}), 0, hashlib.sha256()
    if domain != "stdlib":
        source = package_code(domain)
    for file in text_files(source):
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\0" not in text and (domain == "stdlib" or count < DOMAIN_TOKENS):
            ids = np.asarray([*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id], np.uint16)
            draw = int.from_bytes(hashlib.sha256(b"0\n" + raw).digest()[:8], "big")
            parts[draw % HELD_OUT_SHARE == 0][str(file.relative_to(source))] = text, ids
            digest.update(ids.tobytes())
            count += len(ids)
    return *parts, digest.hexdigest()


def as_corpus(domain: str, training: dict, held_out: dict, digest: str) -> Corpus:
    tokens = [np.concatenate([ids for _, ids in part.values()]) for part in (training, held_out)]
    size = sum(len(text.encode()) for text, _ in held_out.values()) / len(tokens[1])
    return Corpus(domain, *tokens, size, len(training) + len(held_out), Skipped(), digest)


def find_duplicates(domain: str) -> dict:
    """Row of kind "corpus": which held-out files are left out of the measure, and by how much they are copies."""
    training, held_out, digest = files_of(domain, AutoTokenizer.from_pretrained(base_folder()))
    copies = near_duplicates([text for text, _ in held_out.values()], [text for text, _ in training.values()])
    names = list(held_out)
    return dict(
        digest=digest, left_out={names[i]: round(share, 2) for i, share in copies.items()},
        documents=[len(training), len(held_out)],
        tokens=[sum(len(ids) for _, ids in part.values()) for part in (training, held_out)],
    )  # fmt: skip


def study_corpus(domain: str):
    """Tokenizer, and the corpus with near-duplicates taken out of its held-out part."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    training, held_out, digest = files_of(domain, tokenizer)
    row = run_row(f"corpus-{domain}", dict(kind="corpus", domain=domain))
    if row["digest"] != digest:
        raise UserError(
            f"El texto de {domain}, en tokens, no es el de los resultados que ya hay en {RESULTS} (¿otra máquina, u "
            "otra versión de Python o del paquete?). Empieza un archivo nuevo: --resultados OTRO.jsonl"
        )
    kept = {name: file for name, file in held_out.items() if name not in row["left_out"]}
    return tokenizer, as_corpus(domain, training, kept, digest)


# ---------- Models ----------

def base_folder() -> Path:
    """The folder of the Phi from which every row goes on, trained from scratch the first time."""
    folder = CACHE / "base"
    if not folder.exists():
        tokenizer = demo.demo_tokenizer(text_files(standard_library()), demo.DEMO_SHAPE["vocab_size"])
        corpus = as_corpus("stdlib", *files_of("stdlib", tokenizer))
        set_seed(0)
        end = tokenizer.eos_token_id
        base = PhiForCausalLM(PhiConfig(**demo.DEMO_SHAPE, bos_token_id=end, eos_token_id=end))
        row = demo.train_plain(
            base, corpus, RECIPE, demo.DEMO_BASE_RATE, steps=BASE_STEPS, offset=0, label="Phi de partida"
        )
        with whole_folder(folder) as temporary:
            base.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "fila.json").write_text(json.dumps(row))
    return folder


class OpenGate(nn.Module):
    """A gate that lets everything in."""

    def forward(self, hidden, key):
        return torch.ones_like(hidden[..., :1], dtype=torch.float32)


class NoConv(nn.Module):
    """A convolution that adds nothing."""

    history = 0

    def forward(self, x, reach=None):
        return torch.zeros_like(x).transpose(1, 2)


class Widened(nn.Module):
    """An MLP with `columns` more hidden units, whose output begins at zero."""

    def __init__(self, mlp, columns: int, std: float):
        super().__init__()
        self.mlp = mlp
        self.new_in = nn.Linear(mlp.fc1.in_features, columns)
        self.new_out = nn.Linear(columns, mlp.fc1.in_features, bias=False)
        nn.init.normal_(self.new_in.weight, std=std)
        nn.init.zeros_(self.new_in.bias)
        nn.init.zeros_(self.new_out.weight)

    def forward(self, hidden):
        activation = getattr(self.mlp, "activation_fn", None) or self.mlp.activation
        return self.mlp(hidden) + self.new_out(activation(self.new_in(hidden)))


def in_use(model) -> int:
    """Parameters of the memory that act on one token: its dense weights and the rows that one token reads."""
    dense = sum(p.numel() for name, p in model.named_parameters() if "engram" in name and "engram_tables" not in name)
    config = model.config
    return dense + len(config.engram_layer_ids) * (config.max_ngram_size - 1) * config.n_embed_per_ngram


def widen(model, parameters: int):
    """Add so many new MLP weights. Two a column and layer, multiplied once a token each, as dense Engram weights are:
    equal parameters in use are equal FLOPs."""
    config = model.config
    columns = round(parameters / config.num_hidden_layers / (2 * config.hidden_size + 1))
    for layer in model.model.layers:
        layer.mlp = Widened(layer.mlp, columns, config.initializer_range)


def add_lora(model, parameters: int):
    """Freeze Phi and add LoRA to all its matrices, of the rank that comes nearest to so many parameters."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("Las filas de LoRA necesitan un paquete más. Instálalo con: pip install peft") from None
    targets = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    per_rank = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets
    )
    rank = round(parameters / per_rank)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


@torch.no_grad()
def begin_rows(model, begin: str, corpus, recipe):
    """Give rows another beginning than zero; the value projection begins at zero instead, so the graft stays exact.

    "random": normal. "tokens": the mean of the backbone's embeddings of the n-gram's tokens (NGM, arXiv 2605.16893).
    "states": the backbone's last hidden state at the n-gram (Memory Grafting, arXiv 2605.20948). "next": the head's
    vector of the token that follows it, less the mean vector (softmax does not see a common part). The last three are
    averaged over all occurrences in the text that fall on the row; each head keeps its part of a random rotation.
    """
    config, memory = model.config, model.model.engram_hash
    orders, heads = config.max_ngram_size - 1, config.n_head_per_ngram
    for layer in config.engram_layer_ids:
        nn.init.zeros_(model.model.layers[layer].engram.value_proj.weight)
    tables = [model.model.engram_tables[str(layer)].weight for layer in config.engram_layer_ids]
    if begin == "random":
        for rows in tables:
            nn.init.normal_(rows, std=ROW_SIZE)
        return
    turn = torch.empty(config.hidden_size, config.n_embed_per_ngram)
    nn.init.orthogonal_(turn)
    counts = [torch.zeros(len(rows), 1) for rows in tables]
    for number in range(WARM_BLOCKS // recipe.batch):
        ids = batch_at(corpus.train, number, recipe)
        ids, following = ids[:, :-1], ids[:, 1:]
        if begin == "tokens":
            tokens = model.model.embed_tokens(ids)
            shifted = [nn.functional.pad(tokens, (0, 0, back, 0))[:, : ids.shape[1]] for back in range(orders + 1)]
            vectors = [sum(shifted[: n + 1]) / (n + 1) for n in range(1, orders + 1)]
        elif begin == "next":
            vectors = [(model.lm_head.weight - model.lm_head.weight.mean(0))[following]] * orders
        else:
            vectors = [model.model(ids, use_cache=False).last_hidden_state] * orders
        pieces = torch.stack([v @ turn for v in vectors], 2)  # [B, T, N-1, n_embed_per_ngram]
        pieces = pieces.view(-1, config.n_embed_per_ngram // heads)  # [B*T*H, d_head]
        for place, indices in enumerate(model.model.ngram_indices(ids).values()):
            row_ids = (indices + memory.offsets[place]).flatten()
            tables[place].index_add_(0, row_ids, pieces)
            counts[place].index_add_(0, row_ids, torch.ones(len(row_ids), 1))
    for rows, count in zip(tables, counts):
        rows.div_(count.clamp_min(1))
        rows.mul_(ROW_SIZE / rows[count[:, 0] > 0].pow(2).mean().sqrt())


def grafted(config=None, without=None, begin="zero", seed=0, corpus=None, recipe=RECIPE):
    """The base with an untrained memory, whatever its rows begin with: still the same Phi."""
    set_seed(seed)
    model, tokenizer = load_phi_1_with_engram(base_folder(), **{**demo.DEMO_ENGRAM, **(config or {})})
    for layer in model.config.engram_layer_ids:
        engram = model.model.layers[layer].engram
        if without == "gate":
            engram.gate = OpenGate()
        if without == "conv":
            engram.conv = NoConv()
    if begin != "zero":
        begin_rows(model, begin, corpus, recipe)
    return model, tokenizer


# ---------- Kinds of rows ----------

def base_row() -> dict:
    """Row of kind "base": the loss from which all others go on."""
    _, corpus = study_corpus("stdlib")
    trained = json.loads((base_folder() / "fila.json").read_text())
    model = PhiForCausalLM.from_pretrained(base_folder())
    loss = evaluate(model, corpus, RECIPE, "cpu")["loss"]
    tokens = BASE_STEPS * RECIPE.tokens_per_step
    return dict(loss=loss, steps=BASE_STEPS, tokens=tokens, seconds=trained["seconds"], rate=demo.DEMO_BASE_RATE)


def control_row(seed: int, steps: int | None = None, rate: float | None = None, wide: bool = False) -> dict:
    """Row of kind "control": the base goes on without memory; by default for as long as Engram's two phases take.

    wide: with new MLP units, as many parameters as the memory uses for a token; all of it learns.
    """
    _, corpus = study_corpus("stdlib")
    if steps is None:
        pace = read_results().get("ritmo") or run_row("ritmo", study_rows()["ritmo"])
        steps = round((LONG[0] * pace["frozen"] + LONG[1] * pace["joint"]) / pace["control"])
    rate = rate or best_rate("control-largo-")
    recipe = replace(RECIPE, seed=seed + 1)
    model = PhiForCausalLM.from_pretrained(base_folder())
    if wide:
        set_seed(seed)
        widen(model, in_use(grafted(seed=seed)[0]))
    row = demo.train_plain(model, corpus, recipe, rate, steps=steps, offset=0, label="control")
    tokens = steps * recipe.tokens_per_step
    return dict(loss=row["loss"], steps=steps, rate=rate, tokens=tokens, seconds=row["seconds"])


def engram_row(seed: int, steps, rate=None, recipe=None, config=None, without=None, begin="zero") -> dict:
    """Row of kind "engram": both phases, through the same function as the product. `rate` is Phi's."""
    _, corpus = study_corpus("stdlib")
    rate = rate or best_rate("engram-largo-")
    recipe = replace(RECIPE, steps=tuple(steps), seed=seed + 1, backbone_rate=rate, **(recipe or {}))
    started = time.perf_counter()
    model, tokenizer = grafted(config, without, begin, seed, corpus, recipe)
    grafting = time.perf_counter() - started
    return dict(train_memory(model, tokenizer, corpus, recipe), rate=rate, graft_seconds=grafting)


def train_memory(model, tokenizer, corpus, recipe) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        outcome = training.train_model(model, tokenizer, corpus, recipe, Path(scratch) / "engram", save_every=10**9)
    before, *after = outcome["results"]
    return dict(
        loss=after[-1]["loss"], before=before["loss"], after_phases=[row["loss"] for row in after],
        tokens=sum(recipe.steps) * recipe.tokens_per_step, seconds=sum(row["seconds"] for row in after),
        trained=model.num_parameters(), slots=sum(t.n_rows for t in model.model.engram_tables.values()),
    )  # fmt: skip


def pace_row(rounds: int = 20) -> dict:
    """Row of kind "pace": median seconds of a step of the control, of phase 1 and of phase 2, taken in turn."""
    _, corpus = study_corpus("stdlib")
    runners = {}
    for name in ("control", "frozen", "joint"):
        model = PhiForCausalLM.from_pretrained(base_folder()) if name == "control" else grafted()[0]
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(name != "frozen" or "engram" in key)
        tables = None if name == "control" else TrainedTables(model, RECIPE.row_state)
        optimizer = optimizers.make_optimizer(model, 1e-3, 2.5e-3, 2e-2, 0.1, tables=tables)
        accelerator = processes.make_accelerator()
        runners[name] = (accelerator, *accelerator.prepare(model, optimizer))
    seconds = {name: [] for name in runners}
    for step in range(rounds):
        for name, (accelerator, model, optimizer) in runners.items():
            held = accelerator, model, optimizer, corpus, RECIPE
            seconds[name].append(run_steps(*held, steps=step + 1, first=step, label=name))
    return {name: median(values[2:]) for name, values in seconds.items()}


def adapt_row(domain: str, method: str, seed: int, rate: float | None = None, steps: int = 100) -> dict:
    """Row of kind "adapt": learn a new domain in one way; the loss there and, `old`, on the standard library."""
    _, new = study_corpus(domain)
    _, old = study_corpus("stdlib")
    recipe = replace(RECIPE, seed=seed + 1, weight_decay=0.1 if method == "todo" else 0.0)
    memory, tokenizer = grafted(seed=seed)
    size = in_use(memory)
    model = PhiForCausalLM.from_pretrained(base_folder())
    if method == "nada":
        losses = [evaluate(model, corpus, recipe, "cpu")["loss"] for corpus in (new, old)]
        return dict(loss=losses[0], old=losses[1])
    rate = rate or best_rate(f"{domain}-{method}-")
    set_seed(seed)
    if method == "memoria":
        rates = {name: (getattr(RECIPE, name)[0] * rate,) * 2 for name in ("memory_rates", "table_rates")}
        row = train_memory(memory, tokenizer, new, replace(recipe, steps=(steps, 0), **rates))
        model, trained = memory, size
    else:
        if method == "lora":
            add_lora(model, size)
        elif method == "ancho":
            model.requires_grad_(False)
            widen(model, size)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = demo.train_plain(model, new, recipe, rate, steps=steps, offset=0, label=method)
    forgotten = evaluate(model, old, recipe, "cpu")["loss"]
    tokens = steps * recipe.tokens_per_step
    return dict(
        loss=row["loss"], old=forgotten, rate=rate, steps=steps, tokens=tokens, seconds=row["seconds"], trained=trained
    )


KINDS = {
    "corpus": find_duplicates, "base": base_row, "control": control_row, "engram": engram_row, "pace": pace_row,
    "adapt": adapt_row,
}  # fmt: skip


# ---------- Command line ----------

def main(argv=None):
    parser = SpanishParser(description="Estudio: ¿compensa la memoria?", epilog="Ejemplo: --fila engram-s0")
    parser.add_argument("--fila", metavar="NOMBRE", help="una sola fila (sin él, todas las que faltan, en orden)")
    parser.add_argument("--tabla", action="store_true", help="imprime las tablas de lo hecho y termina")
    parser.add_argument("--resultados", type=Path, help="otro archivo, para un Phi de partida hecho en otra máquina")
    args = parser.parse_args(argv)
    global RESULTS
    RESULTS = args.resultados or RESULTS
    rows = study_rows()
    if args.fila and args.fila not in rows:
        raise UserError(f"No hay ninguna fila '{args.fila}'. Las que hay: {', '.join(rows)}.")
    if args.tabla:
        from study.tables import tables

        if "base" not in read_results():
            raise UserError(f"En {RESULTS} no hay ninguna fila hecha todavía.")
        return print(tables(read_results()))
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    done = read_results()
    for name in [args.fila] if args.fila else rows:
        print(f"{'hecha' if name in done else 'falta'}: {name}")
    started = time.perf_counter()
    for name in [args.fila] if args.fila else rows:
        run_row(name, rows[name])
    print(f"Tiempo total: {spanish(time.perf_counter() - started)} s.")


if __name__ == "__main__":
    run_script(main)
