"""What every script says and is told: errors as one Spanish sentence, command lines and numbers in Spanish."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import argparse
import codecs
import difflib
import errno
import os
import re
import signal
import sys
import unicodedata
from pathlib import Path

import torch
from tqdm import tqdm

from engram.signals import SIGNALS
from phi1_engram import EngramFileError

ASCII_SIGNS = str.maketrans(
    {"✅": "OK", "❌": "ERROR:", "⚠": "AVISO:", "→": "->", "–": "-", "—": "-", "·": "-", "«": '"', "»": '"', "×": "x"}
    | {"█": "#", "➖": "="}
    | dict.fromkeys("¿¡ℹ\ufe0f")
)
OUT_OF_MEMORY = (
    "Se agotó la RAM, o la memoria de la GPU, y esta respuesta se ha perdido. Qué hacer:\n"
    "  1. Empieza otra conversación («limpiar»): una corta ocupa menos. O pide respuestas más cortas: --max-tokens 64\n"
    "  2. Si se repite, reinicia la sesión (en Colab: Entorno de ejecución -> Reiniciar sesión) y vuelve a abrir el "
    "chat.\n"
    "  3. No ejecutes otros modelos pesados en la misma sesión."
)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """Something that the user can mend. Its text is a Spanish sentence with the value, what is allowed, the command."""


def unaccented(text: str) -> str:
    """Letters alone: «código» -> «codigo», «…» -> «...»."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def plain(error: UnicodeEncodeError) -> tuple[str, int]:
    """Codec error handler: what a terminal cannot show goes without accents, as an ASCII sign, or is left out."""
    text, end = error.object[error.start : error.end].translate(ASCII_SIGNS), error.end
    text = unaccented("".join(char for char in text if unicodedata.category(char) != "So"))  # So: emojis
    if not text:  # nor the space after an emoji
        end += len(error.object[end:]) - len(error.object[end:].lstrip(" "))
    return text.encode("ascii", "replace").decode(), end


codecs.register_error("plain", plain)


def run_script(main, argv=None):
    """Run a script's `main(argv)` and exit: 0 when it was done, 1 with one Spanish sentence, 130 on Ctrl-C, 141 where
    whoever read what it prints, `head` say, has had enough."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")  # a terminal without UTF-8 must not kill the script
    try:
        code = main(argv) or 0
        sys.stdout.flush()
    except SystemExit:
        without_reader()
        raise
    except BrokenPipeError:
        without_reader()
        code = 141  # as a shell reports SIGPIPE
    except (UserError, KeyboardInterrupt, EngramFileError, OSError) as error:
        if isinstance(error, KeyboardInterrupt) and main.__module__ == "__main__":
            for number in SIGNALS:  # a notebook's stop button sends several, and this process is ending
                signal.signal(number, signal.SIG_IGN)
        code = tell(error)
        if code is None:
            raise
    sys.exit(code)


def without_reader():
    """Flush what was printed, or let it go where nobody reads: else Python complains of the closed pipe at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(error: BaseException) -> int | None:
    """Say in one Spanish sentence what stopped a script. Returns its exit status; None for an error of our own."""
    code = 1
    if isinstance(error, (UserError, EngramFileError)):
        message = f"❌ {error}"
    elif isinstance(error, KeyboardInterrupt):
        message, code = "\n⏹️  Interrumpido. Lo que ya estaba guardado sigue intacto.", 130
    elif isinstance(error, OSError) and error.errno in (*NO_SPACE, errno.EACCES, errno.EPERM, errno.EROFS):
        what = "No queda espacio en el disco" if error.errno in NO_SPACE else "Sin permiso"
        where = f" ({error.filename})" if error.filename else ""
        message = f"❌ {what}{where}. No se ha guardado nada a medias. Libera espacio o elige otra carpeta."
    else:
        return None
    sys.stdout.flush()
    print(message, file=sys.stderr)
    return code


