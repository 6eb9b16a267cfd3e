"""chat_phi_engram.py: prompts, streaming, stopping, context, commands, code mode, and a real terminal."""

import fcntl
import functools
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

import chat_phi_engram as chat_script
from chat_phi_engram import Chat, run_chat
from engram.console import run_script
from engram.conversation import repeats, suited
from engram.drawing import bars, shaded, side_by_side
from engram.graft import CHAT_TEMPLATE
from engram.opening import is_toy
from engram.orders import advice, leaves_block, meant, order
from engram.trial import tokenizer_on_the_spot
from phi1_engram import CACHE

SCRIPT = Path(chat_script.__file__)


@pytest.fixture(scope="module")
def tokenizer():
    """Small, and without a chat template, as Phi-1's."""
    return tokenizer_on_the_spot()


@pytest.fixture(scope="module")
def model(make_model, tokenizer):
    # The stop token out of the way: random weights would end some answers at once.
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():
        model.lm_head.bias[tokenizer.eos_token_id] = -100
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())  # room for an answer long enough to be cut
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def says(monkeypatch, model, tokenizer):
    """says(text, ...): the model's next answers, token by token, whatever it is asked. Returns the steps taken."""

    def says(*texts, end=True):
        scripts = [tokenizer(text).input_ids + [tokenizer.eos_token_id] * end for text in texts]
        forward, steps = model.forward, []

        @functools.wraps(forward)
        def forced(*args, **kwargs):
            output = forward(*args, **kwargs)
            cache = kwargs.get(CACHE)
            if cache.get_seq_length() == kwargs["input_ids"].shape[1]:  # the prompt
                steps.append(0)
            output.logits.fill_(-100)
            output.logits[:, -1, scripts[len(steps) - 1][steps[-1]]] = 100
            steps[-1] += 1
            return output

        monkeypatch.setattr(model, "forward", forced)
        return steps

    return says


@pytest.fixture
def piped(monkeypatch, capsys, model, tokenizer):
    """piped(lines, **settings): run_chat with these lines on a standard input that is no terminal -> stdout, stderr."""

    def piped(lines, **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        run_chat(model, tokenizer, **{"max_tokens": 12, "temperature": 0, "code": False, **settings})
        output = capsys.readouterr()
        return output.out, output.err

    return piped


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@torch.no_grad()
def greedy_ids(model, tokenizer, prompt, n):
    """The tokens that follow `prompt` [1, T], recomputed whole for each, without cache, `generate` or chat."""
    ids = prompt
    for _ in range(n):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
        if best.item() == tokenizer.eos_token_id:
            break
    return ids[:, prompt.shape[1] :]


def greedy(model, tokenizer, prompt, n):
    """What the model says after the text `prompt`."""
    ids = greedy_ids(model, tokenizer, tokenizer(prompt, return_tensors="pt").input_ids, n)
    return tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ----------------------------------------------------------------------------------------------------------------------
# Prompt and context
# ----------------------------------------------------------------------------------------------------------------------


def test_prompt_is_the_chat_template(model, tokenizer):
    turns = [user("¿Qué es una lista?"), assistant("Una colección."), user("¿Y un dict?")]
    ids, kept = Chat(model, tokenizer, max_tokens=20).fit(turns)
    prompt = "User: ¿Qué es una lista?\nAssistant: Una colección.\nUser: ¿Y un dict?\nAssistant:"
    assert tokenizer.decode(ids[0]) == prompt
    theirs = tokenizer.apply_chat_template(
        turns, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.equal(ids, theirs["input_ids"]) and kept == turns


def test_a_tokenizer_with_a_template_keeps_it(monkeypatch, model, tokenizer):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[-1]['content'] }}?")
    ids, _ = Chat(model, tokenizer).fit([user("abc")])
    assert tokenizer.decode(ids[0]) == "abc?"


def test_the_oldest_turns_make_room(model, tokenizer):
    chat = Chat(model, tokenizer, max_tokens=40, temperature=0)
    for i in range(6):
        chat.turns += [user(f"question number {i}"), assistant(f"answer number {i}")]
    asked = chat.turns + [user("the last question")]
    ids, kept = chat.fit(asked)
    assert ids.shape[1] + 40 <= 128
    assert 1 < len(kept) < len(asked) and kept == asked[-len(kept) :] and kept[0]["role"] == "user"
    more, _ = Chat(model, tokenizer, max_tokens=1).fit(asked[-len(kept) - 2 :])
    assert more.shape[1] + 40 > 128  # one turn more would not have fitted
    chat.answer("the last question", lambda piece: None)
    assert chat.turns[:-1] == kept and chat.forgotten == len(asked) - len(kept)


def test_a_question_longer_than_the_context(piped):
    out, err = piped("hola\n" + "palabra " * 200 + "\n")
    assert out.count("\n") >= 2 and "❌ Tu mensaje es demasiado largo" in err and "--max-tokens" in err


