"""The page in the browser: visits by themselves, over HTTP, and in a real Chromium."""

import importlib.metadata
import io
import json
import re
import shutil
import sys
import threading
import time
import types
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import chat_phi_engram as chat_script
import helpers
from engram import page, triggers, visits
from engram.console import UserError, run_script
from engram.conversation import Chat
from engram.memories import remove_memory
from engram.opening import apart
from engram.trial import tokenizer_on_the_spot

SCRIPT = Path(chat_script.__file__)
NASTY = "<script>window.bad = 1</script><img src=x onerror='window.bad = 2'> ${window.bad = 3} {{bad}} **x** $$y$$"
SAY = ("Conversación", True, 0, 12, "0")  # mode, memory, temperature, length, seed


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_on_the_spot()


def made(tokenizer, **shape):
    shape = dict(max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, **shape)
    return helpers.make_model(vocab_size=len(tokenizer), **shape)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Never at its end by itself, and of plain characters alone: a browser shows no others as they are."""
    model = made(tokenizer)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    plain = [text.isascii() and text.replace("\n", "").isprintable() for text in texts]
    with torch.no_grad():
        model.lm_head.bias[~torch.tensor(plain)] = -100
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
    return [
        one["content"] if isinstance(one["content"], str) else unescape(one["content"]["text"]) for one in messages
    ]


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
        shown = answer_of(two[memory], "hola", "Conversación", memory, 0.8, 12, " 3 ")
        assert shown[0] == "hola" and shown[1] == said.rstrip("\n")
        assert len(shown) == 2 + memory  # with it, what it did
    assert model.model.use_memory


def test_visits_do_not_mix(blank, tokenizer):
    model = blank
    one, other = tabs(model, tokenizer)
    answer_of(one, "first tab")
    assert other.shown == [] and other.chat.turns == [] and len(one.chat.turns) == 2
    answer_of(other, "second tab", "Código", False, 0.5, 3, "")
    assert one.chat.memory and not one.chat.code and one.chat.seed == 0 and other.chat.seed is None
    steps = []
    said, note = visits.taught(one, "The capital of Zubrowka is", "Lutz", steps.append, *SAY)
    assert said == one.said == ["The capital of Zubrowka is => Lutz"] and "✅ Aprendido en" in note and steps
    assert other.said == [] and model.facts == []  # put on for its answer alone
    assert answer_of(one, "The capital of Zubrowka is")[-2] == "Lutz."
    assert 'class="r"' in one.shown[-1]["content"] and "lo que ha dicho un recuerdo" in one.shown[-1]["content"]
    assert not answer_of(other, "The capital of Zubrowka is")[-2].startswith("Lutz") and model.facts == []
    assert visits.forgotten(one, said) == ([], "Olvidado, sin dejar rastro.") and model.facts == []
    for prompt, answer, words in (("x", "", "Falta la respuesta"), ("x", "y", "demasiado corto")):
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
    visit, other = two
    visits.ask(other, "me too")
    stream = visits.answered(visit, "Conversación", True, 1.0, 500, "1")
    visits.ask(visit, "one")
    next(stream)
    visits.ask(visit, "two")
    assert texts(next(stream))[::2] == ["one", "two"]  # a question that waits stands last
    assert "Espera tu turno" in texts(other.view())[-1] and other.view()[0]["role"] == "user"
    visit.halt()
    shown = texts([*stream][-1])
    assert shown[0] == "one" and shown[-1] == "⏹️ Respuesta cortada." and "two" not in shown
    assert len(visit.chat.turns) == 2 and visit.chat.turns[1]["content"] == shown[1]  # what had been said is kept
    assert texts([*visits.answered(visit, *SAY)][-1]) == shown  # the turn of the question that was dropped
    assert len(answer_of(visit, "three")) == len(shown) + 3
    assert visits.begun_again(visit) == [] and visit.chat.turns == [] == visit.shown
    closed = visits.answered(visit, "Conversación", True, 1.0, 500, "1")
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
    assert "Semilla «x»" in answer_of(visit, "hola", *SAY[:4], "x")[-1]
    assert "Aún no has preguntado nada" in visits.compared(two[1], "", *SAY)[2]
    assert len(answer_of(visit, "hola")) == 11 and visits.compared(visit, "", *SAY)[0]


def test_the_model_works_in_threads_that_end(two):
    """Of each thread that stays torch keeps others, which slow the rest."""

    def interrupted():
        raise KeyboardInterrupt

    before, at_work = threading.active_count(), []
    two[0].attempt(print, lambda chat: at_work.append(threading.current_thread()))
    assert at_work[0] is not threading.current_thread() and not at_work[0].is_alive()
    assert threading.active_count() == before
    with pytest.raises(KeyboardInterrupt):
        apart(interrupted)
    assert apart(divmod, 7, 2) == (3, 1)


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
    answer_of(visit, NASTY, "Código", True, 0, 40, "0")
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
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for version, words in ((absent, "pip install gradio"), (lambda name: "5.50.0", "5.50.0: pip install -U gradio")):
        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(UserError, match=words):
            page.check_place(False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "6.31.0")
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


# ----------------------------------------------------------------------------------------------------------------------
# Served: over HTTP, as the page's own scripts ask
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    """served(model, tokenizer, **words): a page on 127.0.0.1, gone after the tests -> its Blocks."""
    pytest.importorskip("gradio", reason="pip install gradio")
    running = []

    def served(model, tokenizer, share=False, **words):
        first = Chat(model, tokenizer, max_tokens=12, temperature=0, seed=0)
        running.append(page.build(first, "prueba", **words))
        running[-1].login = page.launch(running[-1], share=share)
        return running[-1]

    yield served
    for blocks in running:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def blocks(served, model, tokenizer):
    return served(model, tokenizer)


@pytest.fixture(scope="module")
def url(blocks):
    return blocks.local_url.rstrip("/")


def events(url):
    """{name of the function: its number}."""
    import httpx

    found = httpx.get(f"{url}/config", timeout=60).json()["dependencies"]
    return {one["api_name"]: one["id"] for one in reversed(found)}


def asked(url, numbers, visitor, text, settings):
    """What a visitor's chatbot shows in the end."""
    import httpx

    with httpx.Client(base_url=f"{url}/gradio_api", timeout=120) as client:
        body = dict(session_hash=visitor, data=[None, text], fn_index=numbers["put"])
        assert client.post("/run/predict", json=body).status_code == 200
        body = dict(session_hash=visitor, data=[None, *settings], fn_index=numbers["stream"])
        assert client.post("/queue/join", json=body).status_code == 200
        with client.stream("GET", "/queue/data", params=dict(session_hash=visitor)) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {"msg": ""}
                if message["msg"] == "process_completed":
                    assert message["success"], message
                    said = [one["content"][0] for one in message["output"]["data"][0]]
                    return [unescape(one.get("text", "")) for one in said]


