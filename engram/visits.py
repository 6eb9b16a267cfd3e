"""What every tab of the page has of its own, without a browser: a conversation, facts, settings, what it shows.

The model is one. It has a visit's facts and switches while it works for it, one visit at a time.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import queue
import re
import threading
import time
import traceback
from contextlib import contextmanager
from html import escape

from engram.console import UserError, guarded, spanish
from engram.conversation import Chat
from engram.facts import described
from engram.opening import apart
from engram.teaching import told

VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", " ": "·"})
LEGEND = (
    "Cuanto más verde, más abrió ese token la memoria al leer el n-grama que acaba en él: de 0 (nada) a 1 (todo); 0,50 "
    "es también lo que sale donde aún no hay nada aprendido. Deja el ratón encima para ver el n-grama."
)
SPOKEN = " Con borde naranja y una R, lo que ha dicho un recuerdo."


class Visit:
    """One tab: a conversation, facts and settings, put on the model for each answer and taken off after it.

    Args:
        first: a Chat, of which this visit has another.
        lock: held by whoever uses the model.
        facts: what it knows at first; None: it has the model's own, as every tab where they are kept in a folder.
    """

    def __init__(self, first: Chat, lock: threading.Lock, facts: list | None):
        self.chat, self.model, self.lock, self.facts = first.another(), first.model, lock, facts
        self.shown = []  # {"role", "content"}: content is text, or HTML of ours as a bare string; see `message`
        self.waiting = []  # questions that have not had their turn
        self.busy = threading.Lock()  # held while the model works for it

    def __deepcopy__(self, memo):  # gradio copies what its states begin with; a model is not to be copied
        return self

    @property
    def said(self) -> list[str]:
        """What it has been told, in order."""
        return list(dict.fromkeys(map(told, self.model.facts if self.facts is None else self.facts)))

    @contextmanager
    def working(self):
        """Meanwhile the model works for this visit alone, with its facts."""
        with self.lock:
            before = self.model.facts
            if self.facts is not None:
                self.model.set_facts(self.facts)
            try:
                yield self.chat
            finally:
                if self.facts is not None:
                    self.facts = self.model.facts
                    self.model.set_facts(before)

    def settle(self, mode: str, memory: bool, temperature: float, length: float, seed: str):
        """Take the page's settings over. Raises UserError."""
        chat, seed = self.chat, seed.strip()
        if not re.fullmatch(r"(\d{1,18})?", seed, re.ASCII):
            raise UserError(f"Semilla «{seed}»: tiene que ser un número entero, o nada.")
        chat.code, chat.memory, chat.temperature = mode == "Código", bool(memory), temperature
        chat.max_tokens, chat.seed = min(int(length), chat.context // 2), int(seed) if seed else None

    def view(self, partial: str = "") -> list[dict]:
        """What is to be seen now: what was said, what of an answer there is, and the questions that wait."""
        said = [message("assistant", partial)] if partial else []
        said += [message("user", text) for text in self.waiting]
        if self.waiting and not partial and self.lock.locked():
            said.append(message("assistant", "⏳ El modelo está ocupado con otra respuesta. Espera tu turno…"))
        return [*self.shown, *said]

    def halt(self):
        """Cut the answer that is being given, and leave unanswered what waits."""
        self.waiting.clear()
        self.chat.stop.set()

    def attempt(self, say, action, settings=()):
        """`action(chat)` on the model, or a sentence that says why not; the page lives on."""

        def work():
            with self.working() as chat:
                if settings:
                    self.settle(*settings)
                action(chat)

        try:
            guarded(say, lambda: apart(work))
        except KeyboardInterrupt:
            say("⏹️ Respuesta cortada.")
        except Exception as error:
            traceback.print_exc()
            say(f"❌ Ha fallado por dentro ({type(error).__name__}): la terminal dice dónde. La página sigue.")

    def answer(self, text: str, settings, write):
        """Answer, and add to what is shown the answer, how it used the memory, and what is to be said of it."""
        pieces, views, notes = [], [], []

        def take(piece):
            pieces.append(piece)
            write(piece)

        def act(chat):
            said = ""
            try:
                said = chat.answer(text if chat.code else text.strip(), take)
            finally:  # what a cut left is looked at too
                if "".join(pieces).strip() and chat.given is not None:
                    views.append(gates_drawn(chat))
            notes.extend(chat.remarks(said))

        with self.busy:
            self.attempt(notes.append, act, settings)
            self.shown += [message("assistant", text) for text in ["".join(pieces)] if text]
            self.shown += [dict(role="assistant", content=view) for view in views]
            self.shown += [message("assistant", note) for note in notes]


def message(role: str, text: str) -> dict:
    """A message for gradio's chatbot, which takes any text for HTML, and the indentation off a bare string."""
    return dict(role=role, content=dict(type="text", text=escape(text, quote=False)))


def gates_drawn(chat: Chat):
    """The last answer's tokens shaded by each layer's gate, and what each of them read, as HTML that is inert."""
    pieces, gates, facts = chat.gates()
    texts, rows = {layer: "" for layer in gates}, ""
    for text, at in pieces:
        spoken, ngram = facts[at - 1], escape(chat.ngram(at).translate(VISIBLE))  # a position says the token after it
        mark = ' class="r"' if spoken else ""
        for layer, alpha in gates.items():
            title = f"{spanish(alpha[at], 2)} · {ngram}"
            texts[layer] += f'<span{mark} style="--g:{alpha[at]:.2f}" title="{title}">{escape(text)}</span>'
        cells = [escape(text.translate(VISIBLE)), ngram, *(spanish(alpha[at], 2) for alpha in gates.values())]
        rows += "".join(f"<td>{cell}</td>" for cell in [*cells, "R" if spoken else ""]) + "</tr><tr>"
    head = "".join(f"<th>{name}</th>" for name in ["token", "n-grama leído", *(f"capa {n}" for n in gates), "recuerdo"])
    strips = "".join(
        f'<div class="leyenda">Capa {layer}</div><div class="puertas">{text}</div>' for layer, text in texts.items()
    )
    legend = LEGEND + SPOKEN * any(facts[at - 1] for _, at in pieces)
    return (
        f'<details><summary>🧠 Ver qué hizo la memoria, token a token</summary><p class="leyenda">{legend}</p>{strips}'
        f'<details><summary>En una tabla</summary><table class="leido"><tr>{head}</tr><tr>{rows}</tr></table></details>'
        "</details>"
    )


def ask(visit: Visit, text: str):
    """Put a question on the list: it is seen at once, and answered in its turn."""
    if text.strip():
        visit.waiting.append(text)
    return "" if text.strip() else text, visit.view()


def answered(visit: Visit, *settings):
    """What the chatbot shows, while the visit's next question is answered."""
    visit.chat.stop.clear()  # before the question is taken: whoever stops takes the questions first
    try:
        text = visit.waiting.pop(0)
    except IndexError:
        yield visit.view()
        return
    visit.shown.append(message("user", text))
    pieces, said = queue.SimpleQueue(), ""
    worker = threading.Thread(target=lambda: (visit.answer(text, settings, pieces.put), pieces.put(None)), daemon=True)
    worker.start()
    try:
        for piece in iter(pieces.get, None):
            said += piece
            if piece:
                yield visit.view(said)
    except GeneratorExit:  # the tab was closed
        visit.halt()
        raise
    yield visit.view()


def begun_again(visit: Visit):
    """Nothing shown, nothing remembered of the conversation; facts and settings stay."""
    visit.halt()
    with visit.busy:
        visit.chat.forget()
        visit.shown.clear()
    return []


def compared(visit: Visit, text: str, *settings):
    """Both answers, and what is to be said of them."""
    visit.chat.stop.clear()
    said, notes = ["", ""], []

    def act(chat):
        said[:] = chat.compare(text if chat.code else text.strip())
        if said[0] == said[1]:
            notes.append("Las dos respuestas son iguales.")

    visit.attempt(notes.append, act, settings)
    return *said, "\n".join(notes)


def taught(visit: Visit, prompt: str, answer: str, step, *settings):
    """What is known afterwards, and a sentence about what was taught."""
    notes = []

    def act(chat):
        if not answer.strip():
            raise UserError("Falta la respuesta: escribe qué tiene que venir después.")
        if not prompt.strip() and chat.question is None:
            raise UserError("Falta el principio. Solo puede quedar vacío justo después de una pregunta.")
        started = time.perf_counter()
        facts = chat.learn_pair(prompt, answer, step) if prompt.strip() else chat.learn_answer(answer, step)
        seconds = spanish(time.perf_counter() - started, 1)
        notes.append(f"✅ Aprendido en {seconds} s: {told(facts[-1])} ({described(facts[-1])}).")

    visit.attempt(notes.append, act, settings)
    return visit.said, "\n".join(notes)


def forgotten(visit: Visit, said: list[str]):
    notes = []
    visit.attempt(notes.append, lambda chat: chat.teaching.forget(said))
    return visit.said, "\n".join(notes) or ("Olvidado, sin dejar rastro." if said else "Marca antes qué olvidar.")
