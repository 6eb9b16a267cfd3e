"""Bring Phi-1 and graft an untrained Engram memory on it.

    python load_phi_engram.py                                     # microsoft/phi-1 from the Hub -> phi1-engram/
    python load_phi_engram.py --modelo mi-carpeta-phi --salida mi-phi-engram
    python load_phi_engram.py --capas 1 --filas 64000 --dtype float16         # a smaller memory
    python load_phi_engram.py --modelo phi1-engram-trained --precision-memoria int8 --salida phi1-engram-int8
    python load_phi_engram.py --modelo phi1-engram-trained --solo-memoria --salida mi-memoria
    python load_phi_engram.py --modelo phi1-engram-trained --aprender hechos.jsonl --salida mi-phi      # no training
"""

import shlex
import shutil
import sys
import time
from pathlib import Path

try:
    from engram.adapters import SMALL
    from engram.cards import public_name, write_graft_card, write_memory_card
    from engram.console import SpanishParser, UserError, gigabytes, peak_memory, run_script, spanish
    from engram.folders import whole_folder
    from engram.graft import check_output, load_phi_1_with_engram, report
    from engram.memories import MEMORY_FILE, save_memory
    from engram.opening import change_memory, find_model, n_bytes, open_model, quiet, read_config
    from engram.teaching import teach_file
    from phi1_engram import PHI_1, PRECISIONS, PhiEngramConfig
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )
except KeyboardInterrupt:  # importing takes seconds
    sys.exit(130)


