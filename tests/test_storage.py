"""Where rows live and in which precision: the same logits everywhere, and a clear word when a file goes bad."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig

import chat_phi_engram as chat_script
import helpers
import load_phi_engram as load_script
import phi1_engram
import train_phi_engram as train_script
import verify_phi_engram as verify_script
from engram.console import run_script
from engram.memories import load_memory, remove_memory, save_memory
from engram.opening import open_model
from engram.sharing import phi_was_trained
from hub import Hub
from phi1_engram import PRECISIONS, EngramFileError, PhiEngramForCausalLM, TableFile, pack, unpack

PLACES = ["ram", "disco"] + ["gpu"] * torch.cuda.is_available()
WAYS = {
    "greedy": {}, "sampling": dict(do_sample=True, top_k=0), "beams": dict(num_beams=4, num_return_sequences=2),
    "prompt lookup": dict(prompt_lookup_num_tokens=3), "static cache": dict(cache_implementation="static"),
    "no cache": dict(use_cache=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and {precision: folder} of it."""
    model = helpers.make_model(attn="sdpa")
    folders = {}
    for precision in PRECISIONS:
        folders[precision] = tmp_path_factory.mktemp(precision)
        model.save_pretrained(folders[precision], engram_precision=precision)
    return model, folders


def opened(folder, place="auto", **kw):
    return PhiEngramForCausalLM.from_pretrained(folder, engram_storage=place, **kw)


@torch.no_grad()
def logits(model, ids):
    return model(ids.to(model.device)).logits.cpu()


# ----------------------------------------------------------------------------------------------------------------------
# The same everywhere
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_the_same_bits_in_every_place(saved, precision, dtype):
    model, folders = saved
    ids = helpers.random_ids(model, 2, 24)
    there = {place: opened(folders[precision], place, dtype=dtype) for place in PLACES}
    assert [model.memory_place for model in there.values()] == PLACES
    expected = logits(there["ram"], ids)
    for place, model in there.items():
        assert torch.equal(logits(model, ids), expected), place
        config = json.dumps(model.config.to_dict())
        assert not any(word in config for word in ("disco", "storage", "place"))
    assert any(table.weight is None for table in there["disco"].model.engram_tables.values())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating_reads_from_the_disk(saved, way):
    model, folders = saved
    ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n, seed=n)[0] for n in (9, 4)])
    if way == "prompt lookup":
        ids, mask = ids[:1], mask[:1]
    there = []
    for place in PLACES:
        model = opened(folders["float32"], place)
        torch.manual_seed(3)
        kw = dict(attention_mask=mask, max_new_tokens=12, pad_token_id=0, **{"do_sample": False, **WAYS[way]})
        there.append(model.generate(ids, **kw))
    assert all(torch.equal(tokens, there[0]) for tokens in there)


def test_precisions_are_what_they_say(saved):
    model, folders = saved
    exact = model.model.engram_tables["1"].weight.detach()
    for precision, dtype in PRECISIONS.items():
        table = opened(folders[precision], "disco").model.engram_tables["1"]
        rows = table(torch.arange(len(exact))[None, :, None])[0, :, 0].float()
        assert table.dtype == dtype
        if dtype == torch.int8:  # half a step, and the float32 rounding of x / scale
            bound = exact.abs().amax(-1, keepdim=True) / 127 * 0.5001
        else:  # half a unit in the last place of each number, plus what float16 cannot hold below 2**-24
            bound = exact.abs() * torch.finfo(dtype).eps / 2 + 2.0**-25 * (dtype == torch.float16)
        assert ((rows - exact).abs() <= bound).all()


def test_int8_keeps_zero_rows_zero_and_its_scale_beside_them():
    rows = torch.randn(50, 6)
    rows[7] = 0
    rows[8] = 1e-42  # below what float32 divides without loss
    packed = pack(rows, torch.int8)
    assert packed.shape == (50, 10) and packed.dtype == torch.int8
    assert not unpack(packed)[7].any() and unpack(packed).isfinite().all()
    assert torch.equal(unpack(packed[None, 3:5])[0], unpack(packed)[3:5])
    assert torch.equal(pack(unpack(packed), torch.int8)[:, :6], packed[:, :6])  # packing twice loses nothing more


def test_rows_that_the_model_cannot_use_are_narrowed_and_others_kept(saved):
    _, folders = saved
    kind = {}
    for precision in PRECISIONS:
        model = opened(folders[precision], "ram", dtype=torch.float16)
        kind[precision] = next(iter(model.model.engram_tables.values())).dtype
    expected = {**PRECISIONS, "float32": torch.float16}
    assert kind == expected


