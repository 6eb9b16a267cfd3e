"""Talk with Phi-1 and its memory in the terminal, or let it complete code.

    python chat_phi_engram.py                                        # the model that the other scripts left here
    python chat_phi_engram.py --modelo usuario/nombre --codigo       # from the Hub, completing code
    python chat_phi_engram.py --pregunta "What is a list?"           # one answer on the standard output
    python chat_phi_engram.py --pagina                               # a page in the browser
    python chat_phi_engram.py < preguntas.txt                        # one answer for each line
    python chat_phi_engram.py --codigo < principios.txt              # one for each block; a line "---" between two
    python chat_phi_engram.py --servir                               # OpenAI's interface for editors
"""

import os
import re
import select
import shutil
import sys
from contextlib import suppress
from pathlib import Path

try:
    import torch
    from transformers import logging as transformers_logging

    from engram.console import (
        SpanishParser,
        UserError,
        decimal,
        guarded,
        in_command_of_notebook,
        in_notebook,
        run_script,
        short,
        spanish,
        unaccented,
    )
    from engram.conversation import LOOPED, TEMPERATURE, TOY_TEMPERATURE, Chat, interruptible, suited
    from engram.drawing import bars, shaded, side_by_side
    from engram.opening import about_memory, add_memory_options, add_quantising_option, apart, n_values, open_model
    from engram.orders import BLOCK_END, CODE_MODE, ESCAPE, HELP, advice, leaves_block, meant, obey_facts, order
    from engram.page import check_place, show_page
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )
except KeyboardInterrupt:  # importing takes seconds
    sys.exit(130)

FOLDERS = ("phi1-engram-trained", "phi1-engram", "phi1-engram-demo")  # the first that is there
YOU, MODEL, MORE, FIRST = "👤 Tú: ", "🤖 Phi-Engram: ", "... ", "... (una línea vacía lo envía) "
TITLES = {"CON MEMORIA": True, "SIN MEMORIA": False}


# ----------------------------------------------------------------------------------------------------------------------
# In the terminal
# ----------------------------------------------------------------------------------------------------------------------


def unanswered() -> bool:
    """Whether what looks like a terminal never gets what the user types."""
    return in_command_of_notebook() and sys.stdin.isatty()


def in_conversation() -> bool:
    """Whether somebody types and reads, and is to see prompts."""
    return in_notebook() or (sys.stdin.isatty() and sys.stdout.isatty())


def knows_escapes() -> bool:
    return os.environ.get("TERM", "dumb") not in ("", "dumb")


def in_colour() -> bool:
    """Whether escape sequences are understood and colours wished for (https://no-color.org)."""
    return knows_escapes() and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def write(piece: str):
    print(piece, end="", flush=True)


def obey(chat: Chat, word: str, argument: str, say):
    """Carry out an order. Raises UserError where its argument is not one of those that it takes."""
    columns, wish = shutil.get_terminal_size().columns, unaccented(argument).casefold()
    text = f"{word} {argument}".strip()
    if word == "ayuda":
        say(f"{HELP}\n{advice(chat.model)}")
    elif word in ("aprende", "recuerdos", "olvida"):
        obey_facts(chat, word, argument, wish, say)
    elif word == "limpiar":
        chat.forget()
        say("Conversación olvidada.")
    elif word in ("codigo", "charla"):
        chat.code = word == "codigo"
        say(CODE_MODE if chat.code else "Modo charla: pregunta lo que quieras.")
    elif word == "comparar":
        chat.to_compare(argument)  # before it is announced
        say("(Respondiendo dos veces, sin memoria y con ella …)")
        texts = chat.compare(argument)
        titled = [f"{title}\n{text}" for title, text in zip(TITLES, texts)]
        print(side_by_side(*titled, columns if in_conversation() else 0), flush=True)
        if texts[0] == texts[1]:
            say("(Las dos respuestas son iguales.)")
        if chat.looped:
            say(LOOPED)
    elif word == "siguiente":
        found = chat.likeliest(argument)
        longest = max(chance for likely in found.values() for _, chance in likely)
        titled = [f"{title}\n{bars(found[memory], longest)}" for title, memory in TITLES.items()]
        print(side_by_side(*titled, columns if in_conversation() else 0), flush=True)
        if found[True] == found[False]:
            say("(Son iguales: aquí la memoria no cambia nada.)")
    elif word == "temperatura":
        value = float(wish.replace(",", ".")) if re.fullmatch(r"\d+([.,]\d+)?", wish) else -1
        if not 0 <= value <= 100:
            raise UserError(
                f"«{text}»: la temperatura es un número de 0 a 100; ahora, {short(chat.temperature)}. {ESCAPE}"
            )
        chat.temperature = value
        say(f"Temperatura: {wish.replace('.', ',')}")
    elif wish == "ver":
        pieces, gates, facts = chat.gates()
        marked = " R: lo ha dicho un recuerdo." if any(facts) else ""
        say(f"(Bajo cada token, su puerta en décimas, una línea por capa: 0 cerrada, 9 abierta.{marked})")
        print(shaded(pieces, gates, facts, columns, in_colour()), flush=True)
    elif wish in ("si", "no"):
        chat.memory = wish == "si"
        say("Memoria encendida." if chat.memory else "Memoria apagada: responde Phi sin Engram.")
    else:
        now = "encendida" if chat.memory else "apagada"
        raise UserError(f"«{text}»: se admite «memoria sí», «memoria no» o «memoria ver»; ahora está {now}. {ESCAPE}")


