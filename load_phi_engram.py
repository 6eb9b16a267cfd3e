"""Bring Phi-1 and graft an untrained Engram memory on it.

    python load_phi_engram.py                                     # microsoft/phi-1 from the Hub -> phi1-engram/
    python load_phi_engram.py --modelo mi-carpeta-phi --salida mi-phi-engram
    python load_phi_engram.py --capas 1 --filas 64000 --dtype float16         # a smaller memory
    python load_phi_engram.py --modelo phi1-engram-trained --precision-memoria int8 --salida phi1-engram-int8
    python load_phi_engram.py --modelo phi1-engram-trained --solo-memoria --salida mi-memoria

Also the room of what every script does when it opens and saves: errors in Spanish, folders that are whole or absent.
"""

import argparse
import codecs
import difflib
import errno
import os
import re
import shlex
import shutil
import socket
import sys
import time
import unicodedata
import uuid
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Otherwise transformers asks a server to convert pickled weights; here they are refused.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
try:
    import huggingface_hub
    import torch
    import transformers
    from huggingface_hub import errors as hub_errors
    from safetensors import SafetensorError

    from phi1_engram import (
        MEMORY_FILE,
        PHI_1,
        PLACES,
        PRECISIONS,
        EngramFileError,
        PhiEngramConfig,
        PhiEngramForCausalLM,
    )
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )
except KeyboardInterrupt:  # importing takes seconds
    sys.exit(130)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ('Assistant: ' if message['role'] == 'assistant' else 'User: ') "
    "+ message['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CODE_SAMPLE = "def suma(a, b):\n    return a + b\n"  # short: float16 is slow on a CPU
MADE_BY = {
    "phi1-engram": "python load_phi_engram.py",
    "phi1-engram-trained": "python train_phi_engram.py",
    "phi1-engram-demo": "python train_phi_engram.py --demo",
}
# What main() writes. A folder that holds anything else is never replaced by it.
OWN_FILES = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|"
    r"chat_template\.jinja|engram_memory\.safetensors|phi1_engram\.py|model.*\.safetensors(\.index\.json)?|__pycache__|\.DS_Store"
)
ASCII_SIGNS = str.maketrans(
    {"✅": "OK", "❌": "ERROR:", "⚠": "AVISO:", "→": "->", "–": "-", "—": "-", "·": "-", "«": '"', "»": '"', "×": "x"}
    | dict.fromkeys("¿¡ℹ\ufe0f")
)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


