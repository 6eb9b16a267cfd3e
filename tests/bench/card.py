"""Does the product work on this card? One command for whoever has one: a T4 of Colab or Kaggle, or another.

    python tests/bench/card.py                              # every part, one after the other
    python tests/bench/card.py --parte velocidad tabla      # some; the file keeps what the others found before
    python tests/bench/card.py --chico                      # everything in small, without a card too

All that was measured goes to a JSON file, with versions and the card's name. How parts run: parts.py.
"""

import argparse
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import engram.corpus as corpora
import engram.demo as demos
import engram.texts as texts
import verify_phi_engram
from bench import kills, speed
from bench import plan as training
from bench.parts import PATIENCE, Part, conclude, earlier, inside, launcher, run, write
from engram.console import SpanishParser, UserError, gigabytes, peak_memory, run_script, spanish
from engram.counting import account
from engram.machines import MACHINES, T4, allowed_ram, matmul_flops
from engram.trial import check_versions
from phi1_engram import PRECISIONS, PhiEngramConfig, PhiEngramForCausalLM

PAPER = 2.8  # per cent of throughput that a table of 100B parameters in host memory costs (paper, Table 4)
SLOWEST = 1.5  # times plain Phi's or the silent memory's seconds; beyond that something waits that should not
AT_ONCE = 100e9  # bytes: a table larger than that takes too long to fill
COMPILING = 4 * 60  # seconds of compiling after which no further variant is begun
TINY = dict(speed.SMALL, vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=3, eos_token_id=0)


def this_machine(part: Part):
    """Versions, arithmetic, and what the plan supposes of a T4: its speed, and what CUDA takes."""
    facts = part.found["maquina"]
    card = f"{facts['tarjeta']}, capacidad {facts['capacidad']}, {gigabytes(facts['gpu'])}" if part.card else "no hay"
    print(f"   Tarjeta: {card}. RAM: {gigabytes(facts['ram'])}; libre en disco: {gigabytes(facts['disco_libre'])}")
    part.check("las bibliotecas son las que pide requirements.txt", check_versions()[0] == 0)
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    half = (a.half().to(part.device) @ b.half().to(part.device)).float().cpu()
    # Sums of 256 products of unit size, about 16 each; float16 keeps 3 digits of factors and result.
    part.check("un producto de matrices en float16 da lo que en float32", (half - a @ b).abs().max() < 0.2)
    if part.card:
        flops = matmul_flops("cuda", torch.float16, 4096)
        text = f"{spanish(flops / 1e12, 1)} TFLOP/s; de una T4 el plan supone {spanish(T4['flops'] / 1e12)} en un paso"
        part.measure("producto de matrices en float16", flops, text)
        free, total = torch.cuda.mem_get_info()
        taken = total - free - torch.cuda.memory_reserved()
        text = f"{gigabytes(taken)}; el plan supone {gigabytes(T4['base_gpu'])} de CUDA"
        part.measure("ocupado en la tarjeta sin ningún tensor", taken, text)