def test_answers_never_outgrow_half_the_context(model, tokenizer):
    assert Chat(model, tokenizer, max_tokens=5000).max_tokens == 64


def test_conversation_equals_recomputation(model, tokenizer):
    chat = Chat(model, tokenizer, max_tokens=10, temperature=0)
    first = chat.answer("hola", lambda piece: None)
    assert first == greedy(model, tokenizer, "User: hola\nAssistant:", 10).strip()
    second = chat.answer("otra", lambda piece: None)
    prompt = f"User: hola\nAssistant: {first}\nUser: otra\nAssistant:"
    assert second == greedy(model, tokenizer, prompt, 10).strip()


def test_seed(model, tokenizer):
    def say(seed):
        chat = Chat(model, tokenizer, max_tokens=10, temperature=5.0, seed=seed)
        return chat.answer("hola", lambda piece: None)

    assert say(1) == say(1) != say(2)


# ----------------------------------------------------------------------------------------------------------------------
# Streaming and stopping
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generated, shown",
    [
        (" A list holds things.\nUser: and a dict?\nAssistant: yes", "A list holds things."),
        (" one\n\nUser:", "one"),
        (" one\nAssistant: two", "one"),
        (" User: me again", ""),
        ("\nUser: me again", ""),
        (" the User: field\nUsers: many\nUser", "the User: field\nUsers: many\nUser"),
        (" ñandú 你好 👍 done", "ñandú 你好 👍 done"),
        ("  spaces  and\n\n  lines \n", "spaces  and\n\n  lines"),
    ],
)
def test_streams_words_and_stops_where_the_user_begins(model, tokenizer, says, generated, shown):
    assert len(tokenizer("\nUser:").input_ids) > 2  # so the stop comes in pieces
    steps, pieces = says(generated), []
    chat = Chat(model, tokenizer, max_tokens=60)
    assert chat.answer("hola", pieces.append) == "".join(pieces) == shown
    assert "\ufffd" not in "".join(pieces)
    assert chat.turns == ([user("hola"), assistant(shown)] if shown else [])
    if "\nUser:" in generated:  # nothing is computed once the answer is over
        assert steps == [len(tokenizer(generated[: generated.index("User:") + 5]).input_ids)]
    seen = ""
    for piece in filter(None, pieces):
        seen += piece
        assert shown == seen or shown[len(seen)].isspace()  # whole words only
    assert len([piece for piece in pieces if piece]) >= len(shown.split()) - 1


def test_stops_at_every_stop_token(monkeypatch, model, tokenizer, says):
    until = tokenizer(" yes stop").input_ids
    monkeypatch.setattr(model.generation_config, "eos_token_id", [until[-1]])
    steps = says(" yes stop more", " no")  # the second ends with the tokenizer's own
    chat = Chat(model, tokenizer)
    for _ in range(2):
        chat.answer("a", lambda piece: None)
    assert steps == [len(until), len(tokenizer(" no").input_ids) + 1]


# ----------------------------------------------------------------------------------------------------------------------
# Commands, modes, piped input
# ----------------------------------------------------------------------------------------------------------------------


def test_piped_conversation(piped, says):
    says(" uno", " dos", " tres\nUser:")
    out, err = piped("hola\n\nayuda\nLIMPIAR\n¿sí?\nadiós\nsalir\nnunca\n")
    assert out == "uno\ndos\ntres\n"
    assert "limpiar        olvidar" in err and "Conversación olvidada" in err


def test_commands(monkeypatch, piped):
    asked = []

    def answer(chat, text, write):
        asked.append((chat.code, text, len(chat.turns)))
        chat.turns += [user(text), assistant("x")]
        return "x"

    monkeypatch.setattr(Chat, "answer", answer)
    _, err = piped("a\n b \nCódigo\ndef f():\n\n    x = 1\n\n---\nlimpiar\n  y\ncharla\n---\n charla\nc")
    code = [(True, "def f():\n\n    x = 1", 4), (True, "  y\ncharla", 0)]
    assert asked == [(False, "a", 0), (False, "b", 2), *code, (False, "c", 2)]
    assert "Modo código" in err and "Modo charla" in err


def test_orders_from_a_pipe(model, tokenizer, piped):
    oracle = Oracle(model, tokenizer, 12)
    out, err = piped("hola\nmemoria no\notra\nmemoria si\ncomparar hola\nmemoria ver\n")
    expected = [oracle.says("hola"), oracle.says("otra", memory=False)]
    both = [oracle.says("hola", memory=memory, keep=False) for memory in (True, False)]
    expected.append("CON MEMORIA\n{}\n\nSIN MEMORIA\n{}\n".format(*both))
    assert out.startswith("\n".join(expected)) and "    1 " in out[len("\n".join(expected)) :]
    assert "\x1b" not in out + err and "Memoria apagada" in err and "Memoria encendida" in err
    assert model.model.use_memory  # left as it was


