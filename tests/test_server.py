"""chat_phi_engram.py --servir: OpenAI's interface as its own client and Continue ask for it, alone and together."""

import json
import re
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import helpers
from bench import server as bench
from engram.conversation import Answer, Chat, begun
from engram.graft import CHAT_TEMPLATE
from engram.trial import tokenizer_on_the_spot

for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed")

ROOT = Path(__file__).resolve().parent.parent
KEY = "una llave"
PROMPT = "def area(radius):\n    return"


@pytest.fixture(scope="module")
def made():
    """A small model, and its tokenizer without a chat template, as Phi-1's."""
    tokenizer = tokenizer_on_the_spot()
    shape = dict(hidden_size=128, intermediate_size=256, n_embed_per_ngram=64, max_position_embeddings=256)
    model = helpers.make_model(
        tokenizer=tokenizer, vocab_size=len(tokenizer), engram_tokenizer_compression=True,
        eos_token_id=tokenizer.eos_token_id, **shape,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.bias[tokenizer.eos_token_id] = -100
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servido") / "mi-phi"
    for part in made:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recall(made, folder):
    """A folder with a fact, taught as in the chat."""
    kept = folder.parent / "recuerdos"
    Chat(*made, code=True, kept_in=kept).learn("La capital de Zubrowka es =>  Lutz", lambda step: None)
    made[0].set_facts([])
    return kept


@pytest.fixture(scope="module")
def served(folder):
    """(process, address, log) of a server that asks for no key."""
    with bench.serving(folder, "--max-tokens", "20", "--temperatura", "0") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(folder, recall):
    """Another, with a key, facts, and its rows on the disk."""
    flags = ("--clave-de", "LLAVE_DE_PRUEBA", "--recuerdos", str(recall), "--memoria", "disco", "--semilla", "3")
    with bench.serving(folder, *flags, LLAVE_DE_PRUEBA=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    import openai

    return openai.OpenAI(base_url=served[1], api_key="ninguna", max_retries=0)


def refusal(address, path, data, key=None, **headers):
    """HTTP status and OpenAI's error object of a request that is refused."""
    headers = {"Content-Type": "application/json", **headers} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(data).encode() if isinstance(data, dict) else data
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{address}/{path}", data, headers), timeout=60)
    error = json.load(caught.value)["error"]
    assert {"message", "type", "param", "code"} == error.keys()
    return caught.value.code, error


@torch.no_grad()
def greedy(made, prompt, n):
    """What the model says after a text, recomputed whole for each token."""
    model, tokenizer = made
    ids = start = tokenizer(prompt, return_tensors="pt").input_ids[:, n - 256 :]
    for _ in range(n):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokenizer.decode(ids[0, start.shape[1] :], clean_up_tokenization_spaces=False)


# ----------------------------------------------------------------------------------------------------------------------
# As OpenAI's client asks
# ----------------------------------------------------------------------------------------------------------------------


def test_completions(client, made):
    whole = client.completions.create(model="mi-phi", prompt=PROMPT, max_tokens=15, temperature=0)
    assert whole.choices[0].text == greedy(made, PROMPT, 15)
    assert whole.choices[0].finish_reason == "length" and whole.model == "mi-phi"
    prompt_tokens = len(made[1](PROMPT).input_ids)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt_tokens, 15)
    pieces = list(client.completions.create(model="mi-phi", prompt=PROMPT, max_tokens=15, temperature=0, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text and len(pieces) > 3
    assert pieces[-1].choices[0].finish_reason == "length" and pieces[-1].usage == whole.usage


def test_chat_says_what_the_chat_says(client, made):
    turns = [{"role": "user", "content": "hola"}, {"role": "assistant", "content": "sí"}]
    chat = Chat(*made, max_tokens=20, temperature=0)
    chat.turns = turns
    said = chat.answer("¿Qué es una lista?", lambda piece: None)
    messages = [*turns, {"role": "user", "content": [{"type": "text", "text": "¿Qué es una lista?"}]}]
    whole = client.chat.completions.create(model="mi-phi", messages=messages)
    assert whole.choices[0].message.content == said
    stream = client.chat.completions.create(model="mi-phi", messages=messages, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == said


def test_what_does_not_fit_goes_from_the_front(client, made):
    tokens = len(made[1](long := PROMPT * 60).input_ids)
    said = client.completions.create(model="mi-phi", prompt=long, max_tokens=10**6, temperature=0)
    assert said.usage.prompt_tokens == 128 < tokens and said.usage.completion_tokens == 128  # half of the 256 for each
    said = client.completions.create(model="mi-phi", prompt=long, max_tokens=6, temperature=0)
    assert said.choices[0].text == greedy(made, long, 6) and said.usage.prompt_tokens == 250
    messages = [{"role": "user", "content": text} for text in ("a " * 300, "b")]
    said = client.chat.completions.create(model="mi-phi", messages=messages)
    alone = client.chat.completions.create(model="mi-phi", messages=messages[1:])
    assert said.choices == alone.choices and said.usage == alone.usage


@pytest.mark.parametrize("stream", [False, True])
def test_stops_are_no_part_of_the_answer(client, made, stream):
    whole = greedy(made, PROMPT, 20)
    for stop in (whole[7:9], whole[12:19], whole[:2], [whole[11:14], "never", whole[4:6]]):
        asked = dict(model="mi-phi", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop, stream=stream)
        said = client.completions.create(**asked)
        text = "".join(piece.choices[0].text for piece in said) if stream else said.choices[0].text
        stops = [stop] if isinstance(stop, str) else stop
        assert text == whole[: min(whole.index(one) for one in stops if one in whole)]


def test_a_stop_is_withheld_from_its_first_character(made):
    """What has been shown is never more than what the answer is in the end."""
    tokenizer, shown = made[1], []
    assert begun("if x:\n", ["\n\n", "/src/"]) == 1 and begun("a/sr", ["/src/"]) == 3 and begun("a", ["b"]) == 0
    text = "import os\nx = 1 # end of all\n\ny"
    ids = tokenizer(text, return_tensors="pt").input_ids
    for stop, expected in (("# end of all", "import os\nx = 1 "), ("\n\n", text[:-3]), ("# end of it", text)):
        shown.clear()
        answer = Answer(tokenizer, ids[:, :0], True, shown.append, stops=[stop])
        for length in range(1, ids.shape[1] + 1):
            if answer(ids[:, :length], None).any():
                break
        assert answer.finish() == "".join(shown) == expected


def test_seeds_and_temperatures(client):
    def said(**asked):
        return client.completions.create(model="mi-phi", prompt=PROMPT, max_tokens=12, **asked).choices[0].text

    cold, hot = said(), {said(temperature=2, seed=seed) for seed in (1, 2, 1, 2)}  # the server's own temperature is 0
    assert len(hot) == 2 and cold not in hot and said(temperature=2, top_p=0, seed=1) == cold
    assert said(temperature=0.01, seed=1) == said(temperature=0.001) == cold


def test_models_and_another_name(client, served):
    assert [model.id for model in client.models.list()] == ["mi-phi"]
    for _ in range(2):
        said = client.completions.create(model="gpt-4", prompt=PROMPT, max_tokens=2, temperature=0)
        assert said.model == "mi-phi"
    assert served[2].read_text(encoding="utf-8").count("Piden el modelo «gpt-4»; responde «mi-phi»") == 1


# ----------------------------------------------------------------------------------------------------------------------
# As an editor asks
# ----------------------------------------------------------------------------------------------------------------------


def test_continue_completes_code(served, made):
    """The request of Continue (core/llm/llms/OpenAI.ts, core/autocomplete/templating) with the README's config.yaml."""
    import yaml

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (model,) = yaml.safe_load(re.search(r"```yaml\n(.*?)```", readme, re.S)[1])["models"]
    assert model["provider"] == "openai" and model["roles"] == ["autocomplete"]
    assert model["apiBase"] == "http://127.0.0.1:8765/v1"
    prefix = "\n# proyecto/areas.py\n" + PROMPT  # it puts the file's name before the prefix
    template, options = model["promptTemplates"]["autocomplete"], model["defaultCompletionOptions"]
    body = {
        "model": model["model"], "max_tokens": options["maxTokens"], "temperature": options["temperature"],
        "stream": True, "stop": ["\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```"],
        "prompt": template.replace("{{{prefix}}}", prefix),
    }  # fmt: skip
    assert body["prompt"] == prefix
    request = urllib.request.Request(f"{served[1]}/completions", json.dumps(body).encode())
    for name, value in {"Content-Type": "application/json", "Authorization": "Bearer undefined", "api-key": ""}.items():
        request.add_header(name, value)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.read().decode().split("\n\n") if line]
    text = "".join(json.loads(line)["choices"][0].get("text", "") for line in lines[:-1])
    assert lines[-1] == "[DONE]" and text == greedy(made, prefix, options["maxTokens"]).partition("\n\n")[0] != ""


def test_a_key_facts_and_rows_on_the_disk(guarded, made):
    process, address, log = guarded
    for key in (None, "otra", "ñ"):
        status, error = refusal(address, "completions", {"prompt": "x"}, key and key.encode().decode("latin-1"))
        assert status == 401 and error["code"] == "invalid_api_key" and "Bearer" in error["message"]
    assert refusal(address, "models", None)[0] == 401
    asked = dict(key=KEY, max_tokens=8, temperature=0)
    fact = bench.ask(address, "completions", prompt="x = 1\nLa capital de Zubrowka es", stop="\n", **asked)
    assert bench.text_of(fact) == " Lutz"
    for seed in range(20):  # where a fact speaks nothing is drawn
        warm = dict(asked, temperature=2, seed=seed, prompt="La capital de Zubrowka es")
        assert bench.text_of(bench.ask(address, "completions", **warm)).startswith(" Lutz")
    said = bench.text_of(bench.ask(address, "completions", prompt=PROMPT, **asked))
    assert said == greedy(made, PROMPT, 8)
    hot = dict(key=KEY, prompt=PROMPT, max_tokens=8, temperature=2)
    assert len({bench.text_of(bench.ask(address, "completions", **hot)) for _ in range(2)}) == 1  # --semilla
    assert "con llave" in log.read_text(encoding="utf-8") and KEY not in log.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# At once
# ----------------------------------------------------------------------------------------------------------------------


def test_eight_clients_at_once(served):
    process, address, _ = served
    bench.crowd(address, process.pid, 1)  # what is taken once
    times, wrong, errors, memory = bench.crowd(address, process.pid, 10)
    assert len(times) >= 8 and not wrong and not errors
    assert memory[-1] - memory[0] < 8e6  # bytes; the model's own come to 9e6


@contextmanager
def inside(made):
    """A server in a thread of this process. Yields its port and its OneModel, whose notes are in a list."""
    from engram import server as room

    models = room.OneModel("mi-phi", Chat(*made, True, 128, 1.0), [].append)
    running = room.Server(room.uvicorn.Config(room.make_app(models, None), log_level="critical"))
    running.models = models
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0)), listening.listen()
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1], models
        finally:
            running.should_exit = True
            thread.join(60)


