"""Talk with Phi-1 and its memory in the terminal, or let it complete code.

    python chat_phi_engram.py                                        # the model that the other scripts left here
    python chat_phi_engram.py --modelo usuario/nombre --codigo       # from the Hub, completing code
    python chat_phi_engram.py --pregunta "What is a list?"           # one answer on the standard output
    python chat_phi_engram.py < preguntas.txt                        # one answer for each line
"""

import os
import re
import shutil
import sys
import textwrap
import time
import unicodedata
from contextlib import suppress
from itertools import groupby, zip_longest
from pathlib import Path

try:
    import torch
    from transformers import logging as transformers_logging

    from engram.console import (
        SpanishParser,
        UserError,
        in_command_of_notebook,
        out_of_memory,
        run_script,
        spanish,
        unaccented,
    )
    from engram.conversation import TEMPERATURE, Chat, interruptible
    from engram.facts import described
    from engram.opening import about_memory, add_memory_options, n_values, open_model
    from engram.teaching import ARROW
    from phi1_engram import EngramFileError
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )

FOLDERS = ("phi1-engram-trained", "phi1-engram", "phi1-engram-demo")  # the first that is there
YOU, MODEL, MORE = "👤 Tú: ", "🤖 Phi-Engram: ", "... "
ESCAPE = "Una pregunta que empiece como una orden se escribe entre comillas."
ADVICE = (
    "Consejo: Phi-1 es un modelo base que completa código, no un asistente. Hazle preguntas directas, o escribe "
    "«código» y dale el principio de una función para que la complete."
)
# Orders, and how many words may follow: a line with more of them is a question that happens to begin like an order.
ORDERS = {"salir": 0, "limpiar": 0, "ayuda": 0, "codigo": 0, "charla": 0, "memoria": 1, "temperatura": 1}
ORDERS |= {"recuerdos": 0, "olvida": 1}
ORDERS["comparar"] = 2**20
HELP = f"""Órdenes:
  código         completar código: escribe o pega varias líneas y termina con una línea vacía; Phi-1 sigue desde ahí
  charla         volver a conversar
  memoria no     responder sin la memoria Engram, solo con Phi; «memoria sí» la vuelve a encender
  memoria ver    la última respuesta, y debajo cuánto abrió cada token la memoria en cada capa: de 0 (nada) a 9 (toda)
  comparar       la última pregunta, respondida con memoria y sin ella; «comparar TEXTO» compara otra.
                 La conversación se queda como estaba
  aprende PRINCIPIO => RESPUESTA
                 recordarlo sin entrenar: desde ahora completa PRINCIPIO con RESPUESTA. Justo después de una
                 respuesta, «aprende RESPUESTA» es lo que tendría que haber dicho
  recuerdos      lo aprendido, numerado; «olvida N» o «olvida todo» lo quita sin dejar rastro
  temperatura X  0 elige siempre lo más probable; cuanto mayor, más variado
  limpiar        olvidar la conversación y empezar otra
  ayuda          ver esto
  salir          terminar (también Ctrl-D; Ctrl-C corta la respuesta, o sale si no hay ninguna)
La flecha arriba recupera lo que escribiste. {ESCAPE}
{ADVICE}"""
CODE_MODE = "Modo código: escribe o pega el principio y termina con una línea vacía. «charla» vuelve a la conversación."
SHADES = (None, 194, 157, 120, 83, 46)  # of a closed gate to an open one, in the terminal's 256 colours
NARROW = 60  # columns; with fewer, two answers go one above the other
OUT_OF_MEMORY = (
    "Se agotó la memoria y esta respuesta se ha perdido. Qué hacer:\n"
    "  1. Escribe «limpiar»: una conversación corta ocupa menos. O pide respuestas más cortas: --max-tokens 64\n"
    "  2. Si se repite, reinicia la sesión (en Colab: Entorno de ejecución -> Reiniciar sesión) y vuelve a abrir el "
    "chat.\n"
    "  3. No ejecutes otros modelos pesados en la misma sesión."
)


# ----------------------------------------------------------------------------------------------------------------------
# In the terminal
# ----------------------------------------------------------------------------------------------------------------------


