"""What a training leaves to share: table of results, loss curves, model card, the folder, and its way to the Hub.

Used by `train_phi_engram.py`; there is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
from transformers.utils import cached_file

from engram.adapters import SMALL, save_small
from engram.cards import front, original, public_name, toy_warning, values_of, write, write_memory_card
from engram.console import UserError, counted, short, spanish
from engram.folders import whole_folder
from engram.opening import LOG, where_from

FEW = 10_000  # tokens; a loss measured on fewer moves by more than 0.02 nats from text to text
TRACKERS = ("tensorboard", "trackio")


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is not there: accelerate would leave it out without a word."""
    if name and importlib.util.find_spec(name) is None:
        raise UserError(f"--registro {name} necesita un paquete más. Instálalo con: pip install {name}")


def start_tracker(accelerator, name: str | None, run: str, settings: dict, step: int) -> None:
    """Begin, or go on, to write in TensorBoard's folder `run` or trackio's project `run`, from after step `step`."""
    if name is None:
        return
    # What an interrupted run logged after its last checkpoint comes again.
    options = {"tensorboard": dict(purge_step=step + 1 if step else 0)}.get(name, {})
    flat = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}
    accelerator.init_trackers(run, flat, {name: options})


def too_few(result: dict) -> str:
    """What is to be said of a loss measured on so little text that another text would give quite another."""
    tokens = result.get("tokens", FEW)
    return "" if tokens >= FEW else f", medido en solo {counted(tokens, 'token')}: no te fíes"


def result_line(result: dict) -> str:
    return (
        f"   Texto apartado, {result['name']}: pérdida {spanish(result['loss'], 4)}, "
        f"perplejidad {spanish(result['perplexity'], 2)}, {spanish(result['bits_per_byte'], 3)} bits por byte"
        f"{too_few(result)}"
    )


def memory_line(losses: dict[str, float]) -> str:
    """How much of a held-out loss the memory is worth, and how much of that is in what it remembers."""
    on, off, shuffled = (losses[name] for name in ("on", "off", "shuffled"))
    gain = off - on
    text = (
        f"   Con la memoria, {spanish(on, 4)}; apagada, {spanish(off, 4)}; con las filas de otros n-gramas, "
        f"{spanish(shuffled, 4)}."
    )
    if gain <= -0.002:
        return f"{text} La memoria estorba en este texto: con ella se pierden {spanish(-gain, 4)} nats por token."
    if gain < 0.002:
        return f"{text} La memoria no ha aprendido nada que se note: prueba más pasos, o más texto de lo mismo."
    content = min(1, max(0, (shuffled - on) / gain))
    return f"{text} Aporta {spanish(gain, 4)} nats por token, y el {spanish(100 * content)} % está en lo que recuerda."


def result_table(results: list[dict]) -> str:
    """Markdown table of held-out results."""
    lines = ["| modelo | pérdida | perplejidad | bits por byte | tokens/s | tiempo |", "|" + " --- |" * 6]
    for row in results:
        cells = [spanish(row["loss"], 4), spanish(row["perplexity"], 2), spanish(row["bits_per_byte"], 3), "–", "–"]
        if "seconds" in row:
            cells[3:] = spanish(row["tokens_per_second"]), f"{spanish(row['seconds'])} s"
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    if results and (few := too_few(results[-1])):
        lines.append(f"\nTodo{few}.")
    return "\n".join(lines)


