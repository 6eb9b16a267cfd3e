"""The rows of pretrained_study.py as Markdown tables: python tests/study/pretrained_study.py --tabla."""

from engram.console import spanish
from study.tables import markdown

TEXTS = ("biblioteca", "prosa", "propio")
HEADS = {
    "aprende": "| fila | pasos | sem. | densos | filas tocadas | pérdida | ganancia | barajadas | media | entreno |",
    "olvida": "| fila | " + " | ".join(f"{text}: KL | cambian | pérdida" for text in TEXTS) + " |",
    "completa": "| fila | tras un punto | vistos | nuevos | lo mismo, sin los que ya están en el bloque | | |",
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


def tables(done: dict[str, dict]) -> str:
    """What each row learned, forgot and completes, domain by domain."""
    text = [
        "Olvido: KL desde el modelo de partida, en nats; tokens más probables que son otros; pérdida, menos la suya. "
        "Barajadas, media: parte de la ganancia que queda con las filas entrenadas repartidas al azar entre los mismos "
        "n-gramas, o todas iguales a su media. Identificadores: con todos sus tokens los más probables.\n"
    ]
    for domain in dict.fromkeys(row["domain"] for row in done.values() if "domain" in row):
        rows = {name: row for name, row in done.items() if row.get("domain") == domain}
        base = next((row for row in rows.values() if not row["steps"]), None)
        if base:
            text.append(f"### {domain}\n")
            for head, make in zip(HEADS.values(), (learned, forgotten, completes)):
                text.append(markdown(head, [make(name, row, base) for name, row in rows.items()]))
    return "\n".join(text)