# ----------------------------------------------------------------------------------------------------------------------
# Running a script: errors as one Spanish sentence, command lines in Spanish
# ----------------------------------------------------------------------------------------------------------------------


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
    """Run a script's `main(argv)` and exit: 0 when it was done, 1 with one Spanish sentence, 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")  # a terminal without UTF-8 must not kill the script
    try:
        sys.exit(main(argv) or 0)
    except UserError as error:
        message, code = f"❌ {error}", 1
    except KeyboardInterrupt:
        message, code = "\n⏹️  Interrumpido. Lo que ya estaba guardado sigue intacto.", 130
    except EngramFileError as error:
        message, code = f"❌ {error}", 1
    except OSError as error:
        if error.errno not in (*NO_SPACE, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        what = "No queda espacio en el disco" if error.errno in NO_SPACE else "Sin permiso"
        where = f" ({error.filename})" if error.filename else ""
        message, code = f"❌ {what}{where}. No se ha guardado nada a medias. Libera espacio o elige otra carpeta.", 1
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


class SpanishParser(argparse.ArgumentParser):
    """argparse whose own words are Spanish, and that guesses which flag a typo meant."""

    ERRORS = (
        (r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", r"\1: «\2» no es válido; elige entre \3."),
        (r"argument (\S+): invalid int value: '(.*)'", r"\1: «\2» no es un número entero."),
        (r"argument (\S+): invalid float value: '(\d*),(\d+)'", r"\1: escribe el decimal con punto: \2.\3."),
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

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message)
        flags = re.findall(r"--[\w-]+", self.format_help())
        close = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
        for english, spanish in self.ERRORS:
            message = re.sub(f"^{english}$", spanish, message, flags=re.DOTALL)
        hint = f" ¿Querías decir {close[0]}?" if close else ""
        self.exit(2, f"{self.format_usage()}❌ {message}{hint} Todas las opciones: python {self.prog} --help\n")


# ----------------------------------------------------------------------------------------------------------------------
# Folders: whole or absent
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _alone_in(folder):
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
    file = Path(folder, ".en-marcha")
    if fcntl is not None:
        file.touch()
    handle = _lock(file)
    try:
        yield handle is not None or fcntl is None
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)
        _unlock(handle)


def _hidden_name(path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def sweep(parent, pattern):
    """Delete what killed processes left half written in `parent` for folders whose name matches the regex `pattern`.

    What a live process is writing stays; so does everything where folders cannot be locked.
    """
    parent = Path(parent).expanduser().resolve()
    if not parent.is_dir() or fcntl is None:
        return
    with _alone_in(parent):
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
    """Delete a folder so that no half of it is ever seen under its name."""
    path = Path(path).resolve()
    hidden = _hidden_name(path)
    try:
        os.rename(path, hidden)
    except FileNotFoundError:
        return
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
        with _alone_in(path.parent):
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
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())  # a whole name must not outlive half a content when the power fails
        with _alone_in(path.parent):
            if path.exists():
                os.rename(path, old)
            try:
                os.rename(temporary, path)
            except BaseException:
                if old.exists():
                    os.rename(old, path)
                raise
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
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        _unlock(handle)


def no_space(error) -> bool:
    """Whether this is a full disk, which writers in C++ and Rust report with errors of their own."""
    return getattr(error, "errno", None) in NO_SPACE or any(f"os error {code})" in str(error) for code in NO_SPACE)


def check_output(output):
    """Refuse a place whose present content is not an earlier graft: `whole_folder` would replace it."""
    path = Path(output).expanduser()
    entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in entries if not re.fullmatch(OWN_FILES, name)]
    if path.exists() and not path.is_dir():
        reason = "ya existe y es un archivo, no una carpeta"
    elif foreign:
        reason = f"esa carpeta contiene «{foreign[0]}», que no es de este script, y no la voy a pisar"
    elif entries not in ([], [MEMORY_FILE]) and read_config(str(path))["model_type"] != PhiEngramConfig.model_type:
        reason = "ahí hay otro modelo y no lo voy a pisar"
    else:
        return
    raise UserError(f"--salida {output}: {reason}. Elige otra, por ejemplo: --salida phi1-engram-2")


# ----------------------------------------------------------------------------------------------------------------------
# Opening checkpoints, from a folder or the Hub
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def quiet():
    """Without the libraries' English notes and bars; downloads keep their bar."""
    logs = transformers.logging, huggingface_hub.logging
    before, bars = [log.get_verbosity() for log in logs], transformers.logging.is_progress_bar_enabled()
    for log in logs:
        log.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if bars and not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        huggingface_hub.utils.enable_progress_bars()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before):
            log.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def explained(name):
    """Turn whatever fails while the model `name` is opened into a UserError."""
    try:
        with quiet():
            yield
    except (UserError, EngramFileError):
        raise
    except Exception as error:
        raise UserError(_explanation(error, name)) from error


def _explanation(error, name):
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)

    def found(*kinds):
        return next((link for link in chain if isinstance(link, kinds)), None)

    hub = huggingface_hub.constants
    status = getattr(getattr(found(hub_errors.HfHubHTTPError), "response", None), "status_code", None)
    token = "export HF_TOKEN=hf_… (se crea en https://huggingface.co/settings/tokens)"
    if any(map(no_space, chain)):
        return (
            f"No queda espacio en el disco para descargar «{name}» en {hub.HF_HUB_CACHE}. Libera espacio o elige "
            "otro sitio: export HF_HOME=/otra/carpeta"
        )
    if found(MemoryError, torch.OutOfMemoryError) or any("can't allocate memory" in str(link) for link in chain):
        return f"No hay memoria suficiente para abrir «{name}». Cierra otros programas o usa float16."
    if found(hub_errors.GatedRepoError):
        return f"«{name}» es de acceso restringido. Pídelo en https://huggingface.co/{name} y pon tu llave: {token}"
    if status in (401, 403) or found(hub_errors.RepositoryNotFoundError):
        return (
            f"El Hub no tiene ningún modelo «{name}», o es privado. Comprueba el nombre (usuario/nombre, por ejemplo "
            f"{PHI_1}); si es tuyo y privado, pon tu llave: {token}"
        )
    if found(hub_errors.HFValidationError):
        return f"«{name}» no es una carpeta ni un nombre del Hub (usuario/nombre, por ejemplo {PHI_1})."
    if found(hub_errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        type(link).__module__.startswith("httpx") for link in chain
    ):
        reason = " (HF_HUB_OFFLINE=1 lo impide)" if hub.HF_HUB_OFFLINE else ""
        reason = f" (respondió con el error {status})" if status else reason
        return (
            f"No se puede traer «{name}» del Hub, {hub.ENDPOINT}{reason}, y no está en este equipo. Comprueba la "
            "conexión y repite la orden. --modelo admite también una carpeta con el modelo; y sin el Hub funciona: "
            "python train_phi_engram.py --demo"
        )
    if found(SafetensorError):
        reason = " ".join(str(found(SafetensorError)).split())
        return f"Un archivo .safetensors de «{name}» está dañado o a medias ({reason}). Vuelve a copiarlo entero."
    absent = re.search(r"(?:no|have a|have) files? named \(?'?([^\s,')]+)", " ".join(map(str, chain)))
    if absent and absent[1].startswith(("model.safetensors", "pytorch_model")):
        return (
            f"«{name}» no trae sus pesos en formato safetensors ({absent[1]}). Los .bin y .pt se rechazan, porque "
            "abrirlos puede ejecutar código ajeno. Usa una versión del modelo con .safetensors."
        )
    if absent:
        return f"A «{name}» le falta el archivo {absent[1]}. Vuelve a copiar el modelo entero."
    return f"No se pudo abrir «{name}»: {' '.join(str(error).split())[:400] or type(error).__name__}"


