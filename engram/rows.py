"""Training the rows of the tables: only those that a step reads are differentiated, exchanged and updated.

While it trains, a table is no parameter of the model: DDP and FSDP do not see it, and a step costs the same whatever
its size. A forward pass turns the distinct rows of its batch into leaves of the graph; after backward they are
(row, gradient) pairs, which cross between processes dense (NCCL reduces no sparse tensors) and step by themselves.
Used by `train_phi_engram.py`; there is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from phi1_engram import CHUNK

ROW_STATES = ("adam", "fila")


def coalesce(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (distinct ids [n], values [n, d]) -> all distinct ids, ascending, and the sum of each one's values.

    Part after part, so that every process that has the same parts gets the same bits on a GPU too.
    """
    if len(parts) == 1:
        return parts[0]
    distinct = torch.cat([row_ids for row_ids, _ in parts]).unique()
    total = parts[0][1].new_zeros(len(distinct), parts[0][1].shape[1])
    for row_ids, values in parts:
        total.index_add_(0, to_card(torch.searchsorted(distinct, row_ids), values.device), values)
    return distinct, total


def to_card(tensor: torch.Tensor, device) -> torch.Tensor:
    """From host memory, without waiting for a card."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and tensor.is_cpu else tensor


def untouched_zeros(n_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [n_rows, width] in host memory, of which a page takes none until it is written: torch.zeros writes all."""
    return torch.from_numpy(np.zeros(n_rows * width * dtype.itemsize, np.uint8)).view(dtype).view(n_rows, width)


