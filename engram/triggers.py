"""What a fact is written under: the n-grams of a prompt and its answer, and how common they are."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import re
from dataclasses import dataclass

import numpy as np
import torch

from engram.console import UserError, counted, readable, spanish
from engram.texts import standard_library
from phi1_engram import LONGEST_KEY

LONGEST_TARGET = 64  # tokens
OFTEN = 20  # times in the reference that make an n-gram a frequent one
# The first merges of a byte-level BPE are the commonest pieces of its text, and canonical ids are given in that order.
COMMON = 700, 8  # the first canonical tokens, at most an eighth of all
REFERENCE_BYTES = 2_000_000
# Canonical tokens, and words, that a fact is recognised by where nothing asks for more: by three, other sentences are.
KEY, WORDS = 8, 5
LONG = 8  # tokens in a row that, however common each of them is, hardly meet again


class FactError(UserError):
    """A fact that cannot be written; nothing has changed."""


class Reference:
    """Canonical tokens of a part of the standard library, to count n-grams in."""

    def __init__(self, tokenizer, canonical: torch.LongTensor):
        texts, size = [], 0
        for file in sorted(standard_library().glob("*.py")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if size < REFERENCE_BYTES:
                texts, size = [*texts, text], size + len(text)
        ids = [np.asarray(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]
        self.tokens = canonical.numpy()[np.concatenate(ids)]

    def count(self, key: list[int]) -> int:
        """Places in which these canonical tokens follow each other."""
        found = np.flatnonzero(self.tokens[len(key) - 1 :] == key[-1])
        for back, token in enumerate(reversed(key[:-1]), 1):
            found = found[self.tokens[found + len(key) - 1 - back] == token]
        return len(found)


@dataclass
class Lesson:
    """A prompt and its target, as tokens, and the n-grams that it is written under."""

    prompt: str
    target: str
    ids: list[int]  # of both
    tokens: list[int]  # the same, canonical
    split: int  # where the target begins
    length: int = 0  # canonical tokens of a key
    counts: tuple[int, ...] = ()  # of each key in the reference

    @property
    def places(self) -> range:
        """Positions whose next token is the target's."""
        return range(self.split - 1, len(self.ids) - 1)

    def same_prompt(self, other: "Lesson") -> bool:
        """But for capitals and accents, where a key does not tell them apart."""
        return self.tokens[: self.split] == other.tokens[: other.split]

    def keys(self, length: int | None = None) -> list[tuple[int, ...]]:
        """The last `length` tokens at each place that has as many; its own length where none is given."""
        length = length or self.length
        return [tuple(self.tokens[place + 1 - length : place + 1]) for place in self.places if place + 1 >= length]


def lesson(tokenizer, canonical: torch.LongTensor, prompt: str, target: str) -> Lesson:
    """Raises FactError: nothing to complete, or too long."""
    prompt, target = readable(prompt), readable(target)
    first, second = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, target))
    if not first or not second:
        raise FactError("Falta el principio o lo que sigue: se escribe PRINCIPIO => CONTINUACIÓN.")
    if len(second) > LONGEST_TARGET:
        raise FactError(
            f"La continuación tiene {len(second)} tokens y se admiten {LONGEST_TARGET}. Acórtala, o pártela en dos."
        )
    ids = [*first, *second]
    return Lesson(prompt, target, ids, canonical[torch.tensor(ids)].tolist(), len(first))


def wished(tokenizer, one: Lesson) -> int:
    """Tokens for a key to have: KEY and as many as make WORDS whole words, for one strange name may fill KEY; but none
    from before the prompt's last line, for a line of code stands after any other."""
    line = 0
    for token in reversed(one.ids[: one.split]):
        text = tokenizer.decode(one.ids[one.split - line : one.split])
        whole = len(re.findall(r"(?<=\W)\w+", text))  # what opens the text may be a word's end
        if line == LONGEST_KEY or (line >= KEY and whole >= WORDS) or "\n" in tokenizer.decode([token]):
            break
        line += 1
    return line


def choose_key(
    one: Lesson, least: int, wish: int, canonical, reference: Reference | None, insist=False,
    others: list[Lesson] = (),
):  # fmt: skip
    """Give a lesson a key of `wish` tokens, or of all of its prompt, that has `least` at least; a longer one where that
    is common, or found in one of `others`, if there is one that is not.

    Raises:
        FactError: the prompt has too few tokens, or too common ones.
    """
    if one.split < least:
        raise FactError(
            f"«{one.prompt}» es demasiado corto para reconocerlo: tiene {counted(one.split, 'token')} y hacen falta "
            f"{least}. Empieza antes, por ejemplo con de qué o de quién se habla."
        )
    common, fit = min(COMMON[0], len(canonical) // COMMON[1]), None
    longest = min(LONGEST_KEY, one.split)
    for length in range(min(wish, longest), longest + 1):
        one.length, keys = length, one.keys(length)
        one.counts = tuple(reference.count([*key]) for key in keys) if reference else ()
        rare = max(one.counts, default=0) < OFTEN and (length >= LONG or max(keys[0]) >= common)
        if insist or rare:
            own = {*keys}
            if all(own.isdisjoint(other.keys(length)) for other in others):
                return
            fit = fit or (length, one.counts)
    if fit:
        one.length, one.counts = fit
        return
    often = max(one.counts, default=0)
    times = f"sale {spanish(often)} veces en el texto de referencia"
    why = times if often >= OFTEN else "sus trozos salen en todas partes"
    raise FactError(
        f"«{one.prompt}» acaba en palabras muy corrientes ({why}), y el recuerdo saltaría donde no debe. Empieza "
        "antes, o acaba en una palabra más rara: un nombre propio, por ejemplo."
    )


def padded(keys: list[tuple[int, ...]]) -> torch.LongTensor:
    """As a Fact has them, [n, LONGEST_KEY]."""
    return torch.tensor([[-1] * (LONGEST_KEY - len(key)) + [*key] for key in keys]).view(-1, LONGEST_KEY)
