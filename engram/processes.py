"""Several processes that train together: how they meet and part, and a model of which each keeps a part (FSDP2).

    accelerate launch --num_processes 2 train_phi_engram.py --datos mi-codigo/                     # whole model on each
    accelerate launch --num_processes 2 train_phi_engram.py --datos mi-codigo/ --repartir-modelo   # a part on each

Rows of the tables are not of this room: `engram/rows.py` trains, exchanges and saves them in either case.
Used by `train_phi_engram.py`; there is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import os
import sys
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import tree_map

from engram.console import UserError, tell


def make_accelerator(shard=False, **options) -> Accelerator:
    """bfloat16 where the card computes it (capability 8.0), float16 with loss scaling below, float32 on a CPU.

    Args:
        shard: each process keeps a part of every dense weight, of its gradient and of its optimiser state.
    Raises:
        UserError: accelerate was told to shard by itself, or there is nobody to share with.
    """
    if not shard and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError(
            "accelerate viene configurado para repartir el modelo (FSDP), y aquí eso se pide de otra forma: accelerate "
            "launch --multi_gpu --num_processes 2 train_phi_engram.py --repartir-modelo, con las demás opciones detrás."
        )
    precision = "no"
    if torch.cuda.is_available():
        precision = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while one process tokenises or saves
    # Without a card accelerate joins processes only when it is told that they are to use the CPU.
    cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    # Every weight is used once a pass: kept copies of them in half precision would only fill the card.
    handlers = [patient, AutocastKwargs(cache_enabled=False)]
    plugin = None
    if shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Nothing here changes a module's output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["PhiEngramDecoderLayer"],
            # Weights meet in float32 and autocast lowers them where it does for one process: the same results.
            mixed_precision_policy=MixedPrecisionPolicy(),
        )  # fmt: skip
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers, fsdp_plugin=plugin, **options
    )
    if shard and accelerator.num_processes == 1:
        raise UserError(
            "--repartir-modelo es para varios procesos y este está solo: accelerate launch --multi_gpu --num_processes "
            "2 train_phi_engram.py --repartir-modelo, con las demás opciones detrás."
        )
    if shard and accelerator.distributed_type != DistributedType.FSDP:  # accelerate shards over cards alone
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def prepare(accelerator, model, optimizer):
    """accelerate's own `prepare`, without DDP, whose buckets would hold a gradient a second time beside the sum over
    micro-batches: `average_gradients` does its work once a step, in place."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return accelerator.prepare(model, optimizer)
    if accelerator.num_processes > 1:
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.detach(), 0)
    return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)


@torch.no_grad()
def average_gradients(parameters):
    """The mean over processes of whole gradients, in place; FSDP has averaged those in parts."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    for parameter in parameters if world > 1 else ():
        if parameter.grad is not None and not in_parts(parameter):
            torch.distributed.all_reduce(parameter.grad.div_(world))


def highest(value: float, device) -> float:
    """The largest that one of the processes has; all have to ask."""
    if not torch.distributed.is_initialized():
        return value
    found = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.item()


def in_any_process(flag: bool, device) -> bool:
    return highest(flag, device) > 0


@contextmanager
def leaving_processes():
    """At the end of this all processes leave their group together; one that fails says why and is gone at once.

    Leaving politely, as the interpreter does too, waits for the others, and with NCCL they wait for this one: for as
    long as `make_accelerator` has them wait. The launcher ends the others when one has ended with a status.
    """
    try:
        yield
    except BaseException as error:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else tell(error)
        if code is None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if code is None else code)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---------- A model in parts ----------

def in_parts(tensor) -> bool:
    """Whether this process keeps a part of it (DTensor)."""
    return isinstance(tensor, DTensor)


def put_apart(model):
    """Let go of the other processes' parts, which a forward pass without backward leaves here."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def own_part(tensor):
    return tensor.to_local() if in_parts(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from the parts of all processes, which all have to ask for it; any other as it is."""
    return tensor.full_tensor() if in_parts(tensor) else tensor


def part_like(parameter, value):
    """What `own_part` made of an optimiser's state: as `parameter` is when it has a number for each of its values."""
    if not in_parts(parameter) or not isinstance(value, torch.Tensor) or value.shape != own_part(parameter).shape:
        return value
    return DTensor.from_local(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip


def beside_parts(rows: list, parameter) -> list:
    """Parameters of plain gradients as DTensors over the same memory where `parameter` is one: a loss scale takes no
    mixture of both. "Replicated" only says that each process looks at its own."""
    if not in_parts(parameter):
        return rows

    def alike(tensor):
        return DTensor.from_local(tensor, parameter.device_mesh, [Replicate()], run_check=False)

    same = [nn.Parameter(alike(row.detach())) for row in rows]
    for one, row in zip(same, rows):
        one.grad = alike(row.grad)
    return same


def part_files(folder) -> tuple[Path, Path]:
    rank = torch.distributed.get_rank()
    return Path(folder, f"modelo-{rank}.safetensors"), Path(folder, f"optimizador-{rank}.bin")


def save_parts(model, optimizer, scaler, folder):
    """This process's part of the weights that are trained and of their optimiser's state, and the loss scale."""
    weights, states = part_files(folder)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    save_file({name: own_part(p.detach()).contiguous() for name, p in trained.items()}, weights)
    state = dict(optimizer=tree_map(own_part, optimizer.state_dict()), scaler=scaler.state_dict() if scaler else None)
    torch.save(state, states)


def load_parts(model, optimizer, scaler, folder):
    """What `save_parts` wrote, back into a model and an optimiser of the same parts."""
    weights, states = part_files(folder)
    with safe_open(weights, "pt") as file, torch.no_grad():
        parameters = dict(model.named_parameters())
        for name in file.keys():
            own_part(parameters[name]).copy_(file.get_tensor(name))
    state = torch.load(states, map_location="cpu", weights_only=True)
    parameters = [p for group in optimizer.dense.param_groups for p in group["params"]]
    for number, kept in state["optimizer"]["parts"][0]["state"].items():
        kept.update({key: part_like(parameters[number], value) for key, value in kept.items()})
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:  # none comes from where nothing is scaled
        scaler.load_state_dict(state["scaler"])


def gather(model, keep: bool):
    """Put all weights together in host memory of the process that is to `keep` them, to be saved and nothing else."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if in_parts(parameter):
                value = parameter.full_tensor()  # all ask, one keeps
                setattr(module, name, nn.Parameter(value.cpu() if keep else value.new_empty(0), requires_grad=False))