def plot_losses(
    history: list[dict], results: list[dict], recipe, path, control: dict | None = None
) -> None:
    """Training loss by step, smoothed, with the held-out loss before, between and after, and that of a control."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    places = [0]
    for phase in (1, 2):
        losses = [row["loss"] for row in history if row["phase"] == phase]
        if losses:
            window, start = max(1, len(losses) // 8), places[-1]
            smooth = np.convolve(losses, np.ones(window) / window, "valid")
            label = f"texto con que se entrena, fase {phase} ({what_learns(phase, recipe.lora)})"
            axes.plot(np.arange(len(smooth)) + start + window, smooth, label=label)
            places.append(start + recipe.steps[phase - 1])
    held_out = [row["loss"] for row in results]
    axes.plot(places, held_out, "o--", color="black", label="texto apartado, con memoria")
    for place, loss in zip(places, held_out):
        axes.annotate(spanish(loss, 3), (place, loss), textcoords="offset points", xytext=(0, 8), ha="center")
    if control:
        axes.plot(places[-1:], [control["loss"]], "s", color="tab:red", label="texto apartado, control sin memoria")
        shift = 0, -14 if control["loss"] < held_out[-1] else 8
        axes.annotate(
            spanish(control["loss"], 3), (places[-1], control["loss"]), textcoords="offset points", xytext=shift,
            ha="center", color="tab:red",
        )  # fmt: skip
    axes.set(xlabel="paso", ylabel="pérdida (nats por token)")
    title = "Phi con memoria Engram\nLas curvas y los puntos son de textos distintos: no se comparan entre sí"
    axes.set_title(title, size=10)
    axes.yaxis.set_major_formatter(lambda value, place: short(round(value, 4)))
    axes.margins(x=0.06, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


CARD = """{front}# {name}
{toy}
Phi con la memoria condicional **Engram** de DeepSeek: tablas de n-gramas que se consultan en tiempo constante por token
y que el propio contexto deja pasar o no. Capas con memoria: {layers}. Parámetros: {backbone} de Phi y {memory} de
Engram.

