"""A corpus larger than memory: write it, tokenise it and read batches of it in a process that may hold 1 GB.

    python tests/bench/corpus.py --gigas 2
    python tests/bench/corpus.py --gigas 0.2 --carpeta /tmp/corpus --modelo phi1-engram

Half of the text is one .txt file, a quarter one .jsonl and a quarter many .py files: the standard library's sources,
again and again, with other numbers each time. The limit is RLIMIT_DATA: asking for more private memory is an error.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

BATCHES = 2000


def write_corpus(folder: Path, size: int):
    """`size` bytes of varied text below `folder`, unless they are there already."""
    from engram.texts import standard_library, text_files

    done = folder / f"escrito-{size}"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path.read_text("utf-8", "replace") for path in text_files(standard_library())]

    def varied():
        for turn in count():
            for text in sources:
                yield re.sub(r"\d+", lambda number, turn=turn: str(int(number[0][:9]) + turn), text) if turn else text

    texts, written = varied(), 0
    with open(folder / "grande.txt", "w", encoding="utf-8") as large:
        while written < size // 2:
            written += large.write(next(texts))
    with open(folder / "filas.jsonl", "w", encoding="utf-8") as rows:
        while written < size * 3 // 4:
            written += rows.write(json.dumps({"text": next(texts)}, ensure_ascii=False) + "\n")
    for number in count():
        if written >= size:
            break
        path = folder / f"sueltos-{number // 1000:03d}" / f"m{number:06d}.py"
        path.parent.mkdir(exist_ok=True)
        written += path.write_text(next(texts), encoding="utf-8")
    done.touch()


def memory() -> dict[str, float]:
    """Megabytes: most held at once (mapped files included), and held now for this process alone."""
    status = Path("/proc/self/status").read_text()
    return {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1e3 for name in ("VmHWM", "RssAnon")}


def read(folder: Path, tokenizer_folder: Path, limit: float):
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    from transformers import AutoTokenizer

    from engram.console import spanish
    from engram.corpus import batch_at, prepare_corpus
    from engram.steps import PHI_1_RECIPE

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    print(f"Al empezar, con torch y el tokenizer: {spanish(memory()['VmHWM'])} MB", flush=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    started = time.perf_counter()
    corpus = prepare_corpus(tokenizer, folder)
    seconds = time.perf_counter() - started
    print(corpus.describe())
    print(
        f"Tokenizar {spanish(size / 1e9, 2)} GB: {spanish(seconds)} s, {spanish(size / seconds / 1e6, 2)} MB/s; "
        f"máximo {spanish(memory()['VmHWM'])} MB"
    )
    blocks, started, total = len(corpus.train) // PHI_1_RECIPE.length, time.perf_counter(), 0
    for index in range(BATCHES):
        # In step with the number of blocks: all over the first pass.
        total += batch_at(corpus.train, index * blocks // PHI_1_RECIPE.batch // BATCHES, PHI_1_RECIPE).numel()
    seconds, held = time.perf_counter() - started, memory()
    print(
        f"Leer {spanish(BATCHES)} lotes por todo el corpus, el orden incluido: {spanish(seconds, 1)} s, "
        f"{spanish(total / seconds)} tokens/s; máximo {spanish(held['VmHWM'])} MB con las páginas del archivo, "
        f"{spanish(held['RssAnon'])} MB sin ellas"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigas", type=float, default=2, help="gigabytes de texto (%(default)s)")
    parser.add_argument("--limite", type=float, default=1, help="gigabytes de memoria (%(default)s)")
    parser.add_argument("--carpeta", type=Path, help="dónde escribir texto y tokens (si no, una temporal que se borra)")
    parser.add_argument("--modelo", help="carpeta con un tokenizer (si no, el de la demostración, entrenado aquí)")
    parser.add_argument("--leer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.leer:
        return read(args.carpeta, Path(args.modelo), args.limite)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.carpeta or Path(scratch)
        tokenizer_folder = args.modelo
        if tokenizer_folder is None:
            from engram.demo import DEMO_SHAPE, demo_tokenizer
            from engram.texts import standard_library, text_files

            tokenizer_folder = folder / "tokenizer"
            demo_tokenizer(text_files(standard_library()), DEMO_SHAPE["vocab_size"]).save_pretrained(tokenizer_folder)
        started = time.perf_counter()
        write_corpus(folder / "texto", int(args.gigas * 1e9))
        print(f"Texto escrito en {time.perf_counter() - started:.0f} s", flush=True)
        command = [sys.executable, __file__, "--leer", "--carpeta", folder / "texto", "--modelo", tokenizer_folder]
        command += ["--limite", args.limite]
        return subprocess.run(
            list(map(str, command)), env={**os.environ, "XDG_CACHE_HOME": str(folder / "tokens")}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
