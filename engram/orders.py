"""The chat's orders: which there are, how a line is told from a question, and what is said of them."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import os
import re
import time

from engram.console import UserError, spanish, unaccented
from engram.conversation import TOY_TEMPERATURE, Chat
from engram.facts import described
from engram.opening import is_toy, of_demo, phi_size
from engram.teaching import ARROW, told
from phi1_engram import PHI_1

ESCAPE = "Una pregunta que empiece como una orden se escribe entre comillas."
ANY = 2**20
# How many words may follow: a line with more of them is a question that happens to begin like an order.
ORDERS = {
    "salir": 0, "limpiar": 0, "ayuda": 0, "codigo": 0, "charla": 0, "recuerdos": 0, "memoria": 1, "temperatura": 1,
    "olvida": 1, "comparar": ANY, "siguiente": ANY,
}  # fmt: skip
# What a mistyped one has to be followed by: other words make it a question.
VALUES = {"memoria": "si|no|ver|", "temperatura": r"\d+([.,]\d+)?|", "olvida": r"\d+|todo"}
ALIASES = {"exit": "salir", "quit": "salir", "help": "ayuda"}
# What whole lines may be meant to be.
OTHERWISE = {
    "adios|chao|hasta luego": "salir",
    r"(?:borra|borrar|elimina|olvida) ?(\d+|todo)": r"olvida \1",
    "(?:apaga|quita|desactiva) la memoria": "memoria no",
    "(?:enciende|pon|activa) la memoria": "memoria sí",
}
ARROWS, HALF = "=>|->|→|⇒", r"^\s*=>|=>\s*$"
IN_BLOCKS = ("salir", "ayuda", "codigo", "charla", "recuerdos", "olvida", "limpiar")  # no Python by themselves
BLOCK_END = "---"  # of a block of code on a standard input that is no terminal: blank lines are a part of code
HELP = f"""Órdenes:
  código         completar código: escribe o pega varias líneas y termina con una línea vacía; el modelo sigue desde ahí
  charla         volver a conversar
  siguiente TEXTO
                 los cinco tokens más probables después de TEXTO, con memoria y sin ella («\\n» es un salto de línea)
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
Sin terminal (por tubería o desde un archivo) un bloque de código termina en una línea que solo tenga «{BLOCK_END}»; las
vacías son parte de él."""
CODE_MODE = "Modo código: escribe o pega el principio y termina con una línea vacía. «charla» vuelve a la conversación."


def advice(model) -> str:
    """What is to be expected of a model, and what to try."""
    if is_toy(model):
        size, prompt = spanish(phi_size(model) / 1e6, 1), of_demo(model.name_or_path).get("prompt")
        example = (
            f"siguiente {prompt}        (los cinco tokens más probables, con memoria y sin ella)\n"
            f"   Y:      comparar {prompt}         (lo que escribe, con memoria y sin ella)"
            if prompt
            else "siguiente def __init__(        (o escribe «def __init__(self, name):» y una línea vacía)"
        )
        return (
            f"⚠️  Es un modelo de juguete: {size} millones de parámetros de Phi, y Phi-1 tiene 1.400. Solo "
            "imita la forma del código\n   que ha visto: no conversa, y lo que escribe no hay que creerlo. Si no pides "
            f"otra cosa, empieza en modo\n   código, a temperatura {spanish(TOY_TEMPERATURE, 1)}.\n"
            f"   Prueba: {example}"
        )
    who = "Phi-1" if model.config.tokenizer_name_or_path == PHI_1 else "este Phi"
    slow = model.device.type == "cpu" and not getattr(model, "is_quantized", False)
    faster = (
        "\n   En una CPU contesta antes con --cuantizar int8 (hace falta: pip install torchao), aunque ya no es "
        "exactamente el mismo."
    )
    return (
        f"Consejo: {who} es un modelo base que completa código, no un asistente. Hazle preguntas directas, o escribe "
        f"«código» y dale el principio de una función para que la complete.{faster if slow else ''}"
    )


def order(text: str, answered=False) -> tuple[str, str]:
    """A line's order, without accents and capitals, and what follows it; ("", text) for a line that is none.

    Args:
        answered: whether an answer has just been given, which "aprende" may correct.
    """
    word, _, rest = text.strip().partition(" ")
    word = unaccented(word).casefold()
    if (bare := word.removeprefix("/")) in (*ORDERS, *ALIASES, "aprende"):
        word = bare
    if not rest.strip():
        bare = re.sub(r"(\(\)|[.!])$", "", word.lstrip("/¡"))
        word = ALIASES.get(bare, bare if bare in ("salir", "ayuda") else word)
    if word == "aprende" and (ARROW in rest or (answered and rest.strip() and not re.search(HALF, rest))):
        return word, rest
    if len(rest.split()) > ORDERS.get(word, -1):
        return "", text
    return word, rest if word == "siguiente" else rest.strip()  # spaces before code are code


def leaves_block(line: str) -> bool:
    """Whether a line typed into a block of code is an order all the same."""
    word = re.sub(r"[.!]$", "", unaccented(line).casefold().partition(" ")[0].lstrip("/¡"))
    return word in IN_BLOCKS and order(line)[0] == word


def one_letter_away(a: str, b: str) -> bool:
    """Whether one letter more, less or other, or two neighbours in the other order, make `a` of `b`."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return False
    start = len(os.path.commonprefix((a, b)))
    end = len(os.path.commonprefix((a[start:][::-1], b[start:][::-1])))
    left, right = a[start : len(a) - end], b[start : len(b) - end]
    return max(len(left), len(right)) <= 1 or (len(left) == 2 and left == right[::-1])


