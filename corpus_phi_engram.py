"""Text to train on: files -> documents -> two memory-mapped files of token ids, one of them never trained on.

Used by the scripts that train and measure; there is nothing to run here.
"""

import hashlib
import json
import os
import random
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from load_phi_engram import UserError, spanish, whole_folder

TEXT_SUFFIXES = (".py", ".txt", ".md", ".jsonl")
HELD_OUT_SHARE = 20  # one document in twenty is never trained on
NOT_CORPUS = {"test", "tests", "idle_test", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}


@dataclass
class Corpus:
    """Token ids, memory-mapped; `held_out` is never trained on."""

    name: str
    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float  # of the held-out text
    documents: int
    skipped: list[str]
    digest: str

    def describe(self) -> str:
        return (
            f"{self.name}: {spanish(self.documents)} documentos, {spanish(len(self.train))} tokens para entrenar y "
            f"{spanish(len(self.held_out))} apartados para medir"
        )


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def text_files(path: Path) -> list[Path]:
    """Files to train on below `path` (or `path` itself), in a fixed order. Links to folders are not followed."""
    if path.is_file():
        return [path]
    found, unwanted = [], NOT_CORPUS if path == standard_library() else {"__pycache__"}
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if name not in unwanted and not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if name.endswith(TEXT_SUFFIXES)]
    return found


def text_field(row) -> str | None:
    return next((row[key] for key in ("text", "content", "code") if isinstance(row.get(key), str)), None)


def documents(files: list[Path], skipped: list[str]):
    """Yield one text per file, or per line of a .jsonl. What is no text is named in `skipped`."""
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            skipped.append(f"{path} ({'no es UTF-8' if isinstance(error, UnicodeDecodeError) else error.strerror})")
            continue
        if not text.strip() or "\0" in text:
            skipped.append(f"{path} ({'binario' if text.strip() else 'vacío'})")
        elif path.suffix != ".jsonl":
            yield text
        else:
            for number, line in enumerate(text.split("\n"), 1):
                try:
                    content = text_field(json.loads(line)) if line.strip() else ""
                except (ValueError, AttributeError):
                    content = None
                if content:
                    yield content
                elif content is None:
                    skipped.append(f"{path}:{number} (sin un campo de texto 'text', 'content' o 'code')")


def dataset_documents(name: str):
    """Stream the texts of a dataset from the Hub, through the optional package `datasets`."""
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset necesita un paquete más. Instálalo con: pip install datasets") from None
    try:
        for row in datasets.load_dataset(name, split="train", streaming=True):
            if (text := text_field(row)) is None:
                raise UserError(
                    f"El dataset '{name}' no tiene una columna de texto llamada text, content o code, sino "
                    f"{', '.join(row)}. Guárdalo como .jsonl con un campo 'text' y usa --datos."
                )
            yield text
    except (OSError, ValueError) as error:
        raise UserError(
            f"No se pudo leer el dataset '{name}' del Hub ({type(error).__name__}). Comprueba el nombre y la conexión, "
            "o usa archivos tuyos con --datos CARPETA."
        ) from error


def prepare_corpus(tokenizer, source=None, *, dataset=None, length=512, seed=0, max_tokens=None) -> Corpus:
    """Tokenise once into memory-mapped files that the next run finds again.

    Args:
        source: folder or file; the Python standard library when neither it nor `dataset` is given.
        length: tokens per block; a part with less than one block is refused.
        max_tokens: stop reading after so many.
    Raises:
        UserError: nothing there, nothing that is text, or too little of it.
    """
    skipped: list[str] = []
    if dataset:
        name, files, stream = f"dataset {dataset}", [], dataset_documents(dataset)
    else:
        path = standard_library() if source is None else Path(source).expanduser().resolve()
        if not path.exists():
            raise UserError(f"No existe '{source}'. Indica una carpeta o un archivo con --datos.")
        name, files = "biblioteca estándar de Python" if source is None else path.name, text_files(path)
        if not files:
            raise UserError(f"En '{path}' no hay archivos {', '.join(TEXT_SUFFIXES)}. Indica otra carpeta con --datos.")
        stream = documents(files, skipped)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    key = json.dumps([name, stats, seed, max_tokens, tokenizer.backend_tokenizer.to_str()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi-engram"
    folder = cache / f"corpus-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if dataset or not folder.exists():
        _tokenise(tokenizer, stream, skipped, folder, len(files) or None, seed, max_tokens)
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
    return Corpus(name, train, held_out, bytes_per_token, meta["documents"], meta["skipped"], meta["digest"])


def _tokenise(tokenizer, stream, skipped, folder, total, seed, max_tokens):
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    tokens, size, count, digest = [0, 0], [0, 0], 0, hashlib.sha256()
    with whole_folder(folder) as temporary, tqdm(stream, total=total, desc="Tokenizando", unit=" doc") as bar:
        with open(temporary / "train.bin", "wb") as train, open(temporary / "held.bin", "wb") as held:
            reader = iter(bar)
            while texts := list(islice(reader, 64)):
                for text, ids in zip(texts, tokenizer(texts, verbose=False)["input_ids"]):
                    raw = text.encode("utf-8", "replace")
                    # Told apart by their text, so that two copies of a file fall on the same side.
                    draw = int.from_bytes(hashlib.sha256(b"%d\n%b" % (seed, raw)).digest()[:8], "big")
                    side = int(draw % HELD_OUT_SHARE == 0)
                    packed = np.asarray([*ids, tokenizer.eos_token_id], dtype).tobytes()
                    (train, held)[side].write(packed)
                    digest.update(packed)
                    tokens[side] += len(ids) + 1
                    size[side] += len(raw)
                    count += 1
                if max_tokens and sum(tokens) >= max_tokens:
                    break
        if not count:
            raise UserError(f"No hay ningún texto con que entrenar. Se saltó: {'; '.join(skipped[:3]) or 'nada'}.")
        meta = dict(
            dtype=dtype.name, documents=count, tokens=tokens, bytes=size, skipped=skipped, digest=digest.hexdigest()
        )
        (temporary / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")


@lru_cache(maxsize=4)
def _block_order(n_blocks: int, epoch: int, seed: int) -> list[int]:
    order = list(range(n_blocks))
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
