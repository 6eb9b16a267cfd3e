"""Where every gigabyte of a training will go, before anything is loaded: GPU, RAM and disk, in each of the two phases.

    python train_phi_engram.py --plan                     # this machine, measured
    python train_phi_engram.py --plan kaggle --lote 4     # a named one: t4, t4x2, colab, kaggle

What autograd keeps is not a formula here: one training step of the model itself runs on torch's "meta" device, where
tensors have shapes and no contents, and every storage is counted from its birth to its end. Weights, optimiser
states, tables and files follow from the shapes. Used by `train_phi_engram.py`; there is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import ctypes
import math
import os
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from engram.adapters import RANK, learns
from engram.console import UserError, short, spanish
from engram.counting import Choice, Machine, account, shapes, traced
from engram.machines import named_machine, this_machine
from engram.opening import MADE_BY, find_model, read_config
from engram.steps import steps_of_phases
from engram.texts import HELD_OUT_SHARE, standard_library, text_files
from phi1_engram import PHI_1, PhiEngramConfig

SHORTEST = 256  # tokens per block below which the search does not go
SPARE = 0.05  # of GPU, RAM and disk, left free by what the search proposes: allocators leave gaps
TOKEN_BYTES = 3.2  # of Python code, as Phi-1's tokenizer cuts it; assumed, not measured
LINK = 6e9  # bytes per second that a card gets from another over PCIe 3.0, as on Kaggle; assumed, not measured


def room(machine: Machine) -> dict[str, float]:
    return {"GPU": machine.gpu, "RAM": machine.ram / (1 if machine.gpu else machine.cards), "disco": machine.disk}


def lacking(config, choice, machine, step=traced, spare=0.0) -> dict[int, list[str]]:
    """{phase: what is too small for it}, of the phases that run; a share `spare` of everything stays free."""
    there, phases = room(machine), [phase for phase in (1, 2) if choice.steps[phase - 1]]
    needs = {phase: account(config, choice, machine, phase, step) for phase in phases}
    return {
        phase: [p for p in need if sum(need[p].values()) > (1 - spare) * there[p]] for phase, need in needs.items()
    }


def fits(config, choice, machine) -> bool:
    def nothing(*_):  # what does not fit even so need not be traced
        return dict(activaciones=0, logits=0, media=0, gradientes=0)

    return not any(any(lacking(config, choice, machine, step, SPARE).values()) for step in (nothing, traced))


def flops_per_token(config, choice, phase: int) -> float:
    """Operations: 2 per weight forward, 2 for gradients of inputs, 2 for those of weights.

    Phase 1 takes gradients of inputs from the first Engram layer up. Repeating forward adds 2 where it is repeated.
    Attention (causal) adds 2·T·d per layer and pass.
    """
    lora = choice.lora if phase == 2 else 0
    dense, _ = shapes(config, lora)
    size = {name: math.prod(shape) for name, shape in dense if len(shape) == 2 and "embed_tokens" not in name}
    total, trained = sum(size.values()), sum(n for name, n in size.items() if learns(name, phase, lora))
    first = min(config.engram_layer_ids) if phase == 1 else 0
    above = total - sum(n for name, n in size.items() if any(f".layers.{i}." in name for i in range(first)))
    passes = 2 * total + 2 * above + 2 * trained + 2 * total * choice.recompute
    return passes + 2 * choice.length * config.hidden_size * config.num_hidden_layers * (3 + choice.recompute)


def bytes_per_token(config, choice, machine, phase: int) -> float:
    """Bytes of dense weights and gradients that a card gets from the others, per token of the whole step.

    A model in parts (FSDP2) brings its weights together in float32 for forward and for backward, and spreads the
    gradients, in every micro-batch. Whole ones meet once a step, as a sum over a ring: twice the gradients.
    """
    lora = choice.lora if phase == 2 else 0
    dense, _ = shapes(config, lora)
    weights = 4 * sum(math.prod(shape) for _, shape in dense)
    gradients = 4 * sum(math.prod(shape) for name, shape in dense if learns(name, phase, lora))
    per_batch = 2 * weights + gradients if choice.shard_model else 2 * gradients / choice.accumulate
    return per_batch * (machine.cards - 1) / machine.cards / (choice.tokens * machine.cards)


def search(config, choice: Choice, machine: Machine) -> Choice | None:
    """The most comfortable choice that fits, from `choice` on: what costs least in time and quality is given up first.

    Order: smaller batches, recomputing, tables in RAM, the model in parts where several processes train it, one number
    of state per row, Adafactor, shorter blocks; and last the tokens per step, which stay the same until then.
    """
    per_step = dict.fromkeys([choice.tokens * choice.accumulate, 0])  # 0: as many as one batch has
    lengths = [choice.length] + [n for n in (1024, 512, SHORTEST) if n < choice.length]
    batches = [choice.batch] + [n for n in (16, 8, 4, 2, 1) if n < choice.batch]
    places = [choice.place] + ["ram"] * (machine.gpu > 0 and choice.place == "auto")
    row_states, optimizers = dict.fromkeys([choice.row_state, "fila"]), dict.fromkeys([choice.optimizer, "adafactor"])
    recompute = dict.fromkeys([choice.recompute, True])
    parts = dict.fromkeys([choice.shard_model, machine.cards > 1 and not choice.lora])
    for total, length, optimizer, row_state, part, place, again, batch in product(
        per_step, lengths, optimizers, row_states, parts, places, recompute, batches
    ):
        if part and optimizer != "adamw":  # torch's others do not take weights in parts
            continue
        accumulate = max(1, round(total / (batch * length)))
        tried = replace(
            choice, length=length, optimizer=optimizer, row_state=row_state, place=place, recompute=again, batch=batch,
            accumulate=accumulate, shard_model=part,
        )  # fmt: skip
        if fits(config, tried, machine):
            return tried
    return None


def with_rows(config, rows: int):
    """The same model with tables of `rows` rows per head."""
    return PhiEngramConfig(**{**config.to_dict(), "engram_vocab_size": [rows] * (config.max_ngram_size - 1)})


def most_rows(config, choice, machine) -> int | None:
    """Rows per head, in thousands, with which the most economical choice fits; None when it does not with 1,000."""
    least = replace(
        choice, batch=1, length=min(choice.length, SHORTEST), recompute=True, optimizer="adafactor", row_state="fila",
        place="ram",
    )  # fmt: skip
    few, many, there, found = 1000, max(config.engram_vocab_size), room(machine), math.inf
    for phase in (phase for phase in (1, 2) if choice.steps[phase - 1]):
        low, high = (account(with_rows(config, rows), least, machine, phase) for rows in (few, many))
        for place in low:
            a, b = sum(low[place].values()), sum(high[place].values())
            free = (1 - SPARE) * there[place]
            if a > free:
                return None
            if b > a:  # bytes grow in a straight line with the rows
                found = min(found, few + (free - a) / (b - a) * (many - few))
    return int(found // 1000 * 1000)


# ---------- What is printed ----------


def command(choice: Choice, machine: Machine, given=()) -> str:
    """The command line of a choice; `given`: further words of it."""
    # Without a card accelerate starts several processes only when it is asked like this.
    cards = "" if machine.gpu else "--multi_gpu "
    launch = "python" if machine.cards == 1 else f"accelerate launch {cards}--num_processes {machine.cards}"
    words = [*given, f"--lote {choice.batch} --longitud {choice.length} --acumular {choice.accumulate}"]
    words += ["--recalcular"] * choice.recompute
    words += [f"--optimizador {choice.optimizer}"] * (choice.optimizer != "adamw")
    words += [f"--estado-filas {choice.row_state}"] * (choice.row_state != "adam")
    words += [f"--memoria {choice.place}"] * (choice.place != "auto")
    words += ["--repartir-filas"] * choice.shard + ["--repartir-modelo"] * choice.shard_model
    words += [f"--pasos-fase{phase} 0" for phase in (1, 2) if not choice.steps[phase - 1]]
    return " ".join([launch, "train_phi_engram.py", *words])


def giga(size: float) -> str:
    return "sin dato" if size == math.inf else f"{spanish(size / 1e9, 2)} GB"


def table(config, choice, machine) -> str:
    """Every item of every place, one column per phase, within 80 columns."""
    phases = [phase for phase in (1, 2) if choice.steps[phase - 1]]
    needs, there = {phase: account(config, choice, machine, phase) for phase in phases}, room(machine)
    lines = []
    for place in needs[phases[0]]:
        each = " (cada tarjeta)" if place == "GPU" and machine.cards > 1 else ""
        lines.append(f"{place + each:34}" + "".join(f"{f'fase {phase}':>14}" for phase in phases))
        for item in dict.fromkeys(name for need in needs.values() for name in need[place]):
            sizes = [need[place].get(item, 0) for need in needs.values()]
            if max(sizes) > 5e5:
                lines.append(f"  {item:32}" + "".join(f"{giga(size):>14}" for size in sizes))
        totals = [sum(need[place].values()) for need in needs.values()]
        lines.append(f"  {'TOTAL':32}" + "".join(f"{giga(size):>14}" for size in totals))
        known = there[place] != math.inf
        marks = [("✅" if size <= there[place] else "❌") if known else "? " for size in totals]
        lines.append(f"  {'hay ' + giga(there[place]):32}" + "".join(f"{mark:>13}" for mark in marks))
    return "\n".join(lines)


def advice(config, choice, machine, given=()) -> tuple[str, Choice | None]:
    """What to run instead of a choice that does not fit, and the choice that it is."""
    if choice.resume is not None:
        return "Un entrenamiento a medias no cambia de receta: libera sitio y repite la misma orden.", None
    found = search(config, choice, machine)
    if not found and choice.keep > 1:
        choice, given = replace(choice, keep=1), [word for word in given if not word.startswith("--conservar")]
        found = search(config, choice, machine)
    if found:
        return f"Sí cabe: {command(found, machine, given)}", found
    reduced = replace(choice, steps=(True, False), asked=(choice.asked[0], 0), lora=0)
    given = [word for word in given if word != "--lora"]
    if all(choice.steps) and (found := search(config, reduced, machine)):
        return f"Cabe la fase 1 sola: {command(found, machine, given)}", found
    rows = most_rows(config, choice, machine)
    if rows and rows < max(config.engram_vocab_size):
        return (
            f"La tabla es demasiado grande: caben hasta {spanish(rows)} filas por cabeza (hay "
            f"{spanish(max(config.engram_vocab_size))}). Crea una menor: python load_phi_engram.py --filas {rows} "
            "--salida phi1-engram-menor (y --modelo, si tu Phi de partida no es Phi-1)"
        ), None
    other = "Prueba con otra máquina: python train_phi_engram.py --plan kaggle"
    return f"Ni con la tabla más pequeña cabe aquí. {other}", None


def check_length(config, choice: Choice) -> None:
    if choice.length > config.max_position_embeddings:
        raise UserError(f"--longitud {choice.length}: el modelo llega a {config.max_position_embeddings} tokens.")


def open_config(name) -> tuple[PhiEngramConfig, bool]:
    """The shape that a name stands for, and whether it is Phi-1's own because there is no such folder yet."""
    if name == PHI_1 or (name in MADE_BY and not os.path.isdir(name)):
        return PhiEngramConfig(), True
    fields = {key: value for key, value in read_config(find_model(name)).items() if key != "model_type"}
    try:
        return PhiEngramConfig(**fields), False
    except ValueError as error:
        raise UserError(f"El config.json de «{name}» no sirve: {error}") from error


