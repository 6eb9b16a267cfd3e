"""The page in the browser: visits by themselves, over HTTP, and in a real Chromium."""

import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import chat_phi_engram as chat_script
import helpers
from engram import page, triggers, visits
from engram.checks import tokenizer_on_the_spot
from engram.console import UserError, run_script
from engram.conversation import Chat
from engram.memories import remove_memory

SCRIPT = Path(chat_script.__file__)
NASTY = "<script>window.bad = 1</script><img src=x onerror='window.bad = 2'> ${window.bad = 3} {{bad}} **x** $$y$$"
SAY = ("Conversación", True, 0, 12, 0)  # mode, memory, temperature, length, seed


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_on_the_spot()


def made(tokenizer, **shape):
    shape = dict(max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, **shape)
    return helpers.make_model(vocab_size=len(tokenizer), **shape)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Never at its end by itself."""
    model = made(tokenizer)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.eos_token_id] = -100
    return model


@pytest.fixture(scope="module")
def blank(tokenizer):
    """Wide enough to be told something, with an untrained memory."""
    model = made(tokenizer, hidden_size=256, intermediate_size=512, n_embed_per_ngram=128)
    remove_memory(model)
    return model


@pytest.fixture(autouse=True)
def short_reference(monkeypatch):
    monkeypatch.setattr(triggers, "REFERENCE_BYTES", 20_000)


def tabs(model, tokenizer, n=2):
    first, lock = Chat(model, tokenizer, max_tokens=12, temperature=0, seed=0), threading.Lock()
    return [visits.Visit(first, lock, []) for _ in range(n)]


@pytest.fixture
def two(model, tokenizer):
    return tabs(model, tokenizer)


def answer_of(visit, text, *settings):
    """What a tab shows in the end."""
    visits.ask(visit, text)
    return texts([*visits.answered(visit, *(settings or SAY))][-1])


def texts(messages):
    return [one["content"] if isinstance(one["content"], str) else one["content"]["text"] for one in messages]


def in_the_terminal(model, tokenizer, monkeypatch, capsys, lines, **settings):
    """What `run_chat` prints when these lines are piped into it."""
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", io.StringIO(lines))
        chat_script.run_chat(model, tokenizer, **settings)
    return capsys.readouterr().out


def hooked(model, ids):
    """Every layer's gates as the modules give them, {layer: [T]}."""
    gates, hooks = {}, []
    for layer in model.config.engram_layer_ids:
        gate = model.model.layers[layer].engram.gate
        hooks.append(gate.register_forward_hook(lambda m, x, a, layer=layer: gates.update({layer: a[0, :, 0]})))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return gates


# ----------------------------------------------------------------------------------------------------------------------
# Visits, without a browser
# ----------------------------------------------------------------------------------------------------------------------


def test_a_visit_answers_as_the_terminal(model, tokenizer, two, monkeypatch, capsys):
    settings = dict(code=False, max_tokens=12, temperature=0.8, seed=3)
    for memory, lines in ((True, "hola\n"), (False, "memoria no\nhola\n")):
        said = in_the_terminal(model, tokenizer, monkeypatch, capsys, lines, **settings)
        shown = answer_of(two[memory], "hola", "Conversación", memory, 0.8, 12, 3)
        assert shown[0] == "hola" and shown[1] == said.rstrip("\n")
        assert len(shown) == 2 + memory  # with it, what it did
    assert model.model.use_memory


def test_visits_do_not_mix(blank, tokenizer):
    model = blank
    one, other = tabs(model, tokenizer)
    answer_of(one, "first tab")
    assert other.shown == [] and other.chat.turns == [] and len(one.chat.turns) == 2
    answer_of(other, "second tab", "Código", False, 0.5, 3, None)
    assert one.chat.memory and not one.chat.code and one.chat.seed == 0 and other.chat.seed is None
    steps = []
    said, note = visits.taught(one, "The capital of Zubrowka is", "Lutz", steps.append, *SAY)
    assert said == one.said == ["The capital of Zubrowka is => Lutz"] and "✅ Aprendido en" in note and steps
    assert other.said == [] and model.facts == []  # put on for its answer alone
    assert answer_of(one, "The capital of Zubrowka is")[-2] == "Lutz."
    assert 'class="r"' in one.shown[-1]["content"] and "lo que ha dicho un recuerdo" in one.shown[-1]["content"]
    assert not answer_of(other, "The capital of Zubrowka is")[-2].startswith("Lutz") and model.facts == []
    assert visits.forgotten(one, said) == ([], "Olvidado, sin dejar rastro.") and model.facts == []
    for prompt, answer, words in (("x", "", "Falta la respuesta"), ("x", "y", "tokens que hacen falta")):
        said, note = visits.taught(one, prompt, answer, steps.append, *SAY)
        assert said == [] and note.startswith("❌") and words in note
    (new,) = tabs(model, tokenizer, 1)
    assert "Falta el principio" in visits.taught(new, "", "y", steps.append, *SAY)[1]


def test_where_facts_are_kept_every_tab_has_them(blank, tmp_path, tokenizer):
    kept = Chat(blank, tokenizer, kept_in=tmp_path / "recuerdos")
    one, other = (visits.Visit(kept, threading.Lock(), None) for _ in range(2))
    try:
        visits.taught(one, "The capital of Zubrowka is", "Lutz", lambda step: None, *SAY)
        assert other.said == one.said == ["The capital of Zubrowka is => Lutz"]
        assert "Zubrowka" in (tmp_path / "recuerdos" / "engram_facts.json").read_text()
    finally:
        visits.forgotten(one, one.said)
    assert blank.facts == []