def meant(text: str) -> str | None:
    """The order that a line which is none may have been meant to be: one letter of its first word is wrong, it is said
    otherwise, or the arrow of "aprende" is another, has no spaces around it, or nothing on one side."""
    whole = unaccented(text).casefold().strip(" .!¡/")
    for words, wish in OTHERWISE.items():
        if found := re.fullmatch(words, whole):
            return found.expand(wish)
    word, space, rest = text.strip().removeprefix("/").partition(" ")
    plain = unaccented(word).casefold()
    if plain == "aprende" and re.search(HALF, rest):
        return f"aprende PRINCIPIO{ARROW}RESPUESTA"
    if not word.isalpha() or rest.lstrip()[:1] in ("=", "("):  # a question's sign, or code
        return None
    if plain == "aprende" and (parts := re.match(rf"(.*\S)(?:\s*(?:{ARROWS})\s*|\s+=\s+)(\S.*)", rest)):
        return f"{plain} {parts[1]}{ARROW}{parts[2]}"
    for name, words in (*ORDERS.items(), *dict.fromkeys(ALIASES, 0).items(), ("aprende", ANY if ARROW in rest else -1)):
        takes = VALUES.get(name)
        if one_letter_away(plain, name) and len(rest.split()) <= words:
            if takes is None or re.fullmatch(takes, unaccented(rest).casefold().strip()):
                return f"{name}{space}{rest}"
    return None


def obey_facts(chat: Chat, word: str, argument: str, wish: str, say):
    """Orders about what the chat has been told. Raises FactError where it is not taken."""
    teaching, said = chat.teaching, chat.teaching.said
    if word == "aprende":
        say("(Aprendiendo …)")
        learn = chat.learn if ARROW in argument else chat.learn_answer
        started = time.perf_counter()
        facts = learn(argument, chat.heed)
        seconds = spanish(time.perf_counter() - started, 1)
        say(f"✅ Aprendido en {seconds} s: {told(facts[-1])}\n   ({described(facts[-1])})")
        place = ", al completar código; para la charla, enséñaselo en ella" if chat.code else ""
        say(f"   Vale desde ahora{place}. «olvida {teaching.said.index(told(facts[-1])) + 1}» lo quita.")
        if not teaching.folder:
            say("   Dura lo que dure este chat; para guardarlo: --recuerdos CARPETA")
    elif word == "recuerdos":
        listed = "\n".join(f"{number:>4}  {one}" for number, one in enumerate(said, 1))
        say(listed or "Aún no he aprendido nada. Enséñame algo: aprende La capital de Zubrowka es => Lutz")
    elif wish == "todo" and not said:
        say("No hay nada que olvidar: aún no he aprendido nada.")
    elif wish == "todo" or (wish.isdecimal() and 1 <= int(wish) <= len(said)):
        teaching.forget(said if wish == "todo" else [said[int(wish) - 1]])
        say("Olvidado, sin dejar rastro.")
    else:
        there = f"del 1 al {len(said)} (los dice «recuerdos»)" if said else "ninguno todavía"
        raise UserError(f"«olvida {argument}»: se admite «olvida todo» o el número de un recuerdo, {there}. {ESCAPE}")
