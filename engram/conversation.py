"""A chat without a screen: prompts, answers while they are generated, stopping, comparing, gates."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import copy
import re
import signal
import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria

from engram.console import UserError, counted, readable, spanish
from engram.facts import NoChance, facts_read
from engram.graft import CHAT_TEMPLATE
from engram.hooks import gate_values
from engram.opening import is_toy
from engram.teaching import ARROW, Teaching, line_of_code, literal, sentence
from engram.triggers import Lesson
from phi1_engram import Fact

TEMPERATURE = 0.2  # Phi-1's answers are code: nearly the likeliest token, without the loops of always taking it
TOY_TEMPERATURE = 0.6  # a small model goes round in circles at less
COPIES, CYCLE = 4, 4  # an answer ends at so many copies of the same lines, one after the other, of so many at most
RUN = 40  # or at COPIES times so many characters in which the same text, of so many at most, goes on and on
# Where the model stops answering and begins to play the user, or opens another turn of its own.
OTHER_TURN = re.compile(r"(?:\A|\n)\s*User:|\n\s*Assistant:")
LOOPED = (
    "(Repetía lo mismo y la he cortado. Prueba otro principio, «temperatura 0,8», o «siguiente TEXTO», que no "
    "puede dar vueltas.)"
)
_asked = []  # a signal for each Ctrl-C since the last `interruptible` began


@contextmanager
def interruptible():
    """Meanwhile the first Ctrl-C stops an answer after the present token, and the second at once.

    As an exception it could come up inside a library's callback, and be lost there.
    """
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return

    def ask(number, frame):
        _asked.append(number)
        if len(_asked) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def repeats(text: str) -> bool:
    """Whether the whole lines of a text end in COPIES copies of the last line, or of the last few; or its last
    characters, within a line too, in one short text over and over: «0, 0, 0, …»."""
    lines, tail = text.split("\n")[:-1], text[-COPIES * RUN :]
    return any(
        len(lines) >= COPIES * n and lines[-n:] * COPIES == lines[-COPIES * n :] for n in range(1, CYCLE + 1)
    ) or (  # what cannot be seen is not said to repeat itself
        len(tail) == COPIES * RUN and not tail.isspace() and any(tail[n:] == tail[:-n] for n in range(1, RUN + 1))
    )


def begun(text: str, stops) -> int:
    """How many of the last characters of a text may be the beginning of one of `stops`."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class Answer(StoppingCriteria):
    """Streams an answer word by word, and stops it where the model starts to speak for the user.

    Transformers calls it after each token. A word is shown once the next one begins, so that half a character, or the
    beginning of "\\nUser:" cut over several tokens, is never seen.

    Args:
        prompt: int64 [1, T], the tokens before the answer.
        code: raw completion; white space is kept and no turn is looked for.
        write: takes each piece of text.
        stop: an Event that cuts it, as Ctrl-C does.
        stops: texts that end it and are no part of it.
    """

    def __init__(self, tokenizer, prompt: torch.LongTensor, code: bool, write, stop=None, stops=()):
        self.tokenizer, self.prompt_length, self.code, self.write = tokenizer, prompt.shape[1], code, write
        self.stop, self.stops = stop or threading.Event(), stops
        self.ids, self.text = prompt, ""  # int64 [1, T], with the prompt; what has been shown
        self.cut = self.looped = False  # by the user; because it repeated itself

    def __call__(self, input_ids, scores, **kwargs) -> torch.BoolTensor:
        self.ids = input_ids
        self.cut = bool(_asked) or self.stop.is_set()
        self.looped = repeats(self._decode())
        stop = self._show(final=False) or self.cut or self.looped
        return torch.full((len(input_ids),), stop, device=input_ids.device)

    def finish(self) -> str:
        """Show the last word. Returns the whole answer."""
        self._show(final=True)
        return self.text

    def pieces(self) -> list[tuple[str, int]]:
        """What has been shown, cut where its tokens are: (text, position of its token in `ids`)."""
        whole, end, pieces = self._decode(), 0, []
        first = 0 if self.code else len(whole) - len(whole.lstrip())
        for position in range(self.prompt_length, self.ids.shape[1]):
            text = self._decode(position + 1)
            if text.endswith("\ufffd") and text != whole:  # a part of a character
                continue
            start, end = end, len(text)
            piece = whole[max(start, first) : min(end, first + len(self.text))]
            pieces += [(piece, position)] if piece else []
        return pieces

    def _decode(self, end=None) -> str:
        tokens = self.ids[0, self.prompt_length : end].tolist()
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, final: bool) -> bool:
        text = self._decode()
        turn = None
        if not self.code:
            text = text.lstrip()
            turn = OTHER_TURN.search(text)
        stop = min((text.index(stop) for stop in self.stops if stop in text), default=None)
        if stop is not None and (turn is None or stop < turn.start()):
            text = text[:stop]
        elif turn:
            text = text[: turn.start()].rstrip()
        elif not final:
            text = text[: min(re.search(r"\s*\S*\Z", text).start(), len(text) - begun(text, self.stops))]
        elif not self.code:
            text = text.rstrip()
        self.write(text[len(self.text) :])
        self.text = text
        return turn is not None or stop is not None