def find_model(name) -> str:
    """A folder or a Hub name. A folder that is not there is found out here, not by asking the Hub for it."""
    path = os.path.expanduser(str(name))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise UserError(f"«{name}» es un archivo. Indica la carpeta que lo contiene: {os.path.dirname(path) or '.'}")
    if path.count("/") == 1 and path[0] not in "./~" and path[-1] != "/" and "\\" not in path:
        return path
    parent, base = os.path.split(os.path.normpath(path))
    close = difflib.get_close_matches(base, [folder.parent.name for folder in Path(parent).glob("*/config.json")], 1)
    hint = f" ¿Querías decir {os.path.join(parent, close[0])}?" if close else ""
    if base in MADE_BY:
        place = f" --salida {name}" if base == "phi1-engram" and parent else ""
        hint = f" Se crea con: {MADE_BY[base]}{place}."
    raise UserError(
        f"No existe la carpeta «{name}».{hint} Se admite una carpeta con un modelo o un nombre del Hub "
        f"(usuario/nombre, por ejemplo {PHI_1})."
    )


def where_from(name) -> dict:
    """Keywords for `from_pretrained`: the local cache alone where the Hub does not answer, which else takes minutes."""
    hub = huggingface_hub.constants
    host = urlsplit(hub.ENDPOINT)
    if os.path.isdir(name) or hub.HF_HUB_OFFLINE or {"http", "https", "all"} & set(getproxies()):
        return {}
    try:
        socket.create_connection((host.hostname, host.port or {"http": 80}.get(host.scheme, 443)), timeout=5).close()
        return {}
    except OSError:
        return {"local_files_only": True}


def read_config(name) -> dict:
    """config.json as it is written: a class would fill in defaults that are not the checkpoint's."""
    with explained(name):
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"La carpeta «{name}» no contiene config.json, así que no es un modelo guardado.")
        config, _ = transformers.PreTrainedConfig.get_config_dict(name, **where_from(name))
        return {"model_type": None, **config}


def open_tokenizer(name, **source):
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a checkpoint without one
        raise UserError(f"A «{name}» le falta el tokenizer. Copia a su lado tokenizer.json y tokenizer_config.json.")
    return tokenizer


def open_checked(name, new=None, **kwargs):
    """`PhiEngramForCausalLM.from_pretrained`, safetensors only, with every tensor accounted for.

    Args:
        new: tensors with this in their name may be missing from the checkpoint.
    """
    model, info = PhiEngramForCausalLM.from_pretrained(
        name, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
    )
    missing = [key for key in info["missing_keys"] if new is None or new not in key]
    shapes = [f"{key} (es {list(has)}, debe ser {list(wants)})" for key, has, wants in info["mismatched_keys"]]
    problems = {"faltan": missing, "sobran": info["unexpected_keys"], "no tienen la forma de config.json": shapes}
    for problem, keys in problems.items():
        if keys:
            listed = ", ".join(sorted(keys)[:8]) + (" …" if len(keys) > 8 else "")
            raise UserError(f"Los pesos de «{name}» no encajan: {problem} {len(keys)} tensor(es): {listed}.")
    return model.eval()