def test_stopping_and_beginning_again(two):
    visit = two[0]
    stream = visits.answered(visit, "Conversación", True, 1.0, 500, 1)
    visits.ask(visit, "one")
    next(stream)
    visits.ask(visit, "two")
    assert texts(next(stream))[::2] == ["one", "two"]  # a question that waits stands last
    visit.halt()
    shown = texts([*stream][-1])
    assert shown[0] == "one" and shown[-1] == "⏹️ Respuesta cortada." and "two" not in shown
    assert len(visit.chat.turns) == 2 and visit.chat.turns[1]["content"] == shown[1]  # what had been said is kept
    assert texts([*visits.answered(visit, *SAY)][-1]) == shown  # the turn of the question that was dropped
    assert len(answer_of(visit, "three")) == len(shown) + 3
    assert visits.begun_again(visit) == [] and visit.chat.turns == [] == visit.shown
    closed = visits.answered(visit, "Conversación", True, 1.0, 500, 1)
    visits.ask(visit, "four")
    next(closed)
    closed.close()  # as gradio does when the tab is closed
    assert visit.busy.acquire(timeout=30) and visit.chat.stop.is_set()


def test_what_goes_wrong_is_a_sentence_and_the_visit_lives_on(model, two, monkeypatch, capsys):
    visit = two[0]
    assert "❌ Tu mensaje es demasiado largo" in answer_of(visit, "palabra " * 900)[-1]
    with monkeypatch.context() as patched:
        errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("shape mismatch at layer 3")]
        patched.setattr(model, "generate", lambda *args, **kwargs: (_ for _ in ()).throw(errors.pop(0)))
        assert "Se agotó la RAM, o la memoria de la GPU" in answer_of(visit, "hola")[-1]
        note = answer_of(visit, "hola")[-1]
    assert "Ha fallado por dentro (RuntimeError)" in note and "shape" not in note  # that is for the terminal
    assert "shape mismatch at layer 3" in capsys.readouterr().err
    assert "Aún no has preguntado nada" in visits.compared(two[1], "", *SAY)[2]
    assert len(answer_of(visit, "hola")) == 9 and visits.compared(visit, "", *SAY)[0]


def test_comparing(two, tokenizer, model):
    with_memory, without, note = visits.compared(two[0], "hola", *SAY)
    alone = Chat(model, tokenizer, max_tokens=12, temperature=0, seed=0)
    assert with_memory == alone.answer("hola", lambda piece: None) and with_memory != without and not note
    assert two[0].shown == [] and two[0].chat.turns == []


class Inert(HTMLParser):
    """The elements of some HTML, its text, and what each span says: (text, gate, title, class)."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.spans = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag == "span"
        if self.inside:
            found = dict(attributes)
            self.spans.append(["", found["style"], found["title"], found.get("class")])

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.spans[-1][0] += text


def test_shades_are_the_gates_and_inert(model, tokenizer, two):
    visit = two[0]
    answer_of(visit, NASTY, "Código", True, 0, 40, 0)
    drawn, given, layers = Inert(visit.shown[-1]["content"]), visit.chat.given, model.config.engram_layer_ids
    assert drawn.tags <= {"details", "summary", "p", "div", "span", "table", "tbody", "tr", "td", "th"}
    gates, pieces = hooked(model, given.ids), given.pieces()
    assert len(pieces) > 20 and len(drawn.spans) == len(pieces) * len(layers)
    for i, layer in enumerate(layers):
        spans = drawn.spans[i * len(pieces) : (i + 1) * len(pieces)]
        assert "".join(text for text, *_ in spans) == given.text
        for (_, style, title, mark), (_, at) in zip(spans, pieces):
            assert style == f"--g:{gates[layer][at]:.2f}" and mark is None  # two decimals: float32 and its rounding
            read = tokenizer.decode(given.ids[0, at - 2 : at + 1]).translate(visits.VISIBLE)
            assert title == f"{gates[layer][at]:.2f} · {read}".replace(".", ",", 1)


# ----------------------------------------------------------------------------------------------------------------------
# Where it can be shown, and to whom
# ----------------------------------------------------------------------------------------------------------------------


def test_places_where_it_cannot_be_shown(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gradio"):
        page.check_place(False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    page.check_place(False)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    with pytest.raises(UserError, match=re.escape('main(["--pagina"])')):
        page.check_place(False)
    page.check_place(True)
    monkeypatch.setattr(page, "in_notebook", lambda: True)
    page.check_place(False)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(UserError, match="necesita --compartir"):
        page.check_place(False)
    page.check_place(True)


def test_colab_opens_its_own_window(monkeypatch):
    """As google.colab's documentation has it; Colab itself has not been tried."""
    ports = []
    output = types.SimpleNamespace(serve_kernel_port_as_window=ports.append)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(output=output))
    page.window(7860)
    assert ports == [7860]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--pagina", "70000"], "entre 1 y 65535"),
        (["--pagina", "x"], "no es un número entero"),
        (["--pagina", "--pregunta", "hola"], "no pueden ir juntos"),
        (["--compartir"], "--compartir acompaña a --pagina"),
        (["--pagina", "--dejar-aprender"], "--dejar-aprender a --compartir"),
    ],
)
def test_mistakes_are_spanish_sentences(capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        run_script(chat_script.main, arguments)
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_the_report_brings_its_pictures(tmp_path):
    (tmp_path / "cka.png").write_bytes(b"\x89PNG")
    (tmp_path / "informe.md").write_text("# Informe\n![cka](cka.png)\n![no](../cka.png)", encoding="utf-8")
    assert page.report_text(tmp_path) == "# Informe\n![cka](data:image/png;base64,iVBORw==)\n![no](../cka.png)"
