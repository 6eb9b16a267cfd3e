"""The text on which a model is looked at: held-out blocks, and what kind of thing each token is."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import ast
import io
import keyword
import tokenize
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from engram.console import Progress, UserError, spanish

KINDS = (
    "palabra clave", "nombre", "número", "cadena", "comentario", "operador", "sangría y saltos de línea",
    "sin clasificar",
)  # fmt: skip
KEYWORD, NAME, NUMBER, STRING, COMMENT, OPERATOR, WHITE, OTHER = range(len(KINDS))


@dataclass
class Sample:
    """Blocks of text and what each token is."""

    ids: torch.LongTensor  # [B, T]
    kinds: torch.Tensor  # uint8 [B, T], index into KINDS
    names: torch.Tensor  # bool [B, T]: last token of a Python name that takes several tokens
    train: np.ndarray  # the tokens of the same corpus that a training run would read
    origin: str  # Spanish, for the report


def label_text(text: str) -> tuple[np.ndarray, np.ndarray]:
    """What each character is, by Python's own tokenizer.

    Returns:
        kind uint8 [characters], and which name it belongs to, int32 [characters], 0 for none.
    Raises:
        SyntaxError, tokenize.TokenError, ValueError: it is no Python that this interpreter understands.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        ast.parse(text)  # the tokenizer alone takes prose for a row of names
    kinds, names = np.full(len(text), WHITE, np.uint8), np.zeros(len(text), np.int32)
    line_starts = np.cumsum([0, *(len(line) for line in text.split("\n"))]) + np.arange(text.count("\n") + 2)
    for number, token in enumerate(tokenize.generate_tokens(io.StringIO(text).readline), 1):
        start, end = (line_starts[row - 1] + column for row, column in (token.start, token.end))
        label = tokenize.tok_name[token.type]
        if label == "NAME":
            if text[start:end] != token.string:
                raise ValueError("line ends that Python counts otherwise")
            kinds[start:end] = KEYWORD if keyword.iskeyword(token.string) else NAME
            names[start:end] = number
        elif label == "STRING" or "STRING_" in label:  # pieces of f-strings since Python 3.12
            kinds[start:end] = STRING
        elif label in ("NUMBER", "COMMENT", "OP"):
            kinds[start:end] = {"NUMBER": NUMBER, "COMMENT": COMMENT, "OP": OPERATOR}[label]
    return kinds, names


def label_tokens(ids: list[int], tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Kind of each model token of one document, by its first character that is not white, and the last tokens of names.

    Args:
        ids: tokens of a byte-level BPE, as Phi's is: one character of a token's string per byte.
    Returns:
        uint8 [n], bool [n]; all OTHER and False for a document that is no Python.
    """
    unknown = np.full(len(ids), OTHER, np.uint8), np.zeros(len(ids), bool)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ends = np.cumsum([len(piece) for piece in tokenizer.convert_ids_to_tokens(ids)])
    if not len(ids) or ends[-1] != len(text.encode("utf-8", "replace")):
        return unknown
    try:
        kinds, names = label_text(text)
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError):
        return unknown
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)  # bytes of each character
    kinds, names = np.repeat(kinds, width), np.append(np.repeat(names, width), 0)
    starts = np.append(0, ends[:-1])
    # Next byte, from each on, that is not white.
    places = np.where(kinds != WHITE, np.arange(len(kinds)), len(kinds))
    visible = np.minimum.accumulate(places[::-1])[::-1][starts]
    token_kinds = np.where(visible < ends, kinds[np.minimum(visible, len(kinds) - 1)], WHITE)
    goes_on = (names[starts] > 0) & (names[starts] == names[starts - 1])  # before the first: the 0 appended above
    return token_kinds.astype(np.uint8), goes_on & (names[ends] != names[starts])


def held_out_blocks(
    tokenizer, source, n_blocks: int, length: int, seed: int | None = 0, encoding: str | None = None
) -> Sample:
    """Blocks spread evenly over the part of a corpus that `train_phi_engram.py --semilla` never trains on; None: where
    nobody knows the seed, 0, and it says so.

    A corpus whose part is too small for that is taken whole, and the report says so.

    Raises:
        UserError: not even two blocks of text.
    """
    from engram.corpus import prepare_corpus

    corpus = prepare_corpus(tokenizer, source, length=0, seed=seed or 0, encoding=encoding)
    doubt = "" if seed is not None else " (si se entrenó con otra, no todo es texto apartado)"
    origin = f"{corpus.name}, la parte que el entrenamiento aparta con la semilla {seed or 0}{doubt}"
    tokens = corpus.held_out
    if len(tokens) < 8 * length:
        tokens = np.concatenate((corpus.train, corpus.held_out))
        origin = f"{corpus.name}, entero por ser corto: si el modelo se entrenó con él, no es texto apartado"
    if len(tokens) < 2 * length:
        raise UserError(
            f"El texto de «{corpus.name}» es demasiado corto: {spanish(len(tokens))} tokens, y hacen falta al menos "
            f"{2 * length}. Añade archivos a --datos, o quítalo para usar la biblioteca estándar de Python."
        )
    ends = np.append(np.flatnonzero(tokens == tokenizer.eos_token_id), len(tokens))

    @lru_cache(maxsize=4)
    def labels(document):
        start, stop = ends[document - 1] + 1 if document else 0, ends[document]
        return label_tokens(tokens[start:stop].tolist(), tokenizer)

    count = len(tokens) // length
    chosen = np.unique(np.linspace(0, count - 1, min(count, n_blocks)).astype(int))
    kinds, names = np.full((len(chosen), length), OTHER, np.uint8), np.zeros((len(chosen), length), bool)
    for row, start in enumerate(Progress(chosen * length, desc="Clasificando el texto", unit=" bloque")):
        for document in range(np.searchsorted(ends, start), np.searchsorted(ends, start + length) + 1):
            first = ends[document - 1] + 1 if document else 0
            a, b = max(first, start), min(ends[min(document, len(ends) - 1)], start + length)
            if a < b:
                piece = slice(a - start, b - start)
                kinds[row, piece], names[row, piece] = (part[a - first : b - first] for part in labels(document))
    ids = np.stack([tokens[start : start + length] for start in chosen * length]).astype(np.int64)
    return Sample(*map(torch.from_numpy, (ids, kinds, names)), corpus.train, origin)
