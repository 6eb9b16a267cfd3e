"""load_phi_engram.py: the graft on disk, every way it can fail, and the Hub's stand-in (tests/hub.py)."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

import chat_phi_engram as chat_script
import helpers
import load_phi_engram
import phi1_engram
from engram.console import UserError, peak_memory, run_script
from engram.folders import whole_folder
from engram.graft import graft_difference, load_phi_1_with_engram
from engram.opening import open_model, quiet
from hub import Hub

ROOT = Path(load_phi_engram.__file__).parent
SMALL = dict(engram_vocab_size=[100, 100])


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *map(str, args)], text=True, capture_output=True, timeout=120, **kwargs)


@pytest.fixture
def load(capsys):
    """load("--modelo", x, …): run the script in this process -> exit status, stdout, stderr."""

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            run_script(load_phi_engram.main, [*map(str, argv), "--filas", "100"])
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def small_phi(tmp_path_factory):
    """A plain Phi checkpoint with a tokenizer of four words, a stop token (3) and a chat template of its own."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "def": 1, "a": 2, "<fin>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<fin>", unk_token="<unk>")
    tokenizer.chat_template = "mío"
    folder = tmp_path_factory.mktemp("small")
    helpers.save_phi(folder, tokenizer, vocab_size=64)
    return folder


@pytest.fixture
def copy(small_phi, tmp_path):
    """copy(tensors=change): a copy of `small_phi` in tmp_path/phi, its dict of tensors and config.json changed."""

    def make(tensors=None, **config):
        folder = tmp_path / "phi"
        shutil.copytree(small_phi, folder)
        if tensors:
            state = load_file(folder / "model.safetensors")
            save_file(tensors(state) or state, folder / "model.safetensors", {"format": "pt"})
        if config:
            fields = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**fields, **config}))
        return folder

    return make


@pytest.fixture(scope="module")
def grafted(phi_folder, tmp_path_factory):
    """The folder that the script wrote, run as a user does, from another folder; and what it printed."""
    here = tmp_path_factory.mktemp("aquí, con espacios")
    done = python(ROOT / "load_phi_engram.py", "--modelo", phi_folder, "--filas", 100, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and os.listdir(here) == ["phi1-engram"]
    return here / "phi1-engram", done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What it makes
# ----------------------------------------------------------------------------------------------------------------------


def test_report(grafted):
    out = grafted[1]
    assert "Phi, cargado: 47 tensores, 3,4 millones de parámetros, 13,41 MB" in out
    assert "Engram, nuevo: 11 tensores" in out and "Capas con memoria: 1. Precisión: float32" in out
    assert "✅ Injerto exacto" in out and "✅ Guardado en phi1-engram/ en" in out
    assert "Ahora: python train_phi_engram.py " in out and "python chat_phi_engram.py " in out
    assert sys.platform != "linux" or "RAM máxima:" in out


def test_saved_folder_without_our_code(grafted, phi_folder, tmp_path):
    """In another process with nothing of ours importable: same logits as plain Phi, stop token, chat template."""
    code = f"""if True:
        import torch, transformers as t
        folder, plain = {str(grafted[0])!r}, {str(phi_folder)!r}
        model = t.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = t.AutoTokenizer.from_pretrained(folder)
        phi = t.PhiForCausalLM.from_pretrained(plain)
        ids = tokenizer("def suma(a, b):\\n    return a + b\\n", return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.equal(model(ids).logits, phi(ids).logits)
        generation = model.generation_config
        assert (generation.eos_token_id, generation.pad_token_id) == (50256, 50256), generation
        assert model.config.eos_token_id == 50256 and tokenizer.pad_token_id == 50256
        chat = [dict(role=role, content=text) for role, text in (("user", "Hola"), ("assistant", "Di"), ("user", "¿?"))]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "User: Hola\\nAssistant: Di\\nUser: ¿?\\nAssistant:", repr(text)
        print(type(model).__module__)
    """
    done = python("-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules."), "loaded from the folder's own code"


def test_nothing_of_this_machine_in_the_folder(grafted, phi_folder):
    for file in grafted[0].glob("*.json"):
        assert str(phi_folder.parent) not in file.read_text(), file.name


def test_importable_function(small_phi):
    model, tokenizer = load_phi_1_with_engram(small_phi, layer_ids=[0, 2], **SMALL)
    assert model.config.engram_layer_ids == [0, 2] and not model.training
    assert graft_difference(model, tokenizer("def a", return_tensors="pt").input_ids) == 0
    with torch.no_grad():
        model.model.engram_tables["0"].weight.fill_(1)
    assert graft_difference(model, torch.tensor([[1, 2, 3]])) > 0


def test_precision_is_the_files_not_the_configs(copy):
    folder = copy(lambda state: {key: tensor.half() for key, tensor in state.items()})
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    assert load_phi_1_with_engram(folder, **SMALL)[0].dtype == torch.float16
    for dtype in ("float32", "bfloat16", torch.float16):
        model = load_phi_1_with_engram(folder, dtype=dtype, **SMALL)[0]
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, str(dtype).split(".")[-1])}


