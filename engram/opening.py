"""Opening checkpoints, from a folder or the Hub: found, read, opened, or explained in Spanish."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import difflib
import json
import os
import re
import shlex
import socket
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import transformers
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from engram.adapters import adapter_beside, put_in
from engram.console import UserError, out_of_memory
from engram.folders import no_space
from engram.memories import MEMORY_FILE, load_memory
from engram.quantised import BITS, hasten, quantisation
from phi1_engram import PHI_1, PLACES, EngramFileError, PhiEngramConfig, PhiEngramForCausalLM, unpack

# Otherwise transformers asks a server to convert pickled weights; here they are refused.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
MADE_BY = {
    "phi1-engram": "python load_phi_engram.py",
    "phi1-engram-trained": "python train_phi_engram.py",
    "phi1-engram-demo": "python train_phi_engram.py --demo",
}
LOG = "entrenamiento.jsonl"  # by which a folder is known to be a training's result
# Parameters of Phi below which a model is called a toy; the smallest that Microsoft published has 1.4e9.
TOY = 5e8

FACTS_GONE = "ℹ️  Este modelo traía recuerdos ({}) que ya no valen, porque {}: sigue sin ellos."


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
def explained(name, cure="Cierra otros programas y repite la orden."):
    """Turn whatever fails while the model `name` is opened into a UserError; `cure` is against too little memory."""
    try:
        with quiet():
            yield
    except (UserError, EngramFileError):
        raise
    except Exception as error:
        raise UserError(_explanation(error, name, cure)) from error


def _explanation(error, name, cure):
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
    if any(map(out_of_memory, chain)):
        return f"No hay RAM (o memoria de la GPU) suficiente para abrir «{name}». {cure}"
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


def find_model(name, inside="config.json", what="un modelo", example=PHI_1) -> str:
    """A folder with `what`, of which there is a file `inside`, or a Hub name. A folder that is not there is found out
    here, not by asking the Hub for it."""
    path = os.path.expanduser(str(name))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise UserError(f"«{name}» es un archivo. Indica la carpeta que lo contiene: {os.path.dirname(path) or '.'}")
    if path.count("/") == 1 and path[0] not in "./~" and path[-1] != "/" and "\\" not in path:
        return path
    parent, base = os.path.split(os.path.normpath(path))
    close = difflib.get_close_matches(base, [path.parent.name for path in Path(parent).glob(f"*/{inside}")], 1)
    hint = f" ¿Querías decir {os.path.join(parent, close[0])}?" if close else ""
    if base in MADE_BY and what == "un modelo":
        place = f" --salida {name}" if base == "phi1-engram" and parent else ""
        hint = f" Se crea con: {MADE_BY[base]}{place}."
    raise UserError(
        f"No existe la carpeta «{name}».{hint} Se admite una carpeta con {what} o un nombre del Hub "
        f"(usuario/nombre, por ejemplo {example})."
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


def open_model(name, dtype=None, device=None, storage="auto", memory=None, cure=None, quantised="no"):
    """Open a checkpoint of Phi with memory.

    Args:
        name: folder, or user/name on the Hub.
        dtype: torch dtype or its name; by default the checkpoint's.
        storage: where the memory's rows live: "gpu", "ram", "disco" or "auto".
        memory: a memory to put in place of its own: folder, or user/name on the Hub.
        cure: what to advise where memory does not suffice; by default, to leave the rows on the disk.
        quantised: "int8" or "int4": open Phi in so many bits, and in the precision that goes with them.
    Returns:
        model (eval mode, on `device`), tokenizer.
    Raises:
        UserError: it cannot be opened; a Spanish sentence says what to do.
    """
    name = find_model(name)
    config = read_config(name)
    kind = config["model_type"]
    if kind == "phi":
        command = f"python load_phi_engram.py --modelo {shlex.quote(name)} --salida mi-phi-engram"
        raise UserError(f"«{name}» es un Phi sin memoria Engram. Injértasela con: {command}")
    if kind != PhiEngramConfig.model_type:
        command = "python load_phi_engram.py"
        raise UserError(f"«{name}» no es un Phi con memoria Engram (model_type: {kind}). Para crear uno: {command}")
    if cure is None:
        disk = ", o deja las filas de la memoria en el disco con --memoria disco" if storage != "disco" else ""
        cure = f"Cierra otros programas{disk}."
    with explained(name, cure):
        source = where_from(name)
        tokenizer = open_tokenizer(name, **source)
        how = {"dtype": dtype or "auto", **quantisation(quantised, config, str(device).startswith("cuda"))}
        model = open_checked(name, engram_storage=storage, **how, **source)
        placed = device is None or getattr(model, "is_quantized", False)  # where its library has put it
        model = hasten(model) if placed else model.to(device)
    if memory is not None:
        change_memory(model, memory)
    return model, tokenizer


def change_memory(model, name) -> bool:
    """Put the memory of the folder or Hub name `name`, and LoRA's change of Phi if it learned beside one, in place of
    the model's own. Returns whether it learned so."""
    name = find_model(name, MEMORY_FILE, "una memoria", "tu-usuario/mi-memoria")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, MEMORY_FILE)):
        raise UserError(
            f"La carpeta «{name}» no contiene {MEMORY_FILE}, así que no es una memoria. Se guarda una con: "
            "python load_phi_engram.py --modelo CARPETA --solo-memoria --salida mi-memoria"
        )
    facts = len(model.facts)
    with explained(name):
        source = where_from(name)
        adapter = adapter_beside(model, name, **source)
        try:
            load_memory(model, name, **source)
        except ValueError as error:
            raise UserError(str(error)) from error
        if adapter:
            put_in(model, adapter)
    if facts:
        print(FACTS_GONE.format(facts, "se escribieron con la memoria anterior"), file=sys.stderr)
    return adapter is not None