def test_a_piped_block_of_code_is_one_question(piped, says):
    """Blank lines are a part of it, and the help says what ends it."""
    says(" a", " b")
    out, err = piped("ayuda\ndef f():\n    x = 1\n\n\n    y = 2\n---\n\ndef g():\n\n    return", code=True)
    assert out == " a\n b\n" and "una línea que solo tenga «---»" in err


@pytest.mark.parametrize(
    "text, wish",
    [
        ("memria ver", "memoria ver"), ("Memorai sí", "memoria sí"), ("salr", "salir"), ("limipar", "limpiar"),
        ("temperatur 0,5", "temperatura 0,5"), ("siguient import numpy", "siguiente import numpy"),
        ("comprar", "comparar"), ("aprend a => b", "aprende a => b"), ("olvid todo", "olvida todo"),
        ("ayuda", None), ("memoria del programa", None), ("memorias del programa", None), ("salid ya", None),
        ("compara = 3", None), ("¿comparar dos listas?", None),
        ("exitt", "exit"), ("quti", "quit"), ("hepl", "help"), ("exist nothing", None),
        ("aprend a programar", None), ("temperaturas altas", None), ("hola", None), ("", None),
        ("aprende a=>b c", "aprende a => b c"), ("Aprende a b -> c", "aprende a b => c"),
        ("aprende a→b", "aprende a => b"), ("/aprende a->b", "aprende a => b"),
        ("aprende Python conmigo", None), ("aprende = 3", None),
        ("aprende =>", "aprende PRINCIPIO => RESPUESTA"), ("aprende => Lutz", "aprende PRINCIPIO => RESPUESTA"),
        ("aprende Lutz =>", "aprende PRINCIPIO => RESPUESTA"), ("aprende a b = c", "aprende a b => c"),
        ("Borra 1", "olvida 1"), ("olvida2", "olvida 2"), ("elimina todo", "olvida todo"), ("¡Adiós!", "salir"),
        ("apaga la memoria", "memoria no"), ("Enciende la memoria.", "memoria sí"), ("borra la lista", None),
    ],
)  # fmt: skip
def test_a_line_one_letter_away_from_an_order(text, wish):
    assert meant(text) == wish


def test_the_words_of_other_programs_are_understood():
    assert [order(word)[0] for word in ("exit", "QUIT", "help", "exit()", "Salir")] == ["salir"] * 2 + [
        "ayuda", "salir", "salir"
    ]  # fmt: skip
    assert order("help me with lists") == ("", "help me with lists")
    known = "/salir", "/ayuda", "salir()", "Salir.", "¡ayuda!", "/Limpiar", "/olvida 2", "/help"
    assert [order(text)[0] for text in known] == [
        "salir", "ayuda", "salir", "salir", "ayuda", "limpiar", "olvida", "ayuda"
    ]  # fmt: skip
    assert [order(text)[0] for text in ("limpiar()", "/tmp", "/", "()", "codigo.")] == [""] * 5


def test_an_order_typed_into_a_block_of_code_is_one():
    assert all(map(leaves_block, ("salir", "Ayuda", "/charla", "olvida 1", "recuerdos", "código", "salir.", "¡Ayuda!")))
    code = "exit()", "quit()", "    salir", "memoria", "limpiar()", "temperatura", "salir = 1", "comparar(a, b)", ""
    assert not any(map(leaves_block, code))


def test_code_is_completed_raw(model, tokenizer, piped, says):
    prompt = "def f(x):\n    return"
    expected = greedy(model, tokenizer, prompt, 12)
    assert piped("hola\ncodigo\n" + prompt + "\n\n")[0].endswith(expected + "\n")
    assert piped(prompt, code=True)[0] == expected + "\n"
    says("\n    x\n\nUser: 3  ")
    assert piped("def g():", code=True)[0] == "\n    x\n\nUser: 3  \n"


def test_long_code_keeps_its_end(monkeypatch, model, tokenizer):
    text = "\n".join(f"x{i} = {i}" for i in range(100))
    prompts = []
    monkeypatch.setattr(model, "generate", lambda ids, **kwargs: prompts.append(ids))
    Chat(model, tokenizer, code=True, max_tokens=28).answer(text, lambda piece: None)
    assert prompts[0].tolist() == [tokenizer(text).input_ids[-100:]]


def test_undecodable_bytes(piped):
    out, _ = piped("hola \udcff\n")
    assert out.strip()


def test_ids_that_mean_nothing(make_model, tokenizer):
    model = make_model(vocab_size=len(tokenizer) + 50)
    with torch.no_grad():
        model.lm_head.bias[len(tokenizer) + 7] = 1000
    assert Chat(model, tokenizer, max_tokens=5).answer("hola", lambda piece: None) == ""