def test_moved_at_run_time(saved):
    model, folders = saved
    ids = helpers.random_ids(model, 1, 12)
    model = opened(folders["int8"])
    assert model.memory_place == ("gpu" if torch.cuda.is_available() else "ram") and "ocupa" in model.memory_reason
    expected = logits(model, ids)
    for place in ("disco", "ram", "disco", "auto"):
        model.move_memory(place)
        assert torch.equal(logits(model, ids), expected)
    narrowed = opened(folders["float32"], "ram", dtype=torch.float16)
    expected = logits(narrowed, ids)
    narrowed.move_memory("disco")
    assert torch.equal(logits(narrowed, ids), expected)
    model = opened(folders["float32"], "ram")
    with torch.no_grad():
        model.model.engram_tables["1"].weight[0] += 1  # the file does not have this
    with pytest.raises(ValueError, match="han cambiado desde que se leyeron"):
        model.move_memory("disco")
    assert model.memory_place == "ram"


def test_places_that_cannot_be(saved, make_model, monkeypatch):
    _, folders = saved
    with pytest.raises(ValueError, match="elige entre auto, gpu, ram, disco"):
        opened(folders["float32"], "disk")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no hay ninguna"):
        opened(folders["float32"], "gpu")
    with pytest.raises(ValueError, match="Guarda antes el modelo"):
        make_model().move_memory("disco")


@pytest.mark.parametrize("wanted", ["auto", "ram"])
def test_too_little_ram_falls_back_to_the_disk_and_says_so(saved, monkeypatch, wanted, caplog):
    _, folders = saved
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(phi1_engram, "free_ram", lambda: 50_000)
    warnings = []
    monkeypatch.setattr(phi1_engram.logger, "warning", warnings.append)
    model = opened(folders["float32"], wanted)
    assert model.memory_place == "disco" and "solo hay" in model.memory_reason
    assert (wanted == "ram") == any("se lee del disco" in text for text in warnings)


def test_auto_classes_and_copies(saved):
    model, folders = saved
    ids = helpers.random_ids(model, 1, 9)
    there = AutoModelForCausalLM.from_pretrained(folders["float32"], engram_storage="disco")
    assert there.memory_place == "disco"
    assert torch.equal(logits(there, ids), logits(model, ids))
    assert torch.equal(logits(copy.deepcopy(there), ids), logits(model, ids))


def test_compiled_from_ram_and_said_of_the_disk(saved):
    model, folders = saved
    ids = helpers.random_ids(model, 1, 9)
    with torch.no_grad():
        whole = torch.compile(opened(folders["float32"], "ram"), fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(ids).logits, logits(model, ids), rtol=0, atol=1e-5)  # float32, other fusions
        torch.compiler.reset()
        with pytest.raises(Exception, match="torch.compile las quiere en 'gpu'"):
            torch.compile(opened(folders["float32"], "disco"), fullgraph=True, backend="eager")(ids)
        torch.compiler.reset()
        parts = torch.compile(opened(folders["float32"], "disco"), backend="eager")
        torch.testing.assert_close(parts(ids).logits, logits(model, ids), rtol=0, atol=1e-5)


def test_what_is_compiled_of_a_model_with_its_rows_elsewhere(make_model, tmp_path):
    """All layers in one graph: of graphs of one layer each, dynamo compiles eight."""
    make_model(num_hidden_layers=10).save_pretrained(tmp_path)
    model = opened(tmp_path, "disco")
    ids = helpers.random_ids(model, 1, 9)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # generate compiles by itself on a card alone
    greedy = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    torch.compiler.reset()
    counters.clear()
    found = model.generate(ids, cache_implementation="static", compile_config=config, **greedy)
    assert torch.equal(found, model.generate(ids, **greedy))
    assert counters["stats"]["unique_graphs"] < 10, dict(counters["stats"])
    torch.compiler.reset()


