"""What a trained memory does inside, from a model's name to pictures and a report in Spanish."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import json
import math
import time
from pathlib import Path

import torch
from transformers import PhiForCausalLM

from engram.analyses import BLOCKS, LENGTH, PROBES, SEEN_OFTEN, SIZES, TIE, analyse, foretold_sharing
from engram.console import UserError, gigabytes, peak_memory, spanish
from engram.folders import whole_folder
from engram.opening import (
    explained,
    find_model,
    of_demo,
    open_model,
    open_tokenizer,
    read_config,
    trained_seed,
    where_from,
)
from engram.pictures import draw_ablation, draw_cka, draw_gates, draw_lens, draw_tables, layer_names, pyplot
from engram.probes import held_out_blocks
from engram.texts import package_folder

OUTPUT = "profundidad"


def signed(value: float, digits: int = 3) -> str:
    value = round(value, digits)
    return ("+" if value > 0 else "−" if value < 0 else "") + spanish(abs(value), digits)


def with_error(pair, digits: int = 3) -> str:
    return f"{signed(pair[0], digits)} ± {spanish(pair[1], digits)}"


def side(pair) -> int:
    """-1 or 1 where a mean is below or above zero by more than two standard errors, else 0."""
    mean, error = pair
    return (mean > 2 * error) - (mean < -2 * error)


def listed(names) -> str:
    return ", ".join(map(str, names)) or "ninguna"


def markdown_table(head, rows) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def visible(text: str) -> str:
    """White space made visible, fit for a Markdown code span within a line."""
    return "`" + text.translate(str.maketrans("\n\t `|", "↵⇥·ˋ¦")) + "`"


def report_lens(numbers):
    yield "## 1. LogitLens: ¿sabe antes lo que va a decir?"
    yield (
        "Cada capa se lee como si fuera la última. KL: cuánto dista esa lectura de la predicción final del mismo "
        "modelo (nats; 0 es igual). Acuerdo: en qué % de los tokens el más probable ya es el definitivo."
    )
    found, twin = numbers["logitlens"], numbers["gemelo"]
    gaps, names = found["diferencia"], layer_names(found["diferencia"])
    columns = [[spanish(v, 3) for v in found[key]["kl"]] for key in ("modelo", "gemelo")]
    columns += [map(with_error, gaps)]
    columns += [[spanish(100 * v, 1) for v in found[key]["acuerdo"]] for key in ("modelo", "gemelo")]
    head = ["tras la capa", "KL con memoria", f"KL {twin}", "diferencia ± error", "acuerdo con memoria"]
    yield markdown_table([*head, f"acuerdo {twin}"], zip(names, *columns))
    early = range(1 + (len(names) - 1) // 2)  # the input and the first half of the layers
    lower, higher = ([names[s] for s in early if side(gaps[s]) == sign] for sign in (-1, 1))
    yield (
        f"La memoria entra al empezar las capas {listed(numbers['puertas']['capas'])}; antes de ellas no está, y la KL "
        "solo puede cambiar por el entrenamiento o porque cambia la predicción final."
    )
    if not any(gap for gap, _ in gaps):
        yield "No hay ninguna diferencia en ninguna capa: la memoria no cambia nada."
    elif len(lower) == len(early):
        yield "Se ve lo que dice el artículo: en todas las capas tempranas la lectura está ya más cerca de la final."
    else:
        yield (
            f"**No se ve lo que dice el artículo**, KL más baja en todas las capas tempranas (aquí, hasta la "
            f"{names[early[-1]]}). Más baja en: {listed(lower)}. Más alta en: {listed(higher)}. En las demás de ellas, "
            "si las hay, la diferencia cabe en dos errores."
        )


def report_cka(numbers):
    yield "## 2. CKA: ¿a qué capa del otro se parece cada capa?"
    yield (
        "CKA compara lo que representan dos capas, giros y escalas aparte (1, lo mismo; 0, nada que ver; estimador sin "
        f"sesgo). Alineación: centro de las {numbers['cka']['k']} capas más parecidas del otro, pesadas por su CKA; la "
        "entrada cuenta como −1. Se resta la alineación del otro consigo mismo: queda la profundidad ganada, en capas."
    )
    for key, title in PROBES.items():
        found = numbers["cka"][key]
        if not found:
            yield f"Con {title} no hay puntos suficientes en este texto."
            continue
        names = layer_names(found["matriz"])
        gained = [(a - b, noise) for a, b, noise in zip(found["alineacion"], found["propia"], found["ruido"])]
        own, other = ([signed(place - 1, 2) for place in found[curve]] for curve in ("alineacion", "propia"))
        same = [spanish(row[s], 3) for s, row in enumerate(found["matriz"])]
        yield f"Con {title} (minilotes: {spanish(found['minilotes'])}):"
        head = ["capa", "CKA con la misma capa", "alineación", "del otro consigo mismo", "ganancia ± ruido", "empate"]
        ties = found["empate"]
        cells = (["hasta " + spanish(tie, 2) if tie else "–" for tie in ties],)
        yield markdown_table(head, zip(names, same, own, other, (with_error(pair, 2) for pair in gained), *cells))
        # Under a twentieth of a layer is nothing, however sure; nor is what a tie between two layers may have given.
        clear = [abs(gain) - tie >= 0.05 and found["minilotes"] > 1 for (gain, _), tie in zip(gained, ties)]
        moved = [side(pair) * sure for pair, sure in zip(gained, clear)]
        deeper, shallower = ([name for name, m in zip(names, moved) if m == sign] for sign in (1, -1))
        yield f"Se parecen a capas más profundas del otro: {listed(deeper)}. A menos profundas: {listed(shallower)}."
        undecided = [name for name, pair, m, tie in zip(names, gained, moved, ties) if side(pair) and not m and tie]
        if undecided:
            yield (
                f"Sin decidir: {listed(undecided)}. Ahí dos capas del otro se parecen casi lo mismo (su CKA difiere en "
                f"menos de {spanish(TIE, 2)}), y cuál se cuenta la cambia en lo que dice la columna «empate»."
            )


def report_gates(numbers):
    yield "## 3. Puertas: ¿cuándo escucha a la memoria?"
    yield "α va de 0 (cerrada) a 1 (abierta). Donde no hay nada aprendido vale 0,5, y lo que deja pasar es cero."
    keys = ("media", "desviacion", "minima", "maxima", "abierta", "extrema")
    layers = numbers["puertas"]["capas"]
    rows = [[layer, *(spanish(found[key], 3) for key in keys)] for layer, found in layers.items()]
    head = ["capa", "media", "desviación", "mínima", "máxima", "parte con α > 0,5", "parte con α < 0,25 o > 0,75"]
    yield markdown_table(head, rows)
    for layer, found in layers.items():
        kinds = sorted(found["por_clase"].items(), key=lambda pair: -pair[1])
        yield f"Capa {layer}, α media por clase: " + "; ".join(f"{kind} {spanish(v, 3)}" for kind, v in kinds) + "."
        for key, title in (("abren", "N-gramas que más la abren"), ("nunca_abren", "N-gramas que nunca pasan de 0,5")):
            items = "; ".join(f"{visible(one['ngrama'])} {spanish(one['media'], 3)}" for one in found[key])
            yield f"{title}: {items or 'ninguno'}."
        yield (
            f"De {spanish(found['ngramas'])} n-gramas que salen {SEEN_OFTEN} veces o más, "
            f"{spanish(found['ngramas_que_nunca_abren'])} nunca pasan de 0,5."
        )


def most_needed(changes) -> str:
    """Which n-gram order is missed most, if any is, and the others are further away than two standard errors."""
    orders = sorted(((*pair, key) for key, pair in changes.items() if key.startswith("sin orden")), reverse=True)
    (mean, error, key), *others = orders
    if all(mean <= 2 * error for mean, error, _ in orders):
        return "Ninguno de los órdenes hace claramente falta."
    if all(mean - less > 2 * math.hypot(error, noise) for less, noise, _ in others):
        return f"El que más falta hace: el {key.removeprefix('sin ')}."
    return "Entre los órdenes hay empate: ninguno hace claramente más falta."


def report_ablation(numbers):
    yield "## 4. Ablación: ¿qué se pierde sin ella?"
    yield (
        "Pérdida (nats por token) con la memoria, y cuánto cambia al quitarla entera o por órdenes (2, pares de "
        "tokens; 3, tríos). Clases según el propio Python. ± un error estándar entre bloques."
    )
    found, twin = numbers["ablacion"], numbers["gemelo"]
    total = found["todos"]["cambios"]
    head = ["clase", "tokens", "pérdida", *(twin if key == "gemelo" else key for key in total)]
    yield markdown_table(
        head,
        [
            [kind, spanish(one["tokens"]), spanish(one["perdida"], 3), *map(with_error, one["cambios"].values())]
            for kind, one in found.items()
        ],
    )
    if not any(mean for mean, _ in total.values()):
        yield "Apagar la memoria no cambia nada: está vacía."
        return
    effects = {kind: one["cambios"]["sin memoria"] for kind, one in found.items() if kind != "todos"}
    worse, better = ([kind for kind in effects if side(effects[kind]) == sign] for sign in (1, -1))
    yield (
        f"Al apagarla la pérdida cambia en {with_error(total['sin memoria'])}. Empeora, de más a menos: "
        f"{listed(sorted(worse, key=lambda kind: -effects[kind][0]))}. Mejora: {listed(better)}. {most_needed(total)}"
    )
    if "gemelo" in total:
        yield (
            f"El control pierde {signed(total['gemelo'][0])} respecto al modelo entero. Apagar la memoria de quien "
            "aprendió a contar con ella no es lo mismo que no haberla tenido nunca."
        )


def report_tables(numbers):
    yield "## 5. Tablas: ¿son del tamaño que hace falta?"
    found, rows, sizes = numbers["tablas"], [], {}
    yield (
        "N-gramas distintos en este texto: "
        f"{'; '.join(f'{spanish(count)} de orden {order}' for order, count in found['ngramas'].items())}. Chocar: "
        "compartir la fila de una cabeza con otro n-grama del mismo texto. Medias de las cabezas; las partes, en %."
    )
    shares = ("filas_entrenadas", "ngramas_que_chocan", "previsto", "consultas_que_chocan", "sin_entrenar")
    for layer, heads in found["capas"].items():
        for order in found["ngramas"]:
            own = [head for head in heads if str(head["orden"]) == order]
            mean = {key: sum(head[key] for head in own) / len(own) for key in own[0]}
            sizes[order] = mean["filas"]
            cells = [spanish(mean["filas"]), spanish(mean["filas_leidas"])]
            cells += [spanish(100 * mean[key], 1) for key in shares]
            rows.append([layer, order, *cells, spanish(mean["norma"], 3)])
    head = ["capa", "orden", "filas por cabeza", "leídas aquí", "entrenadas", "n-gramas que chocan", "previsto al azar"]
    yield markdown_table([*head, "consultas que chocan", "consultas sin entrenar", "norma media"], rows)
    train = found["entrenamiento"]
    if train["tokens"]:
        yield (
            "Para elegir `engram_vocab_size` cuenta el texto con que se entrena. En la parte de entrenar de este "
            f"corpus ({spanish(train['tokens'])} tokens{first_of(train)}), % de n-gramas que compartirían fila en una "
            "cabeza, con tablas como estas y mayores (calculado, no medido):"
        )
        rows = [
            [order, spanish(count), *(spanish(100 * foretold_sharing(count, m * sizes[order]), 1) for m in SIZES)]
            for order, count in train["ngramas"].items()
        ]
        yield markdown_table(["orden", "n-gramas distintos", *(f"tablas × {m}" for m in SIZES)], rows)


def first_of(train: dict) -> str:
    """That more of the text is trained on than was counted, and with it more n-grams share rows."""
    return f", los primeros de {spanish(train['de'])}: con todos serían más" if train["de"] > train["tokens"] else ""


def report_short(numbers):
    """What the five sections say, in sentences that need no word of theirs."""
    yield "## En pocas palabras"
    total, points = numbers["ablacion"]["todos"]["cambios"], []
    off, twin = total["sin memoria"], total.get("gemelo")
    points.append(
        {
            1: f"La memoria ayuda: sin ella la pérdida (cuánto se equivoca al adivinar cada token) sube "
            f"{with_error(off)}, desde {spanish(numbers['ablacion']['todos']['perdida'], 3)}.",
            -1: f"La memoria estorba: sin ella la pérdida baja, {with_error(off)}.",
            0: f"En este texto no se nota si la memoria está o no: al apagarla la pérdida cambia {with_error(off)}.",
        }[side(off)]
    )
    if twin is not None:
        verdict = ("empata con el modelo", "pierde con el modelo", "gana al modelo")[side(twin)]
        points.append(f"El control, que nunca tuvo memoria, {verdict}: su pérdida es {with_error(twin)} respecto a él.")
    for layer, found in numbers["puertas"]["capas"].items():
        kinds = sorted(found["por_clase"], key=found["por_clase"].get)
        points.append(
            f"En la capa {layer} la puerta se abre de media {spanish(found['media'], 2)} (de 0 a 1); la que más, ante "
            f"{kinds[-1]}, y la que menos, ante {kinds[0]}."
        )
    heads = [head for heads in numbers["tablas"]["capas"].values() for head in heads]
    untrained, shared = (
        spanish(100 * sum(head[key] for head in heads) / len(heads))
        for key in ("sin_entrenar", "consultas_que_chocan")
    )
    points.append(f"De cada 100 consultas, {untrained} dan con una fila sin entrenar y {shared} con una compartida.")
    yield "\n".join(f"- {point}" for point in points)


def write_report(numbers) -> str:
    parts = [
        f"# Por dentro de {numbers['modelo']}",
        f"Comparado con {numbers['contra']}. Texto: {numbers['texto']}; {spanish(numbers['tokens'])} tokens en "
        f"{spanish(numbers['bloques'])} bloques. Las capas se cuentan desde 0; «entrada» es el token antes de la "
        "primera. Es un modelo y un texto: los errores dicen cuánto cambiaría con otros bloques de texto, no con otro "
        "entrenamiento.",
    ]
    parts += report_short(numbers)
    sections = report_lens, report_cka, report_gates, report_ablation, report_tables
    for (picture, _), section in zip(PICTURES, sections):
        parts += [*section(numbers), f"![{picture.removesuffix('.png')}]({picture})"]
    return "\n\n".join(parts) + "\n"


PICTURES = (
    ("logitlens.png", draw_lens), ("cka.png", draw_cka), ("puertas.png", draw_gates), ("ablacion.png", draw_ablation),
    ("tablas.png", draw_tables),
)  # fmt: skip


def open_twin(name, model, tokenizer):
    """A plain Phi of the same tokenizer, vocabulary and depth as `model`, in eval mode on its device.

    Raises:
        UserError: it is no plain Phi, or no fit.
    """
    name = find_model(name)
    kind = read_config(name)["model_type"]
    if kind != "phi":
        raise UserError(
            f"--contra {name}: hace falta un Phi sin memoria (model_type phi) y este es {kind}. Indica su Phi de "
            "partida, por ejemplo: --contra microsoft/phi-1"
        )
    with explained(name):
        source = where_from(name)
        other = open_tokenizer(name, **source)
        twin, info = PhiForCausalLM.from_pretrained(
            name, dtype="auto", use_safetensors=True, output_loading_info=True, **source
        )
    own, its = ([one.vocab_size, one.num_hidden_layers] for one in (model.config, twin.config))
    if info["missing_keys"] or own != its or other.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--contra {name} no es comparable: tiene {its[0]} tokens y {its[1]} capas, el modelo {own[0]} y {own[1]}, "
            "y el tokenizer y los tensores tienen que ser los mismos. Indica el Phi del que partió el modelo."
        )
    return twin.eval().to(model.device)


def check_place(output):
    """Refuse a place where something stands already: it may be another model's results."""
    path = Path(output)
    if path.exists():
        raise UserError(
            f"Los resultados van a {path}/, que ya existe y no la voy a pisar. Cámbiale el nombre: mv {path} {path}-1"
        )