def main(argv=None):
    parser = SpanishParser(
        description="Trae Phi-1, le injerta una memoria Engram sin entrenar, lo comprueba y lo guarda.",
        epilog="Ejemplo: python load_phi_engram.py --modelo microsoft/phi-1 --capas 1 15 --salida phi1-engram",
    )
    parser.add_argument("--modelo", default=PHI_1, help="carpeta o usuario/nombre de un Phi (por defecto, %(default)s)")
    parser.add_argument("--capas", type=int, nargs="+", metavar="N", help="capas con memoria, contando desde 0 (1 15)")
    parser.add_argument("--filas", type=int, metavar="N", help="filas por cabeza de la memoria (por defecto, 256000)")
    dtypes = ["auto", "float32", "float16", "bfloat16"]
    dtypes_help = f"precisión: {', '.join(dtypes)} (por defecto, auto: la de los pesos)"
    parser.add_argument("--dtype", default="auto", choices=dtypes, metavar="TIPO", help=dtypes_help)
    parser.add_argument(
        "--precision-memoria", choices=list(PRECISIONS), metavar="TIPO",
        help=f"precisión de las filas de la memoria: {', '.join(PRECISIONS)}; int8 ocupa la cuarta parte que float32",
    )  # fmt: skip
    parser.add_argument(
        "--cambiar-memoria", metavar="CARPETA_O_NOMBRE", help="pone esta memoria, entrenada sobre el mismo Phi"
    )
    parser.add_argument(
        "--solo-memoria", action="store_true", help=f"guarda solo las filas entrenadas, en {MEMORY_FILE}, sin Phi"
    )
    parser.add_argument(
        "--aprender", metavar="ARCHIVO",
        help="escribe en la memoria los recuerdos de un .jsonl, .csv o .tsv con «prompt» y «target», sin entrenar",
    )  # fmt: skip
    parser.add_argument("--salida", default="phi1-engram", help="carpeta en que se guarda (por defecto, %(default)s)")
    args = parser.parse_args(argv)
    if args.solo_memoria and args.precision_memoria:
        parser.error("--solo-memoria guarda las filas como están; cambia antes su precisión con --precision-memoria.")
    if args.solo_memoria and args.aprender:
        parser.error("--solo-memoria guarda las filas entrenadas, sin recuerdos: usa --aprender sin ella.")
    started = time.perf_counter()
    check_output(args.salida, args.solo_memoria)
    sizes = {"engram_vocab_size": [args.filas, args.filas]} if args.filas is not None else {}
    with whole_folder(args.salida) as folder:  # first of all: a place that can't be written is known at once
        print(f"📥 Abriendo {args.modelo} …", flush=True)
        flags = "precision_memoria", "cambiar_memoria", "solo_memoria", "aprender"
        changes = [flag for flag in flags if getattr(args, flag)]
        name = find_model(args.modelo)
        if changes and read_config(name)["model_type"] == PhiEngramConfig.model_type:
            if args.capas or args.filas:
                raise UserError(f"«{args.modelo}» ya tiene memoria: --capas y --filas son para un Phi sin ella.")
            # From the disk, a part at a time: the table may be larger than the RAM.
            model, tokenizer = open_model(name, args.dtype, storage="disco")
        else:
            model, tokenizer = load_phi_1_with_engram(args.modelo, args.capas, args.dtype, **sizes)
            print(report(model))
            print("✅ Injerto exacto: con la memoria sin entrenar responde igual que Phi, bit a bit.")
        if args.cambiar_memoria:
            if change_memory(model, args.cambiar_memoria) and args.solo_memoria:
                raise UserError(
                    f"«{args.cambiar_memoria}» ya es una memoria sola, con el adaptador LoRA sin el que no sirve: "
                    "comparte esa carpeta tal cual."
                )
            print(f"✅ Memoria cambiada por la de {args.cambiar_memoria}.")
        bad = teach_file(model, tokenizer, args.aprender, lambda text: print(text, flush=True)) if args.aprender else 0
        title = Path(args.salida).resolve().name
        origin = public_name(name)
        if args.solo_memoria:
            save_memory(model, folder)
            from engram.sharing import phi_was_trained  # it draws: a second that the other uses need not wait

            alone = not phi_was_trained(model)
            write_memory_card(model, folder, title, origin, alone)
            if not alone:
                small = Path(name, SMALL)
                print(
                    f"⚠️  {args.modelo} hizo la fase 2, que cambió su Phi: esta memoria solo sirve con ese Phi, no con "
                    "el original.\n"
                    + (
                        f"   La que sirve con el Phi de antes de esa fase, con su adaptador LoRA, está en {small}/"
                        if small.is_dir()
                        else "   Para compartir solo la memoria, entrénala con --pasos-fase2 0."
                    )
                )
        dtype, tables = PRECISIONS.get(args.precision_memoria), model.model.engram_tables.values()
        if dtype is None and args.dtype != "auto":
            dtype = min(*(table.dtype for table in tables), PRECISIONS[args.dtype], key=lambda kind: kind.itemsize)
        size = n_bytes(model) + sum(table.size(dtype or table.dtype) - table.size(table.dtype) for table in tables)
        free = shutil.disk_usage(folder).free
        if free < size and not args.solo_memoria:
            raise UserError(
                f"No queda espacio: el modelo ocupa {gigabytes(size)} y en {Path(args.salida).resolve().parent} hay "
                f"{gigabytes(free)}. Libera espacio, elige otro disco con --salida o una memoria menor con --filas."
            )
        if not args.solo_memoria:
            print(f"💾 Guardando en {args.salida}/ …", flush=True)
            with quiet():
                model.save_pretrained(folder, engram_precision=dtype and str(dtype).removeprefix("torch."))
                tokenizer.save_pretrained(folder)
                write_graft_card(model, folder, title, origin)
    seconds, peak = time.perf_counter() - started, peak_memory()
    print(f"✅ Guardado en {args.salida}/ en {spanish(seconds, 1)} s.")
    if peak:
        print(f"   RAM máxima: {gigabytes(peak)} ({spanish(peak / size, 2)} × el modelo), con archivos mapeados.")
    if args.solo_memoria:
        print(f"Ahora: python chat_phi_engram.py --modelo MODELO --cambiar-memoria {shlex.quote(args.salida)}")
        return 0
    option = "" if args.salida == "phi1-engram" else f" --modelo {shlex.quote(args.salida)}"
    print(f"Ahora: python train_phi_engram.py{option}    (entrena la memoria)")
    print(f"   o:  python chat_phi_engram.py{option}     (habla con el modelo)")
    return 1 if bad else 0


if __name__ == "__main__":
    run_script(main)