def test_a_forked_process_reads_too(saved):
    _, folders = saved
    model = opened(folders["float32"], "disco")
    ids = helpers.random_ids(model, 1, 9)
    expected = logits(model, ids)  # the reading thread is there now
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for ever is a failure, not a hang
        os._exit(0 if torch.equal(logits(model, ids), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_each_distinct_row_is_read_once_while_earlier_layers_compute(saved, monkeypatch):
    import threading

    model, folders = saved
    model = opened(folders["float32"], "disco")
    seen, read = [], TableFile.read

    def watch(self, row_ids):
        seen.append((threading.current_thread().name, sorted(row_ids.tolist())))
        return read(self, row_ids)

    monkeypatch.setattr(TableFile, "read", watch)
    monkeypatch.setattr(TableFile, "read_cached", lambda *_: None)  # as if none were in memory
    ids = torch.tensor([[5, 6, 5, 6, 5, 6, 5, 6]])
    logits(model, ids)
    indices = model.model.ngram_indices(ids)
    offsets = dict(zip(indices, model.model.engram_hash.offsets))
    assert len(seen) == 2
    for (thread, rows), layer in zip(seen, (1, 2)):
        assert thread.startswith("engram") and rows == (indices[layer] + offsets[layer]).unique().tolist()
    for table in model.model.engram_tables.values():
        table.prefetches = False
    seen.clear()
    logits(model, ids)
    assert all(thread == "MainThread" for thread, _ in seen) and len(seen) == 2


def test_rows_are_read_where_the_system_reads_at_no_place_of_its_own(saved, monkeypatch):
    """Windows has no pread."""
    model, folders = saved
    ids = helpers.random_ids(model, 1, 5)
    expected = logits(opened(folders["int8"], "ram"), ids)
    for name in ("pread", "preadv", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(phi1_engram, "PREAD", False)
    assert torch.equal(logits(opened(folders["int8"], "disco"), ids), expected)


@pytest.mark.parametrize("system", ["warm", "cold", "without"])
def test_few_rows_are_read_at_once_where_the_system_has_them(saved, monkeypatch, system):
    """And by the thread where one would have to be waited for, or where no system call tells."""
    model, folders = saved
    ids, read, preadv = helpers.random_ids(model, 1, 5), TableFile.read, os.preadv
    by_thread = []
    monkeypatch.setattr(TableFile, "read", lambda self, row_ids: by_thread.append(len(row_ids)) or read(self, row_ids))
    if system == "cold":
        asked = []

        def last_is_not_there(*args):
            asked.append(args)
            if len(asked) % 7 == 0:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            return preadv(*args)

        monkeypatch.setattr(os, "preadv", last_is_not_there)
    elif system == "without":
        monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    there, expected = opened(folders["int8"], "disco"), logits(opened(folders["int8"], "ram"), ids)
    if system == "warm":
        for table in there.model.engram_tables.values():
            read(table.file, np.arange(table.n_rows))
        if there.model.engram_tables["1"].file.read_cached(np.arange(3)) is None:
            pytest.skip("este disco no dice qué tiene en memoria")
    assert torch.equal(logits(there, ids), expected)
    assert (not by_thread) == (system == "warm")


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_ahead_where_the_table_itself_is_differentiated(make_model, monkeypatch):
    model = make_model()
    for table in model.model.engram_tables.values():
        table.stays = True
    brought, bring = [], phi1_engram.EngramTable._bring
    monkeypatch.setattr(
        phi1_engram.EngramTable, "_bring", lambda self, *rest: brought.append(self) or bring(self, *rest)
    )
    ids = helpers.random_ids(model, 2, 12)
    model(ids, labels=ids).loss.backward()
    assert not brought and all(table.weight.grad.any() for table in model.model.engram_tables.values())
    with torch.no_grad():
        model(ids)
    assert len(brought) == 2


def test_table_files_are_plain_safetensors_that_begin_on_a_page(saved):
    model, folders = saved
    for precision, dtype in PRECISIONS.items():
        file = folders[precision] / "model-engram-2.safetensors"
        rows = load_file(file)["model.engram_tables.2.weight"]
        assert rows.dtype == dtype and (file.stat().st_size - rows.nbytes) == 4096
    assert torch.equal(load_file(folders["float32"] / file.name)["model.engram_tables.2.weight"],
                       model.model.engram_tables["2"].weight)  # fmt: skip
    with safe_open(folders["float32"] / helpers.DENSE_FILE, "pt") as backbone:
        assert not [name for name in backbone.keys() if "engram_tables" in name]


@pytest.mark.parametrize("sharded", [False, True])
def test_tables_among_the_other_tensors_are_found(saved, tmp_path, sharded):
    """As another tool writes them: one file of everything, or shards with their index."""
    model, folders = saved
    tensors = helpers.saved_tensors(folders["float32"])
    for name in ("config.json", "generation_config.json"):
        shutil.copy(folders["float32"] / name, tmp_path)
    if sharded:
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, tmp_path / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = helpers.random_ids(model, 1, 9)
    for place in PLACES:
        there, info = opened(tmp_path, place, output_loading_info=True)
        assert torch.equal(logits(there, ids), logits(model, ids))
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_saving_over_the_folder_that_is_being_read(saved, tmp_path):
    model, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    ids = helpers.random_ids(model, 1, 9)
    there = opened(tmp_path / "it", "disco")
    there.save_pretrained(tmp_path / "it")
    assert torch.equal(logits(there, ids), logits(model, ids))
    assert torch.equal(logits(opened(tmp_path / "it", "disco"), ids), logits(model, ids))
    assert not list((tmp_path / "it").glob("*.tmp"))


def test_many_chunks_are_one_table(saved, tmp_path, monkeypatch):
    """Tables larger than what is read or converted at a time, as all real ones are."""
    model, folders = saved
    ids = helpers.random_ids(model, 2, 20)
    expected = {precision: logits(opened(folders[precision], "ram"), ids) for precision in PRECISIONS}
    monkeypatch.setattr(phi1_engram, "CHUNK", 1000)
    from_disk = opened(folders["float32"], "disco")
    for precision in PRECISIONS:
        for name, source in (("ram", model), ("disk", from_disk)):
            source.save_pretrained(tmp_path / name, engram_precision=precision)
            assert torch.equal(logits(opened(tmp_path / name, "ram"), ids), expected[precision])
    narrowed = opened(folders["float32"], "ram", dtype=torch.float16)
    assert torch.equal(narrowed.model.engram_tables["1"].weight, model.model.engram_tables["1"].weight.half())
    save_memory(from_disk, tmp_path / "memory")
    remove_memory(from_disk)
    load_memory(from_disk, tmp_path / "memory")
    assert torch.equal(logits(from_disk, ids), expected["float32"])


def test_a_save_that_fails_leaves_the_earlier_file(saved, tmp_path, monkeypatch):
    model, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    before = (tmp_path / "it" / "model-engram-1.safetensors").read_bytes()

    def broken(self, dtype):
        yield torch.zeros(3, 4)
        raise OSError("no space")

    monkeypatch.setattr(phi1_engram.EngramTable, "chunks", broken)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "it")
    assert (tmp_path / "it" / "model-engram-1.safetensors").read_bytes() == before
    assert not list((tmp_path / "it").glob("*.tmp"))


def _truncate(file):
    os.truncate(file, file.stat().st_size - 100)


def _garble_header(file):
    with open(file, "r+b") as handle:
        handle.seek(8)
        handle.write(b"{{{{")


def _zero_rows(file):
    size = file.stat().st_size
    with open(file, "r+b") as handle:  # as a download that was given its size and never its content
        handle.seek(4096)
        handle.write(bytes(size - 4096))


def _other_layer(file):
    shutil.copy(file.with_name("model-engram-2.safetensors"), file)


def _other_training(file):
    helpers.make_model(seed=9).save_pretrained(file.parent / "other")
    shutil.copy(file.parent / "other" / file.name, file)


BREAKAGES = {
    _truncate: "está a medias", _garble_header: "cabecera", _zero_rows: "no son las que se guardaron",
    _other_layer: "cabecera", _other_training: "no son las que se guardaron con este modelo",
}  # fmt: skip


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_file_is_found_when_it_is_opened(saved, tmp_path, breakage, place):
    _, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    breakage(tmp_path / "it" / "model-engram-1.safetensors")
    with pytest.raises(OSError, match=BREAKAGES[breakage]):
        opened(tmp_path / "it", place)


def rewrite(folder, change, **told):
    """Write the dense weights' file once more, as another program does that has read it."""
    path = folder / helpers.DENSE_FILE
    tensors = load_file(path)
    for name in tensors:
        if ".engram." in name:
            tensors[name] = change(name, tensors[name])
    save_file(tensors, path, {"format": "pt", **told})


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_averaged_dense_weights_open_beside_their_rows(saved, tmp_path, place, keeps):
    """Which is said where the program that wrote them has not kept what the file said."""
    _, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    other = helpers.make_model(seed=9).state_dict()
    with safe_open(tmp_path / "it" / helpers.DENSE_FILE, "pt") as file:
        told = file.metadata() if keeps else {}
    rewrite(tmp_path / "it", lambda name, tensor: (tensor + other[name]) / 2, **told)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi1_engram.logger, "warning", lambda text, *args: said.append(text))
        model = opened(tmp_path / "it", place)
    assert ["otro programa" in text for text in said] == ([] if keeps else [True, True])  # one for each layer
    name = "model.layers.1.engram.value_proj.weight"
    assert torch.equal(model.state_dict()[name], load_file(tmp_path / "it" / helpers.DENSE_FILE)[name])
    expected = opened(folders["float32"]).model.engram_tables["1"].weight
    assert all(map(torch.equal, model.model.engram_tables["1"].chunks(torch.float32), expected.split(10**6)))
    model.save_pretrained(tmp_path / "again")  # a pair from now on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi1_engram.logger, "warning", lambda text, *args: pytest.fail(text))
        ids = helpers.random_ids(model, 2, 12)
        assert torch.equal(logits(opened(tmp_path / "again"), ids), logits(model, ids))


def test_dense_weights_of_another_training_are_found(saved, tmp_path):
    _, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    helpers.make_model(seed=9).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / helpers.DENSE_FILE, tmp_path / "it")
    with pytest.raises(EngramFileError, match="no son las que se guardaron con este modelo"):
        opened(tmp_path / "it")


