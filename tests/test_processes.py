"""Several processes against one, on the CPU through gloo: same losses, same weights, tables the same on all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def run(folder, processes, *wishes):
    """{rank: what that process wrote down}, from tests/several.py under torchrun."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(HERE / "several.py"), str(folder), *wishes]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
