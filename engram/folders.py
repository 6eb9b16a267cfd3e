"""Folders that are whole or absent: written under a hidden name, locked against others, swept after a kill."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import os
import re
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

from engram.console import NO_SPACE, UserError
from phi1_engram import as_any_new_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def alone_in(folder):
    """Nobody else names or sweeps anything in `folder` meanwhile; without effect where folders cannot be locked."""
    handle = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(handle)


def _lock(folder, wait=False) -> int | None:
    """A lock that goes with this process, even a killed one, and stays when the folder is renamed; None: not got."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        os.close(handle)
        return None


def _unlock(handle):
    if handle is not None:
        os.close(handle)


@contextmanager
def hold(folder):
    """Yield whether no other live process holds `folder` too; always true where files cannot be locked.

    Not the folder's own lock, which whoever writes into it takes for a moment.
    """
    if fcntl is None:  # there no folder with an open file in it can be renamed
        yield True
        return
    file = Path(folder, ".en-marcha")
    file.touch()
    with open(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # many network drives
            print(f"ℹ️  {folder} no admite bloqueos: cuida de que nadie más entrene ahí a la vez.")
        try:
            yield True
        finally:
            file.unlink(missing_ok=True)


def _hidden_name(path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def sweep(parent, pattern):
    """Delete what killed processes left half written in `parent` for folders whose name matches the regex `pattern`.

    What a live process is writing stays; so does everything where folders cannot be locked.
    """
    parent = Path(parent).expanduser().resolve()
    if not parent.is_dir() or fcntl is None:
        return
    with alone_in(parent):
        for path in sorted(parent.iterdir()):
            match = re.fullmatch(rf"\.({pattern})-[0-9a-f]{{8}}(-old)?", path.name)
            if not match or path.is_symlink() or not path.is_dir():
                continue
            if match[2] and not (parent / match[1]).exists():
                os.rename(path, parent / match[1])  # killed between two renames: this is the last whole one
            elif handle := _lock(path):
                shutil.rmtree(path, ignore_errors=True)
                _unlock(handle)


def discard(path):
    """Delete a folder, and a link that leads to it, so that no half of it is ever seen under its name."""
    link, path = Path(path), Path(path).resolve()
    hidden = _hidden_name(path)
    try:
        os.rename(path, hidden)
    except FileNotFoundError:
        return
    if link.is_symlink():
        link.unlink()
    shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def whole_folder(path):
    """Write into the folder that this yields; it gets the name `path` only if everything went well.

    What stood at `path` before is replaced then, and untouched when something fails. A full disk is a UserError. What
    an earlier, killed process left half written for the same path is deleted.
    """
    path = Path(path).expanduser().resolve()
    temporary = _hidden_name(path)
    old = temporary.with_name(f"{temporary.name}-old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, re.escape(path.name))
        with alone_in(path.parent):
            temporary.mkdir()
            handle = _lock(temporary)
    except OSError as error:
        raise UserError(
            f"No se puede escribir {path}: {path.parent} no es una carpeta, está llena o no tienes permiso en ella. "
            "Elige otra carpeta."
        ) from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                if file.suffix == ".safetensors":
                    as_any_new_file(file)
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())  # a whole name must not outlive half a content when the power fails
        with alone_in(path.parent):
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
    except UserError:
        raise
    except Exception as error:
        if not no_space(error) and shutil.disk_usage(path.parent).free > 2**20:
            raise
        raise UserError(
            f"No queda espacio en el disco para escribir {path}. No se ha guardado nada a medias y lo que ya había "
            "sigue intacto. Libera espacio o elige otra carpeta."
        ) from error
    finally:
        if old.exists():
            with alone_in(path.parent):
                if not path.exists():  # interrupted, or failed, between the two renames
                    os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        _unlock(handle)


def no_space(error) -> bool:
    """Whether this is a full disk, or quota, which writers in C++ and Rust report with errors of their own."""
    known = [f"os error {code})" for code in NO_SPACE]
    known += ["unexpected pos", "PytorchStreamWriter failed"] * isinstance(error, RuntimeError)  # of torch.save
    return getattr(error, "errno", None) in NO_SPACE or any(words in str(error) for words in known)
