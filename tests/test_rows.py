"""Rows while they train: steps against torch's own optimisers, host memory, clipping, gradients that are no numbers."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator

import engram.corpus as corpora
import engram.optimizers as optimizers
import helpers
from engram.console import UserError
from engram.rows import TrainedTable, TrainedTables
from engram.steps import PATIENCE, Recipe, recompute_activations, run_steps
from phi1_engram import EngramTable

RECIPE = Recipe(1e-3, memory_rates=(5e-3, 5e-3), table_rates=(1e-2, 1e-2), batch=2, length=16)
RATES = (1e-3, 5e-3, 1e-2, 0.1)  # backbone, dense memory, rows; decay


def fresh_model():
    """In float64, so that another order of summing shows only in the fifteenth digit."""
    torch.manual_seed(0)
    return helpers.make_model().double()


def corpus(model, n_tokens=400):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, n_tokens).astype(np.uint16)
    return corpora.Corpus("azar", tokens, tokens, 3.0, 1, [], "")


def trained(steps=4, row_state="adam", stays=False, poison=None, scaler=None, **recipe):
    """A model after `steps` steps of the real loop, and the losses of each. `poison(model)` runs before the first."""
    model = fresh_model()
    for table in model.model.engram_tables.values():
        table.stays = stays
    accelerator, losses = Accelerator(), []
    accelerator.scaler = scaler
    with TrainedTables(model, row_state) as tables:
        optimizer = optimizers.make_optimizer(model, *RATES, tables=tables)
        if poison:
            poison(model)
        ready = accelerator.prepare(model, optimizer)
        run_steps(
            accelerator, *ready, corpus(model), replace(RECIPE, **recipe), steps=steps, label="",
            on_step=lambda step, loss, seconds: losses.append(loss),
        )  # fmt: skip
    return model, losses


def with_torch_optimisers(steps, accumulate, clip):
    """The same by whole-table gradients: torch's clipping over all parameters, AdamW, and SparseAdam for rows."""
    model, losses = fresh_model(), []
    named = list(model.named_parameters())
    tables = [p for name, p in named if "engram_tables" in name]
    groups = [
        dict(params=[p for name, p in named if "engram" not in name and p.ndim == 2], lr=RATES[0], weight_decay=0.1),
        dict(params=[p for name, p in named if "engram" not in name and p.ndim != 2], lr=RATES[0], weight_decay=0.0),
        dict(params=[p for n, p in named if "engram" in n and "tables" not in n], lr=RATES[1], weight_decay=0.0),
    ]
    dense, sparse = torch.optim.AdamW(groups), torch.optim.SparseAdam(tables, lr=RATES[2])
    full = [(group, group["lr"]) for optimizer in (dense, sparse) for group in optimizer.param_groups]
    tokens, recipe = corpus(model).train, replace(RECIPE, accumulate=accumulate)
    model.train()
    for step in range(steps):
        for group, rate in full:
            group["lr"] = rate * optimizers.rate_factor(step, steps)
        read, loss = [set() for _ in tables], 0.0
        for micro in range(accumulate):
            ids = corpora.batch_at(tokens, step * accumulate + micro, recipe)
            part = model(ids, labels=ids, use_cache=False).loss / accumulate
            part.backward()
            loss += part.item()
            for place, index in enumerate(model.model.ngram_indices(ids).values()):
                read[place] |= set((index + model.model.engram_hash.offsets[place]).flatten().tolist())
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for table, rows in zip(tables, read):
            rows = torch.tensor(sorted(rows))
            table.grad = torch.sparse_coo_tensor(rows[None], table.grad[rows], table.shape, check_invariants=True)
        for optimizer in (dense, sparse):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss)
    return model, losses


