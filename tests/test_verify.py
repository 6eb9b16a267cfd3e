"""verify_phi_engram.py: passes on what works; ❌ and exit status 1 on each thing that is broken on purpose."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import engram.checks as checks
import engram.trial as trial
import helpers
import phi1_engram
import verify_phi_engram as verify_script
from engram.console import run_script, spanish

SCRIPT = Path(verify_script.__file__)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def small_tokenizer():
    return trial.tokenizer_on_the_spot()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, small_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    size = len(small_tokenizer)
    make_model(tokenizer=small_tokenizer, vocab_size=size, engram_tokenizer_compression=True).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def without_stranger(monkeypatch):
    """Leave out the check that starts another process: seconds each time, and these tests are about the others."""
    quick = [check for check in checks.CHECKS if check[1] is not checks.check_saved]
    monkeypatch.setattr(checks, "CHECKS", quick)


def run_main(capsys, *arguments):
    """Exit status, and each check's title with whether it passed, as the script run with `arguments` would give."""
    with pytest.raises(SystemExit) as exit:
        run_script(verify_script.main, list(arguments))
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    titles, marks = [], {}
    for line in output.out.splitlines():
        if line[:1].isdigit():
            titles.append(line.split(". ", 1)[1].split(":")[0])
        elif line.startswith(("   ✅", "   ❌")):
            marks[titles[-1]] = "✅" in line
    return exit.value.code, marks, output.out, output.err


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# What works
# ----------------------------------------------------------------------------------------------------------------------