def test_who_leaves_is_not_answered_on(made, monkeypatch):
    """A closed stream ends its answer at the next token, and the next one in the queue is served."""
    from engram.server import Job

    left, answer = [], Job.answer

    def watched(job, *arguments):
        try:
            return answer(job, *arguments)
        except Exception as error:
            left.append(error)
            raise

    monkeypatch.setattr(Job, "answer", watched)
    with inside(made) as (port, _):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 128, "temperature": 0, "stream": True})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert line.recv(10)
        said = bench.ask(f"http://127.0.0.1:{port}/v1", "completions", prompt=PROMPT, max_tokens=4, temperature=0)
    assert bench.text_of(said) == greedy(made, PROMPT, 4) and len(left) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, and the end
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("completions", b"{", "objeto JSON"),
        ("completions", {"prompt": 3}, "«prompt»"),
        ("completions", {"prompt": ["a", "b"]}, "un texto en cada petición"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "«max_tokens»: 0 no vale"),
        ("completions", {"prompt": "x", "max_tokens": "9"}, "«max_tokens»: '9' no vale"),
        ("completions", {"prompt": "x", "temperature": -1}, "«temperature»: -1 no vale; se admite un número de 0 a 2"),
        ("completions", {"prompt": "x", "top_p": True}, "«top_p»"),
        ("completions", {"prompt": "x", "frequency_penalty": -1}, "«frequency_penalty»"),
        ("completions", {"prompt": "x", "seed": 2**70}, "«seed»"),
        ("completions", {"prompt": "x", "stop": 4}, "«stop»"),
        ("completions", {"prompt": "x", "n": 2}, "«n»: 2 no se admite"),
        ("completions", {"prompt": "x", "suffix": ")"}, "rellenar huecos"),
        ("chat/completions", {}, "«messages»"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "«messages»"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "«messages»"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "«tools»"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a " * 300}]}, "demasiado largo"),
    ],
)
def test_errors_are_openai_s_in_spanish(served, path, body, words):
    status, error = refusal(served[1], path, body)
    assert status == 400 and words in error["message"] and error["type"] == "invalid_request_error"
    assert ("context_length_exceeded" == error["code"]) == ("largo" in words)