def test_another_tokenizer_keeps_its_own_stop_token_and_template(small_phi):
    model, tokenizer = load_phi_1_with_engram(small_phi, **SMALL)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == model.config.engram_pad_id == 3
    assert tokenizer.chat_template == "mío" and tokenizer.pad_token_id == 3


def test_weights_are_mapped_and_the_source_stays_as_it_was(copy):
    folder = copy()
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_phi_1_with_engram(folder, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak counter")
def test_peak_memory(copy, tmp_path):
    """No second copy of the weights, neither when loading nor when saving. Beside a constant for the libraries."""
    big = dict(hidden_size=2048, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=32)
    folder = copy()
    with torch.device("meta"):
        phi = PhiForCausalLM(PhiConfig(vocab_size=51200, **big)).half()
    phi.to_empty(device="cpu")
    for parameter in phi.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    phi.save_pretrained(folder)
    del phi, parameter
    Path("/proc/self/clear_refs").write_text("5")
    base = peak_memory()
    model, _ = load_phi_1_with_engram(folder, layer_ids=[0], **SMALL)
    model.save_pretrained(tmp_path / "out")
    size = model.get_memory_footprint()
    assert size > 4e8 and peak_memory() - base < 1.15 * size + 1e8


# ----------------------------------------------------------------------------------------------------------------------
# What it refuses: a Spanish sentence, status 1, nothing written
# ----------------------------------------------------------------------------------------------------------------------


def shards(folder):
    with quiet():
        PhiForCausalLM.from_pretrained(folder).save_pretrained(folder / "new", max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "new").glob("model*"):
        shutil.move(file, folder)
    shutil.rmtree(folder / "new")
    return sorted(folder.glob("*.safetensors"))


def gone(key):
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


NORM = "model.layers.1.input_layernorm.weight"
REFUSED = {
    "missing": (dict(tensors=gone(NORM)), None, ["faltan 1 tensor", NORM]),
    "extra": (dict(tensors=lambda state: {**state, "intruso": torch.zeros(2)}), None, ["sobran 1 tensor", "intruso"]),
    "shape": (dict(tensors=lambda state: {**state, NORM: torch.zeros(7)}), None, [NORM, "es [7], debe ser [32]"]),
    "fewer layers": (dict(num_hidden_layers=2), None, ["sobran", "model.layers.2."]),
    "more layers": (dict(num_hidden_layers=4), None, ["faltan", "model.layers.3."]),
    "another model": (dict(model_type="gpt2"), None, ["no es un Phi (model_type: gpt2)", "microsoft/phi-1"]),
    "quantised": (dict(quantization_config={"quant_method": "x"}), None, ["cuantizado"]),
    "bad config": (dict(num_attention_heads=5), None, ["num_attention_heads=5"]),
    "ill-typed config": (dict(hidden_size="ancho"), None, ["hidden_size"]),
    "truncated": (
        {}, lambda folder: os.truncate(folder / "model.safetensors", 10**4), ["dañado o a medias", "Vuelve a copiarlo"]
    ),
    "truncated header": ({}, lambda folder: os.truncate(folder / "model.safetensors", 20), ["dañado o a medias"]),
    "shard gone": ({}, lambda folder: shards(folder)[1].unlink(), ["model-00002-of-0000"]),
    "shard cut": ({}, lambda folder: os.truncate(shards(folder)[1], 5000), ["dañado o a medias"]),
    "pickled": (
        {}, lambda folder: os.rename(folder / "model.safetensors", folder / "model.bin"), [".bin y .pt se rechazan"]
    ),
    "no weights": ({}, lambda folder: (folder / "model.safetensors").unlink(), ["safetensors"]),
    "no config": ({}, lambda folder: (folder / "config.json").unlink(), ["no contiene config.json"]),
    "broken config": ({}, lambda folder: (folder / "config.json").write_text("{"), ["No se pudo abrir"]),
    "no tokenizer": ({}, lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], ["tokenizer.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoint(case, copy, load, tmp_path):
    changes, spoil, words = REFUSED[case]
    folder = copy(**changes)
    if spoil:
        spoil(folder)
    code, _, err = load("--modelo", folder, "--salida", tmp_path / "out")
    assert code == 1 and err.startswith("❌ ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert os.listdir(tmp_path) == ["phi"]


def test_refused_arguments(small_phi, grafted, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mi-modelo").mkdir()
    (tmp_path / "mi-modelo" / "config.json").write_text("{}")
    (tmp_path / "nota.txt").write_text("hola")
    shutil.copytree(small_phi, tmp_path / "otro")
    present = sorted(os.listdir())
    for argv, words in (
        (["--modelo", grafted[0]], "ya tiene memoria Engram. Úsalo tal cual: python chat_phi_engram.py --modelo"),
        (["--modelo", "mi-modela"], "No existe la carpeta «mi-modela». ¿Querías decir mi-modelo?"),
        (["--modelo", "./a/b"], "No existe la carpeta «./a/b»."),
        (["--modelo", "nota.txt"], "«nota.txt» es un archivo."),
        (["--modelo", "usuario/no existe"], "no es una carpeta ni un nombre del Hub"),
        (["--modelo", small_phi, "--capas", "1", "7"], "la capa 7 no existe. Las capas de este modelo van de 0 a 2"),
        (["--modelo", small_phi, "--salida", "."], "contiene «mi-modelo», que no es de este script"),
        (["--modelo", small_phi, "--salida", "otro"], "ahí hay otro modelo y no lo voy a pisar"),
        (["--modelo", small_phi, "--salida", "nota.txt"], "ya existe y es un archivo"),
        (["--modelo", small_phi, "--salida", "nota.txt/x"], "no es una carpeta, está llena o no tienes permiso"),
    ):
        code, _, err = load(*argv)
        assert code == 1 and err.startswith("❌ ") and words in err, err
        assert sorted(os.listdir()) == present


@pytest.mark.parametrize(
    "argv, words",
    (
        (["--modlo", "x"], "no se reconoce «--modlo x». ¿Querías decir --modelo?"),
        (["--dtype", "float8"], "--dtype: «float8» no es válido; elige entre"),
        (["--capas", "uno"], "--capas: «uno» no es un número entero."),
        (["--salida"], "--salida: falta el valor."),
    ),
)
def test_typos_on_the_command_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        load_phi_engram.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.startswith("uso: "), err


@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("utf-8", "❌ ¿Qué «señal»? … 👤 Tú → ⚠️  20 € × 3"),
        ("latin-1", "ERROR: ¿Qué «señal»? ... Tú -> AVISO:  20 ? × 3"),
        ("ascii", 'ERROR: Que "senal"? ... Tu -> AVISO:  20 ? x 3'),
    ],
)
def test_what_a_terminal_cannot_show(encoding, shown):
    text = "❌ ¿Qué «señal»? … 👤 Tú → ⚠️  20 € × 3"
    assert text.encode(encoding, "plain").decode(encoding) == shown


def test_help_is_spanish(capsys):
    with pytest.raises(SystemExit) as stop:
        load_phi_engram.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "Ejemplo: python load_phi_engram.py" in out and "opciones:" in out
    assert not {"usage", "options", "show this help"} & set(out.split()), out


def test_graft_that_is_not_exact(small_phi, load, tmp_path, monkeypatch):
    forward = phi1_engram.PhiMLP.forward
    monkeypatch.setattr(phi1_engram.PhiMLP, "forward", lambda self, x: forward(self, x) * 1.0001)
    code, _, err = load("--modelo", small_phi, "--salida", tmp_path / "out")
    assert code == 1 and "El injerto cambia las respuestas" in err and os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# Whole or absent
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
    ),
    ids=["python", "safetensors", "Ctrl-C"],
)
def test_failure_while_writing_keeps_the_earlier_folder(failure, small_phi, load, tmp_path, monkeypatch):
    out = tmp_path / "phi1-engram"
    assert load("--modelo", small_phi, "--salida", out)[0] == 0
    contents = lambda: {file.name: file.read_bytes() for file in out.iterdir()}  # noqa: E731
    before = contents()

    def save_pretrained(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(phi1_engram.PhiEngramForCausalLM, "save_pretrained", save_pretrained)
        code, _, err = load("--modelo", small_phi, "--salida", out)
    expected = (130, "Interrumpido") if isinstance(failure, KeyboardInterrupt) else (1, "No queda espacio en el disco")
    assert code == expected[0] and expected[1] in err
    assert os.listdir(tmp_path) == ["phi1-engram"] and contents() == before
    assert load("--modelo", small_phi, "--salida", out, "--capas", 2)[0] == 0  # a later success replaces it
    assert os.listdir(tmp_path) == ["phi1-engram"]
    assert json.loads((out / "config.json").read_text())["engram_layer_ids"] == [2]


@pytest.mark.parametrize("foreseen", (True, False))
def test_full_disk(foreseen, small_phi, load, tmp_path, monkeypatch):
    """A real one, of 300 kB; also where the check beforehand sees more room than there is."""
    disk = tmp_path / "disco"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        if not foreseen:
            monkeypatch.setattr(load_phi_engram, "n_bytes", lambda model: -(10**9))
        code, _, err = load("--modelo", small_phi, "--salida", disk / "out")
        assert code == 1 and "No queda espacio" in err and os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_whole_folder_puts_the_old_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with whole_folder(out) as folder:
        (folder / "a").write_text("1")
    rename = os.rename

    def failing(source, target):
        if Path(target) == out and not str(source).endswith("-old"):
            raise PermissionError(errno.EACCES, "no", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(PermissionError), whole_folder(out) as folder:
        (folder / "a").write_text("2")
    assert (out / "a").read_text() == "1" and os.listdir(tmp_path) == ["out"]


# ----------------------------------------------------------------------------------------------------------------------
# open_model
# ----------------------------------------------------------------------------------------------------------------------


def test_open_model(grafted, small_phi, tmp_path, monkeypatch):
    model, tokenizer = open_model(str(grafted[0]), dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training and tokenizer.eos_token_id == 50256
    assert open_model(grafted[0])[0].dtype == torch.float32
    monkeypatch.chdir(tmp_path)
    shutil.copytree(grafted[0], "cortado")
    state = load_file(f"cortado/{helpers.DENSE_FILE}")
    save_file(gone("model.layers.1.engram.conv.weight")(state), f"cortado/{helpers.DENSE_FILE}", {"format": "pt"})
    for name, words in (
        (small_phi, f"es un Phi sin memoria Engram. Injértasela con: python load_phi_engram.py --modelo {small_phi}"),
        ("phi1-engram", "No existe la carpeta «phi1-engram». Se crea con: python load_phi_engram.py"),
        ("phi1-engram-demo/", "Se crea con: python train_phi_engram.py --demo"),
        ("cortado", "faltan 1 tensor(es): model.layers.1.engram.conv.weight"),
        ("usuario/nada", "HF_HUB_OFFLINE=1 lo impide"),
    ):
        with pytest.raises(UserError) as error:
            open_model(name)
        assert words in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# The Hub
# ----------------------------------------------------------------------------------------------------------------------

AT_THE_HUB = f"""if True:
    import json, os, sys
    sys.path.insert(0, {str(ROOT)!r})
    import torch, transformers
    from huggingface_hub import HfApi
    from load_phi_engram import UserError, load_phi_1_with_engram, open_model

    def refused(name):
        try:
            load_phi_1_with_engram(name, engram_vocab_size=[100, 100])
        except UserError as error:
            return str(error)

    result = {{name: refused("usuario/" + name) for name in ("nada", "privado", "cerrado", "en-bin", "gpt")}}
    api = HfApi(token="hf_prueba")
    model, tokenizer = load_phi_1_with_engram("usuario/phi", engram_vocab_size=[100, 100])
    assert model.config.tokenizer_name_or_path == "usuario/phi"
    model.save_pretrained("modelo"), tokenizer.save_pretrained("modelo")
    api.create_repo("usuario/subido", private=True)
    api.upload_folder(repo_id="usuario/subido", folder_path="modelo")
    api.create_repo("usuario/empujado", private=True)
    api.upload_file(path_or_fileobj=b"old", path_in_repo="model.safetensors", repo_id="usuario/empujado")
    model.push_to_hub("usuario/empujado", private=True, token="hf_prueba")
    ids = torch.tensor([[1, 2, 3]])
    os.environ["HF_TOKEN"] = "hf_prueba"  # private repositories from here on
    again, tokenizer = open_model("usuario/subido")
    assert tokenizer.chat_template and torch.equal(again(ids).logits, model(ids).logits)
    for name in ("usuario/subido", "usuario/empujado"):
        other = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
        assert torch.equal(other(ids).logits, model(ids).logits)
    print(json.dumps(result))
"""


def test_hub(small_phi, tmp_path):
    """Loading by name, every refusal, and an upload that can be loaded by name again."""
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in small_phi.iterdir()}
        for name in ("phi", "privado", "cerrado"):
            hub.add(f"usuario/{name}", files, private=name == "privado")
        hub.gated.add("usuario/cerrado")
        hub.add("usuario/gpt", {"config.json": b'{"model_type": "gpt2"}'})
        pickled = {name: data for name, data in files.items() if name != "model.safetensors"}
        hub.add("usuario/en-bin", {**pickled, "pytorch_model.bin": b"?"})
        done = python("-c", AT_THE_HUB, cwd=tmp_path, env=hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        says = json.loads(done.stdout)
        assert "El Hub no tiene ningún modelo «usuario/nada», o es privado" in says["nada"]
        assert "o es privado" in says["privado"] and "HF_TOKEN" in says["privado"]
        assert "acceso restringido" in says["cerrado"] and ".bin y .pt se rechazan" in says["en-bin"]
        assert "no es un Phi (model_type: gpt2)" in says["gpt"]
        assert hub.private["usuario/subido"] and hub.private["usuario/empujado"]
        expected = {"config.json", "generation_config.json", helpers.DENSE_FILE, "phi1_engram.py", "tokenizer.json"}
        assert expected <= set(hub.repos["usuario/subido"])
        assert expected - {"tokenizer.json"} <= set(hub.repos["usuario/empujado"])
        assert "model.safetensors" not in hub.repos["usuario/empujado"]
        assert ("POST", "/api/repos/create", "Bearer hf_prueba") in hub.requests


def test_unreachable_hub(tmp_path):
    """Nobody listens there: said at once, with the ways out."""
    with Hub() as hub:
        environment = hub.environment(tmp_path / "home")
    done = python(ROOT / "load_phi_engram.py", cwd=tmp_path, env=environment)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    for words in ("❌ No se puede traer «microsoft/phi-1» del Hub", "carpeta", "python train_phi_engram.py --demo"):
        assert words in done.stderr
    assert "phi1-engram" not in str(os.listdir(tmp_path))


# Their published configurations but for width and depth: phi-2's heads are of 80 values, 32 of which turn.
RELATIVES = {
    "phi-1_5": dict(partial_rotary_factor=0.5, hidden_size=64, bos_token_id=None, eos_token_id=None),
    "phi-2": dict(partial_rotary_factor=0.4, hidden_size=160, num_attention_heads=2, resid_pdrop=0.1,
                  bos_token_id=50256, eos_token_id=50256),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIVES)
def test_the_relatives_of_phi_1_are_grafted_and_answer(name, tokenizer, tmp_path, capsys):
    helpers.save_phi(tmp_path / name, tokenizer, **RELATIVES[name])
    model, _ = load_phi_1_with_engram(tmp_path / name, engram_vocab_size=[499, 499])  # raises where it is not exact
    assert model.config.rope_parameters["partial_rotary_factor"] == RELATIVES[name]["partial_rotary_factor"]
    model.save_pretrained(tmp_path / "con")
    tokenizer.save_pretrained(tmp_path / "con")
    words = ["--modelo", tmp_path / "con", "--pregunta", "Hola", "--max-tokens", 4, "--temperatura", 0]
    assert chat_script.main([*map(str, words)]) == 0
    assert capsys.readouterr().out.strip()
