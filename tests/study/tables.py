"""The study's rows as the Markdown tables of tests/study/RESULTADOS.md: python tests/study/small.py --tabla."""

from statistics import mean, stdev

from engram.console import spanish
from study.small import LONG, METHODS, SEEDS, SHORT, study_rows


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and, from two values on, their standard deviation."""
    text = spanish(mean(values), digits) + (f" ± {spanish(stdev(values), digits)}" if len(values) > 1 else "")
    return text.replace("-", "−")


def markdown(head: str, lines: list[str]) -> str:
    return "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *lines, ""])


def best(rows: list[dict]) -> dict:
    """The row with the lowest loss."""
    return min(rows, key=lambda row: row["loss"])


def of_seeds(done, name: str) -> list[dict]:
    """One row per seed. That of seed 0 is the best of its rates, which the other seeds take."""
    rates = [row for key, row in done.items() if key.startswith(f"{name}-largo-")]
    rows = [done[f"{name}-s{seed}"] for seed in SEEDS if f"{name}-s{seed}" in done]
    return [*([best(rates)] if rates else []), *rows]


def main_table(done) -> str:
    """Engram against the control; differences are taken within a seed."""
    lines, control = [], {row["seed"]: row["loss"] for row in of_seeds(done, "control")}

    def line(label, rows, losses):
        gain = [loss - control[row["seed"]] for row, loss in zip(rows, losses) if row["seed"] in control]
        lines.append(
            f"| {label} | {len(rows)} | {spread(losses)} | {spread(gain) if any(gain) else '–'} | "
            f"{spanish(mean(row['tokens'] for row in rows) / 1e6, 2)} |"
        )

    for label, name in (
        ("Phi de partida", ""), ("control, mismos tokens", "control"), ("control, mismo reloj", "reloj"),
        ("Engram", "engram"),
    ):  # fmt: skip
        rows = of_seeds(done, name) if name else [dict(done["base"], seed=None)]
        if name == "engram" and rows:
            first = [dict(row, tokens=row["tokens"] * row["steps"][0] / sum(row["steps"])) for row in rows]
            line("Engram tras la fase 1 (solo la memoria)", first, [row["after_phases"][0] for row in rows])
            line("**Engram tras la fase 2 (todo)**", rows, [row["loss"] for row in rows])
        elif rows:
            line(label, rows, [row["loss"] for row in rows])
    return markdown("| modelo | semillas | pérdida | frente al control | millones de tokens |", lines)


def rates_table(done) -> str:
    """Of Phi, with and without memory, seed 0."""
    kinds = ("control-corto", "control-largo", "engram-largo")
    tried = {row["rate"] for key, row in done.items() if key.startswith(kinds)}
    lines = []
    for rate in sorted(tried):
        cells = [spanish(done[f"{kind}-{rate:g}"]["loss"], 3) if f"{kind}-{rate:g}" in done else "–" for kind in kinds]
        lines.append(f"| {f'{rate:g}'.replace('.', ',')} | {' | '.join(cells)} |")
    head = f"| tasa de Phi | control, {sum(SHORT)} pasos | control, {sum(LONG)} pasos | Engram, {sum(LONG)} pasos |"
    return markdown(head, lines)


def domain_table(done, domain: str) -> str:
    """The best rate of each method on seed 0, and the same rate on the others."""
    base = done[f"{domain}-base"]
    lines = [f"| nada | – | – | 1 | {spanish(base['loss'], 3)} | – |"]
    for method in METHODS:
        tried = [r for r in done.values() if r.get("method") == method and r.get("domain") == domain]
        if tried:
            first = best([row for row in tried if row["seed"] == 0])
            rows = [first, *(row for row in tried if row["seed"] and row["rate"] == first["rate"])]
            rate = f"{first['rate']:g}".replace(".", ",")
            losses, old = [row["loss"] for row in rows], [row["old"] - base["old"] for row in rows]
            lines.append(
                f"| {method} | {spanish(first['trained'])} | {rate} | {len(rows)} | "
                f"{spread(losses)} | {spread(old)} |"
            )
    return markdown("| qué aprende | parámetros en uso | tasa | semillas | pérdida nueva | olvido |", lines)


def ablation_table(done) -> str:
    """200 steps, seed 0 and those others that are there; each against the recipe's own row of the same seed."""
    lines = []

    def of_row(name):  # {seed: loss}
        keys = {seed: f"{name}-s{seed}" if seed else name for seed in SEEDS}
        return {seed: done[key]["loss"] for seed, key in keys.items() if key in done}

    reference = of_row("engram-corto")
    for name, settings in study_rows().items():
        short = settings["kind"] == "engram" and sum(settings["steps"]) == sum(SHORT)
        if short and name in done and settings["seed"] == 0:
            row, losses = done[name], of_row(name)
            apart = [loss - reference[seed] for seed, loss in losses.items() if seed in reference]
            after = spanish(row["after_phases"][0], 3) if settings["steps"][0] and settings["steps"][1] else "–"
            lines.append(
                f"| {name} | {after} | {len(losses)} | {spread(list(losses.values()))} | "
                f"{spread(apart) if any(apart) else '–'} | {spanish(row['slots'])} |"
            )
    return markdown("| fila | tras la fase 1 | semillas | pérdida | diferencia | filas de tabla |", lines)


def tables(done) -> str:
    text = [main_table(done), rates_table(done)]
    text += [domain_table(done, row["domain"]) for row in done.values() if row.get("method") == "nada"]
    if "engram-corto" in done:
        text.append(ablation_table(done))
    return "\n".join(text)
