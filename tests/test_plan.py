"""The plan of memory: every item against real tensors, and trainings that cannot fit stopped before anything opens."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import engram.counting as counting
import engram.plan as planning
import helpers
import train_phi_engram as train_script
from engram.console import UserError, run_script
from engram.counting import Choice, Machine, account, shapes, traced
from engram.machines import MACHINES, matmul_flops, named_machine
from engram.optimizers import OPTIMIZERS, make_optimizer
from engram.plan import command, from_args, plan, search
from engram.processes import make_accelerator
from engram.rows import TrainedTables
from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM

ROOT = Path(__file__).resolve().parent.parent
HERE = Machine("prueba", gpu=0, cards=1, ram=1e12, disk=1e12, half=None, flops=1e12, base_gpu=0, base_ram=0)
SHAPE = dict(engram_tokenizer_compression=False)
CHOICE = Choice(batch=2, length=16, accumulate=1)


@pytest.fixture
def config(make_config):
    return make_config(**SHAPE)


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    make_model(**SHAPE).save_pretrained(tmp_path / "modelo")
    tokenizer.save_pretrained(tmp_path / "modelo")
    return tmp_path / "modelo"


def test_parameters_are_those_of_the_model(config):
    model = PhiEngramForCausalLM(config)
    dense, tables = shapes(config)
    there = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert dict(dense) == {name: shape for name, shape in there.items() if "engram_tables" not in name}
    for layer_id, shape in tables.items():
        assert there[f"model.engram_tables.{layer_id}.weight"] == shape
    backbone = sum(math.prod(shape) for name, shape in shapes(PhiEngramConfig())[0] if "engram" not in name)
    assert backbone == 1_418_270_720  # microsoft/phi-1


@pytest.mark.parametrize("row_state", ["adam", "fila"])
@pytest.mark.parametrize("optimizer", helpers.installed(OPTIMIZERS))
@pytest.mark.parametrize("phase", [1, 2])
def test_each_item_after_a_real_step(config, phase, optimizer, row_state):
    model = PhiEngramForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase == 2 or "engram" in name)
    with TrainedTables(model, row_state) as tables:
        made = make_optimizer(model, 1e-3, 1e-3, 1e-3, 0.1, optimizer, tables)
        ids = helpers.random_ids(model, 2, 16)
        model(ids, labels=ids).loss.backward()
        made.collect()
        made.step()
        dense = [p for name, p in model.named_parameters() if "engram_tables" not in name]
        states = list(made.dense.state.values())
        kept = [part.tensors() for part in tables.parts.values()]
        real = {
            "pesos": sum(p.nbytes for p in dense),
            "gradientes": sum(p.grad.nbytes for p in dense if p.grad is not None),
            "estado del optimizador": sum(t.nbytes for state in states for t in state.values() if torch.is_tensor(t)),
            "tablas": sum(tensors["weight"].nbytes for tensors in kept),
            "estado de las tablas": sum(
                t.nbytes for tensors in kept for name, t in tensors.items() if name in ("first", "second")
            ),
        }
    choice = replace(CHOICE, optimizer=optimizer, row_state=row_state, accumulate=2)  # all gradients at once
    planned = account(config, choice, HERE, phase)["RAM"]
    assert {name: planned[name] for name in real} == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("phase", [1, 2])
def test_the_step_without_contents_is_the_step(config, phase, recompute):
    """The storages that live in a real step on the CPU, counted in the same way, have the same peak."""
    model = PhiEngramForCausalLM(config).train()
    live = counting.LiveStorage(config.vocab_size, {})
    if recompute:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    for tensor in [*model.parameters(), *model.buffers()]:
        live.count(tensor, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase == 2 or "engram" in name)
        if "engram_tables" in name:
            parameter.requires_grad_(False)
    ids = helpers.random_ids(model, 1, 64)
    with live:
        model(ids, labels=ids, use_cache=False).loss.backward()
    planned = traced(config, 64, phase, recompute)
    assert sum(planned.values()) == pytest.approx(live.peak, rel=0.1)  # rows have gradients in the plan alone


def test_a_checkpoint_and_the_final_folder_are_as_large_as_planned(config, tmp_path):
    model = PhiEngramForCausalLM(config)
    accelerator = make_accelerator()
    with TrainedTables(model, "adam") as tables:
        optimizer = make_optimizer(model, 1e-3, 1e-3, 1e-3, 0.1, "adamw", tables)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        ids = helpers.random_ids(model, 2, 16)
        accelerator.backward(prepared(ids, labels=ids).loss)
        optimizer.optimizer.collect()
        optimizer.step()
        accelerator.save_state(str(tmp_path / "punto"))
        tables.save(tmp_path / "punto")
    accelerator.free_memory()
    model.save_pretrained(tmp_path / "final")
    sizes = {f: sum(p.stat().st_size for p in (tmp_path / f).rglob("*.*")) for f in ("punto", "final")}
    planned = account(config, CHOICE, HERE, 2)["disco"]
    slack = 150_000 + config.vocab_size * 8  # headers, code, random states, projection
    assert planned["punto de control"] < sizes["punto"] < planned["punto de control"] + slack
    assert planned["modelo de partida"] < sizes["final"] < planned["modelo de partida"] + 3 * slack


def test_the_disk_holds_all_checkpoints_beside_the_result(config):
    for phase, keep in ((1, 1), (1, 2), (2, 1), (2, 3)):
        files = account(config, replace(CHOICE, keep=keep), HERE, phase)["disco"]
        dense, tables = planning.shapes(config)
        one = files["punto de control"]
        final = 4 * (sum(math.prod(shape) for _, shape in dense) + sum(n * d for n, d in tables.values()))
        most = max(one * (keep + 1), one * keep + final)  # while the next one is written; at the end
        assert files["punto de control"] + files["lo que se guarda a su lado"] == pytest.approx(most)


def test_what_does_not_fit_is_refused_with_what_does(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_script, "open_model", lambda *_: pytest.fail("opened"))
    config = planning.open_config(str(folder))[0]
    choice = Choice(length=128, place="auto")
    least = sum(account(planning.with_rows(config, 5000), choice, HERE, 2)["RAM"].values())
    small = replace(HERE, ram=least)
    monkeypatch.setattr(train_script, "from_args", lambda args: (str(folder), choice, small, []))
    train_args = ["--modelo", str(folder), "--salida", "otra"]
    train_script.check(str(folder), choice, small)  # as it is, it fits
    many = planning.with_rows(config, 10_000_000)
    many.save_pretrained(folder)
    with pytest.raises(SystemExit) as stop:
        run_script(train_script.main, train_args)
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "No he abierto nada" in message and "--filas" in message
    rows = int(message.split("--filas ")[1].split()[0])
    choice = replace(choice, batch=1, recompute=True, optimizer="adafactor", row_state="fila", place="ram")
    assert planning.fits(planning.with_rows(config, rows), choice, replace(small, ram=small.ram / 0.95))
    assert not planning.fits(planning.with_rows(config, 2 * rows), choice, small)


def test_the_search_gives_up_comfort_in_order(config):
    def need(**different):
        return sum(account(config, replace(start, **different), HERE, 2)["RAM"].values())

    start = Choice(batch=2, length=256)
    small = dict(batch=1, accumulate=16, recompute=True)
    for different in (dict(), small, dict(small, row_state="fila", optimizer="adafactor")):
        found = search(config, start, replace(HERE, ram=need(**different) / 0.949))
        assert found and found.tokens * found.accumulate == 4096
        assert found.optimizer == different.get("optimizer", "adamw")
        assert found.row_state == different.get("row_state", "adam")
        assert found.recompute == different.get("recompute", False)
    assert search(config, start, replace(HERE, ram=1e6)) is None
    assert command(replace(start, steps=(True, False)), HERE) == (
        "python train_phi_engram.py --lote 2 --longitud 256 --acumular 8 --pasos-fase2 0"
    )


def test_misspelt_machine():
    with pytest.raises(UserError, match="no conozco esa máquina. ¿Querías decir kaggle"):
        named_machine("kagle")


def test_plan_from_another_folder_without_network(tmp_path):
    environment = dict(os.environ, HF_HUB_OFFLINE="0", HTTPS_PROXY="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    words = [sys.executable, ROOT / "train_phi_engram.py", "--plan", "t4", "--memoria", "ram", "--pasos-fase2", "0"]
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "✅ Fase 1: cabe, si basta el disco, del que no hay dato." in result.stdout and "Fase 2" not in result.stdout
    assert "python train_phi_engram.py --lote 2 --longitud 512 --acumular 8 --memoria ram" in result.stdout
    shown = [line for line in result.stdout.splitlines() if "train_phi_engram.py" not in line]
    assert max(map(len, shown)) <= 80 and not any(tmp_path.rglob("*.safetensors"))


def test_a_model_in_parts_takes_its_part_of_each_card(config):
    two = replace(HERE, gpu=1e12, cards=2, half=torch.float16)
    alone, parts = (account(config, replace(CHOICE, shard_model=each), two, 2) for each in (False, True))
    for item in ("pesos", "estado del optimizador"):
        assert parts["GPU"][item] == alone["GPU"][item] / 2
    assert parts["disco"] == alone["disco"]
    assert "--repartir-modelo" in command(replace(CHOICE, shard_model=True), two)


def test_two_cards_share_the_model_before_they_give_up_adamw():
    """Phi-1 itself on two T4; where the disk cannot take AdamW's states, they go, and with them the parts."""
    config, named = PhiEngramConfig(engram_tokenizer_compression=False), MACHINES
    found = search(config, Choice(), named["t4x2"])
    assert (found.shard_model, found.optimizer, found.row_state) == (True, "adamw", "adam")
    found = search(config, Choice(), named["kaggle"])
    assert (found.shard_model, found.optimizer) == (False, "adafactor")
    assert not search(config, Choice(), named["colab"]).shard_model  # nobody to share with
    # Parts would fit here with Adafactor, which torch cannot train in parts: better nothing than a command that fails.
    assert search(config, Choice(), replace(named["kaggle"], gpu=10e9)) is None


