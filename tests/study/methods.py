"""What the study on a pretrained model compares: a memory, what is put in its place, and how they learn."""

from functools import partial
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn

from engram.optimizers import make_optimizer
from engram.rows import TrainedTables
from engram.steps import run_steps
from study import pretrained


@torch.no_grad()
def sinkhorn_step(part, row_ids, grad, rate, betas, eps, number):
    """A step of TrainedTable as DeepSeek-V4.1-Flash trains its tables (arXiv 2609.19969): Nesterov momentum of 0.95,
    rows with almost no gradient skipped, the update brought to unit rows and equal columns in eleven turns, times the
    root of its width, 0.18 of the rate."""
    seen = grad.norm(dim=-1) > 1e-12
    row_ids, grad = row_ids[seen], grad[seen]
    momentum = part.first[row_ids].mul_(0.95).add_(grad)
    part.first[row_ids] = momentum
    update = grad + 0.95 * momentum
    for turn in range(11):
        along = turn % 2 - 1  # -1: rows; 0: columns
        size = 1.0 if along else (len(update) / update.shape[1]) ** 0.5
        update = update * (size / update.norm(dim=along, keepdim=True).clamp_min(eps))
    part.weight.index_add_(0, row_ids, update * (-0.18 * rate * update.shape[1] ** 0.5))


class Mlp(nn.Module):
    """Control: as many parameters as the memory uses for a token, in its place, and nothing looked up."""

    def __init__(self, llama, layers: dict[str, int], std: float):
        super().__init__()
        width = llama.config.hidden_size
        self.parts = nn.ModuleDict()
        for layer, parameters in layers.items():
            columns = round(parameters / 2 / width)
            part = nn.Sequential(
                nn.RMSNorm(width), nn.Linear(width, columns, False), nn.SiLU(), nn.Linear(columns, width, False)
            )
            nn.init.normal_(part[1].weight, std=std)
            nn.init.zeros_(part[3].weight)
            self.parts[layer] = part.to(llama.device)
            llama.layers[int(layer)].register_forward_pre_hook(self.add(part))

    def add(self, part):
        return lambda _, args: (args[0] + part(args[0]), *args[1:])


def used(memory) -> dict[str, int]:
    """Parameters of each layer of the memory that act on one token."""
    rows = {layer: memory.hash.primes[0].numel() * table.d_head for layer, table in memory.tables.items()}
    return {layer: sum(p.numel() for p in part.parameters()) + rows[layer] for layer, part in memory.layers.items()}


def add_lora(model, rank: int):
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


@torch.no_grad()
def noise(memory, size: float):
    for table in memory.tables.values():
        nn.init.normal_(table.weight, std=size)


@torch.no_grad()
def cleared(memory):
    for table in memory.tables.values():
        table.weight.zero_()


@torch.no_grad()
def rearranged(memory, how: str, generator):
    """Give the trained rows of each head to one another's n-grams ("barajadas"), or their mean to all ("media")."""
    for place, table in enumerate(memory.tables.values()):
        for head in table.weight.split(memory.hash.primes[place].flatten().tolist()):
            trained = head.any(-1).nonzero()[:, 0]
            rows = head[trained]
            mixed = rows[torch.randperm(len(rows), generator=generator)] if how == "barajadas" else rows.mean(0)
            head[trained] = mixed


def prepare(engram, control: str | None, size: float):
    """What a control changes in a memory before it learns; `size`: of its noise."""
    engram.one_row = control == "una-fila"
    if control == "ruido":
        noise(engram, size)
    for layer in engram.layers.values():
        if control == "sin-conv":
            layer.conv.requires_grad_(False)
        if control == "sin-puerta":
            layer.gate.register_forward_hook(lambda _, args, alpha: torch.ones_like(alpha))
        if control == "ganancia":  # the value projection keeps the rows' size
            nn.init.normal_(layer.value_proj.weight, std=layer.value_proj.in_features**-0.5)


def learn(
    model, engram, recipe, ids, steps: int, memory: dict, backbone=0.0, mlp=None, offset=0, optimizer="adamw"
) -> float:
    """Take the steps; returns the mean loss of the last 20."""
    sinkhorn = memory.get("row_state") == "sinkhorn"
    row_state = "adam" if sinkhorn else memory.get("row_state", "adam")
    tables = TrainedTables(engram.trainable, row_state) if engram else None
    for part in tables.parts.values() if sinkhorn else ():
        part._update = partial(sinkhorn_step, part)
    optimizer = make_optimizer(
        model, backbone, mlp or memory.get("dense", 0.0), memory.get("rows", 0.0), 0.0, optimizer,
        tables,
    )  # fmt: skip
    losses = []
    on_cpu, precision = pretrained.DEVICE.type == "cpu", "bf16" if pretrained.DTYPE == torch.bfloat16 else "no"
    run_steps(
        Accelerator(cpu=on_cpu, mixed_precision=precision), model, optimizer, SimpleNamespace(train=ids), recipe,
        steps=steps, label="paso", offset=offset, on_step=lambda step, loss, seconds: losses.append(loss),
    )  # fmt: skip
    if tables:
        tables.__exit__(None)
    return sum(losses[-20:]) / len(losses[-20:])