def test_what_an_earlier_version_saved_and_was_mixed_up_is_found(tmp_path):
    """Its dense weights' file says nothing, so that their digest has to do; how to mix them on purpose is said."""
    folder = Path(__file__).resolve().parent / "saved" / "entrenado"
    shutil.copytree(folder, tmp_path / "it")
    opened(tmp_path / "it")
    path = tmp_path / "it" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: -x if ".engram.key" in name else x for name, x in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(EngramFileError, match="mezclado sus pesos tú.*save_pretrained"):
        opened(tmp_path / "it")


def test_a_file_of_another_shape_is_refused(saved, tmp_path):
    _, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    config = json.loads((tmp_path / "it" / "config.json").read_text())
    (tmp_path / "it" / "config.json").write_text(json.dumps({**config, "engram_vocab_size": [211, 401]}))
    with pytest.raises(OSError, match="debe ser de"):
        opened(tmp_path / "it")


@pytest.mark.parametrize("length", [1, 40])
def test_a_file_that_is_cut_while_open_is_an_error_and_no_dead_process(saved, tmp_path, length):
    model, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    there = opened(tmp_path / "it", "disco")
    ids = helpers.random_ids(model, 1, length)
    logits(there, ids)
    os.truncate(tmp_path / "it" / "model-engram-1.safetensors", 5000)
    with pytest.raises(EngramFileError, match="se ha cortado mientras estaba abierto"):
        logits(there, ids)


