"""What a model would say first at every place of a text, in shares and examples: with memory, off, and the twin."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from typing import NamedTuple

import numpy as np
import torch

from engram.analyses import mean_and_error, memory_off
from engram.console import Progress, spanish

CONTEXT = 48  # characters before a token that an example shows
NAT = (
    "Un nat es la unidad de la pérdida, que mide cuánto sorprende al modelo el token que de verdad viene: 0 si lo\n"
    "daba por seguro, 0,7 si dudaba entre dos, 2,3 entre diez. Un nat menos es darle 2,7 veces más probabilidad;\n"
    "0,05 nats menos, un 5 % más."
)


class Choices(NamedTuple):
    """At every token of B blocks from the second on, each [B, T-1]."""

    first: torch.Tensor  # int64, the likeliest token
    chance: torch.Tensor  # float32, its probability
    loss: torch.Tensor  # float32, of the token that does come, in nats


@torch.no_grad()
def choices(model, blocks: torch.LongTensor, batch: int = 8) -> Choices:
    """What `model`, in eval mode, says at every place of `blocks`, int64 [B, T]."""
    found = []
    for ids in Progress(blocks.split(batch), desc="Midiendo", unit="lote"):
        ids = ids.to(model.device)
        chances = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        best = chances.max(-1)
        loss = -chances.gather(-1, ids[:, 1:, None])[..., 0]
        found.append([best.indices.cpu(), best.values.exp().cpu(), loss.cpu()])
    return Choices(*map(torch.cat, zip(*found)))


def pick(blocks, good: Choices, bad: Choices, count: int) -> list[tuple[int, int]]:
    """Places (block, token) where `good` is right and `bad` is not, the surest first, each of another token."""
    truth = blocks[:, 1:]
    margin = torch.where((good.first == truth) & (bad.first != truth), bad.loss - good.loss, -1.0)
    margin[:, :8] = -1.0  # nothing before them to show
    places, seen = [], set()
    for place in margin.flatten().argsort(descending=True)[:500].tolist():
        block, at = divmod(place, margin.shape[1])
        if len(places) == count or margin[block, at] <= 0:
            break
        if truth[block, at].item() not in seen:
            seen.add(truth[block, at].item())
            places.append((block, at))
    return places


def example(tokenizer, blocks, place, on: Choices, off: Choices) -> str:
    block, at = place

    def text(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def said(one):
        return f"{text([one.first[place].item()])!r} ({spanish(100 * one.chance[place].item(), 0)} %)"

    before = repr(text(blocks[block, max(0, at - 30) : at + 1].tolist())[-CONTEXT:])
    truth = repr(text([blocks[block, at + 1].item()]))
    return f"   {before} y viene {truth}: con memoria, {said(on)}; sin ella, {said(off)}"


@torch.no_grad()
def told(model, twin, tokenizer, tokens: np.ndarray, length: int) -> tuple[str, float, float]:
    """What the memory is worth on a whole held-out text, in Spanish words, shares and examples.

    Args:
        model: PhiEngramForCausalLM; twin: a Phi trained as long without memory. tokens: [N].
        length: tokens per block.
    Returns:
        the text; how much more the twin loses than the model, in nats per token, and its standard error between blocks.
    """
    count = len(tokens) // length
    blocks = torch.from_numpy(np.asarray(tokens[: count * length], np.int64)).reshape(count, length)
    for one in (model, twin):
        one.eval()
    on, other = choices(model, blocks), choices(twin, blocks)
    with memory_off(model):
        off = choices(model, blocks)
    truth = blocks[:, 1:]
    right = {
        name: (one.first == truth)
        for name, one in (("con memoria", on), ("con ella apagada", off), ("el control, que nunca la tuvo", other))
    }
    shares = "; ".join(f"{name}, {spanish(100 * hits.double().mean().item(), 2)} %" for name, hits in right.items())
    with_memory, without = right["con memoria"], right["con ella apagada"]
    saved, lost = (with_memory & ~without).sum().item(), (without & ~with_memory).sum().item()
    lines = [
        NAT,
        "",
        f"Aciertos: en cuántos de los {spanish(truth.numel())} tokens apartados la primera opción es la que viene:",
        f"   {shares}.",
        f"   Encenderla acierta {spanish(saved)} que apagada falla, y falla {spanish(lost)} que apagada acierta.",
        "Ejemplos escogidos, los más claros; lo que cuenta es la suma de arriba. Donde la memoria ayuda:",
        *(example(tokenizer, blocks, place, on, off) for place in pick(blocks, on, off, 3)),
        "Y donde estorba:",
        *(example(tokenizer, blocks, place, on, off) for place in pick(blocks, off, on, 1)),
    ]
    gain, error = mean_and_error(other.loss - on.loss, torch.ones_like(other.loss, dtype=torch.bool))
    return "\n".join(lines), gain, error
