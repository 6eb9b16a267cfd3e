"""A pretended card for a CPU build of torch: CUDA's rules without CUDA.

    python tests/pretended.py train_phi_engram.py --demo                       # any script on it; a report at the end
    torchrun --nproc-per-node 2 tests/pretended.py train_phi_engram.py …       # a card for each process, through gloo

Tensors sent to "cuda" stay where they are and carry a mark. Every call of torch from Python is held to CUDA's rules:
no operation mixes devices, NumPy reads no card, collectives take nothing from the host. Counted by line of the project:
what makes a thread of the host wait for the card ("syncs"), and reads on one stream of what another wrote without
waiting ("races"), found by vector clocks, one a stream and one a thread.

Limits: bits, memory and speed are the CPU's; autocast is the CPU's; what C++ does by itself (backward, a compiled
graph) is not seen, so that FSDP, which works in hooks of it, does not run here; nor is memory that is freed too early.
"""

import collections
import concurrent.futures
import contextlib
import os
import runpy
import sys
import threading
import traceback
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
CARD = torch.device("cuda", 0)
GB = 15.8  # of a T4
# Answered without a look at the card: shapes, types, handles.
HANDLES = {
    getattr(Tensor, name).__get__
    for name in ("grad", "shape", "dtype", "requires_grad", "grad_fn", "is_leaf", "ndim", "layout", "data", "nbytes",
                 "itemsize", "_version", "is_sparse", "is_meta", "is_quantized")
} | {
    getattr(Tensor, name)
    for name in ("size", "dim", "numel", "stride", "is_floating_point", "requires_grad_", "untyped_storage",
                 "is_complex", "is_contiguous", "data_ptr", "element_size", "nelement", "storage_offset", "__len__",
                 "retain_grad")
}  # fmt: skip
WAITS = {
    getattr(holder, name): name
    for holder, names in (
        (Tensor, ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "equal", "nonzero", "unique")),
        (torch, ("equal", "nonzero", "unique")),
    )
    for name in names
}
CROSSES = {  # takes tensors of both sides
    Tensor.copy_, Tensor.type, Tensor.data.__set__, Tensor.grad.__set__, Tensor.set_, torch.autograd.grad,
    torch.autograd.backward, torch._has_compatible_shallow_copy_type,
}  # fmt: skip
INDEXING = ("__getitem__", "__setitem__", "index_put_", "index_put", "index")
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_to_all_single", "reduce_scatter_tensor",
               "all_gather_into_tensor")  # fmt: skip
host_device = Tensor.device.__get__


class Clock(dict):
    """{stream: how many of its launches are known to have ended}."""

    def join(self, other):
        for stream, time in other.items():
            self[stream] = max(time, self.get(stream, 0))