def in_notebook() -> bool:
    """Whether this is a notebook's own process, whose `input` asks in the cell."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def unanswered() -> bool:
    """Whether what looks like a terminal never gets what the user types."""
    return in_command_of_notebook() and sys.stdin.isatty()


def in_conversation() -> bool:
    """Whether somebody types and reads, and is to see prompts."""
    return in_notebook() or (sys.stdin.isatty() and sys.stdout.isatty())


def in_colour() -> bool:
    """Whether escape sequences are understood and wished for (https://no-color.org)."""
    known = os.environ.get("TERM", "dumb") not in ("", "dumb")
    return known and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def write(piece: str):
    print(piece, end="", flush=True)


def shaded(pieces: list[tuple[str, int]], gates: dict[int, list[float]], facts, columns: int, colour: bool) -> str:
    """Text shaded by the mean of its gates, and under it a line for each layer: a digit where each piece begins; and
    where one of them follows from a fact, a line that marks it with R.

    Args:
        pieces: (text, position); gates: {layer: each position's, 0..1}, written in tenths; facts: each position's.
        columns: cells in a row.
    """
    rows, free = [], 0
    for text, position in pieces:
        for i, char in enumerate(text.expandtabs(4)):
            width = 2 if unicodedata.east_asian_width(char) in "WF" else 1  # cells in a terminal
            if width > free:
                rows.append([])
                free = columns - 7
            rows[-1].append((char if char.isprintable() else " ", width, position, i == 0))
            free = 0 if char == "\n" else free - width
    lines = []
    for row in rows:
        lines.append(" " * 6)
        for position, part in groupby(row, key=lambda cell: cell[2]):
            mean = sum(alpha[position] for alpha in gates.values()) / len(gates)
            shade = SHADES[min(int(mean * len(SHADES)), len(SHADES) - 1)]
            text = "".join(char for char, *_ in part)
            lines[-1] += f"\x1b[30;48;5;{shade}m{text}\x1b[0m" if colour and shade else text
        for layer, alpha in gates.items():
            marks = [str(min(int(alpha[at] * 10), 9)) if begins else "." for _, _, at, begins in row]
            lines.append(f"{layer:>5} " + "".join(mark.ljust(width) for mark, (_, width, _, _) in zip(marks, row)))
        spoken = [facts[at - 1] and begins for _, _, at, begins in row]  # a position says the token after it
        if any(spoken):
            marks = "".join("R".ljust(width) if fact else " " * width for fact, (_, width, _, _) in zip(spoken, row))
            lines.append(f"      {marks}".rstrip())
    return "\n".join(lines)


def side_by_side(left: str, right: str, columns: int) -> str:
    """Two texts in two columns, or one above the other where the terminal is narrow."""
    if columns < NARROW:
        return f"{left}\n\n{right}"
    wrap = textwrap.TextWrapper((columns - 4) // 2, tabsize=4, replace_whitespace=False, drop_whitespace=False).wrap
    sides = [[part for line in text.splitlines() for part in wrap(line) or [""]] for text in (left, right)]
    return "\n".join(f"{a:<{(columns - 4) // 2}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))


def order(text: str, answered=False) -> tuple[str, str]:
    """A line's order, without accents and capitals, and what follows it; ("", text) for a line that is none.

    Args:
        answered: whether an answer has just been given, which "aprende" may correct.
    """
    word, _, rest = text.strip().partition(" ")
    word = unaccented(word).casefold()
    if word == "aprende" and (ARROW in rest or (answered and rest.strip())):
        return word, rest
    return (word, rest.strip()) if len(rest.split()) <= ORDERS.get(word, -1) else ("", text)


def obey(chat: Chat, word: str, argument: str, say):
    """Carry out an order. Raises UserError where its argument is not one of those that it takes."""
    columns, wish = shutil.get_terminal_size().columns, unaccented(argument).casefold()
    text = f"{word} {argument}".strip()
    if word == "ayuda":
        say(HELP)
    elif word in ("aprende", "recuerdos", "olvida"):
        obey_facts(chat, word, argument, wish, say)
    elif word == "limpiar":
        chat.forget()
        say("Conversación olvidada.")
    elif word in ("codigo", "charla"):
        chat.code = word == "codigo"
        say(CODE_MODE if chat.code else "Modo charla: pregunta lo que quieras.")
    elif word == "comparar":
        say("(Respondiendo dos veces, sin memoria y con ella …)")
        texts = chat.compare(argument)
        titled = [f"{title}\n{text}" for title, text in zip(("CON MEMORIA", "SIN MEMORIA"), texts)]
        print(side_by_side(*titled, columns if in_conversation() else 0), flush=True)
        if texts[0] == texts[1]:
            say("(Las dos respuestas son iguales.)")
    elif word == "temperatura":
        value = float(wish.replace(",", ".")) if re.fullmatch(r"\d+([.,]\d+)?", wish) else -1
        if not 0 <= value <= 100:
            now = f"{chat.temperature:g}".replace(".", ",")
            raise UserError(f"«{text}»: la temperatura es un número de 0 a 100; ahora, {now}. {ESCAPE}")
        chat.temperature = value
        say(f"Temperatura: {wish.replace('.', ',')}")
    elif wish == "ver":
        pieces, gates, facts = chat.gates()
        print(shaded(pieces, gates, facts, columns, in_colour()), flush=True)
        marked = " R: lo ha dicho un recuerdo." if any(facts) else ""
        say(f"(Bajo cada token, su puerta en décimas, una línea por capa: 0 cerrada, 9 abierta.{marked})")
    elif wish in ("si", "no"):
        chat.memory = wish == "si"
        say("Memoria encendida." if chat.memory else "Memoria apagada: responde Phi sin Engram.")
    else:
        now = "encendida" if chat.memory else "apagada"
        raise UserError(f"«{text}»: se admite «memoria sí», «memoria no» o «memoria ver»; ahora está {now}. {ESCAPE}")


def obey_facts(chat: Chat, word: str, argument: str, wish: str, say):
    """Orders about what the chat has been told. Raises FactError where it is not taken."""
    teaching, said = chat.teaching, chat.teaching.said
    if word == "aprende":
        say("(Aprendiendo …)")
        learn = chat.learn if ARROW in argument else chat.learn_answer
        started = time.perf_counter()
        facts = learn(argument, lambda step: None)
        seconds = spanish(time.perf_counter() - started, 1)
        say(f"✅ Aprendido en {seconds} s ({described(facts[-1])}). «olvida {len(teaching.said)}» lo quita.")
        if not teaching.folder:
            say("   Dura lo que dure este chat; para guardarlo: --recuerdos CARPETA")
    elif word == "recuerdos":
        listed = "\n".join(f"{number:>4}  {one}" for number, one in enumerate(said, 1))
        say(listed or "Aún no he aprendido nada. Enséñame algo: aprende La capital de Zubrowka es => Lutz")
    elif wish == "todo" or (wish.isdecimal() and 1 <= int(wish) <= len(said)):
        teaching.forget(said if wish == "todo" else [said[int(wish) - 1]])
        say("Olvidado, sin dejar rastro.")
    else:
        there = f"del 1 al {len(said)} (los dice «recuerdos»)" if said else "ninguno todavía"
        raise UserError(f"«olvida {argument}»: se admite «olvida todo» o el número de un recuerdo, {there}. {ESCAPE}")


def guarded(say, action, *arguments) -> bool:
    """Call `action`, or say what keeps it from being done. Returns whether it was done."""
    failure = None
    try:
        action(*arguments)
    except (UserError, EngramFileError) as error:
        failure = f"❌ {error}"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failure = f"⚠️  {OUT_OF_MEMORY}"
    if failure:  # said here, as inside `except` the traceback would still hold the tensors
        torch.cuda.empty_cache()
        say(failure)
    return not failure


def respond(chat: Chat, text: str, say):
    """Print one answer."""
    try:
        said = chat.answer(text, write)
    finally:
        print(flush=True)
    if chat.forgotten and not chat.code:
        say(f"(Para que quepa, he olvidado los {chat.forgotten} mensajes más antiguos.)")
    if not said.strip():
        say("(El modelo no ha dicho nada. Prueba con otras palabras o con «código».)")


def read(code: bool, terminal: bool, answered: bool) -> str:
    """One message: a line, or in code mode the lines up to an empty one. Raises EOFError where input ends."""
    text = input(YOU if terminal else "")
    if not code or order(text, answered)[0] or not text.strip():
        return text
    lines = [text]
    with suppress(EOFError):
        while (line := input(MORE if terminal else "")).strip():
            lines.append(line)
    return "\n".join(lines)


def run_chat(
    model=None, tokenizer=None, code=False, max_tokens=256, temperature=TEMPERATURE, seed=None, kept_in=None
):  # fmt: skip
    """Converse until `salir` or the end of the input. In a terminal or a notebook's cell with prompts; piped, answers
    alone on stdout. Without a model, with the one that the other scripts left here."""
    terminal = in_conversation()

    def say(text):
        print(text, file=sys.stdout if terminal else sys.stderr, flush=True)

    if model is None:
        model, tokenizer = open_for_chat(default_model(), say)
    chat, answered = Chat(model, tokenizer, code, max_tokens, temperature, seed, kept_in), False
    if chat.teaching.said:
        say(f"Recuerdos: {len(chat.teaching.said)} («recuerdos» los dice).")
    if terminal:
        if not in_notebook():
            with suppress(ImportError):
                import readline  # arrow keys in input

                readline.parse_and_bind("set convert-meta off")  # in the C locale it takes accents for commands
        say(CODE_MODE if code else "Escribe «ayuda» para ver las órdenes y «salir» para terminar.")
    while True:
        text = None
        try:
            text = read(chat.code, terminal, answered)
            word, argument = order(text, answered)
            answered = not word and bool(text.strip())
            if word == "salir":
                break
            with interruptible():
                if word:
                    guarded(say, obey, chat, word, argument, say)
                elif text.strip():
                    if terminal:
                        write(MODEL)
                    guarded(say, respond, chat, text if chat.code else text.strip(), say)
        except EOFError:
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


def open_for_chat(name, note, storage="auto", memory=None):
    """Model and tokenizer on the GPU if there is one, telling `note` what they are."""
    gpu = torch.cuda.is_available()
    note(f"Abriendo {name} …")
    # Half precision on a GPU takes half the memory; on a CPU it would only be slow.
    dtype, device = (torch.float16, "cuda") if gpu else (torch.float32, "cpu")
    model, tokenizer = open_model(name, dtype, device, storage, memory)
    millions = spanish(n_values(model) / 1e6, 1)
    where = f"la GPU ({torch.cuda.get_device_name(model.device)})" if gpu else "la CPU"
    precision = str(model.dtype).removeprefix("torch.")
    note(f"{name}: {millions} millones de parámetros, en {where}, {precision}.\n{about_memory(model)}\n{ADVICE}")
    return model, tokenizer


def main(argv=None) -> int:
    parser = SpanishParser(
        description="Conversa con Phi-1 y su memoria Engram, o deja que complete código.",
        epilog='Ejemplo: python chat_phi_engram.py --codigo --pregunta "def factorial(n):"',
    )
    parser.add_argument(
        "--modelo", metavar="CARPETA_O_NOMBRE",
        help="carpeta, o usuario/nombre en el Hub (por defecto, la primera que haya de " + ", ".join(FOLDERS) + ")",
    )  # fmt: skip
    parser.add_argument("--codigo", "--código", action="store_true", help="completar código en vez de conversar")
    parser.add_argument("--pregunta", metavar="TEXTO", help="responde a esto y termina")
    parser.add_argument(
        "--max-tokens", type=int, default=256, metavar="N", help="tokens por respuesta (por defecto, %(default)s)"
    )
    parser.add_argument(
        "--temperatura", type=float, default=TEMPERATURE, metavar="X",
        help="0 elige siempre lo más probable; cuanto mayor, más variado (por defecto, %(default)s)",
    )  # fmt: skip
    parser.add_argument("--semilla", type=int, metavar="N", help="repite las mismas respuestas a las mismas preguntas")
    parser.add_argument(
        "--recuerdos", metavar="CARPETA",
        help="carpeta de lo que se le enseña con «aprende»: se abre al empezar y se guarda cada vez",
    )  # fmt: skip
    add_memory_options(parser)
    options = parser.parse_args(argv)
    if options.max_tokens < 1:
        parser.error(f"--max-tokens {options.max_tokens}: tiene que ser 1 o más.")
    if not 0 <= options.temperatura <= 100:
        parser.error(f"--temperatura {options.temperatura}: tiene que estar entre 0 y 100.")
    if options.pregunta is not None and not options.pregunta.strip():
        parser.error("--pregunta está vacía.")
    transformers_logging.set_verbosity_error()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")

    def note(text):  # beside the answers, so that `> respuestas.txt` holds answers alone
        print(text, file=sys.stdout if options.pregunta is None and in_conversation() else sys.stderr, flush=True)

    if options.pregunta is None and unanswered():
        raise UserError(
            "En un cuaderno, «!python» no recibe lo que escribes y se quedaría esperando para siempre. Haz una "
            'pregunta con la orden: !python chat_phi_engram.py --codigo --pregunta "def factorial(n):"\n'
            "   O conversa en una celda, sin «!»: from chat_phi_engram import run_chat; run_chat()"
        )
    name = str(options.modelo or default_model())
    model, tokenizer = open_for_chat(name, note, options.memoria, options.cambiar_memoria)
    settings = (options.codigo, options.max_tokens, options.temperatura, options.semilla, options.recuerdos)
    longest = model.config.max_position_embeddings // 2
    if options.max_tokens > longest:
        note(f"(--max-tokens se queda en {longest}, la mitad de lo que el modelo puede leer.)")
    try:
        if options.pregunta is None:
            run_chat(model, tokenizer, *settings)
        else:
            with interruptible():
                return 0 if guarded(note, respond, Chat(model, tokenizer, *settings), options.pregunta, note) else 1
    except BrokenPipeError:  # whoever read the answers, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    run_script(main)
