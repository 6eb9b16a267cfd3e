"""A table kept in parts by several processes: our exchange of rows against DTensor and TorchRec, on the same batches.

    python tests/bench/sharding.py                # two processes on the CPU, tables of 2.6e5 and 2.6e6 rows
    pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0    # to measure TorchRec too, with torch 2.13
    pip install tensordict torchmetrics pyre-extensions            # and what it imports

Each process reads the rows of its own batch, differentiates them and updates the table. DTensor is torch's own way
(RowwiseParallel over an embedding, Adam): each reads for all, outputs are summed, gradients are as large as the part.
TorchRec on the CPU has no Adam: row-wise Adagrad, against our one state per row, whose first step is the same.
The first steps are compared, row by row. Medians of several steps after two that allocate.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from engram.console import SpanishParser, run_script, spanish
from engram.rows import TrainedTable
from phi1_engram import EngramTable

SLOTS, WIDTH, HEADS, TOKENS, RATE = (260_000, 2_600_000), 16, 16, 1024, 1e-3
EPS = 1e-15  # next to nothing: Adam and SparseAdam add it at different places
INSTALL = (
    "pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 && pip install tensordict torchmetrics pyre-extensions"
)


def exchanged(weight, rank, world, row_state):
    """One step with (row, gradient) pairs and all-to-all: a function of ids and gradients, and the part it updates."""
    table = EngramTable(len(weight), WIDTH, empty=True)
    table.weight = nn.Parameter(weight.clone())
    part = TrainedTable(table.train(), row_state, (rank, world), ThreadPoolExecutor(1))

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


def bagged(weight, rank, world):
    """The same with TorchRec, a bag for each row: reduce-scatter of the outputs, fbgemm updates in the backward pass.

    Its EmbeddingCollection exchanges single rows, but fbgemm's CPU kernel for their gradients is several times slower.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv

    config = EmbeddingBagConfig(name="t", num_embeddings=len(weight), embedding_dim=WIDTH, feature_names=["ids"])
    tables = EmbeddingBagCollection([config], device=torch.device("meta"))
    sharder = EmbeddingBagCollectionSharder(
        fused_params=dict(optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=RATE, eps=EPS)
    )
    plan = construct_module_sharding_plan(tables, {"t": row_wise(compute_kernel="fused")}, sharder, device_type="cpu")
    tables = sharder.shard(tables, plan, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"))
    part = tables.embedding_bags["t"].weight.detach()
    part.copy_(weight[rank * len(part) :][: len(part)])

    def step(ids, gradient):
        ids = ids.flatten()
        bags = KeyedJaggedTensor(["ids"], ids, lengths=torch.ones_like(ids))
        (tables(bags)["ids"] * gradient.view(-1, WIDTH)).sum().backward()

    return step, part


def rivals():
    """Each rival that can be imported, and our row state whose first step is its optimiser's."""
    ways = {"DTensor": (distributed, "adam")}
    try:
        import torchrec  # noqa: F401
    except (ImportError, OSError):  # OSError: compiled for another torch
        return ways
    return ways | {"TorchRec": (bagged, "fila")}


def one(slots: int, repetitions: int):
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    slots -= slots % world
    weight = torch.randn(slots, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + rank)  # every process has a batch of its own
    ways, pairs = {}, rivals()
    for name, (way, row_state) in pairs.items():
        ways[row_state], ways[name] = exchanged(weight, rank, world, row_state), way(weight, rank, world)
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
            apart = {name: (ways[name][1] - ways[mine][1]).abs().max().item() for name, (_, mine) in pairs.items()}
    if rank == 0:
        medians = {name: statistics.median(seconds[2:]) for name, seconds in times.items()}
        print(json.dumps(dict(times=medians, apart=apart, slots=slots)))
    dist.destroy_process_group()


def main(argv=None):
    parser = SpanishParser(description="Tablas repartidas entre procesos: intercambio de filas, DTensor y TorchRec.")
    parser.add_argument("--procesos", type=int, default=2, help="procesos (%(default)s)")
    parser.add_argument("--repeticiones", type=int, default=11, help="pasos de cada uno (%(default)s)")
    parser.add_argument("--uno", type=int, help="una sola tabla, dentro de un proceso")
    args = parser.parse_args(argv)
    if args.uno:
        return one(args.uno, args.repeticiones)
    pairs = rivals()
    print(f"{args.procesos} procesos, {TOKENS} tokens × {HEADS} filas de {WIDTH} valores cada uno")
    if "TorchRec" in pairs:
        print("TorchRec no tiene Adam en la CPU: AdaGrad por fila, cuyo primer paso es el de `--estado-filas fila`")
    else:
        print(f"Sin TorchRec. Se instala (para torch 2.13) con: {INSTALL}")
    columns = ["filas"]
    for name, (_, mine) in pairs.items():
        columns += [f"intercambio (`{mine}`), ms", f"{name}, ms", f"{name} / intercambio", "diferencia tras un paso"]
    print(f"\n| {' | '.join(columns)} |\n|" + " --- |" * len(columns))
    for slots in SLOTS:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.procesos), __file__]
        command += ["--uno", str(slots), "--repeticiones", str(args.repeticiones)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise RuntimeError(result.stderr[-3000:])
        row = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
        cells = [spanish(row["slots"])]
        for name, (_, mine) in pairs.items():
            ours, theirs = row["times"][mine], row["times"][name]
            cells += [spanish(1000 * ours, 1), spanish(1000 * theirs, 1), spanish(theirs / ours, 1)]
            cells += [f"{row['apart'][name]:.1e}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
