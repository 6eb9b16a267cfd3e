"""Numbers of `engram/analyses.py` -> pictures."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from engram.analyses import PROBES
from engram.console import UserError, spanish


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("Los dibujos necesitan un paquete más. Instálalo con: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def commas(axis, digits: int):
    axis.set_major_formatter(lambda value, place: spanish(value, digits))


def layer_names(states) -> list[str]:
    return ["entrada", *map(str, range(len(states) - 1))]


def draw_lens(numbers, plt):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for key, label, style in (("modelo", "con memoria", "o-"), ("gemelo", numbers["gemelo"], "s--")):
        found = numbers["logitlens"][key]
        left.plot(found["kl"], style, label=label)
        right.plot([100 * share for share in found["acuerdo"]], style, label=label)
    left.set(title="Distancia a la predicción final", ylabel="KL (nats)", ylim=(0, None))
    right.set(title="El token más probable ya es el final", ylabel="% de los tokens", ylim=(0, 103))
    commas(left.yaxis, 1)
    for axis in (left, right):
        axis.set_xticks(range(len(found["kl"])), layer_names(found["kl"]), rotation=90 * (len(found["kl"]) > 10))
        axis.set_xlabel("tras la capa")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def draw_cka(numbers, plt):
    found = {PROBES[key]: numbers["cka"][key] for key in PROBES if numbers["cka"][key]}
    figure, axes = plt.subplots(1, len(found), figsize=(5.4 * len(found), 5), layout="constrained", squeeze=False)
    for axis, (title, one) in zip(axes[0], found.items()):
        names = layer_names(one["matriz"])
        image = axis.imshow(one["matriz"], vmin=0, vmax=1, origin="lower", cmap="viridis")
        for row, values in enumerate(one["matriz"] if len(names) <= 10 else []):
            for column, value in enumerate(values):
                colour = "black" if value > 0.6 else "white"
                axis.text(column, row + 0.25, spanish(value, 2), ha="center", color=colour, fontsize=8)
        axis.plot(one["alineacion"], range(len(names)), "o-", color="red", label="alineación")
        axis.plot(one["propia"], range(len(names)), "x:", color="white", label=f"{numbers['gemelo']} consigo mismo")
        axis.set_xticks(range(len(names)), names, rotation=90 * (len(names) > 10))
        axis.set_yticks(range(len(names)), names)
        axis.set(title=title, xlabel=f"capa, {numbers['gemelo']}", ylabel="capa, con memoria")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, facecolor="lightgrey")
    commas(figure.colorbar(image, ax=axes[0].tolist(), label="CKA (1: iguales)").ax.yaxis, 1)
    return figure


def draw_gates(numbers, plt, columns: int = 88, lines: int = 24):
    """The text token by token on a grid of characters, one panel per layer, each token shaded by its gate."""
    found = numbers["puertas"]
    span = max(0.05, max(abs(value - 0.5) for values in found["alfa"].values() for value in values))
    shades = plt.matplotlib.cm.ScalarMappable(plt.Normalize(0.5 - span, 0.5 + span), "coolwarm")
    cells, x, y = [], 0, 0  # (column, line, character, token)
    for token, piece in enumerate(found["trozos"]):
        for character in piece.replace("\t", "    "):
            if x == columns:
                x, y = 0, y + 1
            known = character.isprintable() and ord(character) < 0x250  # what every font has
            cells.append((x, y, "↵" if character == "\n" else character if known else "□", token))
            x, y = (0, y + 1) if character == "\n" else (x + 1, y)
    cells = [cell for cell in cells if cell[1] < lines]
    height, size = cells[-1][1] + 1, len(found["alfa"])
    figure, axes = plt.subplots(
        size, 1, figsize=(columns * 0.1 + 1.2, size * (height * 0.19 + 0.5)), layout="constrained", squeeze=False
    )
    for axis, (layer, alpha) in zip(axes[:, 0], found["alfa"].items()):
        for x, y, character, token in cells:
            shade = shades.to_rgba(alpha[token])
            axis.add_patch(plt.Rectangle((x, y), 1, 1, color=shade, linewidth=0))
            style = dict(ha="center", va="center", family="monospace", fontsize=9, parse_math=False)
            dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.5
            axis.text(x + 0.5, y + 0.55, character, color="white" if dark else "black", **style)
        axis.set(xlim=(0, columns), ylim=(height, 0), title=f"Puerta α de la capa {layer}", xticks=[], yticks=[])
    label = "α: rojo, la abre; azul, la cierra; gris, a medias"
    commas(figure.colorbar(shades, ax=axes[:, 0].tolist(), label=label, shrink=0.6).ax.yaxis, 2)
    return figure


def draw_ablation(numbers, plt):
    kinds = {kind: one["cambios"] for kind, one in numbers["ablacion"].items() if one["tokens"] >= 100}
    keys = list(next(iter(kinds.values()), {}))
    figure, axis = plt.subplots(figsize=(10, 4.6), layout="constrained")
    for i, key in enumerate(keys):
        means, errors = zip(*(changes[key] for changes in kinds.values()))
        places = [place + (i + 0.5) * 0.8 / len(keys) - 0.4 for place in range(len(kinds))]
        label = numbers["gemelo"] if key == "gemelo" else key
        axis.bar(places, means, 0.8 / len(keys), yerr=[2 * error for error in errors], label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(kinds)), [kind.replace(" y ", " y\n").replace(" clave", "\nclave") for kind in kinds])
    axis.set(title="Pérdida de más que con la memoria entera (rayas: ±2 errores estándar)", ylabel="nats por token")
    commas(axis.yaxis, 2)
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    return figure


def draw_tables(numbers, plt):
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    titles = {
        "ngramas_que_chocan": "N-gramas del texto que chocan", "sin_entrenar": "Consultas a filas sin entrenar",
        "filas_entrenadas": "Filas entrenadas de la tabla",
    }  # fmt: skip
    for axis, (key, title) in zip(axes, titles.items()):
        for (layer, heads), marker in zip(numbers["tablas"]["capas"].items(), "osv^Dx" * 8):
            axis.plot([100 * head[key] for head in heads], marker, fillstyle="none", label=f"capa {layer}")
        if key == "ngramas_que_chocan":
            axis.plot([100 * head["previsto"] for head in heads], "k:", label="previsto al azar")
        names = [f"{head['orden']}·{head['cabeza']}" for head in heads]
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set(title=title, ylabel="%", ylim=(-3, 103), xlabel="orden · cabeza")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def draw_trade(rows: list[dict], new: str, path):
    """What each model learned of `new` against what it forgot of the rest, in nats per token; rows as
    `choices.verdict` takes them."""
    plt = pyplot()
    base, *controls, memory, shuffled = rows
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    groups = (
        (controls, "s--", "tab:red", "todos los pesos, sin memoria"),
        ([memory], "o", "tab:blue", "la memoria sola"),
        ([shuffled], "x", "tab:gray", "la memoria, con las filas de otros n-gramas"),
    )
    for group, style, colour, label in groups:
        points = sorted((row["old"] - base["old"], base["loss"] - row["loss"]) for row in group)
        axis.plot(*zip(*points), style, color=colour, label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        title="Arriba y a la izquierda es mejor", xlabel="olvida: nats de más en la biblioteca estándar",
        ylabel=f"aprende: nats de menos en {new}", xlim=(0, None),
    )  # fmt: skip
    commas(axis.xaxis, 1)
    commas(axis.yaxis, 1)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
