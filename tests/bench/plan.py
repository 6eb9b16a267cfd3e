"""The plan of memory against what real training steps take, each in a process of its own, or in two of which one is
measured.

    python tests/bench/plan.py                 # about fifteen minutes with one thread, and 15 GB for Phi-1
    python tests/bench/plan.py --solo demo     # only the shapes that have this in their name

Measured is the highest resident memory (VmHWM) of three steps less what the same process held before the model was
there, its libraries already warm; tables and their state are written whole first, as a long training does. Memory
that is freed goes back to the system at once, as where memory is scarce; `--reservado` leaves glibc as it comes.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engram.console import SpanishParser, UserError, run_script, spanish
from engram.counting import Choice, account
from engram.demo import DEMO_SHAPE
from engram.machines import matmul_flops, this_machine
from engram.optimizers import make_optimizer
from engram.plan import command, flops_per_token, from_args, search, steady_allocator
from engram.processes import make_accelerator, prepare
from engram.rows import TrainedTables
from engram.steps import PHI_1_RECIPE, run_steps
from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM
from train_phi_engram import parse

FOREIGN = dict(engram_tokenizer_compression=False, eos_token_id=0)
WIDE = dict(
    vocab_size=51200, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
    max_position_embeddings=1024, engram_layer_ids=[1, 4], engram_vocab_size=[50000] * 2, **FOREIGN,
)  # fmt: skip
DEMO = dict(
    DEMO_SHAPE, engram_layer_ids=[1, 2], engram_vocab_size=[20000] * 2, n_embed_per_ngram=128, n_head_per_ngram=8,
    **FOREIGN,
)
PHI = dict(FOREIGN)  # Phi-1 itself and the default memory, from random weights
STEPS = 3
TOGETHER = 2  # processes of a model in parts
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CASES = [  # name, shape, phase, what differs from Choice
    ("512 × 8", WIDE, 1, dict(batch=4, length=256)),
    ("512 × 8", WIDE, 2, dict(batch=4, length=256)),
    ("512 × 8", WIDE, 2, dict(batch=1, length=256)),
    ("512 × 8", WIDE, 2, dict(batch=2, length=256, accumulate=2)),
    ("512 × 8", WIDE, 1, dict(batch=2, length=512, recompute=True)),
    ("512 × 8", WIDE, 2, dict(batch=2, length=512, recompute=True)),
    ("512 × 8", WIDE, 2, dict(batch=1, length=512, recompute=True, optimizer="adafactor", row_state="fila")),
    ("demo", DEMO, 1, dict(batch=16, length=256)),
    ("demo", DEMO, 2, dict(batch=16, length=256)),
    ("demo", DEMO, 2, dict(batch=16, length=256, recompute=True)),
    ("demo", DEMO, 2, dict(batch=4, length=1024, optimizer="adafactor")),
    ("512 × 8", WIDE, 2, dict(batch=1, length=256, optimizer="adamw8bit")),
    ("512 × 8 en 2 procesos", WIDE, 2, dict(batch=2, length=256)),
    ("512 × 8 en 2 procesos", WIDE, 2, dict(batch=2, length=256, accumulate=4)),
    ("512 × 8 en partes", WIDE, 1, dict(batch=2, length=256, shard_model=True)),
    ("512 × 8 en partes", WIDE, 2, dict(batch=2, length=256, shard_model=True)),
    ("512 × 8 en partes", WIDE, 2, dict(batch=2, length=512, recompute=True, shard_model=True)),
    ("Phi-1", PHI, 1, dict(batch=1, length=512)),
    ("Phi-1", PHI, 2, dict(batch=1, length=512, recompute=True, optimizer="adafactor", row_state="fila")),
]


def resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def train(fields: dict, choice: Choice, phase: int, steps: int) -> dict:
    """Some steps of the training loop itself on random tokens, on the card where there is one.

    Returns {"seconds" per step, "losses", "scale" of float16's loss at the end}.
    """
    model = PhiEngramForCausalLM(PhiEngramConfig(**fields))
    model.move_memory(choice.place)
    recipe = replace(
        PHI_1_RECIPE, batch=choice.batch, length=choice.length, accumulate=choice.accumulate,
        optimizer=choice.optimizer, row_state=choice.row_state, recompute=choice.recompute,
        processes=WORLD, shard_model=choice.shard_model,
    )  # fmt: skip
    if recipe.recompute:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase == 2 or "engram" in name)
    accelerator = make_accelerator(choice.shard_model)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (steps + 1) * recipe.tokens_per_step)
    losses = []
    with TrainedTables(model, recipe.row_state, WORLD, device=accelerator.device) as tables:
        model.to(accelerator.device)
        for part in tables.parts.values():
            for tensor in (part.weight, part.first, part.second):
                if tensor is not None:
                    tensor.fill_(1e-6)  # a page that nobody wrote is not there
        optimizer = make_optimizer(model, 1e-5, 1e-5, 1e-5, 0.1, recipe.optimizer, tables)
        model, optimizer = prepare(accelerator, model, optimizer)
        corpus = SimpleNamespace(train=tokens.astype(np.uint16))
        seconds = run_steps(
            accelerator, model, optimizer, corpus, recipe, steps=steps, label=f"Fase {phase}",
            on_step=lambda step, loss, spent: losses.append(loss),
        )  # fmt: skip
        scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else None
        accelerator.free_memory()
    return dict(seconds=seconds / steps, losses=losses, scale=scale)


def proposed(config, phase: int, *more):
    """The command that `--plan colab` proposes for one phase, and what that command asks for."""
    _, choice, colab, given = from_args(parse(["--plan", "colab", f"--pasos-fase{3 - phase}", "0", *more]))
    found = search(config, choice, colab)
    if found is None:
        raise UserError(f"--plan colab no propone nada para la fase {phase}.")
    line = command(found, colab, given)
    return line, from_args(parse(shlex.split(line)[2:]))[1]


def one(number: int, steady: bool) -> dict:
    _, fields, phase, different = CASES[number]
    choice = replace(Choice(accumulate=1), **different)
    small = dict(DEMO, num_hidden_layers=2, engram_layer_ids=[1], engram_vocab_size=[50] * 2)
    train(small, replace(choice, batch=1, length=8), 2, 1)  # what libraries take once, however large the model
    if steady:
        steady_allocator()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    seconds = train(fields, choice, phase, STEPS)["seconds"]
    measured = resident("VmHWM") - before
    needs = account(PhiEngramConfig(**fields), choice, this_machine(), phase)["RAM"]
    planned = sum(needs.values()) - needs["Python y bibliotecas"]
    flops = flops_per_token(PhiEngramConfig(**fields), choice, phase) * choice.tokens * choice.accumulate
    share = flops / seconds / matmul_flops()
    return dict(planned=planned, measured=measured, share=share, needs={k: v for k, v in needs.items()})


def main(argv=None):
    parser = SpanishParser(description="Compara el plan de memoria con lo que ocupan pasos de verdad.")
    parser.add_argument("--solo", default="", help="solo las formas con esto en el nombre")
    parser.add_argument("--uno", type=int, help="un solo caso, en este proceso")
    parser.add_argument("--reservado", action="store_true", help="con la reserva de memoria tal como viene")
    args = parser.parse_args(argv)
    if args.uno is not None:
        result = one(args.uno, not args.reservado)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    started = time.perf_counter()
    print("| forma | fase | lote × longitud | receta | plan | medido | diferencia | del producto de matrices |")
    print("|" + " --- |" * 8)
    for number, (name, _, phase, different) in enumerate(CASES):
        if args.solo not in name:
            continue
        if different.get("optimizer") == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
            print("(adamw8bit: sin medir; pide pip install bitsandbytes)", file=sys.stderr)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            words = [__file__, "--uno", str(number), *["--reservado"] * args.reservado]
            if " en " in name:
                words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={TOGETHER}", *words]
            words = [sys.executable, *words]
            result = subprocess.run(words, capture_output=True, text=True, cwd=scratch)
        if result.returncode:
            raise RuntimeError(result.stderr[-2000:])
        row = json.loads(result.stdout.splitlines()[-1])
        choice = replace(Choice(accumulate=1), **different)
        words = [choice.optimizer, f"filas {choice.row_state}", *["recalculando"] * choice.recompute]
        words += [f"{choice.accumulate} por paso"] * (choice.accumulate > 1)
        print(
            f"| {name} | {phase} | {choice.batch} × {choice.length} | {', '.join(words)} | "
            f"{spanish(row['planned'] / 1e6)} MB | {spanish(row['measured'] / 1e6)} MB | "
            f"{spanish(100 * (row['planned'] / row['measured'] - 1), 1)} % | {spanish(row['share'], 2)} |", flush=True,
        )  # fmt: skip
    print(f"\n{torch.get_num_threads()} hilos; {spanish(time.perf_counter() - started)} s en total.")


if __name__ == "__main__":
    run_script(main)
