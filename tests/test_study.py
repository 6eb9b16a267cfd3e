"""The study's own machinery: rows kept, near-duplicates found, grafts exact. Its figures are its own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PhiForCausalLM

import helpers
from study import small as study


@pytest.fixture
def small(monkeypatch, phi_folder):
    """The study on a tiny Phi."""
    monkeypatch.setattr(study, "base_folder", lambda: phi_folder)
    monkeypatch.setattr(study, "WARM_BLOCKS", 8)
    shape = dict(layer_ids=[1], engram_vocab_size=[211, 211], n_embed_per_ngram=16, n_head_per_ngram=4)
    monkeypatch.setattr(study.demo, "DEMO_ENGRAM", shape | dict(engram_tokenizer_compression=False))
    return phi_folder


def test_a_row_that_is_done_is_not_run_again(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setitem(study.KINDS, "base", lambda **settings: runs.append(settings) or dict(loss=float(len(runs))))
    results = tmp_path / "results.jsonl"
    rows = [study.run_row(name, dict(kind="base", rate=1e-3), results) for name in ("una", "otra", "una")]
    assert runs == [dict(rate=1e-3)] * 2 and [row["loss"] for row in rows] == [1, 2, 1]
    kept = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["fila"] for row in kept] == ["una", "otra"] and study.read_results(results)["otra"] == kept[1]
    assert {"threads", "commit", "rate", "loss", "kind"} <= kept[0].keys()


def test_rows_kept_are_of_rows_that_exist():
    for name, row in study.read_results().items():
        assert name in study.study_rows() and row["kind"] == study.study_rows()[name]["kind"]


def test_near_duplicates():
    lines = [f"valor_{i} = {i}" for i in range(100)]
    training = ["\n".join(lines), "import os\n" * 9]
    copied = "\n\n".join(f"    {line}" for line in lines[10:60])  # blank lines and indentation hide nothing
    mixed = "\n".join(lines[:20] + [f"otro_{i} = {i}" for i in range(80)])
    ours = "\n".join(f"propio_{i} = {i}" for i in range(50))
    found = study.near_duplicates([ours, copied, mixed], training)
    assert found == {1: 1.0}
    # 16 of the 96 windows of five lines lie within the 20 lines that are copied.
    assert study.near_duplicates([mixed], training, share=0.1) == {0: pytest.approx(16 / 96)}


@pytest.mark.parametrize("changes", [
    dict(begin="zero"), dict(begin="random"), dict(begin="tokens"), dict(begin="states"), dict(begin="next"),
    dict(without="gate"), dict(without="conv"), dict(config=dict(engram_bias=True)),
], ids=str)  # fmt: skip
def test_every_graft_is_exact(small, changes):
    plain = PhiForCausalLM.from_pretrained(small).eval()
    text = np.random.default_rng(0).integers(0, plain.config.vocab_size, 4096)
    recipe = replace(study.RECIPE, batch=4, length=32)
    model, _ = study.grafted(corpus=study.Corpus("", text, text, 1.0, 1, study.Skipped(), ""), recipe=recipe, **changes)
    ids = torch.from_numpy(text[None, :64])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    rows = model.model.engram_tables["1"].weight
    assert bool(rows.any()) == ("begin" in changes and changes["begin"] != "zero")
    # Its rows can be felt as soon as the value projection is no longer zero.
    if rows.any():
        helpers.randomise(model.model.layers[1].engram.value_proj)
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, plain(ids).logits)
        index = model.model.ngram_indices(ids)[1][0, 10, 0]
        assert rows[index].any()


def test_widening_and_lora_begin_exact_and_train_as_much(small):
    plain = PhiForCausalLM.from_pretrained(small).eval()
    ids = torch.arange(1, 33)[None]
    for change in (study.widen, study.add_lora):
        if change is study.add_lora:
            pytest.importorskip("peft", reason="peft is not installed")
        model = PhiForCausalLM.from_pretrained(small).eval().requires_grad_(False)
        change(model, 4000)
        assert torch.equal(model(ids).logits, plain(ids).logits)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert abs(trained - 4000) < 0.3 * 4000
        model(ids, labels=ids).loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