def depth(
    name, contra=None, source=None, n_blocks: int = BLOCKS, output=OUTPUT, storage="auto", memory=None, encoding=None
) -> dict:
    """Analyse the model `name` and leave pictures, `numeros.json` and `informe.md` in the folder `output`.

    Args:
        name: folder or user/name of a Phi with memory.
        contra: the same of a plain Phi; by default the folder `<name>-control` if there is one, else the same model
            with its memory off. Only another Phi takes memory of its own.
        source: folder or file of text; by default what the demo's memory has learned, for its model, or the Python
            standard library.
        storage, memory: as in `open_model`. encoding: of texts that are not UTF-8.
    Returns:
        the numbers, as in the JSON.
    Raises:
        UserError: a model, the text or the place won't do.
    """
    started, plt, name = time.perf_counter(), pyplot(), find_model(name)
    check_place(output)
    with whole_folder(output) as folder:  # first of all: a place that can't be written is known at once
        model, tokenizer = open_model(
            name, device="cuda" if torch.cuda.is_available() else "cpu", storage=storage, memory=memory
        )
        control = Path(f"{Path(name).expanduser().resolve()}-control")
        if contra is None and (control / "config.json").is_file():
            contra = str(control)
        twin = None if contra is None else open_twin(contra, model, tokenizer)
        against = "él mismo con la memoria apagada" if twin is None else f"{Path(contra).name}, un Phi sin memoria"
        library = of_demo(name).get("library") if source is None else None
        source = package_folder(library) if library else source
        length = min(LENGTH, model.config.max_position_embeddings)
        sample = held_out_blocks(tokenizer, source, n_blocks, length, trained_seed(name), encoding)
        print(f"   Texto: {sample.origin}.\n   Comparado con {against}.", flush=True)
        numbers = dict(
            modelo=Path(name).name, contra=against, gemelo="sin memoria" if twin is None else "control",
            texto=sample.origin, tokens=sample.ids.numel(), bloques=len(sample.ids),
            **analyse(model, twin, tokenizer, sample), segundos=round(time.perf_counter() - started),
        )  # fmt: skip
        for picture, draw in PICTURES:
            figure = draw(numbers, plt)
            figure.savefig(folder / picture, dpi=130)
            plt.close(figure)
        (folder / "informe.md").write_text(write_report(numbers), encoding="utf-8")
        text = json.dumps(numbers, ensure_ascii=False, indent=1, allow_nan=False)
        (folder / "numeros.json").write_text(text, encoding="utf-8")
    peak = f", con {gigabytes(peak_memory())} de RAM como mucho" if peak_memory() else ""
    print(f"✅ Hecho en {spanish(time.perf_counter() - started)} s{peak}.")
    print(f"   Lee {output}/informe.md; las figuras están a su lado, y los números en {output}/numeros.json.")
    return numbers