def test_a_toy_is_called_one_and_completes_code(model, monkeypatch, tmp_path):
    assert is_toy(model) and suited(model, None, None) == (True, 0.6)
    assert suited(model, False, 0.1) == (False, 0.1)
    assert "modelo de juguete" in advice(model) and "siguiente def __init__(" in advice(model)
    (tmp_path / "entrenamiento.jsonl").write_text('{"demo": {"library": "sympy", "prompt": "x = Differen"}}')
    monkeypatch.setattr(model, "name_or_path", str(tmp_path))
    first, second = advice(model).splitlines()[-2:]  # what cannot babble before what can
    assert first.startswith("   Prueba: siguiente x = Differen  ")
    assert second.startswith("   Y:      comparar x = Differen  ")
    monkeypatch.setattr("engram.opening.TOY", 1000)  # now it is no toy
    assert not is_toy(model) and suited(model, None, None) == (False, 0.2) and suited(model, True, None)[0]
    assert advice(model).startswith("Consejo: Phi-1 es un modelo base")
    monkeypatch.setattr(model.config, "tokenizer_name_or_path", "microsoft/phi-2")
    assert advice(model).startswith("Consejo: este Phi es") and "--cuantizar int8" in advice(model)
    monkeypatch.setattr(model, "is_quantized", True, raising=False)
    assert "--cuantizar" not in advice(model)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\n#\n#\n#\n#\n#\n#\n#", "\n#\n#\n#\n#\n"),
        (" x\n\n\n\n\n\n\n y", " x\n\n\n\n\n"),
        ("\na\nb\na\nb\na\nb\na\nb\na\nb", "\na\nb\na\nb\na\nb\na\nb\n"),
        ("\n#\n#\n#\n##\n#\n#\n#\nend", None),
        ("\n    x\n  x\n x\nx\nend", None),
    ],
)
def test_an_answer_that_repeats_itself_is_cut(piped, says, text, shown):
    says(text)
    out, err = piped("def f():", code=True, max_tokens=60)
    assert out.rstrip("\n") == (text if shown is None else shown).rstrip("\n")
    assert ("Repetía lo mismo" in err) == (shown is not None)


@pytest.mark.parametrize(
    "unit, most", [("#", 2), ("0, ", 4), ("x    ", 6), ("x" * 39 + ",", 41), ("a\nb\nc\nd\ne\n", 12)]
)
def test_a_text_that_goes_round_within_a_line_repeats(unit, most):
    """At 160 characters of it, four times the longest text looked for, and not before."""
    text = "x = [1]\n" + unit * 200
    first = next(n for n in range(len(text)) if repeats(text[:n]))
    assert 160 <= first <= 168 + most
    assert not any(repeats(("x = " + "#" * 79 + "\n")[:n]) for n in range(85))  # a ruler is code
    assert not repeats("x" + " " * 300)
    assert not repeats(", ".join(map(str, range(100)))) and not repeats(("x" * 40 + ",") * 20)


def test_the_likeliest_next_tokens(model, tokenizer, piped):
    text = "def f(x):\n    return"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = {}
    for memory in (True, False):
        model.model.use_memory = memory
        chances = model(ids).logits[0, -1].softmax(-1)
        model.model.use_memory = True
        values, tokens = chances.topk(5)
        expected[memory] = [(tokenizer.decode([t]), v) for t, v in zip(tokens.tolist(), values.tolist())]
    chat = Chat(model, tokenizer)
    found = chat.likeliest(text)
    for memory, likely in expected.items():
        assert [token for token, _ in found[memory]] == [token for token, _ in likely]
        # float32, the same sums with and without a cache's mask: rounding alone
        assert [v for _, v in found[memory]] == pytest.approx([v for _, v in likely], abs=1e-5)
    assert chat.turns == [] and chat.question is None and model.model.use_memory
    out, err = piped("Siguiente def f(x):\\n    return\n")
    longest = max(chance for likely in found.values() for _, chance in likely)
    assert out == f"CON MEMORIA\n{bars(found[True], longest)}\n\nSIN MEMORIA\n{bars(found[False], longest)}\n"
    assert "\x1b" not in out and not err.startswith("❌")
    assert "Escribe detrás el texto" in piped("siguiente\n")[1]


def test_equal_lines_are_drawn_once():
    pieces = [(text, 5 + i) for i, text in enumerate(["a\n", "#\n", "#\n", "#\n", "b\n", "b"])]
    gates, facts = {1: [0.35] * 20}, [False] * 20
    drawn = shaded(pieces, gates, facts, 40, colour=False).split("\n")
    texts = [line[6:].strip() for line in drawn if not line.startswith("    1 ")]
    assert texts == ["a", "#", "(la misma línea, 2 veces más)", "b", "(la misma línea, 1 vez más)"]


