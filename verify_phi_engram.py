"""Check on this machine what a user cannot see: that the memory neither hurts Phi nor forgets anything.

    python verify_phi_engram.py                            # a small model built on the spot, with or without the Hub
    python verify_phi_engram.py --modelo phi1-engram       # a real checkpoint: a folder, or user/name on the Hub
    python verify_phi_engram.py --profundidad phi1-engram-demo     # what the memory does inside: see engram/analyses.py

Exit status 0 when everything holds, 1 when something does not.
"""

import sys
import time
import warnings

try:
    import torch
    import transformers
    from transformers import PhiConfig

    from engram.checks import note, run_check, verify
    from engram.console import SpanishParser, UserError, counted, out_of_memory, run_script, spanish
    from engram.opening import about_memory, add_memory_options, add_quantising_option, n_values, open_model
    from engram.texts import check_encoding
    from engram.trial import check_versions, phi_1_tokenizer, small_model, tokenizer_on_the_spot
    from phi1_engram import PHI_1
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )
except KeyboardInterrupt:  # importing takes seconds
    sys.exit(130)


def main(argv=None) -> int:
    parser = SpanishParser(
        description="Comprueba en esta máquina que Phi-1 con memoria Engram funciona. Sin opciones construye un modelo "
        "pequeño: no descarga pesos y tarda menos de un minuto.",
        epilog="Ejemplo: python verify_phi_engram.py --modelo phi1-engram-trained",
    )
    parser.add_argument(
        "--modelo", metavar="CARPETA_O_NOMBRE", help="comprueba este modelo: una carpeta, o usuario/nombre en el Hub"
    )
    add_memory_options(parser)
    add_quantising_option(parser)
    depth = parser.add_argument_group("mirar por dentro un modelo entrenado (resultados en profundidad/)")
    depth.add_argument(
        "--profundidad", metavar="CARPETA_O_NOMBRE", help="LogitLens, CKA, puertas, ablación y tablas de este modelo"
    )
    depth.add_argument(
        "--contra", metavar="CARPETA_O_NOMBRE", help="Phi sin memoria con que compararlo (por defecto, la carpeta "
        "MODELO-control si la hay; si no, el mismo modelo con la memoria apagada)",
    )  # fmt: skip
    depth.add_argument(
        "--datos", metavar="RUTA", help="carpeta o archivo de texto; se mide lo que el entrenamiento "
        "aparta (por defecto, de la biblioteca estándar de Python)",
    )  # fmt: skip
    depth.add_argument("--codificacion", metavar="NOMBRE", help="de los textos de --datos que no son UTF-8: latin-1")
    depth.add_argument("--bloques", type=int, default=256, metavar="N", help="como mucho N × 256 tokens (%(default)s)")
    options = parser.parse_args(argv)
    if options.profundidad and options.modelo:
        parser.error("elige una: --modelo (comprobarlo) o --profundidad (mirarlo por dentro).")
    of_depth = options.contra or options.datos or options.codificacion or options.bloques != 256
    if of_depth and not options.profundidad:
        parser.error("--contra, --datos, --codificacion y --bloques acompañan a --profundidad MODELO.")
    check_encoding(options.codificacion)
    if options.bloques < 2:
        parser.error(f"--bloques {options.bloques} no es válido: tiene que ser 2 o más.")
    memory = {"storage": options.memoria, "memory": options.cambiar_memoria}
    if not (options.modelo or options.profundidad) and (options.memoria != "auto" or options.cambiar_memoria):
        parser.error("--memoria y --cambiar-memoria son para un modelo guardado: dilo con --modelo o --profundidad.")
    if options.cuantizar != "no" and not options.modelo:
        parser.error("--cuantizar es para comprobar un modelo guardado: dilo con --modelo.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    if options.profundidad:
        from engram.report import depth as look_inside

        try:
            where = options.profundidad, options.contra, options.datos, options.bloques
            look_inside(*where, encoding=options.codificacion, **memory)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                "No hay suficiente RAM, o memoria de la GPU. Con --contra hay dos modelos abiertos: quítalo, y si "
                "tampoco cabe uno en la GPU, usa la CPU: CUDA_VISIBLE_DEVICES= python verify_phi_engram.py "
                "--profundidad …"
            ) from None
        return 0
    start, threads = time.time(), torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = run_check(1, "Librerías y máquina", check_versions)
    print("2. Modelo")
    try:
        if not options.modelo:
            torch.set_num_threads(1)  # threads would spend longer waiting for each other than on so small a model
        if options.modelo:
            # float32, because only there is "the same" sharp; nothing is written into the folder.
            model, tokenizer = open_model(
                options.modelo, torch.float32, device, **memory, quantised=options.cuantizar
            )
            print(f"   {about_memory(model)}")
            label = options.modelo
        else:
            tokenizer, vocab_size = phi_1_tokenizer(), PhiConfig().vocab_size
            if tokenizer is None:
                tokenizer = tokenizer_on_the_spot()
                vocab_size = len(tokenizer)
                note(
                    f"No se llega al Hub de Hugging Face, que tiene el tokenizer de {PHI_1}. Se sigue sin él, con uno "
                    "entrenado ahora mismo con la biblioteca estándar de Python."
                )
            model = small_model(tokenizer, vocab_size).to(device)
            label = "Pequeño, con pesos al azar"
        millions = spanish(n_values(model) / 1e6, 1)
        precision = str(model.dtype).removeprefix("torch.")
        print(
            f"   {label}: {millions} millones de parámetros, {spanish(model.config.vocab_size)} tokens, memoria en las "
            f"capas {', '.join(map(str, model.config.engram_layer_ids))}; {precision} en {model.device}"
        )
        good = verify(model, tokenizer, first_step=3)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            "No hay RAM, o memoria de la GPU, suficiente para comprobar este modelo en float32. Reinicia la sesión, no "
            "ejecutes otros modelos a la vez, y si falta en la GPU pruébalo en la CPU: CUDA_VISIBLE_DEVICES= python "
            "verify_phi_engram.py --modelo …"
        ) from None
    finally:
        torch.set_num_threads(threads)
    print(f"   {counted(round(time.time() - start), 'segundo')}.")
    return 0 if good and versions[0] == 0 else 1


if __name__ == "__main__":
    run_script(main)