def corpus_tokens(source: str | None) -> float | None:
    """Tokens to train on in a folder or file, or in the standard library, guessed from sizes; None: nothing there."""
    path = standard_library() if source is None else Path(source).expanduser()
    if not path.exists():
        return None
    size = sum(file.stat().st_size for file in text_files(path) if file.is_file())
    return size / TOKEN_BYTES * (1 - 1 / HELD_OUT_SHARE)


def duration(hours: dict[int, float], choice, machine) -> str:
    """How long this very training would take. `hours`: of each phase that runs, per million tokens."""
    per_step = choice.tokens * choice.accumulate * machine.cards
    if choice.corpus is None and any(choice.asked[phase - 1] is None for phase in hours):
        return "Cuánto tarda depende de cuánto texto haya; abajo, por millón de tokens."
    steps = steps_of_phases(*choice.asked, int(choice.corpus or 0), per_step)
    tokens = {phase: steps[phase - 1] * per_step for phase in hours}
    parts = {phase: tokens[phase] * hours[phase] / 1e6 for phase in hours}

    def said(time):
        if time < 1:
            return f"{round(60 * time)} min" if round(60 * time) else "menos de 1 min"
        return f"{spanish(time, 1)} h"

    total = said(sum(parts.values()))
    about = "" if total.startswith("menos") else "alrededor de "
    each = "; ".join(f"fase {phase}, {said(parts[phase])}" for phase in parts) if about and len(parts) > 1 else ""
    guess = "" if None not in choice.asked else f", si el texto tiene {spanish(TOKEN_BYTES, 1)} bytes por token"
    return (
        f"Este entrenamiento: {about}{total}{f' ({each})' if each else ''}.\n"
        f"  Son {spanish(sum(tokens.values()) / 1e6, 2)} millones de tokens{guess}."
    )


