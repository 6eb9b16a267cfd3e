"""Several processes against one, on the CPU through gloo: same losses, same weights, tables the same on all."""

import re
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import helpers
import train_phi_engram as train

HERE = Path(__file__).resolve().parent


def run(folder, processes, *wishes):
    """{rank: what that process wrote down}, from tests/several.py under torchrun."""
    folder.mkdir()
    process = helpers.together(processes, HERE / "several.py", folder, *wishes)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return {rank: load_file(folder / f"{rank}.safetensors") for rank in range(processes)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("solo") / "1", 1)[0]


def test_an_overflow_in_the_rows_of_one_process_is_skipped_by_all(tmp_path):
    """Each keeps other rows, and yet the scalers of all skip the same step and lower their scale."""
    first, second = run(tmp_path / "varios", 2, "shard", "scaled", "overflow").values()
    assert first["scale"] == second["scale"] == 2**15  # one halving of GradScaler's first scale
    for name, tensor in second.items():
        if name.startswith("dense."):
            assert torch.equal(tensor, first[name]) and tensor.isfinite().all(), name


def test_a_process_that_fails_alone_says_why_and_ends_all(tmp_path):
    """With NCCL leaving a group waits for the others, up to six hours: here leaving takes ten minutes."""
    process, started = helpers.together(2, HERE / "several.py", tmp_path, "alone"), time.time()
    _, errors = process.communicate(timeout=120)
    assert process.returncode and time.time() - started < 60
    assert "❌ Falla uno solo." in errors


def test_a_folder_that_the_main_process_cannot_open_ends_all(phi_folder, tmp_path):
    """The others wait for its name."""
    code = helpers.write_code(tmp_path / "codigo")
    helpers.save_grafted(phi_folder, tmp_path / "phi1-engram")
    script = tmp_path / "sin sitio.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE.parent)!r})
import engram.training as training, train_phi_engram as train
from engram.console import UserError, run_script
def no_room(*args):
    raise UserError("Aquí no se puede escribir.")
if os.environ["RANK"] == "0":
    training.write_checkpoint = no_room
run_script(train.main)
""", encoding="utf-8")
    words = ["--datos", code, "--longitud", 32, "--lote", 2, "--pasos-fase1", 1, "--pasos-fase2", 1]
    process = helpers.together(2, script, *words, cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode and "❌ Aquí no se puede escribir." in errors
    assert "training.py" not in errors  # the other ends in silence; the traceback is the launcher's own


@pytest.mark.parametrize("wishes", [(2,), (4, "shard"), (2, "parts", "stays", "scaled")], ids=str)
def test_several_processes_give_the_result_of_one(tmp_path, alone, wishes):
    """Float64 weights, so that another order of summing is worth 1e-13; losses are computed in float32."""
    ranks = run(tmp_path / "varios", *wishes)
    for found in ranks.values():
        assert torch.allclose(found["losses"], alone["losses"], rtol=0, atol=2e-6)
        # Only touched rows crossed: far fewer bytes than the tables' dense gradients of 4 steps.
        assert 0 < found["sent"] < 4 * sum(alone[name].nbytes for name in alone if name.startswith("table."))
    assert {name for name in ranks[0] if name.startswith("dense.")} == {n for n in alone if n.startswith("dense.")}
    for name, tensor in ranks[0].items():
        if name.startswith(("dense.", "table.")):
            assert torch.allclose(tensor.double(), alone[name].double(), rtol=0, atol=1e-9), name
    tables = [{name for name in found if name.startswith("table.")} for found in ranks.values()]
    if "shard" in wishes:  # at the end the main process has them whole, and no other needs them
        assert tables == [{"table.1", "table.2"}, *[set()] * (len(ranks) - 1)]
    else:
        assert all(torch.equal(found[n], ranks[0][n]) for found in ranks.values() for n in ("table.1", "table.2"))


def killed_in_phase_2(script, folder, name):
    """Two processes, SIGKILL to both after a checkpoint of phase 2."""
    process = helpers.together(2, *script, cwd=folder)
    limit = time.time() + 120
    while not list((folder / f"{name}-checkpoints").glob("fase-2-paso-*[1-9]")) and time.time() < limit:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.communicate()
    assert not (folder / name).exists()


def test_script_in_two_processes_killed_and_resumed_gives_the_weights_of_one(phi_folder, tmp_path, monkeypatch):
    """Both phases of train_phi_engram.py: with sharded rows resumed by two, whole by one."""
    code = helpers.write_code(tmp_path / "codigo")
    model = helpers.save_grafted(phi_folder, tmp_path / "phi1-engram")
    words = ["--datos", code, "--longitud", 32, "--lote", 2, "--pasos-fase1", 2, "--pasos-fase2", 24]
    words += ["--guardar-cada", 2]
    monkeypatch.chdir(tmp_path)
    alone = [*map(str, words), "--acumular", "2"]
    train.main([*alone, "--salida", "uno"])
    start, one = model.state_dict(), helpers.saved_tensors(tmp_path / "uno")

    def same(name):
        # Halves summed in the same order in both: what differs is float32 rounding of sums within a process, which
        # Adam turns into a share of its rate where a gradient is nearly zero.
        for key, tensor in helpers.saved_tensors(tmp_path / name).items():
            assert torch.allclose(tensor, one[key], rtol=0, atol=1e-5), key
            if tensor.is_floating_point() and "engram_tables" in key:
                assert not torch.equal(tensor, start[key]), key

    script = [Path(train.__file__), *words, "--acumular", 1, "--salida", "dos", "--repartir-filas"]
    killed_in_phase_2(script, tmp_path, "dos")
    process = helpers.together(2, *script, "--reanudar", cwd=tmp_path)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert out.count("Sigo desde la fase 2") == 1  # one process speaks
    assert "entre 2 procesos" in out
    sent, dense = re.search(r"ha mandado ([\d,]+) MB .* son ([\d,]+) MB", out).groups()
    assert 0 < float(sent.replace(",", ".")) < float(dense.replace(",", "."))
    same("dos")
    killed_in_phase_2([Path(train.__file__), *words, "--acumular", 1, "--salida", "tres"], tmp_path, "tres")
    train.main([*alone, "--salida", "tres", "--reanudar"])
    same("tres")
