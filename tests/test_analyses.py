"""engram/analyses.py against what others wrote (torch's KL, Python's tokenizer) and what mathematics fixes."""

import json
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engram.analyses as analyses
import engram.choices as choices
import engram.corpus as corpora
import engram.hooks as hooks
import engram.pictures as pictures
import engram.probes as probes
import engram.report as reports
import helpers
import verify_phi_engram
from engram.analyses import RunningCKA, gram, lens, unbiased_hsic
from engram.console import UserError, run_script, spanish
from engram.hooks import gate_values, run_states
from engram.opening import LOG, trained_seed
from engram.probes import KINDS, label_tokens
from engram.steps import Recipe, evaluate
from helpers import make_phi, phi_state_dict, random_ids

CODE = '''import os  # qué señal más útil


class MiniPython:
    """Una cadena de varias líneas."""

    def contador_de_palabras(self, texto, otro=0x1F):
        if texto.startswith("ñandú") and not otro:
            return [self.contador_de_palabras(linea, 3.14) for linea in texto]
'''


@pytest.fixture(scope="module")
def small_tokenizer():
    return verify_phi_engram.tokenizer_on_the_spot()


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def points(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka_of(a, b, n=32, k=1):
    """CKA of one state each, [points, d] and [points, d'], fed in uneven pieces."""
    running = RunningCKA(n)
    for x, y in zip(a.split(13), b.split(13)):
        running.add(x[None], y[None])
    return running.result(k)["matriz"][0][0]


# ----------------------------------------------------------------------------------------------------------------------
# CKA
# ----------------------------------------------------------------------------------------------------------------------


def test_cka_of_a_thing_with_itself_is_one_whatever_its_rotation_scale_and_place():
    x = points(0, 256, 12)
    turn = torch.linalg.qr(points(1, 12, 12))[0]
    assert cka_of(x, x) == pytest.approx(1, abs=1e-12)
    assert cka_of(x, 7.5 * x @ turn + 100) == pytest.approx(1, abs=1e-9)
    stretched = x * torch.linspace(0.1, 5, 12)
    assert cka_of(x, stretched) < 0.9


def test_cka_of_independent_data_is_near_zero_where_the_biased_estimator_is_not():
    a, b = points(2, 2048, 64), points(3, 2048, 64)

    def biased(x, y):
        x, y = x - x.mean(0), y - y.mean(0)
        return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()

    assert abs(cka_of(a, b)) < 0.03
    assert min(biased(x, y) for x, y in zip(a.split(32), b.split(32))) > 0.3


def test_hsic_equals_the_u_centred_form():
    """Székely and Rizzo (2014): the same estimator written as an inner product of U-centred kernels."""

    def centred(kernel):
        n = len(kernel)
        rows = kernel.sum(0)
        out = kernel - rows[:, None] / (n - 2) - rows / (n - 2) + kernel.sum() / ((n - 1) * (n - 2))
        return out.fill_diagonal_(0)

    a, b = gram(points(4, 3, 9, 5)), gram(points(5, 2, 9, 7))
    found = unbiased_hsic(a, b)
    for i in range(3):
        for j in range(2):
            expected = (centred(a[i].clone()) * centred(b[j].clone())).sum() / (9 * 6)
            assert found[i, j].item() == pytest.approx(expected.item(), rel=1e-10)


def test_cka_keeps_no_more_for_more_text():
    running = RunningCKA(16)
    for seed in range(20):
        running.add(points(seed, 3, 11, 4), points(seed + 50, 3, 11, 4))
        assert running.pending[0].shape[1] < 16
    assert running.batches == 20 * 11 // 16
    result = running.result(2)
    assert len(result["matriz"]) == len(result["ruido"]) == 3
    assert RunningCKA().result(2) is None
    few = RunningCKA(256)
    few.add(points(0, 2, 20, 4), points(0, 2, 20, 4))
    assert few.result(1)["matriz"][1][1] == pytest.approx(1)


def test_soft_alignment_is_the_weighted_centre_of_the_most_similar():
    similarity = torch.tensor([[0.1, 0.9, 0.3, 0.0], [0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    assert analyses.alignment(similarity, 2).tolist() == pytest.approx([(0.9 + 2 * 0.3) / 1.2, 2.5])
    assert analyses.alignment(similarity, 1)[0] == 1


# ----------------------------------------------------------------------------------------------------------------------
# LogitLens, loss, gates
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lens_equals_torch_distributions_and_the_models_own_loss(model):
    ids = random_ids(model, 3, 40)
    states, _ = run_states(model, ids)
    kl, agree, loss = lens(model, states, ids)

    def read(state):
        return torch.distributions.Categorical(logits=model.lm_head(model.model.final_layernorm(state)))

    final = read(states[-1])
    assert torch.equal(final.logits, torch.distributions.Categorical(logits=model(ids).logits).logits)
    for s, state in enumerate(states):
        expected = torch.distributions.kl_divergence(final, read(state)).mean(1)
        torch.testing.assert_close(kl[s].float(), expected, rtol=1e-4, atol=1e-5)
        same = read(state).logits.argmax(-1) == final.logits.argmax(-1)
        torch.testing.assert_close(agree[s], same.double().mean(1), rtol=1e-6, atol=1e-6)
    assert kl[-1].abs().max() == 0 and (agree[-1] == 1).all() and (kl[:-1] > 0).all()
    assert loss.mean().item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


@torch.no_grad()
def test_states_are_those_that_transformers_phi_gives(model):
    ids = random_ids(model, 2, 20)
    phi = make_phi()
    phi.load_state_dict(phi_state_dict(model))
    states, alpha = run_states(phi, ids)
    assert alpha == {} and len(states) == 5
    hidden = phi(ids, output_hidden_states=True).hidden_states
    for own, theirs in zip(states[:-1], hidden):
        assert torch.equal(own, theirs)
    with hooks.memory_off(model):
        for own, theirs in zip(run_states(model, ids)[0], states):
            assert torch.equal(own, theirs)
    assert model.model.use_memory


@torch.no_grad()
def test_gates_equal_the_layers_own_arithmetic(model):
    ids = random_ids(model, 2, 15)
    found = gate_values(model, ids)
    states, same = run_states(model, ids)
    assert list(found) == [1, 2] == list(same)
    for i, (layer, indices) in enumerate(model.model.ngram_indices(ids).items()):
        engram = model.model.layers[layer].engram
        rows = model.model.engram_tables[str(layer)](indices + model.model.engram_hash.offsets[i])
        key, hidden = engram.key_proj(rows.flatten(-2)), states[layer]  # what comes into the layer

        def normed(x, weight):
            return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * weight

        score = normed(hidden, engram.gate.query_norm.weight) * normed(key, engram.gate.key_norm.weight)
        score = score.sum(-1) / hidden.shape[-1] ** 0.5
        expected = (score.sign() * score.abs().clamp_min(1e-6).sqrt()).sigmoid()
        assert found[layer].shape == (2, 15) and found[layer].dtype == torch.float32
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[layer], same[layer])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    alone = gate_values(model, ids[:1, 5:])
    padded = gate_values(model, ids, mask)
    torch.testing.assert_close(padded[1][0, 5:], alone[1][0], rtol=1e-4, atol=1e-4)
    with hooks.memory_off(model):
        assert gate_values(model, ids) == {}
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_without_an_order_equals_tables_whose_rows_of_it_are_zero(make_model):
    model = make_model()
    ids = random_ids(model, 2, 15)
    with hooks.without_order(model, 3):
        found = model(ids).logits
    whole = model(ids).logits
    for i, table in enumerate(model.model.engram_tables.values()):
        first = int(model.model.engram_hash.offsets[i, model.config.n_head_per_ngram])
        table.weight[first:] = 0  # order 2 comes first
    assert torch.equal(model(ids).logits, found) and not torch.equal(found, whole)


def test_error_of_a_mean_is_that_of_its_blocks():
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0], [0.0, 2.0]])
    everything = torch.ones(3, 2, dtype=torch.bool)
    mean, error = analyses.mean_and_error(values, everything)
    assert (mean, error) == pytest.approx((3, np.std([2, 6, 1], ddof=1) / 3**0.5))
    everything[1] = False
    mean, error = analyses.mean_and_error(values, everything)
    assert (mean, error) == pytest.approx((1.5, 0.5))
    everything[0] = False
    assert analyses.mean_and_error(values, everything) == (1, 1)  # one block says nothing of its error


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of token
# ----------------------------------------------------------------------------------------------------------------------