def respond(chat: Chat, text: str, say):
    """Print one answer."""
    try:
        said = chat.answer(text, write)
    finally:
        print(flush=True)
    for remark in chat.remarks(said):
        say(remark)


def more_waits() -> bool:
    """Whether the terminal has more lines already: what was pasted has not come to its end."""
    if in_notebook() or os.name == "nt":  # Windows asks that of sockets alone
        return False
    return bool(select.select([sys.stdin], [], [], 0.05)[0])


def read(code: bool, terminal: bool, answered: bool) -> str:
    """One message: a line, or in code mode the lines up to an empty one; in a pipe, up to BLOCK_END. Raises EOFError
    where input ends."""
    text = input(YOU if terminal else "")
    if not code or order(text, answered)[0] or not text.strip() or (terminal and meant(text)):
        return text
    lines = [text]
    with suppress(EOFError):
        while True:
            line = input((MORE if lines[1:] else FIRST) if terminal else "")
            if terminal and leaves_block(line) and not more_waits():
                print("(Lo de antes no se ha enviado: le faltaba la línea vacía.)", flush=True)
                return line
            if (not line.strip() and not more_waits()) if terminal else line.strip() == BLOCK_END:
                break
            lines.append(line)
    return "\n".join(lines).rstrip("\n") if not terminal else "\n".join(lines)


def run_chat(
    model=None, tokenizer=None, code=None, max_tokens=256, temperature=None, seed=None, kept_in=None
):  # fmt: skip
    """Converse until `salir` or the end of the input. In a terminal or a notebook's cell with prompts; piped, answers
    alone on stdout. Without a model, with the one that the other scripts left here; without `code` and `temperature`,
    as suits the model."""
    terminal = in_conversation()

    def say(text):
        print(text, file=sys.stdout if terminal else sys.stderr, flush=True)

    if model is None:
        model, tokenizer = open_for_chat(default_model(), say)
    code, temperature = suited(model, code, temperature)
    chat, answered = Chat(model, tokenizer, code, max_tokens, temperature, seed, kept_in), False
    if chat.teaching.said:
        say(f"Recuerdos: {len(chat.teaching.said)} («recuerdos» los dice).")
    if terminal:
        if not in_notebook():
            with suppress(ImportError):
                import readline  # arrow keys in input

                readline.parse_and_bind("set convert-meta off")  # in the C locale it takes accents for commands
                if knows_escapes():
                    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message
        say(f"{CODE_MODE}\n" * code + "Escribe «ayuda» para ver las órdenes y «salir» para terminar.")
    while True:
        text = None
        try:
            text = read(chat.code, terminal, answered)
            word, argument = order(text, answered)
            if terminal and not word and (wish := meant(text)):
                say(f"¿Querías decir «{wish}»? Escríbelo así. {ESCAPE}")
                continue
            if word == "salir":
                break
            before = chat.question
            try:
                with interruptible():
                    if word:
                        guarded(say, obey, chat, word, argument, say)
                    elif text.strip():
                        if terminal:
                            write(MODEL)
                        guarded(say, respond, chat, text if chat.code else text.strip(), say)
            finally:
                answered = not word and chat.question is not before
        except (EOFError, NotImplementedError):  # the latter where a notebook is run whole, with nobody to type
            if text is not None:  # not of reading
                raise
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            if text is None:
                break
            say("(Respuesta cortada. Sigue preguntando, o escribe «salir».)")
    if terminal:
        say("\n¡Hasta luego!" if text is None else "¡Hasta luego!")


