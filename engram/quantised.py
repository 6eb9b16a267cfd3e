"""A backbone in 8 or 4 bits: which of the libraries' ways is asked for, on a CPU and on a card.

The memory's own weights stay as they are (`PhiEngramModel` says so). What was measured is in tests/bench/quantised.py.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import functools
import importlib.util
import platform

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from engram.console import UserError
from engram.machines import CPU_DTYPE
from phi1_engram import FrozenLinear

BITS = ("no", "int8", "int4")
# torch's own products: no public names yet, and fast with bfloat16 alone (test_quantised.py).
INT8_PRODUCT = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
INT4_PRODUCT = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
FEW = 8  # rows: of more, the weights turned into floats make a faster product


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


class HastenedLinear(FrozenLinear):
    """A layer of torchao's with a product of its own: `product`, of rows [n, in] -> [n, out], without the bias.

    torchao's own products take on a CPU as long as float32's, or longer: they turn the weights into floats each time.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return super().forward(x)
        product = self.product(x.reshape(-1, x.shape[-1]))
        product = product if self.bias is None else product + self.bias
        return product.to(x.dtype).view(*x.shape[:-1], -1)


class Int8Linear(HastenedLinear):
    """Its weight is torchao's Int8Tensor, one scale a row. 8 bits are exact in bfloat16, to which x is rounded (where
    it has more rows than FEW, to CPU_DTYPE)."""

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        whole = self.weight.qdata
        if len(rows) <= FEW and INT8_PRODUCT is not None:
            rows = rows.bfloat16().contiguous()
            product = INT8_PRODUCT(rows, whole, rows.new_ones(len(whole)))
        else:
            product = rows.to(CPU_DTYPE) @ whole.to(CPU_DTYPE).T
        return product.float() * self.weight.scale.flatten()


class Int4Linear(HastenedLinear):
    """Its weight is torchao's Int4OpaqueTensor: its own product, without what torchao asks on the way."""

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return INT4_PRODUCT(rows.bfloat16().contiguous(), weight.qdata, weight.block_size[-1], weight.scale_and_zero)


class WholeLinear(HastenedLinear):
    """Weights of 8 bits, one scale a row, multiplied as whole numbers, which processors with VNNI are made for.

    x is s (a + b / 254), a and b whole and of 8 bits, s a row's own: 16 bits in all, more than bfloat16's 8. Both are
    rows of one product, which for a few rows takes as long as for one: reading the weights is what takes the time.
    """

    @classmethod
    def take(cls, layer: torch.nn.Linear, whole: torch.Tensor, scale: torch.Tensor):
        """Make of `layer` one with the weights `whole`, int8 [out, in], times `scale` [out]."""
        layer.dtype = layer.weight.dtype
        del layer.weight  # the packed ones are enough
        packed = torch.ops.onednn.qlinear_prepack(whole, None)
        layer.packed, layer.scale = torch.nn.Parameter(packed, requires_grad=False), scale.float().flatten()
        # The product takes numbers from 0 to 255: a and b are raised by 128, and this is what that adds.
        layer.raised = 128 * (1 + 1 / 254) * whole.sum(1, dtype=torch.int32).float() * layer.scale
        layer.__class__ = cls

    @property
    def weight(self) -> torch.Tensor:
        """Dequantised [out, in], for what needs a derivative."""
        return (self.packed.to_dense().T.float() * self.scale[:, None]).to(self.dtype)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float()
        step = torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True).div_(127)
        rest = rows / step  # where all is zero, no numbers; whatever they are rounded to is multiplied by zero
        first = rest.round()
        both = torch.cat([first, rest.sub_(first).mul_(254)]).add_(128.5).to(torch.uint8)  # cut off, hence the half
        first, rest = whole_product(both, self.packed, self.scale).chunk(2)
        return first.add_(rest, alpha=1 / 254).sub_(self.raised).mul_(step)


def whole_product(rows, packed, scale) -> torch.Tensor:
    """uint8 [n, in] and packed int8 weights -> float32 [n, out]. oneDNN's, which torch gives no public name."""
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def has_whole_products() -> bool:
    """Whether torch has the product and this processor makes it exactly: without VNNI its sums are cut at 16 bits."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    rows, weight = torch.full((2, 512), 255, dtype=torch.uint8), torch.full((512, 512), 127, dtype=torch.int8)
    try:
        product = whole_product(rows, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(512))
    except (AttributeError, RuntimeError):
        return False
    return bool((product == 255 * 127 * 512).all())


def hasten(model):
    """Compute with torchao's weights on a CPU as fast as they can be read. With 4 bits the head gets 8: it is read
    whole for each token."""
    found = {layer: type(layer.weight).__name__ for layer in model.modules() if type(layer) is FrozenLinear}
    for layer, kind in found.items():
        if kind == "Int8Tensor" and has_whole_products():
            WholeLinear.take(layer, layer.weight.qdata, layer.weight.scale)
        elif kind == "Int8Tensor":
            layer.__class__ = Int8Linear
        elif kind == "Int4OpaqueTensor" and INT4_PRODUCT is not None:
            layer.__class__ = Int4Linear
    head, tied = model.lm_head, model.config.tie_word_embeddings
    if "Int4OpaqueTensor" in found.values() and type(head) is torch.nn.Linear and not tied and has_whole_products():
        scale = head.weight.float().abs().amax(-1, keepdim=True) / 127
        WholeLinear.take(head, (head.weight / scale).round().to(torch.int8), scale)
    return model
