"""Bring Phi-1 and graft an untrained Engram memory on it.

    python load_phi_engram.py                                     # microsoft/phi-1 from the Hub -> phi1-engram/
    python load_phi_engram.py --modelo mi-carpeta-phi --salida mi-phi-engram

Also the room of what every script does when it opens and saves: errors in Spanish, folders that are whole or absent.
"""

import errno
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ('Assistant: ' if message['role'] == 'assistant' else 'User: ') "
    "+ message['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class UserError(Exception):
    """Something that the user can mend. Its text is a Spanish sentence with the value, what is allowed, the command."""


def run_script(main, argv=None):
    """Run a script's `main(argv)` and exit: 0 when it was done, 1 with one Spanish sentence, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not kill the script
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        message, code = f"❌ {error}", 1
    except KeyboardInterrupt:
        message, code = "\n⏹️  Interrumpido. Lo que ya estaba guardado sigue intacto.", 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        what = "No queda espacio en el disco" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Sin permiso"
        where = f" ({error.filename})" if error.filename else ""
        message, code = f"❌ {what}{where}. No se ha guardado nada a medias. Libera espacio o elige otra carpeta.", 1
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


@contextmanager
def whole_folder(path):
    """Write into the folder that this yields; it gets the name `path` only if everything went well.

    What stood at `path` before is replaced then, and untouched when something fails.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield temporary
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            os.rename(path, old / path.name)
        os.rename(temporary, path)
        if old:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
