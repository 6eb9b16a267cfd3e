"""Whoever reads a saved folder by the conventions of others gets the rows too, or an error."""

import copy
import json
import os
import shutil
import stat
from pathlib import Path
from threading import Lock

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import load_checkpoint_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PhiForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

import helpers
import phi1_engram
from engram.copies import copy_folder
from engram.folders import whole_folder
from engram.memories import save_memory
from engram.rows import TrainedTables
from phi1_engram import PRECISIONS, EngramFileError, PhiEngramForCausalLM, PhiEngramModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and {precision: folder} of it."""
    model = helpers.make_model(attn="sdpa")
    folders = {precision: tmp_path_factory.mktemp(precision) for precision in PRECISIONS}
    for precision, folder in folders.items():
        model.save_pretrained(folder, engram_precision=precision)
    return model, folders


def opened(folder, place="ram", **kw):
    return PhiEngramForCausalLM.from_pretrained(folder, engram_storage=place, **kw)


@torch.no_grad()
def logits(model):
    return model(torch.arange(40).view(2, 20)).logits


def index_of(folder, variant=""):
    return json.loads((folder / f"model.safetensors.index{variant}.json").read_text())


def trainer_s(model, folder):
    load_sharded_checkpoint(model, folder, strict=False)


LOADERS = {"Trainer": trainer_s, "accelerate": load_checkpoint_in_model}


# ----------------------------------------------------------------------------------------------------------------------
# Into a live model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("given", PRECISIONS)
@pytest.mark.parametrize(("own", "place"), [("float32", "ram"), ("int8", "ram"), ("float32", "disco")])
def test_rows_go_into_a_live_model_of_any_precision_and_place(saved, tmp_path, loader, given, own, place):
    _, folders = saved
    other = helpers.make_model(seed=5)
    other.save_pretrained(tmp_path, engram_precision=own)
    live = opened(tmp_path, place)
    LOADERS[loader](live, folders[given])
    expected = opened(folders[given], "ram")
    for name, table in live.model.engram_tables.items():
        rows = expected.model.engram_tables[name]
        assert table.dtype == (rows.dtype if place == "disco" else PRECISIONS[own])
        for ours, theirs in zip(table.chunks(table.dtype), rows.chunks(table.dtype), strict=True):
            assert torch.equal(ours, theirs)
    assert live.memory_place == "ram"
    if place == "disco" or own == "float32":
        assert torch.equal(logits(live), logits(expected))


def test_rows_on_the_disk_that_are_the_same_stay_there(saved):
    model, folders = saved
    live = opened(folders["int8"], "disco")
    trainer_s(live, folders["int8"])
    assert live.memory_place == "disco" and all(t.weight is None for t in live.model.engram_tables.values())


@pytest.mark.parametrize("place", ["ram", "disco"])
def test_rows_of_another_shape_are_refused_in_words(saved, tmp_path, place):
    _, folders = saved
    live = opened(folders["float32"], place)
    helpers.make_model(engram_vocab_size=[97, 101]).save_pretrained(tmp_path)
    before = logits(live)
    with pytest.raises(RuntimeError, match="son de otra forma de memoria"):
        load_sharded_checkpoint(live, tmp_path, strict=False)
    live.load_state_dict(load_file(folders["float32"] / helpers.DENSE_FILE), strict=False)
    assert torch.equal(logits(live), before)


def test_given_tensors_are_taken_over_whole(saved):
    """`assign=True`, as accelerate and meta devices need it."""
    _, folders = saved
    live = opened(folders["float32"])
    live.load_state_dict(helpers.saved_tensors(folders["int8"]), assign=True)
    assert torch.equal(logits(live), logits(opened(folders["int8"])))
    with pytest.raises(ValueError, match="no están en ningún archivo"):  # the file that it was opened from has others
        live.move_memory("disco")


def test_rows_that_are_being_trained_are_not_replaced(saved):
    _, folders = saved
    live = opened(folders["float32"])
    with TrainedTables(live) as tables:
        with pytest.raises(RuntimeError, match="se están entrenando"):
            live.load_state_dict(helpers.saved_tensors(folders["float32"]))
        assert all(part.table.weight is None for part in tables.parts.values())
    assert torch.equal(logits(live), logits(opened(folders["float32"])))


def test_pickled_weights_beside_them_would_be_read_first(saved, tmp_path):
    model, _ = saved
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    with pytest.raises(ValueError, match="pytorch_model.bin.*bórralo o elige otra carpeta"):
        model.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


def test_a_state_without_rows_is_missing_them(saved):
    _, folders = saved
    with pytest.raises(RuntimeError, match="Missing.*engram_tables"):
        opened(folders["float32"]).load_state_dict(load_file(folders["float32"] / helpers.DENSE_FILE))


@pytest.mark.parametrize("devices", ["auto", {"": "cpu"}])
def test_accelerate_dispatches_all_of_it(saved, devices):
    model, folders = saved
    with init_empty_weights():
        empty = PhiEngramForCausalLM(model.config)
    there = load_checkpoint_and_dispatch(empty, folders["float32"], device_map=devices)
    torch.testing.assert_close(logits(there.eval()), logits(model), rtol=0, atol=1e-5)  # float32, another attention


def train(model, folder, steps, resume=None, **options):
    """Some steps of transformers' own Trainer on the same texts."""
    rows = [{"input_ids": ids, "labels": ids} for ids in helpers.random_ids(model, 16, 12)]
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=0.05, logging_strategy="no", seed=3,
        report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_s_checkpoint_brings_the_rows_back(make_model, tmp_path):
    whole, halved, other = (make_model(seed=seed) for seed in (1, 1, 2))
    train(whole, tmp_path / "whole", 4, save_strategy="no", lr_scheduler_type="constant")
    train(halved, tmp_path / "half", 2, save_steps=2, lr_scheduler_type="constant")
    train(other, tmp_path / "rest", 4, tmp_path / "half" / "checkpoint-2", save_strategy="no",
          lr_scheduler_type="constant")  # fmt: skip
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)  # float32 sums


