"""A table kept in parts by several processes: our exchange of rows against torch's DTensor, on the same batches.

    python tests/bench_sharding.py                # two processes on the CPU, tables of 2.6e5 and 2.6e6 rows

Each process reads the rows of its own batch, differentiates them and updates the table. DTensor is torch's own way
(RowwiseParallel over an embedding, Adam): each reads for all, outputs are summed, gradients are as large as the part.
The first step of both is compared, row by row. Medians of several steps after two that allocate.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard  # noqa: E402
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module  # noqa: E402

from load_phi_engram import SpanishParser, run_script, spanish  # noqa: E402
from phi1_engram import EngramTable  # noqa: E402
from rows_phi_engram import TrainedTable  # noqa: E402

SLOTS, WIDTH, HEADS, TOKENS, RATE = (260_000, 2_600_000), 16, 16, 1024, 1e-3
EPS = 1e-15  # next to nothing: Adam and SparseAdam add it at different places


def exchanged(weight, rank, world):
    """One step with (row, gradient) pairs and all-to-all: a function of ids and gradients, and the part it updates."""
    table = EngramTable(len(weight), WIDTH, empty=True)
    table.weight = nn.Parameter(weight.clone())
    part = TrainedTable(table.train(), "adam", (rank, world), ThreadPoolExecutor(1))

    def step(ids, gradient):
        (part.read(ids) * gradient).sum().backward()
        row_ids, grad, _ = part.collect(world)
        part.step(row_ids, grad, RATE, (0.9, 0.999), EPS)

    return step, part.weight


def distributed(weight, rank, world):
    """The same with torch's DTensor."""
    embedding = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
    mesh = init_device_mesh("cpu", (world,))
    embedding = parallelize_module(
        embedding, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0))
    )
    optimizer = torch.optim.Adam(embedding.parameters(), lr=RATE, eps=EPS)

    def step(ids, gradient):
        (embedding(ids) * gradient / world).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, embedding.weight.to_local()


def one(slots: int, repetitions: int):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    slots -= slots % world
    weight = torch.randn(slots, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + rank)  # every process has a batch of its own
    ways = {"filas": exchanged(weight, rank, world), "DTensor": distributed(weight, rank, world)}
    del weight
    times = {name: [] for name in ways}
    for number in range(repetitions + 2):
        ids = torch.randint(0, slots, (1, TOKENS, HEADS), generator=generator)
        gradient = torch.randn(1, TOKENS, HEADS, WIDTH, generator=generator)
        for name, (step, _) in ways.items():
            dist.barrier()
            started = time.perf_counter()
            step(ids, gradient)
            dist.barrier()
            times[name].append(time.perf_counter() - started)
        if number == 0:  # afterwards Adam goes on moving rows that nobody reads, and pairs do not
            apart = (ways["filas"][1] - ways["DTensor"][1]).abs().max().item()
    if rank == 0:
        medians = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
        print(json.dumps(dict(medians, apart=apart, slots=slots)))
    dist.destroy_process_group()


def main(argv=None):
    parser = SpanishParser(description="Tablas repartidas entre procesos: nuestro intercambio de filas y DTensor.")
    parser.add_argument("--procesos", type=int, default=2, help="procesos (%(default)s)")
    parser.add_argument("--repeticiones", type=int, default=11, help="pasos de cada uno (%(default)s)")
    parser.add_argument("--uno", type=int, help="una sola tabla, dentro de un proceso")
    args = parser.parse_args(argv)
    if args.uno:
        return one(args.uno, args.repeticiones)
    print(f"{args.procesos} procesos, {TOKENS} tokens × {HEADS} filas de {WIDTH} valores cada uno\n")
    print("| filas | intercambio de filas, ms | DTensor, ms | DTensor / filas | mayor diferencia tras un paso |")
    print("|" + " --- |" * 5)
    for slots in SLOTS:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.procesos), __file__]
        command += ["--uno", str(slots), "--repeticiones", str(args.repeticiones)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise RuntimeError(result.stderr[-3000:])
        row = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
        print(
            f"| {spanish(row['slots'])} | {spanish(1000 * row['filas'], 1)} | {spanish(1000 * row['DTensor'], 1)} | "
            f"{spanish(row['DTensor'] / row['filas'], 1)} | {row['apart']:.1e} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
