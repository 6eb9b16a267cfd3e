"""What leaves this machine: a saved folder opens elsewhere, with nothing of ours importable, and gives the same."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiForCausalLM

import helpers
import phi1_engram
from phi1_engram import PhiEngramForCausalLM

CODE = Path(phi1_engram.__file__)
PROMPT = "def print_prime(n):"
IDS = [[5, 17, 300, 5, 17, 300, 50300, 9]]

# Run by `python -I` in another folder. Arguments: the saved folder, another one in float16 shards, where to save again.
ELSEWHERE = """
import importlib.util, json, sys
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

folder, sharded, again = sys.argv[1:]
assert not any(importlib.util.find_spec(name) for name in ("phi1_engram", "helpers", "conftest"))
result = {}
ids, mask = torch.tensor(IDS), torch.ones(1, 8)

def logits(folder, **kw):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kw)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        return model, model(ids).logits.float()[0, :, :64].tolist()

opened = AutoTokenizer.from_pretrained
def forbidden(*args, **kw):
    raise AssertionError("a tokenizer was opened")
transformers.AutoTokenizer.from_pretrained = forbidden
model, result["logits"] = logits(folder)
result["sharded"] = logits(sharded, dtype=torch.float16)[1]
result["device_map"] = logits(sharded, dtype=torch.float16, device_map="auto")[1]
with torch.no_grad():
    result["hidden"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state.tolist()
transformers.AutoTokenizer.from_pretrained = opened

result["greedy"] = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
model.save_pretrained(again)
AutoTokenizer.from_pretrained(folder).save_pretrained(again)
result["again"] = logits(again)[1]
result["config"] = type(AutoConfig.from_pretrained(again, trust_remote_code=True)).__name__
for name, where in (("pipeline", folder), ("pipeline_again", again)):
    writer = pipeline("text-generation", model=where, trust_remote_code=True, device="cpu")
    result[name] = writer(PROMPT, max_new_tokens=8, do_sample=False)[0]["generated_text"]
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tokenizer):
    """A model whose tokenizer name leads nowhere, saved twice: whole in float32, sharded in float16."""
    model = helpers.make_model(
        attn="sdpa", vocab_size=51200, hidden_size=16, num_hidden_layers=3, engram_layer_ids=[0, 2],
        engram_tokenizer_compression=True, tokenizer=tokenizer, tokenizer_name_or_path="nobody/nothing",
    )  # fmt: skip
    folder, sharded = tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    PhiEngramForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(sharded, max_shard_size="1MB")
    return model, folder, sharded


# As above. Arguments: two folders whose code differs, and where to save the second again.
TWO_CODES = """
import importlib, json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

first, second, again = sys.argv[1:]
ids = torch.tensor(IDS)
code = lambda thing: importlib.import_module(type(thing).__module__).MARK
marks, logits = [], []
for folder in (first, second, first, second):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    stack = AutoModel.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    writer = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu").model
    marks.append([code(thing) for thing in (model, stack, config, writer, model.config, model.model)])
    logits.append(model(ids).logits[0, :, :64].tolist())
model.save_pretrained(again)
marks.append([code(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True))])
print("RESULT" + json.dumps([marks, logits]))
"""


