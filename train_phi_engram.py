"""Train the memory first and the whole model after, or show on this machine that the memory pays.

    python train_phi_engram.py --demo                    # no Hub, no GPU: base, control and Engram, with a table
    python train_phi_engram.py --datos mi-codigo/        # phi1-engram/ -> phi1-engram-trained/
    python train_phi_engram.py --datos mi-codigo/ --reanudar
    python train_phi_engram.py --datos mi-codigo/ --subir mi-usuario/phi1-engram

Phase 1 freezes Phi and trains only Engram; phase 2 trains everything, Engram at far higher rates than Phi. Table
gradients are row-sparse: a step touches the rows that its batch reads.
"""

import difflib
import importlib.util
import math
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

try:
    import torch
    import transformers

    from engram.adapters import import_peft
    from engram.checkpoints import newest_identity
    from engram.console import SpanishParser, UserError, counted, decimal, out_of_memory, run_script, short, spanish
    from engram.copies import ON_HUB, copies
    from engram.corpus import prepare_corpus
    from engram.folders import hold
    from engram.opening import about_memory, add_memory_options, open_model
    from engram.optimizers import OPTIMIZERS
    from engram.plan import check, from_args, plan
    from engram.processes import leaving_processes, make_accelerator
    from engram.rows import ROW_STATES
    from engram.sharing import TRACKERS, check_tracker, on_hub, result_table
    from engram.steps import PHI_1_RECIPE, phi_1_recipe, steps_of_phases
    from engram.texts import TEXT_SUFFIXES, check_encoding
    from engram.training import train_model
    from phi1_engram import unpack
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )
except KeyboardInterrupt:  # importing takes seconds
    sys.exit(130)


# ---------- Command line ----------

# What a plan repeats of the command line in the command that it proposes; the rest it proposes itself.
REPEATED = (
    "datos", "dataset", "codificacion", "max_tokens", "lora", "tasas", "pasos_fase1", "pasos_fase2", "semilla",
    "salida", "guardar_cada", "guardar_minutos", "copia", "conservar", "registro", "subir", "publico",
    "cambiar_memoria", "reanudar",
)  # fmt: skip


def make_parser() -> SpanishParser:
    parser = SpanishParser(
        description="Entrena la memoria Engram (fase 1) y después todo el modelo (fase 2).",
        epilog="Ejemplo: python train_phi_engram.py --datos mi-codigo/ --salida phi1-engram-trained",
    )
    parser.add_argument("--demo", action="store_true", help="sin Hub ni GPU: unos 10 minutos, con control y tabla")
    parser.add_argument("--modelo", default="phi1-engram", help="carpeta o usuario/nombre (por defecto, %(default)s)")
    kinds = ", ".join(TEXT_SUFFIXES)
    parser.add_argument("--datos", help=f"carpeta o archivo {kinds} (sin él, la biblioteca estándar)")
    parser.add_argument("--codificacion", help="de los archivos que no son UTF-8; latin-1, por ejemplo")
    parser.add_argument("--dataset", help="dataset del Hub, con el paquete opcional datasets")
    parser.add_argument("--max-tokens", type=int, help="dejar de leer el corpus tras tantos tokens")
    parser.add_argument("--salida", default="phi1-engram-trained", help="carpeta final (por defecto, %(default)s)")
    parser.add_argument(
        "--pasos-fase1", type=int, help="pasos de la fase 1 (por defecto, un décimo de pasada; sin fase 2, una entera)"
    )
    parser.add_argument("--pasos-fase2", type=int, help="pasos de la fase 2 (por defecto, una pasada al corpus)")
    parser.add_argument("--longitud", type=int, default=PHI_1_RECIPE.length, help="tokens por bloque (%(default)s)")
    parser.add_argument("--lote", type=int, default=PHI_1_RECIPE.batch, help="bloques a la vez (%(default)s)")
    parser.add_argument("--acumular", type=int, default=PHI_1_RECIPE.accumulate, help="lotes por paso (%(default)s)")
    parser.add_argument("--tasas", type=decimal, default=1, help="multiplica todas las tasas (%(default)s)")
    parser.add_argument(
        "--optimizador", choices=OPTIMIZERS, default="adamw", help="de los pesos densos (por defecto, %(default)s)"
    )
    parser.add_argument(
        "--estado-filas", choices=ROW_STATES, default="adam",
        help="lo que se guarda para entrenar la tabla: dos números por valor, o uno por fila (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--lora", action="store_true",
        help="en la fase 2, en vez de todo Phi aprende un adaptador LoRA, con la memoria: ocupa mucho menos y al final "
        "se funde en Phi (paquete opcional peft)",
    )  # fmt: skip
    parser.add_argument("--recalcular", action="store_true", help="menos RAM o memoria de la GPU, un tercio más lento")
    parser.add_argument(
        "--repartir-filas", action="store_true", help="con varios procesos: cada uno guarda una parte de las tablas"
    )
    parser.add_argument(
        "--repartir-modelo", action="store_true", help="con varios procesos: cada uno guarda una parte de Phi (FSDP2)"
    )
    parser.add_argument(
        "--plan", nargs="?", const="", metavar="MÁQUINA",
        help="solo decir si cabe y con qué orden: en este equipo, o en t4, t4x2, colab o kaggle",
    )  # fmt: skip
    parser.add_argument("--semilla", type=int, default=0, help="del orden y del reparto (%(default)s)")
    parser.add_argument("--guardar-cada", type=int, default=200, help="pasos entre puntos de control (%(default)s)")
    parser.add_argument(
        "--guardar-minutos", type=int, default=10, help="y también cuando pasen tantos minutos (%(default)s)"
    )
    parser.add_argument(
        "--copia", metavar="CARPETA", help="otra carpeta, que sobreviva a esta máquina (Drive), o "
        "hub:tu-usuario/nombre (el Hub, privado): recibe cada punto de control y al final el resultado; con --reanudar "
        "se sigue desde ahí",
    )  # fmt: skip
    parser.add_argument("--conservar", type=int, default=1, help="puntos de control que se guardan (%(default)s)")
    parser.add_argument("--reanudar", action="store_true", help="seguir desde el último punto de control")
    parser.add_argument("--registro", choices=TRACKERS, help="apuntar también la marcha ahí (paquete opcional)")
    parser.add_argument("--subir", metavar="USUARIO/NOMBRE", help="subir el resultado al Hub, privado")
    parser.add_argument("--publico", action="store_true", help="con --subir: repositorio público")
    add_memory_options(parser)
    return parser


