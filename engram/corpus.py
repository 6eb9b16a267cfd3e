"""Text to train on: files -> documents -> two memory-mapped files of token ids, one of them never trained on.

Nothing here holds more of the text than a few pieces of a quarter of a megabyte, however large the corpus is.

Used by the scripts that train and measure; there is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import hashlib
import json
import os
import random
from array import array
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from engram.console import Progress, UserError, counted, gigabytes, readable, spanish
from engram.folders import discard, sweep, whole_folder
from engram.texts import (
    HELD_OUT_SHARE,
    PIECE,
    READ,
    Skipped,
    dataset_documents,
    documents,
    standard_library,
    text_files,
)

GROUP = 64, 2**21  # pieces and bytes that the tokenizer gets at once, to work on in parallel
CACHED = 5e9  # bytes of tokenised corpora that are kept
RULES = 5  # to be raised when the same files give other tokens than before: nobody's stored tokens are then reused


@dataclass
class Corpus:
    """Token ids, memory-mapped; `held_out` is never trained on."""

    name: str
    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float  # of the held-out text
    documents: int
    skipped: Skipped
    digest: str  # of the tokens on both sides, wherever the text was read from

    def describe(self) -> str:
        return (
            f"{self.name}: {counted(self.documents, 'documento')}, {counted(len(self.train), 'token')} para entrenar y "
            f"{counted(len(self.held_out), 'apartado')} para medir"
        )


def prepare_corpus(
    tokenizer, source=None, *, dataset=None, length=512, seed=0, max_tokens=None, fresh=True, encoding=None
) -> Corpus:
    """Tokenise once into memory-mapped files that the next run finds again.

    Args:
        source: folder or file; the Python standard library when neither it nor `dataset` is given.
        length: tokens per block; a part with less than one block is refused.
        max_tokens: take so many at most, of both parts together.
        fresh: read a dataset anew; False where another process has just done so.
        encoding: of files that say nothing of theirs and are not UTF-8.
    Raises:
        UserError: nothing there, nothing that is text, or too little of it.
    """
    skipped = Skipped()
    if dataset:
        name, files, stream = f"dataset {dataset}", [], dataset_documents(dataset, skipped)
    else:
        path = standard_library() if source is None else Path(source).expanduser().resolve()
        if not path.exists():
            raise UserError(f"No existe '{source}'. Indica una carpeta o un archivo con --datos.")
        name = "biblioteca estándar de Python" if source is None else readable(path.name)
        files = text_files(path, skipped)
        if not files:
            why = skipped.describe() if skipped else READ
            raise UserError(f"En '{path}' no hay archivos que se lean. {why} Indica otra carpeta con --datos.")
        stream = documents(files, skipped, encoding)
    total, key = 0, hashlib.sha256()
    for file in files:
        if file.is_file():
            status = file.stat()
            total += status.st_size
            key.update(f"{file}\0{status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
    settings = [name, seed, max_tokens, encoding, RULES, HELD_OUT_SHARE, PIECE, tokenizer.backend_tokenizer.to_str()]
    key.update(json.dumps(settings).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi-engram"
    folder = cache / f"corpus-{key.hexdigest()[:16]}"
    if (dataset and fresh) or not folder.exists():
        sweep(cache, "corpus-.*")
        try:
            _tokenise(tokenizer, stream, skipped, folder, total or None, seed, max_tokens)
        except UserError as error:
            if not (dataset and folder.exists()):
                raise
            print(f"⚠️  {error} Sigo con lo que se leyó la última vez.")
    os.utime(folder)
    forget_oldest(cache, folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    # An empty file cannot be mapped.
    train, held_out = (
        np.memmap(folder / f"{part}.bin", meta["dtype"], "r") if tokens else np.zeros(0, meta["dtype"])
        for part, tokens in zip(("train", "held"), meta["tokens"])
    )
    bytes_per_token = meta["bytes"][1] / max(1, meta["tokens"][1])
    if len(held_out) < max(length, len(train) // 200):
        # Too few documents to set some aside whole: the tail of the text takes their place.
        cut = len(train) - len(train) // HELD_OUT_SHARE
        train, held_out, bytes_per_token = train[:cut], train[cut:], sum(meta["bytes"]) / sum(meta["tokens"])
    if len(train) < length or len(held_out) < length:
        there, need = sum(meta["tokens"]), HELD_OUT_SHARE * length
        size = max(1, need * sum(meta["bytes"]) / there / 1000)
        shorter = f" o baja --longitud a {there // HELD_OUT_SHARE} o menos" if there >= 2 * HELD_OUT_SHARE else ""
        # Where --max-tokens ended the reading, more text would not be read.
        more = f"Sube --max-tokens a {need}" if max_tokens and there >= max_tokens else "Añade texto"
        raise UserError(
            f"El corpus es demasiado pequeño: hay {counted(there, 'token')} y con bloques de {spanish(length)} hacen "
            f"falta unos {spanish(need)} ({spanish(size)} kB de texto como este), porque uno de cada {HELD_OUT_SHARE} "
            f"se aparta para medir. {more}{shorter}."
        )
    skipped = Skipped(Counter(meta["skipped"]["reasons"]), meta["skipped"]["examples"])
    return Corpus(name, train, held_out, bytes_per_token, meta["documents"], skipped, meta["digest"])


def forget_oldest(cache: Path, present: Path):
    """Keep at most CACHED bytes of tokenised corpora, those used last, and `present` in any case."""
    folders = sorted(cache.glob("corpus-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    room, forgotten = CACHED, []
    for folder in [present, *(path for path in folders if path != present)]:
        size = sum(file.stat().st_size for file in folder.glob("*"))
        room -= size
        if room < 0 and folder != present:
            forgotten.append(size)
            discard(folder)
    if forgotten:
        print(
            f"ℹ️  De {cache} se han borrado {len(forgotten)} textos ya tokenizados, los que más tiempo llevaban sin "
            f"usarse ({gigabytes(sum(forgotten))}): se guardan como mucho {gigabytes(CACHED)}."
        )


def _groups(stream):
    """Lists of pieces within the limits of GROUP, or of one piece."""
    group, size = [], 0
    for piece in stream:
        group.append(piece)
        size += len(piece.text)
        if len(group) == GROUP[0] or size >= GROUP[1]:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextmanager
def special_tokens_as_text(encoder):
    """Meanwhile an "<|endoftext|>" that stands in a text is its characters, and ends no document."""
    before, encoder.encode_special_tokens = encoder.encode_special_tokens, True
    try:
        yield
    finally:
        encoder.encode_special_tokens = before


def _tokenise(tokenizer, stream, skipped, folder, total, seed, max_tokens):
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    tokens, size, digests = [0, 0], [0, 0], (hashlib.sha256(), hashlib.sha256())
    count, begins, before = 0, True, 0
    encoder = tokenizer.backend_tokenizer  # itself: no offsets, in half the time
    encoder.no_truncation()
    encoder.no_padding()
    bar = Progress(total=total, desc="Tokenizando", unit="B", unit_scale=True)
    with whole_folder(folder) as temporary, bar, special_tokens_as_text(encoder):
        paths = temporary / "train.bin", temporary / "held.bin"
        with open(paths[0], "wb") as train, open(paths[1], "wb") as held:

            def put(side, ids):
                packed = np.asarray(ids, dtype).tobytes()
                (train, held)[side].write(packed)
                digests[side].update(packed)
                tokens[side] += len(ids)

            for group in _groups(stream):
                for piece, encoded in zip(group, encoder.encode_batch_fast([piece.text for piece in group])):
                    raw, ids, last = piece.text.encode("utf-8"), encoded.ids, piece.last
                    # Told apart by their text, so that two copies of a file fall on the same side.
                    draw = int.from_bytes(hashlib.sha256(b"%d\n%b" % (seed, raw)).digest()[:8], "big")
                    side = int(draw % HELD_OUT_SHARE == 0 if piece.held_out is None else piece.held_out)
                    if not begins and side != before:  # what a long document trains ends where what it holds out begins
                        put(before, [tokenizer.eos_token_id])
                        if max_tokens and sum(tokens) >= max_tokens:
                            break
                    if max_tokens and sum(tokens) + len(ids) + last >= max_tokens:  # the last one, cut to what is left
                        ids, last = ids[: max_tokens - sum(tokens) - 1], True
                        raw = raw if len(ids) == len(encoded.ids) else tokenizer.decode(ids).encode("utf-8")
                    put(side, [*ids, tokenizer.eos_token_id] if last else ids)
                    size[side] += len(raw)
                    count, begins, before = count + begins, last, side
                    bar.update(len(raw))
                    if max_tokens and sum(tokens) >= max_tokens:
                        break
                if max_tokens and sum(tokens) >= max_tokens:
                    break
        if not count:
            raise UserError(f"No hay ningún texto con que entrenar. {skipped.describe() if skipped else ''}".strip())
        if tokens[1] > tokens[0]:
            # The draw may set aside the only document, or by far the longest: the rest is what is measured on then.
            swap = temporary / "swap"
            for source, target in ((paths[0], swap), (paths[1], paths[0]), (swap, paths[1])):
                os.rename(source, target)
            tokens, size, digests = tokens[::-1], size[::-1], digests[::-1]
        digest = hashlib.sha256(b"".join(part.digest() for part in digests)).hexdigest()
        meta = dict(dtype=dtype.name, documents=count, tokens=tokens, bytes=size, digest=digest)
        meta["skipped"] = dict(reasons=skipped.reasons, examples=skipped.examples)
        (temporary / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")


@lru_cache(maxsize=2)
def _block_order(n_blocks: int, epoch: int, seed: int) -> array:
    order = array("I", range(n_blocks))  # 4 bytes a block: 2 GB of text are some five megabytes
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return order


def batch_at(tokens: np.ndarray, index: int, recipe) -> torch.LongTensor:
    """Micro-batch number `index` of the endless shuffled stream of blocks: int64 [batch, length].

    `recipe` gives `batch`, `length` and `seed`. A function of its arguments alone, so that a resumed run reads what the
    interrupted one would have.
    """
    n_blocks = len(tokens) // recipe.length
    blocks = []
    for number in range(index * recipe.batch, (index + 1) * recipe.batch):
        epoch, place = divmod(number, n_blocks)
        start = _block_order(n_blocks, epoch, recipe.seed)[place] * recipe.length
        blocks.append(np.asarray(tokens[start : start + recipe.length], dtype=np.int64))
    return torch.from_numpy(np.stack(blocks))