def test_nothing_else_is_served(served):
    """Not the paths of transformers' server that load, drop or list models, nor its pages, nor another's name."""
    for path in ("../load_model", "../reset", "responses", "nada", "systemone"):
        status, error = refusal(served[1], path, {"model": "microsoft/phi-1"})
        assert status == 404 and "/v1/completions" in error["message"]
    assert refusal(served[1], "../docs", None)[0] == refusal(served[1], "../openapi.json", None)[0] == 404
    status, error = refusal(served[1], "models", None, Host="malo.example:80")
    assert status == 403 and "malo.example" in error["message"]
    port = int(re.search(r":(\d+)/", served[1])[1])
    heard = [line.split()[1] for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    assert [address for address in heard if address.endswith(f":{port:04X}")][0] == f"0100007F:{port:04X}"  # 127.0.0.1


@pytest.mark.parametrize(
    ("error", "status", "words"), [("CUDA out of memory", 503, "Se agotó"), ("x", 500, "Error interno")]
)
def test_an_error_within_is_told_and_the_server_lives_on(made, monkeypatch, error, status, words):
    """In a stream too, whose status is sent already, as OpenAI's client understands it."""

    def broken(*_, **__):
        raise RuntimeError(error)

    with inside(made) as (port, models):
        address, notes = f"http://127.0.0.1:{port}/v1", models.note.__self__
        with monkeypatch.context() as patch:
            patch.setattr(made[0], "generate", broken)
            refused = refusal(address, "completions", {"prompt": PROMPT})
            said = bench.ask(address, "completions", prompt=PROMPT, stream=True)
        assert refused[0] == status and words in refused[1]["message"] and refused[1]["type"] == "server_error"
        assert said == [{"error": refused[1]}, "[DONE]"] and len(notes) == 1 and words in notes[0]
        after = bench.ask(address, "completions", prompt=PROMPT, max_tokens=4, temperature=0)
    assert bench.text_of(after) == greedy(made, PROMPT, 4)


def test_ctrl_c_ends_it_while_it_answers(folder):
    with bench.serving(folder) as (process, address, log):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 128, "stream": True}).encode()
        request = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        said = log.read_text(encoding="utf-8")
    assert said.endswith("Servidor cerrado.\n") and "Traceback" not in said and "Error" not in said


