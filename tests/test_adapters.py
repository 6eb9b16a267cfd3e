"""A memory beside peft's adapters: it travels as it would without them."""

import copy

import pytest
import torch

import helpers
from engram.memories import load_memory, remove_memory, save_memory
from phi1_engram import PhiEngramForCausalLM

peft = pytest.importorskip("peft", reason="peft is not installed")
BaseTunerLayer = pytest.importorskip("peft.tuners.tuners_utils").BaseTunerLayer
PHI = ["q_proj", "fc1"]


@pytest.fixture(scope="module")
def base():
    return helpers.make_model(attn="sdpa")


@torch.no_grad()
def logits(model):
    return model(torch.arange(40).view(2, 20)).logits


def with_lora(model, **kw):
    """A copy of the model inside a LoRA that changes what it says."""
    config = peft.LoraConfig(r=2, target_modules=PHI, task_type="CAUSAL_LM", **kw)
    lora = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return lora.eval()


def test_lora_leaves_the_fingerprints_and_the_memory(base, tmp_path):
    lora = with_lora(base)
    assert not torch.equal(logits(lora), logits(base)) and lora.fingerprints() == base.fingerprints()
    save_memory(lora, tmp_path / "lora"), save_memory(base, tmp_path / "base")
    assert helpers.saved_tensors(tmp_path / "lora").keys() == helpers.saved_tensors(tmp_path / "base").keys()
    plain = copy.deepcopy(base)
    remove_memory(plain)
    load_memory(plain, tmp_path / "lora")
    assert torch.equal(logits(plain), logits(base))


def test_a_memory_goes_in_and_out_under_lora(base, tmp_path):
    lora, other = with_lora(base), copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "engram" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    save_memory(other, tmp_path)
    expected = with_lora(other)
    load_memory(lora, tmp_path)
    assert torch.equal(logits(lora), logits(expected))
    remove_memory(lora)
    with lora.disable_adapter():
        other.model.use_memory = False
        assert torch.equal(logits(lora), logits(other))


def test_a_memory_trained_as_peft_s_copy_is_the_one_that_is_saved(base, tmp_path):
    tables = [f"engram_tables.{i}" for i in base.config.engram_layer_ids]
    lora = with_lora(base, modules_to_save=["engram", *tables, "lm_head"])
    trained = copy.deepcopy(base)
    with torch.no_grad():
        for model, copies in ((lora, "modules_to_save.default"), (trained, "engram")):
            for name, parameter in sorted(model.named_parameters()):
                if "engram" in name and copies in name:
                    parameter.mul_(2)
    assert lora.fingerprints() == base.fingerprints()  # the head that peft trains is no part of it either
    save_memory(lora, tmp_path / "lora")
    plain = copy.deepcopy(base)
    load_memory(plain, tmp_path / "lora")
    assert torch.equal(logits(plain), logits(trained))
    again = with_lora(base, modules_to_save=["engram", *tables])
    load_memory(again, tmp_path / "lora")
    assert torch.equal(logits(again), logits(with_lora(trained)))
    with again.disable_adapter():  # what lies beneath is as it was
        assert torch.equal(logits(again), logits(base))
        save_memory(again, tmp_path / "off")
    load_memory(plain, tmp_path / "off")
    assert torch.equal(logits(plain), logits(base))


def test_an_adapter_on_the_memory_itself_is_refused(base, tmp_path):
    lora = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["value_proj", "q_proj"]))
    for act in (save_memory, load_memory):
        with pytest.raises(ValueError, match="merge_and_unload"):
            save_memory(base, tmp_path / "base")
            act(lora, tmp_path / "base")
    merged = lora.merge_and_unload()
    save_memory(merged, tmp_path / "merged")
    assert (tmp_path / "merged" / "engram_memory.safetensors").exists()


def test_a_model_inside_an_adapter_is_not_saved_as_a_folder_that_nothing_opens(base, tmp_path):
    lora = with_lora(base)
    with pytest.raises(ValueError, match="merge_and_unload"):
        lora.get_base_model().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    lora.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(lora))
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    opened = PhiEngramForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(opened), logits(merged))


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_what_gives_vectors_without_tokens_is_sent_to_lora(method):
    model = helpers.make_model()
    adapted = peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="peft.* usa LoRA"):
        adapted(input_ids=helpers.random_ids(model, 2, 10))


@pytest.mark.parametrize("kind", ["LORA", "IA3", "VERA", "LOHA", "LNTUNING"])
def test_an_adapter_that_names_no_matrices_takes_those_of_phi(make_model, kind):
    config = {"LORA": "LoraConfig", "IA3": "IA3Config", "VERA": "VeraConfig", "LOHA": "LoHaConfig"}
    model = peft.get_peft_model(make_model(), getattr(peft, config.get(kind, "LNTuningConfig"))())
    taken = [name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    known = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING")
    assert {name.rpartition(".")[2] for name in taken} == {*known["phi"]} and not [n for n in taken if "engram" in n]
