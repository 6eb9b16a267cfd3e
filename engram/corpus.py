"""Text to train on: files -> documents -> two memory-mapped files of token ids, one of them never trained on.

Nothing here holds more of the text than a few pieces of a quarter of a megabyte, however large the corpus is.

Used by the scripts that train and measure; there is nothing to run here.
"""

import codecs
import errno
import hashlib
import io
import json
import os
import random
import stat
import sysconfig
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engram.console import Progress, UserError, spanish
from engram.folders import sweep, whole_folder

TEXT_SUFFIXES = (".py", ".txt", ".md", ".jsonl")
HELD_OUT_SHARE = 20  # one document in twenty is never trained on, nor the last twentieth of a long one
PIECE = 2**18  # bytes; a longer document is read and tokenised in pieces of about this size
GROUP = 64, 2**21  # pieces and bytes that the tokenizer gets at once, to work on in parallel
LONGEST_LINE = 2**24  # bytes of a .jsonl line, which only makes sense whole
NAMED = 20  # of the files skipped, so many are named; all are counted
RULES = 2  # to be raised when the same files give other tokens than before: nobody's stored tokens are then reused
NOT_CORPUS = {"test", "tests", "idle_test", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}


@dataclass
class Skipped:
    """What was no text to train on: every reason with its count, and the first names."""

    reasons: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, where, reason: str):
        self.reasons[reason] += 1
        if len(self.examples) < NAMED:
            self.examples.append(f"{where} ({reason})")

    def __len__(self) -> int:
        return sum(self.reasons.values())

    def describe(self) -> str:
        counts = "; ".join(f"{reason}: {spanish(count)}" for reason, count in self.reasons.most_common())
        return (
            f"Se saltaron {spanish(len(self))} archivos o líneas que no son texto ({counts}); por ejemplo "
            f"{', '.join(self.examples[:3])}"
        )


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
            f"{self.name}: {spanish(self.documents)} documentos, {spanish(len(self.train))} tokens para entrenar y "
            f"{spanish(len(self.held_out))} apartados para medir"
        )


class Piece(NamedTuple):
    text: str
    held_out: bool | None  # None: a whole document, which the hash of its text puts on one side or the other
    last: bool  # the document ends with it


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def text_files(path: Path, skipped: Skipped | None = None) -> list[Path]:
    """Files to train on below `path` (or `path` itself), in the order of their names, the same on every machine.

    Links to folders are not followed: they may lead back here.
    """
    skipped = Skipped() if skipped is None else skipped
    if path.is_file():
        return [path]
    found, unwanted = [], NOT_CORPUS if path == standard_library() else {"__pycache__"}
    for folder, subfolders, names in os.walk(path, onerror=lambda error: skipped.add(error.filename, _reason(error))):
        subfolders[:] = sorted(name for name in subfolders if name not in unwanted and not name.startswith("."))
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                skipped.add(os.path.join(folder, name), "enlace a una carpeta")
        found += [Path(folder, name) for name in sorted(names) if name.endswith(TEXT_SUFFIXES)]
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "no es UTF-8"
    if isinstance(error, PermissionError):
        return "sin permiso de lectura"
    if isinstance(error, FileNotFoundError):
        return "enlace a algo que no existe"
    if isinstance(error, OSError):
        return "enlace en bucle" if error.errno == errno.ELOOP else f"no se puede leer: {error.strerror}"
    return str(error)


def _pieces(file, size: int):
    """Yield the text in the first `size` bytes of a binary file, cut at line ends, or in the middle of endless lines.

    Only what is longer than one piece is cut; its last twentieth is then held out.
    """
    tail = size - size // HELD_OUT_SHARE if size > PIECE else size
    decoder, rest, place = codecs.getincrementaldecoder("utf-8")(), "", 0
    while place < size and (raw := file.read(min(PIECE, (tail if place < tail else size) - place))):
        held_out, place = place >= tail, place + len(raw)
        last = place >= size
        text = rest + decoder.decode(raw, last)
        cut = len(text) if last else text.rfind("\n") + 1 or len(text)
        rest = text[cut:]
        yield Piece(text[:cut], held_out if size > PIECE else None, last)


def _split(text: str):
    raw = text.encode("utf-8", "replace")  # JSON may hold halves of characters, which no tokenizer takes
    yield from _pieces(io.BytesIO(raw), len(raw))


def documents(files: list[Path], skipped: Skipped):
    """Yield the pieces of every text: one document per file, or per line of a .jsonl. The rest goes to `skipped`."""
    for path in files:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                skipped.add(path, "no es un archivo corriente")
                continue
            with open(path, "rb") as file:
                if path.suffix == ".jsonl":
                    yield from _rows(file, path, skipped)
                    continue
                blank = True
                # Read to its end before the first piece is used: a binary file may begin like a text.
                for piece in _pieces(file, status.st_size):
                    if "\0" in piece.text:
                        raise ValueError("binario")
                    blank = blank and not piece.text.strip()
                if blank:
                    raise ValueError("vacío")
                file.seek(0)
                yield from _pieces(file, status.st_size)
        except (OSError, ValueError) as error:
            skipped.add(path, _reason(error))