def test_what_is_saved_from_a_card_passes_through_host_memory():
    """safetensors copies every tensor of a card at once: in phase 2 Phi-1 beside its tables is too much for Colab."""
    config, colab = PhiEngramConfig(engram_tokenizer_compression=False), MACHINES["colab"]
    choice = Choice(optimizer="adafactor", recompute=True, place="ram")
    assert planning.lacking(config, choice, colab) == {1: [], 2: ["RAM"]}
    assert planning.lacking(config, replace(choice, row_state="fila"), colab) == {1: [], 2: []}


def test_processes_without_a_card_have_to_be_asked_for():
    cpu = replace(MACHINES["t4x2"], gpu=0, half=None)
    assert command(CHOICE, cpu).startswith("accelerate launch --multi_gpu --num_processes 2 ")
    assert command(CHOICE, MACHINES["t4x2"]).startswith("accelerate launch --num_processes 2 ")


@pytest.mark.parametrize("gpu", [0, 14.7 * 2**30])
def test_copies_that_an_older_safetensors_makes_are_counted(config, monkeypatch, gpu):
    """safetensors 0.7 made bytes of each tensor of a file before it wrote the first."""
    machine = replace(named_machine("t4"), gpu=gpu, half=None)
    choice = Choice(batch=1, length=32, place="ram")
    now = account(config, choice, machine, 2)["RAM"]
    monkeypatch.setattr(counting, "SAVING_COPIES", True)
    then = account(config, choice, machine, 2)["RAM"]
    dense, tables = shapes(config)
    own, rows = 4 * sum(math.prod(shape) for _, shape in dense), sum(4 * n * d for n, d in tables.values())
    at_save = 3 * own + 3 * rows + max(own, 3 * rows) if not gpu else 3 * rows + max(own, 3 * rows)
    base = machine.base_ram
    assert sum(then.values()) >= base + at_save - 8 * len(dense) and sum(then.values()) >= sum(now.values())


