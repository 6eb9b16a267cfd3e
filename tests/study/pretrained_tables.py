"""The rows of pretrained_study.py as Markdown tables: python tests/study/pretrained_study.py --tabla."""

from statistics import mean, stdev

from engram.console import spanish
from study.measures import LONG
from study.tables import markdown

TEXTS = ("biblioteca", "prosa", "propio")
HEADS = {
    "aprende": "| fila | pasos | sem. | densos | filas tocadas | pérdida | ganancia | barajadas | media | entreno |",
    "olvida": "| fila | " + " | ".join(f"{text}: KL | cambian | pérdida" for text in TEXTS) + " |",
    "completa": "| fila | tras un punto | vistos | nuevos | lo mismo, sin los que ya están en el bloque | | |",
    "semillas": "| qué aprende | sem. | pérdida | ganancia | barajadas | apagada | KL: biblioteca | "
    "prosa | propio | puntos |",
}


def number(value, digits=3) -> str:
    # A rounded nothing has no sign.
    return "–" if value is None else spanish(round(value, digits) + 0.0, digits).replace("-", "−")


def percent(right: int, count: int) -> str:
    return f"{number(100 * right / count, 1)} % de {count}" if count else "–"


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def learned(name: str, row: dict, base: dict) -> str:
    gain = base["loss"] - row["loss"]

    def kept(how):  # of the gain, when the rows are not each one's own
        return "–" if how not in row or not gain else f"{number(100 * (base['loss'] - row[how]) / gain, 0)} %"

    counts = [spanish(row[key]) if key in row else "–" for key in ("dense", "touched")]
    losses = number(row["loss"], 4), number(gain, 4), kept("barajadas"), kept("media"), number(row.get("train_loss"))
    return line([name, str(row["steps"]), str(row["seed"]), *counts, *losses])


def forgotten(name: str, row: dict, base: dict) -> str:
    cells = []
    for text in TEXTS:
        old = row["old"][text]
        apart = old["loss"] - base["old"][text]["loss"]
        cells += [number(old["kl"], 4), f"{number(100 * old['changed'], 1)} %", number(apart, 4)]
    return line([name, *cells])


def completes(name: str, row: dict, base: dict) -> str:
    kinds = [row["identifiers"][kind] for kind in ("punto", "vistos", "nuevos")]
    return line([name, *(percent(*kind[:2]) for kind in kinds), *(percent(*kind[2:]) for kind in kinds)])


def method(row: dict) -> str:
    """What a row trains, at which rates: rows that say the same differ by their seed alone."""
    memory, lora, then = row.get("memory"), row.get("lora"), row.get("then")
    parts = [
        memory and f"memoria {memory['dense']:g} × {memory['rows'] / memory['dense']:g}",
        lora and f"LoRA r{lora['rank']} {lora['rate']:g}",
        row.get("everything") and f"todos los pesos {row['everything']:g}",
        row.get("mlp") and f"MLP {row['mlp']:g}",
    ]
    if then:
        return f"{method(dict(memory=memory))}, y después {method(then)}"
    return " + ".join(part for part in parts if part) + (", con Adafactor" if row.get("optimizer") else "")


def summary(rows: list[dict], base: dict) -> str:
    """Of the same row with several seeds: means, ± the standard deviation of a seed."""

    def over_seeds(value, digits):
        values = [value(row) for row in rows]
        apart = f" ± {number(stdev(values), digits)}" if len(values) > 1 else ""
        return number(mean(values), digits) + apart

    def names(row):  # percentage points
        right, count = row["identifiers"]["punto"][:2]
        kind = "identifiers" if row["steps"] < LONG else "identifiers_long"
        before, all_before = base.get(kind, base["identifiers"])["punto"][:2]
        return 100 * (right / count - before / all_before)

    def kept(how):  # of the gain
        if not all(how in row for row in rows):
            return "–"
        return f"{over_seeds(lambda row: 100 * (base['loss'] - row[how]) / (base['loss'] - row['loss']), 0)} %"

    gain = over_seeds(lambda row: base["loss"] - row["loss"], 4)
    kl = [over_seeds(lambda row, text=text: row["old"][text]["kl"], 3) for text in TEXTS]
    losses = number(mean(row["loss"] for row in rows), 4), gain, kept("barajadas"), kept("apagada")
    return line([method(rows[0]), str(len(rows)), *losses, *kl, over_seeds(names, 1)])


def seeds_table(rows: list[dict], base: dict, steps: int) -> str:
    """The plain rows of so many steps, those that differ by their seed alone in one line."""
    alike = {}
    for row in rows:
        plain = "control" not in row and "shape" not in (row.get("memory") or {}) and method(row)
        if plain and row["steps"] == steps and not (row.get("memory") or {}).get("row_state"):
            alike.setdefault(method(row), []).append(row)
    return markdown(HEADS["semillas"], [summary(same, base) for same in alike.values()])


def tables(done: dict[str, dict]) -> str:
    """What each row learned, forgot and completes, domain by domain."""
    text = [
        "Olvido: KL desde el modelo de partida, en nats; tokens más probables que son otros; pérdida, menos la suya. "
        "Barajadas, media: parte de la ganancia que queda con las filas entrenadas repartidas al azar entre los mismos "
        "n-gramas, o todas iguales a su media; apagada: con ellas a cero. Identificadores: con todos sus tokens los "
        "más probables; puntos: cuántos más de cien, tras un punto. ±: desviación típica de una semilla.\n"
    ]
    for domain in dict.fromkeys(row["domain"] for row in done.values() if "domain" in row):
        rows = {name: row for name, row in done.items() if row.get("domain") == domain}
        base = next((row for row in rows.values() if not row["steps"]), None)
        if base:
            text.append(f"### {domain}\n")
            for head, make in zip(HEADS.values(), (learned, forgotten, completes)):
                text.append(markdown(head, [make(name, row, base) for name, row in rows.items()]))
            for steps in sorted({row["steps"] for row in rows.values()} - {0}):
                text.append(f"{steps} pasos:\n\n{seeds_table([*rows.values()], base, steps)}")
    return "\n".join(text)