def open_model(name, dtype=None, device=None, storage="auto", memory=None):
    """Open a checkpoint of Phi with memory.

    Args:
        name: folder, or user/name on the Hub.
        dtype: torch dtype or its name; by default the checkpoint's.
        storage: where the memory's rows live: "gpu", "ram", "disco" or "auto".
        memory: a memory to put in place of its own: folder, or user/name on the Hub.
    Returns:
        model (eval mode, on `device`), tokenizer.
    Raises:
        UserError: it cannot be opened; a Spanish sentence says what to do.
    """
    name = find_model(name)
    kind = read_config(name)["model_type"]
    if kind == "phi":
        command = f"python load_phi_engram.py --modelo {shlex.quote(name)} --salida mi-phi-engram"
        raise UserError(f"«{name}» es un Phi sin memoria Engram. Injértasela con: {command}")
    if kind != PhiEngramConfig.model_type:
        command = "python load_phi_engram.py"
        raise UserError(f"«{name}» no es un Phi con memoria Engram (model_type: {kind}). Para crear uno: {command}")
    with explained(name):
        source = where_from(name)
        tokenizer = open_tokenizer(name, **source)
        model = open_checked(name, dtype=dtype or "auto", engram_storage=storage, **source)
        model = model if device is None else model.to(device)
    if memory is not None:
        change_memory(model, memory)
    return model, tokenizer


def change_memory(model, name):
    """Put the memory of the folder or Hub name `name` in place of the model's own."""
    name = os.path.expanduser(str(name))
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, MEMORY_FILE)):
        raise UserError(
            f"La carpeta «{name}» no contiene {MEMORY_FILE}, así que no es una memoria. Se guarda una con: "
            "python load_phi_engram.py --modelo CARPETA --solo-memoria --salida mi-memoria"
        )
    with explained(name):
        try:
            model.load_memory(name, **where_from(name))
        except ValueError as error:
            raise UserError(str(error)) from error


def add_memory_options(parser):
    """The flags that say where the memory lives and which one it is, the same in every script."""
    parser.add_argument(
        "--memoria", default="auto", choices=PLACES, metavar="SITIO",
        help=f"dónde están las filas de la memoria: {', '.join(PLACES)} (por defecto, auto: lo más rápido que quepa)",
    )  # fmt: skip
    parser.add_argument(
        "--cambiar-memoria", metavar="CARPETA_O_NOMBRE", help="usa esta otra memoria, entrenada sobre el mismo Phi"
    )


def about_memory(model) -> str:
    """Where the memory is and why, as one Spanish line."""
    return f"Memoria en {model.memory_place}: {model.memory_reason}."


# ----------------------------------------------------------------------------------------------------------------------
# The graft
# ----------------------------------------------------------------------------------------------------------------------


def load_phi_1_with_engram(model_name=PHI_1, layer_ids=None, dtype="auto", **engram):
    """Open a Phi checkpoint with an untrained memory grafted on, and check that it still is the same Phi.

    Args:
        model_name: folder, or user/name on the Hub.
        layer_ids: decoder layers, from 0, that read the memory; by default those of [1, 15] that exist.
        dtype: "auto" (that of the weights in the file), or a torch dtype or its name.
        engram: further fields of PhiEngramConfig, `engram_vocab_size` for one.
    Returns:
        model (eval mode, with its stop token), tokenizer (with a chat template).
    Raises:
        UserError: a Spanish sentence says what is wrong and what to do.
    """
    name = find_model(model_name)
    plain = read_config(name)
    if plain["model_type"] == PhiEngramConfig.model_type:
        use = " o ".join(f"python {script}_phi_engram.py --modelo {shlex.quote(name)}" for script in ("chat", "train"))
        raise UserError(f"«{name}» ya tiene memoria Engram. Úsalo tal cual: {use}")
    if plain["model_type"] != "phi":
        raise UserError(
            f"«{name}» no es un Phi (model_type: {plain['model_type']}). Aquí sirven microsoft/phi-1, "
            "microsoft/phi-1_5 y microsoft/phi-2, o una carpeta con uno de ellos."
        )
    if "quantization_config" in plain:
        raise UserError(f"«{name}» está cuantizado y no se puede entrenar. Usa el original, sin cuantizar.")
    with explained(name):
        source = where_from(name)
        tokenizer = open_tokenizer(name, **source)
        stop = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
        if not tokenizer.chat_template:
            tokenizer.chat_template = CHAT_TEMPLATE
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(stop)
        # Without the config's dtype "auto" asks the file: Phi-1's config says float32 whatever its weights are.
        unwanted = ("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype")
        fields = {key: value for key, value in plain.items() if key not in unwanted and key[0] != "_"}
        fields |= {"eos_token_id": stop, "engram_pad_id": stop, "engram_layer_ids": layer_ids}
        # A folder's own name only: where it lies on this machine is nobody's business.
        fields |= {"tokenizer_name_or_path": Path(name).name if os.path.isdir(name) else name}
        try:
            config = PhiEngramConfig(**{**fields, **engram})
        except ValueError as error:
            flags = "en la orden, engram_layer_ids es --capas y engram_vocab_size es --filas"
            raise UserError(f"{error} ({flags})") from error
        model = open_checked(name, new="engram", config=config, dtype=dtype, tokenizer=tokenizer, **source)
        model.generation_config = transformers.GenerationConfig(eos_token_id=stop, pad_token_id=stop)
    difference = graft_difference(model, tokenizer(CODE_SAMPLE, return_tensors="pt").input_ids)
    if difference:
        raise UserError(
            f"El injerto cambia las respuestas de «{name}» en {difference:g}, y no debe cambiar nada. No se ha "
            "guardado. Prueba con --dtype float32 y, si sigue igual, avisa de este error."
        )
    return model, tokenizer