@torch.no_grad()
def answers(folder, place: str, dtype, device) -> tuple[dict, list[str]]:
    """What a checkpoint opened in one place answers to a padded batch, and what is wrong with that by itself."""
    model = PhiEngramForCausalLM.from_pretrained(folder, engram_storage=place, dtype=dtype).eval().to(device)
    ids = torch.randint(1, model.config.vocab_size, (2, 96), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0

    def logits():
        return model(ids, attention_mask=mask).logits[mask.bool()]

    found = {"logits": logits(), "logits otra vez": logits()}
    greedy = dict(attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
    found["tokens"] = model.generate(ids, **greedy)
    found["tokens de 3 haces"] = model.generate(ids, num_beams=3, **greedy)
    wrong = ["las filas están en otro sitio"] * (model.memory_place != place)
    wrong += ["dos veces no da lo mismo"] * (not torch.equal(found["logits"], found["logits otra vez"]))
    wrong += ["no son números"] * (not found["logits"].isfinite().all())
    model.model.use_memory = False
    wrong += ["la memoria no hace nada"] * torch.equal(found["logits"], logits())
    return found, wrong


def places(part: Part):
    """The same bits wherever the rows are, in every precision of rows and model, as in the first place."""
    part.check("python verify_phi_engram.py", verify_phi_engram.main([]) == 0)
    rows = 500 if part.small else 64_000
    _, ours = speed.pair(TINY, [1, 2]) if part.small else speed.pair(speed.SMALL, [1, 4])
    for precision, stored in PRECISIONS.items():
        speed.write_tables(ours, part.work / precision, rows, stored)
        speed.write_backbone(ours, part.work / precision, rows)
        for dtype in (torch.float32, torch.float16):
            first = None
            for place in part.places:
                found, wrong = answers(part.work / precision, place, dtype, part.device)
                first = first or found
                wrong += [f"otros {name}" for name, value in found.items() if not torch.equal(value, first[name])]
                text = f"filas {precision}, modelo {str(dtype)[6:]}, en {place}"
                text += f": {', '.join(wrong)}" if wrong else ": responde lo mismo"
                part.check(text, not wrong)
        shutil.rmtree(part.work / precision)


def not_slow(part: Part, rows: dict, what: str, names):
    """Every one of `names` within bounds; a tiny model, where nothing but overhead is left, is not judged."""
    for name in names:
        ratio = rows[name]["ratio"]
        if not part.small:
            part.check(f"{what}, {name}: {spanish(ratio, 2)} veces (como mucho {spanish(SLOWEST, 1)})", ratio < SLOWEST)


def speeds(part: Part):
    """Phi-1's shape beside plain Phi with the same weights: seconds, and what the memory takes of the card."""
    shape, layers, rows = (TINY, [1, 2], 1000) if part.small else (speed.PHI_1, [1, 15], speed.ROWS)
    times, tokens, length = (3, 8, 64) if part.small else (9, 64, 512)
    plain, ours = speed.pair(shape, layers, part.device, torch.float16 if part.card else torch.float32)
    speed.write_tables(ours, part.work / "filas", rows, torch.float16)
    size = sum(path.stat().st_size for path in (part.work / "filas").iterdir())
    models = {"Phi de transformers": lambda: plain, "memoria apagada": speed.turned_off(ours)}
    for place in part.places:
        before = part.allocated()
        models[place] = speed.Variant(ours, part.work / "filas", rows, place)
        taken = part.allocated() - before
        part.measure(f"memoria de la tarjeta, tablas en {place}", taken, f"{gigabytes(taken)} de {gigabytes(size)}")
        if part.card:  # the allocator rounds up
            there = size * (place == "gpu")
            part.check(f"con {place}, la tarjeta guarda {gigabytes(there)} de tablas", abs(taken - there) < 4e6)
    ids = torch.randint(plain.config.vocab_size, (1, length), device=part.device)
    with torch.no_grad():
        same = torch.equal(plain(ids).logits, models["memoria apagada"]()(ids).logits)
    part.check("con la memoria apagada, los logits de Phi bit a bit", same)
    part.measure("memoria de la tarjeta, en total", part.allocated(), gigabytes(part.allocated()))
    measured = {
        f"prefill 1×{length}": speed.compare(speed.prefill, models, times, 1, length),
        "decodificar, lote 1": speed.compare(speed.decode, models, times, 1, tokens),
    }
    part.measure("sin compilar", measured)
    speed.table("Sin compilar; entre paréntesis, cuartiles de las veces que tarda Phi", measured)
    not_slow(part, measured["decodificar, lote 1"], "decodificar", [place for place in part.places if place != "disco"])
    spent, ready = {}, {}
    for name in ("Phi de transformers", *part.places[:-1]):  # rows on disk compile as those in RAM
        if sum(spent.values()) < COMPILING:
            start, ready[name] = time.perf_counter(), models[name]
            speed.with_static_cache(models[name](), tokens)
            spent[name] = time.perf_counter() - start
    part.measure("segundos hasta compilar", spent, ", ".join(f"{n} {spanish(t, 1)}" for n, t in spent.items()))
    said = {n: [speed.greedy(m(), ids[:, :64], tokens, cache) for cache in (None, "static")] for n, m in ready.items()}
    same = {name: (a == b)[0, 64:].sum().item() for name, (a, b) in said.items()}  # half precision may part at a tie
    part.measure(f"de {tokens} tokens, iguales con caché estática", same, str(same))
    measured = {"generar, lote 1": speed.compare(speed.with_static_cache, ready, times, tokens)}
    part.measure("caché estática", measured)
    speed.table("generate con caché estática, que en una tarjeta se compila", measured)
    not_slow(part, measured["generar, lote 1"], "generar compilado", [name for name in ready if name in part.places])


def big_table(part: Part):
    """A table of as many gigabytes as RAM allows, at Phi-1's width: what it costs beside the silent memory."""
    shape, layers = (TINY, [1, 2]) if part.small else (speed.PHI_1, [1, 15])
    _, ours = speed.pair(shape, layers, part.device, torch.float16 if part.card else torch.float32)
    free = allowed_ram() - psutil.Process().memory_info().rss
    wanted = 4e7 if part.small else min(AT_ONCE, free - max(2e9, 0.2 * free))
    heads = len(layers) * 2 * speed.MEMORY["n_head_per_ngram"]
    before = part.allocated()
    big = speed.Variant(ours, None, int(wanted / heads / speed.D_HEAD / ours.dtype.itemsize), "ram")
    size = sum(table.size(table.dtype) for table in big.tables.values())
    part.measure("tabla en RAM", size, f"{gigabytes(size)}; quedan {gigabytes(psutil.virtual_memory().available)}")
    part.check("de la tabla no hay nada en la tarjeta", part.allocated() - before < 4e6)
    for layer_id, table in big.tables.items():
        ids = torch.randint(table.n_rows, (1, 512, 16))
        right = table.weight[: speed.BLOCK][ids % speed.BLOCK]  # it repeats
        with torch.no_grad():
            same = torch.equal(table(ids.to(part.device)).cpu(), right)
        part.check(f"se leen las filas que son, de la primera a la última (capa {layer_id})", same)
    times, length = (3, 64) if part.small else (15, 512)
    measured, models = {}, {"memoria apagada": speed.turned_off(ours), "tabla": big}
    for batch in (1, 8):
        measured[f"prefill {batch}×{length}"] = speed.compare(speed.prefill, models, times, batch, length)
        measured[f"decodificar, lote {batch}"] = speed.compare(speed.decode, models, times, batch)
    part.measure("sobrecoste", measured)
    speed.table(f"{gigabytes(size)} en RAM frente a la memoria apagada; en el artículo, 1,028", measured)
    for name, rows in measured.items():
        more = 100 * (rows["tabla"]["ratio"] - 1)
        part.measure(f"{name}, %", more, f"{spanish(more, 1)} % más (en el artículo, {spanish(PAPER, 1)} %)")
        not_slow(part, rows, name, ["tabla"])


def as_a_t4():
    """A T4's memory and its arithmetic, float16 with a loss scale, on a card that has more."""
    total, share = torch.cuda.mem_get_info()[1], T4["gpu"] - T4["base_gpu"]
    if total > 1.05 * T4["gpu"]:
        torch.cuda.set_per_process_memory_fraction(share / total)
        print(f"   La tarjeta tiene más que una T4: se usan {gigabytes(share)}.")
    torch.cuda.get_device_capability = lambda device=None: (7, 5)


def train(part: Part):
    """Steps of each phase as `--plan colab` proposes them, against the plan's gigabytes."""
    fields = dict(training.DEMO, vocab_size=500) if part.small else training.PHI
    config, colab = PhiEngramConfig(**fields), MACHINES["colab"]
    if part.card:
        as_a_t4()
    for phase in (1, 2):
        line, choice = training.proposed(config, phase, *["--longitud", "64", "--acumular", "2"] * part.small)
        print(f"   Fase {phase}: {line}", flush=True)
        gc.collect()
        if part.card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory begins anew
        ran = training.train(fields, choice, phase, 3 if part.small else 6)
        ran |= dict(orden=line, ram=peak_memory(), ritmo=choice.tokens * choice.accumulate / ran["seconds"])
        needs = {place: sum(items.values()) for place, items in account(config, choice, colab, phase).items()}
        ran |= dict(plan_gpu=needs["GPU"] - colab.base_gpu, plan_ram=needs["RAM"])
        if part.card:
            ran |= dict(asignada=torch.cuda.max_memory_allocated(), reservada=torch.cuda.max_memory_reserved())
        part.measure(f"fase {phase}", ran)
        losses = ", ".join(spanish(loss, 3) for loss in ran["losses"])
        print(f"   {spanish(ran['ritmo'])} tokens/s; escala {ran['scale']}; pérdidas {losses}", flush=True)
        part.check(f"fase {phase}: las pérdidas son números", all(map(math.isfinite, ran["losses"])))
        text = f"RAM, {gigabytes(ran['ram'])}; el plan, {gigabytes(ran['plan_ram'])}"
        if part.small:  # a model of kilobytes is within a plan that counts the system's gigabytes, whatever it takes
            print(f"   {text}", flush=True)
        else:
            part.check(f"fase {phase}: {text}", ran["ram"] <= ran["plan_ram"])
        if part.card:
            text = f"tarjeta, {gigabytes(ran['asignada'])} ({gigabytes(ran['reservada'])} reservados)"
            text += f"; el plan, {gigabytes(ran['plan_gpu'])}, y se admite un 5 % más"
            # Work areas of cuBLAS are some tens of megabytes whatever the model.
            part.check(f"fase {phase}: {text}", ran["asignada"] <= 1.05 * ran["plan_gpu"] + 1e8)
            part.check(f"fase {phase}: la escala de la pérdida no se hunde", ran["scale"] >= 1)


def demo(part: Part):
    """The demo's whole way in 40 steps of each."""
    os.environ["XDG_CACHE_HOME"] = str(part.work / "cache")
    recipe, base_steps = replace(demos.DEMO_RECIPE, steps=(10, 30)), 40
    with ExitStack() as small:
        if part.small:
            recipe, base_steps = replace(recipe, batch=2, length=64, steps=(3, 7)), 10
            files = [path for path in texts.text_files(texts.standard_library()) if path.name < "c"][:20]
            for module in (demos, corpora):
                small.enter_context(patch.object(module, "text_files", lambda *_: files))
            small.enter_context(patch.dict(demos.DEMO_SHAPE, vocab_size=600, hidden_size=64))
        said = small.enter_context(redirect_stdout(StringIO()))  # so few steps prove nothing of what it says
        results = demos.demo(part.work / "phi1-engram-demo", recipe=recipe, base_steps=base_steps)
    part.measure("la demostración", dict(filas=results, texto=said.getvalue()))
    part.check("las pérdidas son números", all(math.isfinite(row["loss"]) for row in results))
    before, after = results[0]["loss"], results[-1]["loss"]
    part.check(f"aprende: de {spanish(before, 3)} a {spanish(after, 3)} en texto apartado", after < before)


def resume(part: Part):
    """A training killed in each phase and resumed each time, against one that nobody killed."""
    kills.make_model(part.work)

    def start(name, *more):
        folder = part.work / name
        for piece in ("modelo", "texto") if not folder.exists() else ():
            shutil.copytree(part.work / piece, folder / piece)
        words = [*launcher(), str(ROOT / "train_phi_engram.py"), *kills.OPTIONS, *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
        environment["OMP_NUM_THREADS"] = "1"  # the model is so small that threads only wait for each other
        with open(folder / "registro.txt", "a") as log:
            process = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
        part.at_end.callback(process.kill)
        return process

    def finish(name, process):
        if process.wait(PATIENCE):
            said = (part.work / name / "registro.txt").read_text(errors="replace")
            part.measure(f"registro de {name}", said[-3000:])
            raise UserError(f"el entrenamiento «{name}» acabó mal: {said.strip().rpartition(chr(10))[2]}")
        return part.work / name / kills.OUTPUT

    whole = start("entero")
    blows = (2,) if part.small else (1, 2)
    for phase in blows:
        process, folder = start("matado", *["--reanudar"] * (phase != blows[0])), part.work / "matado"
        while process.poll() is None and not [*folder.glob(f"{kills.OUTPUT}-checkpoints/fase-{phase}-paso-*[1-9]")]:
            time.sleep(0.002)
        process.kill()
        part.check(f"matado a mitad de la fase {phase}", process.wait() == -signal.SIGKILL)
    resumed, whole = finish("matado", start("matado", "--reanudar")), finish("entero", whole)
    part.check("no quedan restos", not kills.leftovers(part.work / "matado"))
    # On a card some sums have no fixed order: two whole trainings tell how far that leads.
    spread = kills.apart(whole, finish("otro entero", start("otro entero"))) if part.card else 0.0
    found = kills.apart(whole, resumed)
    part.measure("diferencia media de los pesos", dict(reanudado=found, entre_dos_enteros=spread))
    text = f"{found:.2g} del entero, y otro entero a {spread:.2g}".replace(".", ",")
    part.check(f"los pesos del reanudado, a {text} (como mucho 4 veces eso)", found <= 4 * spread + 1e-7 * part.card)


PARTS = {  # name: function, what it does
    "maquina": (this_machine, "qué tarjeta, qué versiones"),
    "lugares": (places, "lo mismo en gpu, ram y disco"),
    "velocidad": (speeds, "al lado de Phi sin memoria"),
    "tabla": (big_table, "una tabla tan grande como deje la RAM"),
    "entrenar": (train, "pasos de Phi-1 con la memoria de una T4"),
    "demo": (demo, "la demostración, en 40 pasos"),
    "reanudar": (resume, "un entrenamiento muerto que sigue"),
}


def main(argv=None) -> int:
    parser = SpanishParser(
        description="Comprueba y mide en esta tarjeta que Phi-1 con memoria Engram funciona, y deja los resultados\n"
        "en un archivo. Las partes:\n\n" + "\n".join(f"  {name:10} {what}" for name, (_, what) in PARTS.items()),
        epilog="Ejemplo: python tests/bench/card.py --parte maquina lugares",
    )
    parser.add_argument("--parte", nargs="+", choices=PARTS, metavar="NOMBRE", help="solo estas (por defecto, todas)")
    parser.add_argument("--chico", action="store_true", help="todo en pequeño, también sin tarjeta: minuto y medio")
    parser.add_argument(
        "--salida", default="resultado-tarjeta.json", metavar="ARCHIVO", help="los resultados (%(default)s)"
    )
    parser.add_argument("--dentro", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    args = parser.parse_args(argv)
    if args.dentro:
        return inside(PARTS[args.dentro][0], args.salida, args.chico)
    if not torch.cuda.is_available() and not args.chico:
        raise UserError(
            "Aquí no hay ninguna tarjeta (en Colab: Entorno de ejecución → Cambiar tipo de entorno de ejecución → T4 "
            "GPU). La forma que corre sin ella es la pequeña: python tests/bench/card.py --chico"
        )
    found = earlier(Path(args.salida), args.chico)  # refuses another file even where all begins anew
    found = found if args.parte else {}
    for name, (_, what) in PARTS.items():
        if name in (args.parte or PARTS):
            print(f"\n{name}: {what}", flush=True)
            found[name] = run(__file__, name, args.chico)
            write(args.salida, dict(chico=args.chico, fecha=time.strftime("%Y-%m-%d %H:%M"), partes=found))
    good = conclude({name: found[name] for name in PARTS if name in found}, PARTS, args.chico)
    print(f"Todo lo medido está en {args.salida}.")
    return not good


if __name__ == "__main__":
    run_script(main)
