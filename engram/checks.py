"""The checks of a model against what must hold; `verify_phi_engram.py` runs them and tells."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from engram.console import counted, gigabytes, out_of_memory, spanish
from engram.graft import graft_difference
from engram.opening import n_bytes
from phi1_engram import (
    CACHE,
    TABLE_FILE,
    PhiEngramConfig,
    PhiEngramForCausalLM,
    TableFile,
    vocabulary_projection,
)

SEED = 0
TOKENS = 24  # probe length: more than the memory looks back (9 conv inputs and 2 tokens), and cheap at 1.4B
FILL = 0.1  # standard deviation of the numbers put into an untrained memory, so that it shows
PROBE_TEXT = '''def suma(valores):
    """Devuelve la suma de una lista de números."""
    total = 0
    for valor in valores:
        total += valor
    return total
'''
# Opens the saved folder as a stranger would: another process and folder, nothing of this project imported.
STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, ids, logits, device, attention, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=attention)
with torch.no_grad():
    torch.save(model.to(device).eval()(torch.load(ids).to(device)).logits.cpu(), logits)
"""


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or a number is not finite."""
    if a.shape != b.shape:
        return math.inf
    largest = (a.double() - b.to(a.device).double()).abs().max().item() if a.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def rounding(logits: torch.Tensor, model=None) -> float:
    """What two orders of the same sums may differ by: 1e-4 in float32, more where logits are large or precision low.

    A quantised model may round its activations to 8 bits, of which two orders give neighbouring ones.
    """
    largest = logits.float().abs().max().item()
    size = max(1.0, largest / 10) if math.isfinite(largest) else 1.0
    step = 2**-7 if getattr(model, "is_quantized", False) else torch.finfo(logits.dtype).eps
    return max(1e-4, 32 * step) * size


def number(value: float) -> str:
    return f"{value:.2g}".replace(".", ",")


def note(text: str):
    print(f"   ℹ️  {text}", flush=True)


def check_graft(model, ids):
    """A fresh memory on this backbone against transformers' own Phi with the same weights, bit for bit; of a quantised
    one, the model with its memory off."""
    if getattr(model, "is_quantized", False):
        model.model.use_memory = False
        try:
            return graft_difference(model, ids), 0.0
        finally:
            model.model.use_memory = True
    backbone = {name: tensor for name, tensor in model.state_dict().items() if "engram" not in name}
    # Small tables, not this model's: untrained rows are all alike, and the backbone is lent, so this costs no memory.
    small = {"engram_vocab_size": [1000] * (model.config.max_ngram_size - 1), "engram_tokenizer_compression": False}
    config, worst = PhiEngramConfig(**{**model.config.to_dict(), **small}), 0.0
    for attention in ("eager", "sdpa"):
        grafted = PhiEngramForCausalLM.from_pretrained(
            None, config=config, state_dict=dict(backbone), attn_implementation=attention, dtype=model.dtype,
            device_map={"": str(model.device)},
        )  # fmt: skip
        worst = max(worst, graft_difference(grafted.eval(), ids))
    return worst, 0.0


def check_memory_acts(model, ids):
    """How many Engram layers add nothing, or something that is not finite."""
    added = {}
    hooks = [
        model.model.layers[i].engram.register_forward_hook(lambda _, args, out, i=i: added.update({i: out}))
        for i in model.config.engram_layer_ids
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(table.writable for table in model.model.engram_tables.values()):
        if not any(out.any() for out in added.values()):
            where, cure = ("en disco", " Usa: --memoria ram") if model.memory_place == "disco" else ("en int8", "")
            note(f"Memoria sin entrenar y {where}, donde no se le pueden poner números de prueba: no se mira.{cure}")
            return None
    works = [i for i, out in added.items() if out.isfinite().all() and out.any()]
    return float(len(hooks) - len(works)), 0.0, f"{len(works)} de {len(hooks)} capas añaden algo"


def misfolded(tokenizer, projection: list[int]) -> int:
    """How many of the first ASCII tokens are not told apart by what they are without capitals and white space."""
    tokens, ids_of, texts_of = [], defaultdict(set), defaultdict(set)
    for token, canonical in zip(range(min(5000, len(tokenizer))), projection):  # all 50,000 take seconds
        text = tokenizer.decode([token], skip_special_tokens=False)
        if re.fullmatch(r"[ -~\t\r\n]+", text):  # of which nothing else is folded
            left = " ".join(text.lower().split())
            tokens.append((left, canonical))
            ids_of[left].add(canonical)
            texts_of[canonical].add(left)
    return sum(len(ids_of[left]) > 1 or len(texts_of[canonical]) > 1 for left, canonical in tokens)


def check_projection(tokenizer):
    """How many entries of the stored vocabulary projection are not those of the tokenizer that goes with the model, or
    are wrong in both, which the same function made."""

    def check(model, ids):
        config, stored = model.config, model.model.engram_hash.token_map.cpu()
        if config.engram_tokenizer_compression:
            expected = vocabulary_projection(tokenizer, config.vocab_size, config.engram_pad_id)
        else:
            expected = torch.arange(config.vocab_size)
        # A token added later is addressed like the pad token, or by an id of its own where the vocabulary was resized.
        later = torch.arange(len(stored)) >= len(tokenizer)
        later[list(tokenizer.get_added_vocab().values())] = True
        before = torch.cat((stored.new_tensor([-1]), stored.cummax(0).values[:-1]))
        later &= (stored == stored[config.engram_pad_id]) | (stored > before)
        wrong = int(((stored != expected) & ~later).sum())
        if config.engram_tokenizer_compression:
            wrong += misfolded(tokenizer, expected.tolist())
        right = f"{spanish(len(stored) - wrong)} de {spanish(len(stored))} entradas son las de su tokenizer"
        return float(wrong), 0.0, right

    return check


def check_steps(model, ids):
    """All at once against one token at a time, and in chunks."""
    whole, worst = model(ids, use_cache=False).logits, 0.0
    for size in (1, 7):
        past, pieces = None, []
        for chunk in ids.split(size, dim=1):
            output = model(chunk, cache=past, use_cache=True)
            past = output[CACHE]
            pieces.append(output.logits)
        worst = max(worst, difference(whole, torch.cat(pieces, dim=1)))
    return worst, rounding(whole, model)


def check_beams(model, ids):
    """4 beams with the cache: each one's score (sum of log-probabilities) against one pass over it without cache."""
    prompt = ids[:1, :8]
    plan = GenerationConfig(
        num_beams=4, num_return_sequences=4, max_new_tokens=12, min_new_tokens=12, do_sample=False, length_penalty=0.0,
        use_cache=True, return_dict_in_generate=True, output_scores=True, eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.engram_pad_id,
    )  # fmt: skip
    beams = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=plan)
    logits = model(beams.sequences, use_cache=False).logits
    said = beams.sequences[:, prompt.shape[1] :, None]
    chances = logits[:, prompt.shape[1] - 1 : -1].float().log_softmax(-1).gather(-1, said)  # [4, 12, 1]
    return difference(beams.sequences_scores.float(), chances.sum((1, 2))), rounding(logits, model)