def test_what_cards_send_each_other_is_counted_in_the_hours(config):
    """Two cards: in parts each brings half of all float32 weights twice, and spreads its gradients, every batch."""
    machine, choice = named_machine("t4x2"), Choice(batch=1, length=32, accumulate=4)
    weights = 4 * sum(math.prod(shape) for _, shape in shapes(config)[0])
    tokens = 2 * 32
    parts = planning.bytes_per_token(config, replace(choice, shard_model=True), machine, 2)
    assert parts == pytest.approx(3 * weights / 2 / tokens)
    assert planning.bytes_per_token(config, choice, machine, 2) == pytest.approx(2 * weights / 2 / (4 * tokens))
    assert planning.bytes_per_token(config, choice, named_machine("t4"), 2) == 0


def test_what_is_printed_first_is_the_verdict(tmp_path):
    """Then the command and the hours of this training; what is not known is no ✅."""
    (tmp_path / "uno.py").write_text("x = 1\n" * 200_000)  # 1.2 MB
    said = plan(*from_args(train_script.parse(["--plan", "T4", "--datos", str(tmp_path)])))
    title, first, second, command_line, hours, tokens, *detail = said.splitlines()
    assert title.startswith("Plan para phi1-engram en t4 ") and "Fase 1: " in first and "Fase 2: " in second
    assert "train_phi_engram.py" in command_line and hours.startswith("Este entrenamiento: alrededor de ")
    disk = said.split("\ndisco")[1].split("hay sin dato")[1].splitlines()[0]
    assert "✅" not in disk and disk.count("?") == 2
    # 1.2e6 bytes / 3.2 * 19/20 = 356,250 tokens; steps are whole, of 8,192 tokens: 43 and 5 of them
    assert "Son 0,39 millones de tokens" in tokens and "fase 1, " in hours and "3,2 bytes por token" in tokens
    exact = plan(*from_args(train_script.parse(["--plan", "t4", "--pasos-fase1", "10", "--pasos-fase2", "0"])))
    assert "Son 0,08 millones de tokens." in exact and "bytes por token" not in exact
    unknown = plan(*from_args(train_script.parse(["--plan", "t4", "--dataset", "ana/codigo"])))
    assert "depende de cuánto texto haya" in unknown


