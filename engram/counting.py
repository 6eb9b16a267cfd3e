"""Every gigabyte of a training, counted before it begins: by tracing a step on fake tensors, and by arithmetic."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import json
import math
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import safetensors
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import initialization as init

from engram.adapters import add_lora, learns
from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM

# Older ones copy what they write; from the memory of a card all have to.
SAVING_COPIES = Version(safetensors.__version__) < Version("0.8")


@dataclass(frozen=True)
class Machine:
    """What one machine has, in bytes. `cards` train together; every process has its share of RAM and its own card."""

    name: str
    gpu: float  # usable by one process on one card; 0: no card
    cards: int
    ram: float
    disk: float
    half: torch.dtype | None  # of autocast; None computes in float32
    flops: float  # sustained by one card, or by this CPU
    base_gpu: float  # taken before the first tensor: CUDA's context, work areas of its libraries
    base_ram: float  # system and notebook of a named machine, Python and libraries
    scratch: str = ""  # a folder on another disk, for the model to start from
    measured: bool = False


class LiveStorage(TorchDispatchMode):
    """Bytes of all storages that live, by kind, and what they were at the highest sum (each kind times its weight)."""

    def __init__(self, vocab_size: int, weights: dict):
        super().__init__()
        self.vocab_size, self.weights = vocab_size, weights
        self.entries = {}  # storage -> [kind, bytes]
        self.bytes = dict(activaciones=0, logits=0, media=0, gradientes=0)
        self.peak, self.at_peak = 0, {}

    def count(self, tensor, kind):
        """Give a storage its kind; None for what is counted elsewhere, parameters for one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.entries:
            self.forget(key)
        else:
            weakref.finalize(storage, self.forget, key)
        self.entries[key] = kind, storage.nbytes()
        if kind:
            self.bytes[kind] += storage.nbytes()

    def forget(self, key):
        kind, size = self.entries.pop(key)
        if kind:
            self.bytes[kind] -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.entries:
                wide = tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size
                self.count(tensor, "logits" if wide else "activaciones")
        total = sum(self.weights.get(kind, 1) * size for kind, size in self.bytes.items())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.bytes)
        return output


class AsOnCard(TorchFunctionMode):
    """What the "meta" device has not: autocast in precision `half`, and attention that keeps no T x T matrix."""

    TO_HALF = (F.linear, torch.matmul, F.scaled_dot_product_attention)
    TO_FLOAT = (torch.pow, F.layer_norm, F.softmax, F.cross_entropy)  # autocast's own lists, as far as the model goes

    def __init__(self, half, live: LiveStorage):
        super().__init__()
        self.half, self.live = half, live

    def cast(self, tensor, dtype):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        copy = tensor.to(dtype)
        if isinstance(tensor, torch.nn.Parameter):
            self.live.count(copy, "media")  # train_phi_engram.py tells autocast to keep none: they live in the graph
        return copy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.half and func in self.TO_HALF + self.TO_FLOAT:
            dtype = self.half if func in self.TO_HALF else torch.float32
            args = [self.cast(value, dtype) for value in args]
            kwargs = {name: self.cast(value, dtype) for name, value in (kwargs or {}).items()}
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], 0.0, True)[0]
        return func(*args, **(kwargs or {}))


def empty_model(config: PhiEngramConfig, lora=0) -> PhiEngramForCausalLM:
    """The model without contents, its tables without rows; with adapters of rank `lora`."""
    config = PhiEngramConfig(**{**config.to_dict(), "engram_tokenizer_compression": False})
    with torch.device("meta"), init.no_init_weights():
        model = PhiEngramForCausalLM(config, empty_tables=True)
        if lora:
            add_lora(model, lora)
    return model


@lru_cache(maxsize=256)
def _traced(config_json, tokens, phase, recompute, half, accumulated, lora):
    config = PhiEngramConfig.from_dict(json.loads(config_json))
    model = empty_model(config, lora).train()
    live = LiveStorage(config.vocab_size, dict(gradientes=1, media=1))
    card = AsOnCard(half, live)
    for table in model.model.engram_tables.values():
        # As many rows as the batch can read: what a step works on, never the table.
        heads = model.model.engram_hash.offsets.shape[1]
        table.weight = torch.nn.Parameter(torch.empty(tokens * heads, table.d_head, device="meta"))
    if recompute:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), card)})
    for tensor in [*model.parameters(), *model.buffers()]:
        live.count(tensor, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, phase, lora))
        rows = "engram_tables" in name
        if parameter.requires_grad and not rows:
            parameter.register_post_accumulate_grad_hook(lambda p: live.count(p.grad, "gradientes"))
            if accumulated:
                parameter.grad = torch.zeros_like(parameter)
                live.count(parameter.grad, "gradientes")
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with live:
        with card:
            # The mask as it is where nothing is padding; finding that out looks at contents.
            output = model(ids, labels=ids, use_cache=False, attention_mask=dict(full_attention=None, engram=None))
            if half:
                output.logits = output.logits.float()  # accelerate gives back float32
        loss = output.loss
        del output
        loss.backward()
    return live.at_peak