def test_rows_whose_dense_weights_are_missing_are_not_read(make_model, tmp_path):
    """Beside new projections they would mean nothing: that layer's memory is an untrained one, and it is said."""
    model = make_model(attn="sdpa")
    model.save_pretrained(tmp_path)
    path, lost = tmp_path / helpers.DENSE_FILE, "model.layers.2.engram.value_proj.weight"
    tensors = load_file(path)
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phi1_engram.logger, "warning", lambda text, *args: said.append(text))
        again, info = opened(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost, "model.engram_tables.2.weight"}
    assert len(said) == 1 and f"le falta {lost}: sus filas de la capa 2 no se leen" in said[0]
    with torch.no_grad():
        model.model.engram_tables["2"].weight.zero_()
    ids = helpers.random_ids(model, 2, 20)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_checkpoint_is_opened_by_transformers_name_of_the_argument(saved):
    model, folders = saved
    ids = helpers.random_ids(model, 2, 20)
    named = PhiEngramForCausalLM.from_pretrained(pretrained_model_name_or_path=folders["float32"])
    assert torch.equal(logits(named, ids), logits(opened(folders["float32"]), ids))


def test_a_checkpoint_without_its_table_says_which_is_missing(saved, tmp_path):
    _, folders = saved
    shutil.copytree(folders["float32"], tmp_path / "it")
    (tmp_path / "it" / "model-engram-2.safetensors").unlink()
    with pytest.raises(EngramFileError, match="le falta el archivo de la memoria model-engram-2.safetensors"):
        opened(tmp_path / "it")
    # Without an index nothing says that there was one, as in what earlier versions saved.
    (tmp_path / "it" / "model.safetensors.index.json").unlink()
    (tmp_path / "it" / helpers.DENSE_FILE).rename(tmp_path / "it" / "model.safetensors")
    model, info = opened(tmp_path / "it", output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.engram_tables.2.weight"}
    assert not model.model.engram_tables["2"].weight.any()


def test_what_only_reads_cannot_be_trained(saved):
    model, folders = saved
    ids = helpers.random_ids(model, 1, 9)
    for place, precision in (("disco", "float32"), ("ram", "int8")):
        model = opened(folders[precision], place).train()
        with pytest.raises(ValueError, match="solo se puede leer"):
            model(ids, labels=ids)
        for name, parameter in model.named_parameters():  # LoRA and the like train the backbone beside it
            parameter.requires_grad_("self_attn" in name)
        model(ids, labels=ids).loss.backward()
        assert model.model.layers[3].self_attn.q_proj.weight.grad.any()


def test_opening_a_large_table_reads_next_to_nothing(saved, tmp_path):
    """Tables of 0.5 GB in all, in a process of its own: what it holds beyond an empty one."""
    config = helpers.make_config(engram_vocab_size=[2**19, 2**19], n_embed_per_ngram=64)
    model = PhiEngramForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model-engram-1.safetensors").stat().st_size > 2.5e8
    code = (
        "import re, sys\nfrom phi1_engram import PhiEngramForCausalLM\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3\n"
        "before = peak()\nmodel = PhiEngramForCausalLM.from_pretrained(sys.argv[1], engram_storage='disco')\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(phi1_engram.__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 100  # MB


THREADS = """
import os, sys
import torch
import phi1_engram
torch.set_num_threads(4)
torch.randn(2**20).mul_(2)
ids = torch.arange(8 * 512).view(8, 512) % 200
for place in ("ram", "disco"):
    model = phi1_engram.PhiEngramForCausalLM.from_pretrained(sys.argv[1], engram_storage=place).eval()
    with torch.no_grad():
        model(ids)
    print(len(phi1_engram._reader._threads), len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="solo Linux dice los hilos de un proceso")
def test_the_reader_is_one_thread_without_any_of_torch_s(saved):
    """In a process of its own. Of a thread that computes with torch come as many more as there are cores."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS, saved[1]["int8"]], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(phi1_engram.__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    none, before, one, after = map(int, done.stdout.split())
    assert (none, one) == (0, 1) and after <= before + 1  # fewer where one of the loader's has ended since


# ----------------------------------------------------------------------------------------------------------------------
# Memories that travel
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_model):
    """Two memories of different training on one backbone, some rows trained."""
    first = make_model(attn="sdpa")
    second = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for model, rows in ((first, slice(0, 300)), (second, slice(200, 900))):
            for table in model.model.engram_tables.values():
                kept = torch.randn(table.weight[rows].shape, generator=generator)
                table.weight.zero_()[rows] = kept
            for parameter in model.model.layers[1].engram.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return first, second


def test_memories_are_swapped_on_one_backbone(trained, tmp_path):
    first, second = trained
    ids = helpers.random_ids(first, 2, 30)
    expected = logits(first, ids), logits(second, ids)
    save_memory(first, tmp_path / "first"), save_memory(second, tmp_path / "second")
    load_memory(first, tmp_path / "second")
    assert torch.equal(logits(first, ids), expected[1])
    load_memory(first, tmp_path / "first")
    assert torch.equal(logits(first, ids), expected[0])
    remove_memory(first)
    without = logits(first, ids)
    first.model.use_memory = False
    assert torch.equal(logits(first, ids), without)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_from_any_place_and_precision(trained, tmp_path, precision, dtype):
    first, second = trained
    ids = helpers.random_ids(first, 1, 20)
    first.save_pretrained(tmp_path / "first", engram_precision=precision)
    second.save_pretrained(tmp_path / "second", engram_precision=precision)
    there = {name: opened(tmp_path / name, "disco", dtype=dtype) for name in ("first", "second")}
    expected = logits(there["second"], ids)
    save_memory(there["second"], tmp_path / "memory")
    load_memory(there["first"], tmp_path / "memory")
    assert torch.equal(logits(there["first"], ids), expected) and there["first"].memory_place == "ram"


def test_the_file_follows_the_rows_trained(make_model, tmp_path):
    sizes = []
    for slots in ([211, 307], [20011, 30011]):
        model = make_model(engram_vocab_size=slots)
        with torch.no_grad():
            for table in model.model.engram_tables.values():
                table.weight[50:] = 0
        save_memory(model, tmp_path)
        sizes.append((tmp_path / "engram_memory.safetensors").stat().st_size)
        with safe_open(tmp_path / "engram_memory.safetensors", "pt") as file:
            assert file.get_tensor("1.rows").shape == (50, 4)
            assert not [name for name in file.keys() if "self_attn" in name or "embed_tokens" in name]
    assert abs(sizes[0] - sizes[1]) < 100


def _other_backbone(model):
    with torch.no_grad():
        model.model.layers[3].mlp.fc1.weight.neg_()


def _other_projection(model):
    model.model.engram_hash.token_map[5] = 4


def _other_hash(model):
    model.model.engram_hash.multipliers[0, 0] += 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_other_backbone, "sobre otro Phi"), (_other_projection, "proyección"), (_other_hash, "otra forma de memoria")],
)
def test_a_memory_of_another_model_is_refused_and_nothing_changes(trained, tmp_path, change, reason):
    first, second = trained
    save_memory(second, tmp_path)
    change(first)
    ids = helpers.random_ids(first, 1, 20)
    before = logits(first, ids)
    with pytest.raises(ValueError, match=reason):
        load_memory(first, tmp_path)
    assert torch.equal(logits(first, ids), before)