def test_twenty_visitors_at_once_lose_nothing(model, tokenizer, url):
    numbers, shown = events(url), {}
    alone = {}
    for i in range(20):
        chat = Chat(model, tokenizer, max_tokens=12, temperature=0)
        alone[i] = [chat.answer(f"question {i}", lambda piece: None), chat.answer("more", lambda piece: None)]

    def visit(i):
        for text in (f"question {i}", "more"):
            shown[i] = asked(url, numbers, f"visitor{i}", text, SAY)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for i in range(20):
        first, second = alone[i]
        assert shown[i] == [f"question {i}", first, "", "more", second, ""], i  # "": its gates


def test_no_file_can_be_read_or_left(url):
    import httpx

    for path in (SCRIPT, "README.md", "/etc/hostname"):
        assert httpx.get(f"{url}/gradio_api/file={path}", timeout=60).status_code in (403, 404)
    answer = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.txt", b"some text")}, timeout=60)
    assert answer.status_code >= 400


def test_a_public_link_asks_for_the_password(served, model, tokenizer, monkeypatch):
    """With gradio's tunnel pretended: nothing here leaves the machine."""
    import httpx
    from gradio import networking

    monkeypatch.setattr(networking, "setup_tunnel", lambda **words: "https://abc.gradio.live")
    shared = served(model, tokenizer, share=True, teach=False)
    assert shared.share_url == "https://abc.gradio.live"
    user, password = shared.login
    with httpx.Client(base_url=shared.local_url, timeout=60) as client:
        for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=a"):
            assert client.get(path).status_code == 401
        assert client.post("login", data=dict(username=user, password="x")).status_code == 400
        assert client.post("login", data=dict(username=user, password=password)).status_code == 200
        functions = {one["api_name"] for one in client.get("config").json()["dependencies"]}
    assert "stream" in functions and "teach" not in functions

    def fails(**words):
        raise RuntimeError("no way out")

    monkeypatch.setattr(networking, "setup_tunnel", fails)
    with pytest.raises(UserError, match="No se ha podido hacer el enlace público"):
        served(model, tokenizer, share=True)


