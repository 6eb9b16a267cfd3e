"""What models make of a text that is new to them and of what they knew: shares, what was forgotten, and examples."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from engram.analyses import kl_divergence, mean_and_error
from engram.console import Progress, spanish
from engram.hooks import memory_off
from engram.probes import NAME, Sample

CONTEXT = 48  # characters before a token that an example shows
NAT = (
    "Un nat es la unidad de la pérdida, que mide cuánto sorprende al modelo el token que de verdad viene: 0 si lo\n"
    "daba por seguro, 0,7 si dudaba entre dos, 2,3 entre diez. Un nat menos es darle 2,7 veces más probabilidad;\n"
    "0,05 nats menos, un 5 % más."
)

WORDS = """«Acierta a la primera»: su primera opción es el token que viene; «nombres enteros»: acierta todos los tokens
de un nombre de Python. «Lo de antes» es la biblioteca estándar; KL, cuánto se aparta ahí de lo que decía el Phi de
partida, en nats; «cambia», en cuántos tokens su primera opción es otra que la de él."""


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


def whole_names(kinds: torch.Tensor, hits: torch.Tensor) -> float:
    """Share of Python names all of whose tokens are right.

    Args:
        kinds: [B, T], of probes.KINDS. hits: bool [B, T-1], from the second token on; a name cut by a block's beginning
            does not count.
    """
    name, hits = (kinds == NAME).numpy(), hits.numpy()
    begins, inside = name[:, 1:] & ~name[:, :-1], name[:, 1:]
    number = begins.cumsum(1)  # of a name within its block, from 1
    number = np.where(inside & (number > 0), number + np.arange(len(number))[:, None] * name.shape[1], 0)
    spoilt = np.unique(number[(number > 0) & ~hits])
    return 1 - len(spoilt) / max(1, begins.sum())


@torch.no_grad()
def forgetting(model, base, blocks: torch.LongTensor, batch: int = 8) -> dict:
    """Of `model` against `base`, both in eval mode, on blocks [B, T] of what the base knew: {"old", its loss in nats,
    "kl" from the base, mean per token in nats, "changed", share of places whose likeliest token is another}."""
    loss = kl = changed = 0.0
    for ids in blocks.split(batch):
        ids = ids.to(model.device)
        now, was = (one(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1) for one in (model, base))
        loss -= now.gather(-1, ids[:, 1:, None]).double().sum().item()
        kl += kl_divergence(was, now).double().sum().item()
        changed += (now.argmax(-1) != was.argmax(-1)).sum().item()
    count = blocks[:, 1:].numel()
    return dict(old=loss / count, kl=kl / count, changed=changed / count)


def measured(name: str, model, base, new: Sample, old: Sample) -> dict:
    """A row of `comparison`, and under "choices" what the model says at every place of the new text."""
    model.eval()
    found = choices(model, new.ids)
    hits = found.first == new.ids[:, 1:]
    row = dict(name=name, loss=found.loss.double().mean().item(), right=hits.double().mean().item())
    return row | dict(names=whole_names(new.kinds, hits), choices=found) | forgetting(model, base, old.ids)


def comparison(rows: list[dict], new: str) -> str:
    """Markdown table of what models learned of `new` and forgot of the rest."""
    lines = [
        f"| modelo | pérdida en {new} | acierta a la primera | nombres enteros | "
        "pérdida en lo de antes | KL | cambia |\n|" + " --- |" * 7,
    ]
    for row in rows:
        right, names, changed = (f"{spanish(100 * row[key], 1)} %" for key in ("right", "names", "changed"))
        loss, old, kl = (spanish(row[key], 3) for key in ("loss", "old", "kl"))
        lines.append(f"| {' | '.join((row['name'], loss, right, names, old, kl, changed))} |")
    return "\n".join(lines)


def learned_line(row: dict, new: str) -> str:
    loss, old = (spanish(row[key], 3) for key in ("loss", "old"))
    right = spanish(100 * row["right"], 1)
    return f"   {row['name']}: pérdida {loss} en {new}, con {right} % de aciertos a la primera; en lo de antes, {old}"


def verdict(rows: list[dict], new: str) -> str:
    """What a memory alone learned and forgot, beside all weights of the same Phi.

    Args:
        rows: as `measured` gives them: the base, controls, the memory, the memory with other n-grams' rows.
    """
    base, *controls, memory, shuffled = rows
    best = min(controls, key=lambda row: row["loss"])
    gains = base["choices"].loss - memory["choices"].loss
    gain, error = mean_and_error(gains, torch.ones_like(gains, dtype=torch.bool))
    mark = "✅" if gain > 2 * error else "❌"
    left, learned = (base["loss"] - row["loss"] for row in (shuffled, best))
    left, learned = f"quedan {spanish(left, 3)}" if left > 0 else "no queda nada", spanish(learned, 3)
    right, best_right = (spanish(100 * row["right"], 1) for row in (memory, best))
    forgot, best_forgot = (spanish(row["old"] - base["old"], 3) for row in (memory, best))
    gain, error = spanish(gain, 3), spanish(error, 3)
    return f"""{mark} La memoria sola, con Phi congelado, aprende {new}: {gain} ± {error} nats menos por token (el ± es
   de unos textos a otros). Con las filas de otros n-gramas {left}: está en lo que recuerda.
   El control que más aprende, con todos los pesos ({best["name"]}): {learned} nats. Acierta a la primera el
   {best_right} %; la memoria, el {right} %.
   Lo que olvidan, en nats de la biblioteca estándar: el control, {best_forgot}; la memoria, {forgot}, y apagada nada,
   porque entonces es el Phi de partida."""


def examples(tokenizer, blocks, on: Choices, off: Choices) -> str:
    """Where a memory helps most, three times, and where it harms most."""
    lines = ["Ejemplos escogidos, los más claros; lo que cuenta es la tabla. Donde la memoria ayuda:"]
    lines += [example(tokenizer, blocks, place, on, off) for place in pick(blocks, on, off, 3)]
    lines += ["Y donde estorba:"]
    lines += [example(tokenizer, blocks, place, on, off) for place in pick(blocks, off, on, 1)]
    return "\n".join(lines)


@torch.no_grad()
def worth_comparing(model, tokenizer, blocks, on: Choices, off: Choices, tokens: int = 24) -> str | None:
    """A line cut short that the model goes on with rightly with its memory and otherwise without, by the likeliest
    tokens; from the places where the memory helps most. None where there is none."""
    for block, at in pick(blocks, on, off, 40):
        text = tokenizer.decode(blocks[block, : at + 1].tolist(), clean_up_tokenization_spaces=False)
        prompt = text.split("\n")[-1].strip()
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        if ids.shape[1] < 4:
            continue
        answers = []
        for memory in (True, False):
            with nullcontext() if memory else memory_off(model):
                plan = dict(max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
                answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), **plan)[0, ids.shape[1] :])
        if answers[0][0].item() == blocks[block, at + 1].item() != answers[1][0].item():
            return prompt
    return None
