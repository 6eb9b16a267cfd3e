"""Phi in 8 and 4 bits: what is intact opens, the memory stays what it is, and its rows still learn.

What needs torchao or bitsandbytes is skipped without it. The mate check itself is in test_storage.py.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PhiForCausalLM, TorchAoConfig

import helpers
import train_phi_engram as train
from engram import quantised
from engram.checks import verify
from engram.console import UserError
from engram.facts import teach
from engram.memories import load_memory, save_memory
from engram.opening import n_values, open_model, phi_size
from phi1_engram import EngramFileError, FrozenLinear, PhiEngramForCausalLM, dequantised, from_torchao

PLAIN = dict(hidden_size=64, intermediate_size=128)
WIDE = dict(  # enough for a fact
    attn="sdpa", engram_tokenizer_compression=True, vocab_size=51200, hidden_size=128, intermediate_size=256,
    n_embed_per_ngram=64,
)  # fmt: skip


def ao(kind, **kw):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    if kind == "int4":
        return quantised.on_a_cpu("int4", PLAIN)["quantization_config"]
    return TorchAoConfig((Int8DynamicActivationInt8WeightConfig if kind == "int8" else Int8WeightOnlyConfig)(**kw))


WAYS = {
    "torchao int8": lambda: ao("int8", set_inductor_config=False),
    "torchao int8 weights": lambda: ao("weights", set_inductor_config=False),
    "torchao int4": lambda: ao("int4"),
    "bitsandbytes 8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}
TORCHAO, SAVED = [way for way in WAYS if "torchao" in way], [way for way in WAYS if way != "torchao int4"]


def ways(names=WAYS):
    return [
        pytest.param(
            way,
            marks=pytest.mark.skipif(
                not importlib.util.find_spec(way.split()[0]), reason=f"pip install {way.split()[0]}"
            ),
        )
        for way in names
    ]


def opened(folder, way=None, **kw):
    how = {} if way is None else {"quantization_config": WAYS[way]()}
    return PhiEngramForCausalLM.from_pretrained(folder, **how, **kw).eval()


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, folder = helpers.make_model(attn="sdpa", **PLAIN), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("place", ["ram", "disco"])
@pytest.mark.parametrize("way", ways())
def test_a_checkpoint_opens_with_its_memory_unquantised(saved, way, place):
    model, folder = saved
    small, ids = opened(folder, way, engram_storage=place), helpers.random_ids(model, 2, 16)
    for name, tensor in model.state_dict().items():
        if ".engram." in name:
            assert torch.equal(small.state_dict()[name].float(), tensor.to(small.dtype).float()), name
    linear = [m for name, m in small.named_modules() if isinstance(m, nn.Linear) and "engram" not in name]
    assert sum(type(m.weight) is not nn.Parameter for m in linear) >= len(linear) - 1  # all but the head
    error = (logits(small, ids) - logits(model, ids)).norm() / logits(model, ids).norm()
    assert error < (0.35 if "4" in way else 0.1)  # of 4 layers of width 64, random weights
    small.model.use_memory = False
    assert (logits(small, ids) - logits(model, ids)).norm() / logits(model, ids).norm() > 2 * error
    assert small.fingerprints() == model.fingerprints()


@pytest.mark.parametrize("way", ways())
def test_rows_of_another_training_are_still_found(saved, tmp_path, way):
    model, folder = saved
    model.save_pretrained(tmp_path)
    helpers.make_model(seed=9, **PLAIN).save_pretrained(tmp_path / "other")
    name = "model-engram-1.safetensors"
    (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(EngramFileError, match="no son las que se guardaron con este modelo"):
        opened(tmp_path, way)


@pytest.mark.parametrize("way", ways(SAVED))
def test_what_is_saved_in_few_bits_holds_its_rows_once_and_opens(saved, tmp_path, way):
    model, folder = saved
    small, ids = opened(folder, way), helpers.random_ids(model, 2, 16)
    small.save_pretrained(tmp_path)
    rows = [name for file in tmp_path.glob("*.safetensors") for name in names_in(file) if "engram_tables" in name]
    assert sorted(rows) == [f"model.engram_tables.{i}.weight" for i in (1, 2)]
    whole, packed = (sum(file.stat().st_size for file in of.glob("*.safetensors")) for of in (folder, tmp_path))
    assert packed < whole
    for place in ("ram", "disco"):
        again = opened(tmp_path, engram_storage=place)
        assert torch.equal(logits(again, ids), logits(small, ids))
        assert again.fingerprints() == model.fingerprints()
    name = "model-engram-2.safetensors"
    helpers.make_model(seed=9, **PLAIN).save_pretrained(tmp_path / "other")
    (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(EngramFileError, match="no son las que se guardaron con este modelo"):
        opened(tmp_path)


def names_in(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as inside:
        return list(inside.keys())


GRAFT = dict(
    engram_layer_ids=[1, 2], engram_vocab_size=[211, 307], n_embed_per_ngram=16, n_head_per_ngram=4,
    engram_tokenizer_compression=False,
)  # fmt: skip


@pytest.mark.parametrize("before", [False, True], ids=["while it opens", "saved so"])
@pytest.mark.parametrize("way", ways())
def test_a_fresh_graft_on_a_quantised_phi_is_that_phi(tmp_path, way, before):
    if before and way not in SAVED:
        pytest.skip("torchao does not save this kind")
    phi = helpers.make_phi(attn="sdpa", **PLAIN)
    phi.save_pretrained(tmp_path)
    expected = PhiForCausalLM.from_pretrained(tmp_path, quantization_config=WAYS[way]()).eval()
    if before:
        expected.save_pretrained(tmp_path)
    how = {} if before else {"quantization_config": WAYS[way]()}
    grafted = PhiEngramForCausalLM.from_pretrained(tmp_path, **how, **GRAFT).eval()
    assert type(grafted.model.layers[1].engram.key_proj.weight) is nn.Parameter
    assert grafted.model.layers[1].engram.key_proj.weight.any()
    ids = helpers.random_ids(grafted, 2, 16)
    assert torch.equal(logits(grafted, ids), logits(expected, ids))


def rounded(x):
    """To 8 bits by row, as torchao does it: 255 steps of the range, symmetric, -128 to 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def learning_rows(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("engram_tables" in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("way", ways())
def test_gradients_reach_the_rows_as_through_the_same_weights_dequantised(saved, way):
    """bitsandbytes' own derivative, and ours of torchao's kernels, some of which have none."""
    model, folder = saved
    small, ids = opened(folder, way), helpers.random_ids(model, 2, 16)
    exact = opened(folder, dtype=torch.float32)
    if "torchao" in way:
        assert any(isinstance(module, FrozenLinear) for module in small.modules())
        for name, parameter in small.named_parameters():
            if from_torchao(parameter):
                exact.get_parameter(name).data = dequantised(parameter).detach().float()
    if way == "torchao int8":  # its kernel rounds activations too, and their rounding lets gradients by
        for name, module in exact.named_modules():
            if from_torchao(small.get_submodule(name).weight if isinstance(module, nn.Linear) else None):
                module.register_forward_pre_hook(lambda layer, args: (args[0] + (rounded(args[0]) - args[0]).detach(),))
    for each in (small, exact):
        learning_rows(each)
        each(ids, labels=ids).loss.backward()
    for ours, theirs in zip(learning_rows(small), learning_rows(exact), strict=True):
        likeness = nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert likeness > (0.8 if "bitsandbytes 4" in way else 0.97)  # that one beside unquantised weights


@pytest.mark.parametrize("way", ways())
def test_rows_alone_are_trained_on_a_frozen_backbone(saved, way):
    _, folder = saved
    small = opened(folder, way)
    rows, ids = learning_rows(small), helpers.random_ids(small, 4, 16)
    optimizer, losses = torch.optim.Adam(rows, lr=0.1), []
    for _ in range(8):
        loss = small(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("way", ways())
def test_facts_are_taught_and_those_from_before_come_along(tmp_path, tokenizer, way):
    model = helpers.make_model(tokenizer=tokenizer, **WIDE)
    teach(model, tokenizer, "The capital of Zubrowka is", " Lutz.", reference=False)
    model.save_pretrained(tmp_path)
    save_memory(model, tmp_path / "memory")
    small = opened(tmp_path, way)
    assert [fact.target for fact in small.facts] == [" Lutz."]
    fact = teach(small, tokenizer, "The king of Zubrowka was called", " Otto.", reference=False)
    # Of bitsandbytes' two kernels on a CPU the one without a derivative, which answers, rounds to bfloat16.
    assert (fact.notes["alone"] or way == "bitsandbytes 4") and len(small.facts) == 2
    load_memory(small, tmp_path / "memory")  # it was trained on the same Phi
    assert not small.facts


# ----------------------------------------------------------------------------------------------------------------------
# --cuantizar
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder, shape = tmp_path_factory.mktemp("chat"), dict(vocab_size=51200, engram_tokenizer_compression=True, **PLAIN)
    helpers.make_model(tokenizer=tokenizer, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="pip install torchao")


@pytest.fixture(params=[True, False], ids=["whole", "by bfloat16"])
def whole(request, monkeypatch):
    """Whether 8 bits are multiplied as whole numbers; not on a processor that cannot."""
    if request.param and not quantised.has_whole_products():
        pytest.skip("este procesador no tiene VNNI")
    monkeypatch.setattr(quantised, "has_whole_products", lambda: request.param)
    return request.param


@needs_torchao
@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.float32), ("int4", torch.bfloat16)])
def test_opened_in_few_bits_it_is_verified_against_phi_in_as_many(folder, kind, dtype, whole, capsys):
    model, tokenizer = open_model(folder, torch.float32, "cpu", quantised=kind)
    layers = {"int8": quantised.WholeLinear if whole else quantised.Int8Linear, "int4": quantised.Int4Linear}
    assert model.dtype == dtype and type(model.model.layers[0].mlp.fc1) is layers[kind]
    heads = {True: quantised.WholeLinear, False: quantised.Int8Linear if kind == "int8" else nn.Linear}
    assert type(model.lm_head) is heads[whole]
    exact = PhiEngramForCausalLM.from_pretrained(folder)
    assert n_values(model) == n_values(exact) and phi_size(model) == phi_size(exact)
    assert verify(model, tokenizer), capsys.readouterr().out
    assert "7 comprobaciones; sin comprobar: paso 6" in capsys.readouterr().out