class PretendedCard(TorchFunctionMode):
    """The mode under which every call goes; `syncs` and `races` count by (what, line of the project)."""

    def __init__(self):
        super().__init__()
        self.syncs, self.races, self.autocast = (collections.Counter() for _ in range(3))
        self.marked, self.written, self.pinned = {}, {}, set()
        self.lock, self.of_thread, self.streams = threading.RLock(), threading.local(), 0
        self.default = Stream(self)

    # ----- what lies on the card

    def key(self, tensor):
        return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else ("sparse", id(tensor))

    def holds(self, tensor) -> bool:
        return self.key(tensor) in self.marked

    def mark(self, tensor):
        with torch._C.DisableTorchFunction():
            key = self.key(tensor)
            if key in self.marked:
                return
            storage = tensor.untyped_storage() if tensor.layout == torch.strided else tensor
            self.marked[key] = storage.nbytes() if tensor.layout == torch.strided else 0
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.marked.pop(key, None)
        self.written.pop(key, None)

    @property
    def n_bytes(self) -> int:
        return sum(self.marked.values())

    # ----- order

    @property
    def host(self) -> Clock:
        """What this thread has waited for."""
        if not hasattr(self.of_thread, "clock"):
            self.of_thread.clock = Clock()
        return self.of_thread.clock

    @property
    def stream(self):
        return getattr(self.of_thread, "stream", self.default)

    def launch(self, inputs, outputs):
        stream = self.stream
        with self.lock:
            stream.clock.join(self.host)
            for tensor in inputs:
                writer, time = self.written.get(self.key(tensor), (stream, 0))
                if writer is not stream and stream.clock.get(writer.number, 0) < time:
                    self.races["read without waiting", line()] += 1
            stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
            for tensor in outputs:
                self.written[self.key(tensor)] = stream, stream.clock[stream.number]

    def wait(self, what, clock=None):
        own = threading.current_thread() is threading.main_thread()
        self.syncs[what if own else f"{what}, another thread", line()] += 1
        self.host.join(self.stream.clock if clock is None else clock)

    # ----- every call of torch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return CARD if args and isinstance(args[0], int) else func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return CARD if self.holds(args[0]) else host_device(args[0])
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            here = self.holds(args[0])
            return here if func == Tensor.is_cuda.__get__ else not here and host_device(args[0]).type == "cpu"
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tensors = [tensor for tensor in tensors if not isinstance(tensor, torch._subclasses.FakeTensor)]
        ours = [tensor for tensor in tensors if self.holds(tensor)]
        if func in HANDLES:
            found = func(*args, **kwargs)
            if func == Tensor.grad.__get__ and found is not None and ours:
                self.mark(found)
            return found
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if asked is not None and asked.type == "cuda":
            kwargs["device"] = "cpu"
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self.moved(func, asked, *args, **kwargs)
        if func is Tensor.is_pinned:
            return self.key(args[0]) in self.pinned
        if func is Tensor.pin_memory:
            return self.pin(args[0], ours)
        if func in (Tensor.numpy, Tensor.__array__) and ours:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        name = getattr(func, "__name__", str(func))
        self.check(func, name, args, tensors, ours)
        found = func(*args, **kwargs)
        if func == Tensor.data.__set__ or func == Tensor.grad.__set__:
            return found
        if func is torch.autograd.grad:  # a gradient lies where its tensor does
            for wanted, gradient in zip(tree_leaves(args[1]), found):
                if self.holds(wanted):
                    self.mark(gradient)
            return found
        if asked is not None and asked.type != "cuda" or not (ours or asked):
            return found
        if name == "copy_" and not self.holds(args[0]):
            self.wait("copy_ to the host")
            return found
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        for output in outputs:
            self.mark(output)
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        self.launch(ours, outputs + [a for a in args[:1] if in_place and isinstance(a, Tensor)])
        return found

    def check(self, func, name, args, tensors, ours):
        """CUDA's refusals, and what makes the host wait."""
        if not ours:
            return
        strange = [t for t in tensors if not self.holds(t) and t.dim() and host_device(t).type == "cpu"]
        if strange and func not in CROSSES and not (name in INDEXING and self.holds(args[0])):
            if name in INDEXING:
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            raise RuntimeError(f"Expected all tensors to be on the same device: cuda:0 and cpu ({name}, {line()})")
        if func in WAITS:
            self.wait(WAITS[func])
        chosen = tree_leaves(args[1:]) if name == "__getitem__" else ()
        if any(isinstance(choice, Tensor) and choice.dtype == torch.bool for choice in chosen):
            self.wait("a mask as index")

    def moved(self, func, asked, tensor, *args, **kwargs):
        """`to`, `cuda` and `cpu`."""
        here, args = "cuda" if self.holds(tensor) else host_device(tensor).type, list(args)
        there = asked.type if asked else {Tensor.cuda: "cuda", Tensor.cpu: "cpu"}.get(func, here)
        for i, arg in enumerate(args if func is Tensor.to else ()):
            if isinstance(arg, Tensor):
                there = "cuda" if self.holds(arg) else host_device(arg).type
            elif isinstance(arg, (str, torch.device)) or (i == 0 and type(arg) is int):
                there = torch.device(arg).type if not isinstance(arg, int) else "cuda"
                args[i] = "cpu" if there == "cuda" else arg
        found = tensor.clone() if func is Tensor.cuda else func(tensor, *args, **kwargs)
        if there == "meta" or there == here == "cpu":
            return found
        if there != here and self.key(found) == self.key(tensor):
            found = found.clone()
        if there == "cuda":
            self.mark(found)
            self.launch([tensor] if here == "cuda" else [], [found])
            if here == "cpu" and not (kwargs.get("non_blocking") and self.key(tensor) in self.pinned):
                self.wait("to the card, from memory that is not pinned")
        elif here == "cuda":
            self.launch([tensor], [])
            self.wait("to the host")
        return found

    def pin(self, tensor, ours):
        if ours:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        pinned = tensor.clone()
        storage = pinned.untyped_storage()
        self.pinned.add(storage._cdata)
        weakref.finalize(storage, self.pinned.discard, storage._cdata)
        return pinned

    def submit(self, pool, function, *args, **kwargs):
        """What another thread does, under the same rules, beginning from what this one knows."""
        known = Clock(self.host)

        def run():
            self.host.join(known)
            with self:
                return function(*args, **kwargs), Clock(self.host)

        future = REAL_SUBMIT(pool, run)
        result = future.result

        def waited(timeout=None):
            found, clock = result(timeout)
            self.host.join(clock)
            return found

        future.result = waited
        return future


REAL_SUBMIT, REAL_AUTOCAST = concurrent.futures.ThreadPoolExecutor.submit, torch.autocast.__init__
REAL_GENERATOR, REAL_GROUPED = torch.Generator, clip_grad._group_tensors_by_device_and_dtype


class HostGenerator(REAL_GENERATOR):
    def __new__(cls, device="cpu"):
        return REAL_GENERATOR.__new__(cls)


class Stream:
    def __init__(self, card, device=None, priority=0):
        self.card, self.device, self.clock, self.number = card, CARD, Clock(), card.streams
        card.streams += 1

    def wait_event(self, event):
        self.clock.join(event.clock)

    def wait_stream(self, other):
        self.clock.join(other.clock)

    def record_event(self, event=None):
        event = event or Event(self.card)
        event.record(self)
        return event

    def synchronize(self):
        self.card.wait("synchronize a stream", self.clock)


