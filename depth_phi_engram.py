"""What the memory does in a model: its gates, token by token."""

import torch


@torch.no_grad()
def gate_values(model, input_ids: torch.LongTensor, attention_mask=None) -> dict[int, torch.Tensor]:
    """How far each token opened the memory (alpha, paper eq. 4), read with forward hooks.

    Args:
        input_ids: int64 [B, T]; attention_mask: [B, T], 0 for padding.
    Returns:
        {layer: float32 [B, T], in 0..1}.
    """
    gates = {}

    def keep(layer_id):
        def hook(module, inputs, alpha):
            gates[layer_id] = alpha[..., 0].float()

        return hook

    layers = model.config.engram_layer_ids
    hooks = [model.model.layers[i].engram.gate.register_forward_hook(keep(i)) for i in layers]
    try:
        model(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return gates