def parse(argv):
    """The command line's options, and in `given` those words of it that a plan repeats.

    Raises:
        UserError: values that cannot be, options that do not go together, a package or a folder that is not there.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {name for name in vars(args) if getattr(args, name) != parser.get_default(name)}
    if args.demo and given != {"demo"}:
        raise UserError("--demo va sola, sin más opciones: python train_phi_engram.py --demo")
    args.given = []
    for name in REPEATED:
        value = getattr(args, name)
        if name in given and value != 0:  # a phase that is left out is the plan's own word
            words = f"--{name.replace('_', '-')}"
            args.given.append(words if value is True else f"{words} {shlex.quote(str(value))}")
    least = dict(longitud=2, lote=1, acumular=1, guardar_cada=1, guardar_minutos=1, conservar=1, max_tokens=1)
    for name, low in (least | dict(pasos_fase1=0, pasos_fase2=0, semilla=0)).items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**32:
            raise UserError(f"--{name.replace('_', '-')} {value} no es válido: va de {low} a {spanish(2**32 - 1)}.")
    if args.pasos_fase1 == args.pasos_fase2 == 0:
        raise UserError("Con 0 pasos en las dos fases no hay nada que entrenar.")
    if not 0 < args.tasas < math.inf:
        raise UserError(f"--tasas {short(args.tasas)} no es válido: tiene que ser mayor que 0 (1 las deja como están).")
    if args.memoria == "disco":
        raise UserError("Con --memoria disco las filas solo se leen, y así no aprenden: usa --memoria ram, o auto.")
    args.salida = os.path.normpath(os.path.expanduser(args.salida))  # a last slash would be part of other names
    if Path(args.salida).name in ("", ".."):
        raise UserError(f"--salida {args.salida} no es válido: escribe el nombre de una carpeta nueva.")
    if args.repartir_modelo and args.optimizador != "adamw":
        raise UserError(
            f"--repartir-modelo no va con --optimizador {args.optimizador}, que necesita las matrices enteras: deja "
            "adamw, cuyos estados ya se reparten."
        )
    if args.lora:
        check_lora(args)
    # A plan may be for another machine.
    if args.optimizador == "adamw8bit" and args.plan is None and not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--optimizador adamw8bit necesita un paquete más. Instálalo con: pip install bitsandbytes")
    if args.plan is None:
        check_tracker(args.registro)
    check_encoding(args.codificacion)
    if args.datos and args.dataset:
        raise UserError("Elige uno: --datos (archivos tuyos) o --dataset (del Hub).")
    if args.copia and args.copia.startswith(ON_HUB):
        if args.copia.count("/") != 1:
            raise UserError(f"--copia {args.copia} no es válido: escribe {ON_HUB}tu-usuario/nombre.")
    elif args.copia and args.plan is None:
        args.copia = os.path.expanduser(args.copia)
        if not os.path.isdir(args.copia):
            cure = f"Con ese disco ya montado (en Colab, Drive), créala: mkdir -p {shlex.quote(args.copia)}"
            raise UserError(f"--copia {args.copia}: no existe esa carpeta. {cure}")
        if Path(args.copia).resolve() == Path(args.salida).resolve().parent:
            raise UserError(f"--copia {args.copia}: ahí mismo está --salida. Elige una carpeta de otro disco.")
    if args.publico and not args.subir:
        raise UserError("--publico solo tiene sentido con --subir usuario/nombre.")
    if args.subir and args.subir.count("/") != 1:
        raise UserError(f"--subir {args.subir} no es válido: escribe tu-usuario/nombre.")
    if args.datos and args.plan is None and not Path(args.datos).expanduser().exists():
        near = Path(args.datos).expanduser().absolute()
        close = difflib.get_close_matches(near.name, (p.name for p in near.parent.glob("*")), 1)
        hint = f" ¿Querías decir {Path(args.datos).with_name(close[0])}?" if close else ""
        raise UserError(f"No existe «{args.datos}».{hint} Indica una carpeta o un archivo con --datos.")
    return args


def check_lora(args):
    """Refuse what does not go with --lora."""
    if args.pasos_fase2 == 0:
        raise UserError("--lora es de la fase 2, y --pasos-fase2 0 la quita: deja una de las dos.")
    if args.repartir_modelo:
        raise UserError(
            "--repartir-modelo no va con --lora, que ya ocupa mucho menos: con él cada tarjeta guarda Phi entero. Deja "
            "una de las dos."
        )
    import_peft("--lora")


def less_memory(args, device: str) -> str:
    """What to change of what does not change what is learned, and is not in use yet."""
    if not args.recalcular:
        cure = "--recalcular (un tercio más de tiempo)"
    elif args.lote > 1:
        half = args.lote // 2 if args.lote % 2 == 0 else 1
        cure = f"--lote {half} --acumular {args.acumular * args.lote // half}"
    elif device != "cpu" and args.memoria != "ram":
        cure = "--memoria ram"
    else:
        return "Con esta forma no cabe. Qué cabe en este equipo: python train_phi_engram.py --plan"
    return f"No se ha perdido lo guardado: repite la misma orden con --reanudar {cure}"


def writable_memory(model):
    """Rows of a memory that can be trained: float32, and not on disk."""
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"El Phi de «{model.name_or_path}» está cuantizado y así no se entrena: usa el de antes de cuantizar. (Su "
            "memoria, entrenada con él, se abre después en este: --cambiar-memoria.)"
        )
    if model.memory_place == "disco":
        raise UserError(
            f"{about_memory(model)} Para entrenarla tiene que poder escribirse: usa --memoria ram en una máquina "
            "donde quepa, o crea una memoria menor: python load_phi_engram.py --filas 64000"
        )
    for table in model.model.engram_tables.values():
        if table.dtype != torch.float32:
            table.weight = torch.nn.Parameter(unpack(table.weight.detach()).float())


def main(argv=None):
    args = parse(argv)
    transformers.logging.disable_progress_bar()  # its bars are English
    transformers.logging.set_verbosity_error()
    if args.demo:
        from engram.demo import demo  # it stands on this module

        try:
            demo()
        except KeyboardInterrupt:
            print("\nLa demostración no se reanuda; para empezarla de nuevo: python train_phi_engram.py --demo")
            raise
        return
    if args.plan is not None:
        print(plan(*from_args(args)))
        return
    accelerator = make_accelerator(args.repartir_modelo)
    with leaving_processes():
        train(args, accelerator)


def train(args, accelerator):
    """Refuse what cannot work, open the model, and hold its place while it trains."""
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process speaks
    if accelerator.num_processes == 1:
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ
        if args.repartir_filas:
            raise UserError(
                "--repartir-filas es para varios procesos y este está solo: accelerate launch --multi_gpu "
                "--num_processes 2 train_phi_engram.py --repartir-filas, con las demás opciones detrás."
            )
        if launched and not torch.cuda.is_available():
            print(
                "⚠️  accelerate ha empezado un solo proceso. Sin tarjetas, para que sean dos: accelerate launch "
                "--multi_gpu --num_processes 2 train_phi_engram.py …"
            )
    output = Path(args.salida)
    if any(parent.is_file() for parent in (output, *output.parents)):
        raise UserError(f"--salida {output}: ahí hay un archivo, no una carpeta. Elige otra --salida.")
    if output.exists() and not args.reanudar:
        raise UserError(f"{output}/ ya existe y no la voy a pisar. Elige otra, por ejemplo --salida {output}-2")
    if args.subir and accelerator.is_main_process:
        # Before training, so that a wrong name or key is not found out after it.
        on_hub(
            lambda hub: hub.create_repo(args.subir, private=not args.publico, exist_ok=True), args.subir,
            "Escribe --subir tu-usuario/nombre con tu usuario, y una llave con permiso de escritura.",
        )  # fmt: skip
    choice = from_args(args)
    accelerator.wait_for_everyone()  # all have measured the free memory before one takes any
    check(*choice)
    cure = "Mira qué cabe en este equipo con: python train_phi_engram.py --plan"
    model, tokenizer = open_model(args.modelo, torch.float32, None, args.memoria, args.cambiar_memoria, cure)
    writable_memory(model)
    print(about_memory(model))
    checkpoints = output.with_name(output.name + "-checkpoints")
    if args.copia or not args.reanudar:  # from here on there is something to resume
        checkpoints.mkdir(parents=True, exist_ok=True)
    # The others wait for the main process in whatever it does next, and end with it.
    with hold(checkpoints) if accelerator.is_main_process and checkpoints.is_dir() else nullcontext(True) as alone:
        if not alone:
            raise UserError(f"Ya hay un entrenamiento en marcha con --salida {output}: espera, o elige otra.")
        run(args, accelerator, model, tokenizer, output)


def run(args, accelerator, model, tokenizer, output: Path):
    """Corpus, recipe, both phases and the Hub, as the command line asks."""
    if not args.datos and not args.dataset:
        print("Sin --datos: entreno con la biblioteca estándar de Python.")
    with accelerator.main_process_first():  # the others find it tokenised
        corpus = prepare_corpus(
            tokenizer, args.datos, dataset=args.dataset, length=args.longitud, seed=args.semilla,
            max_tokens=args.max_tokens, fresh=accelerator.is_main_process, encoding=args.codificacion,
        )  # fmt: skip
    print(corpus.describe())
    if corpus.skipped:
        print(corpus.skipped.describe())
    checkpoints = output.with_name(output.name + "-checkpoints")
    if args.copia and args.reanudar and accelerator.is_main_process:
        copies(args.copia, checkpoints).bring(output)  # it says at which rates it began
    accelerator.wait_for_everyone()
    then = newest_identity(checkpoints) if args.reanudar else None
    recipe = replace(
        phi_1_recipe(args.tasas, then, args.lora), length=args.longitud, batch=args.lote, accumulate=args.acumular,
        seed=args.semilla, optimizer=args.optimizador, row_state=args.estado_filas, recompute=args.recalcular,
        processes=accelerator.num_processes, shard_rows=args.repartir_filas, shard_model=args.repartir_modelo,
    )  # fmt: skip
    asked = args.pasos_fase1, args.pasos_fase2
    recipe = replace(recipe, steps=steps_of_phases(*asked, len(corpus.train), recipe.tokens_per_step))
    tokens = spanish(recipe.tokens_per_step)
    together = f", entre {recipe.processes} procesos" if recipe.processes > 1 else ""
    first, second = (counted(steps, "paso") for steps in recipe.steps)
    print(f"Fase 1: {first}; fase 2: {second}; {tokens} tokens por paso{together}.")
    print("Las tasas salen de probar varias en otro modelo ya entrenado; con los pesos de Phi-1 aún no se han probado.")
    print("Con --tasas cambian todas (0,3: un tercio).")
    try:
        outcome = train_model(
            model, tokenizer, corpus, recipe, output, resume=args.reanudar, save_every=args.guardar_cada,
            save_minutes=args.guardar_minutos, keep=args.conservar, copy=args.copia, tracker=args.registro,
            repo=args.subir,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("\nPara seguir donde estaba: repite la misma orden con --reanudar")
        raise
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        cure = less_memory(args, accelerator.device.type)
        raise UserError(f"Se agotó la RAM, o la memoria de la GPU. {cure}") from None
    print(result_table(outcome["results"]))
    print(f"✅ Guardado en {output}/ (pesos, tokenizer, código, tarjeta, registro y curvas).")
    if args.subir and accelerator.is_main_process:
        on_hub(
            lambda hub: hub.upload_folder(  # weights of an earlier upload under other names would be taken for these
                repo_id=args.subir, folder_path=output,
                delete_patterns=["model*.safetensors*", "engram_facts*", "lora/*"],
            ), args.subir,
            f"El modelo está entero en {output}/; súbelo cuando haya conexión con: hf upload {args.subir} {output}",
        )  # fmt: skip
        print(f"✅ Subido a https://huggingface.co/{args.subir}")
    print(f"Ahora: python chat_phi_engram.py --modelo {output}")


if __name__ == "__main__":
    run_script(main)
