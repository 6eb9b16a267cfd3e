"""Training with LoRA in the place of Phi's weights: what learns, what is kept, and the small folder that is shared."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import engram.corpus as corpora
import engram.training as training
import helpers
import load_phi_engram as load
import train_phi_engram as train
from engram.adapters import ADAPTER_FILES, MATRICES, add_lora, learns, of_phi, save_small
from engram.checkpoints import STATE
from engram.console import UserError
from engram.counting import Choice, LiveStorage, Machine, account, shapes, traced
from engram.machines import named_machine
from engram.memories import load_memory, save_memory
from engram.opening import change_memory, open_model
from engram.optimizers import make_optimizer
from engram.plan import advice, flops_per_token, plan, search
from engram.sharing import phi_was_trained
from engram.steps import LORA_RECIPE, PHI_1_RECIPE, phi_1_recipe, recompute_activations
from hub import Hub
from phi1_engram import PhiEngramForCausalLM

peft = pytest.importorskip("peft", reason="peft is not installed")
ROOT = Path(train.__file__).parent
HERE = Machine("prueba", gpu=0, cards=1, ram=1e12, disk=1e12, half=None, flops=1e12, base_gpu=0, base_ram=0)
RECIPE = replace(LORA_RECIPE, batch=2, length=32, accumulate=2, steps=(2, 4))
pytestmark = pytest.mark.usefixtures("corpus_cache")


def test_an_old_peft_stops_nobody_who_does_not_ask_for_it():
    """Some do not go with the newest transformers, whose Trainer's modules import it and fail."""
    code = "import sys; import train_phi_engram; assert not {'peft', 'transformers.trainer_utils'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nor_does_adafactor_fail_without_saying_what_to_do(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    with pytest.raises(UserError, match="actualízalos: pip install -U peft"):
        make_optimizer(make_model(), 1e-3, 1e-3, 1e-3, 0.1, "adafactor")


def test_an_old_torchao_that_peft_does_not_take_is_named(make_model, tmp_path, monkeypatch):
    """Looked for by peft even where nothing is quantised."""
    def found(*args, **kwargs):
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0")

    monkeypatch.setattr(peft, "get_peft_model", found)
    with pytest.raises(UserError, match="torchao.*pip install -U torchao"):
        add_lora(make_model(), 8)


