"""What smaller rows cost, and two memories swapped on one Phi, on the demo's models.

    python train_phi_engram.py --demo && python tests/bench/memories.py

First the held-out loss of `phi1-engram-demo/` with its rows in each precision. Then phase 1 alone, twice, from
`phi1-engram-demo-control/` (a plain Phi): once on the code of sympy and once on that of transformers, which
requirements.txt installs; both memories are saved, and swapped on one open model: a table of 2 x 2 losses. About eight
minutes on two cores.
"""

import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import engram.demo as demo
import engram.training as training
from engram.console import SpanishParser, gigabytes, run_script, spanish
from engram.corpus import prepare_corpus
from engram.graft import load_phi_1_with_engram
from engram.memories import MEMORY_FILE, load_memory, remove_memory, save_memory
from engram.opening import open_model, quiet
from engram.steps import evaluate
from phi1_engram import PRECISIONS

PACKAGES = ("sympy", "transformers")
TOKENS = 3_000_000  # of each package, at most


def loss(model, corpus) -> float:
    return evaluate(model, corpus, demo.DEMO_RECIPE, model.device)["loss"]


def precisions(name, work) -> dict:
    """{precision: {"loss", "bytes"}} of the same memory."""
    model, tokenizer = open_model(name)
    corpus = prepare_corpus(tokenizer, length=demo.DEMO_RECIPE.length)
    rows = {}
    print(f"\n| filas de {name} | pérdida apartada | diferencia | ocupan |\n| --- | --- | --- | --- |")
    for precision in PRECISIONS:
        with quiet():
            model.save_pretrained(work / precision, engram_precision=precision)
            tokenizer.save_pretrained(work / precision)
        opened, _ = open_model(work / precision)
        size = sum(table.size(table.dtype) for table in opened.model.engram_tables.values())
        row = rows[precision] = {"loss": loss(opened, corpus), "bytes": size}
        change = spanish(100 * (row["loss"] / rows["float32"]["loss"] - 1), 4)
        print(f"| {precision} | {spanish(row['loss'], 6)} | {change} % | {gigabytes(size)} |", flush=True)
    return rows


def swapped(name, work, steps: int) -> dict:
    """{memory: {package: loss}} on one backbone that phase 1 left as it was."""
    corpora, folders = {}, {}
    recipe = replace(demo.DEMO_RECIPE, steps=(steps, 0))
    for package in PACKAGES:
        model, tokenizer = load_phi_1_with_engram(name, **demo.DEMO_ENGRAM)
        source = Path(importlib.util.find_spec(package).origin).parent
        corpora[package] = corpus = prepare_corpus(tokenizer, source, length=recipe.length, max_tokens=TOKENS)
        print(f"\n{corpus.describe()}")
        training.train_model(model, tokenizer, corpus, recipe, work / f"entrenado-{package}", save_every=10**9)
        folders[package] = work / package
        save_memory(model, folders[package])
    rows = {}
    remove_memory(model)
    for memory in ("ninguna", *PACKAGES):
        if memory != "ninguna":
            load_memory(model, folders[memory])
        rows[memory] = {package: loss(model, corpus) for package, corpus in corpora.items()}
    print(f"\n| memoria | {' | '.join(f'código de {package}' for package in PACKAGES)} | archivo |")
    print("|" + " --- |" * (len(PACKAGES) + 2))
    for memory, losses in rows.items():
        size = gigabytes((folders[memory] / MEMORY_FILE).stat().st_size) if memory in folders else "–"
        print(f"| {memory} | {' | '.join(spanish(value, 4) for value in losses.values())} | {size} |")
    whole = sum(table.size(table.dtype) for table in model.model.engram_tables.values())
    print(f"\nLas tablas enteras ocupan {gigabytes(whole)}.")
    return rows


def main(argv=None):
    parser = SpanishParser(
        description="Cuánto cuestan las filas más pequeñas, y dos memorias cambiadas sobre un mismo Phi.",
        epilog="Ejemplo: python tests/bench/memories.py --modelo phi1-engram-demo --json medidas.json",
    )
    parser.add_argument("--modelo", default="phi1-engram-demo", help="el de la demostración (por defecto, %(default)s)")
    parser.add_argument("--pasos", type=int, default=150, help="pasos de la fase 1 con cada paquete (%(default)s)")
    parser.add_argument("--json", metavar="ARCHIVO", help="guardar también las medidas")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        results = {"precisions": precisions(options.modelo, Path(work))}
        results["swapped"] = swapped(f"{options.modelo}-control", Path(work), options.pasos)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