def zeros_beside(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros [len(rows), width] where `rows` are."""
    if rows.device.type != "cpu":
        return rows.new_zeros(len(rows), width)
    return untouched_zeros(len(rows), width, rows.dtype)


class TrainedTable:
    """One `EngramTable` while it trains: rows, optimiser state, and what this step has read.

    Args:
        table: its weight is taken over, float32 [n_rows, d_head], and given back by `release`.
        row_state: "adam" keeps two float32 per value, as torch.optim.SparseAdam does; "fila" keeps one float32 per row,
            the running mean of its squared gradients, and no momentum.
        shards: (rank, number of processes) when every process keeps a part of the rows; None when all keep all.
        device: where the model computes, and the rows too unless they stay in host memory; by default where they are.
    """

    def __init__(self, table, row_state: str, shards: tuple[int, int] | None, writer: ThreadPoolExecutor, device=None):
        weight = table.weight.detach()
        self.table, self.row_state, self.writer, self.device = table, row_state, writer, device or weight.device
        self.rank, self.world = shards or (0, 1)
        self.share = -(-table.n_rows // self.world)  # rows per process; the last may hold fewer
        if shards:
            weight = weight[self.rank * self.share : (self.rank + 1) * self.share].clone()
        self.weight = weight if table.stays else weight.to(self.device)
        width = table.d_head if row_state == "adam" else 1
        self.second = zeros_beside(self.weight, width)
        self.first = zeros_beside(self.weight, width) if row_state == "adam" else None
        self.steps = 0
        self.reads: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.coming = None  # the distinct rows of the batch after this one, on their way
        self.writing = self.stream = None
        table.weight, table.read = None, self.read

    # ----- forward

    def read(self, row_ids: torch.LongTensor) -> torch.Tensor:
        """int64 [B, T, H] -> rows [B, T, H, d_head], with a gradient of their own while training."""
        # Rows in host memory are looked for there, so that one copy of the ids is all that waits for a card.
        ids = row_ids.cpu() if self.on_host else row_ids
        wanted, inverse = ids.unique(return_inverse=True)
        rows = self.fetched(wanted, row_ids.device)
        if torch.is_grad_enabled() and self.table.training:
            rows = rows.detach().requires_grad_()
            self.reads.append((wanted, rows))
        return F.embedding(to_card(inverse, row_ids.device), rows)

    @property
    def on_host(self) -> bool:
        """Whether rows stay in host memory, and are not asked of other processes."""
        return self.table.stays and self.world == 1

    def fetched(self, wanted: torch.LongTensor, device) -> torch.Tensor:
        """Distinct ascending ids [n] -> rows [n, d_head] on `device`."""
        if self.world > 1:
            return self.from_owners(wanted)
        if not self.table.stays:
            return self.weight[wanted]
        coming, self.coming = self.coming, None
        rows = coming["rows"].result() if coming else None
        self.wait()
        if coming is None or not torch.equal(coming["wanted"], wanted):
            return to_card(self.weight[wanted], device)
        if rows.is_cuda:  # made on another stream, which must not reuse its memory while this one reads it
            rows.record_stream(torch.cuda.current_stream(rows.device))
        if "fresh" in coming:  # the step in between changed some of them
            places, values = coming["fresh"]
            rows = rows.index_copy(0, to_card(places, device), to_card(values, device))
        return rows

    def expect(self, row_ids: torch.LongTensor):
        """Begin to bring the rows of the next batch, while this one computes and before its step is written."""
        if self.on_host:
            ready = torch.cuda.current_stream(row_ids.device).record_event() if row_ids.is_cuda else None
            self.coming = {}
            self.coming["rows"] = self.writer.submit(self._bring, self.coming, row_ids, ready)

    def _bring(self, coming, row_ids, ready=None):
        if ready is None:
            coming["wanted"] = row_ids.unique()
            return self.weight[coming["wanted"]]
        self.stream = self.stream or torch.cuda.Stream(row_ids.device)  # one: a card keeps memory apart for each
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            coming["wanted"] = row_ids.cpu().unique()
            rows = to_card(self.weight[coming["wanted"]], row_ids.device)
        self.stream.synchronize()  # of this thread alone; the card goes on computing
        return rows

    def wait(self):
        """Until the last step is written."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    # ----- backward: (row, gradient) pairs

    def collect(self, world: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Of all micro-batches and processes: distinct ids [n], mean gradient over processes [n, d], bytes sent."""
        parts = [(wanted, rows.grad) for wanted, rows in self.reads if rows.grad is not None]
        self.reads = []
        row_ids, values = coalesce(parts)
        if world == 1:
            return row_ids, values, 0
        row_ids = to_card(row_ids, values.device)
        sent = row_ids.numel() * row_ids.element_size() + values.numel() * values.element_size()
        if self.world > 1:
            received, (sizes, asked) = self.to_owners(row_ids)
            parts = zip(received.split(asked), exchange(values, sizes, asked).split(asked))
        else:
            parts = gather_pairs(row_ids, values, world)
        row_ids, values = coalesce(list(parts))
        return row_ids, values / world, sent

    # ----- update

    def step(self, row_ids, grad, rate: float, betas: tuple[float, float], eps: float):
        """Update rows `row_ids` [n] by `grad` [n, d]; in host memory without waiting for it."""
        self.steps += 1
        if not self.table.stays:
            return self._update(self.local(row_ids), grad, rate, betas, eps, self.steps)
        self.wait()
        ready = torch.cuda.current_stream(grad.device).record_event() if grad.is_cuda else None

        def write(number=self.steps, coming=self.coming):
            if ready is not None:
                ready.synchronize()
            host = self.local(row_ids)
            self._update(host, grad.cpu(), rate, betas, eps, number)
            if coming is not None:
                both = torch.isin(coming["wanted"], host, assume_unique=True).nonzero()[:, 0]
                coming["fresh"] = both, self.weight[coming["wanted"][both]]

        self.writing = self.writer.submit(write)

    @torch.no_grad()
    def _update(self, row_ids, grad, rate, betas, eps, number):
        if self.row_state == "adam":
            first = self.first[row_ids].lerp_(grad, 1 - betas[0])
            second = self.second[row_ids].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
            self.first[row_ids], self.second[row_ids] = first, second
            rate = rate * (1 - betas[1] ** number) ** 0.5 / (1 - betas[0] ** number)
            change = first.mul_(-rate).div_(second.sqrt_().add_(eps))
        else:
            square = grad.square().mean(-1, keepdim=True)
            before = self.second[row_ids]
            # A row's first gradient stands for its whole past: no bias to correct, and no step larger than the rate.
            after = torch.where(before > 0, before.lerp(square, 1 - betas[1]), square)
            self.second[row_ids] = after
            change = grad * -rate / (after.sqrt_() + eps)
        self.weight.index_add_(0, row_ids, change)

    # ----- rows that other processes keep (paper Figure 2: all-to-all)

    def to_owners(self, wanted):
        """Ascending ids [n] -> ids that all processes ask of this one, (ids sent to each, ids received from each)."""
        edges = torch.arange(1, self.world, device=wanted.device) * self.share
        cuts = torch.searchsorted(wanted, edges)
        sizes = torch.diff(cuts, prepend=cuts.new_zeros(1), append=cuts.new_full((1,), len(wanted)))
        asked = torch.empty_like(sizes)
        dist.all_to_all_single(asked, sizes)
        sizes, asked = sizes.tolist(), asked.tolist()
        return exchange(wanted, sizes, asked), (sizes, asked)

    def from_owners(self, wanted):
        asked_for, (sizes, asked) = self.to_owners(wanted)
        self.wait()
        return exchange(self.weight[self.local(asked_for)].to(wanted.device), asked, sizes)

    def local(self, row_ids):
        """Ids in the whole table -> places in this process's part, where that is."""
        return (row_ids - self.rank * self.share).to(self.weight.device)

    # ----- files, and the end

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        self.wait()
        state = dict(weight=self.weight, second=self.second, steps=torch.tensor(self.steps))
        return state if self.first is None else dict(state, first=self.first)

    def load(self, tensor):
        """What `tensors` gave, from a function of their names: one at a time in memory."""
        for name in ("weight", "second", "first"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(tensor(name))
        self.steps = int(tensor("steps"))

    def restart(self):
        """Forget the optimiser's state, as a new phase does."""
        self.wait()
        for state in (self.second, self.first):
            if state is not None and self.steps:  # zeros that nobody touched take no memory yet
                state.zero_()
        self.steps = 0

    def release(self):
        """Give the rows back to the model; rows kept in parts all come to process 0, in host memory."""
        self.wait()
        weight = self.weight if self.world == 1 else self.whole()
        self.table.weight, self.table.read = None if weight is None else nn.Parameter(weight), None
        self.table.file = None  # its rows are others now

    def whole(self) -> torch.Tensor | None:
        weight = torch.empty(self.table.n_rows, self.table.d_head, dtype=self.weight.dtype) if self.rank == 0 else None
        step = max(1, CHUNK // (4 * self.table.d_head))
        for first in range(0, self.share, step):
            rows = self.weight[first : first + step].to(self.device)  # NCCL takes nothing from host memory
            rows = F.pad(rows, (0, 0, 0, min(step, self.share - first) - len(rows)))
            parts = [torch.empty_like(rows) for _ in range(self.world)]
            dist.all_gather(parts, rows)
            for rank, part in enumerate(parts if weight is not None else []):
                place = weight[rank * self.share + first :][: len(part)]
                place.copy_(part[: len(place)])
        return weight


def exchange(values: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
    """All-to-all along the first dimension, `sent[r]` of them to process r and `received[r]` from it."""
    output = values.new_empty(sum(received), *values.shape[1:])
    dist.all_to_all_single(output, values.contiguous(), received, sent)
    return output


def gather_pairs(row_ids, values, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of every process, in the order of their ranks."""
    sizes = [torch.empty(1, dtype=torch.long, device=row_ids.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(row_ids)], device=row_ids.device))
    sizes = [int(size) for size in sizes]

    def gathered(tensor):
        padded = F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, max(sizes) - len(tensor)))
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        return [part[:size] for part, size in zip(parts, sizes)]

    return list(zip(gathered(row_ids), gathered(values)))


class TrainedTables:
    """All tables of a model while they train; a context manager that gives them back.

    Args:
        world: processes that train together. shard: each keeps its part of the rows instead of all.
        device: where the model will compute; only the rows kept go there, never the whole table.
    """

    def __init__(self, model, row_state="adam", world=1, shard=False, device=None, betas=(0.9, 0.999), eps=1e-8):
        # A thread begins on the first card, where a second process has nothing to do.
        card = [torch.device(device).index or 0] if device is not None and torch.device(device).type == "cuda" else []
        begin = torch.cuda.set_device if card else None
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="filas", initializer=begin, initargs=card)
        shards = (dist.get_rank(), world) if shard and world > 1 else None
        self.model, self.world, self.betas, self.eps, self.sent = model, world, betas, eps, 0
        self.sharded = shards is not None
        self.parts = {
            name: TrainedTable(table, row_state, shards, self.writer, device)
            for name, table in model.model.engram_tables.items()
        }

    @property
    def n_bytes(self) -> int:
        """Of all rows of all tables, in float32."""
        return sum(4 * part.table.n_rows * part.table.d_head for part in self.parts.values())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None or not self.sharded:  # what stopped this process may not have stopped those that keep the rest
            for part in self.parts.values():
                part.release()
        self.writer.shutdown()

    @torch.no_grad()
    def expect(self, ids: torch.LongTensor):
        """Rows of the next micro-batch, int64 [B, T] token ids, begin to come where tables stay in host memory.

        To be called after the forward pass of the present one, whose own rows are on their way until then.
        """
        if any(part.table.stays for part in self.parts.values()):
            offsets = self.model.model.engram_hash.offsets
            for offset, (layer_id, row_ids) in zip(offsets, self.model.model.ngram_indices(ids).items()):
                self.parts[str(layer_id)].expect(row_ids + offset)

    def collect(self) -> list[nn.Parameter]:
        """The rows that this step read, whose .grad is summed over micro-batches and averaged over processes."""
        self.pairs = {}
        for name, part in self.parts.items():
            row_ids, grad, sent = part.collect(self.world)
            self.sent += sent
            holder = nn.Parameter(torch.empty_like(grad))
            holder.grad = grad
            self.pairs[name] = row_ids, holder
        return [holder for _, holder in self.pairs.values()]

    def restart(self):
        for part in self.parts.values():
            part.restart()

    def step(self, rate: float):
        """Update what was collected."""
        for name, (row_ids, holder) in self.pairs.items():
            self.parts[name].step(row_ids, holder.grad, rate, self.betas, self.eps)

    def file(self, folder) -> Path:
        return Path(folder) / (f"tablas-{dist.get_rank()}.safetensors" if self.sharded else "tablas.safetensors")

    def save(self, folder):
        """Rows and their state, in one safetensors file; one per process where each keeps a part."""
        if self.world > 1 and not self.sharded and dist.get_rank():
            return  # the first process writes what all have
        save_file({f"{n}.{k}": v for n, p in self.parts.items() for k, v in p.tensors().items()}, self.file(folder))

    def load(self, folder):
        with safe_open(self.file(folder), "pt") as file:
            for layer, part in self.parts.items():
                part.load(lambda name, layer=layer: file.get_tensor(f"{layer}.{name}"))