@pytest.mark.parametrize("stays", [False, True], ids=["beside the model", "in host memory"])
@pytest.mark.parametrize("accumulate, clip", [(1, 1e9), (1, 0.05), (3, 0.05)])
def test_steps_are_those_of_torchs_optimisers_on_whole_gradients(stays, accumulate, clip):
    expected, expected_losses = with_torch_optimisers(4, accumulate, clip)
    model, losses = trained(stays=stays, accumulate=accumulate, clip=clip)
    assert losses == pytest.approx(expected_losses, abs=1e-6)  # float32 inside norms and the loss
    for (name, wanted), got in zip(expected.named_parameters(), model.parameters()):
        # Adam divides by the gradient's own size, so that its last digits show up as a share of the rate.
        assert torch.allclose(got, wanted, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("row_state", ["adam", "fila"])
def test_host_memory_gives_the_bits_of_the_device(row_state, monkeypatch):
    """What is written late and what is fetched early leave no trace, though batches share rows."""
    brought, bring = [], TrainedTable._bring

    def watched(self, *arguments):
        brought.append(bring(self, *arguments))
        return brought[-1]

    here, _ = trained(6, row_state)
    monkeypatch.setattr(TrainedTable, "_bring", watched)
    used, fetched = [], TrainedTable.fetched

    def watching(self, wanted, device):
        early = self.coming is not None and self.coming["rows"].result() is not None
        used.append(early and torch.equal(self.coming["wanted"], wanted))
        return fetched(self, wanted, device)

    monkeypatch.setattr(TrainedTable, "fetched", watching)
    there, _ = trained(6, row_state, stays=True)
    # Of six steps on two tables, all but the first found their rows on the way.
    assert used == [False] * 2 + [True] * 10 and len(brought) == 12
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters()))


@pytest.mark.parametrize("row_state", ["adam", "fila"])
def test_only_read_rows_move_and_none_by_more_than_the_rate(row_state):
    model, before = fresh_model(), fresh_model()
    with TrainedTables(model, row_state) as tables:
        optimizer = optimizers.make_optimizer(model, *RATES, tables=tables)
        model.train()
        ids = helpers.random_ids(model, 2, 16)
        model(ids, labels=ids).loss.backward()
        optimizer.collect()
        optimizer.step()
    for place, (layer, index) in enumerate(model.model.ngram_indices(ids).items()):
        read = torch.unique(index + model.model.engram_hash.offsets[place])
        moved = (model.model.engram_tables[str(layer)].weight - before.model.engram_tables[str(layer)].weight).detach()
        changed = moved.abs().sum(-1).nonzero()[:, 0]
        # Of the last tokens nothing is asked, so that their rows have no gradient.
        assert set(changed.tolist()) <= set(read.tolist()) and len(changed) > 0.9 * len(read)
        if row_state == "fila":  # a first step is the rate, in root mean square over a row's values
            sizes = moved[changed].square().mean(-1).sqrt()
            assert torch.allclose(sizes, torch.full_like(sizes, RATES[2]), rtol=1e-3)
        else:
            assert moved.abs().max() <= RATES[2] * 1.0001


def test_rows_come_back_when_training_is_cut():
    model = fresh_model()
    with pytest.raises(KeyboardInterrupt), TrainedTables(model, "adam"):
        assert not any("engram_tables" in name for name, _ in model.named_parameters())  # DDP and FSDP see none
        raise KeyboardInterrupt
    assert sum("engram_tables" in name for name, _ in model.named_parameters()) == 2
    assert all(table.read is None and table.weight.requires_grad for table in model.model.engram_tables.values())


def spoil(when, only_rows=True):
    """Make gradients of the n-th backward passes in `when` not a number; of one table's rows alone, or of the head."""

    def poison(model):
        count = [0]

        def hook(grad):
            count[0] += 1
            return grad * math.nan if count[0] in when else grad

        if only_rows:
            table = model.model.engram_tables[str(model.config.engram_layer_ids[0])]
            read = table.read

            def reading(row_ids):
                rows = read(row_ids)
                if rows.requires_grad:
                    rows.register_hook(hook)
                return rows

            table.read = reading
        else:
            model.lm_head.weight.register_hook(hook)

    return poison


