"""What a generated token costs by who opened the model and who answers: torch keeps threads for each that has computed.

    python tests/bench/threads.py              # a process for each way and round; plain Phi, 512 x 8, all cores
    python tests/bench/threads.py --rondas 5

"apart" is how the page and the server open a model (engram/opening.py). "a reader" is a thread that stays and has
computed with torch once, as one that unpacks rows would have.
"""

import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PhiConfig

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from bench.speed import SMALL
from engram.console import SpanishParser, run_script, spanish
from engram.opening import apart

WAYS = ("el mismo hilo", "otro hilo", "otro hilo, abierto aparte", "el mismo hilo, junto a un lector")
TOKENS = 32


def opened():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(PhiConfig(**SMALL)).eval()


@torch.no_grad()
def milliseconds(model) -> float:
    """Of a token, the median of seven answers."""
    ids, spent = torch.arange(64)[None], []
    for _ in range(8):
        clock = time.perf_counter()
        model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        spent.append(1e3 * (time.perf_counter() - clock) / TOKENS)
    return statistics.median(spent[1:])


def measured(way: int) -> float:
    if way == 2:
        return apart(milliseconds, apart(opened))
    model = opened()
    if way == 3:
        there, stay = threading.Event(), threading.Event()
        reader = threading.Thread(target=lambda: (torch.randn(1 << 20).mul_(2), there.set(), stay.wait()), daemon=True)
        reader.start()
        there.wait()
    return apart(milliseconds, model) if way == 1 else milliseconds(model)


def main(argv=None):
    parser = SpanishParser(description="Lo que cuesta un token según quién abre y quién contesta.")
    parser.add_argument("--rondas", type=int, default=5, metavar="N", help="procesos de cada manera (%(default)s)")
    parser.add_argument("--uno", type=int, help="una sola manera, en este proceso (lo usa la propia medida)")
    args = parser.parse_args(argv)
    if args.uno is not None:
        return print(measured(args.uno))
    spent = [[] for _ in WAYS]
    for _ in range(args.rondas):
        for way, values in enumerate(spent):
            done = subprocess.run([sys.executable, __file__, "--uno", str(way)], capture_output=True, text=True)
            values.append(float(done.stdout.split()[-1]))
    print(f"512 × 8, float32, {torch.get_num_threads()} hilos, torch {torch.__version__}\n")
    print("| | ms por token | razón |\n| --- | --- | --- |")
    for way, values in zip(WAYS, spent):
        ratio = statistics.median(own / first for own, first in zip(values, spent[0]))
        print(f"| {way} | {spanish(statistics.median(values), 2)} | {spanish(ratio, 2)} |")


if __name__ == "__main__":
    run_script(main)
