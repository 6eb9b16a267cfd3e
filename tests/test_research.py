"""Other people's tools on our folders: the technical guide's own commands, where the tools are installed."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import helpers
from phi1_engram import PhiEngramForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "DOCUMENTACION_TECNICA.md").read_text(encoding="utf-8").partition("## 10. ")[2]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1",
    "HF_DATASETS_OFFLINE": "1",
}  # fmt: skip


def block(language: str, words: str) -> str:
    """The guide's block in this language that holds these words."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.S | re.M)
    return next(text for text in blocks if words in text)


@pytest.fixture(scope="module")
def made(tokenizer):
    return helpers.make_model(vocab_size=51200, tokenizer=tokenizer, eos_token_id=50256)


@pytest.fixture
def place(tmp_path, made, tokenizer):
    """A folder in which the guide's phi1-engram-demo/ lies."""
    from engram.graft import CHAT_TEMPLATE

    made.save_pretrained(tmp_path / "phi1-engram-demo")
    tokenizer.save_pretrained(tmp_path / "phi1-engram-demo")
    (tmp_path / "phi1-engram-demo" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tmp_path


@torch.no_grad()
def continued(model, tokenizer, text, continuation) -> float:
    """Nats of log-likelihood, without any tool."""
    start = tokenizer(text, return_tensors="pt").input_ids
    ids = tokenizer(text + continuation, return_tensors="pt").input_ids
    logs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return logs[start.shape[1] - 1 :].sum().item()


def test_lm_evaluation_harness(place, made, tokenizer):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (place / "tarea").mkdir()
    (place / "tarea" / "python_minimo.yaml").write_text(block("yaml", "python_minimo"))
    questions = block("json", "correcta")
    (place / "tarea" / "python_minimo.jsonl").write_text(questions)
    command = re.search(r"^lm_eval .*", block("bash", "lm_eval"), re.M)[0]
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command), "--output_path", "salida", "--log_samples"],
        cwd=place, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|python_minimo|" in done.stdout
    samples = next((place / "salida").rglob("samples_*.jsonl")).read_text().splitlines()
    assert len(samples) == 4
    for sample in map(json.loads, samples):
        question = sample["doc"]
        ours = [continued(made, tokenizer, question["inicio"], option) for option in question["opciones"]]
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-3)


def test_lora_beside_the_memory(place):
    pytest.importorskip("peft", reason="peft is not installed")
    (place / "guia.py").write_text(block("python peft", "LoraConfig"))
    done = subprocess.run(
        [sys.executable, "guia.py"], cwd=place, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines() if re.match(r"\d ", line)]
    assert len(losses) == 10 and losses[-1] < losses[0]


def test_trl_with_rows_that_change_where_they_are_read(place, made):
    pytest.importorskip("trl", reason="trl is not installed")
    (place / "guia.py").write_text(block("python trainer", "SparseRows") + block("python trl", "SFTTrainer"))
    done = subprocess.run(
        [sys.executable, "guia.py"], cwd=place, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    states = [PhiEngramForCausalLM.from_pretrained(place / name).state_dict() for name in ("entrenado", "ajustado")]
    name = "model.engram_tables.1.weight"
    first, second = states[0][name] != made.state_dict()[name], states[1][name] != states[0][name]
    assert 0 < first.any(-1).sum() < len(first) and 0 < second.any(-1).sum() < len(second)


def test_transformers_serve(place, made, tokenizer):
    pytest.importorskip("fastapi", reason="transformers[serving] is not installed")
    pytest.importorskip("uvicorn", reason="transformers[serving] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pytest.importorskip("openai", reason="openai is not installed")
    command = shlex.split(block("bash", "--servir").replace("8765", port))
    command[1] = str(ROOT / command[1])
    log = open(place / "log.txt", "w+")
    server = subprocess.Popen([sys.executable, *command[1:]], cwd=place, env=ENVIRONMENT, stdout=log, stderr=log)

    def ask(where, **body):
        url = f"http://127.0.0.1:{port}{where}"
        request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
        request.data = json.dumps(body).encode() if body else None
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        for _ in range(120):
            if server.poll() is not None:
                pytest.fail((place / "log.txt").read_text())
            try:
                assert ask("/health")["status"] == "ok"
                break
            except OSError:
                time.sleep(0.5)
        told = ask("/v1/completions", prompt="def f(x):", max_tokens=6)["choices"][0]["text"]
        chat = ask("/v1/chat/completions", messages=[{"role": "user", "content": "hola"}], max_tokens=6)
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    for prompt, said in (("def f(x):", told), ("User: hola\nAssistant:", chat["choices"][0]["message"]["content"])):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ours = made.generate(ids, max_new_tokens=6, do_sample=False)
        expected = tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True)
        assert said == (expected.lstrip() if "Assistant" in prompt else expected)