def test_bars_fit_twice_into_sixty_columns():
    likely = [(" numpy", 0.75), ("\n", 0.5), ("a_very_long_token", 0.001), ("", 1.0)]
    lines = bars(likely, 1.0).split("\n")
    assert max(map(len, lines)) == 28 and lines[0].startswith("' numpy'") and "75,0 %" in lines[0]
    assert [line.count("█") for line in lines] == [4, 3, 1, 6]
    assert lines[1].startswith("'\\n'") and "..." in lines[2] and lines[3].startswith("(sin texto)")
    rows = side_by_side("\n".join(lines), "\n".join(lines), 60).split("\n")
    assert len(rows) == 4 and max(map(len, rows)) <= 60 and all(row.count("%") == 2 for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# When it goes wrong
# ----------------------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu", "python"])
def test_out_of_memory_and_the_chat_lives_on(monkeypatch, model, piped, error):
    expected, _ = piped("dos\n")
    generate, failures = model.generate, [error]

    def fails_once(*args, **kwargs):
        if failures:
            raise failures.pop()
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", fails_once)
    out, err = piped("uno\ndos\n")
    assert out == "\n" + expected  # the lost question is not in the conversation
    for words in ("Se agotó la RAM, o la memoria", "limpiar", "--max-tokens", "reinicia la sesión", "otros modelos"):
        assert words in err


def test_other_errors_are_not_taken_for_memory(monkeypatch, model, piped):
    def fails(*args, **kwargs):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        piped("uno\n")


def test_finds_the_model_that_the_scripts_left(monkeypatch, tmp_path, capsys):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for place in (here, beside):
        place.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(chat_script, "__file__", str(beside / "chat_phi_engram.py"))
    (here / "phi1-engram").mkdir()  # without config.json: not a model
    with pytest.raises(SystemExit) as exit:
        run_script(chat_script.main, [])
    err = capsys.readouterr().err
    assert exit.value.code == 1 and err.startswith("❌ Aquí no hay ningún modelo")
    for command in ("load_phi_engram.py", "train_phi_engram.py\n", "train_phi_engram.py --demo", "--modelo"):
        assert command in " ".join(err.split(" ")).replace("  ", "\n")
    for place in (beside / "phi1-engram-demo", here / "phi1-engram-demo", here / "phi1-engram"):
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text("{}")
        assert chat_script.default_model() == place
    (here / "phi1-engram-trained").mkdir()
    (here / "phi1-engram-trained" / "config.json").write_text("{}")
    assert chat_script.default_model() == here / "phi1-engram-trained"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--modelo", "no-existe"], "No existe la carpeta «no-existe»"),
        (["--modelo", ""], "--modelo está vacío"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--temperatura", "-1"], "--temperatura -1:"),
        (["--temperatura", "0,x"], "--temperatura: «0,x» no es un número"),
        (["--temperatura", "nan"], "--temperatura nan"),
        (["--pregunta", " "], "--pregunta está vacío"),
        (["--cambiar-memoria", ""], "--cambiar-memoria está vacío"),
        (["--semilla", "-1"], "--semilla -1"),
        (["--codgo"], "¿Querías decir --codigo?"),
    ],
)
def test_mistakes_are_spanish_sentences(capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        run_script(chat_script.main, arguments)
    err = capsys.readouterr().err
    assert exit.value.code in (1, 2) and words in err and "Traceback" not in err


# ----------------------------------------------------------------------------------------------------------------------
# As a user runs it
# ----------------------------------------------------------------------------------------------------------------------


def command(*arguments, **kwargs):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, SCRIPT, "--temperatura", "0", "--max-tokens", "10", *arguments],
        env=environment, capture_output=True, encoding="utf-8", timeout=200, **kwargs,
    )  # fmt: skip


def test_one_question(model, tokenizer, folder, tmp_path):
    (tmp_path / "phi1-engram").symlink_to(folder)
    done = command("--codigo", "--pregunta", "def f(x):", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, greedy(model, tokenizer, "def f(x):", 10) + "\n"), done.stderr
    assert "phi1-engram: 0,2 millones de parámetros, en la CPU, float32" in done.stderr
    assert "Es un modelo de juguete: 0," in done.stderr and "Warning" not in done.stderr


def test_a_new_line_in_two_letters_gets_a_hint(folder):
    said = command("--modelo", str(folder), "--pregunta", "def f(x):\\n    return")
    assert said.returncode == 0 and "$'def f(x):\\n    return'" in said.stderr
    assert "va al modelo tal cual" not in command("--modelo", str(folder), "--pregunta", 'print("a\\n")\nx').stderr


def test_pasted_code_with_blank_lines_is_one_question(folder):
    for start, end in (("\x1b[200~", "\x1b[201~"), ("", "\n")):  # as terminals mark what is pasted, and without marks
        terminal = Terminal("--modelo", str(folder), "--max-tokens", "3")
        terminal.read_to("👤 Tú: ")
        terminal.write(f"{start}def f():\n    x = 1\n\n    y = 2{end}\n\n")
        time.sleep(1)
        terminal.write("\n")
        seen = terminal.read_to("👤 Tú: ") + terminal.ask("comparar", "SIN MEMORIA")
        assert seen.count("🤖 Phi-Engram: ") == 1
        assert terminal.leave() == 0