class Event:
    def __init__(self, card, *_, **__):
        self.card, self.clock = card, Clock()

    def record(self, stream=None):
        self.clock = Clock((stream or self.card.stream).clock)

    def wait(self, stream=None):
        (stream or self.card.stream).wait_event(self)

    def synchronize(self):
        self.card.wait("synchronize an event", self.clock)


class Properties:
    name, multi_processor_count, total_memory, gcnArchName = "Tesla T4 (fingida)", 40, int(GB * 1e9), ""
    major, minor = 7, 5


def line() -> str:
    """The innermost line of the product that is running, or "library"."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.parent in (ROOT, ROOT / "engram") and frame.name != "generate":  # whose loop is transformers'
            return f"{path.name}:{frame.lineno}"
    return "library"


@contextlib.contextmanager
def pretended_card(capability=(7, 5), cards=1):
    """A card while this lasts; yields the `PretendedCard`, which counts."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    card = PretendedCard()

    @contextlib.contextmanager
    def on(stream):
        before, card.of_thread.stream = card.stream, stream
        try:
            yield
        finally:
            card.of_thread.stream = before

    def autocast(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
            card.autocast[dtype] += 1
        REAL_AUTOCAST(self, device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    def of(kind):  # a class, since libraries name it in their annotations
        return type(kind.__name__, (kind,), {"__init__": lambda self, *a, **k: kind.__init__(self, card, *a, **k)})

    def grouped(lists, **kwargs):  # C++ has read the devices
        found = REAL_GROUPED(lists, **kwargs)
        return {(CARD if card.holds(kept[0][0][0]) else key[0], key[1]): kept for key, kept in found.items()}

    replaced = dict(
        is_available=lambda: True, is_initialized=lambda: True, device_count=lambda: cards, current_device=lambda: 0,
        get_device_capability=lambda *_: capability, get_device_properties=lambda *_: Properties,
        get_device_name=lambda *_: Properties.name, is_bf16_supported=lambda *_, **__: capability >= (8, 0),
        mem_get_info=lambda *_: (int(GB * 1e9) - card.n_bytes, int(GB * 1e9)),
        Stream=of(Stream), Event=of(Event),
        current_stream=lambda *_: card.stream, default_stream=lambda *_: card.default, stream=on,
        device=lambda *_: contextlib.nullcontext(), synchronize=lambda *_: card.wait("synchronize"),
        get_rng_state_all=lambda: [torch.zeros(16, dtype=torch.uint8)],
    )  # fmt: skip
    # A function each: torch.compile knows them by identity.
    for name in ("set_device", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state_all", "_lazy_init",
                 "set_per_process_memory_fraction", "reset_peak_memory_stats"):  # fmt: skip
        replaced[name] = lambda *_, **__: None
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        replaced[name] = lambda *_: card.n_bytes
    forget = (AcceleratorState, GradientState, PartialState)  # accelerate remembers which device it found
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", lambda *_: None))
        stack.enter_context(mock.patch.object(torch, "Generator", HostGenerator))
        stack.enter_context(mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", grouped))
        submit = lambda pool, *a, **k: card.submit(pool, *a, **k)  # noqa: E731
        stack.enter_context(mock.patch.object(concurrent.futures.ThreadPoolExecutor, "submit", submit))
        if cards > 1:
            enter_collectives(stack, card)
        for state in forget:
            state._reset_state()
        try:
            with card:
                yield card
        finally:
            for state in forget:
                state._reset_state()


def enter_collectives(stack, card):
    """"nccl" is gloo, which works on the same storages; and as there, nothing comes from the host."""
    import accelerate

    begin, load = dist.init_process_group, accelerate.Accelerator.load_state
    gloo = lambda backend=None, device_id=None, **kwargs: begin("gloo", **kwargs)  # noqa: E731
    stack.enter_context(mock.patch.object(dist, "init_process_group", gloo))
    on_host = lambda self, folder, **kwargs: load(self, folder, map_location="cpu", **kwargs)  # noqa: E731
    stack.enter_context(mock.patch.object(accelerate.Accelerator, "load_state", on_host))

    def guarded(real, name):
        def collective(*args, **kwargs):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and not card.holds(tensor):
                    raise RuntimeError(f"No backend type associated with device type cpu ({name}, {line()})")
            return real(*args, **kwargs)

        return collective

    for name in COLLECTIVES:
        stack.enter_context(mock.patch.object(dist, name, guarded(getattr(dist, name), name)))


def report(card):
    for title, counts in (("syncs", card.syncs), ("races", card.races)):
        print(f"--- {title}: {sum(counts.values())}", file=sys.stderr)
        for (what, where), n in counts.most_common(30):
            print(f"{n:7d}  {where:32} {what}", file=sys.stderr)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), os.getcwd()]
    del sys.argv[0]
    with pretended_card(cards=int(os.environ.get("WORLD_SIZE", 1))) as pretended:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            report(pretended)
