"""Checkpoints of a training: whole or absent, pruned when a newer one is whole, checked before they are resumed.

Used by `train_phi_engram.py`; there is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import errno
import json
import math
import re
from pathlib import Path

from engram.console import UserError, gigabytes, out_of_memory, short, spanish
from engram.folders import discard, whole_folder

STATE = "estado.json"
# What makes two trainings different, in the words of the command line or of the documentation.
WORDS = {
    "steps": ("--pasos-fase1", "--pasos-fase2"),
    "length": "--longitud",
    "seed": "--semilla",
    "optimizer": "--optimizador",
    "row_state": "--estado-filas",
    "backbone_rate": "tasa de Phi",
    "memory_rates": ("tasa de Engram en la fase 1", "tasa de Engram en la fase 2"),
    "table_rates": ("tasa de las tablas en la fase 1", "tasa de las tablas en la fase 2"),
    "weight_decay": "decaimiento",
    "clip": "recorte de gradientes",
    "lora": "rango de --lora",
    "hidden_size": "ancho del modelo",
    "intermediate_size": "ancho del MLP",
    "num_hidden_layers": "capas del modelo",
    "num_attention_heads": "cabezas de atención",
    "vocab_size": "vocabulario",
    "engram_layer_ids": "capas con memoria (--capas de load_phi_engram.py)",
    "engram_vocab_size": "filas de la memoria por orden (--filas de load_phi_engram.py)",
    "max_ngram_size": "orden mayor de los n-gramas",
    "n_embed_per_ngram": "ancho de la memoria por orden",
    "n_head_per_ngram": "cabezas de la memoria por orden",
}

SPLIT = ("batch", "accumulate", "processes")  # how a step's blocks are divided; their product is what is learned from
PARTS = {"shard_rows": "--repartir-filas", "shard_model": "--repartir-modelo"}  # how a checkpoint's files are divided
HOW = {*SPLIT, *PARTS, "recompute"}  # what may change on the way


def position(path: Path) -> tuple[int, int] | None:
    """(phase, steps done), by which checkpoints are ordered; None for any other name."""
    match = re.fullmatch(r"fase-(\d+)-paso-(\d+)", path.name)
    return (int(match[1]), int(match[2])) if match else None


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, half copied ones included."""
    return sorted((path for path in folder.glob("fase-*") if position(path)), key=position)


def fault(checkpoint: Path) -> str | None:
    """What a copy left out or cut short; None when everything is there with its size."""
    try:
        files = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("files", {})
    except FileNotFoundError:
        return f"falta {STATE}"
    except (ValueError, AttributeError):
        return f"{STATE} está a medias"
    for name, size in files.items():
        if not (checkpoint / name).is_file():
            return f"falta {name}"
        there = (checkpoint / name).stat().st_size
        if there != size:
            return f"{name} tiene {gigabytes(there)} de {gigabytes(size)}"
    return None


def is_damage(error: Exception) -> bool:
    """Whether a damaged file raises this, in torch, zip, pickle or safetensors, and not what keeps a good one from
    being read: too little memory, a lack of permission, a card that fails."""
    if isinstance(error, OSError):
        return error.errno in (errno.EINVAL, errno.ENOENT)  # torch seeks before the start of a cut zip
    return not out_of_memory(error) and "CUDA" not in str(error)


def write_checkpoint(folder: Path, state: dict, write) -> Path:
    """Save `state`, and what `write(folder)` writes, under the name of its phase and step.

    Raises:
        UserError: the disk is full; older checkpoints are as they were, and the message names the last one.
    """
    checkpoint = folder / f"fase-{state['phase']}-paso-{state['step']:07d}"
    try:
        with whole_folder(checkpoint) as temporary:
            write(temporary)
            files = {
                path.relative_to(temporary).as_posix(): path.stat().st_size
                for path in temporary.rglob("*") if path.is_file()
            }  # fmt: skip
            (temporary / STATE).write_text(json.dumps(dict(state, files=files)), encoding="utf-8")
    except UserError as error:
        whole = [path.name for path in all_checkpoints(folder) if not fault(path)]
        kept = (
            f"El último punto de control entero es {folder / whole[-1]}: con sitio libre, repite la misma orden con "
            "--reanudar y sigue desde ahí."
            if whole
            else "Aún no había ningún punto de control anterior."
        )
        raise UserError(f"{error} {kept}") from error
    return checkpoint


def prune(newest: Path, keep: int = 1):
    """Delete the checkpoints beside the `newest` but for `keep`, itself among them."""
    # Whole ones up to here count; a half copied one, or one of a later step than was resumed, does not.
    there = all_checkpoints(newest.parent)
    kept = [path for path in there if position(path) <= position(newest) and not fault(path)]
    for path in there:
        if path not in kept[-keep:]:
            discard(path)