def alone(script, *arguments, cwd, home):
    """What `script`, in which nothing of ours can be imported, prints after RESULT."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    process = subprocess.run(
        [sys.executable, "-I", "-c", f"IDS, PROMPT = {IDS!r}, {PROMPT!r}\n{script}", *arguments],
        cwd=cwd, env={**environment, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(next(line for line in process.stdout.splitlines() if line.startswith("RESULT"))[6:])


@pytest.mark.parametrize("names", [("uno", "dos"), ("uno/modelo", "dos/modelo")])
def test_two_folders_run_their_own_code_each(shared, tmp_path, names):
    _, folder, _ = shared
    changes = {"uno": ("", ""), "dos": ("logits = self.lm_head(", "logits = 2 * self.lm_head(")}
    for name in names:
        shutil.copytree(folder, tmp_path / name)
        mark = name.split("/")[0]
        code = CODE.read_text(encoding="utf-8").replace(*changes[mark])
        (tmp_path / name / "phi1_engram.py").write_text(f"{code}\nMARK = {mark!r}\n", encoding="utf-8")
    (tmp_path / "cwd").mkdir()
    folders = [tmp_path / name for name in (*names, "otra")]
    marks, logits = alone(TWO_CODES, *folders, cwd=tmp_path / "cwd", home=tmp_path / "home")
    assert marks == [["uno"] * 6, ["dos"] * 6] * 2 + [["dos"]]
    logits = torch.tensor(logits)
    assert torch.equal(logits[1], 2 * logits[0]) and torch.equal(logits[2:], logits[:2])


@pytest.fixture(scope="module")
def elsewhere(shared, tmp_path_factory):
    """What a process finds that has nothing of ours but the folders."""
    _, folder, sharded = shared
    cwd = tmp_path_factory.mktemp("elsewhere")
    home = tmp_path_factory.mktemp("home")  # an empty cache: no tokenizer of microsoft/phi-1 either
    return {**alone(ELSEWHERE, folder, sharded, cwd / "again", cwd=cwd, home=home), "folder": cwd / "again"}


@torch.no_grad()
def logits(model):
    return model(torch.tensor(IDS)).logits[0, :, :64]


def test_what_is_written(shared):
    _, folder, sharded = shared
    names = {path.name for path in folder.iterdir()}
    assert {helpers.DENSE_FILE, "config.json", "generation_config.json", "phi1_engram.py", "tokenizer.json"} <= names
    assert (folder / "phi1_engram.py").read_bytes() == CODE.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "phi1_engram.PhiEngramConfig", "AutoModel": "phi1_engram.PhiEngramModel",
        "AutoModelForCausalLM": "phi1_engram.PhiEngramForCausalLM",
    }  # fmt: skip
    assert config["architectures"] == ["PhiEngramForCausalLM"] and config["model_type"] == "phi_engram"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 50256
    assert len(list(sharded.glob("model-*.safetensors"))) > 1 and (sharded / "model.safetensors.index.json").exists()
    assert (sharded / "phi1_engram.py").exists()
    assert not [path for path in (*folder.iterdir(), *sharded.iterdir()) if path.suffix in (".bin", ".pt", ".pkl")]


def test_another_process_gets_the_same_logits(shared, elsewhere):
    model, _, _ = shared
    torch.testing.assert_close(torch.tensor(elsewhere["logits"]), logits(model), rtol=0, atol=1e-6)
    with torch.no_grad():
        hidden = model.model(torch.tensor(IDS)).last_hidden_state
    torch.testing.assert_close(torch.tensor(elsewhere["hidden"]), hidden, rtol=0, atol=1e-6)


def test_another_process_generates_the_same(shared, elsewhere, tokenizer):
    model, _, _ = shared
    greedy = model.generate(torch.tensor(IDS), max_new_tokens=8, do_sample=False)
    assert elsewhere["greedy"] == greedy.tolist()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(prompt, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert elsewhere["pipeline"] == expected and len(expected) > len(PROMPT)


def test_sharded_half_precision_and_device_map(shared, elsewhere):
    _, _, sharded = shared
    model = PhiEngramForCausalLM.from_pretrained(sharded, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {b.dtype for n, b in model.named_buffers() if "engram" in n} == {torch.int64}
    for name in ("sharded", "device_map"):
        torch.testing.assert_close(torch.tensor(elsewhere[name]), logits(model).float(), rtol=0, atol=1e-6)
    # Half precision of the same weights: close to float32, and not equal by accident of loading float32.
    difference = (logits(model).float() - logits(shared[0])).abs().max()
    assert 0 < difference < 0.05


def test_saved_again_from_the_opened_code(shared, elsewhere):
    folder = elsewhere["folder"]
    assert (folder / "phi1_engram.py").read_bytes() == CODE.read_bytes()
    first, second = (json.loads((f / "config.json").read_text()) for f in (shared[1], folder))
    assert {name: target.split("--")[-1] for name, target in second["auto_map"].items()} == first["auto_map"]
    assert elsewhere["again"] == elsewhere["logits"] and elsewhere["pipeline_again"] == elsewhere["pipeline"]
    assert elsewhere["config"] == "PhiEngramConfig"


def test_nothing_is_lost_on_the_way(shared):
    model, folder, sharded = shared
    again, info = PhiEngramForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    half = PhiEngramForCausalLM.from_pretrained(sharded).state_dict()
    for name in ours:
        assert torch.equal(half[name].float(), ours[name].half().float() if half[name].is_floating_point()
                           else ours[name].float()), name  # fmt: skip


def test_auto_classes_where_our_module_is_imported(shared):
    _, folder, _ = shared
    model = AutoModelForCausalLM.from_pretrained(folder)  # no remote code needed here
    assert type(model) is PhiEngramForCausalLM
    assert torch.equal(logits(model), logits(shared[0]))


def test_the_folder_has_the_tokenizer(shared, tokenizer):
    opened = AutoTokenizer.from_pretrained(shared[1])
    text = "class A:\n    def f(self):\n\t\treturn 'ñ'<|endoftext|>"
    assert opened(text)["input_ids"] == tokenizer(text)["input_ids"] and len(opened) == 50295


def test_plain_phi_opens_the_same_folder(shared):
    model, folder, _ = shared
    phi, info = PhiForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and all("engram" in name for name in info["unexpected_keys"])
    for name, tensor in helpers.phi_state_dict(model).items():
        assert torch.equal(phi.state_dict()[name], tensor), name
    ids = torch.tensor(IDS)
    cached = phi.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    whole = phi.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, whole)
    assert (phi(ids).logits - model(ids).logits).abs().max() > 0.1  # without memory it is another model


@pytest.mark.parametrize("place", ["ram", "disco"])
def test_spread_over_devices(make_model, tmp_path, place):
    """As on two cards: parts elsewhere, the last layers offloaded to the disk. Without a GPU, hooks alone.

    The tables are not of the device map: they go where `engram_storage` says.
    """
    other = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(attn="sdpa", engram_layer_ids=[1, 3])
    model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(["model.embed_tokens", "model.engram_hash"], other)
    parts |= dict.fromkeys(["model.rotary_emb", "model.final_layernorm", "lm_head", "model.layers.0"], other)
    parts["model.layers.1"] = other
    parts |= dict.fromkeys(["model.layers.2", "model.layers.3"], "disk")
    spread = PhiEngramForCausalLM.from_pretrained(
        tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offloaded", engram_storage=place
    )
    assert spread.memory_place == place and spread.model.layers[3].mlp.fc1.weight.device.type == "meta"
    ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n, seed=n)[0] for n in (8, 3)])
    kw = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        ours = spread(ids.to(other), attention_mask=mask.to(other)).logits.cpu()
        torch.testing.assert_close(ours, model(ids, attention_mask=mask).logits, rtol=0, atol=1e-4)
    spread.save_pretrained(tmp_path / "again")  # with weights that have to be fetched from the disk
    again = PhiEngramForCausalLM.from_pretrained(tmp_path / "again", engram_storage=place)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    for beams in (1, 3):
        expected = model.generate(ids, num_beams=beams, **kw)
        ours = spread.generate(ids.to(other), num_beams=beams, **{**kw, "attention_mask": mask.to(other)})
        assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_survive(make_model, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied, attn="sdpa")
    model.save_pretrained(tmp_path)
    again = PhiEngramForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    ids = helpers.random_ids(model, 1, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_code_file_imports_only_what_everyone_has():
    """transformers refuses remote code when a package of any `import` outside a `try` is missing."""
    allowed = {"torch", "transformers", "numpy", "tokenizers", "sympy", "accelerate"} | set(sys.stdlib_module_names)
    allowed |= {"safetensors", "huggingface_hub"}  # transformers brings them
    tree = ast.parse(CODE.read_text())
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in guarded or not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for module in modules:
            assert module.split(".")[0] in allowed, module
            assert getattr(node, "level", 0) == 0, "a relative import would ask for a second file"
        # Only public names of transformers: private ones change without notice.
        if isinstance(node, ast.ImportFrom):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")], node.module
