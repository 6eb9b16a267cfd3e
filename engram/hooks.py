"""A model read and changed from outside while it runs, by hooks that go away again: states, gates, memory off.

Shapes: B blocks of T tokens, d hidden size.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from contextlib import contextmanager

import torch


@contextmanager
def outputs_of(modules: dict):
    """{key: module} -> a dict that each forward pass fills with {key: the module's output, the first if it is many}."""
    found = {}

    def keep(key):
        def hook(module, args, output):
            found[key] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def gates(model) -> dict:
    return {i: model.model.layers[i].engram.gate for i in getattr(model.config, "engram_layer_ids", ())}


@torch.no_grad()
def gate_values(model, input_ids: torch.LongTensor, attention_mask=None) -> dict[int, torch.Tensor]:
    """How far each token opens the memory's gates, alpha of eq. 4.

    Args:
        input_ids: int64 [B, T]; attention_mask: [B, T], 0 for padding.
    Returns:
        {layer: float32 [B, T] in 0..1}; 0.5 where all rows read are zero; {} with the memory off.
    """
    with outputs_of(gates(model)) as found:
        model.model(input_ids, attention_mask=attention_mask, use_cache=False)
    return {layer: alpha.squeeze(-1) for layer, alpha in found.items()}


def run_states(model, ids) -> tuple[list[torch.Tensor], dict[int, torch.Tensor]]:
    """The S states [B, T, d] of one forward pass, before the final norm, and the gates as `gate_values` gives them.

    Works for transformers' Phi too, which has no gates.
    """
    watched = {-1: model.model.embed_tokens, **dict(enumerate(model.model.layers))}
    with outputs_of(watched) as states, outputs_of(gates(model)) as alphas:
        model.model(ids, use_cache=False)
    return [states[key] for key in watched], {layer: alpha.squeeze(-1) for layer, alpha in alphas.items()}


@contextmanager
def memory_off(model):
    before, model.model.use_memory = model.model.use_memory, False
    try:
        yield
    finally:
        model.model.use_memory = before


@contextmanager
def memory_share(model):
    """Yield {layer: float32 [2]}, on the model's device, of the last forward pass: ‖Y‖/‖h‖, what the memory adds
    beside the hidden state that it is added to (root mean squares), and the mean gate; empty before the first."""
    found, hooks = {}, []

    def watch(layer, engram):
        def added(module, args, output):
            hidden, output = args[0].detach().float(), output.detach().float()
            found[layer] = torch.stack([(output.square().mean() / hidden.square().mean()).sqrt(), alpha.pop()])

        alpha = []
        gate = engram.gate.register_forward_hook(lambda _, args, output: alpha.append(output.detach().float().mean()))
        hooks.extend([gate, engram.register_forward_hook(added)])

    for layer in getattr(model.config, "engram_layer_ids", ()):
        watch(layer, model.model.layers[layer].engram)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def shuffled_rows(model):
    """Meanwhile every n-gram reads what another has learned: a head's rows, half of its table further on.

    What is left of the memory's gain is not in what it remembers (nano-scalemb's control of content).
    """
    inner, hooks = model.model, []
    for offsets, primes, table in zip(
        inner.engram_hash.offsets, inner.engram_hash.primes.flatten(1), inner.engram_tables.values()
    ):

        def moved(module, args, offsets=offsets, primes=primes):
            (row_ids,) = args
            first, rows = offsets.to(row_ids.device), primes.to(row_ids.device)
            return (first + (row_ids - first + rows // 2) % rows,)

        hooks.append(table.register_forward_pre_hook(moved))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_order(model, order: int):
    """Meanwhile the heads of one n-gram order answer zero, as rows never trained do."""
    heads = model.config.n_head_per_ngram

    def hook(module, args, rows):
        rows = rows.clone()
        rows[..., (order - 2) * heads : (order - 1) * heads, :] = 0
        return rows

    hooks = [table.register_forward_hook(hook) for table in model.model.engram_tables.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
