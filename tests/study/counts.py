"""What counts of the same n-grams would know: how much a memory of n-grams can learn from so little text.

    python tests/study/counts.py

The base's probabilities mixed with how often each token followed the last two and the last three in the text that the
memory reads in as many steps. How much each weighs is fitted (by EM) for every pair of numbers of times that these were
seen, on half of the held-out blocks, and measured on the other half. Rows in pretrained_results.jsonl: "cuentas-*".
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from engram.console import SpanishParser, run_script
from engram.corpus import batch_at
from study import measures
from study import pretrained_study as study
from study.pretrained import BASE, BATCH, DOMAINS, LENGTH

ORDERS = (2, 3)  # tokens that are looked up, the present one the last
MOST = 6  # bits: 32 times or more are one class


def following(blocks: torch.Tensor, order: int) -> dict[tuple, Counter]:
    """{the last `order` tokens: how often each token followed} in blocks [n, T]."""
    found = defaultdict(Counter)
    for block in blocks.tolist():
        for end in range(order, len(block)):
            found[tuple(block[end - order : end])][block[end]] += 1
    return found


def looked_up(found: dict, blocks: torch.Tensor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token but a block's first, [n, T - 1]: its share of what followed, and how often anything did, as the
    number of bits of that."""
    shares, times = torch.zeros(blocks.shape[0], blocks.shape[1] - 1), torch.zeros_like(blocks[:, 1:])
    for row, block in enumerate(blocks.tolist()):
        for end in range(order, len(block)):
            if seen := found.get(tuple(block[end - order : end])):
                shares[row, end - 1] = seen[block[end]] / seen.total()
                times[row, end - 1] = min(MOST, seen.total().bit_length())
    return shares, times


def mixed_loss(experts: torch.Tensor, kinds: torch.Tensor) -> float:
    """Nats per token of the best mixture for each kind; weights from one half of the blocks serve the other.

    Args:
        experts: [E, n, T] probabilities of the token that came. kinds: int64 [n, T].
    """
    losses, halves = [], torch.arange(len(kinds)) % 2
    for half in (0, 1):
        fit, rest = halves != half, halves == half
        weights = torch.full((int(kinds.max()) + 1, len(experts)), 1 / len(experts), dtype=torch.float64)
        p, kind = experts[:, fit].flatten(1).T.double(), kinds[fit].flatten()
        for _ in range(100):
            parts = weights[kind] * p
            parts = parts / parts.sum(-1, keepdim=True)
            # One token more for the first, so that a kind that was never seen is left to the base.
            sums = torch.zeros_like(weights).index_add_(0, kind, parts)
            sums[:, 0] += 1
            weights = sums / sums.sum(-1, keepdim=True)
        mixed = (weights[kinds[rest]] * experts[:, rest].movedim(0, -1).double()).sum(-1)
        losses.append(-mixed.log().mean().item())
    return sum(losses) / 2


def counts_row(ruler, model, tokenizer, steps: int) -> dict:
    ids, blocks, _ = ruler.domain(DOMAINS[0], tokenizer)
    recipe = SimpleNamespace(batch=BATCH, length=LENGTH, seed=0)
    read = torch.cat([batch_at(ids, number, recipe) for number in range(steps)])
    said = measures.predictions(model, blocks)
    base = torch.cat([p.gather(-1, then[..., None])[..., 0] for then, p in said]).exp().cpu()
    shares, times = zip(*(looked_up(following(read, order), blocks, order) for order in ORDERS))
    kinds = times[0] * (MOST + 1) + times[1]
    known = {f"vistos-{order}": (seen > 0).float().mean().item() for order, seen in zip(ORDERS, times)}
    only_base = -base.double().log().mean().item()
    return dict(base=only_base, mixed=mixed_loss(torch.stack([base, *shares]), kinds), **known)


def main(argv=None):
    SpanishParser(description="Lo que sabrían las cuentas de los mismos n-gramas.").parse_args(argv)
    ruler = study.Ruler(BASE)
    model, tokenizer = ruler.open()
    for steps in (study.SHORT, study.LONG):
        row = dict(fila=f"cuentas-{steps}", **counts_row(ruler, model, tokenizer, steps))
        if row["fila"] not in study.read_results():
            study.keep(row)
        print(row, flush=True)


if __name__ == "__main__":
    run_script(main)