class Question(NamedTuple):
    """What an answer follows from, besides the model."""

    text: str
    turns: list[dict]  # the conversation before it
    code: bool
    seed: int


def suited(model, code, temperature):
    """Mode and temperature, where nothing was said of them: a toy cannot converse, and loops when it is cold."""
    toy = is_toy(model)
    if temperature is None:
        temperature = TOY_TEMPERATURE if toy else TEMPERATURE
    return toy if code is None else code, temperature


class Chat:
    """A model, the conversation so far, and how to answer.

    Args:
        code: complete raw code, each time from nothing, instead of conversing.
        max_tokens: longest answer; half the context at most, so that the question fits too.
        temperature: 0 takes the likeliest token always.
        seed: the same question in the same conversation gets the same answer; None: another each time.
        kept_in: folder with the facts that it is taught; None: they last as long as the chat.
    """

    def __init__(self, model, tokenizer, code=False, max_tokens=256, temperature=TEMPERATURE, seed=None, kept_in=None):
        self.model, self.tokenizer = model, tokenizer
        self.code, self.temperature, self.seed = code, temperature, seed
        self.memory = model.model.use_memory  # whether answers use it
        self.context = model.config.max_position_embeddings
        self.max_tokens = min(max_tokens, self.context // 2)
        self.turns = []  # [{"role": "user" or "assistant", "content": text}]
        self.forgotten = 0  # turns that the last answer had no room for
        self.looped = False  # whether the last answer was cut because it repeated itself
        self.question = self.given = None  # the last Question, and its Answer if it had the memory
        self.teaching = Teaching(model, tokenizer, kept_in)
        self.stop = threading.Event()  # another thread may set it to cut an answer; nothing here clears it

    def another(self) -> "Chat":
        """A new conversation, as this one was set, with the same model and what it was taught."""
        other = copy.copy(self)
        other.stop = threading.Event()
        other.forget()
        return other

    def heed(self, step: int):
        """Between two steps of learning. Raises KeyboardInterrupt where Ctrl-C asked for it."""
        if _asked:
            raise KeyboardInterrupt

    def fit(self, turns: list[dict]) -> tuple[torch.LongTensor, list[dict]]:
        """Tokens [1, T] of a conversation, and what is left of it once its oldest turns made room for the answer."""
        template = self.tokenizer.chat_template or CHAT_TEMPLATE
        while True:
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            ids = self.tokens(text)
            excess = ids.shape[1] + self.max_tokens - self.context
            if excess <= 0:
                return ids, turns
            if len(turns) == 1:
                over = f"sobra{'n' * (excess > 1)} {counted(excess, 'token')}"
                raise UserError(
                    f"Tu mensaje es demasiado largo: {over} de los {spanish(self.context)} que el modelo puede leer, "
                    f"{self.max_tokens} de ellos para la respuesta. Acórtalo, o usa un --max-tokens menor."
                )
            turns = turns[min(2, len(turns) - 1) :]

    def tokens(self, text: str) -> torch.LongTensor:
        text = readable(text)  # of bytes that a terminal could not decode
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def ask(self, text: str) -> Question:
        seed = torch.Generator().seed() if self.seed is None else self.seed  # known, to be answered a second time
        return Question(readable(text), self.turns, self.code, seed)

    def answer(self, text: str, write) -> str:
        """Answer `text`, giving each piece to `write` as it comes, and keep both in the conversation.

        Raises:
            UserError: the text does not fit into the context.
            KeyboardInterrupt: cut short; what had been said is kept.
        """
        question = self.ask(text)
        answer, turns = self.reply(question, self.memory, write)
        self.forgotten = len(self.turns) + 1 - len(turns)
        if answer.text and not question.code:  # a question without an answer would be answered next time
            self.turns = [*turns, {"role": "assistant", "content": answer.text}]
        if answer.cut:
            raise KeyboardInterrupt
        return answer.text

    def remarks(self, said: str):
        """What is to be told of the answer that `answer` has just given."""
        if self.forgotten and not self.code:
            yield f"(Para que quepa, he olvidado lo más antiguo: {counted(self.forgotten, 'mensaje')}.)"
        if self.looped:
            yield LOOPED
        if not said.strip():
            yield "(El modelo no ha dicho nada. Prueba con otras palabras o con «código».)"

    def to_compare(self, text: str = "") -> Question:
        """`text` as a question, or the last one. Raises UserError where there is none."""
        if not text and self.question is None:
            raise UserError("Aún no has preguntado nada. Pregunta algo, o escribe «comparar» y la pregunta detrás.")
        return self.ask(literal(text) if self.code else text) if text else self.question

    def compare(self, text: str = "") -> tuple[str, str]:
        """Answers with memory and without, of the same seed, to `text` or the last question; neither is kept.

        Raises:
            UserError: no question yet, or it does not fit.
            KeyboardInterrupt: cut short.
        """
        question, said, looped = self.to_compare(text), {}, False
        for memory in (False, True):  # in this order the gates of the second can be seen
            answer, _ = self.reply(question, memory, lambda piece: None)
            if answer.cut:
                raise KeyboardInterrupt
            said[memory], looped = answer.text, looped or answer.looped
        self.looped = looped
        return said[True], said[False]

    @torch.no_grad()
    def likeliest(self, text: str, n: int = 5) -> dict[bool, list[tuple[str, float]]]:
        """The `n` likeliest next tokens after `text` as it stands, in each mode: {memory: [(token, probability)]}.

        Raises:
            UserError: there is no text.
        """
        ids = self.tokens(literal(text))[:, -self.context :].to(self.model.device)
        if not ids.shape[1]:
            raise UserError("Escribe detrás el texto que hay que seguir, por ejemplo: siguiente def __init__(")
        found = {}
        for memory in (True, False):
            with self.using(memory):
                logits = self.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            chances, tokens = logits.softmax(-1).topk(n)
            texts = [self.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in tokens.tolist()]
            found[memory] = list(zip(texts, chances.tolist()))
        return found

    def gates(self) -> tuple[list[tuple[str, int]], dict[int, list[float]], list[bool]]:
        """The last answer's pieces, as in `Answer.pieces`, every position's gate (0..1) in each layer, and whether it
        read a fact.

        Raises:
            UserError: no answer yet, or it was given without memory.
        """
        if self.question is None:
            raise UserError("Aún no hay ninguna respuesta que ver. Pregunta algo primero.")
        if self.given is None:
            raise UserError(
                "La última respuesta se dio sin memoria, así que no hay nada que ver. Escribe «memoria sí» y pregunta "
                "otra vez, o «comparar»."
            )
        with self.using(True):
            gates = gate_values(self.model, self.given.ids)
            facts = facts_read(self.model, self.given.ids)[0].tolist()
        return self.given.pieces(), {layer: alpha[0].tolist() for layer, alpha in gates.items()}, facts

    def ngram(self, position: int) -> str:
        """The longest n-gram that a position of the last answer's ids reads in the memory, as text."""
        ids = self.given.ids[0, max(0, position + 1 - self.model.config.max_ngram_size) : position + 1]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def learn(self, text: str, progress) -> list[Fact]:
        """Teach "PROMPT => ANSWER" as `learn_pair` does."""
        prompt, _, answer = text.partition(ARROW)
        return self.learn_pair(prompt, answer, progress)

    def learn_pair(self, prompt: str, answer: str, progress) -> list[Fact]:
        """Teach both literally in code mode; else also `answer` as the answer to `prompt` as a question.

        Raises:
            FactError: it was not taken, and nothing has changed.
        """
        prompt, answer = readable(prompt), readable(answer)
        if self.code:
            lessons = [self.teaching.lesson(literal(prompt), line_of_code(answer))]
        else:
            prompt = prompt.strip()
            lessons = [self.teaching.lesson(prompt, sentence(answer)), self.as_answer(prompt, answer)]
        return self.teaching.learn(lessons, f"{prompt.strip()}{ARROW}{answer.strip()}", progress)

    def learn_answer(self, answer: str, progress) -> list[Fact]:
        """Teach what the last question should have been answered; raises as `learn`."""
        question, answer = self.question, readable(answer)
        if question.code:  # which went to the model as it was
            one = self.teaching.lesson(question.text, line_of_code(answer))
        else:
            one = self.as_answer(question.text, answer)
        return self.teaching.learn([one], f"{question.text.strip()}{ARROW}{answer.strip()}", progress)

    def as_answer(self, question: str, answer: str) -> Lesson:
        """What is to be completed when `question` is asked; the end of the turn is a part of the answer. The whole
        question is the key, if it has room: what one asks for often stands in its first words."""
        ids, _ = self.fit([{"role": "user", "content": question}])
        prompt = self.tokenizer.decode(ids[0], clean_up_tokenization_spaces=False)
        closing = prompt[prompt.rindex(question) + len(question) :]
        ending, whole = (self.tokens(text).shape[1] for text in (closing, f" {question}{closing}"))
        return self.teaching.lesson(prompt, sentence(answer) + self.tokenizer.eos_token, ending, whole)

    def forget(self):
        self.turns, self.question, self.given = [], None, None

    def reply(self, question: Question, memory: bool, write) -> tuple[Answer, list[dict]]:
        """An answer, perhaps cut short, and the turns that it follows from."""
        turns = []
        if question.code:  # the end is what it goes on from
            ids = self.tokens(question.text)[:, self.max_tokens - self.context :]
        else:
            ids, turns = self.fit([*question.turns, {"role": "user", "content": question.text}])
        ids = ids.to(self.model.device)
        answer = Answer(self.tokenizer, ids, question.code, write, self.stop)
        self.question, self.given = question, answer if memory else None
        torch.manual_seed(question.seed % 2**63)
        try:
            with self.using(memory):
                self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=self.plan(), stopping_criteria=[answer],
                    logits_processor=[NoChance(self.model)],
                )  # fmt: skip
        except KeyboardInterrupt:
            answer.cut = True
        answer.finish()
        self.looped = answer.looped
        return answer, turns

    @contextmanager
    def using(self, memory: bool):
        """Meanwhile the model has its memory, or has not; a chat leaves the model as it was."""
        decoder = self.model.model
        before, decoder.use_memory = decoder.use_memory, memory
        try:
            yield
        finally:
            decoder.use_memory = before

    def plan(self) -> GenerationConfig:
        """How to generate; nothing is left to the checkpoint but its stop tokens."""
        ends = {self.tokenizer.eos_token_id}
        for config in (self.model.config, self.model.generation_config):
            eos = config.eos_token_id
            ends.update(eos if isinstance(eos, (list, tuple)) else [eos])
        ends = sorted(ends - {None})
        samples = self.temperature >= 0.01  # below, dividing by it overflows, and the choice is the likeliest anyway
        sampling = {"temperature": self.temperature, "top_k": 0, "top_p": 0.95} if samples else {}
        return GenerationConfig(
            max_new_tokens=self.max_tokens, do_sample=samples, num_beams=1, eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else self.model.config.engram_pad_id, **sampling,
        )  # fmt: skip
