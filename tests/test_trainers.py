"""transformers' Trainer with `SparseRows`: against its own dense AdamW, interrupted, divided, and refused."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import helpers
from engram.trainers import SparseRows
from phi1_engram import PhiEngramForCausalLM

TABLES = [f"model.engram_tables.{i}.weight" for i in (1, 2)]


class SparseTrainer(SparseRows, Trainer):
    pass


def make_trainer(model, folder, steps, kind=SparseTrainer, **options):
    rows = [{"input_ids": ids, "labels": ids} for ids in helpers.random_ids(model, 16, 12)]
    usual = dict(
        max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01, seed=3,
        weight_decay=0.1, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return kind(model, TrainingArguments(folder, **{**usual, **options}), train_dataset=rows, eval_dataset=rows)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def norms(trainer):
    return [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]


def test_one_step_is_the_dense_optimizer_s(make_model, tmp_path):
    """Norm, clipping and dense weights; rows too, but that only those that were read move."""
    kw = dict(max_grad_norm=0.5, adam_epsilon=1e-15, lr_scheduler_type="constant")
    dense, sparse = make_model(), make_model()
    before = copied(dense)
    plain = make_trainer(dense, tmp_path / "plain", 1, Trainer, **{**kw, "weight_decay": 0})
    ours = make_trainer(sparse, tmp_path / "ours", 1, **{**kw, "weight_decay": 0})
    ours.memory_rate = ours.row_rate = 0.01
    plain.train(), ours.train()
    assert norms(ours) == pytest.approx(norms(plain), rel=1e-5) and norms(ours)[0] > 0.5  # float32 sums
    expected, found = dense.state_dict(), sparse.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        # Adam's first step is the rate, whatever the gradient: where that is as good as 0 its sign is rounding's.
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5 if name in TABLES else 1e-7, msg=name)
    for name in TABLES:
        read = (expected[name] != before[name]).any(-1)
        assert 0 < read.sum() < len(read)
        assert torch.equal(found[name][~read], before[name][~read])


def test_what_no_text_has_read_stays_as_it_was(make_model, tmp_path):
    model = make_model(engram_vocab_size=[5000, 5000])
    before = copied(model)
    seen = set()
    part = model.model.engram_tables["1"]
    part.register_forward_pre_hook(lambda module, inputs: seen.update(inputs[0].flatten().tolist()))
    trainer = make_trainer(model, tmp_path, 6, eval_strategy="steps", eval_steps=2, bf16=True)
    trainer.train()
    changed = (model.state_dict()[TABLES[0]] != before[TABLES[0]]).any(-1).nonzero()[:, 0].tolist()
    assert changed and set(changed) <= seen and len(changed) > 0.9 * len(seen)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[-1] < losses[0]
    # The model is its own again: rows that require a gradient, in no file.
    table = model.model.engram_tables["1"]
    assert table.read is None and table.weight.requires_grad and model.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="no están en ningún archivo"):
        model.move_memory("disco")


def test_nothing_of_the_memory_decays(make_model, tmp_path):
    trainer = make_trainer(make_model(), tmp_path, 1)
    names = trainer.get_decay_parameter_names(trainer.model)
    assert names and not [name for name in names if "engram" in name]


def test_the_memory_learns_at_its_own_rates_beside_a_phi_that_hardly_moves(make_model, tmp_path):
    model = make_model()
    before = copied(model)
    trainer = make_trainer(
        model, tmp_path, 1, learning_rate=2e-5, lr_scheduler_type="constant", weight_decay=0, adam_epsilon=1e-15
    )  # fmt: skip
    trainer.train()
    # Adam's first step is the rate, whatever the gradient; float32 rounds a weight of about 1 by 1e-7.
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    for name, most in moved.items():
        rate = 3e-2 if name in TABLES else 3e-3 if "engram" in name else 2e-5
        assert most == pytest.approx(rate, rel=0.02) or (most == 0 and "engram_hash" in name), name
    assert [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line] == [2e-5]


def test_the_memory_alone_learns_beside_a_frozen_phi(make_model, tmp_path):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("engram" in name)
    before = copied(model)
    make_trainer(model, tmp_path, 2).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert set(TABLES) < changed and all("engram" in name for name in changed)


def test_a_checkpoint_without_a_rate_of_the_memory_s_own_is_refused(make_model, tmp_path):
    trainer = make_trainer(make_model(), tmp_path, 1)
    trainer.train()
    optimizer = trainer._inner_optimizer()
    state = optimizer.state_dict()
    state["parts"][0]["param_groups"].pop()
    with pytest.raises(ValueError, match="la memoria no tenía tasa propia"):
        optimizer.load_state_dict(state)


def test_resumed_it_ends_with_the_same_bits(make_model, tmp_path):
    whole, other = make_model(), make_model(seed=4)
    make_trainer(whole, tmp_path / "whole", 6, save_strategy="steps", save_steps=3).train()
    resumed = make_trainer(other, tmp_path / "rest", 6)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-3")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    saved = PhiEngramForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name
    # Once more, with the same trainer, from the state that it has.
    resumed.train()
    assert all((other.state_dict()[name] != whole.state_dict()[name]).any() for name in TABLES)


def test_the_best_model_comes_back_with_its_rows(make_model, tmp_path):
    trainer = make_trainer(
        make_model(), tmp_path, 4, save_strategy="steps", eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")  # the worst one is asked for
    expected = PhiEngramForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_of_before_is_refused_until_it_is_saved_as_now(make_model, tmp_path):
    """Dense weights in a lone model.safetensors, and no index that names the rows beside it."""
    whole, other = make_model(), make_model(seed=4)
    make_trainer(whole, tmp_path / "whole", 4, save_strategy="steps", save_steps=2).train()
    old = tmp_path / "whole" / "checkpoint-2"
    (old / "model.safetensors.index.json").unlink()
    (old / helpers.DENSE_FILE).rename(old / "model.safetensors")
    before, trainer = copied(other), make_trainer(other, tmp_path / "rest", 4)
    with pytest.raises(ValueError, match="sin las filas de la memoria") as error:
        trainer.train(resume_from_checkpoint=old)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())
    trainer.state.best_model_checkpoint = str(old)
    with pytest.raises(ValueError, match="sin las filas de la memoria"):
        trainer._load_best_model()
    exec(str(error.value).partition("como ahora: ")[2])
    trainer.train(resume_from_checkpoint=old)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_frozen_rows_stay(make_model, tmp_path):
    model = make_model()
    before = copied(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("engram" not in name)
    trainer = make_trainer(model, tmp_path, 2)
    trainer.train(), trainer.train()
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor) == ("engram" in name), name


def test_what_it_refuses_leaves_the_model_as_it_was(make_model, tmp_path):
    half = make_model().to(torch.bfloat16)
    with pytest.raises(ValueError, match='en bfloat16 y se entrenan en float32: abre el modelo con dtype="float32"'):
        make_trainer(half, tmp_path, 1).train()
    model = make_model()
    trainer = make_trainer(model, tmp_path, 1)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        trainer.train()
    trainer = make_trainer(model, tmp_path, 1)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0"):
        trainer.create_optimizer()
    assert all(table.read is None and table.weight.requires_grad for table in model.model.engram_tables.values())


TOGETHER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import conftest, helpers, test_trainers, torch
from transformers import Trainer
model = helpers.make_model()
trainer = test_trainers.make_trainer(model, sys.argv[1] + "/t", 3, gradient_accumulation_steps=2)
trainer.args.ddp_find_unused_parameters = False
trainer.train()
trainer.save_model(sys.argv[1] + "/model")
"""