@torch.no_grad()
def graft_difference(model, ids) -> float:
    """Largest difference between the model's logits and those of transformers' own Phi over the same tensors.

    Args:
        ids: int64 [B, T].
    Returns:
        0.0 exactly when the memory is untrained; infinity where logits are no numbers.
    """
    unlike_phi = ("model_type", "architectures", "auto_map", "dtype")
    fields = {key: value for key, value in model.config.to_dict().items() if key not in unlike_phi}
    with torch.device("meta"):  # no second copy: the tensors are lent to it
        phi = transformers.AutoModelForCausalLM.from_config(
            transformers.PhiConfig(**fields), attn_implementation=model.config._attn_implementation
        )
    phi.load_state_dict({k: v for k, v in model.state_dict().items() if "engram" not in k}, assign=True)
    phi.model.rotary_emb = type(phi.model.rotary_emb)(phi.config).to(model.device)  # its buffers are in no checkpoint
    expected, logits = phi.eval()(ids).logits, model(ids).logits
    if torch.equal(expected, logits):
        return 0.0
    return (expected.float() - logits.float()).abs().max().nan_to_num(torch.inf).item()


def report(model) -> str:
    """Tensors, parameters and bytes of backbone and memory, in Spanish."""
    lines = []
    for label, memory in (("Phi, cargado", False), ("Engram, nuevo", True)):
        tensors = [tensor for name, tensor in model.state_dict().items() if ("engram" in name) == memory]
        count = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()) / 1e6
        size = gigabytes(sum(tensor.nbytes for tensor in tensors))
        lines.append(f"   {label}: {len(tensors)} tensores, {spanish(count, 1)} millones de parámetros, {size}")
    layers = ", ".join(map(str, model.config.engram_layer_ids))
    return "\n".join([*lines, f"   Capas con memoria: {layers}. Precisión: {str(model.dtype).removeprefix('torch.')}"])


def out_of_memory(error: Exception) -> bool:
    """Whether the GPU, or torch's allocator on the CPU, had no memory left."""
    known = ("not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in known)
    )


def spanish(number, digits=0):
    """1234.5 -> «1.234,5»: a Spanish reader takes the comma for the decimal sign."""
    return f"{number:,.{digits}f}".translate(str.maketrans(",.", ".,"))


def gigabytes(size):
    return f"{spanish(size / 1e9, 2)} GB" if size > 1e8 else f"{spanish(size / 1e6, 2)} MB"