def plan(name, choice: Choice, machine: Machine, given=()) -> str:
    """All that `--plan` prints."""
    config, assumed = open_config(name)
    check_length(config, choice)
    dense, tables = shapes(config)
    numbers = [sum(math.prod(shape) for n, shape in dense if ("engram" in n) == memory) for memory in (False, True)]
    rows = sum(n for n, _ in tables.values())
    precision = {None: "float32", torch.float16: "float16, con escala", torch.bfloat16: "bfloat16"}[machine.half]
    where = {"auto": "gpu" if machine.gpu else "ram"}.get(choice.place, choice.place)
    missing = lacking(config, choice, machine)
    unknown = " ni ".join(place for place, size in room(machine).items() if size == math.inf)
    lines = [f"Plan para {name} en {machine.name}" + (" (forma de Phi-1, memoria por defecto)" if assumed else "")]
    for phase, places in missing.items():
        but = f", si basta el {unknown}, del que no hay dato" if unknown else ""
        verdict = f"❌ Fase {phase}: no cabe en {' ni en '.join(places)}" if places else f"✅ Fase {phase}: cabe{but}"
        lines.append(f"{verdict}.")
    chosen, first = choice, None
    if name == PHI_1 or (not assumed and read_config(find_model(name))["model_type"] != PhiEngramConfig.model_type):
        named = "phi1-engram" if name == PHI_1 else f"{Path(name).resolve().name}-engram"
        graft = shlex.quote(os.path.join(machine.scratch, named))
        load = f"python load_phi_engram.py --modelo {shlex.quote(name)} --salida {graft}"
        first = f"Antes hay que ponerle la memoria: {load}"
        given = [f"--modelo {graft}", *(word for word in given if not word.startswith("--modelo "))]
    if any(missing.values()):
        words, found = advice(config, choice, machine, given)
        lines.append(words)
        chosen = found or choice
    else:
        lines.append(f"Para entrenar: {command(choice, machine, given)}")
    hours = {}  # per million tokens
    for phase in (phase for phase in missing if chosen.steps[phase - 1]):
        moving = (machine.gpu > 0) * bytes_per_token(config, chosen, machine, phase) * 1e6 / LINK / 3600
        hours[phase] = flops_per_token(config, chosen, phase) * 1e6 / (machine.flops * machine.cards) / 3600, moving
    lighter = bool(missing.get(2)) and not choice.lora
    lines += [
        duration({phase: sum(pair) for phase, pair in hours.items()}, chosen, machine),
        *["Con --lora (un adaptador en vez de Phi entero) pide menos: añádelo a esta orden y mira."] * lighter,
        "",
        f"  {spanish(numbers[0] / 1e6)} millones de parámetros de Phi, {spanish(numbers[1] / 1e6, 1)} de Engram; "
        f"{spanish(rows / 1e6, 2)} millones",
        f"  de filas de {next(iter(tables.values()))[1]} valores. Se calcula en {precision}.",
        f"  Lote {choice.batch} × {choice.length} tokens, {choice.accumulate} por paso; tablas en {where}",
        f"  {choice.optimizer}; estado de filas: {choice.row_state}" + ("; recalculando" if choice.recompute else "")
        + (f"; LoRA de rango {choice.lora} en la fase 2" if choice.lora else ""),
        "",
        table(config, choice, machine),
        "",
    ]
    for phase, (computing, moving) in hours.items():
        also = f", {spanish(moving, 2)} de ellas en lo que se mandan las tarjetas" if moving > 0.005 else ""
        lines.append(f"Fase {phase}: {short(float(f'{computing + moving:.2g}'))} horas por millón de tokens{also}.")
    speed = f"{short(float(f'{machine.flops / 1e12:.2g}'))} TFLOP/s"  # a busy CPU has thousandths of one
    if machine.measured:
        lines.append(f"Horas con {speed}: lo que da de sí un producto de matrices medido ahora.")
    else:
        lines += [
            f"Horas con {speed} por tarjeta: supuesto, no medido.",
            f"También supuesto: {giga(machine.base_gpu)} de CUDA y {giga(machine.base_ram)} del sistema en RAM.",
        ]
        if machine.cards > 1:
            lines.append(f"Y {giga(LINK)} por segundo entre tarjetas, sin NVLink.")
    if machine.cards > 1 and machine.gpu:
        what = "una parte del modelo" if chosen.shard_model else "el modelo entero"
        lines.append(f"Cada tarjeta guarda {what} y lee sus propios bloques.")
    if first:
        lines.append(first)
    if machine.scratch:
        lines.append(f"Modelo de partida en {machine.scratch}: los {giga(machine.disk)} son para lo que se guarda.")
    return "\n".join(lines)