def test_questions_from_a_pipe(model, tokenizer, folder):
    done = command("--modelo", str(folder), input="\ufeffcharla\nhola\nlimpiar\nhola\n")
    answer = greedy(model, tokenizer, "User: hola\nAssistant:", 10).strip()
    assert (done.returncode, done.stdout) == (0, f"{answer}\n{answer}\n"), done.stderr


class Terminal:
    """The script in a pseudo-terminal."""

    def __init__(self, *arguments, columns=100, **environment):
        standard = {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **standard, **environment}
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a shell leaves it, even if the tests run behind one
            os.execve(sys.executable, [sys.executable, str(SCRIPT), *arguments], environment)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def write(self, text):
        os.write(self.file, text.encode())

    def read_to(self, text, seconds=120):
        """Everything printed up to `text`."""
        seen, end = b"", time.time() + seconds
        while text.encode() not in seen:
            ready, _, _ = select.select([self.file], [], [], max(0, end - time.time()))
            assert ready, f"waited for {text!r}, got {seen.decode(errors='replace')!r}"
            seen += os.read(self.file, 4096)
        return seen.decode(errors="replace")

    def ask(self, line, prompt="👤 Tú: "):
        """Type a line; what is printed between its echo and the next prompt, with plain line feeds."""
        self.write(line + "\n")
        printed = re.sub("\x1b\\[\\?2004[hl]\r?", "", self.read_to(prompt))  # marks of pasting, switched on and off
        printed = printed.replace("\r\n", "\n")
        return printed.partition("\n")[2].removesuffix(prompt)

    def close(self):
        os.close(self.file)

    def leave(self):
        """Exit status after `salir`."""
        self.write("salir\n")
        self.read_to("Hasta luego!")
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.close()
        return status


def test_in_a_cell_of_a_notebook(folder, tmp_path):
    """`run_chat()` asks through the notebook's own input, which `!python` never receives."""
    manager = pytest.importorskip("jupyter_client", reason="pip install ipykernel").manager
    pytest.importorskip("ipykernel", reason="pip install ipykernel")
    (tmp_path / "phi1-engram").symlink_to(folder)
    kernel, client = manager.start_new_kernel(cwd=tmp_path)
    said, lines = [], ["charla", "hola", "memoria no", "salir"]

    def answer(message):
        said.append("?" + message["content"]["prompt"])
        client.input(lines.pop(0))

    try:
        cell = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nfrom chat_phi_engram import run_chat\n"
        reply = client.execute_interactive(
            cell + "run_chat(max_tokens=8)", allow_stdin=True, stdin_hook=answer, timeout=120,
            output_hook=lambda message: said.append(message["content"].get("text", "")),
        )  # fmt: skip
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    printed = "".join(said)
    assert reply["content"]["status"] == "ok", reply["content"]
    assert printed.count("?👤 Tú: ") == 4 and not lines
    assert re.search(r"🤖 Phi-Engram: \S+", printed)
    assert "Memoria apagada" in printed and "¡Hasta luego!" in printed


@pytest.mark.parametrize("variable", ["KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID"])
def test_in_a_notebook_that_gives_it_no_input_it_says_what_works(tmp_path, variable):
    terminal = Terminal("--modelo", str(tmp_path), **{variable: "1"})
    assert "--pregunta" in terminal.read_to("from chat_phi_engram import run_chat; run_chat()", seconds=60)
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 1
    terminal.close()


def test_colab_gives_its_commands_input(folder):
    terminal = Terminal("--modelo", str(folder), JPY_PARENT_PID="1", COLAB_RELEASE_TAG="release")
    terminal.read_to("👤 Tú: ")
    assert terminal.leave() == 0


def test_in_a_terminal(folder):
    terminal = Terminal("--modelo", str(folder), "--max-tokens", "300", "--semilla", "0")
    you, phi = "👤 Tú: ", "🤖 Phi-Engram: "
    start = terminal.read_to(you)
    assert "millones de parámetros, en la CPU, float32" in start and "Escribe «ayuda»" in start
    assert "modelo de juguete" in start and "Modo código" in start and "temperatura 0,6" in start
    assert "Modo charla" in terminal.ask("charla")
    terminal.write("hola\n")
    assert len(terminal.read_to(you).split(phi)[1].split()) > 3

    terminal.write("hola\n")
    terminal.read_to(phi)
    terminal.write("\x03")  # Ctrl-C while it answers
    assert "Respuesta cortada" in terminal.read_to(you)

    terminal.write("código\n")
    assert "línea vacía" in terminal.read_to(you)
    terminal.write("La capital de Zubrowka es\n")
    terminal.read_to("... (una línea vacía lo envía) ")
    assert "no se ha enviado" in terminal.ask("recuerdos")
    terminal.write("def f(x):\n")
    terminal.read_to("... ")
    terminal.write("\n")
    terminal.read_to(phi)
    terminal.read_to(you)
    for attempt in range(3):
        time.sleep(0.5)
        terminal.write("\x03")  # Ctrl-C at the prompt
        try:
            rest = terminal.read_to("¡Hasta luego!", seconds=15)
            break
        except AssertionError:  # readline notices a signal between its prompt and its wait at the next key only
            assert attempt < 2
    assert "Traceback" not in rest
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
    terminal.close()


