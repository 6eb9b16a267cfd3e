"""Optimisers of dense weights beside the rows that a step reads: one step, one clipping norm, one schedule."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import math
from functools import partial

import torch

from engram.console import UserError
from engram.processes import average_gradients, beside_parts, in_any_process, whole

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")


class EngramOptimizer(torch.optim.Optimizer):
    """The optimiser of dense weights, and the rows that a step reads, behind one `step`.

    As one optimiser it makes one decision when a float16 gradient overflows: all of it steps, or nothing does.
    """

    def __init__(self, dense: torch.optim.Optimizer, tables=None, table_rate=0.0):
        self.dense, self.tables = dense, tables
        self.rows = dict(params=[], lr=table_rate, full_lr=table_rate)
        super().__init__([*dense.param_groups, self.rows], {})

    def collect(self):
        """After the last backward of a step: exchange rows between processes, and take their gradients in."""
        if self.tables:
            first = next(p for group in self.dense.param_groups for p in group["params"])
            self.rows["params"] = beside_parts(self.tables.collect(), first)

    @torch.no_grad()
    def step(self, closure=None):
        self.dense.step()
        if self.tables:
            self.tables.step(self.rows["lr"])

    def state_dict(self):
        return {"parts": [self.dense.state_dict()]}

    def load_state_dict(self, state):
        dense = state["parts"][0]
        if type(self.dense).__name__ == "Adafactor" and any("row_var" in kept for kept in dense["state"].values()):
            raise UserError(
                "Este entrenamiento es de una versión anterior, cuyo Adafactor daba pasos cientos de veces menores que "
                "las tasas, y no se puede seguir: empieza de nuevo, con otra --salida."
            )
        self.dense.load_state_dict(dense)
        self.param_groups = [*self.dense.param_groups, self.rows]


def make_optimizer(
    model, backbone_rate: float, memory_rate: float, table_rate: float, decay: float, kind="adamw", tables=None
) -> EngramOptimizer:
    """Groups of the parameters that require a gradient, beside `tables`, the rows (TrainedTables; no weight decay).

    Args:
        kind: "adamw"; "adamw8bit", with 8-bit states (bitsandbytes); or "adafactor", whose second moments are factored
            (Shazeer and Stern, 2018), here with steps of the rate's own size, as Adam's are: torch's are the rate's
            share of what a weight measures, hundreds of times less.
    """
    # Embedding and head have a group of their own in every checkpoint, though they train as the other matrices do.
    groups = {"matrices": [], "outer": [], "vectors": [], "memory": [], "memory_vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim != 2
            if "engram" in name:
                groups["memory_vectors" if vector else "memory"].append(parameter)
            elif vector:
                groups["vectors"].append(parameter)
            else:
                groups["matrices" if ".layers." in name else "outer"].append(parameter)
    rates = dict.fromkeys(groups, backbone_rate) | dict(memory=memory_rate, memory_vectors=memory_rate)
    # full_lr is what the schedule multiplies.
    groups = [
        dict(
            params=parameters, lr=rates[name], full_lr=rates[name],
            weight_decay=decay if name in ("matrices", "outer") else 0.0,
        )
        for name, parameters in groups.items() if parameters
    ]  # fmt: skip
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as dense
    elif kind == "adafactor":
        try:  # with it come the Trainer's modules, peft's and bitsandbytes' where they are installed
            from transformers import Adafactor
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"No se puede usar adafactor ({reason}). Si tienes peft o bitsandbytes, actualízalos: "
                "pip install -U peft bitsandbytes transformers"
            ) from None
        dense = partial(Adafactor, scale_parameter=False, relative_step=False)
    else:
        dense = torch.optim.AdamW
    return EngramOptimizer(dense(groups), tables, table_rate)


def clip_gradients(accelerator, optimizer, limit: float) -> float:
    """Bring together what all processes found, and scale all gradients, those of rows too, to a joint norm of at most
    `limit`. Returns the norm before.

    The norm is what it would be with the whole tables' dense gradients.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    dense = [p for group in inner.dense.param_groups for p in group["params"] if p.grad is not None]
    average_gradients(dense)
    inner.collect()
    rows = [row for _, row in inner.tables.pairs.values()] if inner.tables else []
    if accelerator.scaler is not None and inner.tables and inner.tables.sharded:
        # Rows that overflow are seen by their keeper alone, and the scalers of all have to skip the same steps.
        if in_any_process(not all(row.grad.isfinite().all() for row in rows), accelerator.device):
            dense[0].grad.mul_(math.nan)
    accelerator.unscale_gradients(optimizer)
    squares = whole(torch.nn.utils.get_total_norm([p.grad for p in dense]) ** 2)
    own = sum((p.grad.square().sum() for p in rows), torch.zeros((), device=squares.device))
    if inner.tables and inner.tables.sharded:
        torch.distributed.all_reduce(own)
    norm = (squares + own).sqrt().float()
    for parameters in (dense, rows):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.item()


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