def test_flags_that_do_not_go_together(capsys, monkeypatch):
    import chat_phi_engram as chat_script

    monkeypatch.delenv("NO_HAY", raising=False)
    for words, said in (
        (["--servir", "--codigo"], "no va con --codigo"),
        (["--servir", "--pregunta", "x"], "no va con --codigo ni con --pregunta"),
        (["--servir", "--pagina"], "--servir y --pagina no van juntos"),
        (["--clave-de", "PATH"], "--clave-de solo vale con --servir"),
        (["--servir", "--clave-de", "NO_HAY"], "export NO_HAY="),
        (["--servir", "abc"], "no es un número entero"),
    ):
        with pytest.raises(SystemExit) as ended:
            chat_script.main(words)
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_port_that_is_taken(served, made):
    from engram.console import UserError
    from engram.server import serve

    for port in (int(re.search(r":(\d+)/", served[1])[1]), 70000):
        with pytest.raises(UserError, match=f"--servir {port}: ese puerto está ocupado o no se puede usar"):
            serve(*made, "mi-phi", port, print)


def test_without_the_packages_it_says_which(monkeypatch):
    from engram.console import UserError

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "engram.server", raising=False)
    with pytest.raises(UserError, match=r'pip install -U "transformers\[serving\]"') as missing:
        import engram.server  # noqa: F401
    assert "uvicorn" in str(missing.value) and CHAT_TEMPLATE
