"""What a step of transformers' Trainer costs with the whole table in AdamW and with `SparseRows`, by table size.

    python tests/bench/trainers.py --repeticiones 30

A tiny model, so that the table is nearly all of a step; the two take turns, each on a model of its own.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
import helpers
from engram.console import SpanishParser, run_script, spanish
from engram.trainers import SparseRows
from phi1_engram import PhiEngramForCausalLM


class SparseTrainer(SparseRows, Trainer):
    pass


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.began)


def steps_of(kind, rows: int, steps: int) -> list[float]:
    """Seconds of steps after the first two."""
    torch.manual_seed(0)
    model, clock = PhiEngramForCausalLM(helpers.make_config(engram_vocab_size=[rows // 8] * 2)), Clock()
    texts = [{"input_ids": ids, "labels": ids} for ids in helpers.random_ids(model, 16, 64)]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=steps + 2, per_device_train_batch_size=4, weight_decay=0.1, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = kind(model, options, train_dataset=texts, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds[2:]


def main(argv=None):
    parser = SpanishParser(description="Un paso del Trainer, con SparseRows y sin.", epilog="Ejemplo: --repeticiones 9")
    parser.add_argument("--repeticiones", type=int, default=30, metavar="N", help="pasos de cada uno (%(default)s)")
    args = parser.parse_args(argv)
    for rows in (20_000, 2_000_000):
        spent = {Trainer: [], SparseTrainer: []}
        for _ in range(3):  # in turns
            for kind, seconds in spent.items():
                seconds += steps_of(kind, rows, -(-args.repeticiones // 3))
        words = []
        for kind, seconds in spent.items():
            low, middle, high = (spanish(1e3 * value, 1) for value in statistics.quantiles(seconds, n=4))
            words.append(f"{kind.__name__} {middle} ms ({low}–{high})")
        ratio = statistics.median(spent[Trainer]) / statistics.median(spent[SparseTrainer])
        print(f"{spanish(2 * rows)} filas en dos capas: {', '.join(words)}; {spanish(ratio, 1)} veces", flush=True)


if __name__ == "__main__":
    run_script(main)