def traced(config, tokens, phase, recompute=False, half=None, accumulated=False, lora=0) -> dict[str, int]:
    """Bytes that live at the peak of one forward and backward pass, beside weights and whole tables.

    Args:
        tokens: batch * length; with attention that keeps no T x T matrix they enter alike.
        accumulated: an earlier micro-batch has left its gradients.
        lora: rank of the adapters that learn in the place of Phi.
    Returns:
        {"activaciones", "logits", "media" (weights in half precision), "gradientes"}.
    """
    same = dict(engram_vocab_size=[2] * (config.max_ngram_size - 1))  # the step does not depend on it
    key = json.dumps({**config.to_dict(), **same}, sort_keys=True, default=str)
    return _traced(key, tokens, phase, recompute, half, accumulated, lora)


@dataclass(frozen=True)
class Choice:
    """The part of a recipe that costs memory, by the names of train_phi_engram.py's Recipe, and where tables live."""

    batch: int = 2
    length: int = 512
    accumulate: int = 8
    optimizer: str = "adamw"
    row_state: str = "adam"
    recompute: bool = False
    place: str = "auto"
    steps: tuple[bool, bool] = (True, True)  # which phases run
    keep: int = 1  # checkpoints kept
    resume: float | None = None  # bytes of the checkpoints that are there already, of a training to go on with
    shard: bool = False  # every process keeps a part of the rows instead of all
    shard_model: bool = False  # and of the dense weights, their gradients and states
    asked: tuple[int | None, int | None] = (None, None)  # steps of each phase, where they were said
    corpus: float | None = None  # tokens to train on, where that can be guessed
    lora: int = 0  # rank of the adapters that phase 2 trains in the place of Phi

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@lru_cache(maxsize=8)
def _shapes(config_json, lora):
    model = empty_model(PhiEngramConfig.from_dict(json.loads(config_json)), lora)
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()], {
        int(layer_id): (table.n_rows, table.d_head) for layer_id, table in model.model.engram_tables.items()
    }


def shapes(config, lora=0):
    """[(name, shape) of dense parameters], {layer_id: (rows, values per row)}; `lora`: rank of adapters."""
    return _shapes(json.dumps(config.to_dict(), sort_keys=True, default=str), lora)


