"""How fast a disk gives scattered rows that nothing has read before, by the ways in which a program may ask.

    python tests/bench/reads.py --carpeta .              # writes 8 GB there, and drops them from the cache before each
    python tests/bench/reads.py --filas 16384

Rows of 68 bytes, as many as a prompt of 512 tokens reads in one layer, ascending, each from a page of its own but for a
few. "Advised" tells the system of all rows (POSIX_FADV_WILLNEED) before the first is read, as `TableFile.read` does.
"""

import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engram.console import SpanishParser, run_script, spanish

ROW = 68


def one_by_one(file: int, offsets: list[int]):
    for offset in offsets:
        os.pread(file, ROW, offset)


def advised(file: int, offsets: list[int]):
    for offset in offsets:
        os.posix_fadvise(file, offset, ROW, os.POSIX_FADV_WILLNEED)
    one_by_one(file, offsets)


def by_threads(threads: int, read):
    pool = ThreadPoolExecutor(threads)

    def shared_out(file, offsets):
        step = -(-len(offsets) // threads)
        parts = [offsets[i : i + step] for i in range(0, len(offsets), step)]
        list(pool.map(lambda part: read(file, part), parts))

    return shared_out


def main(argv=None):
    parser = SpanishParser(description="Filas sueltas de un disco en frío.", epilog="Ejemplo: --carpeta .")
    parser.add_argument("--carpeta", help="dónde escribir 8 GB (por defecto, la temporal del sistema)")
    parser.add_argument("--filas", type=int, default=8192, metavar="N", help="por pasada (%(default)s)")
    args = parser.parse_args(argv)
    ways = {"una a una": one_by_one, "avisadas": advised, "avisadas, 4 hilos": by_threads(4, advised)}
    ways |= {f"{n} hilos": by_threads(n, one_by_one) for n in (4, 8, 16, 32)}
    with tempfile.NamedTemporaryFile(dir=args.carpeta) as file:
        block = os.urandom(2**24)
        for _ in range(500):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # what is not written yet cannot be dropped
        size, spent = 500 * 2**24, {name: [] for name in ways}
        for _ in range(5):
            for name, read in ways.items():
                offsets = sorted(random.sample(range(0, size - ROW, ROW), args.filas))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                wall, process = time.perf_counter(), time.process_time()
                read(file.fileno(), offsets)
                spent[name].append((time.perf_counter() - wall, time.process_time() - process))
    print(f"{spanish(args.filas)} filas de {ROW} bytes, en frío; medianas de 5\n\n| | s | s de CPU | lecturas por s |")
    print("| --- | --- | --- | --- |")
    for name, times in spent.items():
        wall, process = (statistics.median(column) for column in zip(*times))
        print(f"| {name} | {spanish(wall, 3)} | {spanish(process, 3)} | {spanish(round(args.filas / wall))} |")


if __name__ == "__main__":
    run_script(main)
