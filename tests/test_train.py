"""Training: optimiser, both phases, interruption and resuming, the demo, what is left to share."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import engram.corpus as corpora
import engram.demo as demo
import engram.sharing as share
import engram.texts as texts
import engram.training as training
import helpers
import train_phi_engram as train
from engram.console import UserError, run_script
from engram.folders import hold
from engram.opening import of_demo
from engram.steps import Recipe, evaluate, run_steps
from hub import Hub
from phi1_engram import PhiEngramForCausalLM

ROOT = Path(train.__file__).parent
RECIPE = Recipe(
    1e-3, memory_rates=(5e-3, 5e-3), table_rates=(1e-2, 1e-2), batch=2, length=32, accumulate=2, steps=(4, 4)
)


pytestmark = pytest.mark.usefixtures("corpus_cache")


@pytest.fixture(scope="module")
def grafted(phi_folder, tmp_path_factory):
    """A small phi1-engram/ folder, as load_phi_engram.py leaves it."""
    folder = tmp_path_factory.mktemp("grafted") / "phi1-engram"
    helpers.save_grafted(phi_folder, folder)
    return folder


def open_grafted(folder):
    return train.open_model(str(folder), dtype=torch.float32)


def run(*arguments, cwd, **kwargs):
    """train_phi_engram.py as a user runs it, from another folder."""
    command = [sys.executable, str(ROOT / "train_phi_engram.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=300, **kwargs)


def run_here(*arguments):
    """Exit status of the script in this process, which has already imported everything."""
    with pytest.raises(SystemExit) as stopped:
        run_script(train.main, [*map(str, arguments)])
    return stopped.value.code


SMALL = ["--longitud", 32, "--lote", 2, "--acumular", 1, "--pasos-fase1", 3, "--pasos-fase2", 3]


# --- one step, evaluation


def test_evaluation_is_the_mean_loss_of_the_held_out_blocks(tokenizer):
    model = helpers.make_model(vocab_size=51200)
    held_out = np.random.default_rng(0).integers(0, 51200, 5 * 32 + 7).astype(np.uint16)
    corpus = corpora.Corpus("prueba", held_out, held_out, bytes_per_token=3.0, documents=1, skipped=[], digest="")
    model.train()
    measured = evaluate(model, corpus, RECIPE, "cpu")
    assert model.training
    blocks = torch.from_numpy(held_out[: 5 * 32].astype(np.int64)).view(5, 32)
    with torch.no_grad():
        logits = model.eval()(blocks).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 51200), blocks[:, 1:].reshape(-1)).item()
    # float32 sums of 155 losses near 11 in two orders
    assert measured["loss"] == pytest.approx(expected, abs=1e-4)
    assert measured["perplexity"] == pytest.approx(np.exp(measured["loss"]))
    assert measured["bits_per_byte"] == pytest.approx(measured["loss"] / np.log(2) / 3)


# --- phases


def test_phase_1_trains_the_memory_and_leaves_every_bit_of_phi(grafted, code, tmp_path, capsys):
    model, tokenizer = open_grafted(grafted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    corpus = corpora.prepare_corpus(tokenizer, code, length=32)
    outcome = training.train_model(model, tokenizer, corpus, replace(RECIPE, steps=(4, 0)), tmp_path / "fuera")
    assert "ni un bit" in capsys.readouterr().out
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("engram" in name for name in changed)
    assert any("engram_tables" in name for name in changed) and any("value_proj" in name for name in changed)
    assert [row["name"] for row in outcome["results"]] == ["antes de entrenar", "tras la fase 1 (solo la memoria)"]
    assert outcome["results"][1]["loss"] < outcome["results"][0]["loss"]


def test_a_memory_that_learns_nothing_says_so(grafted, code, tmp_path, capsys):
    corpus, said = corpora.prepare_corpus(open_grafted(grafted)[1], code, length=32), {}
    for name, rate in (("nada", 1e-7), ("algo", 3e-2)):
        model, tokenizer = open_grafted(grafted)
        recipe = replace(RECIPE, memory_rates=(rate, rate), table_rates=(rate, rate), steps=(12, 0))
        outcome = training.train_model(model, tokenizer, corpus, recipe, tmp_path / name)
        said[name] = capsys.readouterr()
        shares = [pair[0] for row in outcome["history"] for pair in row["memory"].values()]
        assert len(shares) == 12 * len(model.config.engram_layer_ids) and shares[0] == 0  # untrained rows add nothing
        assert shares[-1] < 1e-4 if name == "nada" else shares[-1] > 1e-2
        assert outcome["memory"]["on"] == outcome["results"][-1]["loss"]
        assert outcome["memory"]["off"] == pytest.approx(outcome["results"][0]["loss"], abs=1e-6)  # Phi is the same
    assert "La memoria no ha aprendido nada que se note" in said["nada"].out
    assert re.search(r"la memoria aporta \d+,\d\d %", said["algo"].err)
    assert re.search(r"Aporta \d,\d{4} nats por token, y el \d+ % está en lo que recuerda", said["algo"].out)


@pytest.mark.parametrize(("minutes", "saved"), [(0, 9), (1000, 2)])
def test_checkpoints_come_by_time_too(grafted, code, tmp_path, monkeypatch, minutes, saved):
    """Of 4 + 4 steps: each, and the beginning of phase 2; or only that and the last."""
    model, tokenizer = open_grafted(grafted)
    seen, write = [], training.write_checkpoint
    monkeypatch.setattr(training, "write_checkpoint", lambda *args: seen.append(args[1]) or write(*args))
    corpus = corpora.prepare_corpus(tokenizer, code, length=32)
    training.train_model(model, tokenizer, corpus, RECIPE, tmp_path / "fuera", save_every=10**9, save_minutes=minutes)
    assert len(seen) == saved - (minutes == 0)  # the last step of phase 1 is saved as the beginning of phase 2


def test_a_backbone_that_moves_in_phase_1_is_noticed(grafted, code, tmp_path, monkeypatch):
    model, tokenizer = open_grafted(grafted)
    corpus = corpora.prepare_corpus(tokenizer, code, length=32)
    real = run_steps

    def meddle(*args, **kwargs):
        with torch.no_grad():
            model.model.final_layernorm.bias[0] += 1e-3
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "run_steps", meddle)
    with pytest.raises(RuntimeError, match="backbone"):
        training.train_model(model, tokenizer, corpus, replace(RECIPE, steps=(2, 0)), tmp_path / "fuera")


@pytest.fixture(scope="module")
def whole(grafted, tmp_path_factory):
    """Weights of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("entero")
    model, tokenizer = open_grafted(grafted)
    corpus = corpora.prepare_corpus(tokenizer, helpers.write_code(folder / "codigo"), length=32)
    training.train_model(model, tokenizer, corpus, RECIPE, folder / "entero")
    return model.state_dict()


