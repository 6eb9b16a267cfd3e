"""Files and datasets -> their texts, in pieces: what kind of file each is, in which encoding, and what is no text."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import codecs
import errno
import importlib.util
import io
import json
import os
import stat
import sysconfig
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engram.console import UserError, readable, spanish

PLAIN = (".py", ".txt", ".md")
TEXT_SUFFIXES = (*PLAIN, ".jsonl", ".json", ".ipynb")
HELD_OUT_SHARE = 20  # one document in twenty is never trained on, nor the last twentieth of a long one
PIECE = 2**18  # bytes; a longer document is read and tokenised in pieces of about this size
LONGEST_LINE = 2**24  # bytes of a .jsonl line, which only makes sense whole
LARGEST_JSON = 2**28  # bytes of a .json or .ipynb, for the same reason
NAMED = 20  # of the files skipped, so many are named; all are counted
NOT_CORPUS = {"test", "tests", "idle_test", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
READ = f"Se leen {', '.join(TEXT_SUFFIXES[:-1])} y {TEXT_SUFFIXES[-1]}; otro texto, guárdalo como .txt o .jsonl."
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass
class Skipped:
    """What was no text to train on: every reason with its count, and the first names."""

    reasons: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, where, reason: str):
        self.reasons[reason] += 1
        if len(self.examples) < NAMED:
            self.examples.append(f"{readable(str(where))} ({reason})")

    def __len__(self) -> int:
        return sum(self.reasons.values())

    def describe(self) -> str:
        counts = "; ".join(f"{reason}: {spanish(count)}" for reason, count in self.reasons.most_common())
        return (
            f"Se saltaron {spanish(len(self))} archivos o líneas ({counts}); por ejemplo "
            f"{', '.join(self.examples[:3])}. {READ}"
        )


class Piece(NamedTuple):
    text: str
    held_out: bool | None  # None: a whole document, which the hash of its text puts on one side or the other
    last: bool  # the document ends with it


def check_encoding(name: str | None):
    """Raises UserError: there is no such encoding of text."""
    try:
        b" ".decode(name or "utf-8", "replace")
    except LookupError:  # or one that is no text's, "hex" say
        cure = "La de los textos antiguos en español es latin-1."
        raise UserError(f"--codificacion {name}: no existe. {cure}") from None


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def package_folder(name: str) -> Path | None:
    """Of an installed package; None where there is none of that name."""
    found = importlib.util.find_spec(name)
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def text_files(path: Path, skipped: Skipped | None = None) -> list[Path]:
    """Files to train on below `path` (or `path` itself), in the order of their names, the same on every machine.

    Links to folders are not followed: they may lead back here.
    Raises:
        UserError: `path` is a file of a kind that is not read.
    """
    skipped = Skipped() if skipped is None else skipped
    if path.is_file():
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise UserError(f"«{path.name}»: los archivos {path.suffix or 'sin extensión'} no se leen. {READ}")
        return [path]
    library = path == standard_library()  # of which the Python code alone is meant
    found, unwanted = [], NOT_CORPUS if library else {"__pycache__"}
    for folder, subfolders, names in os.walk(path, onerror=lambda error: skipped.add(error.filename, _reason(error))):
        subfolders[:] = sorted(name for name in subfolders if name not in unwanted and not name.startswith("."))
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                skipped.add(os.path.join(folder, name), "enlace a una carpeta")
        for file in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            suffix = file.suffix.lower()
            if suffix in (PLAIN if library else TEXT_SUFFIXES):
                found.append(file)
            elif not library:
                skipped.add(file, f"tipo {suffix}" if suffix else "sin extensión")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "no es UTF-8; si es antiguo, prueba --codificacion latin-1"
    if isinstance(error, PermissionError):
        return "sin permiso de lectura"
    if isinstance(error, FileNotFoundError):
        return "enlace a algo que no existe"
    if isinstance(error, OSError):
        return "enlace en bucle" if error.errno == errno.ELOOP else f"no se puede leer: {error.strerror}"
    return str(error)


def encoding_of(file, suffix: str) -> str:
    """What the beginning of a binary file says of its encoding: a byte-order mark, or a .py's coding line (PEP 263)."""
    begin = file.read(4)
    file.seek(0)
    for mark, encoding in BOMS.items():
        if begin.startswith(mark):
            return encoding
    if suffix != ".py":
        return "utf-8"
    try:
        encoding, _ = tokenize.detect_encoding(file.readline)
        b" ".decode(encoding, "replace")
        return encoding
    except (SyntaxError, LookupError):  # none of that name, or one that is no text's ("rot13")
        return "utf-8"  # which then says what is wrong
    finally:
        file.seek(0)


def _pieces(file, size: int, encoding="utf-8"):
    """Yield the text in the first `size` bytes of a binary file, cut at line ends, or in the middle of endless lines.

    Only what is longer than one piece is cut; its last twentieth is then held out.
    """
    tail = size - size // HELD_OUT_SHARE if size > PIECE else size
    decoder, rest, place = codecs.getincrementaldecoder(encoding)(), "", 0
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


