"""What a thousand facts cost each decoded token, and what one costs to teach at Phi-1's shape.

    python tests/bench/facts.py                        # 512 × 8, in interleaved pairs; then Phi-1's shape
    python tests/bench/facts.py --parejas 50 --chico   # the first part alone, fewer pairs

By process CPU time, one thread. Weights are random: time does not depend on them, nor does how many steps a fact takes
say anything of a trained model, so that the second part does ten steps whatever they find.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import engram.facts as facts
from engram.console import SpanishParser, run_script, spanish
from engram.triggers import Lesson
from phi1_engram import CACHE, LONGEST_KEY, Fact, PhiEngramConfig, PhiEngramForCausalLM

SMALL = dict(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, engram_layer_ids=[1, 5]
)  # fmt: skip
KEYS = 6  # of a fact
SHORTEST, LENGTHS = 6, 8  # a thousand facts have keys of eight lengths


def model_of(**shape) -> PhiEngramForCausalLM:
    torch.manual_seed(0)
    config = PhiEngramConfig(engram_tokenizer_compression=False, **shape)
    return PhiEngramForCausalLM(config).eval().requires_grad_(False)


def unread(model, count: int) -> list[Fact]:
    """So many facts whose n-grams no text has: what is measured is looking for them."""
    d_mem = (model.config.max_ngram_size - 1) * model.config.n_embed_per_ngram
    layer, found = facts.fact_layer(model.config), []
    for number in range(count):
        length, keys = SHORTEST + number % LENGTHS, torch.full((KEYS, LONGEST_KEY), -1)
        keys[:, -length:] = torch.randint(60_000, 10**9, (KEYS, length))
        found.append(Fact("", "", layer, length, keys, torch.randn(KEYS, d_mem), {}, {}))
    return found


@torch.no_grad()
def decoding(pairs: int):
    """Each pair decodes one token without facts and one with a thousand, after the same context."""
    model = model_of(**SMALL)
    model.set_facts(unread(model, 1000))
    overlay, spent, token = model.model.facts[str(facts.fact_layer(model.config))], ([], []), torch.tensor([[7]])
    ids, lengths = torch.randint(0, 50_000, (1, 64)), overlay.lengths
    caches = [model(ids, use_cache=True)[CACHE] for _ in range(2)]
    for pair in range(pairs + 10):
        for side in (0, 1) if pair % 2 else (1, 0):
            overlay.lengths = lengths if side else ()
            started = time.process_time()
            model(token, use_cache=True, **{CACHE: caches[side]})
            spent[side].append(time.process_time() - started)
    ratios = [b / a for a, b in zip(spent[0][10:], spent[1][10:])]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cost = [spanish(1e3 * statistics.median(side[10:]), 2) for side in spent]
    print(f"512 × 8, {pairs} parejas: {cost[0]} ms por token sin recuerdos, {cost[1]} con mil")
    print(f"   razón: mediana {spanish(middle, 3)}, cuartiles {spanish(low, 3)} y {spanish(high, 3)}")


def teaching():
    """Ten steps of writing one fact of five tokens at Phi-1's shape: seconds of one thread, and the peak of RAM."""
    model = model_of()
    reader = facts.reader_of(model)
    one = Lesson("", "", torch.randint(0, 50_000, (13,)).tolist(), 8, 3)
    started = time.process_time()
    contexts = [[], *(torch.randint(0, 50_000, (length,)).tolist() for length in (28, 16))]
    writing = facts.Writing(reader, one, contexts)
    prefix = time.process_time() - started
    facts.STEPS, facts.MARGIN = 10, 1e9
    facts.search(reader, [writing], [], 0, lambda step: None)
    seconds = time.process_time() - started
    spent = f"{spanish(seconds, 1)} s de CPU, {spanish(prefix, 1)} de ellos en lo anterior a la respuesta"
    print(f"Forma de Phi-1, diez pasos, tres textos: {spent}")


def main(argv=None):
    parser = SpanishParser(description="Lo que cuestan los recuerdos.", epilog="Ejemplo: --parejas 50 --chico")
    parser.add_argument("--parejas", type=int, default=200, metavar="N", help="parejas de tokens (%(default)s)")
    parser.add_argument("--chico", action="store_true", help="sin la forma de Phi-1, que pide 8 GB de RAM")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    decoding(args.parejas)
    if not args.chico:
        teaching()


if __name__ == "__main__":
    run_script(main)