@pytest.mark.parametrize("stop_at", [("Fase 1", 2), ("Fase 2", 1), ("Fase 2", 3)])
def test_interrupted_and_resumed_gives_the_bits_of_the_uninterrupted_run(
    grafted, code, whole, tmp_path, monkeypatch, stop_at
):
    real = run_steps

    def interrupted(*args, label, on_step, **kwargs):
        def on_step_then_signal(step, loss, spent):
            if (label, step) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            on_step(step, loss, spent)

        return real(*args, label=label, on_step=on_step_then_signal, **kwargs)

    def trained(name, resume=False):
        model, tokenizer = open_grafted(grafted)
        corpus = corpora.prepare_corpus(tokenizer, code, length=32)
        return model, training.train_model(model, tokenizer, corpus, RECIPE, tmp_path / name, resume=resume)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_steps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained("partido")
    resumed, outcome = trained("partido", resume=True)
    expected = [(phase, step) for phase in (1, 2) for step in range(1, 5)]
    assert [(row["phase"], row["step"]) for row in outcome["history"]] == expected
    assert len(outcome["results"]) == 3
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.items())


def test_a_failed_save_loses_nothing_and_resuming_refuses_another_training(grafted, code, tmp_path, monkeypatch):
    model, tokenizer = open_grafted(grafted)
    corpus = corpora.prepare_corpus(tokenizer, code, length=32)
    output = tmp_path / "fuera"
    with pytest.raises(UserError, match="ningún punto de control"):
        training.train_model(model, tokenizer, corpus, RECIPE, output, resume=True)

    def full_disk(*_):
        raise UserError("No queda espacio")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_trained", full_disk)
        with pytest.raises(UserError, match="espacio"):
            training.train_model(model, tokenizer, corpus, RECIPE, output)
    assert [path.name for path in (tmp_path / "fuera-checkpoints").iterdir()] == ["fase-2-paso-0000004"]
    with pytest.raises(UserError, match="--reanudar"):
        training.train_model(model, tokenizer, corpus, RECIPE, output)
    with pytest.raises(UserError, match="tasa de Phi 0,001 entonces, 0,5 ahora"):
        training.train_model(model, tokenizer, corpus, replace(RECIPE, backbone_rate=0.5), output, resume=True)
    with pytest.raises(UserError, match="el texto de --datos no es el mismo"):
        training.train_model(model, tokenizer, replace(corpus, digest="otro"), RECIPE, output, resume=True)
    resumed, _ = open_grafted(grafted)
    outcome = training.train_model(resumed, tokenizer, corpus, RECIPE, output, resume=True)
    assert len(outcome["history"]) == 8 and len(outcome["results"]) == 3
    weights = helpers.saved_tensors(output)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "fuera-checkpoints").exists()


