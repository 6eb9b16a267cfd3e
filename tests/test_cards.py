"""On a pretended card (tests/pretended.py): no wrong device, no race, no more waits for the card than needed.

Bits, memory and speed of a real one are what `python tests/bench/card.py` tells.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import chat_phi_engram as chat
import engram.checks as checks
import engram.optimizers as optimizers
import engram.processes as processes
import helpers
import phi1_engram
import test_facts
import train_phi_engram as train
import verify_phi_engram as verify
from engram.console import run_script
from engram.facts import forget, teach
from engram.rows import TrainedTables
from engram.steps import run_steps
from engram.training import Training
from phi1_engram import PhiEngramForCausalLM
from pretended import Stream, pretended_card
from test_rows import RATES, RECIPE, corpus, spoil

HERE = Path(__file__).resolve().parent
PLACES = ("gpu", "ram", "disco")


@pytest.fixture
def card():
    with pretended_card() as card:
        yield card
        assert not card.races


def waits(card) -> int:
    """Of the main thread, in lines of the product, since this was last asked."""
    found = sum(n for (what, where), n in card.syncs.items() if where != "library" and "another" not in what)
    card.syncs.clear()
    return found


# --- the card itself


def test_the_card_refuses_what_cuda_refuses(card):
    here, there = torch.ones(3), torch.ones(3).to("cuda")
    assert there.device.type == "cuda" and there.is_cuda and (there + 1).is_cuda and not here.is_cuda
    for wrong in (
        lambda: here + there, lambda: here[torch.tensor([0]).cuda()], lambda: there.numpy(), lambda: there.pin_memory(),
        lambda: torch.cat((here, there)),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (there + 2).cpu().tolist() == [3, 3, 3]
    assert there[torch.tensor([0])].is_cuda and (there * torch.tensor(2.0)).is_cuda


def test_the_card_counts_waits_and_sees_a_race():
    with pretended_card() as card:
        x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert not card.syncs
        x.sum().item(), x.cpu(), x.unique(), x[x > 0], bool(x[0] > 0)
        assert sum(card.syncs.values()) == 5
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            y = x + 1  # the host has waited for x
        assert not card.races
        y + 1
        assert sum(card.races.values()) == 1
        torch.cuda.current_stream().wait_stream(side)
        y + 1
        assert sum(card.races.values()) == 1


# --- the model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{precision: folder} of one small model, and the model."""
    folder, model = tmp_path_factory.mktemp("precisiones"), helpers.make_model()
    for precision in phi1_engram.PRECISIONS:
        model.save_pretrained(folder / precision, engram_precision=precision)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("precision", phi1_engram.PRECISIONS)
def test_every_place_gives_the_same_logits_and_tokens(saved, card, precision, dtype):
    """Of one model dtype, bit for bit: rows are only read from elsewhere."""
    found = {}
    for place in PLACES:
        model = PhiEngramForCausalLM.from_pretrained(saved / precision, engram_storage=place, dtype=dtype).to("cuda")
        assert model.memory_place == place
        ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n)[0] for n in (9, 14)])
        ids, mask = ids.to("cuda"), mask.to("cuda")
        words = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            outputs = [model(ids, attention_mask=mask).logits, model(ids[1:]).logits]
        outputs += [model.generate(ids, **words), model.generate(ids, num_beams=3, **words)]
        assert all(output.is_cuda for output in outputs)
        found[place] = [output.cpu() for output in outputs]
    for place in PLACES:
        assert all(torch.equal(a, b) for a, b in zip(found[place], found["gpu"])), place
    assert found["gpu"][0].isfinite().all()


@pytest.mark.parametrize("place", PLACES)
def test_decoding_waits_nowhere_for_the_card(saved, card, place):
    """Ids reach the host, where rows are in "ram" or "disco", in a thread beside."""
    model = PhiEngramForCausalLM.from_pretrained(saved / "float32", engram_storage=place).to("cuda")
    ids = helpers.random_ids(model, 1, 8).to("cuda")
    counts = []
    for length in (4, 14):
        card.syncs.clear()
        model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
        counts.append(sum(n for (what, _), n in card.syncs.items() if "another thread" in what))
        assert waits(card) == 1  # for all of it: whether a row is padded on the right
    assert counts[1] - counts[0] == (0 if place == "gpu" else 10 * len(model.config.engram_layer_ids))