def test_each_token_has_the_kind_that_python_gives_it(small_tokenizer):
    ids = small_tokenizer(CODE)["input_ids"]
    kinds, last = label_tokens(ids, small_tokenizer)
    said = {}
    for token, kind in zip(ids, kinds):
        said.setdefault(KINDS[kind], []).append(small_tokenizer.decode([token]))
    whole = {kind: small_tokenizer.decode(np.array(ids)[kinds == k]) for k, kind in enumerate(KINDS)}
    assert {"class", " not", " return", " in", "import"} <= set(map(str.rstrip, said["palabra clave"]))
    assert not {"self", "texto"} & {piece.strip() for piece in said["palabra clave"]}
    assert "self" in "".join(said["nombre"]) and "startswith" in "".join(said["nombre"])
    assert re.sub(r"[\s,)]", "", "".join(said["número"])) == "0x1F3.14"
    assert whole["comentario"] == " # qué señal más útil"
    assert "varias líneas" in whole["cadena"] and "ñandú" in whole["cadena"]
    assert not "".join(said["sangría y saltos de línea"]).strip() and "sin clasificar" not in said
    # Last tokens of names: the ends of names of several tokens, each once.
    ends, names = set(), re.finditer(r"[^\W\d]\w*", CODE)
    offsets = small_tokenizer(CODE, return_offsets_mapping=True)["offset_mapping"]
    for name in names:
        inside = [i for i, (a, b) in enumerate(offsets) if a < name.end() and b > name.start()]
        comment_or_string = kinds[inside[-1]] in (probes.COMMENT, probes.STRING, probes.NUMBER)
        if len(inside) > 1 and not comment_or_string:
            ends.add(inside[-1])
    assert set(np.flatnonzero(last)) == ends and len(ends) > 5