def test_a_port_that_is_taken(blocks, model, tokenizer):
    other = page.build(Chat(model, tokenizer), "prueba")
    with pytest.raises(UserError, match=f"El puerto {blocks.server_port} está ocupado.*--pagina"):
        page.launch(other, blocks.server_port)


def test_the_command(model, tokenizer, tmp_path, monkeypatch, capsys):
    """It says where the page is, and Ctrl-C closes it."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("gradio", reason="pip install gradio")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen = []

    def sleep(seconds):
        seen.append(re.search(r"^Página: (http://127\.0\.0\.1:\d+) ", capsys.readouterr().out, re.M)[1])
        assert "Phi con memoria Engram" in httpx.get(seen[0], timeout=60).text
        raise KeyboardInterrupt

    def opened(*how):
        openers.append(threading.current_thread())
        return opening(*how)

    opening, openers = chat_script.open_for_chat, []
    monkeypatch.setattr(chat_script, "open_for_chat", opened)
    monkeypatch.setattr(page, "time", types.SimpleNamespace(sleep=sleep))
    assert chat_script.main(["--modelo", str(tmp_path), "--pagina"]) == 0
    assert capsys.readouterr().out == "Página cerrada.\n" and not openers[0].is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(seen[0], timeout=60)


# ----------------------------------------------------------------------------------------------------------------------
# In a browser
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A tab of its own; nothing that it asks for may be elsewhere than on this machine."""

    def __init__(self, chromium, url):
        self.context = chromium.new_context(locale="en-US")
        self.context.set_default_timeout(120_000)
        self.page, self.asked, self.errors = self.context.new_page(), set(), []
        self.page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))
        self.page.on("pageerror", lambda error: self.errors.append(error))
        with self.page.expect_response(lambda answer: "run/predict" in answer.url):
            self.page.goto(url)  # ready once it has asked for what it knows
        self.host = url.split("/")[2]

    def choose(self, mode="Conversación", memory=True, temperature=0, length=12, seed="0"):
        self.page.get_by_label(mode, exact=True).check()
        self.page.get_by_label("Memoria encendida").set_checked(memory)
        for label, value in (("Temperatura", temperature), ("Largo de la respuesta", length)):
            field = self.page.get_by_label(label).first
            field.fill(str(value))
            field.blur()
        self.page.fill("#semilla textarea, #semilla input", seed)

    def send(self, text):
        self.page.fill("#mensaje textarea", text)
        self.press("Enviar")

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def said(self):
        """The text of each message, character by character."""
        script = "all => all.map(one => one.textContent.trim())"
        return self.page.locator("#charla [data-testid=bot], #charla [data-testid=user]").evaluate_all(script)

    def waits(self, script, argument=None):
        self.page.wait_for_function(script, arg=argument)

    def waits_for_gates(self, n=1):
        self.waits("n => document.querySelectorAll('#charla .leido').length == n", n)

    def close(self):
        self.context.close()
        assert self.asked == {self.host} and not self.errors


@pytest.fixture
def tab(chromium, url):
    opened = []

    def tab(where=url):
        opened.append(Tab(chromium, where))
        return opened[-1]

    yield tab
    for one in opened:
        one.close()


@pytest.fixture
def slowly(model):
    """An answer takes long enough for a browser to come between, on any machine."""
    hook = model.model.register_forward_pre_hook(lambda *args: time.sleep(0.02))
    yield
    hook.remove()


LONG = "() => document.querySelector('#charla [data-testid=bot]')?.textContent.trim().length > 60"


def test_in_a_browser_an_answer_streams_and_is_the_terminals(
    model, tokenizer, tab, monkeypatch, capsys, slowly
):
    settings = dict(code=False, max_tokens=200, temperature=0.8, seed=7)
    lines = "memoria no\nhola\n"
    whole = in_the_terminal(model, tokenizer, monkeypatch, capsys, lines, **settings).strip()
    one = tab()
    assert one.page.evaluate("document.documentElement.lang") == "es"
    one.choose(memory=False, temperature=0.8, length=200, seed="7")
    one.send("hola")
    one.waits(LONG)
    partial = one.said()[1]
    one.waits("whole => document.querySelector('#charla [data-testid=bot]').textContent.trim() == whole", whole)
    assert len(partial) < len(whole) and whole.startswith(partial)
    assert one.said() == ["hola", whole] and one.page.locator(".leido").count() == 0