def test_fingerprints_are_the_same_in_every_precision(trained, tmp_path):
    first, _ = trained
    first.save_pretrained(tmp_path)
    expected = first.fingerprints()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert opened(tmp_path, dtype=dtype).fingerprints() == expected
    with torch.no_grad():  # one step of training is another backbone
        for parameter in first.model.layers[0].parameters():
            parameter.sub_(1e-3 * torch.randn_like(parameter))
    assert first.fingerprints()["backbone"] != expected["backbone"]


HUB_TRIP = """
import sys, torch
from huggingface_hub import HfApi
from phi1_engram import PhiEngramForCausalLM
from engram.memories import load_memory
folder, memory, ids, logits = sys.argv[1:]
HfApi().create_repo("usuario/memoria", private=True)
HfApi().upload_folder(repo_id="usuario/memoria", folder_path=memory)
model = PhiEngramForCausalLM.from_pretrained(folder, engram_storage="disco")
load_memory(model, "usuario/memoria")
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, logits)
"""


def test_memory_goes_to_the_hub_and_comes_back(trained, tmp_path):
    first, second = trained
    ids = helpers.random_ids(first, 1, 20)
    first.save_pretrained(tmp_path / "first"), save_memory(second, tmp_path / "memory")
    torch.save(ids, tmp_path / "ids.pt")
    with Hub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", HUB_TRIP, *(tmp_path / name for name in ("first", "memory", "ids.pt", "logits.pt"))],
            env=hub.environment(tmp_path / "home", hub.token, PYTHONPATH=str(Path(phi1_engram.__file__).parent)),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "engram_memory.safetensors" in hub.repos["usuario/memoria"] and hub.private["usuario/memoria"]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(second, ids), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# In the scripts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch, phi_folder):
    """A folder with a grafted Phi in `base/` and the same with a trained memory in `trained/`."""
    monkeypatch.chdir(tmp_path)
    run(load_script, "--modelo", str(phi_folder), "--capas", "1", "--filas", "500", "--salida", "base")
    model, tokenizer = open_model("base")
    with torch.no_grad():
        model.model.engram_tables["1"].weight[100:300].normal_()
        model.model.layers[1].engram.conv.weight.normal_()
    model.save_pretrained("trained"), tokenizer.save_pretrained("trained")
    return tmp_path