def test_two_processes_are_one_with_their_batches(make_model, tmp_path):
    alone = make_model()
    make_trainer(alone, tmp_path / "alone", 3, per_device_train_batch_size=4).train()
    here = Path(__file__).resolve().parent
    script = tmp_path / "together.py"
    script.write_text(TOGETHER.format(root=str(here.parent), tests=str(here)))
    process = helpers.together(2, script, tmp_path)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    found = PhiEngramForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in alone.state_dict().items():
        if "k_proj.bias" not in name:  # whose gradient is 0 but for rounding, and Adam's step is its sign
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4, msg=name)  # float32 sums


GUIDE = (Path(__file__).resolve().parents[1] / "DOCUMENTACION_TECNICA.md").read_text(encoding="utf-8")


def test_the_guide_s_lines_train(make_model, tokenizer, tmp_path):
    model = make_model(vocab_size=51200, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "phi1-engram-demo")
    tokenizer.save_pretrained(tmp_path / "phi1-engram-demo")
    kinds = ["trainer", "trl"] if importlib.util.find_spec("trl") else ["trainer"]
    code = [next(iter(GUIDE.split(f"```python {kind}\n")[1:])).partition("```")[0] for kind in kinds]
    (tmp_path / "guia.py").write_text("\n".join(code))
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "guia.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True,
        encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for folder in ("entrenado", "ajustado")[: len(kinds)]:
        trained = PhiEngramForCausalLM.from_pretrained(tmp_path / folder)
        changed = (trained.model.engram_tables["1"].weight != model.model.engram_tables["1"].weight).any(-1)
        assert 0 < changed.sum() < len(changed)
        model = trained
    if "trl" not in kinds:
        pytest.skip("trl is not installed: its lines did not run")