def steady_allocator() -> None:
    """Give freed blocks of 64 kB and more back to the system at once, where the C library is glibc.

    By itself it keeps freed blocks of up to 32 MB, in pieces: up to half as much again as tensors take on a CPU.
    """
    try:
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD; the first argument is fixed in malloc.h
    except (OSError, AttributeError, TypeError):
        pass  # another system or library


def check(name, choice: Choice, machine: Machine, given=()) -> None:
    """Stop a training that cannot fit before anything of it is opened or downloaded, but for its config.json.

    Raises:
        UserError: what is too small, by how much, and the command that fits.
    """
    if read_config(find_model(name))["model_type"] != PhiEngramConfig.model_type:
        return  # opening it says what it is
    config, there = open_config(name)[0], room(machine)
    check_length(config, choice)
    for phase in (phase for phase in (1, 2) if choice.steps[phase - 1]):
        for place, items in account(config, choice, machine, phase).items():
            need = sum(items.values())
            if need > there[place]:
                raise UserError(
                    f"La fase {phase} necesita {giga(need)} de {place} y hay {giga(there[place])}. No he abierto nada. "
                    f"{advice(config, choice, machine, given)[0]}   (El detalle: python train_phi_engram.py --plan)"
                )
            if place == "RAM" and not machine.gpu and 2 * need > there[place]:
                steady_allocator()  # it costs time, so only where the gaps might be missed