def test_a_memory_moves_between_all_places(saved, card):
    model = PhiEngramForCausalLM.from_pretrained(saved / "int8", engram_storage="gpu").to("cuda")
    ids = helpers.random_ids(model, 1, 8).to("cuda")
    with torch.no_grad():
        expected = model(ids).logits.cpu()
        for place in ("ram", "gpu", "disco", "ram", "disco", "gpu"):
            model.move_memory(place)
            assert model.memory_place == place
            assert all(table.weight is None or table.weight.is_cuda == (place == "gpu")
                       for table in model.model.engram_tables.values())  # fmt: skip
            assert torch.equal(model(ids).logits.cpu(), expected), place


def test_rows_that_are_not_waited_for_are_a_race(saved, monkeypatch):
    """What the test of the places guards, taken away."""
    monkeypatch.setattr(Stream, "wait_event", lambda *_: None)
    with pretended_card() as card:
        model = PhiEngramForCausalLM.from_pretrained(saved / "float32", engram_storage="ram").to("cuda")
        with torch.no_grad():
            model(helpers.random_ids(model, 1, 8).to("cuda") + 0)
        assert card.races


# --- training


@dataclass
class Trained:
    weights: dict
    losses: list
    waits: int  # of the steps
    scale: float | None
    card: object


def trained(place, steps=4, capability=(7, 5), poison=None, row_state="adam", accumulate=2) -> Trained:
    """Some steps of the real loop on a card."""
    with pretended_card(capability) as card:
        torch.manual_seed(0)
        model, losses = helpers.make_model(), []
        for table in model.model.engram_tables.values():
            table.settle(place)
        accelerator = processes.make_accelerator()
        with TrainedTables(model, row_state, device=accelerator.device) as tables:
            model.to(accelerator.device)
            optimizer = optimizers.make_optimizer(model, *RATES, tables=tables)
            if poison:
                poison(model)
            ready = processes.prepare(accelerator, model, optimizer)
            waits(card)
            run_steps(
                accelerator, *ready, corpus(model, 2000), replace(RECIPE, accumulate=accumulate), steps=steps, label="",
                on_step=lambda step, loss, seconds: losses.append(loss),
            )  # fmt: skip
            counted = waits(card)
            for part in tables.parts.values():
                assert part.weight.device.type == part.second.device.type == ("cuda" if place == "gpu" else "cpu")
        scale = accelerator.scaler.get_scale() if accelerator.scaler else None
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return Trained(weights, losses, counted, scale, card)


@pytest.mark.parametrize("row_state", ["adam", "fila"])
@pytest.mark.parametrize("capability, precision", [((7, 5), torch.float16), ((9, 0), torch.bfloat16)])
def test_training_gives_the_same_weights_from_both_places(capability, precision, row_state):
    gpu, ram = (trained(place, capability=capability, row_state=row_state) for place in ("gpu", "ram"))
    for found in (gpu, ram):
        assert set(found.card.autocast) == {precision} and (found.scale is None) == (precision == torch.bfloat16)
        assert not found.card.races and len(found.losses) == 4
    assert gpu.losses == ram.losses
    assert all(torch.equal(gpu.weights[name], tensor) for name, tensor in ram.weights.items())


def test_waits_for_the_card_while_training():
    """A micro-batch waits for the distinct rows of each table; a step for its norm, its loss scale and its loss, and on
    the card for the distinct rows of its micro-batches."""
    steps, accumulate, tables = 4, 3, 2
    for place, of_a_step in (("gpu", 3 + tables), ("ram", 3)):
        assert trained(place, accumulate=accumulate).waits == steps * (accumulate * tables + of_a_step), place


@pytest.mark.parametrize("place", ["gpu", "ram"])
def test_an_overflow_in_float16_skips_the_step_and_halves_the_scale(place):
    found, clean = (trained(place, steps=2, accumulate=1, poison=poison) for poison in (spoil({2}), None))
    assert found.scale == clean.scale / 2 and found.losses[0] == clean.losses[0] and not found.card.races
    assert all(tensor.isfinite().all() for tensor in found.weights.values())


