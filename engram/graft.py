"""An untrained memory on a Phi that must stay the same Phi, and what was put together."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import re
import shlex
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open

from engram.cards import public_name
from engram.console import UserError, gigabytes, short, spanish
from engram.memories import MEMORY_FILE
from engram.opening import explained, find_model, open_checked, open_tokenizer, read_config, where_from
from phi1_engram import PHI_1, PhiEngramConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ ('Assistant: ' if message['role'] == 'assistant' else 'User: ') "
    "+ message['content'] + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CODE_SAMPLE = "def suma(a, b):\n    return a + b\n"  # short: float16 is slow on a CPU
# What main() writes. A folder that holds anything else is never replaced by it.
OWN_FILES = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|"
    r"chat_template\.jinja|README\.md|engram_memory\.safetensors|engram_facts.*|phi1_engram\.py|__pycache__|\.DS_Store|"
    r"model.*\.safetensors(\.index(\..+)?\.json)?"
)


def check_output(output, alone=False):
    """Refuse a place that `whole_folder` would replace, if what is there is more than an untrained graft with nothing
    taught; where a memory `alone` is to be saved, if it is more than another."""
    path = Path(output).expanduser()
    entries = sorted(entry.name for entry in path.iterdir() if entry.name != ".DS_Store") if path.is_dir() else []
    foreign = [name for name in entries if not re.fullmatch(OWN_FILES, name)]
    only_memory = entries in ([MEMORY_FILE], ["README.md", MEMORY_FILE])
    if path.exists() and not path.is_dir():
        reason = "ya existe y es un archivo, no una carpeta"
    elif foreign:
        reason = f"esa carpeta contiene «{foreign[0]}», que no es de este script, y no la voy a pisar"
    elif not entries or (alone and only_memory):
        return
    elif only_memory:
        reason = "ahí hay una memoria y no la voy a pisar"
    elif alone or read_config(str(path))["model_type"] != PhiEngramConfig.model_type:
        reason = "ahí hay un modelo entero y no lo voy a pisar" if alone else "ahí hay otro modelo y no lo voy a pisar"
    elif has_learned(path):
        reason = "ahí hay un modelo que ha aprendido algo y no lo voy a pisar"
    else:
        return
    raise UserError(f"--salida {output}: {reason}. Elige otra, por ejemplo: --salida phi1-engram-2")


def has_learned(folder: Path) -> bool:
    """Whether a saved model's memory holds anything, trained or taught."""
    if next(folder.glob("engram_facts*"), None):
        return True
    for file in sorted(folder.glob("model*.safetensors"), key=lambda file: file.stat().st_size):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    # A fresh graft's are zeros, and its other weights are drawn.
                    if name.endswith("engram.conv.weight") or "engram_tables" in name:
                        if tensors.get_tensor(name).any():
                            return True
        except (SafetensorError, OSError) as error:
            cure = f"borra la carpeta {folder}, o elige otra --salida"
            raise UserError(f"{file} está dañado o a medias: {cure}.") from error
    return False


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
    half = "" if str(dtype).endswith("float16") else ", o usa la mitad con --dtype float16"
    with explained(name, f"Cierra otros programas{half}."):
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
        fields |= {"tokenizer_name_or_path": public_name(name)}
        try:
            config = PhiEngramConfig(**{**fields, **engram})
        except ValueError as error:
            flags = "en la orden, engram_layer_ids es --capas y engram_vocab_size es --filas"
            raise UserError(f"{error} ({flags})") from error
        model = open_checked(name, new="engram", config=config, dtype=dtype, tokenizer=tokenizer, **source)
        model.generation_config = transformers.GenerationConfig(eos_token_id=stop, pad_token_id=stop)
        model.config.engram_backbone = model.fingerprints()["backbone"]
    difference = graft_difference(model, tokenizer(CODE_SAMPLE, return_tensors="pt").input_ids)
    if difference:
        raise UserError(
            f"El injerto cambia las respuestas de «{name}» en {short(difference)}, y no debe cambiar nada. No se ha "
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
    state = {name: tensor for name, tensor in model.state_dict().items() if "engram" not in name}
    for name, module in model.named_modules() if getattr(model, "is_quantized", False) else ():
        if isinstance(module, torch.nn.Linear) and "engram" not in name:
            phi.set_submodule(name, module)  # quantised alike
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
    phi.load_state_dict(state, strict=not getattr(model, "is_quantized", False), assign=True)
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