class SpanishParser(argparse.ArgumentParser):
    """argparse whose own words are Spanish, that guesses which flag a typo meant and takes no empty value: it comes of
    a variable that was never set."""

    ERRORS = (
        (r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", r"\1: «\2» no es válido; elige entre \3."),
        (r"argument (\S+): invalid int value: '(.*)'", r"\1: «\2» no es un número entero."),
        (r"argument (\S+): invalid decimal value: '(.*)'", r"\1: «\2» no es un número."),
        (r"argument (\S+): invalid \S+ value: '(.*)'", r"\1: «\2» no es válido."),
        (r"argument (\S+): expected .*arguments?", r"\1: falta el valor."),
        (r"argument (\S+): ignored explicit argument '(.*)'", r"\1 no lleva valor («\2»)."),
        (r"argument (\S+): not allowed with argument (\S+)", r"\1 y \2 no pueden ir juntos."),
        (r"the following arguments are required: (.*)", r"falta \1."),
        (r"unrecognized arguments: (.*)", r"no se reconoce «\1»."),
    )

    class Help(argparse.RawDescriptionHelpFormatter):
        def add_usage(self, usage, actions, groups, prefix=None):
            super().add_usage(usage, actions, groups, prefix or "uso: ")

        def start_section(self, heading):
            super().start_section({"options": "opciones", "positional arguments": "argumentos"}.get(heading, heading))

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": self.Help, "allow_abbrev": False, "add_help": False, **kwargs})
        self.add_argument("-h", "--help", action="help", help="muestra esta ayuda y termina")

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        for flag, word in zip(["", *words], words):
            flag, word = word.split("=", 1) if re.match("--[^=]+=", word) else (flag, word)
            if not word.strip():
                self.error(f"{flag} está vacío (¿una variable sin valor?).".lstrip())
        return super().parse_args(args, namespace)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message)
        flags = re.findall(r"--[\w-]+", self.format_help())
        close = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
        for english, spanish in self.ERRORS:
            message = re.sub(f"^{english}$", spanish, message, flags=re.DOTALL)
        hint = f" ¿Querías decir {close[0]}?" if close else ""
        self.exit(2, f"{self.format_usage()}❌ {message}{hint} Todas las opciones: python {self.prog} --help\n")


def readable(text: str) -> str:
    """With question marks for what neither UTF-8 nor a tokenizer takes: half a character, a file's name in Latin-1."""
    return text.encode("utf-8", "replace").decode()


def decimal(text: str) -> float:
    """A number as a Spanish or an English writer puts it: «0,5» or «0.5»."""
    return float(text.replace(",", "."))


def out_of_memory(error: Exception) -> bool:
    """Whether the GPU, or torch's allocator on the CPU, had no memory left."""
    known = ("not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in known)
    )


def guarded(say, action, *arguments) -> bool:
    """Call `action`, or say what keeps it from being done. Returns whether it was done."""
    failure = None
    try:
        action(*arguments)
    except (UserError, EngramFileError) as error:
        failure = f"❌ {error}"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failure = f"⚠️  {OUT_OF_MEMORY}"
    if failure:  # said here, as inside `except` the traceback would still hold the tensors
        torch.cuda.empty_cache()
        say(failure)
    return not failure


def in_notebook() -> bool:
    """Whether this is a notebook's own process, whose `input` asks in the cell."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def in_command_of_notebook() -> bool:
    """Whether this is a notebook's `!python`, which gets no input and shows no line twice; Colab's is a terminal."""
    return ("KAGGLE_KERNEL_RUN_TYPE" in os.environ or "JPY_PARENT_PID" in os.environ) and (
        "COLAB_RELEASE_TAG" not in os.environ
    )


class Progress(tqdm):
    """tqdm's bar; into a file or a notebook a line every half minute, instead of thousands of carriage returns."""

    def __init__(self, *args, **kwargs):
        self.in_lines = not sys.stderr.isatty() or in_command_of_notebook()
        slow = dict(mininterval=30, maxinterval=30) if self.in_lines else {}
        super().__init__(*args, **slow, **kwargs)

    def display(self, msg=None, pos=None):
        if not self.in_lines:
            return super().display(msg, pos)
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def clear(self, nolock=False):
        if not self.in_lines:
            super().clear(nolock)

    def close(self):
        if self.in_lines and not self.disable:
            self.display()
            self.disable = True
        super().close()


def spanish(number, digits=0):
    """1234.5 -> «1.234,5»: a Spanish reader takes the comma for the decimal sign."""
    return f"{number:,.{digits}f}".translate(str.maketrans(",.", ".,"))


def short(value: float) -> str:
    """0.0025 -> «0,0025», 1e-05 as it is: as many digits as it has, six at most."""
    return f"{value:g}".replace(".", ",")


def counted(number: int, one: str, many: str | None = None) -> str:
    """«1 token», «2.000 tokens»."""
    return f"{spanish(number)} {one if number == 1 else many or one + 's'}"


def gigabytes(size):
    return f"{spanish(size / 1e9, 2)} GB" if size > 1e8 else f"{spanish(size / 1e6, 2)} MB"


def peak_memory() -> int | None:
    """Most bytes of RAM that this process has held, pages of mapped files included; None elsewhere than on Linux."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None