@pytest.mark.parametrize("guard", ["the wait for rows on their way", "states beside their rows"])
def test_training_without_its_guards_is_found_out(monkeypatch, guard):
    if guard == "states beside their rows":
        monkeypatch.setattr("engram.rows.zeros_beside", lambda rows, width: torch.zeros(len(rows), width))
        with pytest.raises(RuntimeError, match="indices should be|same device"):
            trained("gpu")
    else:
        monkeypatch.setattr(Stream, "synchronize", lambda *_: None)
        assert trained("ram").card.races


# --- the scripts


@pytest.fixture(scope="module")
def grafted(phi_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("injertado") / "phi1-engram"
    helpers.save_grafted(phi_folder, folder)
    return folder


def script(main, *words) -> int:
    """A script's exit status."""
    with pytest.raises(SystemExit) as stopped:
        run_script(main, [*map(str, words)])
    return stopped.value.code or 0


def test_the_script_trains_is_cut_and_resumes(grafted, code, corpus_cache, tmp_path, card, monkeypatch):
    """Both phases; what was cut in phase 2 and resumed ends with the weights of what was not."""
    monkeypatch.chdir(tmp_path)
    words = ["--modelo", grafted, "--datos", code, "--longitud", 32, "--lote", 2, "--acumular", 2]
    words += ["--pasos-fase1", 2, "--pasos-fase2", 3, "--guardar-cada", 1, "--memoria", "ram"]
    assert script(train.main, *words, "--salida", "uno") == 0
    write, cut = Training.save, []

    def cutting(self, stop, **position):
        write(self, stop, **position)
        if (position["phase"], position["step"]) == (2, 1) and not cut:
            cut.append(position)
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", cutting)
    assert script(train.main, *words, "--salida", "dos") == 130
    assert script(train.main, *words, "--salida", "dos", "--reanudar") == 0
    one, two = (helpers.saved_tensors(tmp_path / name) for name in ("uno", "dos"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    assert card.autocast.keys() == {torch.float16}


def test_verify_passes(grafted, card, capsys, monkeypatch):
    begin = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom pretended import pretended_card\n"
    begin += "kept = pretended_card()\nkept.__enter__()\n"
    monkeypatch.setattr(checks, "STRANGER", begin + checks.STRANGER)
    assert script(verify.main, "--modelo", grafted) == 0, capsys.readouterr().out


def test_the_chat_answers_alike_from_every_place(grafted, card, capsys):
    answers = []
    for place in PLACES:
        words = ["--modelo", grafted, "--memoria", place, "--pregunta", "def f(x):", "--max-tokens", 8]
        assert script(chat.main, *words, "--temperatura", 0) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0].strip() and answers == answers[:1] * 3


# --- two cards


@pytest.mark.parametrize("wishes", [(), ("stays",), ("shard",), ("shard", "stays")], ids=str)
def test_two_cards(tmp_path, wishes):
    """float16 with a loss scale; whole, or with rows in parts: nothing from the host crosses, no race."""
    process = helpers.together(2, HERE / "pretended.py", HERE / "several.py", tmp_path, *wishes)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert errors.count("--- races: 0") == 2
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(first["losses"], second["losses"])
    assert first["losses"][-1] < first["losses"][0]
    assert ("table.1" in second) == ("shard" not in wishes)


def test_a_fact_is_taught_and_holds_on_a_card(tokenizer, card):
    """And a position looks for its facts without a wait."""
    model = test_facts.fresh(tokenizer).to("cuda")
    for place in ("gpu", "ram"):
        model.move_memory(place)
        fact = teach(model, tokenizer, *test_facts.FACTS[1], reference=False)
        assert fact.notes["alone"] and model.model.facts["2"].rows.is_cuda
        ids = test_facts.ids_of(tokenizer, test_facts.FACTS[1][0]).to("cuda")
        card.syncs.clear()
        with torch.no_grad():
            said = model(ids).logits[0, -1].argmax()
        assert waits(card) == 0
        assert said.item() == test_facts.ids_of(tokenizer, test_facts.FACTS[1][1])[0, 0]
        forget(model, fact)