def default_model() -> Path:
    """The model that the other scripts left in this folder, or beside this file."""
    for place in (Path.cwd(), Path(__file__).resolve().parent):
        for name in FOLDERS:
            if (place / name / "config.json").is_file():
                return place / name
    raise UserError(
        f"Aquí no hay ningún modelo ({', '.join(name + '/' for name in FOLDERS)}). Para tener uno:\n"
        "   python load_phi_engram.py             trae Phi-1 del Hub y le pone la memoria -> phi1-engram/\n"
        "   python train_phi_engram.py            entrena esa memoria -> phi1-engram-trained/\n"
        "   python train_phi_engram.py --demo     sin el Hub: un modelo pequeño en minutos -> phi1-engram-demo/\n"
        "   Si ya lo tienes en otro sitio: python chat_phi_engram.py --modelo CARPETA_O_NOMBRE"
    )


def open_for_chat(name, note, storage="auto", memory=None, quantised="no"):
    """Model and tokenizer on the GPU if there is one, telling `note` what they are."""
    gpu = torch.cuda.is_available()
    note(f"Abriendo {name} …")
    # Half precision on a GPU takes half the memory; on a CPU it would only be slow.
    dtype, device = (torch.float16, "cuda") if gpu else (torch.float32, "cpu")
    model, tokenizer = open_model(name, dtype, device, storage, memory, quantised=quantised)
    millions = spanish(n_values(model) / 1e6, 1)
    there = model.device  # of a model that was saved quantised, where it opens
    where = f"la GPU ({torch.cuda.get_device_name(there)})" if there.type == "cuda" else "la CPU"
    precision = str(model.dtype).removeprefix("torch.") if quantised == "no" else quantised
    note(f"{name}: {millions} millones de parámetros, en {where}, {precision}.")
    note(f"{about_memory(model, memory or name)}\n{advice(model)}")
    return model, tokenizer


def check_serving(parser, options):
    """Refuse flags that `--servir` would not heed, or that heed nothing without it."""
    if options.servir is not None and (options.codigo or options.pregunta is not None):
        parser.error("--servir no va con --codigo ni con --pregunta: cada petición dice si conversa o completa.")
    if options.servir is not None and options.pagina is not None:
        parser.error("--servir y --pagina no van juntos: cada uno, en una terminal.")
    if options.clave_de and options.servir is None:
        parser.error("--clave-de solo vale con --servir.")
    if options.clave_de and not os.environ.get(options.clave_de):
        parser.error(
            f"--clave-de {options.clave_de}: esa variable de entorno no existe o está vacía. Ponla antes: "
            f"export {options.clave_de}=…"
        )


def options_of(argv):
    """What the command line says; ends with a sentence where it cannot be done."""
    parser = SpanishParser(
        description="Conversa con Phi-1 y su memoria Engram, o deja que complete código.",
        epilog='Ejemplo: python chat_phi_engram.py --codigo --pregunta "def factorial(n):"\n'
        f"Por tubería: una pregunta por línea; con --codigo, bloques separados por una línea «{BLOCK_END}».",
    )
    parser.add_argument(
        "--modelo", metavar="CARPETA_O_NOMBRE",
        help="carpeta, o usuario/nombre en el Hub (por defecto, la primera que haya de " + ", ".join(FOLDERS) + ")",
    )  # fmt: skip
    parser.add_argument(
        "--codigo", "--código", action="store_true", default=None, help="completar código en vez de conversar"
    )
    parser.add_argument("--pregunta", metavar="TEXTO", help="responde a esto y termina")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="tokens por respuesta (por defecto, %(default)s)"
    )
    parser.add_argument(
        "--temperatura", type=decimal, metavar="X", help="0 elige siempre lo más probable; cuanto mayor, más variado "
        f"(por defecto, {spanish(TEMPERATURE, 1)}, y {spanish(TOY_TEMPERATURE, 1)} para un modelo de juguete)",
    )  # fmt: skip
    parser.add_argument("--semilla", type=int, metavar="N", help="repite las mismas respuestas a las mismas preguntas")
    parser.add_argument(
        "--recuerdos", metavar="CARPETA",
        help="carpeta de lo que se le enseña con «aprende»: se abre al empezar y se guarda cada vez",
    )  # fmt: skip
    parser.add_argument(
        "--pagina", "--página", type=int, nargs="?", const=0, metavar="PUERTO",
        help="una página en el navegador, para esta máquina sola (sin PUERTO, el primero libre desde 7860); necesita "
        "pip install gradio",
    )  # fmt: skip
    parser.add_argument(
        "--compartir", action="store_true",
        help="con --pagina: además un enlace público, con usuario y contraseña, a través de los servidores de gradio",
    )  # fmt: skip
    parser.add_argument(
        "--dejar-aprender", action="store_true", help="con --compartir: los visitantes también pueden enseñarle"
    )
    parser.add_argument(
        "--servir", nargs="?", type=int, const=8765, metavar="PUERTO",
        help="en vez de conversar, responder a editores y otros programas con la interfaz de OpenAI, solo en este "
        "equipo (por defecto, puerto %(const)s)",
    )  # fmt: skip
    parser.add_argument(
        "--clave-de", metavar="VARIABLE",
        help="con --servir: pedir una llave a quien pregunta, la que haya en esta variable de entorno",
    )  # fmt: skip
    add_memory_options(parser)
    add_quantising_option(parser)
    options = parser.parse_args(argv)
    check_serving(parser, options)
    if options.max_tokens < 1:
        parser.error(f"--max-tokens {options.max_tokens}: tiene que ser 1 o más.")
    if options.temperatura is not None and not 0 <= options.temperatura <= 100:
        parser.error(f"--temperatura {short(options.temperatura)}: tiene que estar entre 0 y 100.")
    if options.semilla is not None and not 0 <= options.semilla < 10**18:
        parser.error(f"--semilla {options.semilla}: es un número de 0 en adelante, de 18 cifras como mucho.")
    if options.pagina is not None and not 0 <= options.pagina <= 65535:
        parser.error(f"--pagina {options.pagina}: el puerto tiene que estar entre 1 y 65535.")
    if options.pagina is not None and options.pregunta is not None:
        parser.error("--pagina y --pregunta no pueden ir juntos.")
    if (options.compartir and options.pagina is None) or (options.dejar_aprender and not options.compartir):
        parser.error("--compartir acompaña a --pagina, y --dejar-aprender a --compartir.")
    return options


