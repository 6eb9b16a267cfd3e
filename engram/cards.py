"""What a folder says of itself: README.md for a fresh graft, a memory alone, a control, and a toy's warning."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from pathlib import Path

from engram.console import spanish
from engram.opening import is_toy
from phi1_engram import PHI_1

FRONT = """---
language: [es, en]
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: {tags}
{base}---

"""


def front(tags: str, of_phi_1: bool) -> str:
    """What the Hub reads of a card."""
    return FRONT.format(tags=tags, base=f"base_model: {PHI_1}\n" if of_phi_1 else "")


def original(model) -> bool:
    """Whether the Hub may call it a descendant of Phi-1: a toy has its tokenizer's name at most."""
    return model.config.tokenizer_name_or_path == PHI_1 and not is_toy(model)


def public_name(name) -> str:
    """Of a folder or Hub repository: where a folder lies on this machine is nobody's business."""
    return Path(name).resolve().name if Path(name).is_dir() else str(name)


def values_of(model) -> tuple[int, int]:
    """Parameters of Phi and of its memory."""
    memory = sum(p.numel() for name, p in model.named_parameters() if "engram" in name)
    return sum(p.numel() for p in model.parameters()) - memory, memory


def toy_warning(model) -> str:
    """A paragraph for the card of a model far smaller than Phi-1; "" for any other."""
    if not is_toy(model):
        return ""
    return (
        f"\n> ⚠️ **Es un modelo de juguete**: su Phi tiene {spanish(values_of(model)[0])} parámetros; Phi-1 tiene 1.400 "
        "millones.\n> Sirve para ver cómo funciona la memoria; no programa ni conversa, y lo que escribe no hay que "
        "creerlo.\n"
    )


def write_graft_card(model, folder, name: str, origin: str):
    """For a Phi with a memory that `load_phi_engram.py` put together."""
    text = f"""# {name}
{toy_warning(model)}
Phi (`{origin}`) con la memoria condicional Engram, tal como la dejó `load_phi_engram.py`: sin más entrenamiento que el
que ya trajera. Una memoria recién puesta está vacía, y con ella el modelo responde lo mismo que Phi, bit a bit.

- Entrenarla: `python train_phi_engram.py --modelo {name}`
- Hablar con él: `python chat_phi_engram.py --modelo {name}`
"""
    write(folder, front("[engram, phi, code, custom_code]", original(model)) + text)


def write_memory_card(model, folder, name: str, origin: str, alone: bool, start: str | None = None):
    """For a memory without its Phi, of the model `origin`. `alone`: Phi has not been trained with it, so that the
    original is its Phi. `start`: with an adapter that lies beside it, what `origin` was trained from."""
    phi = f"`{model.config.tokenizer_name_or_path}`"
    how = "sobre un Phi que ya había cambiado" if start else "junto con su Phi, que cambió"
    who = (
        f"Se entrenó con Phi congelado: sirve a quien tenga {phi} injertado con la misma forma de memoria."
        if alone
        else f"⚠️ Se entrenó {how}: **solo sirve con el Phi de `{start or origin}`**, no con {phi}."
    )
    beside = ""
    if start:
        beside = "Con ella va el adaptador LoRA que aprendió a su lado (`pip install -U peft`): se ponen los dos.\n"
    text = f"""# {name}

Una memoria Engram, sin Phi: las filas entrenadas de `{origin}`, en `engram_memory.safetensors`. Sola no responde.
{beside}{who}

```bash
python chat_phi_engram.py --modelo MODELO --cambiar-memoria {name}
```
"""
    write(folder, front("[engram, phi, code]", alone and original(model)) + text)


def write_control_card(model, folder, name: str, of: str):
    """For the plain Phi beside the demo's model."""
    text = f"""# {name}
{toy_warning(model)}
El control de `{of}`: el mismo Phi de partida, entrenado sin memoria y con todos sus pesos, los mismos pasos y con los
mismos textos. Está para comparar: `python verify_phi_engram.py --profundidad {of}`
"""
    write(folder, front("[phi, code]", False) + text)


def write(folder, text: str):
    Path(folder, "README.md").write_text(text, encoding="utf-8", errors="replace")