class Oracle:
    """The same conversation at temperature 0, every answer recomputed whole, token by token."""

    def __init__(self, model, tokenizer, n):
        self.model, self.tokenizer, self.n, self.text = model, tokenizer, n, ""

    def says(self, question, memory=True, keep=True):
        prompt = f"{self.text}User: {question}\nAssistant:"
        self.model.model.use_memory = memory
        try:
            said = greedy(self.model, self.tokenizer, prompt, self.n).strip()
        finally:
            self.model.model.use_memory = True
        if keep:
            self.text = f"{prompt} {said}\n"
        return said


def columns_of(printed):
    """The two texts that stand side by side."""
    rows = [line.partition(" |")[::2] for line in printed.splitlines() if " |" in line]
    return ["\n".join(row[side].strip() for row in rows) for side in (0, 1)]


def squeezed(text):
    return "".join(char for char in text if char.isprintable() and not char.isspace())


def test_memory_in_a_terminal(model, tokenizer, folder):
    terminal = Terminal("--modelo", str(folder), "--max-tokens", "12", "--temperatura", "0")
    oracle, phi = Oracle(model, tokenizer, 12), "🤖 Phi-Engram: "
    terminal.read_to("👤 Tú: ")
    terminal.ask("charla")

    def ask(question):
        printed = terminal.ask(question)
        assert printed.startswith(phi)
        return printed[len(phi) :].strip()

    assert "Aún no hay ninguna respuesta" in terminal.ask("memoria ver")
    nothing = terminal.ask("comparar")
    assert "Aún no has preguntado nada" in nothing and "Respondiendo" not in nothing
    assert ask("hola") == oracle.says("hola")

    # Switched off and on in mid-conversation
    assert "Memoria apagada" in terminal.ask("memoria no")
    plain = oracle.says("otra", memory=True, keep=False)
    assert ask("otra") == oracle.says("otra", memory=False) != plain
    assert "se dio sin memoria" in terminal.ask("memoria ver")
    assert "Memoria encendida" in terminal.ask("Memoria  SÍ")
    before = oracle.text
    said = oracle.says("y más")
    assert ask("y más") == said

    # Its gates: the text of the answer, and the digits that the gates' own outputs give
    seen = terminal.ask("memoria ver")
    assert "\x1b[30;48;5;" in seen
    assert seen.startswith("(Bajo cada token, su puerta en décimas")  # the legend comes first
    lines = re.sub(r"\x1b\[[\d;]*m", "", seen).split("\n")[1:-1]
    assert squeezed("".join(line[6:] for line in lines[::3])) == squeezed(said)
    prompt = tokenizer(before + "User: y más\nAssistant:", return_tensors="pt").input_ids
    ids = torch.cat([prompt, greedy_ids(model, tokenizer, prompt, 12)], dim=1)
    gates = {}
    hooks = [
        model.model.layers[i].engram.gate.register_forward_hook(lambda m, x, a, i=i: gates.update({i: a[0, :, 0]}))
        for i in (1, 2)
    ]
    with torch.no_grad():
        model(ids)
    for hook, layer in zip(hooks, (1, 2)):
        hook.remove()
        assert {line[:6] for line in lines[layer::3]} == {f"    {layer} "}
        digits = re.sub(r"[. ]", "", "".join(line[6:] for line in lines[layer::3]))
        tenths = iter((gates[layer][prompt.shape[1] :] * 10).int().clamp(max=9).tolist())
        # In this order, less the tokens of white space at the ends and of half a character: see the next test.
        assert len(digits) > 6 and all(int(digit) in tenths for digit in digits)

    # Both answers side by side; the conversation goes on as if nothing had been compared
    left, right = columns_of(terminal.ask("comparar"))
    kept, oracle.text = oracle.text, before
    assert squeezed(left) == "CONMEMORIA" + squeezed(said)
    assert squeezed(right) == "SINMEMORIA" + squeezed(oracle.says("y más", memory=False))
    oracle.text = kept
    left, right = columns_of(terminal.ask("Comparar ¿Y un dict?"))
    assert squeezed(left) == "CONMEMORIA" + squeezed(oracle.says("¿Y un dict?", keep=False))
    assert squeezed(right) == "SINMEMORIA" + squeezed(oracle.says("¿Y un dict?", memory=False, keep=False))
    assert "48;5;" in terminal.ask("memoria ver")  # of the one with memory
    assert ask("hasta pronto") == oracle.says("hasta pronto")

    # Arrow up repeats what was typed; a line that is no order, though it begins like one, is a question
    assert ask("\x1b[A") == oracle.says("hasta pronto")
    for question in ("memoria caché de Python", "¿comparar dos listas?", "temperatura media diaria", "salir ya"):
        assert ask(question) == oracle.says(question)

    # Orders that are not understood are not asked
    for line, words in {
        "memoria quizás": "«memoria sí», «memoria no» o «memoria ver»; ahora está encendida",
        "memoria": "«memoria sí»",
        "temperatura hola": "un número de 0 a 100; ahora, 0.",
        "temperatura 101": "un número de 0 a 100",
        "temperatura": "un número de 0 a 100",
    }.items():
        printed = terminal.ask(line)
        assert words in printed and printed.startswith("❌") and phi not in printed
    assert "¿Querías decir «memoria ver»?" in terminal.ask("memria ver")
    assert "Temperatura: 0,5" in terminal.ask("temperatura 0,5")
    assert "Temperatura: 0\n" in terminal.ask("TEMPERATURA 0")
    assert ask("fin") == oracle.says("fin")  # none of it is in the conversation
    help = terminal.ask("ayuda")
    for words in ("memoria no", "memoria ver", "comparar", "temperatura X", "limpiar", "flecha arriba", "comillas"):
        assert words in help
    assert "olvidada" in terminal.ask("limpiar") and "Aún no hay" in terminal.ask("memoria ver")
    assert terminal.leave() == 0