def test_short_times_and_slow_machines_are_told_in_figures(tmp_path):
    """Neither parts of one minute each that make one minute, nor hours or a speed of 0,00."""
    (tmp_path / "uno.py").write_text("x = 1\n" * 20_000)
    words = ["--plan", "t4", "--datos", str(tmp_path), "--pasos-fase1", "1", "--pasos-fase2", "1"]
    name, choice, machine, given = from_args(train_script.parse(words))
    assert "Este entrenamiento: menos de 1 min.\n" in plan(name, choice, machine, given)
    slow = plan(name, choice, replace(machine, flops=4.24e9), given)
    assert "Horas con 0,0042 TFLOP/s" in slow and "Este entrenamiento: alrededor de " in slow
    fast = plan(name, choice, replace(machine, flops=2e16), given)
    assert "Fase 1: 0,0001" in fast


@pytest.mark.parametrize(("seconds", "sizes"), [(0.06, [512]), (0.04, [512, 1024])])
def test_a_slow_processor_is_not_measured_with_large_products(monkeypatch, seconds, sizes):
    clock, made, ones = iter(range(10**6)), [], torch.ones
    monkeypatch.setattr("engram.machines.time.perf_counter", lambda: seconds * next(clock))
    monkeypatch.setattr(torch, "ones", lambda size, *rest, **kw: made.append(size) or ones(size, *rest, **kw))
    assert matmul_flops() == pytest.approx(2 * sizes[-1] ** 3 / seconds) and made == sizes
