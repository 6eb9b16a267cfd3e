"""What earlier versions saved (tests/saved/) still opens, and a training left half done then still ends as it did.

They were written by the product as it was in November 2026, with transformers 5.24 and torch 2.13.
"""

import shutil
from pathlib import Path

import pytest
import torch

import helpers
import train_phi_engram as train
from engram.memories import load_memory, remove_memory
from engram.opening import open_model
from phi1_engram import PhiEngramForCausalLM

SAVED = Path(__file__).resolve().parent / "saved"


def logits(model, tokenizer):
    ids = tokenizer("def add_7(first, second):\n    return first", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", ["injertado", "entrenado", "int8"])
def test_models_open_in_every_place(name):
    expected = logits(*open_model(SAVED / name, torch.float32))
    for place in ("ram", "disco"):
        assert torch.equal(logits(*open_model(SAVED / name, torch.float32, storage=place)), expected)


def test_a_memory_gives_its_model_back():
    """Phase 2 changed Phi, so only the model that the memory was trained with takes it."""
    model, tokenizer = open_model(SAVED / "entrenado", torch.float32)
    expected = logits(model, tokenizer)
    remove_memory(model)
    assert not torch.equal(logits(model, tokenizer), expected)
    load_memory(model, SAVED / "memoria")
    assert torch.equal(logits(model, tokenizer), expected)


@pytest.mark.parametrize("how", ["--lote 2 --acumular 1", "--lote 1 --acumular 2 --recalcular", "2 procesos"])
def test_a_training_left_half_done_goes_on_to_the_same_weights(tmp_path, monkeypatch, corpus_cache, capsys, how):
    """However its steps are computed. Weights within 1e-5: other processors round float32 sums otherwise."""
    shutil.copytree(SAVED / "injertado", tmp_path / "injertado")
    shutil.copytree(SAVED / "a-medias-checkpoints", tmp_path / "a-medias-checkpoints")
    helpers.write_code(tmp_path / "codigo")
    monkeypatch.chdir(tmp_path)
    words = "--modelo injertado --datos codigo --salida a-medias --longitud 32 --pasos-fase1 4 --pasos-fase2 4"
    words = f"{words} --guardar-cada 2 --tasas 20 --reanudar".split()
    if how == "2 procesos":
        process = helpers.together(2, train.__file__, *words, "--lote", "1", "--acumular", "1", cwd=tmp_path)
        said, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    else:
        train.main([*words, *how.split()])
        said = capsys.readouterr().out
    assert "Sigo desde la fase 2, paso 2 de 4" in said
    found, expected = helpers.saved_tensors("a-medias"), helpers.saved_tensors(SAVED / "entrenado")
    before = helpers.saved_tensors(SAVED / "injertado")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=0, atol=1e-5), name
    assert any((expected[name].double() - before[name].double()).abs().max() > 1e-3 for name in expected)
    assert isinstance(open_model("a-medias")[0], PhiEngramForCausalLM)