## Uso

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo}")
inputs = tokenizer("def print_prime(n):", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]))
```

Es un modelo base: completa código y textos; no se le ha enseñado a conversar.
{small}
## Datos

Corpus: {corpus}. Lo apartado no se ha usado nunca para entrenar.

## Receta

{phases} Pesos densos con {optimizer}; de las tablas solo cambian las filas leídas (estado: {row_state}).
{batch} × {accumulate} × {processes} bloques de {length} tokens por paso (lote, acumulados, procesos); decaimiento
{weight_decay} en las matrices de Phi y ninguno en la memoria; semilla {seed}.

## Resultados en el texto apartado

{table}

{control}{content}

![Curvas de pérdida](perdidas.png)
"""


SMALL_NOTE = """
Lo aprendido, sin Phi, está en la carpeta `lora/`: un adaptador LoRA y la memoria. Sobre el Phi de partida, con una
memoria de la misma forma, responde como este modelo:

```bash
pip install -U peft
hf download {repo} --include "lora/*" --local-dir bajado
python chat_phi_engram.py --modelo phi1-engram --cambiar-memoria bajado/lora
```
"""


def what_learns(phase: int, lora: int) -> str:
    if phase == 1:
        return "solo la memoria"
    return "la memoria y LoRA" if lora else "todo el modelo"


def phases(recipe) -> str:
    """What a card says of both phases; of one that had no steps, that it was left out."""
    steps = [counted(number, "paso") for number in recipe.steps]
    (a, b), (c, d) = (map(short, rates) for rates in zip(recipe.memory_rates, recipe.table_rates))
    first = f"Fase 1, {steps[0]}: Phi congelado; tasas {a} (proyecciones de Engram) y {b} (tablas)."
    who = f"un adaptador LoRA de rango {recipe.lora}, fundido después en Phi" if recipe.lora else "Phi"
    second = (
        f"Fase 2, {steps[1]}: {what_learns(2, recipe.lora)}; tasas {short(recipe.backbone_rate)} ({who}), {c} "
        f"(proyecciones de Engram) y {d} (tablas)."
    )
    return "\n".join(
        (first if recipe.steps[0] else "Sin fase 1.", second if recipe.steps[1] else "Sin fase 2: Phi no ha cambiado.")
    )


def against_control(control: dict, result: dict) -> str:
    """What a memory was worth against the same Phi that went on without it."""
    gain = control["loss"] - result["loss"]
    if abs(gain) < 0.002:
        verdict = f"empata con él: la diferencia, {spanish(abs(gain), 4)} nats por token, no es nada"
    else:
        verdict = f"{'le gana' if gain > 0 else 'pierde con él'} por {spanish(abs(gain), 3)} nats por token"
    return (
        f"El control es el mismo Phi de partida, entrenado sin memoria y con todos sus pesos, los mismos pasos y con "
        f"los mismos textos. La memoria {verdict} (una sola ejecución)."
    )


def trained_card(model, outcome: dict, name: str, repo: str | None) -> str:
    """README.md of a trained model, `name` its folder; where weights of Phi changed, they have by now."""
    recipe, control = outcome["recipe"], outcome["control"]  # the held-out result of a twin without memory, or None
    backbone, memory = values_of(model)
    repo = repo or f"tu-usuario/{name}"
    words = asdict(recipe) | dict(phases=phases(recipe), weight_decay=short(recipe.weight_decay))
    return CARD.format(
        front=front("[engram, phi, code, custom_code]", original(model)), name=name, repo=repo,
        layers=", ".join(map(str, model.config.engram_layer_ids)), memory=spanish(memory), backbone=spanish(backbone),
        corpus=outcome["corpus"].describe(), toy=toy_warning(model),
        small=SMALL_NOTE.format(repo=repo) if recipe.lora else "",
        table=result_table([*outcome["results"], *([control] if control else [])]),
        control=f"{against_control(control, outcome['results'][-1])}\n\n" if control else "",
        content=memory_line(outcome["memory"]).strip(), **words,
    )  # fmt: skip


def save_trained(model, tokenizer, outcome: dict, output, repo: str | None) -> None:
    """Write weights, code, tokenizer, card, log and picture to `output`, whole or not at all; adapters are merged into
    Phi, and saved beside it as they are, with the memory."""
    recipe, control, name = outcome["recipe"], outcome["control"], Path(output).name
    with whole_folder(output) as folder:
        if outcome["lora"]:
            (folder / SMALL).mkdir()
            start, alone = public_name(model.name_or_path), not phi_was_trained(model)
            save_small(outcome["lora"], folder / SMALL, model.config.tokenizer_name_or_path if alone else start)
            write_memory_card(model, folder / SMALL, f"{name}/{SMALL}", name, alone, start)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write(folder, trained_card(model, outcome, name, repo))
        rows = [*outcome["history"], *outcome["results"], dict(memory=outcome["memory"]), dict(seed=recipe.seed)]
        rows += [dict(control=control)] if control else []
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / LOG).write_text("".join(lines), encoding="utf-8")
        plot_losses(outcome["history"], outcome["results"], recipe, folder / "perdidas.png", control)


def phi_was_trained(model) -> bool:
    """Whether a model's Phi is not the one on which its memory was put; of an earlier version its log tells."""
    if model.config.engram_backbone is not None:
        return model.fingerprints()["backbone"] != model.config.engram_backbone
    if not (name := model.name_or_path):
        return False
    log = cached_file(
        name, LOG, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False, **where_from(name),
    )  # fmt: skip
    return bool(log) and '"phase": 2' in Path(log).read_text(encoding="utf-8")


def hub_token() -> str:
    """The token of the environment, or of Kaggle's secrets; Colab's are the notebook's own process's alone."""
    from huggingface_hub import get_token

    token = get_token()  # HF_TOKEN, a login on this machine
    if token is None:
        try:
            from kaggle_secrets import UserSecretsClient

            token = UserSecretsClient().get_secret("HF_TOKEN")
        except Exception:  # not on Kaggle, or no secret of that name: the message below serves both
            raise UserError(
                "Para guardar en el Hub hace falta tu llave de Hugging Face, con permiso de escritura. Créala en "
                "https://huggingface.co/settings/tokens y ponla así:\n"
                "   en Colab, como secreto HF_TOKEN (icono de la llave), y ejecuta después en una celda:\n"
                "      import os; from google.colab import userdata\n"
                '      os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")\n'
                "   en Kaggle, como secreto HF_TOKEN (Add-ons → Secrets);\n"
                "   en una terminal: export HF_TOKEN=hf_…"
            ) from None
    return token


def on_hub(action, repo: str, advice: str):
    """Call `action(HfApi)`; the Hub's many errors become one sentence with their first line."""
    from huggingface_hub import HfApi

    try:
        return action(HfApi(token=hub_token()))
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"El Hub no aceptó '{repo}' ({reason}). {advice}") from error
