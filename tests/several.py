"""A process of `test_processes.py`: trains a small model with others and writes down what came out.

    python -m torch.distributed.run --nproc-per-node 4 tests/several.py FOLDER [shard] [stays] [parts] [scaled]
                                                                                [overflow] [alone]
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent), str(ROOT)]
import torch
from safetensors.torch import save_file

import engram.optimizers as optimizers
import engram.processes as processes
import test_rows
from engram.console import UserError
from engram.rows import TrainedTables
from engram.steps import run_steps

BLOCKS = 4  # per step, whatever the number of processes
STEPS = 4


def main(folder, *wishes):
    torch.set_num_threads(1)
    model = test_rows.fresh_model()
    for table in model.model.engram_tables.values():
        table.stays = "stays" in wishes
    parts = "parts" in wishes
    accelerator = processes.make_accelerator(parts)
    if "scaled" in wishes:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    world, losses = accelerator.num_processes, []
    recipe = dict(batch=1, accumulate=BLOCKS // world, processes=world, shard_model=parts)
    recipe = test_rows.replace(test_rows.RECIPE, **recipe)
    with TrainedTables(model, "adam", world, "shard" in wishes, accelerator.device) as tables:
        model.to(accelerator.device)
        optimizer = optimizers.make_optimizer(model, *test_rows.RATES, tables=tables)
        ready = processes.prepare(accelerator, model, optimizer)
        if "scaled" in wishes:  # float16's loss scaling without its precision
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.autocast = nullcontext

        collect, collected = tables.collect, []

        def overflowing():  # in the second step, in rows of the last process alone
            rows = collect()
            collected.append(len(rows))
            if len(collected) == 2 and accelerator.process_index == world - 1:
                rows[0].grad.fill_(float("inf"))
            return rows

        if "overflow" in wishes:
            tables.collect = overflowing

        if "alone" in wishes:
            torch.distributed.destroy_process_group = lambda: time.sleep(600)

        def on_step(step, loss, seconds):
            losses.append(loss)
            if "alone" in wishes and accelerator.process_index:
                raise UserError("Falla uno solo.")
            if parts and step == STEPS // 2:  # all saved, lost and loaded again on the way
                held = optimizer, accelerator.scaler, folder
                processes.save_parts(model, *held)
                with torch.no_grad():
                    for parameter in model.parameters():
                        processes.own_part(parameter).zero_()
                optimizer.dense.state.clear()
                processes.load_parts(model, *held)

        run_steps(
            accelerator, *ready, test_rows.corpus(model), recipe, steps=STEPS, label="", on_step=on_step
        )  # fmt: skip
        state = accelerator.unwrap_model(ready[0]).state_dict()
        weights = {name: processes.whole(value) for name, value in state.items()}
        sent = tables.sent
    kept = {name: table.weight for name, table in model.model.engram_tables.items() if table.weight is not None}
    state = dict(losses=torch.tensor(losses, dtype=torch.double), sent=torch.tensor(sent))
    state |= {f"table.{name}": weight.detach().cpu().contiguous() for name, weight in kept.items()}
    if "overflow" in wishes:
        state["scale"] = torch.tensor(accelerator.scaler.get_scale())
    if accelerator.is_main_process or "overflow" in wishes:
        state |= {f"dense.{name}": weight.cpu().clone() for name, weight in weights.items()}
    save_file(state, Path(folder) / f"{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    with processes.leaving_processes():
        main(*sys.argv[1:])