def test_command_as_a_user_types_it(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""  # none of transformers' English
    *steps, last, seconds = [line for line in done.stdout.splitlines() if line]
    assert last.startswith("✅ Todo funciona: 8 comprobaciones; mayor diferencia ") and "tolerancia 0,0001" in last
    assert [line.split(".")[0] for line in steps if line[0].isdigit()] == [str(i) for i in range(1, 11)]
    assert "❌" not in done.stdout and "51.200 tokens" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_read_and_not_written(capsys, folder, without_stranger):
    before = digests(folder)
    code, marks, out, _ = run_main(capsys, "--modelo", str(folder))
    assert code == 0 and all(marks.values()) and len(marks) == 8, out
    assert digests(folder) == before


def test_without_the_hub(capsys, monkeypatch, without_stranger):
    def nowhere(*args, **kwargs):
        raise OSError("not cached, no network")

    monkeypatch.setattr(trial.AutoTokenizer, "from_pretrained", nowhere)
    monkeypatch.setattr(trial.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(trial.hub, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    code, marks, out, _ = run_main(capsys)
    assert code == 0 and all(marks.values()), out
    assert "No se llega al Hub" in out and "2.000 tokens" in out


def test_the_model_comes_back_as_it_was(capsys, make_model, without_stranger):
    model = make_model()
    tables = model.model.engram_tables
    with torch.no_grad():
        tables["1"].weight[3:90] = 0  # partly trained
        tables["2"].weight.zero_()  # untrained
        model.model.layers[2].engram.conv.weight.zero_()
    model.train()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    assert verify_script.verify(model)
    assert "Memoria sin entrenar (" in capsys.readouterr().out
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert not any(table.sparse_grad for table in tables.values())
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# What is broken on purpose
# ----------------------------------------------------------------------------------------------------------------------


def forgets_state(monkeypatch, which):
    remembers = phi1_engram.with_history

    def with_history(x, length, cache, layer_idx, state_idx):
        if state_idx != which:
            return remembers(x, length, cache, layer_idx, state_idx)
        if cache is not None:
            remembers(x, length, cache, layer_idx, state_idx)
        return F.pad(x, (length, 0))

    monkeypatch.setattr(phi1_engram, "with_history", with_history)


def forgets_conv_inputs(monkeypatch):
    forgets_state(monkeypatch, 0)


def forgets_ids(monkeypatch):
    forgets_state(monkeypatch, 1)


def beams_keep_their_row(monkeypatch):
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, beams: None)


def padding_is_taken_for_tokens(monkeypatch):
    monkeypatch.setattr(phi1_engram, "real_tokens", lambda *args: None)
    monkeypatch.setattr(phi1_engram, "text_reach", lambda *args: None)  # positions alone would tell it too


def fresh_rows_are_not_zero(monkeypatch):
    monkeypatch.setattr(phi1_engram.init, "zeros_", lambda tensor: torch.nn.init.normal_(tensor, std=0.02))


def fresh_memory_adds_a_bias(monkeypatch):
    layer = phi1_engram.EngramLayer.forward
    monkeypatch.setattr(
        phi1_engram.EngramLayer, "forward", lambda self, hidden, *args: layer(self, hidden, *args) + 1e-4
    )


def backbone_rounds(monkeypatch):
    attention = phi1_engram.eager_attention

    def rounded(*args, **kwargs):
        output, weights = attention(*args, **kwargs)
        return output.bfloat16().float(), weights

    monkeypatch.setattr(phi1_engram, "eager_attention", rounded)


def memory_is_silent(monkeypatch):
    layer = phi1_engram.EngramLayer.forward
    monkeypatch.setattr(phi1_engram.EngramLayer, "forward", lambda self, hidden, *args: layer(self, hidden, *args) * 0)


def memory_is_not_a_number(monkeypatch):
    layer = phi1_engram.EngramLayer.forward
    monkeypatch.setattr(
        phi1_engram.EngramLayer, "forward", lambda self, hidden, *args: layer(self, hidden, *args) * float("nan")
    )


def gradient_stops_at_the_table(monkeypatch):
    table = phi1_engram.EngramTable.forward
    monkeypatch.setattr(phi1_engram.EngramTable, "forward", lambda self, rows: table(self, rows).detach())


def forward_breaks_down(monkeypatch):
    def broken(self, x):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(phi1_engram.EngramShortConv, "forward", broken)


BREAKS = [
    (forgets_conv_inputs, {"Caché", "Haces", "Relleno"}),
    (forgets_ids, {"Caché", "Haces", "Relleno"}),
    (beams_keep_their_row, {"Haces"}),
    (padding_is_taken_for_tokens, {"Relleno"}),
    (fresh_rows_are_not_zero, {"Injerto"}),
    (fresh_memory_adds_a_bias, {"Injerto"}),
    (backbone_rounds, {"Injerto"}),
    (memory_is_silent, {"Memoria", "Gradiente"}),
    (memory_is_not_a_number, {"Injerto", "Memoria", "Caché", "Haces", "Relleno", "Gradiente"}),
    (gradient_stops_at_the_table, {"Gradiente"}),
    (forward_breaks_down, {"Injerto", "Memoria", "Caché", "Haces", "Relleno", "Gradiente"}),
]


@pytest.mark.parametrize("breaks, expected", BREAKS, ids=[breaks.__name__ for breaks, _ in BREAKS])
def test_broken_on_purpose(capsys, monkeypatch, model, without_stranger, breaks, expected):
    breaks(monkeypatch)
    monkeypatch.setattr(verify_script, "open_model", lambda *args, **kwargs: (model, None))
    code, marks, out, _ = run_main(capsys, "--modelo", "roto")
    assert code == 1
    assert {title for title, passed in marks.items() if not passed} == expected, out
    last = out.strip().splitlines()[-2]
    assert last.startswith("❌ Algo no funciona: falla") and "lo peor, paso" in last
    assert ("tolerancia" in last) or expected <= {"Memoria", "Gradiente"} or "se ha roto" in last  # these are counted


def test_saving_that_loses_or_changes_a_tensor(capsys, monkeypatch, model):
    save = phi1_engram.PhiEngramForCausalLM.save_pretrained
    changes = {helpers.DENSE_FILE: lambda tensors: tensors.pop("model.engram_hash.multipliers")}
    changes["model-engram-2.safetensors"] = lambda tensors: tensors["model.engram_tables.2.weight"][7].add_(1e-6)
    for name, change in changes.items():

        def save_badly(self, folder, *args, name=name, change=change, **kwargs):
            save(self, folder, *args, **kwargs)
            file = Path(folder) / name
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})

        monkeypatch.setattr(phi1_engram.PhiEngramForCausalLM, "save_pretrained", save_badly)
        monkeypatch.setattr(checks, "_free_memory", lambda device: 0)  # the files alone tell
        found, tolerance = checks.check_saved(model, checks.probe(model, None))
        assert found > tolerance
    assert "model.engram_hash.multipliers" in capsys.readouterr().out


def test_a_large_table_of_half_precision_is_read_back_in_pieces_of_one_size(make_model, tmp_path, monkeypatch, capsys):
    """Which are as many bytes: of other rows where those of the file are narrower than float32's."""
    make_model().half().save_pretrained(tmp_path)
    opened = phi1_engram.PhiEngramForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert next(iter(opened.model.engram_tables.values())).dtype == torch.float16
    monkeypatch.setattr(phi1_engram, "CHUNK", 2**10)
    monkeypatch.setattr(checks, "_free_memory", lambda device: 0)
    assert checks.check_saved(opened, checks.probe(opened, None)) == (0.0, 0.0)