def run(script, *arguments):
    with pytest.raises(SystemExit) as exit:
        run_script(script.main, [str(argument) for argument in arguments])
    return exit.value.code


def test_load_converts_and_takes_the_memory_alone(here, capsys):
    ids = torch.arange(40)[None] + 300
    expected = logits(open_model("trained")[0], ids)
    assert run(load_script, "--modelo", "trained", "--precision-memoria", "int8", "--salida", "small") == 0
    small, tokenizer = open_model("small")
    assert small.model.engram_tables["1"].dtype == torch.int8 and len(tokenizer) == 50295
    assert (logits(small, ids) - expected).abs().max() < 0.05 * expected.abs().max()
    assert run(load_script, "--modelo", "trained", "--solo-memoria", "--salida", "alone") == 0
    assert sorted(os.listdir("alone")) == ["README.md", "engram_memory.safetensors"]
    card = (here / "alone" / "README.md").read_text(encoding="utf-8")
    assert "Phi congelado" in card and "no responde" in card and "fase 2" not in capsys.readouterr().out
    assert run(load_script, "--modelo", "base", "--cambiar-memoria", "alone", "--salida", "again") == 0
    assert torch.equal(logits(open_model("again")[0], ids), expected)
    assert "✅ Memoria cambiada" in capsys.readouterr().out
    # The folder of a memory may be written over by another, a folder with other things may not.
    assert run(load_script, "--modelo", "trained", "--solo-memoria", "--salida", "alone") == 0
    assert run(load_script, "--modelo", "trained", "--solo-memoria", "--salida", ".") == 1
    assert "no la voy a pisar" in capsys.readouterr().err


def test_a_memory_alone_says_whether_its_phi_was_trained_whoever_trained_it(here, capsys):
    model, tokenizer = open_model("trained")
    assert not phi_was_trained(model)
    model.resize_token_embeddings(len(tokenizer) + 40_000)  # other tokens, the same Phi
    assert not phi_was_trained(model)
    model, tokenizer = open_model("trained")
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight += 0.01 * torch.randn(model.model.layers[0].mlp.fc1.weight.shape)
    model.save_pretrained("phase2"), tokenizer.save_pretrained("phase2")
    assert run(load_script, "--modelo", "phase2", "--precision-memoria", "int8", "--salida", "smaller") == 0
    for name in ("phase2", "smaller"):
        assert run(load_script, "--modelo", name, "--solo-memoria", "--salida", f"of-{name}") == 0
        assert "esta memoria solo sirve con ese Phi" in capsys.readouterr().out
        card = (here / f"of-{name}" / "README.md").read_text(encoding="utf-8")
        assert f"solo sirve con el Phi de `{name}`" in card
    # One that an earlier version trained tells it in its log alone.
    model.config.engram_backbone = None
    assert not phi_was_trained(model)
    model.save_pretrained("before"), tokenizer.save_pretrained("before")
    (here / "before" / "entrenamiento.jsonl").write_text('{"phase": 2, "step": 1, "loss": 1.0, "memory": {}}\n')
    assert phi_was_trained(open_model("before")[0])