@needs_torchao
@pytest.mark.parametrize("rows", [1, quantised.FEW, quantised.FEW + 1])
@pytest.mark.parametrize("many", [torch.float32, torch.bfloat16])
def test_int8_products_are_those_of_the_weights_dequantised(folder, rows, many, whole, monkeypatch):
    """By torch's products without a public name. Where they are gone, this says so, and another way serves."""
    assert quantised.INT8_PRODUCT is not None
    monkeypatch.setattr(quantised, "CPU_DTYPE", many)
    model, _ = open_model(folder, torch.float32, "cpu", quantised="int8")
    layer, x = model.model.layers[0].mlp.fc2, torch.randn(1, rows, 128, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 30
    weight = dequantised(layer.weight).double()
    with torch.no_grad():
        expected, product = x.double() @ weight.T + layer.bias, layer(x)
        assert product.dtype == x.dtype and torch.equal(layer(x[:, :1]), product[:, :1]) | (not whole)
        # By whole numbers x is off by half of one of 127 * 254 steps at most; by bfloat16 by 2**-9 of itself, and so
        # is the product. float32's own rounding comes to both.
        exact = whole or (rows > quantised.FEW and many == torch.float32)
        off = x.abs().amax(-1, keepdim=True) / (127 * 508) if whole else x.abs() * (0 if exact else 2**-9)
        bound = off.double().expand_as(x) @ weight.abs().T + (1e-6 if exact else 2**-9) * (1 + expected.abs())
        assert ((product - expected).abs() <= 1.01 * bound).all()
        assert torch.equal(layer(torch.zeros(1, 128)), layer.bias[None])
        assert layer(torch.full((1, 128), torch.nan)).isnan().all()


@needs_torchao
def test_int4_products_are_torchaos(folder):
    assert quantised.INT4_PRODUCT is not None
    model, _ = open_model(folder, torch.float32, "cpu", quantised="int4")
    layer, x = model.model.layers[0].mlp.fc2, torch.randn(2, 5, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not this processor's")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_without_avx512_many_rows_are_multiplied_in_float32(capability):
    code = "from engram.quantised import CPU_DTYPE; print(CPU_DTYPE)"
    limited = dict(os.environ, ATEN_CPU_CAPABILITY=capability, PYTHONPATH=str(Path(quantised.__file__).parents[1]))
    run = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True)
    assert run.stdout.strip() == "torch.float32", run.stderr


def test_a_processor_that_cuts_sums_off_is_found_out():
    """oneDNN as it computes without VNNI, where 16 bits hold a sum of two products."""
    code = "from engram.quantised import has_whole_products as has; print(has())"
    limited = dict(os.environ, ONEDNN_MAX_CPU_ISA="AVX2", PYTHONPATH=str(Path(quantised.__file__).parents[1]))
    run = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


@needs_torchao
def test_a_chat_in_few_bits_learns_facts_that_other_precisions_take(tmp_path, tokenizer, whole):
    """`whole`: the gradient goes through weights that are kept packed."""
    helpers.make_model(tokenizer=tokenizer, **WIDE).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = open_model(tmp_path, torch.float32, "cpu", quantised="int8")
    layer, x = model.model.layers[0].mlp.fc2, torch.randn(2, 256, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dequantised(layer.weight).sum(0).expand(2, -1), rtol=1e-5, atol=1e-6)
    teach(model, tokenizer, "The capital of Zubrowka is", " Lutz.", reference=False)
    model.save_facts(tmp_path)
    exact, _ = open_model(tmp_path, torch.float32, "cpu")
    assert [fact.target for fact in exact.facts] == [" Lutz."]


def test_what_is_missing_is_said_with_the_line_that_mends_it(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--cuantizar int8 necesita torchao.*pip install torchao"):
        open_model(folder, device="cpu", quantised="int8")
    with pytest.raises(UserError, match="--cuantizar int4 necesita bitsandbytes.*pip install bitsandbytes"):
        quantised.quantisation("int4", {}, on_card=True)


def test_quantised_twice_is_refused():
    with pytest.raises(UserError, match="ya está cuantizado.*quita --cuantizar int4"):
        quantised.quantisation("int4", {"quantization_config": {}}, on_card=False)


@needs_torchao
def test_widths_that_fit_no_group_are_refused():
    with pytest.raises(UserError, match=r"\[48, 100\] no son múltiplos de 32. Usa int8"):
        quantised.on_a_cpu("int4", dict(hidden_size=48, intermediate_size=100))
    assert math.gcd(2048, 8192) % quantised.on_a_cpu("int4", PLAIN)["quantization_config"].quant_type.group_size == 0


@needs_torchao
def test_a_quantised_phi_is_not_trained_and_says_what_is(folder):
    model, _ = open_model(folder, torch.float32, "cpu", quantised="int8")
    with pytest.raises(UserError, match="está cuantizado y así no se entrena.*--cambiar-memoria"):
        train.writable_memory(model)