def add_memory_options(parser):
    """The flags that say where the memory lives and which one it is, the same in every script."""
    parser.add_argument(
        "--memoria", default="auto", choices=PLACES, metavar="SITIO",
        help=f"dónde están las filas de la memoria: {', '.join(PLACES)} (por defecto, auto: lo más rápido que quepa)",
    )  # fmt: skip
    parser.add_argument(
        "--cambiar-memoria", metavar="CARPETA_O_NOMBRE", help="usa esta otra memoria, entrenada sobre el mismo Phi"
    )


def add_quantising_option(parser):
    parser.add_argument(
        "--cuantizar", default="no", choices=BITS, metavar="BITS",
        help="Phi en 8 o 4 bits (int8, int4): ocupa menos y responde antes, y ya no es exactamente el mismo; en la CPU "
        "con torchao, en una GPU con bitsandbytes (por defecto, no)",
    )  # fmt: skip


def about_memory(model, name=None) -> str:
    """Where the memory is and why, as one Spanish line; with `name`, also whose it is and whether it has learned."""
    whose = ""
    if name is not None:
        # A fresh graft is all zeros but for its projections. Tables on disk are not read through for this.
        tables = {} if model.memory_place == "disco" else model.model.engram_tables
        trained = any(model.model.layers[i].engram.conv.weight.any() for i in model.config.engram_layer_ids) or any(
            unpack(chunk).any() for table in tables.values() for chunk in table.chunks(table.dtype)
        )
        empty = "sin entrenar, solo con recuerdos" if model.facts else "sin entrenar: aún no cambia nada"
        whose = f" de {name}, {'encendida' if trained else empty};"
    return f"Memoria{whose} en {model.memory_place}: {model.memory_reason}."


def phi_size(model) -> int:
    """Parameters without the memory's."""
    return sum(p.numel() for name, p in model.named_parameters() if "engram" not in name)


def is_toy(model) -> bool:
    """Whether its Phi is far smaller than any that was published, as the demo's is."""
    return phi_size(model) < TOY


def of_demo(name) -> dict:
    """What the demo wrote of its model: {"library", the package that its memory has learned, "prompt", a beginning that
    it goes on with otherwise than plain Phi}; {} for any other model."""
    log = Path(name).expanduser() / LOG
    try:
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        return {key: last["demo"][key] for key in ("library", "prompt")}
    except (OSError, ValueError, LookupError, TypeError):  # another model's, or damaged: nothing hangs on it
        return {}


def trained_seed(name) -> int | None:
    """With which a model's training divided its text; None where no log says it."""
    try:
        rows = map(json.loads, (Path(name).expanduser() / LOG).read_text(encoding="utf-8").splitlines())
        return next((int(row["seed"]) for row in rows if "seed" in row), None)
    except (OSError, ValueError, TypeError):  # another model's, or damaged
        return None


def apart(action, *args):
    """`action(*args)` in a thread that ends. torch keeps threads at hand for every one that has computed, and more
    threads than cores wait worse: a token of a second thread takes 1.7 times as long (tests/bench/threads.py)."""
    given = Future()

    def run():
        try:
            given.set_result(action(*args))
        except BaseException as error:  # noqa: BLE001  # raised again where it was asked for
            given.set_exception(error)

    Thread(target=run, daemon=True).start()
    return given.result()


def n_values(model) -> int:
    """Parameters, wherever they live; the rows' scales are not counted."""
    tables = model.model.engram_tables.values()
    dense = sum(p.numel() for name, p in model.named_parameters() if "engram_tables" not in name)
    return dense + sum(table.n_rows * table.d_head for table in tables)


def n_bytes(model) -> int:
    """Of all that `save_pretrained` would write."""
    dense = sum(tensor.nbytes for name, tensor in model.state_dict().items() if "engram_tables" not in name)
    return dense + sum(table.size(table.dtype) for table in model.model.engram_tables.values())