@pytest.mark.parametrize("text", ["Esto es prosa, no código.\n", "def f(:\n", "x = 1\n  y = 2\n"])
def test_what_is_no_python_stays_unclassified(small_tokenizer, text):
    kinds, last = label_tokens(small_tokenizer(text)["input_ids"], small_tokenizer)
    assert (kinds == probes.OTHER).all() and not last.any()


def test_blocks_are_those_on_which_training_measures(small_tokenizer, workplace, monkeypatch):
    def by_place(ids, tokenizer):
        return np.arange(len(ids)) % 7, np.zeros(len(ids), bool)

    monkeypatch.setattr(probes, "label_tokens", by_place)
    for i in range(400):
        (workplace / f"{i}.py").write_text(f"valor_{i} = {i}\n" * (3 + i % 5))
    sample = probes.held_out_blocks(small_tokenizer, str(workplace), 16, 32)
    corpus = corpora.prepare_corpus(small_tokenizer, str(workplace), length=32)
    held = np.asarray(corpus.held_out, np.int64)
    chosen = np.unique(np.linspace(0, len(held) // 32 - 1, min(len(held) // 32, 16)).astype(int))
    assert torch.equal(sample.ids, torch.from_numpy(np.stack([held[i * 32 :][:32] for i in chosen])))
    # Every document was labelled from its own beginning, wherever a block cuts it.
    place, expected = 0, np.zeros(len(held), int)
    for i, token in enumerate(held):
        is_end = token == small_tokenizer.eos_token_id
        expected[i], place = (probes.OTHER, 0) if is_end else (place % 7, place + 1)
    assert sample.kinds.tolist() == [expected[i * 32 :][:32].tolist() for i in chosen]
    assert "aparta" in sample.origin and "semilla 0" in sample.origin
    other = probes.held_out_blocks(small_tokenizer, str(workplace), 16, 32, seed=3)
    assert "semilla 3" in other.origin and "no todo" not in other.origin
    unknown = probes.held_out_blocks(small_tokenizer, str(workplace), 16, 32, seed=None)
    assert torch.equal(unknown.ids, sample.ids) and "si se entrenó con otra" in unknown.origin
    held = np.asarray(corpora.prepare_corpus(small_tokenizer, str(workplace), length=32, seed=3).held_out, np.int64)
    assert other.ids[0].tolist() == held[:32].tolist() != sample.ids[0].tolist()


def test_the_seed_that_divided_a_models_text_is_in_its_log(tmp_path):
    assert trained_seed(tmp_path) is None
    (tmp_path / LOG).write_text('{"phase": 1, "step": 1}\n{"seed": 3}\n{"demo": {}}\n')
    assert trained_seed(tmp_path) == 3
    (tmp_path / LOG).write_text("no\n")
    assert trained_seed(tmp_path) is None


def test_a_short_text_is_taken_whole_and_a_tiny_one_refused(small_tokenizer, workplace):
    (workplace / "uno.py").write_text(CODE * 4)
    sample = probes.held_out_blocks(small_tokenizer, "uno.py", 16, 64)
    assert len(sample.ids) > 2 and "entero" in sample.origin
    (workplace / "dos.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="demasiado corto"):
        probes.held_out_blocks(small_tokenizer, "dos.py", 16, 64)
    (workplace / "tres.txt").write_bytes("año, camión y niño\n".encode("latin-1") * 300)
    with pytest.raises(UserError, match="--codificacion latin-1"):
        probes.held_out_blocks(small_tokenizer, "tres.txt", 16, 64)
    assert len(probes.held_out_blocks(small_tokenizer, "tres.txt", 16, 64, encoding="latin-1").ids) > 2


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def test_ngrams_are_told_apart_exactly():
    ids = np.random.default_rng(0).integers(0, 5, (4, 30))
    codes = analyses.ngram_codes(ids, pad=3, max_order=4)
    for order in (2, 3, 4):
        padded = [[3] * (order - 1) + row.tolist() for row in ids]
        true = [tuple(row[t : t + order]) for row in padded for t in range(30)]
        pairs = set(zip(true, codes[order].ravel().tolist()))
        assert len(pairs) == len(set(true)) == codes[order].max() + 1


@torch.no_grad()
def test_collisions_and_untrained_lookups_counted_by_hand(make_model):
    model = make_model()
    tables, config = model.model.engram_tables, model.config
    tables["1"].weight[::3] = 0
    ids = random_ids(model, 4, 50)
    sample = probes.Sample(ids, torch.zeros(4, 50), torch.zeros(4, 50), np.zeros(0, np.uint16), "")
    health = analyses.table_health(model, sample)
    indices = model.model.ngram_indices(ids)[1]
    for head, found in enumerate(health["capas"]["1"]):
        order = 2 + head // config.n_head_per_ngram
        rows_of = {}
        for b in range(4):
            padded = [config.engram_pad_id] * (order - 1) + ids[b].tolist()
            for t in range(50):
                rows_of.setdefault(indices[b, t, head].item(), []).append(tuple(padded[t : t + order]))
        distinct = {row: len(set(ngrams)) for row, ngrams in rows_of.items()}
        total = sum(distinct.values())
        assert (found["orden"], found["filas_leidas"]) == (order, len(rows_of))
        assert found["ngramas_que_chocan"] == pytest.approx(sum(n for n in distinct.values() if n > 1) / total)
        expected = sum(len(rows_of[row]) for row, n in distinct.items() if n > 1) / 200
        assert found["consultas_que_chocan"] == pytest.approx(expected)
        assert abs(found["ngramas_que_chocan"] - found["previsto"]) < 0.15
        first = int(model.model.engram_hash.offsets[0, head])
        zero = sum(len(ngrams) for row, ngrams in rows_of.items() if (first + row) % 3 == 0) / 200
        assert found["sin_entrenar"] == pytest.approx(zero)
        own = tables["1"].weight[first : first + found["filas"]]
        norms = own[own.any(1)].norm(dim=1)
        assert found["norma"] == pytest.approx(norms.mean().item(), rel=1e-5)
        assert found["filas_entrenadas"] == pytest.approx(len(norms) / len(own))
    assert health["entrenamiento"] == {"tokens": 0, "de": 0, "ngramas": {}}


def test_foretold_sharing_is_what_chance_gives():
    rng = np.random.default_rng(0)
    throws = [rng.integers(0, 50, 40) for _ in range(400)]
    shared = np.mean([np.mean([Counter(throw.tolist())[row] > 1 for row in throw]) for throw in throws])
    assert analyses.foretold_sharing(40, 50) == pytest.approx(shared, abs=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# The whole run
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model, small_tokenizer):
    """A folder with `uno` (memory), `uno-control` (another plain Phi), `vacio` (its memory all zero)."""
    place, size = tmp_path_factory.mktemp("models"), len(small_tokenizer)
    shape = dict(vocab_size=size, eos_token_id=small_tokenizer.eos_token_id)
    model = make_model(tokenizer=small_tokenizer, engram_tokenizer_compression=True, **shape)
    model.save_pretrained(place / "uno")
    with torch.no_grad():
        for table in model.model.engram_tables.values():
            table.weight.zero_()
    model.save_pretrained(place / "vacio")
    make_phi(3, **shape).save_pretrained(place / "uno-control")
    for name in ("uno", "vacio", "uno-control"):
        small_tokenizer.save_pretrained(place / name)
    (place / "texto.py").write_text(CODE * 60)
    return place


def run_main(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        run_script(verify_phi_engram.main, list(map(str, arguments)))
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    return exit.value.code, output.out, output.err


def test_command_leaves_pictures_numbers_and_report(capsys, models, workplace):
    code, out, err = run_main(capsys, "--profundidad", models / "uno", "--datos", models / "texto.py", "--bloques", 6)
    assert code == 0, err
    assert "uno-control" in out and "profundidad/informe.md" in out
    place = workplace / "profundidad"
    pictures = set(dict(reports.PICTURES))
    assert {file.name for file in place.iterdir()} == {*pictures, "numeros.json", "informe.md"}
    assert all((place / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    numbers = json.loads((place / "numeros.json").read_text(encoding="utf-8"))
    assert numbers["tokens"] == 6 * 256 and numbers["gemelo"] == "control"
    assert set(numbers["ablacion"]["todos"]["cambios"]) == {"sin memoria", "sin orden 2", "sin orden 3", "gemelo"}
    assert "señal" in "".join(numbers["puertas"]["trozos"])  # characters cut between tokens come out whole
    assert len(numbers["puertas"]["trozos"]) == len(numbers["puertas"]["alfa"]["1"]) == 256
    assert sum(one["tokens"] for kind, one in numbers["ablacion"].items() if kind != "todos") == 6 * 255
    assert "diferencia" in numbers["logitlens"] and numbers["cka"]["nombres"]["minilotes"] == 1
    report = (place / "informe.md").read_text(encoding="utf-8")
    assert report.index("## En pocas palabras") < report.index("## 1. LogitLens")
    short = report.split("## En pocas palabras")[1].split("##")[0]
    assert short.count("\n- ") == 5 and "la puerta se abre de media" in short and "que nunca tuvo memoria" in short
    assert set(re.findall(r"\]\((.*?)\)", report)) == pictures
    assert not re.search(r"\bnan\b", report) and not re.search(r"\d\.\d(?!\d\d)", report)  # decimals the Spanish way
    # Again: what is there is never replaced.
    code, _, err = run_main(capsys, "--profundidad", models / "uno", "--datos", models / "texto.py")
    assert code == 1 and "mv profundidad profundidad-1" in err and (place / "numeros.json").exists()


def test_an_empty_memory_shows_no_effect_anywhere(models, workplace, monkeypatch):
    quick = tuple((name, pictures.draw_lens) for name, _ in reports.PICTURES)
    monkeypatch.setattr(reports, "PICTURES", quick)
    numbers = reports.depth(str(models / "vacio"), source=str(models / "texto.py"), n_blocks=4)
    assert numbers["gemelo"] == "sin memoria"
    assert all(pair == (0, 0) for pair in numbers["logitlens"]["diferencia"])
    assert numbers["logitlens"]["modelo"] == numbers["logitlens"]["gemelo"]
    for key in analyses.PROBES:
        found = numbers["cka"][key]
        assert [found["matriz"][s][s] for s in range(5)] == pytest.approx([1] * 5)
        assert found["alineacion"] == pytest.approx(found["propia"])
    for one in numbers["ablacion"].values():
        assert all(pair == (0, 0) for pair in one["cambios"].values())
    for found in numbers["puertas"]["capas"].values():
        assert found["minima"] == pytest.approx(0.5, abs=3e-4) and found["maxima"] == pytest.approx(0.5, abs=3e-4)
    for heads in numbers["tablas"]["capas"].values():
        assert all(head["sin_entrenar"] == 1 and head["filas_entrenadas"] == head["norma"] == 0 for head in heads)
    report = (workplace / "profundidad" / "informe.md").read_text(encoding="utf-8")
    assert "no se nota si la memoria está o no" in report
    assert "no cambia nada: está vacía" in report and "No hay ninguna diferencia" in report


def test_loss_is_that_of_train_model(models, workplace, small_tokenizer):
    from engram.opening import open_model

    sample = probes.held_out_blocks(small_tokenizer, str(models / "texto.py"), 8, 64)
    model, _ = open_model(str(models / "uno"))
    corpus = corpora.Corpus("", sample.train, sample.ids.flatten().numpy(), 1.0, 1, [], "")
    recipe = Recipe(0, (0, 0), (0, 0), batch=2, length=64)
    numbers = analyses.analyse(model, None, small_tokenizer, sample)
    expected = evaluate(model, corpus, recipe, "cpu")["loss"]
    assert numbers["ablacion"]["todos"]["perdida"] == pytest.approx(expected, rel=1e-5)
    with hooks.memory_off(model):
        off = evaluate(model, corpus, recipe, "cpu")["loss"]
    assert numbers["ablacion"]["todos"]["cambios"]["sin memoria"][0] == pytest.approx(off - expected, abs=1e-5)


def test_reports_say_what_the_numbers_say():
    def lens_report(*gaps):
        states = {"kl": [1.0] * len(gaps), "acuerdo": [0.5] * len(gaps)}
        found = {"modelo": states, "gemelo": states, "diferencia": gaps}
        numbers = {"gemelo": "control", "logitlens": found, "puertas": {"capas": {"1": {}}}}
        return "\n".join(reports.report_lens(numbers))

    assert "Se ve lo que dice" in lens_report((-0.1, 0.01), (-0.1, 0.01), (0.3, 0.01))
    mixed = lens_report((-0.1, 0.01), (0.1, 0.01), (0, 0))
    assert "**No se ve" in mixed and "Más baja en: entrada. Más alta en: 0." in mixed
    assert "**No se ve" in lens_report((-0.1, 0.01), (-0.1, 0.09), (0, 0))  # within two errors
    assert "no cambia nada" in lens_report((0, 0), (0, 0), (0, 0))
    assert "más falta hace: el orden 3" in reports.most_needed({"sin orden 2": (0.1, 0.01), "sin orden 3": (0.2, 0.01)})
    assert "Ninguno" in reports.most_needed({"sin orden 2": (-0.05, 0.001), "sin orden 3": (-0.2, 0.001)})
    assert "hay empate" in reports.most_needed({"sin orden 2": (0.19, 0.01), "sin orden 3": (0.2, 0.01)})
    assert reports.signed(-0.0001) == "0,000" and reports.signed(-1.25, 1) == "−1,2"
    assert reports.visible("a `\n|") == "`a·ˋ↵¦`"


def test_a_tie_between_two_layers_is_no_gained_layer():
    """Two CKA values 0.0006 apart decide which columns count: the alignment jumps by a layer, and nothing is found."""
    likeness = torch.tensor([[0.9, 0.5000, 0.4994, 0.1], [0.9, 0.5, 0.3, 0.1]], dtype=torch.float64)
    spread = analyses.tie_spread(likeness, 2)
    centre = [(0.5 * place) / (0.9 + 0.5) for place in (1, 2)]
    assert spread[0].item() == pytest.approx(0.4994 * 2 / (0.9 + 0.4994) - centre[0]) and spread[1] == 0
    assert not analyses.tie_spread(likeness, 4).any()
    found = dict(
        matriz=[[1.0, 0.5]] * 2, alineacion=[1.4, 1.4], propia=[1.0, 1.0], ruido=[0.01, 0.01], empate=[0.36, 0.0],
        minilotes=4,
    )  # fmt: skip
    text = "\n".join(reports.report_cka(dict(cka={"k": 2, "nombres": found, "todos": None})))
    assert "más profundas del otro: 0. A menos" in text  # the input's 0.4 hangs on a tie of 0.36
    assert "Sin decidir: entrada." in text and "hasta 0,36" in text


def test_twins_that_do_not_fit(capsys, models, workplace, small_tokenizer, make_model):
    for name, change in (("otra", dict(num_hidden_layers=3)), ("vocabulario", dict(vocab_size=2200))):
        make_phi(**{"vocab_size": len(small_tokenizer), **change}).save_pretrained(workplace / name)
        small_tokenizer.save_pretrained(workplace / name)
    shutil.copytree(models / "uno-control", workplace / "tokenizer")
    state = json.loads((workplace / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    a, b = list(vocabulary)[400:402]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (workplace / "tokenizer" / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    for name in ("otra", "vocabulario", "tokenizer"):
        code, _, err = run_main(capsys, "--profundidad", models / "uno", "--contra", workplace / name)
        assert code == 1 and "no es comparable" in err, name
    code, _, err = run_main(capsys, "--profundidad", models / "uno", "--contra", models / "vacio")
    assert code == 1 and "sin memoria (model_type phi)" in err
    assert not list(workplace.glob("*profundidad*"))


def test_flags_that_go_together(capsys, models):
    for flags in (
        ("--contra", "x"), ("--modelo", "x", "--profundidad", "x"), ("--profundidad", "x", "--bloques", "0"),
        ("--codificacion", "latin-1"),
    ):  # fmt: skip
        code, _, err = run_main(capsys, *flags)
        assert code == 2 and "❌" in err
    code, _, err = run_main(capsys, "--profundidad", "x", "--codificacion", "nada")
    assert code == 1 and "--codificacion nada: no existe" in err
    code, _, err = run_main(capsys, "--profundidad", models / "no-está")
    assert code == 1 and err.startswith("❌ No existe la carpeta")


def test_without_matplotlib(capsys, models, monkeypatch, workplace):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run_main(capsys, "--profundidad", models / "uno")
    assert code == 1 and "pip install matplotlib" in err and not list(workplace.glob("*profundidad*"))


def test_share_is_what_the_memory_adds_beside_the_hidden_state(make_model):
    model, seen = make_model(), {}
    ids = helpers.random_ids(model, 2, 12)
    for layer in model.config.engram_layer_ids:
        engram = model.model.layers[layer].engram
        engram.register_forward_hook(lambda _, args, out, i=layer: seen.update({i: (args[0], out)}))
    with torch.no_grad(), hooks.memory_share(model) as share:
        assert not share
        model(ids)
        found = {layer: pair.tolist() for layer, pair in share.items()}
        gates = hooks.gate_values(model, ids)
    for layer, (hidden, added) in seen.items():
        ratio = added.norm() / hidden.norm()
        assert found[layer] == pytest.approx([ratio.item(), gates[layer].mean().item()], rel=1e-5)  # float32 sums
    assert set(seen) == {1, 2}


def test_shuffled_rows_are_those_of_other_ngrams_of_the_same_head(make_model):
    model = make_model()
    ids, table = helpers.random_ids(model, 2, 12), model.model.engram_tables["1"]
    primes = model.model.engram_hash.primes[0].flatten()
    with torch.no_grad():
        table.weight.copy_(torch.arange(table.n_rows)[:, None].expand(-1, table.d_head))  # a row says its number
        read, before = [], model(ids).logits
        table.register_forward_hook(lambda _, args, rows: read.append(rows[..., 0].long()))
        model(ids)
        with hooks.shuffled_rows(model):
            shuffled = model(ids).logits
        again = model(ids).logits
    first = primes.cumsum(0) - primes
    straight, moved, _ = (rows - first for rows in read)
    assert torch.equal(moved, (straight + primes // 2) % primes) and not torch.equal(moved, straight)
    assert torch.equal(before, again) and not torch.equal(before, shuffled)


def test_what_the_demo_measures(models, small_tokenizer):
    """Shares, losses and divergences are those of each model's logits, block by block."""
    from engram.opening import open_model

    model, tokenizer = open_model(str(models / "uno"))
    twin = reports.open_twin(str(models / "uno-control"), model, tokenizer)
    tokens = np.array(tokenizer(CODE * 20).input_ids)[: 6 * 32]
    blocks = torch.from_numpy(tokens).view(6, 32)
    sample = probes.Sample(blocks, torch.full_like(blocks, probes.OTHER), None, None, "")
    row = choices.measured("x", model, twin, sample, sample)
    with torch.no_grad():
        ours, theirs = (one(blocks).logits[:, :-1].float().log_softmax(-1) for one in (model, twin))
    truth = blocks[:, 1:]
    # float32 sums of 186 tokens in another order
    loss = F.nll_loss(ours.transpose(1, 2), truth).item()
    assert row["loss"] == pytest.approx(loss, abs=1e-5) == pytest.approx(row["old"], abs=1e-5)
    assert row["right"] == (ours.argmax(-1) == truth).double().mean().item() and row["names"] == 1
    kl = F.kl_div(ours, theirs, log_target=True, reduction="sum").item() / truth.numel()
    assert row["kl"] == pytest.approx(kl, abs=1e-5) and kl > 0
    assert row["changed"] == (ours.argmax(-1) != theirs.argmax(-1)).double().mean().item()
    table = choices.comparison([row], "sympy")
    assert f"| x | {spanish(row['loss'], 3)} | {spanish(100 * row['right'], 1)} % | 100,0 % |" in table
    assert choices.forgetting(twin, twin, blocks)["kl"] == 0

    found = choices.choices(model, blocks)
    other = choices.Choices(found.first.roll(1, 0), found.chance, found.loss + 1)
    for block, at in choices.pick(blocks, found, other, 3):
        assert found.first[block, at] == blocks[block, at + 1] != other.first[block, at] and at >= 8
    surely = choices.Choices(blocks[:, 1:].clone(), found.chance, torch.zeros_like(found.loss))
    never = choices.Choices(blocks[:, 1:] + 1, found.chance, torch.arange(186.0).view(6, 31))
    places = choices.pick(blocks, surely, never, 3)
    assert places[0] == (5, 30) and len({blocks[b, a + 1].item() for b, a in places}) == 3
    shown = choices.example(tokenizer, blocks, places[0], surely, never)
    assert f"y viene {tokenizer.decode([blocks[5, 31].item()])!r}" in shown and "sin ella, " in shown
    told = choices.examples(tokenizer, blocks, surely, never)
    assert told.count("y viene") == 3 and told.endswith("Y donde estorba:")


def test_names_are_right_when_all_their_tokens_are():
    """Of four names, one of three tokens has one wrong; one cut by the block's beginning does not count."""
    name, other = probes.NAME, probes.OTHER
    kinds = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1, 1, 1]]) * (name - other) + other
    hits = torch.tensor([[False, False, True, True, False, True, True], [True, False, False, True, True, True, True]])
    assert choices.whole_names(kinds, hits) == 1 - 1 / 4
    assert choices.whole_names(kinds, torch.ones_like(hits)) == 1
    assert choices.whole_names(torch.full_like(kinds, other), hits) == 1


def test_the_verdict_is_the_rows(models):
    """Signs and numbers as the rows have them, whoever wins."""

    def row(name, loss, old, right=0.25):
        found = choices.Choices(None, None, torch.full((4, 9), loss))
        return dict(name=name, loss=loss, old=old, right=right, choices=found)

    controls = row("a", 3.5, 5.0, 0.375), row("b", 3.75, 4.5)
    rows = [row("base", 5.0, 4.0), *controls, row("m", 4.0, 4.25), row("s", 5.125, 4.5)]
    text = " ".join(choices.verdict(rows, "sympy").split())
    assert text.startswith("✅") and "aprende sympy: 1,000 ± 0,000 nats menos" in text
    assert "n-gramas no queda nada: está en lo que recuerda" in text
    assert "(a): 1,500 nats. Acierta a la primera el 37,5 %; la memoria, el 25,0 %" in text
    assert "el control, 1,000; la memoria, 0,250" in text
    rows[3:] = row("m", 5.5, 4.25), row("s", 4.875, 4.5)
    text = choices.verdict(rows, "sympy")
    assert text.startswith("❌") and "quedan 0,125: está" in text
