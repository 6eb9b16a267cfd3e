"""What a training step costs: beside plain Phi, and against the size of the table.

    python tests/bench/training.py               # hidden 512 x 8, Engram at 1 and 4: step time beside plain Phi
    python tests/bench/training.py --tamanos     # step time and memory from 2.6e5 to 2.6e7 slots of 16 values
    python tests/bench/training.py --json medidas.json

Each repetition takes one step of every variant, tables of all sizes too, so that what else the machine does falls on
all; ratios are medians of the ratios within a repetition. Memory is measured in a process per size. "Slots" are table
rows per layer, all heads together. Tokens are drawn at random.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PhiConfig, PhiForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engram.console import SpanishParser, run_script, spanish
from engram.optimizers import clip_gradients, make_optimizer
from engram.rows import ROW_STATES, TrainedTables
from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM

SHAPE = dict(
    vocab_size=51200, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
    max_position_embeddings=512, use_cache=False, eos_token_id=50256,
)  # fmt: skip
ENGRAM = dict(engram_layer_ids=[1, 4], n_embed_per_ngram=512, n_head_per_ngram=8, engram_tokenizer_compression=False)
BATCH, LENGTH = 4, 256
SLOTS = (260_000, 2_600_000, 26_000_000)


class Variant:
    """A model, its optimiser and one step of it."""

    def __init__(self, model, tables=None, optimizer=None):
        self.accelerator, self.tables = Accelerator(), tables
        optimizer = optimizer or make_optimizer(model, 1e-5, 1e-5, 1e-5, 0.1, tables=tables)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model.train()

    def step(self, ids) -> float:
        """Seconds of forward, backward and update."""
        start = time.perf_counter()
        self.accelerator.backward(self.model(ids, labels=ids).loss)
        clip_gradients(self.accelerator, self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def engram(row_state, **memory) -> Variant:
    model = PhiEngramForCausalLM(PhiEngramConfig(**SHAPE, **{**ENGRAM, **memory}))
    return Variant(model, TrainedTables(model, row_state))


class SparseAdamVariant(Variant):
    """The yardstick: the table as an embedding with sparse gradients, torch.optim.SparseAdam beside AdamW."""

    def __init__(self, **memory):
        model = PhiEngramForCausalLM(PhiEngramConfig(**SHAPE, **{**ENGRAM, **memory}))
        tables = []
        for table in model.model.engram_tables.values():
            table.sparse_grad = True
            tables.append(table.weight)
            table.weight.requires_grad_(False)  # left out of the dense groups
        optimizer = make_optimizer(model, 1e-5, 1e-5, 1e-5, 0.1)
        for weight in tables:
            weight.requires_grad_(True)
        super().__init__(model, optimizer=optimizer)
        self.sparse = torch.optim.SparseAdam(tables, lr=1e-5)

    def step(self, ids):
        seconds = super().step(ids)
        start = time.perf_counter()
        self.sparse.step()
        self.sparse.zero_grad()
        return seconds + time.perf_counter() - start


def compare(variants: dict, repetitions: int) -> dict:
    """Rounds of one step each -> {name: median seconds, median ratio to the first variant and its quartiles}."""
    times = {name: [] for name in variants}
    for _ in range(repetitions):
        ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
        for name, variant in variants.items():
            times[name].append(variant.step(ids))
    base = times[next(iter(variants))]
    rows = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds[1:], base[1:])]  # the first step allocates
        rows[name] = dict(seconds=statistics.median(seconds[1:]), ratio=statistics.median(ratios))
        rows[name]["quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    return rows


def peak_kilobytes(name="VmHWM") -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def of_size(slots: int, row_state: str) -> Variant:
    """One layer with about so many rows of 16 values, every page of them there."""
    heads, width = 16, 256
    memory = dict(engram_layer_ids=[1], engram_vocab_size=[slots // heads] * 2, n_embed_per_ngram=width // 2)
    variant = engram(row_state, **memory)
    part = next(iter(variant.tables.parts.values()))
    for tensor in (part.weight, part.second, part.first):
        if tensor is not None:
            tensor.fill_(1e-8)
    return variant


def step_memory(slots: int, row_state: str) -> dict:
    """Rows of one table, and peak memory of two steps beyond the model, the table and its state."""
    variants = {"Phi": Variant(PhiForCausalLM(PhiConfig(**SHAPE))), "Engram": of_size(slots, row_state)}
    before = peak_kilobytes("VmRSS")
    compare(variants, 4)
    part = next(iter(variants["Engram"].tables.parts.values()))
    return dict(slots=part.table.n_rows, beyond=(peak_kilobytes() - before) * 1024)


def main(argv=None):
    parser = SpanishParser(description="Mide lo que cuesta un paso de entrenamiento.")
    parser.add_argument("--tamanos", action="store_true", help="tablas de 260 mil a 26 millones de filas")
    parser.add_argument("--repeticiones", type=int, default=11, help="pasos de cada variante (%(default)s)")
    parser.add_argument("--json", help="archivo para las medidas")
    parser.add_argument("--uno", nargs=2, help="memoria de una sola tabla: filas y estado (lo usa --tamanos)")
    args = parser.parse_args(argv)
    if args.uno:
        print(json.dumps(step_memory(int(args.uno[0]), args.uno[1])))
        return
    print(f"{torch.get_num_threads()} hilos, lote {BATCH}×{LENGTH}, medianas de {args.repeticiones - 1} pasos\n")
    if args.tamanos:
        print("| filas | estado | ms por paso | respecto a la menor | cuartiles | memoria del paso, GB |")
        print("|" + " --- |" * 6)
        measured = []
        for row_state in ROW_STATES:
            rows = compare({slots: of_size(slots, row_state) for slots in SLOTS}, args.repeticiones)
            for slots in SLOTS:
                command = [sys.executable, __file__, "--uno", str(slots), row_state]
                result = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
                row = dict(rows[slots], **json.loads(result.stdout.splitlines()[-1]), row_state=row_state)
                measured.append(row)
                low, high = row["quartiles"]
                print(
                    f"| {spanish(row['slots'])} | {row_state} | {spanish(1000 * row['seconds'])} | "
                    f"{spanish(row['ratio'], 3)} | {spanish(low, 3)}–{spanish(high, 3)} | "
                    f"{spanish(row['beyond'] / 1e9, 2)} |", flush=True,
                )  # fmt: skip
    else:
        rows = {"Phi": Variant(PhiForCausalLM(PhiConfig(**SHAPE)))}
        rows |= {f"Engram, estado {state}": engram(state) for state in ROW_STATES}
        rows["Engram con torch.optim.SparseAdam"] = SparseAdamVariant()
        measured = compare(rows, args.repeticiones)
        print("| | ms por paso | respecto a Phi | cuartiles |\n| --- | --- | --- | --- |")
        for name, row in measured.items():
            low, high = row["quartiles"]
            print(
                f"| {name} | {spanish(1000 * row['seconds'])} | {spanish(row['ratio'], 3)} | "
                f"{spanish(low, 3)}–{spanish(high, 3)} |"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
