"""Facts written into the memory by hand: said once, in seconds, without training, and forgotten to the last bit.

After a prompt the model completes a target. What is written are the memory's rows of one layer, under the last few
tokens of the prompt and of the target so far, and nothing else: a text in which none of these n-grams occurs is
answered with the same bits as before. Found by a few steps of Adam on those rows alone, as User as Engram does
(arXiv 2606.19172), in the middle of the model and in front of the table instead of inside it.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import copy
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from engram.console import counted
from engram.triggers import FactError, Lesson, Reference, choose_key, lesson, padded, wished
from phi1_engram import CACHE, LONGEST_KEY, Fact

MARGIN = 2.0  # nats by which each token of the answer has to lead
STEPS = 100  # at most: wide rows take ten, narrow ones, as the demo's, eighty
RATE = 0.16  # of Adam, for a value projection of std 0.02 and a hidden state of root mean square 1
BETAS = (0.9, 0.9)
# What an answer has to hold after: it is written after the first two, and checked after the others.
CONTEXTS = (
    "# The tests pass on every machine, and the release is ready.\nfor name in names:\n    print(name)\n\n",
    "It rained all morning, so the market opened late. Nobody minded.\n\n",
)
OTHERS = (
    "import os\n\ndef size_of(path):\n    return os.path.getsize(path)\n\n",
    "The train leaves at seven, and the second one an hour later.\n\n",
)


class Reader:
    """What `teach` asks of a model. Another kind of model is given to it through the same names.

    Args:
        layer: of the memory that facts are written for. layers: of the decoder, in order.
        engram: the EngramLayer there. overlay: its EngramFacts. canonical: int64 [V], the vocabulary projection.
    """

    def __init__(self, model, layer, layers, engram, overlay, canonical):
        self.model, self.layer, self.layers, self.engram, self.overlay = model, layer, layers, engram, overlay
        self.canonical, self.device = canonical.cpu(), model.device

    @property
    def facts(self) -> list[Fact]:
        return self.model.facts

    def put(self, facts: list[Fact]):
        self.model.set_facts(facts)

    def digests(self) -> dict:
        """What facts depend on."""
        return self.model.fact_digests(self.layer)

    def prefix(self, ids, mask):
        """The cache after ids [B, T]; mask [B, T], 0 for padding."""
        return self.model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)[CACHE]

    def logits(self, ids, mask, past) -> torch.Tensor:
        """ids [B, T] after `past`, which stays as it is; mask [B, S] -> float32 [B, T, V]."""
        return self.model(ids, attention_mask=mask, use_cache=True, **{CACHE: copy.deepcopy(past)}).logits.float()


def fact_layer(config) -> int:
    """The memory's layer nearest to two thirds of the depth: lower ones fit the prompt alone and fail after a text."""
    return min(config.engram_layer_ids, key=lambda layer: (abs(layer - 2 / 3 * config.num_hidden_layers), layer))


def reader_of(model) -> Reader:
    inner, layer = model.model, fact_layer(model.config)
    return Reader(
        model, layer, inner.layers, inner.layers[layer].engram, inner.facts[str(layer)], inner.engram_hash.token_map
    )


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


class Writing:
    """One lesson while its rows are sought: after no text and after CONTEXTS, with everything before the answer run
    once and kept."""

    def __init__(self, reader: Reader, one: Lesson, contexts: list[list[int]]):
        self.reader, self.one = reader, one
        prompts = [[*context, *one.ids[: one.split - 1]] for context in contexts]
        longest, pad = max(map(len, prompts)), one.ids[0]
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tail = torch.tensor([one.ids[one.split - 1 : -1]] * len(prompts))
        self.tail, self.mask = tail.to(reader.device), F.pad(mask, (0, tail.shape[1]), value=1).to(reader.device)
        self.targets = torch.tensor(one.ids[one.split :]).to(reader.device)
        with torch.no_grad():
            self.past = reader.prefix(ids.to(reader.device), mask.to(reader.device))
        self.below = None

    def logits(self) -> torch.Tensor:
        """[contexts, F, V], of the answer's places."""
        with instead_of(self.reader.layers[: self.reader.layer], self.below):
            return self.reader.logits(self.tail, self.mask, self.past)

    def margins(self) -> torch.Tensor:
        """[contexts, F]: by how much the answer leads."""
        with torch.no_grad():
            return lead(self.logits(), self.targets)

    def look(self):
        """(margins, rows read now [F, d_mem], root mean square of the hidden state there); from now on the layers
        below the memory's, whose result no fact changes, are not run again."""
        seen, lower = {}, self.reader.layers[: self.reader.layer]
        hooks = [self.reader.engram.register_forward_pre_hook(lambda module, args: seen.update(args=args))]
        if len(lower):
            hooks.append(lower[-1].register_forward_hook(lambda module, args, output: seen.update(below=output)))
        try:
            margins = self.margins()
        finally:
            for hook in hooks:
                hook.remove()
        self.below = seen.get("below")
        hidden, rows = seen["args"][:2]
        return margins, rows[0].flatten(1).float().cpu(), hidden.float().square().mean().sqrt().item()


