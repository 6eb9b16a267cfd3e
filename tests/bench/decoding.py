"""What a decoded token costs beside transformers' own Phi, by process and by wall time, in interleaved rounds.

    python tests/bench/decoding.py                    # 512 × 8, batch 1 and 8, every place and precision, rows warm
    python tests/bench/decoding.py --phi1             # Phi-1's own shape: 13 GB of RAM
    python tests/bench/decoding.py --perfil           # what one decoded token does beyond Phi's, by torch's profiler

Each round decodes one token with every model in turn. A ratio is the median over rounds of what a model took, over what
Phi took in the same round; in brackets the median's own 95 % interval, by its order statistics. "With its rows in hand"
computes all that the memory computes and looks nothing up. Tokens are drawn at random, so that every n-gram is new.
"""

import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from bench.speed import D_HEAD, PHI_1, SMALL, Variant, pair, turned_off, write_tables
from engram.console import SpanishParser, run_script, spanish
from phi1_engram import CACHE

WARM_UP, PROMPT = 10, 64


def in_hand(ours, variant: Variant):
    """The memory whose rows need no looking up."""
    rows = {}

    def model():
        variant()
        for table in variant.tables.values():
            table.read = read
        return ours

    def read(row_ids):
        if row_ids.shape not in rows:
            rows[row_ids.shape] = torch.randn(*row_ids.shape, D_HEAD) * 0.02
        return rows[row_ids.shape]

    return model


def variants(ours, folder, rows: int) -> dict:
    """{name: gives a model}, all of one backbone."""
    found = {"memoria apagada": turned_off(ours)}
    for precision in ("float32", "int8"):
        write_tables(ours, folder / precision, rows, getattr(torch, precision))
    found["con las filas en la mano"] = in_hand(ours, Variant(ours, folder / "float32", rows, "ram"))
    for precision in ("float32", "int8"):
        for place in ("ram", "disco"):
            found[f"{place}, {precision}"] = Variant(ours, folder / precision, rows, place)
    return found


@torch.inference_mode()
def rounds(models: dict, batch: int, count: int) -> dict:
    """{name: ([process seconds], [wall seconds])} of one token each, in turn, from a different first every round."""
    caches, spent = {}, {name: ([], []) for name in models}
    ids = torch.randint(0, 50_000, (batch, PROMPT + WARM_UP + count))
    for name, model in models.items():
        model = model()
        caches[name] = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], logits_to_keep=1, **{CACHE: caches[name]})
    names = [*models]
    for number in range(WARM_UP + count):
        token, first = ids[:, PROMPT + number, None], number % len(names)
        for name in names[first:] + names[:first]:
            model = models[name]()
            process, wall = time.process_time(), time.perf_counter()
            model(token, **{CACHE: caches[name]})
            if number >= WARM_UP:
                spent[name][0].append(time.process_time() - process)
                spent[name][1].append(time.perf_counter() - wall)
    return spent


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval: the order statistics 0.98 root n beside the middle."""
    ordered, middle, half = sorted(values), len(values) / 2, 0.98 * math.sqrt(len(values))
    low, high = max(0, int(middle - half)), min(len(values) - 1, int(middle + half))
    return ordered[low], statistics.median(values), ordered[high]


def table(spent: dict, batch: int):
    names = [*spent]
    print(f"\nLote {batch}, {len(spent[names[0]][0])} rondas\n\n| | ms de proceso | razón | ms de reloj | razón |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        cells = []
        for own, phi in zip(spent[name], spent[names[0]]):
            low, middle, high = (spanish(x, 3) for x in interval([a / b for a, b in zip(own, phi)]))
            ratio = f"**{middle}** ({low}–{high})" if own is not phi else ""
            cells += [spanish(1e3 * statistics.median(own), 2), ratio]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


@torch.inference_mode()
def profile(models: dict, tokens=20):
    """Print what each model's decoded token calls more often than Phi's."""
    counts = {}
    for name, model in models.items():
        model = model()
        cache, ids = DynamicCache(config=model.config), torch.randint(0, 50_000, (1, PROMPT + 5 + tokens))
        model(ids[:, :PROMPT], logits_to_keep=1, **{CACHE: cache})
        for place in range(PROMPT, PROMPT + 5):
            model(ids[:, place, None], **{CACHE: cache})
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            for place in range(PROMPT + 5, PROMPT + 5 + tokens):
                model(ids[:, place, None], **{CACHE: cache})
        counts[name] = {e.key: (e.count / tokens, e.self_cpu_time_total / tokens) for e in seen.key_averages()}
    phi = next(iter(counts.values()))
    for name, own in counts.items():
        more = {key: (own.get(key, (0, 0))[0] - phi.get(key, (0, 0))[0]) for key in {*own, *phi}}
        total = [sum(values[i] for values in own.values()) for i in (0, 1)]
        most = sorted(more.items(), key=lambda pair: -abs(pair[1]))[:12]
        listed = ", ".join(f"{key.removeprefix('aten::')} {round(n):+d}" for key, n in most if round(n))
        print(f"{name}: {spanish(round(total[0]))} operaciones, {spanish(round(total[1]))} µs; además: {listed or '–'}")


def main(argv=None):
    parser = SpanishParser(description="Lo que cuesta un token generado.", epilog="Ejemplo: --phi1 --rondas 40")
    parser.add_argument("--rondas", type=int, default=200, metavar="N", help="tokens de cada modelo (%(default)s)")
    parser.add_argument("--phi1", action="store_true", help="la forma de Phi-1 en vez de 512 × 8")
    parser.add_argument("--lote", type=int, nargs="+", default=[1, 8], metavar="N", help="textos a la vez (1 y 8)")
    parser.add_argument("--perfil", action="store_true", help="qué operaciones hace cada token, en vez de medir")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plain, ours = pair(PHI_1 if args.phi1 else SMALL, [1, 15] if args.phi1 else [1, 4])
    with tempfile.TemporaryDirectory() as folder:
        models = {"Phi de transformers": lambda: plain, **variants(ours, Path(folder), 64_000)}
        if args.perfil:
            return profile(models)
        print(f"{'La forma de Phi-1' if args.phi1 else '512 × 8'}, float32, un hilo, torch {torch.__version__}")
        for batch in args.lote:
            table(rounds(models, batch, args.rondas), batch)


if __name__ == "__main__":
    run_script(main)