def check_padding(model, ids):
    """Rows of unequal length in one left-padded batch, with the cache, against each row alone."""
    n = ids.shape[1]
    rows = [ids[0], ids[1, : n // 2], ids[0, 2:8]]
    batch = ids.new_full((len(rows), n), model.config.engram_pad_id)
    mask = torch.zeros_like(batch)
    for i, row in enumerate(rows):
        batch[i, n - len(row) :] = row
        mask[i, n - len(row) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    past, pieces = None, []
    for start, stop in [(0, n - 4), *((k, k + 1) for k in range(n - 4, n))]:
        output = model(
            batch[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
            cache=past, use_cache=True,
        )  # fmt: skip
        past = output[CACHE]
        pieces.append(output.logits)
    logits = torch.cat(pieces, dim=1)
    alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    return max(difference(a, logits[i, n - len(a) :]) for i, a in enumerate(alone)), rounding(logits, model)


def check_saved(model, ids):
    """Saved to a temporary folder: every tensor read back, and the logits of a stranger who opens it. Both exact."""
    if getattr(model, "is_quantized", False):
        note("Un modelo cuantizado al abrirlo no se guarda aquí. Se comprueba sin --cuantizar.")
        return None
    state = model.state_dict()
    size = n_bytes(model)
    place = tempfile.gettempdir()
    if shutil.disk_usage(place).free < 1.1 * size:
        note(f"No se guarda: hacen falta {gigabytes(1.1 * size)} libres en {place} (cámbialo con la variable TMPDIR).")
        return None
    with tempfile.TemporaryDirectory(prefix="phi1-engram-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, "guardado")
        model.save_pretrained(folder)
        lost, worst = {name for name in state if "engram_tables" not in name}, 0.0
        for file in folder.glob("model-*-of-*.safetensors"):
            with safe_open(file, "pt") as saved:
                for name in saved.keys():
                    worst = max(worst, difference(saved.get_tensor(name), state[name]) if name in state else math.inf)
                    lost.discard(name)
        for layer_id, table in model.model.engram_tables.items():
            file = folder / TABLE_FILE.format(layer_id)
            saved = TableFile(file, f"model.engram_tables.{layer_id}.weight", table.n_rows, table.d_head)
            kept = table.file.chunks() if table.weight is None else table.weight.detach().split(saved.step)
            for ours, theirs in zip(kept, saved.chunks(), strict=True):
                worst = max(worst, difference(theirs, ours))
        if model.config.tie_word_embeddings:
            lost.discard("lm_head.weight")
        if lost:
            note("Tensores que no se guardaron: " + ", ".join(sorted(lost)[:5]))
            return math.inf, 0.0
        if _free_memory(model.device) < 1.2 * size:
            note("Falta RAM o memoria de la GPU para una segunda copia: se han releído los tensores, sin abrirlo.")
            return worst, 0.0
        answer = Path(temporary, "logits.pt")
        torch.save(ids, Path(temporary, "ids.pt"))
        arguments = [folder, Path(temporary, "ids.pt"), answer, model.device, model.config._attn_implementation]
        process = subprocess.run(
            [sys.executable, "-c", STRANGER, *map(str, arguments), str(torch.get_num_threads())],
            cwd=temporary, capture_output=True, text=True, errors="replace",
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(temporary, "modules"))},
        )  # fmt: skip
        if process.returncode:
            note("Otro proceso no pudo abrirlo: " + (process.stderr.strip().splitlines() or ["sin explicación"])[-1])
            return math.inf, 0.0
        return max(worst, difference(model(ids, use_cache=False).logits.cpu(), torch.load(answer))), 0.0


def check_gradient(model, ids):
    """How many Engram tensors a training step would not reach: no gradient, all of it zero, or not finite."""
    if not all(table.writable for table in model.model.engram_tables.values()):
        note("Esta memoria solo se puede leer (está en disco o en int8). Se entrena con: python train_phi_engram.py")
        return None
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if "engram" in name))
    tables = list(model.model.engram_tables.values())
    before = [p.requires_grad for p in parameters], [table.sparse_grad for table in tables]
    try:
        for p in parameters:
            p.requires_grad_(True)
        for table in tables:
            table.sparse_grad = True  # only the rows that were read: a full table's gradient may not fit
        with torch.enable_grad():
            loss = model(ids, labels=ids, use_cache=False).loss
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for p, value in zip(parameters, before[0]):
            p.requires_grad_(value)
        for table, value in zip(tables, before[1]):
            table.sparse_grad = value
    missed = []
    for name, gradient in zip(names, gradients):
        values = gradient.coalesce().values() if gradient is not None and gradient.is_sparse else gradient
        if values is None or not values.isfinite().all() or not values.any():
            missed.append(name)
    if missed:
        note("Sin gradiente útil: " + ", ".join(missed[:5]))
    return float(len(missed)), 0.0, f"llega a {len(names) - len(missed)} de {len(names)} tensores"


CHECKS = [
    ("Injerto: con la memoria recién puesta, los mismos logits que el Phi de transformers", check_graft),
    ("Memoria: cada capa Engram añade algo, y números finitos", check_memory_acts),
    ("Caché: de una vez = token a token = por trozos", check_steps),
    ("Haces: 4 haces con caché = cada uno recalculado sin caché", check_beams),
    ("Relleno: cada fila de un lote desigual = la fila sola", check_padding),
    ("Guardar y cargar: tensores y logits iguales, también con AutoModelForCausalLM en otro proceso", check_saved),
    ("Gradiente: un paso de entrenamiento llega a toda la memoria", check_gradient),
]


def _free_memory(device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # accelerate brings it

    return psutil.virtual_memory().available


@contextmanager
def acting_memory(model):
    """Give numbers to the rows of memory that are all zero (untrained), as a silent memory would pass any check.

    The zeros come back afterwards.
    """
    rows_at_once, filled = 2**18, []
    try:
        for name, parameter in model.named_parameters():
            if "engram" not in name or parameter.ndim < 2 or not parameter.is_floating_point():
                continue
            generator = torch.Generator(parameter.device).manual_seed(SEED)
            for rows in parameter.data.split(rows_at_once):
                zero = ~rows.flatten(1).any(dim=1)
                if zero.any():
                    filled.append((rows, zero))
                    noise = torch.randn(rows.shape, generator=generator, device=rows.device) * FILL
                    rows[zero] = noise[zero].to(rows.dtype)
        yield sum(int(zero.sum()) for _, zero in filled)
    finally:
        for rows, zero in filled:
            rows[zero] = 0


def probe(model, tokenizer) -> torch.LongTensor:
    """int64 [2, T]: a row of Python code where there is a tokenizer, and a row of any ids that the model has."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.vocab_size, (2, TOKENS), generator=generator)
    if tokenizer is not None:
        code = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"][:TOKENS]
        ids[0, : len(code)] = torch.tensor(code)
    return ids.to(model.device)


@torch.no_grad()
def verify(model, tokenizer=None, first_step: int = 1) -> bool:
    """Run every check on `model`, printing each as a numbered step in Spanish.

    The model comes back as it was. Where it was never trained, its memory holds seeded numbers meanwhile.

    Args:
        model: a PhiEngramForCausalLM, on the device where it is to be checked.
        tokenizer: its tokenizer; with it, the stored vocabulary projection is checked too.
    Returns:
        True when nothing that could be checked has failed.
    """
    checks, training, results = list(CHECKS), model.training, []
    if tokenizer is not None:
        checks.append(("Proyección: la guardada es la de su tokenizer", check_projection(tokenizer)))
    model.eval()
    try:
        with acting_memory(model) as n_filled:
            if n_filled:
                rows = counted(n_filled, "fila")
                note(f"Memoria sin entrenar ({rows}): se prueba con números de semilla fija.")
            for step, (title, check) in enumerate(checks, first_step):
                results.append((step, run_check(step, title, check, model, probe(model, tokenizer))))
    finally:
        model.train(training)
    return conclude(results)


def run_check(step: int, title: str, check, *arguments) -> tuple[float, float, str] | None:
    """Run one check and print its line; None: it was left out, and has neither passed nor failed.

    A check gives (largest difference, tolerance), or where it counts instead of comparing (how many are wrong, 0, words
    that say so). One that breaks down has failed.
    """
    print(f"{step}. {title}", flush=True)
    try:
        result = check(*arguments)
    except Exception as error:  # a broken model may raise anything: that is a finding, not a crash
        if out_of_memory(error):
            raise
        note(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        result = math.inf, 0.0, "la comprobación se ha roto"
    if result is None:
        print("   ⏭️  No se ha comprobado.", flush=True)
        return None
    found, tolerance, *words = result
    words = words[0] if words else f"diferencia {number(found)} (tolerancia {number(tolerance)})"
    print(f"   {'✅' if found <= tolerance else '❌'} {words}", flush=True)
    return found, tolerance, words


def conclude(results: list[tuple]) -> bool:
    """Print the last line: [(step, what `run_check` gave)] -> whether all that was checked holds."""
    done = [(step, *result) for step, result in results if result is not None]
    failed = [result for result in done if not result[1] <= result[2]]
    skipped = [str(step) for step, result in results if result is None]
    left = f"; sin comprobar: paso{'s' * (len(skipped) > 1)} {', '.join(skipped)}" if skipped else ""
    compared = failed or [result for result in done if result[3].startswith("diferencia")]
    step, _, _, words = max(compared, key=lambda result: result[1])
    if failed:
        n = "n" if len(failed) > 1 else ""
        print(f"\n❌ Algo no funciona: falla{n} {len(failed)} de {len(done)}{left}; lo peor, paso {step}: {words}.")
    else:
        what = "Funciona lo que se ha comprobado" if skipped else "Todo funciona"
        print(f"\n✅ {what}: {counted(len(done), 'comprobación', 'comprobaciones')}{left}; mayor {words}, paso {step}.")
    return not failed