def newest_identity(folder: Path) -> dict | None:
    """What the newest whole checkpoint says that its training is; None where there is none."""
    for checkpoint in reversed(all_checkpoints(folder)):
        if fault(checkpoint) is None:
            return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["identity"]
    return None


def last_checkpoint(folder: Path, output: Path, identity: dict, data: str) -> tuple[Path | None, dict]:
    """The newest whole checkpoint with its state; None when a run was killed before its first one.

    Args:
        identity: what the training to go on with is, see `identity_of`; data: its corpus in words.
    Raises:
        UserError: nothing to resume, only half copied checkpoints, or one of another training.
    """
    if output.exists() and not all_checkpoints(folder):
        raise UserError(f"{output}/ ya está terminado: no hay nada que reanudar. Para entrenar otro, usa --salida.")
    if not folder.is_dir():
        raise UserError(
            f"No hay ningún punto de control: no existe {folder}. Si lo copiaste de otra máquina, ponlo ahí con ese "
            "nombre; para empezar de cero, quita --reanudar."
        )
    faults = []
    for checkpoint in reversed(all_checkpoints(folder)):
        reason = fault(checkpoint)
        if reason is None:
            break
        faults.append(f"{checkpoint.name} está incompleto ({reason})")
    else:
        if faults:
            raise UserError(
                f"En {folder} no hay ningún punto de control entero: {'; '.join(faults)}. Vuelve a copiarlo, o borra "
                "esa carpeta para empezar de cero."
            )
        print(f"En {folder} aún no hay ningún punto de control: empiezo desde el principio.")
        return None, {}
    if faults:
        print(f"⚠️  {'; '.join(faults)}. Uso el anterior, {checkpoint.name}.")
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if differences := _differences(state, identity, data):
        raise UserError(
            f"El punto de control {checkpoint} es de otro entrenamiento y no se puede seguir con este: "
            f"{'; '.join(differences)}. Repite las opciones de entonces, o elige otra --salida para empezar uno nuevo."
        )
    return checkpoint, state


def identity_of(recipe: dict, corpus_digest: str, config: dict) -> dict:
    """What must not change while a training is interrupted; nothing of where its files are, nor of versions."""
    origin = {"transformers_version", "dtype", "_name_or_path", "tokenizer_name_or_path", "auto_map", "architectures"}
    origin |= {"engram_backbone"}  # of a Phi whose digest is compared by itself
    shape = {key: value for key, value in config.items() if key not in origin}
    return json.loads(json.dumps({**shape, **recipe, "corpus": corpus_digest}, default=str))


def _differences(state, identity, data):
    then, identity = ({"lora": 0, **side} for side in (state["identity"], identity))  # earlier ones did not say it
    found = []
    if then["corpus"] != identity["corpus"]:
        found.append(f"el texto de --datos no es el mismo («{state['data']}» entonces, «{data}» ahora)")
    old, new = (math.prod(side.get(name, 1) for name in SPLIT) for side in (then, identity))
    if old != new:
        found.append(
            f"{spanish(old)} bloques por paso entonces, {spanish(new)} ahora (--lote × --acumular × procesos; entonces "
            f"eran {' × '.join(str(then[name]) for name in SPLIT)})"
        )
    old, new = _layout(then), _layout(identity)
    if old != new:
        found.append(f"se guardó {old}, y ahora es {new}: las partes no se pueden juntar de otro modo")
    # A transformers of another version describes a model with other fields besides.
    for key in (*WORDS, *sorted(identity.keys() & then.keys() - WORDS.keys() - HOW - {"corpus"})):
        words, old, new = WORDS.get(key, key), then.get(key), identity.get(key)
        if isinstance(words, str) or old is None:
            words, old, new = [words if isinstance(words, str) else key], [old], [new]
        changed = [(word, a, b) for word, a, b in zip(words, old, new) if a != b]
        found += [f"{word} {_shown(a)} entonces, {_shown(b)} ahora" for word, a, b in changed]
    return found


def _layout(identity: dict) -> str:
    """How the files of a training's checkpoints are divided, in words."""
    flags = [flag for name, flag in PARTS.items() if identity.get(name)]
    return f"con {' y '.join(flags)} entre {identity['processes']} procesos" if flags else "sin repartir"


def _shown(value):
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "sí", False: "no", None: "nada"}[value]
    if isinstance(value, float):
        return short(value)
    return spanish(value) if isinstance(value, int) else str(value)