def documents(files: list[Path], skipped: Skipped, fallback: str | None = None):
    """Yield the pieces of every text: one document per file, per line of a .jsonl, or per text of a .json. The rest
    goes to `skipped`. `fallback`: the encoding of files that say nothing of theirs and are not UTF-8."""
    for path in files:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                skipped.add(path, "no es un archivo corriente")
                continue
            suffix = path.suffix.lower()
            with open(path, "rb") as file:
                if suffix == ".jsonl":
                    yield from _rows(file, path, skipped, fallback)
                elif suffix in (".json", ".ipynb"):
                    yield from _whole_json(file, path, status.st_size, skipped, fallback)
                else:
                    yield from _plain(file, suffix, status.st_size, fallback)
        except (OSError, ValueError) as error:
            skipped.add(path, _reason(error))


def _plain(file, suffix: str, size: int, fallback: str | None):
    encoding = encoding_of(file, suffix)
    try:
        _check(_pieces(file, size, encoding))
    except UnicodeDecodeError:
        if fallback is None:
            raise
        encoding = fallback
        file.seek(0)
        _check(_pieces(file, size, encoding))
    file.seek(0)
    yield from _pieces(file, size, encoding)


def _check(pieces):
    """Read to its end before the first piece is used: a binary file may begin like a text."""
    blank = True
    for piece in pieces:
        if "\0" in piece.text:
            raise ValueError("binario")
        blank = blank and not piece.text.strip()
    if blank:
        raise ValueError("vacío")


def _whole_json(file, path, size: int, skipped: Skipped, fallback: str | None):
    """A notebook's cells as one text, without their outputs; a JSON file's text, or each of a list of them."""
    if size > LARGEST_JSON:
        raise ValueError(f"de más de {LARGEST_JSON >> 20} MB: guárdalo como .jsonl")
    notebook = path.suffix.lower() == ".ipynb"
    raw = file.read()
    try:
        try:
            data = json.loads(raw)  # bytes: UTF-8 or UTF-16, with or without a mark
        except UnicodeDecodeError:
            data = json.loads(_in_fallback(raw, fallback))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        raise ValueError("no es un cuaderno" if notebook else "no es JSON") from None
    if notebook:
        texts = [notebook_text(data)]
    else:
        rows = data if isinstance(data, list) else [data]
        texts = [row if isinstance(row, str) else text_field(row) if isinstance(row, dict) else None for row in rows]
    if not any(text and text.strip() for text in texts):
        raise ValueError("vacío" if notebook else "sin un campo de texto 'text', 'content' o 'code'")
    for number, text in enumerate(texts, 1):
        if text and text.strip():
            yield from _split(text)
        else:
            skipped.add(f"{path}:{number}", "sin texto")


def notebook_text(notebook) -> str:
    """The code and prose cells of a notebook (nbformat 3 and 4), in order, a blank line between two."""
    try:
        sheets = notebook["worksheets"] if "worksheets" in notebook else [notebook]
        cells = [cell for sheet in sheets for cell in sheet["cells"] if cell["cell_type"] != "raw"]
        sources = [cell.get("source", cell.get("input", "")) for cell in cells]
        return "\n\n".join("".join(source).rstrip("\n") for source in sources if "".join(source).strip()) + "\n"
    except (KeyError, TypeError, AttributeError):
        raise ValueError("no es un cuaderno") from None


def text_field(row) -> str | None:
    return next((row[key] for key in ("text", "content", "code") if isinstance(row.get(key), str)), None)


def _in_fallback(raw: bytes, fallback: str | None) -> str:
    """What is not UTF-8, in the encoding that the user names. Raises UnicodeDecodeError where none is named."""
    return raw.decode(fallback or "utf-8")


def _rows(file, path, skipped, fallback: str | None):
    number, read = 0, file.readline
    if encoding_of(file, "") == "utf-16":
        wide = io.TextIOWrapper(file, "utf-16", newline="\n")

        def read(size):
            return wide.readline(size).encode("utf-8", "surrogatepass")

    while line := read(LONGEST_LINE):
        number += 1
        if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = read(LONGEST_LINE)
            skipped.add(f"{path}:{number}", f"línea de más de {LONGEST_LINE >> 20} MB")
            continue
        try:
            try:
                row = line.decode("utf-8-sig")
            except UnicodeDecodeError:
                row = _in_fallback(line, fallback)
            text = text_field(json.loads(row)) if row.strip() else None
            reason = "sin un campo de texto 'text', 'content' o 'code'" if text is None else "vacío"
        except (ValueError, AttributeError, RecursionError) as error:
            text, reason = None, _reason(error) if isinstance(error, UnicodeDecodeError) else "no es un objeto JSON"
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
    except (OSError, ValueError, RuntimeError) as error:  # the latter of one that is a program
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"No se pudo leer el dataset '{name}' del Hub ({reason}). Comprueba el nombre y la conexión, o usa otro, o "
            "archivos tuyos con --datos CARPETA."
        ) from error
