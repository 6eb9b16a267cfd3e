"""Thousands of steps in each precision of training, beside one another: is any of them ever not a number?

    python tests/bench/precision.py                                # 2,000 steps in each precision, about half an hour
    python tests/bench/precision.py --pasos 200 --solo float16

A small Phi with memory learns the standard library, all of it at once, with the training loop itself. float16 has
accelerate's loss scaling, which on a CPU it does not offer by itself; the precision is then the CPU's own autocast.
"""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from sys import path

path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, set_seed

from engram.console import SpanishParser, run_script, spanish
from engram.corpus import prepare_corpus
from engram.demo import DEMO_RECIPE, DEMO_SHAPE, demo_tokenizer
from engram.optimizers import make_optimizer
from engram.rows import TrainedTables
from engram.steps import evaluate, run_steps
from engram.texts import standard_library, text_files
from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM

PRECISIONS = ("float32", "bfloat16", "float16")
MEMORY = dict(engram_layer_ids=[1, 2], engram_vocab_size=[5000] * 2, n_embed_per_ngram=64, n_head_per_ngram=4)
RATES = dict(backbone_rate=1e-3, memory_rate=2.5e-3, table_rate=2e-2)


def make_accelerator(precision: str) -> Accelerator:
    """On a card accelerate's own; on a CPU it has no float16, and gets torch's autocast and loss scale for it."""
    short = dict(float32="no", bfloat16="bf16", float16="fp16")[precision]
    AcceleratorState._reset_state(True)  # the precision is of the whole process
    cpu = not torch.cuda.is_available()
    late = cpu and short == "fp16"
    accelerator = Accelerator(
        mixed_precision="no" if late else short, cpu=cpu, kwargs_handlers=[AutocastKwargs(cache_enabled=False)]
    )
    if late:
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def train(precision: str, corpus, tokenizer, recipe, steps: int) -> dict:
    set_seed(0)
    model = PhiEngramForCausalLM(
        PhiEngramConfig(**DEMO_SHAPE, **MEMORY, eos_token_id=tokenizer.eos_token_id, pad_token_id=None),
        tokenizer=tokenizer,
    )  # fmt: skip
    accelerator, seen = make_accelerator(precision), Counter()
    with TrainedTables(model.to(accelerator.device)) as tables:
        optimizer = make_optimizer(model, *RATES.values(), recipe.weight_decay, tables=tables)
        running, optimizer = accelerator.prepare(model, optimizer)

        def on_step(step, loss, seconds):
            seen["losses"] += not torch.isfinite(torch.tensor(loss))

        seconds = run_steps(
            accelerator, running, optimizer, corpus, recipe, steps=steps, label=precision, on_step=on_step
        )
        updates = {part.steps for part in tables.parts.values()}
        with accelerator.autocast():
            loss = evaluate(running, corpus, recipe, accelerator.device)["loss"]
    scale = accelerator.scaler.get_scale() if accelerator.scaler else None
    wrong = sum(not torch.isfinite(value).all() for value in model.state_dict().values())
    accelerator.free_memory()
    return dict(loss=loss, seconds=seconds / steps, losses=seen["losses"], skipped=steps - max(updates), wrong=wrong,
                scale=scale)  # fmt: skip


def main(argv=None):
    parser = SpanishParser(description="Entrena en cada precisión y cuenta lo que no son números.")
    parser.add_argument("--pasos", type=int, default=2000, help="pasos en cada precisión (%(default)s)")
    parser.add_argument("--solo", choices=PRECISIONS, help="una sola precisión")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    tokenizer = demo_tokenizer(text_files(standard_library()), DEMO_SHAPE["vocab_size"])
    recipe = replace(DEMO_RECIPE, batch=2, length=64)  # a CPU emulates half precision, slowly
    corpus = prepare_corpus(tokenizer, length=recipe.length)
    chosen = [args.solo] if args.solo else PRECISIONS
    rows = {name: train(name, corpus, tokenizer, recipe, args.pasos) for name in chosen}
    print(f"\n{args.pasos} pasos de {recipe.tokens_per_step} tokens en cada precisión, en "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}\n")  # fmt: skip
    print("| precisión | pérdida final | pérdidas que no son números | pasos saltados | tensores con algo que no es "
          "número | escala final | ms por paso |\n|" + " --- |" * 7)  # fmt: skip
    for name, row in rows.items():
        scale = "—" if row["scale"] is None else spanish(row["scale"])
        print(
            f"| {name} | {spanish(row['loss'], 3)} | {row['losses']} | {row['skipped']} | {row['wrong']} | {scale} | "
            f"{spanish(1000 * row['seconds'])} |"
        )
    print(f"\n{spanish(time.perf_counter() - started)} s en total.")


if __name__ == "__main__":
    run_script(main)