def from_args(args) -> tuple[str, Choice, Machine, list[str]]:
    """What train_phi_engram.py's command line asks for: the arguments of `plan` and `check`."""
    machine = named_machine(args.plan) if args.plan else this_machine(args.salida)
    model = args.modelo
    if machine.scratch and model == "phi1-engram":
        model = f"{machine.scratch}/{model}"
    given = [*([] if model == "phi1-engram" else [f"--modelo {shlex.quote(model)}"]), *args.given]
    if args.repartir_modelo and machine.cards == 1:
        raise UserError(
            f"--repartir-modelo es para varios procesos y en {machine.name} hay uno: quítalo, o mira --plan t4x2."
        )
    begun = Path(f"{args.salida}-checkpoints").rglob("*")
    there = sum(file.stat().st_size for file in begun if file.is_file()) if args.reanudar else None
    choice = Choice(
        args.lote, args.longitud, args.acumular, args.optimizador, args.estado_filas, args.recalcular, args.memoria,
        (args.pasos_fase1 != 0, args.pasos_fase2 != 0), args.conservar, there, args.repartir_filas,
        args.repartir_modelo, lora=RANK if args.lora else 0,
    )  # fmt: skip
    if args.plan is not None:
        tokens = None if args.dataset else corpus_tokens(args.datos)
        tokens = min((n for n in (tokens, args.max_tokens) if n is not None), default=None)
        choice = replace(choice, asked=(args.pasos_fase1, args.pasos_fase2), corpus=tokens)
    return args.modelo, choice, machine, given