# --- the script


@pytest.mark.parametrize(
    ("asked", "steps"),
    [((None, None), (4, 31)), ((None, 0), (31, 0)), ((None, 5), (4, 5)), ((7, None), (7, 31)), ((0, 3), (0, 3))],
)
def test_steps_that_nobody_asked_for_come_from_the_corpus(asked, steps):
    assert train.steps_of_phases(*asked, 31 * RECIPE.tokens_per_step + 5, RECIPE.tokens_per_step) == steps


def test_script_leaves_a_folder_ready_to_share(grafted, code, tmp_path, monkeypatch, capsys):
    done = run("--modelo", grafted, "--datos", code, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ni un bit" in done.stdout and "tokens/s" in done.stderr
    folder = tmp_path / "phi1-engram-trained"
    expected = {"config.json", "generation_config.json", helpers.DENSE_FILE, "phi1_engram.py", "tokenizer.json"}
    expected |= {"README.md", "entrenamiento.jsonl", "perdidas.png"}
    assert expected <= {path.name for path in folder.iterdir()}
    assert not (tmp_path / "phi1-engram-trained-checkpoints").exists()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "codigo: 60 documentos" in card and "tras la fase 2" in card and "{" not in card.replace("{@", "")
    rows = [json.loads(line) for line in (folder / "entrenamiento.jsonl").read_text().splitlines()]
    assert sum("step" in row for row in rows) == 6 and sum("bits_per_byte" in row for row in rows) == 3
    assert (folder / "perdidas.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.chdir(tmp_path)
    assert run_here("--modelo", grafted, "--datos", code, *SMALL) == 1
    assert "ya existe" in capsys.readouterr().err  # hours of training are not overwritten


def test_nothing_of_the_user_is_replaced(grafted, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--modelo", grafted, "--datos", code, *SMALL]
    own = tmp_path / "importante" / "tesis.txt"
    own.parent.mkdir()
    own.write_text("años de trabajo")
    assert run_here(*words, "--salida=~/importante") == 1
    assert run_here(*words, "--salida", "importante/tesis.txt") == 1
    with hold(tmp_path / "codigo"):  # stands for another training's folder
        (tmp_path / "codigo").rename(tmp_path / "otro-checkpoints")
        assert run_here(*words[:3], tmp_path / "otro-checkpoints", *SMALL, "--salida", "otro", "--reanudar") == 1
        assert "Ya hay un entrenamiento en marcha" in capsys.readouterr().err

    def later(*args, **kwargs):  # a folder of that name that comes while it trains
        (tmp_path / "nuevo").mkdir()
        (tmp_path / "nuevo" / "tesis.txt").write_text("más")
        return gathered(*args, **kwargs)

    (tmp_path / "otro-checkpoints").rename(tmp_path / "codigo")
    gathered = evaluate
    monkeypatch.setattr(training, "evaluate", lambda *args, **kwargs: monkeypatch.undo() or later(*args, **kwargs))
    assert run_here("--modelo", grafted, "--datos", tmp_path / "codigo", *SMALL, "--salida", tmp_path / "nuevo") == 1
    assert "no la voy a pisar" in capsys.readouterr().err
    assert (tmp_path / "nuevo" / "tesis.txt").read_text() == "más" and own.read_text() == "años de trabajo"
    assert list((tmp_path / "nuevo-checkpoints").glob("fase-2-*"))  # and nothing of the training either


def test_out_of_memory_names_the_cure_that_is_not_in_use(grafted, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    steps, words = run_steps, ["--modelo", grafted, "--datos", code, "--longitud", 32, "--pasos-fase2", 0]

    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def told(*more):
        assert run_here(*words, *more) == 1
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_steps", short)
        shape = ["--lote", 4, "--acumular", 1]
        assert "repite la misma orden con --reanudar --recalcular" in told(*shape)
        assert "--reanudar --lote 2 --acumular 2" in told(*shape, "--recalcular", "--reanudar")
        last = told("--lote", 1, "--acumular", 4, "--recalcular", "--reanudar")
        assert "--plan" in last and "Traceback" not in last
    assert training.run_steps is steps
    assert run_here(*words, "--lote", 1, "--acumular", 4, "--recalcular", "--reanudar") == 0

    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(PhiEngramForCausalLM, "from_pretrained", full)
    assert "No hay RAM (o memoria de la GPU)" in (error := told(*shape, "--salida", "otra")) and "--plan" in error


def test_killed_script_says_how_to_go_on_and_goes_on(grafted, code, tmp_path, monkeypatch, capsys):
    options = ["--modelo", grafted, "--datos", code, "--longitud", 32, "--lote", 1, "--acumular", 1]
    options += ["--pasos-fase1", 40, "--pasos-fase2", 2, "--guardar-cada", 2]
    command = [sys.executable, str(ROOT / "train_phi_engram.py"), *map(str, options)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "phi1-engram-trained-checkpoints"
    limit = time.time() + 120
    while not list(checkpoints.glob("fase-1-*")) and process.poll() is None and time.time() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--reanudar" in out and "Traceback" not in err
    assert not (tmp_path / "phi1-engram-trained").exists()
    monkeypatch.chdir(tmp_path)
    assert run_here(*options, "--reanudar") == 0
    assert re.search(r"Sigo desde la fase 1, paso \d+ de 40", capsys.readouterr().out)
    weights = helpers.saved_tensors(tmp_path / "phi1-engram-trained")
    original = helpers.saved_tensors(grafted)
    moved = [name for name in original if not torch.equal(original[name], weights[name])]
    assert any("engram_tables" in name for name in moved) and any("self_attn" in name for name in moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datos", "x", "--dataset", "y"], "Elige uno"),
        (["--publico"], "--subir"),
        (["--subir", "sin-barra"], "tu-usuario/nombre"),
        (["--lote", "0"], "--lote 0"),
        (["--modelo", "no-existe/ni/esto"], "No existe la carpeta"),
        (["--dato", "x"], "--datos"),
        (["--datos", ""], "--datos está vacío"),
        (["--subir", ""], "--subir está vacío"),
        (["--dataset="], "--dataset está vacío"),
        (["--datos", "no-existe"], "No existe «no-existe»"),
        (["--tasas", "nan"], "--tasas nan"),
        (["--tasas", "0,x"], "«0,x» no es un número"),
        (["--semilla", "-1"], "--semilla -1"),
        (["--codificacion", "latin1x"], "--codificacion latin1x: no existe"),
        (["--codificacion", "hex"], "--codificacion hex: no existe"),
        (["--pasos-fase1", "0", "--pasos-fase2", "0"], "no hay nada que entrenar"),
        (["--memoria", "disco"], "--memoria ram"),
        (["--demo", "--plan"], "--demo va sola"),
        (["--repartir-filas"], "varios procesos"),
        (["--plan", "--repartir-modelo"], "varios procesos"),
        (["--plan", "--longitud", "4096"], "2048 tokens"),
    ],
)
def test_mistakes_get_a_spanish_sentence_and_no_traceback(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run_here(*options) in (1, 2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("phi1-engram*"))


def test_subir_without_a_key_is_found_out_before_training(grafted, code, tmp_path):
    done = run("--modelo", grafted, "--datos", code, *SMALL, "--subir", "ana/phi1-engram", cwd=tmp_path)
    assert done.returncode == 1 and "HF_TOKEN" in done.stderr and "Traceback" not in done.stderr
    assert "Fase 1" not in done.stdout


def test_subir_puts_the_folder_on_the_hub_private_and_it_opens_from_there(grafted, code, tmp_path, tokenizer):
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home", token="hf_prueba")
        done = run(
            "--modelo", grafted, "--datos", code, *SMALL, "--subir", "usuario/phi1-engram", cwd=tmp_path,
            env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Subido a" in done.stdout
        assert hub.private["usuario/phi1-engram"]
        uploaded = hub.repos["usuario/phi1-engram"]
        local = {path.name: path.read_bytes() for path in (tmp_path / "phi1-engram-trained").iterdir()}
        assert local.items() <= uploaded.items()
        assert b'from_pretrained("usuario/phi1-engram"' in uploaded["README.md"]
        check = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "m = AutoModelForCausalLM.from_pretrained('usuario/phi1-engram', trust_remote_code=True)\n"
            "ids = AutoTokenizer.from_pretrained('usuario/phi1-engram')('def f(x):', return_tensors='pt').input_ids\n"
            "print(type(m).__name__, m.config.engram_layer_ids, m(ids).logits.isfinite().all().item(),\n"
            "      m.generation_config.eos_token_id)"
        )
        opened = subprocess.run(
            [sys.executable, "-I", "-c", check], cwd=tmp_path, capture_output=True, text=True,
            env={**environment, "HF_HOME": str(tmp_path / "otra")},
        )  # fmt: skip
        assert f"PhiEngramForCausalLM [1] True {tokenizer.eos_token_id}" in opened.stdout, opened.stderr
        refused = run(
            "--modelo", grafted, "--datos", code, *SMALL, "--salida", "rechazado", "--subir", "usuario/x", cwd=tmp_path,
            env=hub.environment(tmp_path / "home", token="hf_falsa"),
        )  # fmt: skip
    assert refused.returncode == 1 and "no aceptó 'usuario/x'" in refused.stderr and "Fase 1" not in refused.stdout


def test_key_is_found_in_kaggles_secrets(monkeypatch):
    class Secrets:
        def get_secret(self, name):
            return f"valor de {name}"

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", SimpleNamespace(UserSecretsClient=Secrets))
    assert share.hub_token() == "valor de HF_TOKEN"


def test_demo_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--demo va en un solo proceso"):
        demo.demo("nunca")


def test_demo_goes_the_whole_way(tmp_path, monkeypatch, capsys):
    """Three steps of everything; that the memory pays is measured by the real demo, not asserted at this size."""
    own = {folder: texts.text_files(folder) for folder in (texts.standard_library(), texts.package_folder("sympy"))}
    own = {folder: [path for path in files if path.name < "c"][:10] for folder, files in own.items()}
    for module in (demo, corpora):
        monkeypatch.setattr(module, "text_files", lambda folder, *_: own[folder])
    monkeypatch.setattr(demo, "DEMO_SHAPE", {**demo.DEMO_SHAPE, "vocab_size": 600, "hidden_size": 32})
    monkeypatch.setattr(demo, "DEMO_ENGRAM", {**demo.DEMO_ENGRAM, "engram_vocab_size": [300, 300]})
    monkeypatch.setattr(demo, "BLOCKS", (16, 8))
    recipe = replace(demo.DEMO_RECIPE, batch=2, length=64, steps=(3, 0))
    rows = demo.demo(tmp_path / "phi1-engram-demo", recipe=recipe, base_steps=3)
    out = capsys.readouterr().out
    assert "10 minutos" in out and "| Phi de partida |" in out and "| Control (tasa 0,001) |" in out
    base, *controls, memory, shuffled = rows
    assert len(controls) == len(demo.DEMO_CONTROL_RATES) and "otros n-gramas" in shuffled["name"]
    assert base["kl"] == base["changed"] == 0 and all(row["kl"] > 0 for row in (*controls, memory))
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "phi1-engram-demo-control").model_type == "phi"
    model, tokenizer = train.open_model(str(tmp_path / "phi1-engram-demo"))
    assert model.config.engram_layer_ids == [1, 2] and tokenizer.chat_template
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"phi1-engram-demo", "phi1-engram-demo-control"}
    assert (tmp_path / "phi1-engram-demo" / "aprender-y-olvidar.png").stat().st_size > 10_000
    said = of_demo(tmp_path / "phi1-engram-demo")
    assert said["library"] == "sympy" and set(said) == {"library", "prompt"} and of_demo(tmp_path) == {}
    (tmp_path / "entrenamiento.jsonl").write_text('{"loss": 1}\n{"demo')  # cut short
    assert of_demo(tmp_path) == {}
    (tmp_path / "entrenamiento.jsonl").unlink()
    card = (tmp_path / "phi1-engram-demo" / "README.md").read_text(encoding="utf-8")
    assert "**Es un modelo de juguete**" in card and ": el mismo Phi sin memoria, con los mismos pasos |" in card
    assert "El control es el mismo Phi de partida, entrenado sin memoria y con todos sus pesos" in card
    # A phase that was left out has no rates to be told.
    assert "Fase 1, 3 pasos: Phi congelado" in card and "Sin fase 2: Phi no ha cambiado." in card
    assert "todo el modelo; tasas" not in card
    for name in ("phi1-engram-demo", "phi1-engram-demo-control"):  # neither is ever replaced
        with pytest.raises(UserError, match=f"{name}/ ya existe"):
            demo.demo(tmp_path / "phi1-engram-demo", recipe=recipe, base_steps=3)
        (tmp_path / name).rename(tmp_path / f"{name}-1")


def test_a_loss_of_few_tokens_is_marked():
    row = dict(name="x", loss=2.0, perplexity=7.4, bits_per_byte=1.0)
    assert "medido en solo 10 tokens: no te fíes" in share.result_line(dict(row, tokens=10))
    assert "en solo 1 token:" in share.result_table([dict(row, tokens=1)])
    for enough in (dict(row, tokens=share.FEW), row):
        assert "no te fíes" not in share.result_line(enough) + share.result_table([enough])


def test_a_memory_that_hurts_and_a_control_that_ties():
    assert "La memoria estorba" in share.memory_line(dict(on=2.0, off=1.9, shuffled=2.0))
    assert "no ha aprendido nada" in share.memory_line(dict(on=2.0, off=2.001, shuffled=2.0))
    for loss, words in ((2.0, "empata con él"), (2.1, "le gana por 0,100"), (1.9, "pierde con él por 0,100")):
        assert words in share.against_control(dict(loss=loss), dict(loss=2.0))