@contextmanager
def instead_of(layers, output):
    """Meanwhile each of these layers gives `output`; None changes nothing."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers if output is not None else ():
            layer.forward = lambda *_, **__: output
        yield
    finally:
        for layer, forward in zip(layers, before):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def lead(logits, targets) -> torch.Tensor:
    """By how much each target [F] leads the best other token, [..., F]; logits [..., F, V]."""
    index = targets.expand(logits.shape[:-1])[..., None]
    return (logits.gather(-1, index) - logits.scatter(-1, index, -math.inf).amax(-1, keepdim=True))[..., 0]


def search(
    reader: Reader, writings: list[Writing], others: list[Fact], every: int, progress
) -> tuple[dict, set] | None:
    """({key: row [d_mem]} with which all answers hold, keys whose row is the one that was read before), or None.

    Each place of an answer has a row, be it the one of before: where a fact is read nothing is drawn (`NoChance`).

    Args:
        others: facts that stay as they are. every: of the first so many answers change the rows at each place, of the
            others only at those where the model, with these facts or without, would say something else.
        progress: called with each step's number; may raise.
    """
    start, free, rate = {}, set(), 0.0
    reader.put([])
    alone = [writing.look() for writing in writings]
    reader.put(others)
    for number, (writing, (by_itself, rows, size)) in enumerate(zip(writings, alone)):
        margins = torch.minimum(by_itself, writing.margins()).amin(0)
        rate = max(rate, RATE * size * 0.02 / reader.engram.value_proj.weight.float().std().item())
        for key, margin, row in zip(writing.one.keys(), margins.tolist(), rows):
            start.setdefault(key, row)
            if number < every or margin < MARGIN:
                free.add(key)
    change = torch.zeros(len(start), len(next(iter(start.values()))), requires_grad=True)
    fixed, moves = torch.stack([*start.values()]), torch.tensor([[key in free] for key in start])
    optimizer = torch.optim.Adam([change], rate, BETAS)
    scale = 1024.0 if reader.model.dtype == torch.float16 else 1.0  # Adam does not see it; float16's gradients do
    own = [Fact("", "", reader.layer, len(key), padded([key]), row[None], {}, {}) for key, row in start.items()]
    reader.put([*others, *own])
    settled = torch.cat([fact.rows for fact in others if fact.layer == reader.layer] + [fixed[:0]])
    for step in range(STEPS + 1):
        reader.overlay.rows = torch.cat((settled, fixed + change))[reader.overlay.order].to(reader.device)
        loss, least = 0.0, math.inf
        for writing in writings:
            logits = writing.logits()
            targets = writing.targets.expand(logits.shape[:-1])
            loss = loss + F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            least = min(least, lead(logits.detach(), writing.targets).min().item())
        progress(step)
        if least >= MARGIN or (step == STEPS and least > 0):
            return dict(zip(start, (fixed + change.detach()).unbind())), start.keys() - free
        if step < STEPS:
            (gradient,) = torch.autograd.grad(loss * scale, change)  # of the rows alone, whatever else could learn
            change.grad = gradient * moves
            optimizer.step()
    return None


def holds(reader: Reader, one: Lesson, contexts) -> list[bool]:
    """Whether each token of the answer is the likeliest one, after each of these texts."""
    return (Writing(reader, one, contexts).margins() > 0).all(-1).tolist()


def as_lesson(reader: Reader, tokenizer, fact: Fact) -> Lesson:
    """What it was written from."""
    one = lesson(tokenizer, reader.canonical, fact.prompt, fact.target)
    one.length, one.counts = fact.length, tuple(fact.notes["counts"])
    return one


def teach_all(reader: Reader, tokenizer, lessons, replace=False, progress=lambda step: None) -> list[Fact]:
    """Write lessons whose keys are chosen, together, beside the facts that there are.

    Facts under the same prompt, but for capitals that a key does not tell apart, make way. Others that have an n-gram
    in common with a lesson are written once more, together with it, or make way too with `replace`.

    Returns:
        the new facts, in the order of the lessons; `notes` says what was checked.
    Raises:
        FactError: no rows were found with which all hold.
    """
    taken, others, again, rewritten = {key for one in lessons for key in one.keys()}, [], [], []
    for fact in reader.facts:
        own, before = {tuple(key[-fact.length :]) for key in fact.keys.tolist()}, as_lesson(reader, tokenizer, fact)
        if any(map(before.same_prompt, lessons)) or (replace and own & taken):
            continue
        if own & taken and fact.layer == reader.layer:
            again.append(before)
            rewritten.append(fact)
        else:
            others.append(fact)
    before, training = reader.facts, reader.model.training
    texts = [tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in ("", *CONTEXTS)]
    rest = [[], *(tokenizer(text, add_special_tokens=False).input_ids for text in OTHERS)]
    reader.model.eval()
    done = False
    try:
        reader.put(others)
        writings = [Writing(reader, one, texts) for one in [*again, *lessons]]
        found = search(reader, writings, others, len(again), progress)
        found = found or search(reader, writings, others, len(writings), progress)
        if found is None:
            raise FactError(
                f"«{lessons[0].prompt}» no ha quedado: tras {STEPS} pasos el modelo sigue sin decir lo que se le "
                "enseña. Prueba con una continuación más corta o con un principio que la haga más natural."
            )
        (rows, kept), facts, digests = found, [], reader.digests()
        for one, notes in zip([*again, *lessons], [*(fact.notes for fact in rewritten), *({} for _ in lessons)]):
            keys = [*dict.fromkeys(one.keys())]
            values = torch.stack([rows[key] for key in keys])
            notes = notes | dict(counts=[*one.counts], tokens=len(one.ids) - one.split, known=kept.issuperset(keys))
            facts.append(Fact(one.prompt, one.target, reader.layer, one.length, padded(keys), values, notes, digests))
        reader.put([*others, *facts])
        for fact, one in zip(facts, [*again, *lessons]):
            alone, *after = holds(reader, one, rest)
            fact.notes.update(alone=alone, after=[sum(after), len(after)])
        done = True
    finally:
        reader.model.train(training)
        if not done:
            reader.put(before)
    return facts[len(again) :]


def teach(model, tokenizer, prompt: str, target: str, *, replace=False, insist=False, reference=True, shortest=None,
          progress=lambda step: None) -> Fact:  # fmt: skip
    """Have the model complete `prompt` with `target` from now on.

    Args:
        model: PhiEngramForCausalLM with rows anywhere and of any precision, or a `Reader`. No weight of it changes.
        replace: facts that have an n-gram in common make way; otherwise this one is recognised by more tokens, or,
            where these are in common too, all are written once more, together.
        insist: take an n-gram however common it is.
        reference: count n-grams in the standard library (or in a `Reference` that is given), and refuse common ones.
        shortest: canonical tokens that a key has at least where its prompt has as many; by default KEY, and more where
            they make fewer than WORDS words, within the prompt's last line.
        progress: called with the number of each step.
    Returns:
        the Fact; its `notes` say "alone" and "after" (whether it holds by itself, and after how many of how many other
        texts), "known" (the model completed it already and no row is another) and "counts" of its n-grams.
    Raises:
        FactError: too few tokens, too common, too long, or no rows were found. Nothing has changed.
    """
    reader = model if isinstance(model, Reader) else reader_of(model)
    one = lesson(tokenizer, reader.canonical, prompt, target)
    if reference is True:
        reference = Reference(tokenizer, reader.canonical)
    least = reader.engram.conv.dilation  # N, by the paper's choice of dilation
    others = [] if replace else [as_lesson(reader, tokenizer, fact) for fact in reader.facts]
    others = [other for other in others if not other.same_prompt(one)]
    wish = max(least, shortest or wished(tokenizer, one))
    choose_key(one, least, wish, reader.canonical, reference or None, insist, others)
    (fact,) = teach_all(reader, tokenizer, [one], replace, progress)
    return fact


def forget(model, fact: Fact):
    """Take back one fact, or all that `facts` gives: to the last bit what was before."""
    reader = model if isinstance(model, Reader) else reader_of(model)
    reader.put([other for other in reader.facts if other is not fact])


def facts(model) -> list[Fact]:
    """In the order in which they were taught."""
    return (model if isinstance(model, Reader) else reader_of(model)).facts


def described(fact: Fact) -> str:
    """What was checked, as one Spanish line."""
    notes = fact.notes
    if notes["known"]:
        return "ya lo completaba así"
    held, tried = notes["after"]
    alone = "lo completa así" if notes["alone"] else "él solo no lo completa así"
    parts = [f"probado: {alone}, y detrás de otro texto, {held} de {tried} veces"]
    if times := sum(notes["counts"] or ()):
        parts.append(f"sus últimas palabras salen {counted(times, 'vez', 'veces')} en la biblioteca estándar")
    return "; ".join(parts)


@torch.no_grad()
def facts_read(model, ids) -> torch.Tensor:
    """Which positions of ids [B, T] read a fact's row: bool [B, T]."""
    inner = model.model
    windows, found = inner._windows(ids, None, None, None), torch.zeros_like(ids, dtype=torch.bool)
    nothing = ids.new_full((*ids.shape, 1, 1), math.nan, dtype=torch.float32)
    for overlay in inner.facts.values():
        if overlay.lengths:
            width = overlay.rows.shape[-1]
            found |= overlay(nothing.expand(*ids.shape, 1, width), windows)[..., 0, 0].isfinite()
    return found


class NoChance(LogitsProcessor):
    """Where a fact speaks nothing is drawn: of the next token's scores the greatest alone stays.

    A fact leads, by less than it takes to be drawn each time: beside a small model's flat scores it may have a third.
    """

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """ids [B, T] and scores [B, V] of what follows them -> scores [B, V]."""
        if not (self.model.facts and self.model.base_model.use_memory):
            return scores
        spoken = facts_read(self.model, input_ids[:, -LONGEST_KEY:])[:, -1:]
        return scores.masked_fill(spoken & (scores < scores.amax(-1, keepdim=True)), -torch.inf)