def test_the_best_model_of_a_trainer_has_its_rows(make_model, tmp_path):
    trainer = train(
        make_model(), tmp_path, 4, save_strategy="steps", eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")  # the worst one is asked for
    expected, found = opened(best).state_dict(), trainer.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------------------------------
# AutoModel, the stack without a head
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def states(model):
    return model(torch.arange(40).view(2, 20)).last_hidden_state


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("place", ["ram", "disco"])
def test_auto_model_opens_the_rows_and_saves_what_opens_again(saved, tmp_path, precision, place):
    _, folders = saved
    expected = opened(folders[precision]).model
    base, info = AutoModel.from_pretrained(folders[precision], engram_storage=place, output_loading_info=True)
    assert type(base) is PhiEngramModel and base.memory_place == place and not info["missing_keys"]
    assert info["unexpected_keys"] == {"lm_head.weight", "lm_head.bias"}
    assert torch.equal(states(base), states(expected))
    base.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, engram_storage=place, output_loading_info=True)
    assert torch.equal(states(again), states(expected)) and not (info["missing_keys"] or info["unexpected_keys"])
    again.move_memory("disco")
    assert torch.equal(states(again), states(expected))
    whole, info = opened(tmp_path, place, output_loading_info=True)  # with a head of its own, and said so
    assert torch.equal(states(whole.model), states(expected))
    assert info["missing_keys"] == {"lm_head.weight", "lm_head.bias"}


def test_auto_model_opens_what_earlier_versions_saved():
    folder = Path(__file__).resolve().parent / "saved" / "entrenado"
    expected = opened(folder).model
    assert torch.equal(states(AutoModel.from_pretrained(folder, engram_storage="disco")), states(expected))


def test_auto_model_refuses_rows_that_are_not_its_own(saved, tmp_path):
    _, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    helpers.make_model(seed=9).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model-engram-1.safetensors", tmp_path / "it")
    with pytest.raises(EngramFileError, match="no son las que se guardaron con este modelo"):
        AutoModel.from_pretrained(tmp_path / "it")


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def test_the_index_names_every_tensor(saved):
    model, folders = saved
    for folder in folders.values():
        tensors, index = helpers.saved_tensors(folder), index_of(folder)
        assert index["weight_map"].keys() == tensors.keys() == model.state_dict().keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        for name, file in index["weight_map"].items():
            with safe_open(folder / file, "pt") as inside:
                assert name in inside.keys()
        assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("first", [{}, {"max_shard_size": "40KB"}])
@pytest.mark.parametrize("second", [{}, {"max_shard_size": "60KB"}])
def test_nothing_of_an_earlier_save_is_read(make_model, tmp_path, first, second):
    earlier = make_model(engram_layer_ids=[1, 3])
    later = make_model(seed=7, attn="sdpa", engram_layer_ids=[2])
    earlier.save_pretrained(tmp_path, **first)
    save_file(helpers.saved_tensors(tmp_path), tmp_path / "model.safetensors", {"format": "pt"})
    later.save_pretrained(tmp_path, **second)
    assert torch.equal(logits(opened(tmp_path)), logits(later))
    assert helpers.saved_tensors(tmp_path).keys() == later.state_dict().keys()
    live = make_model(attn="sdpa", engram_layer_ids=[2])
    load_sharded_checkpoint(live, tmp_path)  # strictly
    assert torch.equal(logits(live), logits(later))


@pytest.mark.parametrize("size", ["50GB", "40KB"])
def test_a_variant_has_rows_of_its_own(saved, tmp_path, size):
    model, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "both")
    model.save_pretrained(tmp_path / "both", variant="chico", engram_precision="int8", max_shard_size=size)
    assert torch.equal(logits(opened(tmp_path / "both")), logits(model))
    small, info = opened(tmp_path / "both", "disco", variant="chico", output_loading_info=True)
    assert torch.equal(logits(small), logits(opened(folders["int8"]))) and not info["missing_keys"]
    assert small.model.engram_tables["1"].dtype == torch.int8
    assert not info["unexpected_keys"] and not (tmp_path / "both" / "model.chico.safetensors").exists()


