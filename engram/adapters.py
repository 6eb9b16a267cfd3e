"""LoRA in the place of Phi's weights (peft, optional): put in to learn, saved beside its memory, and put in again.

Phi's matrices stay as they are and each gets a change of low rank, B·A·alpha/r (Hu et al., 2021, arXiv 2106.09685).
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import hashlib
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import cached_file

from engram.console import UserError, out_of_memory
from engram.memories import BESIDE_ADAPTER, memory_says, save_memory

RANK = 8  # of every adapter, alpha twice that: as our study measured it (DOCUMENTACION_TECNICA.md, 6.1)
MATRICES = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
SMALL = "lora"  # the folder of a trained model that holds what learned, without Phi
MERGED = "merged"  # in the metadata of its memory: the digest of Phi with the adapter merged
ADAPTER_FILES = "adapter_model.safetensors", "adapter_config.json"  # peft's own names


def import_peft(why: str):
    """The package; a UserError where it is not installed, or too old. `why`: what needs it, in Spanish."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{why} necesita el paquete peft ({error}). Instálalo con: pip install -U peft") from None
    return peft


def too_old(error: ImportError) -> UserError:
    """Of what peft raises where a torchao is installed that is too old for it, even if nothing is quantised."""
    return UserError(f"A peft no le vale otro paquete instalado ({error}). Si es torchao: pip install -U torchao")


def of_phi(name: str) -> bool:
    """Whether a tensor is Phi's own: neither the memory's nor an adapter's."""
    return "engram" not in name and "lora_" not in name


def learns(name: str, phase: int, lora: int) -> bool:
    """Whether a parameter is trained in phase 1 or 2; `lora`: the rank of adapters, 0 for Phi itself."""
    return not of_phi(name) or (phase == 2 and not lora)


def add_lora(model, rank: int):
    """Put adapters that change nothing yet around the matrices of Phi, in place; returns peft's PeftModel around it."""
    peft = import_peft("--lora")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MATRICES, task_type="CAUSAL_LM")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers for an attribute by its older name
            return peft.get_peft_model(model, config)
    except ImportError as error:
        raise too_old(error) from error


def save_small(lora, folder, base: str):
    """Merge the adapters into Phi's matrices, in place, and save what learned without Phi: adapters and memory, what
    `put_in` and peft open on the same Phi.

    Args:
        lora: what `add_lora` gave; no adapter is left on the model.
        base: the Hub's name, or another, of the model from which the training began.
    """
    peft, model, path = import_peft("--lora"), lora.get_base_model(), Path(folder, ADAPTER_FILES[0])
    told = model.fingerprints()
    state = peft.get_peft_model_state_dict(lora, save_embedding_layers=False)
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, path, {"format": "pt"})
    config = lora.peft_config["default"]
    config.inference_mode, config.base_model_name_or_path = True, base  # peft says where it lies on this machine
    config.save_pretrained(folder)
    merge(lora)
    save_memory(model, folder, {**told, BESIDE_ADAPTER: digest(path), MERGED: model.fingerprints()["backbone"]})


def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def merge(lora):
    """Add the adapters to Phi's matrices and take them out: the model that `add_lora` was given, changed."""
    with torch.no_grad():
        return lora.merge_and_unload()


@contextmanager
def read_by_peft(name):
    """Whatever peft finds wrong with an adapter, as a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*missing adapter keys")
            yield import_peft(f"«{name}» se entrenó con LoRA y")
    except UserError:
        raise
    except ImportError as error:
        raise too_old(error) from error
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"El adaptador LoRA de «{name}» no se puede poner: está dañado, es de otro modelo o pide un peft más nuevo "
            f"({reason}). Vuelve a copiar la carpeta entera, y prueba con: pip install -U peft"
        ) from error


def adapter_beside(model, name, **hub) -> Path | None:
    """The folder of the adapter beside which a memory, in a folder or on the Hub, was trained; None: on Phi alone.

    Raises:
        UserError: it is not there, or another's, or peft is not there, or `model` is quantised: a sum of rounded
            weights is another Phi's.
    """
    signed = memory_says(name, **hub).get(BESIDE_ADAPTER)
    if not signed:
        return None
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"La memoria de «{name}» trae un adaptador LoRA, que no se pone en un Phi cuantizado. Pónselo antes, y "
            f"cuantiza lo guardado: python load_phi_engram.py --modelo MODELO --cambiar-memoria {name} --salida mi-phi"
        )
    files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) for file in ADAPTER_FILES]
    if None in files:
        raise UserError(
            f"La memoria de «{name}» se entrenó junto a un adaptador LoRA, que es parte de lo aprendido, y ahí falta "
            f"{ADAPTER_FILES[files.index(None)]}: copia la carpeta entera."
        )
    if signed not in ("peft", digest(files[0])):
        raise UserError(
            f"El {ADAPTER_FILES[0]} de «{name}» no es el que se entrenó con esa memoria, o está a medias: copia la "
            "carpeta entera."
        )
    folder = Path(files[0]).parent
    with read_by_peft(name) as peft:
        peft.PeftConfig.from_pretrained(folder)
    return folder


def put_in(model, folder: Path):
    """Merge the adapter of a folder into Phi's matrices, in place.

    The sum of weights in half precision has not all signs of the sum in float32, of which the folder has the digest.
    """
    if model.config.engram_backbone is None:  # of a graft by an earlier version: from here on Phi is another
        model.config.engram_backbone = model.fingerprints()["backbone"]
    with read_by_peft(folder) as peft:
        merge(peft.PeftModel.from_pretrained(model, folder)).eval()
    if model.dtype != torch.float32:  # in which a training would leave it stale
        model.was_phi = memory_says(folder).get(MERGED)
