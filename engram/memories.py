"""A memory that travels: what phase 1 trained, taken out of one model and put into another of the same Phi.

One safetensors file holds the rows that are not zero, with their indices, and the dense Engram weights; its metadata
say what it was trained beside (`PhiEngramForCausalLM.fingerprints`). All of this works inside peft's adapters too.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from engram.rows import untouched_zeros
from phi1_engram import EngramTable, as_any_new_file, differing, unpack

MEMORY_FILE = "engram_memory.safetensors"
BESIDE_ADAPTER = "adapter"  # in its metadata: it learned beside one, whose digest this is; of others' just "peft"


def without_peft(model):
    """The model itself, out of peft's PeftModel."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def in_use(module: nn.Module, name: str = "") -> nn.Module:
    """The module itself, or the copy of it that peft's `modules_to_save` has put in its place.

    Raises:
        ValueError: an adapter changes it; `name` says what it is.
    """
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"Un adaptador de peft cambia la memoria ({name}) y no viajaría con ella. Fúndelo antes, con "
            "merge_and_unload(), o deja key_proj y value_proj fuera de target_modules."
        )
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    active = [name for name in module.active_adapters if name in copies]
    return copies[active[0]] if active and not module.disable_adapters else module.original_module


def own_state(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """The live `state_dict` that a part of the memory would have without what peft has put around its parts."""
    module = in_use(module, prefix[:-1])
    parts = dict(module.named_children())
    state = {f"{prefix}{key}": value for key, value in module.state_dict().items() if key.split(".")[0] not in parts}
    for name, part in parts.items():
        state |= own_state(part, f"{prefix}{name}.")
    return state


def dense_weights(model) -> dict[str, torch.Tensor]:
    """The memory's live tensors besides its rows, by their names in a checkpoint."""
    state = {}
    for layer_id in model.config.engram_layer_ids:
        state |= own_state(model.model.layers[layer_id].engram, f"model.layers.{layer_id}.engram.")
    return state


def replace_rows(table: EngramTable, weight: torch.Tensor, place: str):
    """Rows that no file holds; a table in "disco" comes to "ram", where zeros that nobody touches cost nothing."""
    table = in_use(table)
    device = table.weight.device if table.weight is not None else "cpu"
    table.own(weight.to(device))
    table.settle("ram" if place == "disco" else place)


def trained_rows(table: EngramTable) -> dict[str, torch.Tensor]:
    """The rows that are not zero, as stored, and their indices: never more than these in memory, a chunk at a time."""
    trained = [unpack(chunk).any(-1).nonzero()[:, 0] for chunk in table.chunks(table.dtype)]
    rows, ids, first, done = None, torch.empty(sum(map(len, trained)), dtype=torch.long), 0, 0
    for chunk, own in zip(table.chunks(table.dtype), trained):
        rows = chunk.new_empty(len(ids), chunk.shape[1]) if rows is None else rows
        ids[done : done + len(own)] = own + first
        rows[done : done + len(own)] = chunk[own]
        first, done = first + len(chunk), done + len(own)
    return {"row_ids": ids, "rows": rows}


def save_memory(model, folder, told=None):
    """Save the memory and nothing of Phi, as MEMORY_FILE in `folder`. Its size follows the rows trained.

    Args:
        told: what the file is to say of the model, where that has changed meanwhile (`adapters.save_small`).
    Raises:
        ValueError: an adapter of peft changes the memory's own matrices.
    """
    model = without_peft(model)
    tensors = dense_weights(model)
    for layer_id, table in model.model.engram_tables.items():
        tensors |= {f"{layer_id}.{name}": tensor for name, tensor in trained_rows(table).items()}
    if told is None:
        beside = {BESIDE_ADAPTER: "peft"} if any(".base_layer." in name for name in model.state_dict()) else {}
        told = {**model.fingerprints(), **beside}
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder, MEMORY_FILE)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, {"format": "pt", **told})
        as_any_new_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def memory_says(name, **hub) -> dict[str, str]:
    """What a memory's file, in a folder or on the Hub, says of itself."""
    with safe_open(cached_file(name, MEMORY_FILE, **hub), "pt") as file:
        return file.metadata() or {}


@torch.no_grad()
def load_memory(model, name, **hub):
    """Put a memory that `save_memory` wrote in the place of the present one; Phi stays as it is.

    Args:
        name: folder, or user/name on the Hub; `hub`: `token`, `revision` and the like.
    Raises:
        ValueError: it was trained on another Phi, with another hash or with another projection, or an adapter of peft
            changes the present one; nothing changed.
    """
    model = without_peft(model)
    with safe_open(cached_file(name, MEMORY_FILE, **hub), "pt") as file:
        made_for, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    own, size, reason = model.fingerprints(), model.config.vocab_size, None
    if made_for.get("projection") != own["projection"]:
        ids, pad_id = model.model.engram_hash, model.config.engram_pad_id
        n_tokens = vocabulary_of(made_for.get("projection"), ids.token_map, pad_id)
        if n_tokens is not None and n_tokens < size:  # tokens have been added since
            own = model.fingerprints(n_tokens)
        elif n_tokens is not None:
            reason = (
                f"otra proyección del vocabulario (de {n_tokens} tokens, y este modelo tiene {size}: sin los que "
                "faltan no se puede comprobar que Phi sea el mismo; carga la memoria antes de quitarlos)"
            )
    reason = reason or differing(made_for, own)
    if reason:
        raise ValueError(f"La memoria «{name}» no sirve para este modelo: se entrenó sobre {reason}.")
    state, place = dense_weights(model), model.memory_place
    model.set_facts([])
    for key, tensor in tensors.items():
        if ".engram." in key:
            state[key].copy_(tensor)
    for layer_id, table in model.model.engram_tables.items():
        rows = tensors[f"{layer_id}.rows"]
        weight = untouched_zeros(table.n_rows, rows.shape[1], rows.dtype)
        replace_rows(table, weight.index_copy_(0, tensors[f"{layer_id}.row_ids"], rows), place)


@torch.no_grad()
def remove_memory(model):
    """Forget everything: an untrained memory and no facts, that is plain Phi to the last bit.

    Raises:
        ValueError: an adapter of peft changes the memory's own matrices.
    """
    model = without_peft(model)
    dense_weights(model)  # or an error
    model.set_facts([])
    for layer_id, table in model.model.engram_tables.items():
        engram = in_use(model.model.layers[int(layer_id)].engram)
        for name, parameter in engram.named_parameters():
            parameter.fill_("norm" in name)
        for place, projection in enumerate((engram.key_proj, engram.value_proj)):
            projection.weight.copy_(engram.fresh_projection(place))
        replace_rows(table, untouched_zeros(table.n_rows, table.d_head, model.dtype), model.memory_place)


def vocabulary_of(projection: str, token_map: torch.LongTensor, pad_id: int) -> int | None:
    """How many tokens a vocabulary has, by the digest of its projection: the first of `token_map`, or all and more.

    More are tokens added by `EngramHash.resize`, or ids without a token. None where it is another tokenizer's.
    """
    known, more = token_map.cpu().numpy(), 2**16
    for tail in (np.arange(more) + known.max() + 1, np.full(more, known[pad_id])):
        digest = hashlib.sha256()
        for n, canonical in enumerate(np.concatenate((known, tail)), 1):
            digest.update(canonical.tobytes())
            if digest.hexdigest() == projection:
                return n
    return None