def test_in_a_browser_stop_stops_and_the_others_wait(tab, slowly):
    one, other = tab(), tab()
    for each in (one, other):
        each.choose(temperature=1, length=512)
    one.send("hola")
    one.waits(LONG)
    other.send("me too")
    other.waits("() => document.querySelector('#charla').textContent.includes('Espera tu turno')")
    one.press("Parar")
    one.waits("() => document.querySelector('#charla').textContent.includes('Respuesta cortada')")
    other.waits(LONG)  # its turn
    other.press("Parar")
    other.waits("() => document.querySelector('#charla').textContent.includes('Respuesta cortada')")
    assert one.said()[0] == "hola" and other.said()[0] == "me too" and not {*one.said()} & {*other.said()[:2]}
    other.press("Empezar de nuevo")
    other.waits("() => !document.querySelector('#charla [data-testid=user]')")


def test_in_a_browser_shades_are_the_gates(model, tokenizer, tab):
    one = tab()
    one.choose("Código", length=30)
    one.send("def f(x):\n    return")
    one.waits_for_gates()
    chat = Chat(model, tokenizer, code=True, max_tokens=30, temperature=0)
    said = chat.answer("def f(x):\n    return", lambda piece: None)
    pieces, gates = chat.given.pieces(), hooked(model, chat.given.ids)
    spans = one.page.locator("#charla .puertas span").evaluate_all(
        "all => all.map(one => [one.textContent, getComputedStyle(one).backgroundColor])"
    )
    assert len(spans) == len(pieces) * len(gates)
    for i, layer in enumerate(gates):
        part = spans[i * len(pieces) : (i + 1) * len(pieces)]
        assert "".join(text for text, _ in part) == said
        for (_, colour), (_, at) in zip(part, pieces):
            strength = float(re.search(r"([\d.]+)\)$", colour)[1])  # of rgba(46, 160, 67, 0.8 * gate)
            assert strength == pytest.approx(0.8 * gates[layer][at].item(), abs=0.01)  # written with two decimals
    assert one.page.locator("#charla .leido tr").count() >= len(pieces)


def test_in_a_browser_what_is_typed_is_text(tab):
    one = tab()
    one.choose("Código", length=20)
    one.send(f"  {NASTY}\n    &lt;b&gt;")
    one.waits_for_gates()
    assert one.said()[0] == f"{NASTY}\n    &lt;b&gt;"
    one.page.get_by_text("Comparar: con la memoria").click()
    one.page.fill("#pregunta textarea", NASTY)
    one.press("Comparar")
    one.waits("() => document.querySelector('#con textarea').value.length > 5")
    one.page.get_by_text("Recuerdos: dile algo").click()
    one.page.fill("#principio textarea", "x" * 3 + NASTY)
    one.page.fill("#respuesta textarea", NASTY * 9)
    one.press("Enseñar")
    one.waits("() => document.querySelector('#aprendido textarea, #aprendido input').value.startsWith('❌')")
    assert one.page.evaluate("window.bad") is None
    assert one.page.locator("#charla img, #charla script, #recuerdos img").count() == 0


def test_in_a_browser_facts_are_one_tabs_own(served, blank, tokenizer, tab):
    where = served(blank, tokenizer).local_url
    one, other = tab(where), tab(where)
    one.page.get_by_text("Recuerdos: dile algo").click()
    one.choose(seed="")
    one.page.fill("#principio textarea", "The capital of <b>Zubrowka is")
    one.page.fill("#respuesta textarea", "Lutz")
    one.press("Enseñar")
    one.waits("() => document.querySelector('#recuerdos').textContent.includes('of <b>Zubrowka is => Lutz')")
    for each in (one, other):
        each.choose(seed="")
        each.send("The capital of <b>Zubrowka is")
        each.waits_for_gates()
    assert one.said()[1] == "Lutz." and one.page.locator("#charla .puertas .r").count() > 0
    assert not other.said()[1].startswith("Lutz") and other.page.locator("#charla .puertas .r").count() == 0
    one.press("Olvidar todo")
    one.waits("() => !document.querySelector('#recuerdos').textContent.includes('Zubrowka')")
    one.send("The capital of <b>Zubrowka is")
    one.waits_for_gates(2)
    assert "Lutz." not in one.said()[3:] and blank.facts == []


def test_in_a_browser_errors_are_sentences(model, tab, monkeypatch):
    one = tab()
    one.choose()
    one.send("palabra " * 900)
    one.waits("() => document.querySelector('#charla').textContent.includes('Tu mensaje es demasiado largo')")
    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
        one.send("hola")
        one.waits("() => document.querySelector('#charla').textContent.includes('Se agotó la RAM')")
    one.send("hola")
    one.waits_for_gates()