def peak_memory() -> int | None:
    """Most bytes of RAM that this process has held, pages of mapped files included; None elsewhere than on Linux."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def main(argv=None):
    parser = SpanishParser(
        description="Trae Phi-1, le injerta una memoria Engram sin entrenar, lo comprueba y lo guarda.",
        epilog="Ejemplo: python load_phi_engram.py --modelo microsoft/phi-1 --capas 1 15 --salida phi1-engram",
    )
    parser.add_argument("--modelo", default=PHI_1, help="carpeta o usuario/nombre de un Phi (por defecto, %(default)s)")
    parser.add_argument("--capas", type=int, nargs="+", metavar="N", help="capas con memoria, contando desde 0 (1 15)")
    parser.add_argument("--filas", type=int, metavar="N", help="filas por cabeza de la memoria (por defecto, 256000)")
    dtypes = ["auto", "float32", "float16", "bfloat16"]
    dtypes_help = f"precisión: {', '.join(dtypes)} (por defecto, auto: la de los pesos)"
    parser.add_argument("--dtype", default="auto", choices=dtypes, metavar="TIPO", help=dtypes_help)
    parser.add_argument(
        "--precision-memoria", choices=list(PRECISIONS), metavar="TIPO",
        help=f"precisión de las filas de la memoria: {', '.join(PRECISIONS)}; int8 ocupa la cuarta parte que float32",
    )  # fmt: skip
    parser.add_argument(
        "--cambiar-memoria", metavar="CARPETA_O_NOMBRE", help="pone esta memoria, entrenada sobre el mismo Phi"
    )
    parser.add_argument(
        "--solo-memoria", action="store_true", help=f"guarda solo las filas entrenadas, en {MEMORY_FILE}, sin Phi"
    )
    parser.add_argument("--salida", default="phi1-engram", help="carpeta en que se guarda (por defecto, %(default)s)")
    args = parser.parse_args(argv)
    if args.solo_memoria and args.precision_memoria:
        parser.error("--solo-memoria guarda las filas como están; cambia antes su precisión con --precision-memoria.")
    started = time.perf_counter()
    check_output(args.salida)
    sizes = {"engram_vocab_size": [args.filas, args.filas]} if args.filas is not None else {}
    with whole_folder(args.salida) as folder:  # first of all: a place that can't be written is known at once
        print(f"📥 Abriendo {args.modelo} …", flush=True)
        changes = [flag for flag in ("precision_memoria", "cambiar_memoria", "solo_memoria") if getattr(args, flag)]
        name = find_model(args.modelo)
        if changes and read_config(name)["model_type"] == PhiEngramConfig.model_type:
            if args.capas or args.filas:
                raise UserError(f"«{args.modelo}» ya tiene memoria: --capas y --filas son para un Phi sin ella.")
            # From the disk, a part at a time: the table may be larger than the RAM.
            model, tokenizer = open_model(name, args.dtype, storage="disco")
        else:
            model, tokenizer = load_phi_1_with_engram(args.modelo, args.capas, args.dtype, **sizes)
            print(report(model))
            print("✅ Injerto exacto: con la memoria sin entrenar responde igual que Phi, bit a bit.")
        if args.cambiar_memoria:
            change_memory(model, args.cambiar_memoria)
            print(f"✅ Memoria cambiada por la de {args.cambiar_memoria}.")
        if args.solo_memoria:
            model.save_memory(folder)
        dtype = PRECISIONS.get(args.precision_memoria)
        tables = model.model.engram_tables.values()
        size = model.n_bytes + sum(table.size(dtype or table.dtype) - table.size(table.dtype) for table in tables)
        free = shutil.disk_usage(folder).free
        if free < size and not args.solo_memoria:
            raise UserError(
                f"No queda espacio: el modelo ocupa {gigabytes(size)} y en {Path(args.salida).resolve().parent} hay "
                f"{gigabytes(free)}. Libera espacio, elige otro disco con --salida o una memoria menor con --filas."
            )
        if not args.solo_memoria:
            print(f"💾 Guardando en {args.salida}/ …", flush=True)
            with quiet():
                model.save_pretrained(folder, engram_precision=args.precision_memoria)
                tokenizer.save_pretrained(folder)
    seconds, peak = time.perf_counter() - started, peak_memory()
    print(f"✅ Guardado en {args.salida}/ en {spanish(seconds, 1)} s.")
    if peak:
        print(f"   Memoria máxima: {gigabytes(peak)} ({spanish(peak / size, 2)} × el modelo), con archivos mapeados.")
    if args.solo_memoria:
        print(f"Ahora: python chat_phi_engram.py --modelo MODELO --cambiar-memoria {shlex.quote(args.salida)}")
        return
    option = "" if args.salida == "phi1-engram" else f" --modelo {shlex.quote(args.salida)}"
    print(f"Ahora: python train_phi_engram.py{option}    (entrena la memoria)")
    print(f"   o:  python chat_phi_engram.py{option}     (habla con el modelo)")


if __name__ == "__main__":
    run_script(main)