@pytest.mark.parametrize("only_rows", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_whose_gradient_is_no_number_is_skipped_whole(only_rows, scaled, capsys):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None

    model, losses = trained(2, poison=spoil({2}, only_rows), scaler=scaler())
    one, expected = trained(2, poison=spoil({2, 1}, only_rows), scaler=scaler())
    untouched = fresh_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), untouched.parameters()))
    assert losses[0] == expected[0] and any(not torch.equal(a, b) for a, b in zip(model.parameters(), one.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())
    assert "2 saltados" in capsys.readouterr().err


def test_gradients_that_stay_no_numbers_stop_the_run_with_advice():
    with pytest.raises(UserError, match="20 pasos seguidos.*--tasas 0,3"):
        trained(PATIENCE + 5, poison=spoil(set(range(1000))))


@pytest.mark.parametrize("kind", helpers.installed(optimizers.OPTIMIZERS))
def test_every_parameter_has_one_rate_and_decay_where_it_belongs(kind):
    model = helpers.make_model()
    with TrainedTables(model, "adam") as tables:
        optimizer = optimizers.make_optimizer(model, *RATES, kind=kind, tables=tables)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            group = groups.pop(id(parameter))
            assert group["weight_decay"] == (0.1 if "engram" not in name and parameter.ndim == 2 else 0.0), name
            assert group["lr"] == RATES["engram" in name], name
        assert not groups
        ids = helpers.random_ids(model, 2, 16)
        model.train()
        losses = []
        for _ in range(3):
            losses.append(model(ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.collect()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[2] < losses[0]


@pytest.mark.parametrize("kind", helpers.installed(optimizers.OPTIMIZERS))
def test_a_first_step_is_of_the_rates_own_size_whatever_the_optimiser(kind):
    """Adam's first step is the rate; so is Adafactor's, but for what factoring leaves out (a matrix of rank one: none).

    float32, 1 %: eps beside gradients of 1, and 8-bit states' rounding.
    """
    model = torch.nn.ModuleDict(dict(engram=torch.nn.Linear(64, 128), other=torch.nn.Linear(64, 128)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizers.make_optimizer(model, *RATES[:3], decay=0.0, kind=kind)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).square().mean().sqrt().item()
        assert moved == pytest.approx(RATES["engram" in name], rel=0.01), name


def test_states_of_an_adafactor_with_other_steps_are_refused():
    model = torch.nn.ModuleDict(dict(other=torch.nn.Linear(4, 8)))
    optimizer = optimizers.make_optimizer(model, 1e-3, 1e-3, 1e-3, 0.0, kind="adafactor")
    old = torch.optim.Adafactor(model.parameters(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    with pytest.raises(UserError, match="de una versión anterior.*otra --salida"):
        optimizer.load_state_dict({"parts": [old.state_dict()]})


def test_recomputed_activations_give_the_same_rows_gradients():
    model = fresh_model()
    ids = helpers.random_ids(model, 2, 16)
    gradients = []
    for recompute in (False, True):
        model.train()
        if recompute:
            recompute_activations(model)
        with TrainedTables(model, "adam") as tables:
            model(ids, labels=ids).loss.backward()
            gradients.append([holder.grad for holder in tables.collect()])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) and a.any() for a, b in zip(*gradients))


@pytest.mark.parametrize("row_state", ["adam", "fila"])
def test_states_that_no_step_touched_take_no_memory(row_state):
    """256 MB of states in host memory: less than a tenth of them may show."""
    table = EngramTable(2_000_000, 16)
    table.settle("ram")
    process = psutil.Process()
    with ThreadPoolExecutor(1) as writer:
        before = process.memory_info().rss
        part = TrainedTable(table, row_state, None, writer)
        assert process.memory_info().rss - before < 25e6
        assert part.second.device == part.weight.device and not part.second[-1].any()