@pytest.mark.parametrize("order", [("chico", None, "chico"), (None, "chico", None)])
@pytest.mark.parametrize("sizes", [("50GB", "50GB", "50GB"), ("20KB", "20KB", "50GB"), ("50GB", "20KB", "20KB")])
def test_a_later_save_leaves_another_variant_as_it_was(saved, tmp_path, order, sizes):
    model, folders = saved
    for variant, size in zip(order, sizes):
        model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    indexed = set()
    for variant in ("", ".chico"):
        indexed |= {*index_of(tmp_path, variant)["weight_map"].values()}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == indexed
    for variant in (None, "chico"):
        again, info = opened(tmp_path, variant=variant, output_loading_info=True)
        assert torch.equal(logits(again), logits(model)) and not info["missing_keys"]


@pytest.mark.parametrize("how", [dict(engram_precision="int8"), dict(variant="chico"), dict(state_dict={})])
def test_what_would_go_to_the_hub_otherwise_than_it_is_saved_is_refused(saved, tmp_path, how):
    with pytest.raises(ValueError, match="push_to_hub subiría otra cosa.*hf upload"):
        saved[0].save_pretrained(tmp_path / "it", push_to_hub=True, **how)
    assert not (tmp_path / "it").exists()


def test_rows_that_are_nowhere_are_told(saved, tmp_path, monkeypatch):
    """Of weights that somebody else's program saved without them."""
    shutil.copytree(saved[1]["float32"], tmp_path / "it")
    index = tmp_path / "it" / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"] = {key: file for key, file in text["weight_map"].items() if "engram_tables" not in key}
    index.write_text(json.dumps(text))
    for file in (tmp_path / "it").glob("model-engram-*"):
        file.unlink()
    said = []
    monkeypatch.setattr(phi1_engram.logger, "warning", said.append)
    opened(tmp_path / "it")
    assert len(said) == 2 and all("le faltan las filas de la capa" in text for text in said)


def test_a_default_device_changes_nothing_in_what_is_drawn(saved):
    """As Phi's own card begins: torch.set_default_device("cuda")."""
    layer = saved[0].model.layers[1].engram
    with torch.device("meta"):
        drawn, facts = layer.fresh_projection(0), phi1_engram.EngramFacts()
        keys = torch.zeros(1, phi1_engram.LONGEST_KEY, dtype=torch.long, device="cpu")
        rows = torch.ones(1, 4, device="cpu")
        facts.set([phi1_engram.Fact("a", "b", 1, 3, keys, rows, {}, {})])
    assert drawn.device.type == "cpu" and torch.equal(drawn, layer.fresh_projection(0))
    assert {buffer.device.type for buffer in facts.buffers()} == {"cpu"}


def test_a_copy_is_made_while_rows_are_on_their_way(saved):
    model = copy.deepcopy(saved[0])
    table = model.model.engram_tables["1"]
    table._stream = table._coming = Lock()  # as a stream and a future, which cannot be copied
    again = copy.deepcopy(model)
    assert table._stream and again.model.engram_tables["1"]._stream is None
    assert torch.equal(logits(again), logits(saved[0]))


def test_rows_beside_an_offloaded_layer_stay_in_ram(saved, monkeypatch):
    """Its weights are on "meta", where rows would be lost."""
    model = copy.deepcopy(saved[0])
    model.model.layers[1].engram.value_proj.to("meta")
    monkeypatch.setattr(phi1_engram, "choose_place", lambda *_: ("gpu", ""))
    model.move_memory("gpu")
    assert {i: table.place for i, table in model.model.engram_tables.items()}["1"] == "ram"
    assert not any(table.weight.is_meta for table in model.model.engram_tables.values())


def test_a_variant_of_an_earlier_version_opens(saved, tmp_path):
    model, folders = saved
    shutil.copytree(folders["int8"], tmp_path / "it")
    (tmp_path / "it" / "model.safetensors.index.json").unlink()
    (tmp_path / "it" / helpers.DENSE_FILE).rename(tmp_path / "it" / "model.chico.safetensors")
    assert torch.equal(logits(opened(tmp_path / "it", variant="chico")), logits(opened(folders["int8"])))


def test_plain_phi_opens_every_precision(saved):
    model, folders = saved
    for folder in folders.values():
        phi, info = PhiForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert all(torch.equal(phi.state_dict()[n], t) for n, t in helpers.phi_state_dict(model).items())


@pytest.mark.parametrize("size", ["50GB", "40KB"])
def test_files_are_as_readable_as_any_other(make_model, tmp_path, size):
    before = os.umask(0o022)
    try:
        model = make_model()
        model.save_pretrained(tmp_path / "it", max_shard_size=size)
        save_memory(model, tmp_path / "it")
        with whole_folder(tmp_path / "another") as folder:
            save_file({"a": torch.zeros(3)}, folder / "a.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644}


def test_a_drive_that_keeps_no_modes_takes_a_save_and_a_copy(make_model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    model = make_model()
    model.save_pretrained(tmp_path / "it")
    copy_folder(tmp_path / "it", tmp_path / "copy")
    copied = opened(tmp_path / "copy").state_dict()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in model.state_dict().items())