def text_field(row) -> str | None:
    return next((row[key] for key in ("text", "content", "code") if isinstance(row.get(key), str)), None)


def _rows(file, path, skipped):
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
            skipped.add(f"{path}:{number}", f"línea de más de {LONGEST_LINE >> 20} MB")
            continue
        try:
            text = text_field(json.loads(line.decode("utf-8"))) if line.strip() else None
            reason = "sin un campo de texto 'text', 'content' o 'code'" if text is None else "vacío"
        except (ValueError, AttributeError, RecursionError) as error:
            text, reason = None, "no es UTF-8" if isinstance(error, UnicodeDecodeError) else "no es un objeto JSON"
        if text and text.strip():
            yield from _split(text)
        elif line.strip():
            skipped.add(f"{path}:{number}", reason)


def dataset_documents(name: str, skipped: Skipped):
    """Stream the texts of a dataset from the Hub, through the optional package `datasets`."""
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset necesita un paquete más. Instálalo con: pip install datasets") from None
    try:
        for number, row in enumerate(datasets.load_dataset(name, split="train", streaming=True), 1):
            if not row.keys() & {"text", "content", "code"}:
                raise UserError(
                    f"El dataset '{name}' no tiene una columna de texto llamada text, content o code, sino "
                    f"{', '.join(row)}. Guárdalo como .jsonl con un campo 'text' y usa --datos."
                )
            if (text_field(row) or "").strip():
                yield from _split(text_field(row))
            else:
                skipped.add(f"{name}:{number}", "vacío")
    except (OSError, ValueError) as error:
        raise UserError(
            f"No se pudo leer el dataset '{name}' del Hub ({type(error).__name__}). Comprueba el nombre y la conexión, "
            "o usa archivos tuyos con --datos CARPETA."
        ) from error


def prepare_corpus(tokenizer, source=None, *, dataset=None, length=512, seed=0, max_tokens=None, fresh=True) -> Corpus:
    """Tokenise once into memory-mapped files that the next run finds again.

    Args:
        source: folder or file; the Python standard library when neither it nor `dataset` is given.
        length: tokens per block; a part with less than one block is refused.
        max_tokens: stop reading after so many.
        fresh: read a dataset anew; False where another process has just done so.
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
        name, files = "biblioteca estándar de Python" if source is None else path.name, text_files(path, skipped)
        if not files:
            raise UserError(
                f"En '{path}' no hay archivos {', '.join(TEXT_SUFFIXES)}. Indica otra carpeta con --datos."
                + (f" {skipped.describe()}" if skipped else "")
            )
        stream = documents(files, skipped)
    total, key = 0, hashlib.sha256()
    for file in files:
        if file.is_file():
            status = file.stat()
            total += status.st_size
            key.update(f"{file}\0{status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
    settings = [name, seed, max_tokens, RULES, HELD_OUT_SHARE, PIECE, tokenizer.backend_tokenizer.to_str()]
    key.update(json.dumps(settings).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi-engram"
    folder = cache / f"corpus-{key.hexdigest()[:16]}"
    if (dataset and fresh) or not folder.exists():
        sweep(cache, "corpus-.*")
        _tokenise(tokenizer, stream, skipped, folder, total or None, seed, max_tokens)
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
        raise UserError(
            f"El corpus es demasiado pequeño: {spanish(len(train))} tokens para entrenar y {spanish(len(held_out))} "
            f"para medir, y cada parte necesita al menos un bloque de {length}. Añade texto o baja --longitud."
        )
    skipped = Skipped(Counter(meta["skipped"]["reasons"]), meta["skipped"]["examples"])
    return Corpus(name, train, held_out, bytes_per_token, meta["documents"], skipped, meta["digest"])


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


def _tokenise(tokenizer, stream, skipped, folder, total, seed, max_tokens):
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    tokens, size, digests = [0, 0], [0, 0], (hashlib.sha256(), hashlib.sha256())
    count, begins, encoder = 0, True, tokenizer.backend_tokenizer  # itself: no offsets, in half the time
    encoder.no_truncation()
    encoder.no_padding()
    bar = Progress(total=total, desc="Tokenizando", unit="B", unit_scale=True)
    with whole_folder(folder) as temporary, bar:
        paths = temporary / "train.bin", temporary / "held.bin"
        with open(paths[0], "wb") as train, open(paths[1], "wb") as held:
            for group in _groups(stream):
                for piece, encoded in zip(group, encoder.encode_batch_fast([piece.text for piece in group])):
                    raw, ids = piece.text.encode("utf-8"), encoded.ids
                    # Told apart by their text, so that two copies of a file fall on the same side.
                    draw = int.from_bytes(hashlib.sha256(b"%d\n%b" % (seed, raw)).digest()[:8], "big")
                    side = int(draw % HELD_OUT_SHARE == 0 if piece.held_out is None else piece.held_out)
                    packed = np.asarray([*ids, tokenizer.eos_token_id] if piece.last else ids, dtype).tobytes()
                    (train, held)[side].write(packed)
                    digests[side].update(packed)
                    tokens[side] += len(ids) + piece.last
                    size[side] += len(raw)
                    count, begins = count + begins, piece.last
                    bar.update(len(raw))
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