def test_load_writes_over_an_untrained_graft_and_over_nothing_that_has_learned(here, capsys):
    shutil.copytree("base", "phi1-engram")  # the default
    for alone in ([], ["--salida", "trained"], ["--salida", "base"]):
        assert run(load_script, "--modelo", "trained", "--solo-memoria", *alone) == 1
        assert "ahí hay un modelo entero y no lo voy a pisar" in capsys.readouterr().err
    assert all(open_model(name)[0] for name in ("phi1-engram", "trained", "base"))
    shutil.copytree("trained", "rows")
    model = open_model("rows")[0]
    model.model.layers[1].engram.conv.weight.data.zero_()
    model.save_pretrained("rows")  # rows alone
    shutil.copytree("base", "taught")
    (here / "taught" / "engram_facts.json").write_text("{}")
    for name in ("trained", "rows", "taught"):
        assert run(load_script, "--modelo", "base", "--precision-memoria", "int8", "--salida", name) == 1
        assert "un modelo que ha aprendido algo y no lo voy a pisar" in capsys.readouterr().err
    assert run(load_script, "--modelo", "trained", "--precision-memoria", "int8", "--salida", "base") == 0
    assert run(load_script, "--modelo", "trained", "--solo-memoria", "--salida", "alone") == 0
    (here / "alone" / ".DS_Store").write_bytes(b"")
    assert run(load_script, "--modelo", "trained", "--precision-memoria", "int8", "--salida", "alone") == 1
    assert "ahí hay una memoria y no la voy a pisar" in capsys.readouterr().err
    assert run(load_script, "--modelo", "trained", "--solo-memoria", "--salida", "alone") == 0
    for file in (here / "phi1-engram").glob("model*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert run(load_script, "--modelo", "trained", "--precision-memoria", "int8") == 1
    assert "está dañado o a medias: borra la carpeta phi1-engram" in capsys.readouterr().err


def test_load_narrows_rows_with_the_rest(here):
    assert run(load_script, "--modelo", "trained", "--solo-memoria", "--salida", "alone") == 0
    changed = ["--modelo", "base", "--cambiar-memoria", "alone", "--dtype", "float16", "--salida", "half"]
    assert run(load_script, *changed) == 0
    half = open_model("half")[0]
    assert half.dtype == half.model.engram_tables["1"].dtype == torch.float16
    sizes = [max(path.stat().st_size for path in (here / name).glob("model-engram-*")) for name in ("half", "trained")]
    assert sizes[0] < 0.55 * sizes[1]


def test_verify_does_not_fail_an_untrained_memory_that_it_cannot_fill(here, capsys):
    assert run(load_script, "--modelo", "base", "--precision-memoria", "int8", "--salida", "small") == 0
    assert run(verify_script, "--modelo", "small") == 0
    assert "Memoria sin entrenar y en int8" in capsys.readouterr().out


def test_load_says_what_cannot_be(here, capsys):
    for arguments, words in (
        (["--modelo", "trained", "--precision-memoria", "int8", "--filas", "9", "--salida", "x"], "ya tiene memoria"),
        (["--modelo", "trained", "--precision-memoria", "int4", "--salida", "x"], "elige entre"),
        (["--modelo", "trained", "--cambiar-memoria", "base", "--salida", "x"], "no contiene engram_memory"),
        (["--modelo", "trained", "--solo-memoria", "--precision-memoria", "int8"], "cambia antes su precisión"),
    ):
        assert run(load_script, *arguments) in (1, 2)
        assert words in capsys.readouterr().err and not (here / "x").exists()


def test_verify_and_chat_take_the_place_and_another_memory(here, capsys):
    run(load_script, "--modelo", "trained", "--solo-memoria", "--salida", "alone")
    capsys.readouterr()
    assert run(verify_script, "--modelo", "trained", "--memoria", "disco") == 0
    out = capsys.readouterr().out
    assert "Memoria en disco: ocupa" in out and "✅ Funciona lo que se ha comprobado" in out and "❌" not in out
    assert "solo se puede leer" in out
    assert run(verify_script, "--modelo", "base", "--memoria", "disco", "--cambiar-memoria", "alone") == 0
    options = ["--memoria", "disco", "--pregunta", "hola", "--max-tokens", "3", "--temperatura", "0"]
    answers = []
    for more in (["--modelo", "trained"], ["--modelo", "base", "--cambiar-memoria", "alone"]):
        capsys.readouterr()
        assert run(chat_script, *more, *options) == 0
        said = capsys.readouterr()
        answers.append(said.out)
    assert answers[0] == answers[1] and "Memoria de alone, encendida; en " in said.err
    assert run(chat_script, "--modelo", "trained", "--memoria", "disc") == 2
    assert run(verify_script, "--memoria", "disco") == 2


def test_a_file_that_goes_bad_during_a_chat_is_a_sentence(here, capsys, monkeypatch):
    model, tokenizer = open_model("trained", storage="disco")
    os.truncate("trained/model-engram-1.safetensors", 5000)
    questions = iter(["hola", "salir"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    chat_script.run_chat(model, tokenizer, code=False, max_tokens=3)
    assert "❌ El archivo de la memoria" in capsys.readouterr().err
    assert run(chat_script, "--modelo", "trained", "--pregunta", "hola") == 1
    assert "está a medias" in capsys.readouterr().err


def test_train_asks_for_rows_that_can_be_written(here, capsys):
    (here / "codigo").mkdir()
    for i in range(40):
        (here / "codigo" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 10)
    run(load_script, "--modelo", "trained", "--precision-memoria", "int8", "--salida", "small")
    options = ["--datos", "codigo", "--longitud", "16", "--lote", "1", "--acumular", "1", "--pasos-fase1", "1"]
    options += ["--pasos-fase2", "0", "--salida", "out"]
    assert run(train_script, "--modelo", "small", "--memoria", "disco", *options) == 1
    assert "usa --memoria ram" in capsys.readouterr().err
    assert run(train_script, "--modelo", "small", *options) == 0
    tables = open_model("out")[0].model.engram_tables
    assert tables["1"].dtype == torch.float32