def optimizer_bytes(shape: tuple[int, ...], optimizer: str) -> tuple[int, int]:
    """Bytes that an optimiser keeps for one float32 parameter, and those that its update takes for a moment.

    AdamW (torch): two numbers per value, and one for the count of steps. Adafactor (transformers): one per row and
    column of a matrix, or per value, and one more. Of 8 bits (bitsandbytes): from 4,096 values on, two bytes per value,
    two scales per 256, and two tables of 256.
    """
    size = math.prod(shape)
    if optimizer == "adamw8bit":
        return 2 * (size + 4 * -(-size // 256) + 1024) if size >= 4096 else 8 * size, 16 * size
    if optimizer == "adafactor":
        kept = size // shape[-1] + size // shape[-2] if len(shape) > 1 else size
        return 4 * kept + 4, 8 * size
    return 8 * size + 4, 8 * size


def account(config, choice: Choice, machine: Machine, phase: int, step=traced) -> dict[str, dict[str, float]]:
    """Bytes at the peak of a phase: {"GPU" of one card, "RAM" of all processes, "disco"}: {item: bytes}.

    The items of each add up to its peak. Without a card what computes is in "RAM". Tables count whole, with the state
    of all their rows: what a long training reaches. `step`: `traced`, or what stands for it.
    """
    lora = choice.lora if phase == 2 else 0
    dense, tables = shapes(config, lora)
    numel = {name: math.prod(shape) for name, shape in dense}
    trained = [(name, shape) for name, shape in dense if learns(name, phase, lora)]
    weights, gradients = 4 * sum(numel.values()), 4 * sum(numel[name] for name, _ in trained)
    kept, passing = zip(*(optimizer_bytes(shape, choice.optimizer) for _, shape in trained))
    states = sum(kept)
    # On a card AdamW updates all parameters of a group at once, and takes one more number for each.
    at_once = machine.gpu and choice.optimizer == "adamw"
    # One at a time, and the last work tensor of one parameter goes when the next has its own.
    second = 4 * sorted(math.prod(shape) for _, shape in trained)[-2]
    passing = gradients if at_once else max(passing) + second
    if machine.gpu and choice.optimizer == "adamw8bit":
        passing = 0  # in place, in one kernel
    rows = sum(4 * n * d for n, d in tables.values())
    row_states = 2 * rows if choice.row_state == "adam" else sum(4 * n for n, _ in tables.values())

    peak = step(config, choice.tokens, phase, choice.recompute, machine.half, choice.accumulate > 1, lora)
    orders = config.max_ngram_size - 1
    read = [  # bytes of all rows that a step reads, if no two are the same
        4 * d * min(n, choice.tokens * choice.accumulate * orders * config.n_head_per_ngram) for n, d in tables.values()
    ]
    share = machine.cards if choice.shard_model else 1
    lasting = {"pesos": weights / share, "estado del optimizador": states / share, "gradientes": gradients / share}
    peak = {**peak, "gradientes": peak["gradientes"] / share}
    peak = {{"media": "pesos en media precisión"}.get(kind, kind): size for kind, size in peak.items()}
    back = {**lasting, **peak, "filas del lote": 2 * sum(read)}
    update = {**lasting, "paso del optimizador": max(passing / share, 2 * sum(read) + 5 * max(read))}
    if share > 1:  # whole for a moment, as accelerate 1.15 groups them: the output matrix, or one layer
        head = max(4 * size for name, size in numel.items() if name.startswith(("model.embed_tokens", "lm_head")))
        layer = 4 * sum(size for name, size in numel.items() if ".layers." in name) / config.num_hidden_layers
        logits = peak["logits"]  # three of them at the peak
        # On its way: a part, what arrives, the copy in use; and in backward its gradient, if that peak is not this one.
        moving = 2.5 + (phase == 2 and logits > 0)
        back["pesos reunidos"] = layer + max(head, 2 * head - logits / 3, moving * head - logits)
    computing = max((back, update), key=lambda items: sum(items.values()))
    part = machine.cards if choice.shard else 1
    stored = {"tablas": rows / part, "estado de las tablas": row_states / part}

    own = weights if phase == 2 and not lora else gradients  # a checkpoint leaves out a backbone that is frozen
    disk = own + states + rows + row_states
    start = weights + rows
    # What has learned once more, without Phi, its rows with their indices.
    small = rows + 8 * sum(n for n, _ in tables.values()) if choice.lora else 0
    final = start + small + (gradients if choice.lora else 0)
    files = {"modelo de partida": 0 if machine.measured or machine.scratch else start, "punto de control": disk}
    beside = max(disk * choice.keep, disk * (choice.keep - 1) + final)  # older checkpoints, and at the end the result
    files |= {"lo que se guarda a su lado": max(0, beside - (choice.resume or 0))}
    written = max(own, rows + row_states)  # in one file at a time
    if not machine.gpu:
        ram = {**computing, **stored}
        # When the gradients and what the step kept are gone; at the very end, the optimiser's states too.
        copy = lasting["pesos"] + small - row_states / part
        if SAVING_COPIES:
            copy = max(copy, lasting["pesos"] + lasting["estado del optimizador"] + written)
        if SAVING_COPIES or choice.lora:
            ram["copia al guardar"] = max(0, copy - sum(computing.values()))
        return {"RAM": {"Python y bibliotecas": machine.base_ram / machine.cards, **ram}, "disco": files}
    gpu = {"CUDA y bibliotecas": machine.base_gpu, **computing}
    ram = {"sistema y bibliotecas": machine.base_ram}
    opening = machine.cards * (weights + rows)  # float32, before it goes to the card
    copied = own  # to be saved: safetensors brings all that is on the card to host memory at once
    if choice.place == "ram":
        ram |= {name: machine.cards * size for name, size in stored.items()}
        # No page of an untouched state is taken yet.
        opening -= machine.cards * sum(stored.values())
    if choice.place != "ram" or SAVING_COPIES:
        copied = written
    copied = max(copied, small)
    if choice.place != "ram":
        gpu |= stored
    ram["lo que pasa al abrir y al guardar"] = max(opening, copied)
    return {"GPU": gpu, "RAM": ram, "disco": files}