def test_numbers_that_are_not_finite_are_within_no_tolerance():
    assert checks.rounding(torch.tensor([1.0, float("inf")])) == 1e-4


def test_a_projection_that_tells_capitals_apart_is_found_out(make_model, small_tokenizer, monkeypatch):
    """Made and checked by the same mistaken function."""
    def case_kept(tokenizer, vocab_size, pad_id):
        return torch.arange(vocab_size)

    size = dict(vocab_size=len(small_tokenizer), engram_tokenizer_compression=True)
    assert checks.check_projection(small_tokenizer)(make_model(tokenizer=small_tokenizer, **size), None)[0] == 0
    monkeypatch.setattr(phi1_engram, "vocabulary_projection", case_kept)
    monkeypatch.setattr(checks, "vocabulary_projection", case_kept)
    mistaken = make_model(tokenizer=small_tokenizer, **size)
    assert checks.check_projection(small_tokenizer)(mistaken, None)[0] > 10


def test_saved_code_that_does_not_open(capsys, monkeypatch, model):
    save = phi1_engram.PhiEngramForCausalLM.save_pretrained

    def save_badly(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        with open(Path(folder) / "phi1_engram.py", "a") as code:
            code.write("raise RuntimeError('broken on purpose')\n")

    monkeypatch.setattr(phi1_engram.PhiEngramForCausalLM, "save_pretrained", save_badly)
    found, tolerance = checks.check_saved(model, checks.probe(model, None))
    assert found > tolerance and "broken on purpose" in capsys.readouterr().out


def test_what_was_left_out_has_not_passed(capsys):
    """Nor does a count of things call itself a difference."""
    checks_ = [("Uno", lambda: (0.0, 0.0, "3 de 3 capas")), ("Dos", lambda: None), ("Tres", lambda: (1e-6, 1e-4))]
    results = [(step, checks.run_check(step, *check)) for step, check in enumerate(checks_, 4)]
    assert checks.conclude(results)
    out = capsys.readouterr().out
    assert "   ✅ 3 de 3 capas\n" in out and out.count("✅") == 3 and "⏭️  No se ha comprobado" in out
    last = out.splitlines()[-1]
    assert last.startswith("✅ Funciona lo que se ha comprobado: 2 comprobaciones; sin comprobar: paso 5; mayor dif")
    assert "paso 6." in last and "Todo funciona" not in out
    assert not checks.conclude([(4, (1.0, 0.0, "2 de 3 capas")), (5, None), (6, (1e-6, 1e-4, "diferencia"))])
    assert "falla 1 de 2; sin comprobar: paso 5; lo peor, paso 4: 2 de 3 capas." in capsys.readouterr().out


def test_no_room_to_save_is_said(capsys, monkeypatch, model):
    usage = checks.shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: usage)
    assert checks.check_saved(model, checks.probe(model, None)) is None
    assert "B libres" in capsys.readouterr().out


def test_a_projection_of_another_tokenizer(make_model, small_tokenizer):
    size = len(small_tokenizer)
    model = make_model(tokenizer=small_tokenizer, vocab_size=size, engram_tokenizer_compression=True)
    check, ids = checks.check_projection(small_tokenizer), checks.probe(model, small_tokenizer)
    assert check(model, ids)[:2] == (0.0, 0.0)
    model.model.engram_hash.token_map[[5, 9]] += 1
    assert check(model, ids)[:2] == (2.0, 0.0) and check(model, ids)[2].startswith(f"{spanish(size - 2)} de ")


def test_libraries_too_old(capsys, monkeypatch, without_stranger):
    monkeypatch.setattr(trial.importlib.metadata, "version", lambda name: "1.0")
    assert trial.check_versions()[0] >= 4
    assert "pip install -U -r requirements.txt" in capsys.readouterr().out


def test_a_wrong_name_is_one_spanish_sentence(capsys):
    code, _, _, err = run_main(capsys, "--modelo", "no-existe")
    assert code == 1 and err.startswith("❌ No existe la carpeta «no-existe»")


def test_a_difference_that_is_no_number_is_infinite():
    a = torch.zeros(2, 2)
    assert checks.difference(a, a * float("nan")) == float("inf")
    assert checks.difference(a, a[:1]) == float("inf")
    assert checks.difference(a, a + 0.5) == 0.5
