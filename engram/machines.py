"""The machine that a training is for: this one, measured now, or one of those that many people are lent."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import difflib
import math
import os
import shutil
import time
from pathlib import Path

import psutil
import torch

from engram.console import UserError
from engram.counting import Machine

# Figures of the published pages of Colab and Kaggle; speed and bases are assumptions, never measured here. A T4 does
# 65e12 half precision operations per second on paper; less than a quarter of it is what small batches usually reach.
T4 = dict(gpu=14.7 * 2**30, half=torch.float16, flops=15e12, base_gpu=0.6e9, base_ram=3e9)
MACHINES = {
    "t4": Machine("t4", cards=1, ram=12.7e9, disk=math.inf, **T4),
    "t4x2": Machine("t4x2", cards=2, ram=29e9, disk=math.inf, **T4),
    "colab": Machine("colab", cards=1, ram=12.7e9, disk=70e9, **T4),
    "kaggle": Machine("kaggle", cards=2, ram=29e9, disk=20e9, scratch="/tmp", **T4),
}
# In which a CPU multiplies large matrices fastest: without AVX512 (most laptops) bfloat16 takes four times as long as
# float32, and more.
CPU_DTYPE = torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32
# Of the speed of one large product of matrices, what whole training steps reached on a CPU (tests/bench/plan.py).
STEP_SHARE = 0.4


def named_machine(name: str) -> Machine:
    if name.lower() in MACHINES:
        return MACHINES[name.lower()]
    close = difflib.get_close_matches(name.lower(), MACHINES, 1)
    hint = f" ¿Querías decir {close[0]}?" if close else ""
    raise UserError(
        f"--plan {name}: no conozco esa máquina.{hint} Elige entre {', '.join(MACHINES)}; o --plan solo, sin nombre, "
        "para este equipo."
    )


def allowed_ram() -> float:
    """Bytes that this process has or could still take: the system's, or its container's where that is less."""
    own = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    # Version 2 of control groups and version 1.
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        folder = Path("/sys/fs/cgroup", "memory" if limit.endswith("bytes") else "")
        try:
            # Files kept in memory count as used there, and give way.
            cached = int((folder / "memory.stat").read_text().split("inactive_file ")[1].split()[0])
            taken = int((folder / used).read_text()) - cached
            free = min(free, int((folder / limit).read_text()) - taken)
        except (OSError, ValueError, IndexError):  # no such limit, or "max"
            continue
    return own + free


def matmul_flops(device="cpu", dtype=torch.float32, largest=1024) -> float:
    """Operations per second of a product of two square matrices, the best of five: of `largest`'s size, or of the
    first smaller one (512, doubled) that takes over 50 ms."""
    size = 512
    while True:
        a, best = torch.ones(size, size, device=device, dtype=dtype), math.inf
        for _ in range(5):
            started = time.perf_counter()
            (a @ a)[0, 0].item()
            best = min(best, time.perf_counter() - started)
        if size >= largest or best > 0.05:  # some processors take minutes in half precision
            return 2 * size**3 / best
        size *= 2


def this_machine(output=".") -> Machine:
    """Measured now. `output`: a file or folder to be written, perhaps not there yet."""
    folder = Path(output).expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    processes = int(os.environ.get("WORLD_SIZE", 1))
    common = dict(
        name="este equipo", cards=processes, ram=allowed_ram(), disk=shutil.disk_usage(folder).free,
        base_ram=psutil.Process().memory_info().rss * processes, measured=True,
    )  # fmt: skip
    if not torch.cuda.is_available():
        return Machine(gpu=0, half=None, flops=STEP_SHARE * matmul_flops() / processes, base_gpu=0, **common)
    half = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    flops = STEP_SHARE * matmul_flops("cuda", half, 4096)
    return Machine(gpu=torch.cuda.mem_get_info()[0], half=half, flops=flops, base_gpu=0.2e9, **common)