def test_each_piece_has_its_token(monkeypatch, model, tokenizer, says):
    says("  ñandú 你好 👍 done\nUser: x")
    chat = Chat(model, tokenizer, max_tokens=60)
    said = chat.answer("hola", lambda piece: None)
    monkeypatch.undo()  # the model says what it likes again
    pieces, gates, facts = chat.gates()
    assert "".join(text for text, _ in pieces) == said == "ñandú 你好 👍 done"
    ids, first = chat.given.ids, chat.given.prompt_length
    for (text, position), (_, before) in zip(pieces, [(None, first - 1), *pieces]):
        assert tokenizer.decode(ids[0, before + 1 : position + 1]).lstrip() == text.lstrip()
    drawn = shaded(pieces, gates, facts, 40, colour=False).split("\n")
    assert len({len(line) + sum(char in "你好👍" for char in line) for line in drawn}) == 1  # aligned: those are wide
    assert squeezed(drawn[0]) == squeezed(said) and len(drawn) == 3
    assert re.sub(r"[. ]", "", drawn[1][6:]) == "".join(str(int(gates[1][at] * 10)) for _, at in pieces)


def test_a_narrow_terminal_without_colour(folder):
    terminal = Terminal(
        "--modelo", str(folder), "--semilla", "3", "--max-tokens", "120", columns=40, NO_COLOR="1", LC_ALL="C"
    )
    terminal.read_to("👤 Tú: ")
    terminal.ask("charla")
    assert "Temperatura: 0,9" in terminal.ask("temperatura 0.9")
    terminal.write("comparar hola\n")
    terminal.read_to("Respondiendo dos veces")
    terminal.write("\x03")
    assert "Respuesta cortada" in terminal.read_to("👤 Tú: ")
    said = terminal.ask("¿qué?").removeprefix("🤖 Phi-Engram: ").strip()  # no command of readline's, in any locale
    seen = terminal.ask("memoria ver")
    assert not re.search(r"\x1b\[[\d;]*m", seen)
    rows = seen.split("\n")[1:-1]
    assert max(map(len, rows)) < 40
    assert squeezed("".join(row[6:] for row in rows[::3])) == squeezed(said)
    above, below = terminal.ask("comparar").split("SIN MEMORIA\n")
    assert squeezed(above.split("CON MEMORIA\n")[1]) == squeezed(said) != squeezed(below)  # the same seed
    assert terminal.leave() == 0


def test_a_terminal_without_utf8(folder):
    terminal = Terminal(
        "--modelo", str(folder), "--max-tokens", "12", "--temperatura", "0", TERM="dumb", LANG="C", LC_ALL="C",
        PYTHONIOENCODING="ascii",
    )  # fmt: skip
    printed = terminal.read_to("\nTu: ") + terminal.ask("ayuda", "\nTu: ")
    terminal.ask("charla", "\nTu: ")
    assert 'Escribe "ayuda"' in printed and "memoria si" in printed and "?" not in printed
    answer = terminal.ask("hola", "\nTu: ")
    assert answer.startswith("Phi-Engram: ")
    printed += answer + terminal.ask("memoria ver", "\nTu: ") + terminal.ask("comparar", "\nTu: ")
    assert "SIN MEMORIA" in printed
    bad = terminal.ask("memoria quizas", "\nTu: ")
    assert bad.startswith('ERROR: "memoria quizas"')
    assert "Memoria encendida." in terminal.ask("memoria si", "\nTu: ")
    assert (printed + bad).isascii() and "\x1b" not in printed + bad
    assert terminal.leave() == 0