def test_without_peft_the_user_learns_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora necesita el paquete peft \(.*Instálalo con: pip install -U peft"):
        train.parse(["--lora"])


@pytest.mark.parametrize(("words", "reason"), [("--pasos-fase2 0", "de la fase 2"), ("--repartir-modelo", "ocupa")])
def test_what_does_not_go_with_lora(words, reason):
    with pytest.raises(UserError, match=reason):
        train.parse(["--lora", *words.split()])


def test_the_recipe_is_the_measured_one():
    assert phi_1_recipe(1) == PHI_1_RECIPE and not PHI_1_RECIPE.lora
    recipe = phi_1_recipe(0.5, lora=True)
    assert (recipe.lora, recipe.backbone_rate, recipe.weight_decay) == (8, 1.5e-3, 0.0)
    assert recipe.memory_rates == phi_1_recipe(0.5).memory_rates


@pytest.fixture(scope="module")
def grafted(phi_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grafted") / "phi1-engram"
    helpers.save_grafted(phi_folder, folder)
    return folder


@pytest.fixture(scope="module")
def trained(grafted, tmp_path_factory):
    """The result of a training that nothing interrupts, on 60 files."""
    place = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        _, tokenizer = open_model(str(grafted), torch.float32)
        corpus = corpora.prepare_corpus(tokenizer, helpers.write_code(place / "codigo"), length=32)
        run(grafted, corpus, place / "entrenado")
    return place / "entrenado", corpus


def run(folder, corpus, output, recipe=RECIPE, resume=False, **kw):
    model, tokenizer = open_model(str(folder), torch.float32)
    return model, training.train_model(model, tokenizer, corpus, recipe, output, resume=resume, **kw)


@torch.no_grad()
def logits(model):
    return model(input_ids=helpers.random_ids(model, 2, 40)).logits


def interrupt(monkeypatch, at):
    real = training.run_steps

    def interrupted(*args, label, on_step, **kwargs):
        def then_signal(step, loss, spent):
            if (label, step) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            on_step(step, loss, spent)

        return real(*args, label=label, on_step=then_signal, **kwargs)

    monkeypatch.setattr(training, "run_steps", interrupted)


def test_only_the_matrices_of_phi_change_and_nothing_of_the_adapter_is_left(grafted, trained):
    (before, _), (after, _) = (open_model(str(folder), torch.float32) for folder in (grafted, trained[0]))
    changed = {n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])}
    of_memory = {name for name in changed if not of_phi(name)}
    assert of_memory and all(name.endswith(tuple(f"{m}.weight" for m in MATRICES)) for name in changed - of_memory)
    assert len(changed - of_memory) == len(MATRICES) * after.config.num_hidden_layers
    assert phi_was_trained(after) and not phi_was_trained(before)
    log = [json.loads(line) for line in (trained[0] / "entrenamiento.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [row["name"] for row in log if "name" in row]
    assert names[1:] == ["tras la fase 1 (solo la memoria)", "tras la fase 2 (la memoria y LoRA)"]
    card = (trained[0] / "README.md").read_text(encoding="utf-8")
    assert "0,003 (un adaptador LoRA de rango 8, fundido después en Phi)" in card and "bajado/lora" in card


def test_the_small_folder_on_the_same_phi_is_the_trained_model(grafted, trained, tmp_path):
    small = trained[0] / "lora"
    assert {file.name for file in small.iterdir()} == {"README.md", "engram_memory.safetensors", *ADAPTER_FILES}
    card = (small / "README.md").read_text(encoding="utf-8")
    assert "Se entrenó con Phi congelado" in card and "el adaptador LoRA que aprendió a su lado" in card
    config = json.loads((small / ADAPTER_FILES[1]).read_text(encoding="utf-8"))
    whole, _ = open_model(str(trained[0]), torch.float32)
    assert config["lora_alpha"] == 2 * config["r"] == 16  # as our study measured it
    assert config["base_model_name_or_path"] == whole.config.tokenizer_name_or_path  # not where it lies here
    model, _ = open_model(str(grafted), torch.float32, memory=str(small))
    assert torch.equal(logits(model), logits(whole)) and not model.training
    assert model.config.engram_backbone == whole.config.engram_backbone and phi_was_trained(model)
    model.save_pretrained(tmp_path / "junto")  # nothing of peft is left on it
    assert torch.equal(logits(PhiEngramForCausalLM.from_pretrained(tmp_path / "junto")), logits(whole))
    # Unmerged, as peft opens it: the same but for the order of sums, float32.
    plain, _ = open_model(str(grafted), torch.float32)
    load_memory(plain, small)
    lora = peft.PeftModel.from_pretrained(plain, small).eval()
    torch.testing.assert_close(logits(lora), logits(whole), rtol=1e-4, atol=1e-5)


def test_who_asks_for_the_memory_alone_is_sent_to_the_small_folder(grafted, trained, tmp_path, capsys):
    load.main(["--modelo", str(trained[0]), "--solo-memoria", "--salida", str(tmp_path / "memoria")])
    assert f"La que sirve con el Phi de antes de esa fase, con su adaptador LoRA, está en {trained[0] / 'lora'}/" in (
        capsys.readouterr().out
    )
    with pytest.raises(UserError, match="ya es una memoria sola, con el adaptador LoRA"):
        words = ["--modelo", str(grafted), "--cambiar-memoria", str(trained[0] / "lora"), "--solo-memoria"]
        load.main([*words, "--salida", str(tmp_path / "otra")])


def test_the_small_folder_opens_from_the_hub_too(grafted, trained, tmp_path):
    with Hub() as hub:
        hub.add("usuario/mi-lora", trained[0] / "lora")
        command = [sys.executable, str(ROOT / "load_phi_engram.py"), "--modelo", str(grafted)]
        command += ["--dtype", "float32", "--cambiar-memoria", "usuario/mi-lora", "--salida", "mi-phi"]
        done = subprocess.run(command, cwd=tmp_path, env=hub.environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, _ = open_model(str(trained[0]), torch.float32)
    assert torch.equal(logits(open_model(str(tmp_path / "mi-phi"), torch.float32)[0]), logits(whole))


def test_a_memory_without_its_adapter_or_on_another_phi_is_refused(grafted, trained, tmp_path, monkeypatch):
    model, _ = open_model(str(grafted), torch.float32)
    before = logits(model)
    alone = tmp_path / "sola"
    alone.mkdir()
    (alone / "engram_memory.safetensors").write_bytes((trained[0] / "lora" / "engram_memory.safetensors").read_bytes())
    with pytest.raises(UserError, match=f"falta {ADAPTER_FILES[0]}: copia la carpeta"):
        change_memory(model, alone)
    trained_model, _ = open_model(str(trained[0]), torch.float32)
    with pytest.raises(UserError, match="se entrenó sobre otro Phi"):  # merged twice would be another Phi
        change_memory(trained_model, trained[0] / "lora")
    for file, reason in ((ADAPTER_FILES[0], "no es el que se entrenó con"), (ADAPTER_FILES[1], "pip install -U peft")):
        damaged = shutil.copytree(trained[0] / "lora", tmp_path / f"con otro {file}")
        (damaged / file).write_bytes((damaged / file).read_bytes()[:-30])
        with pytest.raises(UserError, match=reason):
            change_memory(model, damaged)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="se entrenó con LoRA y necesita .*pip install"):
        patch.setitem(sys.modules, "peft", None)
        change_memory(model, trained[0] / "lora")
    model.is_quantized = True
    with pytest.raises(UserError, match="no se pone en un Phi cuantizado"):
        change_memory(model, trained[0] / "lora")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("stop_at", [("Fase 1", 1), ("Fase 2", 3)])
def test_interrupted_and_resumed_gives_the_bits_of_the_uninterrupted_run(
    grafted, trained, tmp_path, monkeypatch, stop_at
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, stop_at)
        run(grafted, trained[1], tmp_path / "partido")
    resumed, _ = run(grafted, trained[1], tmp_path / "partido", resume=True)
    whole, _ = open_model(str(trained[0]), torch.float32)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    for file in (ADAPTER_FILES[0], "engram_memory.safetensors"):
        one, other = (load_file(place / "lora" / file) for place in (trained[0], tmp_path / "partido"))
        assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_who_trains_with_peft_shares_both_in_one_folder_and_half_an_adapter_is_noticed(grafted, tmp_path):
    lora = add_lora(open_model(str(grafted), torch.float32)[0], 8).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if not of_phi(name):
                parameter.normal_(0, 0.1)
    lora.save_pretrained(tmp_path / "los dos")
    save_memory(lora, tmp_path / "los dos")
    model, _ = open_model(str(grafted), torch.float32, memory=str(tmp_path / "los dos"))
    torch.testing.assert_close(logits(model), logits(lora), rtol=1e-4, atol=1e-4)  # float32, sums in another order
    half = tmp_path / "los dos" / ADAPTER_FILES[0]
    save_file({name: tensor for name, tensor in load_file(half).items() if ".0." in name}, half)
    with pytest.raises(UserError, match="no se puede poner: está dañado, es de otro modelo"):
        open_model(str(grafted), torch.float32, memory=str(tmp_path / "los dos"))


def test_a_second_adapter_is_of_the_first_result_(grafted, trained, tmp_path):
    run(trained[0], trained[1], tmp_path / "dos")
    small = tmp_path / "dos" / "lora"
    card = (small / "README.md").read_text(encoding="utf-8")
    assert "sobre un Phi que ya había cambiado: **solo sirve con el Phi de `entrenado`**" in card
    assert json.loads((small / ADAPTER_FILES[1]).read_text(encoding="utf-8"))["base_model_name_or_path"] == "entrenado"
    with pytest.raises(UserError, match="no sirve para este modelo"):
        open_model(str(grafted), torch.float32, memory=str(small))


def test_merged_in_another_precision_it_is_the_same_phi(grafted, tmp_path):
    """A sum that is rounded has other signs: 1.0001 - 1.00005 is positive in float32, and 1 - 1 is not."""
    model, tokenizer = open_model(str(grafted), torch.float32)
    weight = model.model.layers[0].self_attn.q_proj.weight
    torch.nn.init.constant_(weight, 1.0001)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    lora = add_lora(model, 8)
    for name, parameter in lora.named_parameters():
        if "layers.0.self_attn.q_proj.lora_" in name:
            torch.nn.init.constant_(parameter, 1.0 if "lora_A" in name else -1.00005 / 16)
    (tmp_path / "lora").mkdir()
    save_small(lora, tmp_path / "lora", "base")
    assert (weight > 0).all()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        opened, _ = open_model(str(tmp_path / "base"), dtype, memory=str(tmp_path / "lora"))
        assert (opened.model.layers[0].self_attn.q_proj.weight > 0).all() == (dtype == torch.float32)
        assert opened.fingerprints() == model.fingerprints()


def test_a_checkpoint_holds_nothing_of_phi_and_goes_on_only_as_it_began(grafted, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, ("Fase 2", 2))
        run(grafted, trained[1], tmp_path / "a")
    (checkpoint,) = (tmp_path / "a-checkpoints").iterdir()
    kept = load_file(checkpoint / "model.safetensors")
    assert not any(map(of_phi, kept)) and any("lora_A" in name for name in kept)
    config = open_model(str(grafted))[0].config
    planned = account(config, Choice(batch=2, length=32, accumulate=2, lora=8), HERE, 2)["disco"]["punto de control"]
    size = sum(file.stat().st_size for file in checkpoint.rglob("*.*"))
    assert planned < size < planned + 150_000 + config.vocab_size * 8  # headers, random states, projection
    with pytest.raises(UserError, match="rango de --lora 8 entonces, 0 ahora"):
        run(grafted, trained[1], tmp_path / "a", replace(RECIPE, lora=0), resume=True)
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    del state["identity"]["lora"]  # as an earlier version left it
    (checkpoint / STATE).write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(UserError, match="rango de --lora 0 entonces, 8 ahora"):
        run(grafted, trained[1], tmp_path / "a", resume=True)
    state["identity"]["lora"] = 8
    (checkpoint / STATE).write_text(json.dumps(state), encoding="utf-8")
    model, tokenizer = open_model(str(grafted), torch.float32)
    with torch.no_grad():
        model.model.final_layernorm.bias[0] += 1e-3
    with pytest.raises(UserError, match="los pesos de Phi no son los de"):
        training.train_model(model, tokenizer, trained[1], RECIPE, tmp_path / "a", resume=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_plan_counts_what_lora_takes(make_config, recompute, monkeypatch):
    config = make_config(engram_tokenizer_compression=False)
    model = PhiEngramForCausalLM(config).train()
    add_lora(model, 8)
    dense, _ = shapes(config, 8)
    there = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert dict(dense) == {name: shape for name, shape in there.items() if "engram_tables" not in name}
    live = LiveStorage(config.vocab_size, {})
    if recompute:
        recompute_activations(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        live.count(tensor, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, 2, 8) and "engram_tables" not in name)
    ids = helpers.random_ids(model, 1, 64)
    with live:
        model(ids, labels=ids, use_cache=False).loss.backward()
    planned = traced(config, 64, 2, recompute, lora=8)
    assert sum(planned.values()) == pytest.approx(live.peak, rel=0.1)  # rows have gradients in the plan alone
    counted = account(config, Choice(batch=2, length=16, accumulate=2, lora=8), HERE, 2)
    trained = [math.prod(shape) for name, shape in dense if learns(name, 2, 8)]
    assert counted["RAM"]["gradientes"] == 4 * sum(trained)
    # Forward and the gradients of inputs, 4 operations for each weight that multiplies; of weights, for those trained.
    seen = {name: math.prod(shape) for name, shape in dense if len(shape) == 2 and "embed_tokens" not in name}
    mine = sum(size for name, size in seen.items() if not of_phi(name))
    attention = 6 * 16 * config.hidden_size * config.num_hidden_layers
    assert flops_per_token(config, Choice(length=16, lora=8), 2) == 4 * sum(seen.values()) + 2 * mine + attention
    with monkeypatch.context() as patch:  # where only phase 1 fits, which has no adapter
        tried = []
        patch.setattr("engram.plan.search", lambda _, one, __: tried.append(one) or (None if one.steps[1] else one))
        words, found = advice(config, Choice(lora=8), HERE, ["--lora", "--semilla 3"])
    assert tried[-1].lora == 0  # nor the small folder
    assert found.steps == (True, False) and found.asked == (None, 0)  # whose hours are what the plan then says
    assert "--lora" not in words and words.endswith("--semilla 3 --lote 2 --longitud 512 --acumular 8 --pasos-fase2 0")
    assert "Con --lora (un adaptador" in plan("phi1-engram", Choice(), named_machine("t4"))
    assert "Con --lora (un adaptador" not in plan("phi1-engram", Choice(lora=8), named_machine("t4"))
    assert search(config, Choice(lora=8), HERE).lora == 8
