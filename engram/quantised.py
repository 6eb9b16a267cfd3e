"""A backbone in 8 or 4 bits: which of the libraries' ways is asked for, on a CPU and on a card.

The memory's own weights stay as they are (`PhiEngramModel` says so). What was measured is in tests/bench/quantised.py.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import importlib.util

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from engram.console import UserError
from phi1_engram import FrozenLinear

BITS = ("no", "int8", "int4")
# torch's own product of a few rows with 8 bits: no public name yet, and fast with bfloat16 alone (test_quantised.py).
INT8_PRODUCT = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
FEW = 8  # rows: of more, the weights turned into bfloat16 make a faster product


def quantisation(kind: str, config: dict, on_card: bool) -> dict:
    """Keywords with which `from_pretrained` quantises Phi while it opens it; none for "no".

    Args:
        kind: one of BITS. config: config.json of the checkpoint. on_card: whether it is to compute on a GPU.
    Raises:
        UserError: it is quantised already, a package is missing, or its matrices cannot be divided into groups.
    """
    if kind == "no":
        return {}
    if "quantization_config" in config:
        raise UserError(f"Este modelo ya está cuantizado y se abre como está: quita --cuantizar {kind}.")
    package = "bitsandbytes" if on_card else "torchao"
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--cuantizar {kind} necesita {package}. Se instala con: pip install {package}")
    return on_a_card(kind) if on_card else on_a_cpu(kind, config)


def on_a_card(kind: str) -> dict:
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
        )
    }


def on_a_cpu(kind: str, config: dict) -> dict:
    from torchao.quantization import Int8WeightOnlyConfig

    if kind == "int8":
        # The head too, where it is no embedding as well: it is read whole for each token.
        kept = None if config.get("tie_word_embeddings") else []
        how = Int8WeightOnlyConfig(set_inductor_config=False)
        return {"quantization_config": TorchAoConfig(how, modules_to_not_convert=kept)}
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    wide = [config[name] for name in ("hidden_size", "intermediate_size")]
    group = next((size for size in (128, 64, 32) if not any(width % size for width in wide)), None)
    if group is None:
        raise UserError(f"--cuantizar int4 no es posible: los anchos {wide} no son múltiplos de 32. Usa int8.")
    how = PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)
    # torch's 4 bit kernel is fast with bfloat16 alone: with float32 it takes longer than no quantisation at all.
    return {"quantization_config": TorchAoConfig(how), "dtype": torch.bfloat16}


class Int8Linear(FrozenLinear):
    """A layer whose weight is torchao's Int8Tensor, one scale a row: x rounded to bfloat16, in which 8 bits are exact.

    torchao's own products take on a CPU as long as float32's, or longer: they turn the weights into floats each time.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        rows, whole = x.reshape(-1, x.shape[-1]).bfloat16(), self.weight.qdata
        if len(rows) <= FEW and INT8_PRODUCT is not None:
            product = INT8_PRODUCT(rows.contiguous(), whole, rows.new_ones(len(whole)))
        else:
            product = rows @ whole.bfloat16().T
        product = product.float() * self.weight.scale.flatten()
        product = product if self.bias is None else product + self.bias
        return product.to(x.dtype).view(*x.shape[:-1], -1)


def hasten(model):
    """Compute with torchao's 8 bit weights on a CPU as fast as they can be read."""
    for module in model.modules():
        if isinstance(module, FrozenLinear) and type(module.weight).__name__ == "Int8Tensor":
            module.__class__ = Int8Linear
    return model