def main(argv=None) -> int:
    options = options_of(argv)
    aloud = options.pagina is not None or (options.pregunta is None and in_conversation())

    def note(text):  # beside the answers, so that `> respuestas.txt` holds answers alone
        print(text, file=sys.stdout if aloud else sys.stderr, flush=True)

    if "\\n" in (options.pregunta or "") and "\n" not in options.pregunta:
        note(
            "(«\\n» va al modelo tal cual, como dos letras. Para un salto de línea, en bash: "
            "--pregunta $'def f(x):\\n    return')"
        )
    transformers_logging.set_verbosity_error()
    if hasattr(sys.stdin, "reconfigure"):
        marked = sys.stdin.encoding.lower() == "utf-8" and not sys.stdin.isatty()  # Windows begins a file with a mark
        sys.stdin.reconfigure(encoding="utf-8-sig" if marked else None, errors="replace")

    if options.pagina is not None:
        check_place(options.compartir)
    elif options.pregunta is None and options.servir is None and unanswered():
        raise UserError(
            "En un cuaderno, «!python» no recibe lo que escribes y se quedaría esperando para siempre. Haz una "
            'pregunta con la orden: !python chat_phi_engram.py --codigo --pregunta "def factorial(n):"\n'
            "   O conversa en una celda, sin «!»: from chat_phi_engram import run_chat; run_chat()"
        )
    name = str(options.modelo or default_model())
    if options.servir is not None:
        from engram.server import serve  # optional packages, missed before a model is opened

    elsewhere = options.pagina is not None or options.servir is not None  # answers come from other threads
    how = (name, note, options.memoria, options.cambiar_memoria, options.cuantizar)
    model, tokenizer = apart(open_for_chat, *how) if elsewhere else open_for_chat(*how)
    if options.servir is not None:
        key = os.environ[options.clave_de] if options.clave_de else None
        answers = (options.max_tokens, options.temperatura, options.semilla, options.recuerdos)
        serve(model, tokenizer, name, options.servir, note, key, *answers)
        return 0
    code, temperature = suited(model, options.codigo, options.temperatura)
    settings = (code, options.max_tokens, temperature, options.semilla, options.recuerdos)
    longest = model.config.max_position_embeddings // 2
    if options.max_tokens > longest:
        note(f"(--max-tokens se queda en {longest}, la mitad de lo que el modelo puede leer.)")
    if options.pagina is not None:
        teach = options.dejar_aprender or not options.compartir
        show_page(Chat(model, tokenizer, *settings), name, options.pagina or None, options.compartir, teach, note)
        return 0
    if options.pregunta is not None:
        with interruptible():
            return 0 if guarded(note, respond, Chat(model, tokenizer, *settings), options.pregunta, note) else 1
    run_chat(model, tokenizer, *settings)
    return 0


if __name__ == "__main__":
    run_script(main)
