"""LoRA in the place of Phi's weights (peft, optional): put in to learn, saved beside its memory, and put in again.

Phi's matrices stay as they are and each gets a change of low rank, B·A·alpha/r (Hu et al., 2021, arXiv 2106.09685).
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from engram.console import UserError
from engram.memories import BESIDE_ADAPTER, MEMORY_FILE, save_memory

RANK = 8  # of every adapter, alpha twice that: as our study measured it (DOCUMENTACION_TECNICA.md, 6.1)
MATRICES = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
SMALL = "lora"  # the folder of a trained model that holds what learned, without Phi
ADAPTER_FILES = "adapter_model.safetensors", "adapter_config.json"  # peft's own names


def import_peft(why: str):
    """The package; a UserError where it is not installed, or too old. `why`: what needs it, in Spanish."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{why} necesita el paquete peft ({error}). Instálalo con: pip install -U peft") from None
    return peft


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for an attribute by its older name
        return peft.get_peft_model(model, config)


def save_small(lora, folder):
    """The adapters and the memory that learned beside them, without Phi: what `put_in` and peft open on the same Phi.

    Args:
        lora: what `add_lora` gave.
    """
    peft = import_peft("--lora")
    save_memory(lora, folder)
    state = peft.get_peft_model_state_dict(lora, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(state, Path(folder, ADAPTER_FILES[0]), {"format": "pt"})
    config = lora.peft_config["default"]
    config.inference_mode = True
    config.base_model_name_or_path = lora.config.tokenizer_name_or_path  # peft says where it lies on this machine
    config.save_pretrained(folder)


def merge(lora):
    """Add the adapters to Phi's matrices and take them out: the model that `add_lora` was given, changed."""
    with torch.no_grad():
        return lora.merge_and_unload()


def adapter_beside(model, name, **hub) -> Path | None:
    """The folder of the adapter beside which a memory, in a folder or on the Hub, was trained; None: on Phi alone.

    Raises:
        UserError: it is not there, peft is not, or `model` is quantised: a sum of rounded weights is another Phi's.
    """
    with safe_open(cached_file(name, MEMORY_FILE, **hub), "pt") as file:
        if not file.metadata().get(BESIDE_ADAPTER):
            return None
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"La memoria de «{name}» trae un adaptador LoRA, que no se pone en un Phi cuantizado. Pónselo antes, y "
            f"cuantiza lo guardado: python load_phi_engram.py --modelo MODELO --cambiar-memoria {name} --salida mi-phi"
        )
    import_peft(f"«{name}» se entrenó con LoRA y")
    files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) for file in ADAPTER_FILES]
    if None in files:
        raise UserError(
            f"La memoria de «{name}» se entrenó junto a un adaptador LoRA, que es parte de lo aprendido, y ahí falta "
            f"{ADAPTER_FILES[files.index(None)]}: copia a su lado {' y '.join(ADAPTER_FILES)}."
        )
    return Path(files[0]).parent


def put_in(model, folder: Path):
    """Merge the adapter of a folder into Phi's matrices, in place."""
    peft = import_peft("Un adaptador LoRA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(peft.PeftModel.from_pretrained(model, folder)).eval()
