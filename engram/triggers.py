"""What a fact is written under: the n-grams of a prompt and its answer, and how common they are."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from dataclasses import dataclass

import numpy as np
import torch

from engram.console import UserError, spanish
from engram.texts import standard_library
from phi1_engram import LONGEST_KEY

LONGEST_TARGET = 64  # tokens
OFTEN = 20  # times in the reference that make an n-gram a frequent one
# The first merges of a byte-level BPE are the commonest pieces of its text, and canonical ids are given in that order.
COMMON = 700, 8  # the first canonical tokens, at most an eighth of all
REFERENCE_BYTES = 2_000_000



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
    split: int  # where the target begins
    length: int = 0  # canonical tokens of a key
    counts: tuple[int, ...] = ()  # of each key in the reference

    @property
    def places(self) -> range:
        """Positions whose next token is the target's."""
        return range(self.split - 1, len(self.ids) - 1)

    def keys(self, canonical) -> list[tuple[int, ...]]:
        tokens = canonical[torch.tensor(self.ids)].tolist()
        return [tuple(tokens[place + 1 - self.length : place + 1]) for place in self.places]


def lesson(tokenizer, prompt: str, target: str) -> Lesson:
    """Raises FactError: nothing to complete, or too long."""
    first, second = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, target))
    if not first or not second:
        raise FactError("Falta el principio o lo que sigue: se escribe PRINCIPIO => CONTINUACIÓN.")
    if len(second) > LONGEST_TARGET:
        raise FactError(
            f"La continuación tiene {len(second)} tokens y se admiten {LONGEST_TARGET}. Acórtala, o pártela en dos."
        )
    return Lesson(prompt, target, [*first, *second], len(first))


def choose_key(one: Lesson, shortest: int, canonical, reference: Reference | None, insist: bool = False):
    """Give a lesson the shortest key, from `shortest` on, under which nothing common is found.

    Raises:
        FactError: the prompt has too few tokens for any.
    """
    if one.split < shortest:
        raise FactError(
            f"«{one.prompt}» tiene {one.split} de los {shortest} tokens que hacen falta para reconocerlo: empieza "
            "antes, por ejemplo con de qué o de quién se habla."
        )
    common = min(COMMON[0], len(canonical) // COMMON[1])
    for length in range(shortest, min(LONGEST_KEY, one.split) + 1):
        one.length = length
        keys = one.keys(canonical)
        one.counts = tuple(reference.count([*key]) for key in keys) if reference else ()
        if insist or (max(one.counts, default=0) < OFTEN and max(keys[0]) >= common):
            return
    often = max(one.counts, default=0)
    counted = f"sale {spanish(often)} veces en el texto de referencia"
    why = counted if often >= OFTEN else "sus trozos salen en todas partes"
    raise FactError(
        f"«{one.prompt}» acaba en palabras muy corrientes ({why}), y el recuerdo saltaría donde no debe. Empieza "
        "antes, o acaba en una palabra más rara: un nombre propio, por ejemplo."
    )


def padded(keys: list[tuple[int, ...]]) -> torch.LongTensor:
    """As a Fact has them, [n, LONGEST_KEY]."""
    return torch.tensor([[-1] * (LONGEST_KEY - len(key)) + [*key] for key in keys]).view(-1, LONGEST_KEY)
