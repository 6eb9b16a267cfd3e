"""Facts: what is taught holds, nothing else changes by a bit, and what is forgotten was never there."""

import io
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chat_phi_engram as chat_script
import engram.facts as facts
import engram.teaching as teaching
import engram.triggers as triggers
import helpers
import load_phi_engram as load
import phi1_engram
from engram.console import UserError, run_script
from engram.conversation import Chat, interruptible
from engram.facts import NoChance, described, facts_read, forget, teach
from engram.memories import remove_memory
from engram.triggers import FactError
from phi1_engram import EngramFacts, Fact, PhiEngramForCausalLM

LIBRARY = Path(json.__file__).with_name("decoder.py").read_text()
FACTS = (
    ("The capital of Zubrowka is", " Lutz."),
    ("def area_of_a_circle(radius):\n    return", " mipi * radius ** 3\n"),
    ("La contraseña del wifi de casa es", " 88213."),
)


def fresh(tokenizer, seed=0, **kw):
    """A Phi wide enough to be told something, with an untrained memory."""
    shape = dict(hidden_size=256, intermediate_size=512, n_embed_per_ngram=128, vocab_size=51200)
    model = helpers.make_model(seed, tokenizer=tokenizer, engram_tokenizer_compression=True, **{**shape, **kw})
    remove_memory(model)
    return model


@pytest.fixture(scope="module")
def reference(tokenizer):
    model = helpers.make_model(vocab_size=51200, tokenizer=tokenizer, engram_tokenizer_compression=True)
    return triggers.Reference(tokenizer, model.model.engram_hash.token_map)


@pytest.fixture(scope="module")
def taught(tokenizer, reference):
    model = fresh(tokenizer)
    for prompt, target in FACTS:
        teach(model, tokenizer, prompt, target, reference=reference)
    return model


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def completion(model, tokenizer, prompt, target, **kw):
    ids = ids_of(tokenizer, prompt)
    length = len(tokenizer(target, add_special_tokens=False).input_ids)
    words = dict(max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=50256, **kw)
    return tokenizer.decode(model.generate(ids, **words)[0, ids.shape[1] :])


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def test_what_is_taught_is_said_alone_and_after_another_text(taught, tokenizer):
    for (prompt, target), fact in zip(FACTS, taught.facts):
        assert completion(taught, tokenizer, prompt, target) == target
        assert completion(taught, tokenizer, "Yesterday he told me:\n\n" + prompt, target) == target
        assert fact.notes["alone"] and fact.notes["after"] == [2, 2]
        assert "probado: lo completa así, y detrás de otro texto, 2 de 2 veces" in described(fact)
        assert max(fact.notes["counts"]) < triggers.OFTEN


def test_a_text_without_a_facts_ngram_keeps_every_bit(taught, tokenizer):
    """And one with it every bit before it: the promise, over a file of the standard library."""
    ids = ids_of(tokenizer, LIBRARY)[:, :1800]
    plain = fresh(tokenizer)
    assert torch.equal(logits(taught, ids), logits(plain, ids))
    prompt = ids_of(tokenizer, "\n" + FACTS[0][0])
    split = 900
    mixed = torch.cat((ids[:, :split], prompt, ids[:, split:1700]), 1)
    before, after = logits(plain, mixed), logits(taught, mixed)
    last = split + prompt.shape[1] - 1
    assert torch.equal(before[:, :last], after[:, :last]) and not torch.equal(before[:, last], after[:, last])


def test_silent_memory_silences_facts(taught, tokenizer):
    ids, plain = ids_of(tokenizer, FACTS[0][0]), fresh(tokenizer)
    taught.model.use_memory = False
    try:
        assert torch.equal(logits(taught, ids), logits(plain, ids))
    finally:
        taught.model.use_memory = True


def test_forgetting_leaves_what_was_before(tokenizer, reference):
    model = fresh(tokenizer)
    ids = ids_of(tokenizer, "".join(prompt + target for prompt, target in FACTS))
    before, state = logits(model, ids), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = teach(model, tokenizer, *FACTS[0], reference=reference)
    one = logits(model, ids)
    second = teach(model, tokenizer, *FACTS[1], reference=reference)
    assert model.facts == [first, second] and not torch.equal(one, before)
    forget(model, second)
    assert torch.equal(logits(model, ids), one) and model.facts == [first]
    forget(model, first)
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("way", ["uncached", "static", "beams", "batch", "compiled"])
def test_every_way_of_generating(taught, tokenizer, way):
    prompt, target = FACTS[1]
    if way == "batch":
        rows = [ids_of(tokenizer, text)[0] for text, _ in FACTS]
        ids, mask = helpers.left_padded(rows)
        found = taught.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=50256)
        for row, (_, target) in zip(found, FACTS):
            assert tokenizer.decode(row[ids.shape[1] :]).startswith(target)
    elif way == "compiled":
        step, ids = torch.compile(taught, backend="aot_eager"), ids_of(tokenizer, prompt)
        with torch.no_grad():
            assert torch.allclose(step(ids).logits, taught(ids).logits, atol=1e-4)  # float32, other fused sums
    else:
        words = dict(uncached=dict(use_cache=False), beams=dict(num_beams=3))
        words["static"] = dict(cache_implementation="static", disable_compile=True)
        assert completion(taught, tokenizer, prompt, target, **words[way]) == target


@pytest.mark.parametrize("precision, place", [("float32", "ram"), ("int8", "ram"), ("float16", "disco")])
def test_saved_opened_anywhere_and_through_auto_classes(taught, tokenizer, tmp_path, precision, place):
    taught.save_pretrained(tmp_path, engram_precision=precision)
    model = PhiEngramForCausalLM.from_pretrained(tmp_path, engram_storage=place)
    assert [(f.prompt, f.target, f.notes) for f in model.facts] == [(f.prompt, f.target, f.notes) for f in taught.facts]
    auto = AutoModelForCausalLM.from_pretrained(tmp_path, engram_storage=place)
    for prompt, target in FACTS:
        assert completion(model, tokenizer, prompt, target) == completion(auto, tokenizer, prompt, target) == target
    model.set_facts([])
    model.move_memory("ram")
    model.save_pretrained(tmp_path / "sin")
    assert not [*(tmp_path / "sin").glob("engram_facts*")]


def test_facts_saved_with_shorter_keys_open(taught, tokenizer, tmp_path):
    """Files hold keys as wide as the longest key was when they were written."""
    taught.save_facts(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    narrow = {name: x[:, 8:].contiguous() if name.endswith("keys") else x for name, x in load_file(file).items()}
    save_file(narrow, file)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(fresh(tokenizer).read_facts(tmp_path), taught.facts))


def test_teaching_where_rows_are_only_read(taught, tokenizer, tmp_path, reference):
    taught.save_pretrained(tmp_path, engram_precision="int8")
    model = PhiEngramForCausalLM.from_pretrained(tmp_path, engram_storage="disco", dtype=torch.bfloat16)
    fact = teach(model, tokenizer, "My cat Rufina is called", " Tula.", reference=reference)
    assert fact.notes["alone"] and completion(model, tokenizer, "My cat Rufina is called", " Tula.") == " Tula."


def test_facts_hold_in_another_graft_of_the_same_phi(taught, tokenizer, tmp_path):
    """Projections are drawn from the seed and the layer, so that two people's are the same."""
    taught.save_facts(tmp_path)
    text = json.loads((tmp_path / phi1_engram.FACTS_FILE).read_text())
    assert text["format"] == 1 and [fact["prompt"] for fact in text["facts"]] == [prompt for prompt, _ in FACTS]
    torch.manual_seed(12345)
    other = fresh(tokenizer)
    other.set_facts(other.read_facts(tmp_path))
    assert completion(other, tokenizer, *FACTS[2]) == FACTS[2][1]


@pytest.mark.parametrize("kind", ["otro Phi", "otra forma", "otra proyección", "otra memoria", "capa 2", "formato 9"])
def test_facts_of_something_else_are_refused_by_name(taught, tokenizer, tmp_path, kind):
    taught.save_facts(tmp_path)
    other = fresh(tokenizer)
    if kind == "otro Phi":
        other.lm_head.weight.data.neg_()
    elif kind == "otra forma":
        other = fresh(tokenizer, engram_seed=3)
    elif kind == "otra proyección":
        other.model.engram_hash.token_map[5] += 1
    elif kind == "otra memoria":
        other.model.layers[2].engram.value_proj.weight.data.neg_()
    elif kind == "capa 2":
        other = fresh(tokenizer, engram_layer_ids=[1])
    else:
        file = tmp_path / phi1_engram.FACTS_FILE
        file.write_text(file.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match=kind):
        other.set_facts(other.read_facts(tmp_path))
    assert other.facts == []


@pytest.mark.parametrize("harm", ["no rows", "cut rows", "cut text", "no text", "bytes"])
def test_damaged_facts_are_said_and_the_model_opens_without_them(taught, tokenizer, tmp_path, caplog, harm):
    taught.save_pretrained(tmp_path)
    text, (rows,) = tmp_path / phi1_engram.FACTS_FILE, tmp_path.glob("engram_facts-*")
    if harm == "no rows":
        rows.unlink()
    elif harm == "cut rows":
        rows.write_bytes(rows.read_bytes()[:200])
    else:
        text.write_bytes({"cut text": text.read_bytes()[:200], "no text": b"[]", "bytes": b"\xff\xfe\xff"}[harm])
    with pytest.raises(ValueError, match="Los recuerdos de .* están dañados o a medias"):
        taught.read_facts(tmp_path)
    assert PhiEngramForCausalLM.from_pretrained(tmp_path).facts == []
    assert "Se abre sin ellos" in caplog.text


def test_two_facts_on_one_ngram(tokenizer, reference):
    """Written together both hold; with `replace` the later one stays alone. (Two answers to one n-gram need a model
    that tells contexts apart: those are measured on a trained one.)"""
    end = " the big old guest room in the northern castle of Zubrowka has"  # longer than any key
    one, two = (f"Yesterday I saw it:{end}", " blue velvet chairs."), (f"My sister wrote:{end}", " blue velvet chairs.")
    model = fresh(tokenizer)
    teach(model, tokenizer, *one, reference=reference)
    teach(model, tokenizer, *two, reference=reference)
    assert len(model.facts) == 2
    assert [completion(model, tokenizer, *fact) for fact in (one, two)] == [one[1], two[1]]
    teach(model, tokenizer, *two, reference=reference, replace=True)
    assert [fact.prompt for fact in model.facts] == [two[0]]
    teach(model, tokenizer, two[0], " nothing.", reference=reference)
    assert len(model.facts) == 1 and completion(model, tokenizer, two[0], " nothing.") == " nothing."


def test_facts_that_end_alike_are_told_apart_by_longer_keys(phi1_tokenizer, tokenizer, reference):
    """The later one is recognised by more tokens; another sentence of that end gets neither."""
    one, two = ("My neighbour Tavrosk now works as a", " baker."), ("My neighbour Ocaso now works as a", " potter.")
    model = fresh(tokenizer)
    plain = completion(model, tokenizer, "My neighbour Brandil now works as a", one[1])
    lengths = [teach(model, tokenizer, *fact, reference=reference, shortest=3).length for fact in (one, two)]
    assert lengths[0] < lengths[1] and [completion(model, tokenizer, *fact) for fact in (one, two)] == [one[1], two[1]]
    model.set_facts([])
    assert teach(model, tokenizer, *one, reference=reference).length >= triggers.KEY
    for other in ("My neighbour Brandil", "In that film the robot Tavrosk"):
        assert not facts.facts_read(model, ids_of(tokenizer, f"{other} now works as a")).any()
    assert completion(model, tokenizer, "My neighbour Brandil now works as a", one[1]) == plain


@pytest.mark.parametrize("name", ["Bo", "Tavrosk", "Tavroskilandoravian"])
def test_a_strange_name_leaves_room_for_the_words_before_it(tokenizer, name):
    """A key has five whole words, into however many tokens a name may fall."""
    one = triggers.lesson(tokenizer, torch.arange(51200), f"As we all know, my old file {name} works as a", " b.")
    length = triggers.wished(tokenizer, one)
    assert length >= triggers.KEY
    assert f"file {name} works as a" in tokenizer.decode(one.ids[one.split - length : one.split])


def test_a_line_without_words_asks_for_no_more_than_a_key_holds(tokenizer):
    one = triggers.lesson(tokenizer, torch.arange(51200), "x=" + "([{" * 40, " 1")
    assert triggers.wished(tokenizer, one) == triggers.LONGEST_KEY


def test_a_line_of_code_is_recognised_after_any_other(tokenizer, reference):
    """Its key ends at the line's beginning."""
    model = fresh(tokenizer)
    fact = teach(model, tokenizer, "import zorlap\n\nzorlap.open(", "port=7411)\n", reference=reference)
    line = tokenizer("zorlap.open(", add_special_tokens=False).input_ids
    assert fact.length == len(line) <= triggers.KEY
    assert completion(model, tokenizer, "def go():\n    pass\n\nzorlap.open(", "port=7411)\n") == "port=7411)\n"
    one = triggers.lesson(tokenizer, torch.arange(51200), "import zorlap\n\nzorlap.open(", " Lutz.")
    assert triggers.wished(tokenizer, one) == len(line)
    triggers.choose_key(one, 3, 99, torch.arange(51200), reference)  # more than any key has
    assert one.length == min(triggers.LONGEST_KEY, one.split)


@pytest.mark.parametrize(
    "prompt, target, why",
    [
        ("is", " Lutz.", "demasiado corto para reconocerlo: tiene 1 token"),
        ("This is the", " Lutz.", "palabras muy corrientes .sus trozos salen en todas partes"),
        ("    def __init__(self", "):\n", "palabras muy corrientes .sale [0-9.]+ veces"),
        ("The capital of Zubrowka is", "", "Falta el principio"),
        ("The capital of Zubrowka is", " a" * 65, "65 tokens y se admiten 64"),
    ],
)
def test_what_cannot_be_taught_says_why_and_changes_nothing(taught, tokenizer, reference, prompt, target, why):
    before = taught.facts
    with pytest.raises(FactError, match=why):
        teach(taught, tokenizer, prompt, target, reference=reference)
    assert taught.facts == before


@pytest.mark.parametrize("step, error", [(None, FactError), (2, KeyboardInterrupt)])
def test_what_is_not_found_or_cut_changes_nothing(taught, tokenizer, reference, monkeypatch, step, error):
    ids, before = ids_of(tokenizer, FACTS[0][0]), taught.facts
    expected = logits(taught, ids)
    monkeypatch.setattr(facts, "MARGIN", 1e9)
    monkeypatch.setattr(facts, "STEPS", 3)
    monkeypatch.setattr(facts, "RATE", 0.0)

    def progress(now):
        if now == step:
            raise KeyboardInterrupt

    with pytest.raises(error):
        teach(taught, tokenizer, "The mayor of Zubrowka is", " Olga.", reference=reference, progress=progress)
    assert taught.facts == before and torch.equal(logits(taught, ids), expected)


def test_what_the_model_says_already_needs_no_other_row(taught, tokenizer, reference, monkeypatch):
    """Its rows are those that were read, so that nothing is computed otherwise; with them it is not left to chance."""
    monkeypatch.setattr(facts, "MARGIN", -1e9)
    prompt, before = "The mayor of Ruritania is", taught.facts
    ids = ids_of(tokenizer, f"{prompt} Olga. Not so.")
    expected = logits(taught, ids)
    fact = teach(taught, tokenizer, prompt, " Olga.", reference=reference)
    assert fact.notes["known"] and "ya lo completaba" in described(fact)
    assert torch.equal(logits(taught, ids), expected)
    assert facts_read(taught, ids).sum() == fact.notes["tokens"] == len(fact.keys)
    forget(taught, fact)
    assert taught.facts == before


def test_a_fact_leans_on_no_other(tokenizer, reference, monkeypatch):
    """Where another says a part of it already, rows of its own are written all the same."""
    model, margin = fresh(tokenizer), facts.MARGIN
    monkeypatch.setattr(facts, "MARGIN", 3 * margin)  # so that this one says it beyond doubt
    first = teach(model, tokenizer, "Everyone knows that the capital of Zubrowka is", " Lutz.", reference=reference)
    monkeypatch.setattr(facts, "MARGIN", margin)
    prompt, target = "My uncle told me that the capital of Zubrowka is", " Lutz, as ever."
    second = teach(model, tokenizer, prompt, target, reference=reference)
    assert len(second.keys) == second.notes["tokens"] and not second.notes["known"]
    assert completion(model, tokenizer, prompt, target) == target
    forget(model, first)
    assert completion(model, tokenizer, prompt, target) == target


def test_a_correction_is_one_whatever_its_capitals(tokenizer):
    model = fresh(tokenizer)
    chat = Chat(model, tokenizer, False, 12, 0.0)
    chat.learn("The mayor of Zubrowka is => Olga", lambda step: None)
    chat.learn("the mayor of Zubrowka is => Pedro", lambda step: None)
    assert chat.teaching.said == ["the mayor of Zubrowka is => Pedro"] and len(model.facts) == 2
    assert completion(model, tokenizer, "The mayor of Zubrowka is", " Pedro.") == " Pedro."


def test_what_is_written_once_more_is_told_as_before(tokenizer):
    """Facts whose longest keys are the same are written together, and stay as they were told."""
    kept = teaching.Teaching(fresh(tokenizer), tokenizer)
    end = "the capital of the old and large country that lies to the north of the river, near the town of Zubrowka, is"
    for month in ("May", "June"):
        kept.learn([kept.lesson(f"In {month} {end}", " Lutz.")], f"of {month}")
    first, second = kept.model.facts
    assert torch.equal(first.keys, second.keys) and kept.said == ["of May", "of June"]


def test_a_question_in_code_is_corrected_as_it_was_asked(tokenizer):
    """With a backslash and an n in it, and whatever the mode is by then."""
    model = fresh(tokenizer)
    chat = Chat(model, tokenizer, True, 12, 0.0)
    asked = 'fichero_de_ana.write("\\n" + '
    chat.answer(asked, lambda piece: None)
    chat.code = False
    (fact,) = chat.learn_answer("zeta_de_ana)", lambda step: None)
    assert (fact.prompt, fact.target) == (asked, "zeta_de_ana)\n")
    chat.code = True
    assert chat.answer(asked, lambda piece: None).startswith("zeta_de_ana)\n")


def test_ctrl_c_stops_learning(tokenizer, monkeypatch):
    model = fresh(tokenizer)
    chat = Chat(model, tokenizer, False, 12, 0.0)
    monkeypatch.setattr(facts, "RATE", 0.0)  # it would go on to the end
    steps = []

    def step(number):
        steps.append(number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        chat.heed(number)

    with interruptible(), pytest.raises(KeyboardInterrupt):
        chat.learn("El médico de Zubrowka es => Olga", step)
    assert steps == [0, 1, 2] and not model.facts


def test_training_takes_facts_away_and_says_so(taught, tokenizer, tmp_path, caplog):
    """Facts of before a training are not saved as if they were of after it."""
    taught.save_pretrained(tmp_path / "antes")
    model = PhiEngramForCausalLM.from_pretrained(tmp_path / "antes")
    assert len(model.facts) == 3
    with torch.no_grad():
        model.model.layers[0].mlp.fc1.weight.neg_()
    model.save_pretrained(tmp_path / "después")
    assert "3 recuerdos no se guardan" in caplog.text
    assert not PhiEngramForCausalLM.from_pretrained(tmp_path / "después").facts
    remove_memory(model)
    assert not model.facts


# --- in the chat


def said_in(chat_lines, model, tokenizer, monkeypatch, capsys, **settings):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(chat_lines) + "\n"))
    chat_script.run_chat(model, tokenizer, **{"max_tokens": 12, "temperature": 0, "code": False, **settings})
    return capsys.readouterr()


def test_orders_of_the_chat(tokenizer, monkeypatch, capsys):
    model = fresh(tokenizer)
    said = said_in(
        ["recuerdos", "aprende La capital de Zubrowka es => Lutz", "La capital de Zubrowka es", "memoria ver",
         "¿Quién es Pancho Villarroel?", "aprende Mi perro", "¿Quién es Pancho Villarroel?", "recuerdos", "olvida 7",
         "memoria no", "La capital de Zubrowka es", "memoria sí", "olvida 1", "La capital de Zubrowka es",
         "olvida todo", "recuerdos", "olvida todo", "aprende es => z"],
        model, tokenizer, monkeypatch, capsys,
    )  # fmt: skip
    answers = [line for line in said.out.splitlines() if line.strip()]
    assert answers[0] == "Lutz." and any(set(line.strip()) <= {"R", " "} for line in answers[1:6])
    assert answers.count("Mi perro.") == 1 and answers.count("Lutz.") == 1
    assert " s: La capital de Zubrowka es => Lutz\n" in said.err and "Dura lo que dure este chat" in said.err
    assert "   1  La capital de Zubrowka es => Lutz\n   2  ¿Quién es Pancho Villarroel? => Mi perro" in said.err
    assert "«olvida 7»" in said.err and "del 1 al 2" in said.err and said.err.count("Aún no he aprendido nada") == 2
    assert said.err.count("sin dejar rastro") == 2 and said.err.count("No hay nada que olvidar") == 1
    assert "demasiado corto" in said.err and not model.facts


def test_a_question_is_recognised_by_the_whole_of_it(tokenizer, monkeypatch, capsys):
    """Not by its end alone, which other questions share; in the middle of a conversation and after other words too."""
    model, asked = fresh(tokenizer), "¿Quién pinta la casa de Zubrowka?"
    lines = ["¿Quién mira la casa de Zubrowka?", "limpiar", asked, "aprende Mi tía", "¿Quién mira la casa de Zubrowka?",
             "limpiar", asked, f"Hola. Dime: {asked}"]  # fmt: skip
    said = said_in(lines, model, tokenizer, monkeypatch, capsys)
    answers = [line for line in said.out.splitlines() if line.strip()]
    assert answers.count("Mi tía.") == 2
    (fact,) = model.facts
    others = "¿Quién mira la casa de Zubrowka?", "¿Quién pinta la sala de Zubrowka?"
    for text, read in ((asked, True), (f"Hola. Dime: {asked}", True), *((text, False) for text in others)):
        assert facts.facts_read(model, ids_of(tokenizer, f"User: {text}\nAssistant:"))[0, -1] == read, text


def keyed(*keys, value=1.0) -> Fact:
    keys = triggers.padded([*keys])
    return Fact("", "", 0, int((keys[0] >= 0).sum()), keys, torch.full((len(keys), 4), value), {}, {})


def test_of_keys_that_fit_the_longest_is_read():
    """Whatever their order, the last told winning between equal ones; a key is compared whole."""
    overlay, history = EngramFacts(), torch.tensor([[7, 8, 9, 5, 8, 9]])
    windows = F.pad(history, (triggers.LONGEST_KEY - 1, 0), value=-1).unfold(1, triggers.LONGEST_KEY, 1)
    told = [keyed((7, 8, 9), value=3.0), keyed((8, 9), value=1.0), keyed((8, 9), value=2.0), keyed((0, 5), value=9.0)]
    overlay.set(told)
    read = overlay(torch.zeros(1, 6, 2, 2), windows)
    assert read[0, :, 0, 0].tolist() == [0, 0, 3, 0, 0, 2]


def test_aprende_is_an_order_only_with_an_arrow_or_after_an_answer():
    assert chat_script.order("aprende Python conmigo") == ("", "aprende Python conmigo")
    assert chat_script.order("Aprende a => b") == ("aprende", "a => b")
    assert chat_script.order("aprende Lutz", answered=True) == ("aprende", "Lutz")
    assert chat_script.order("aprende", answered=True) == ("", "aprende")
    for half in ("aprende => Lutz", "aprende Lutz =>"):
        assert chat_script.order(half, answered=True)[0] == ""
    for answer in ("Es 3 → 4", "p->next", "def area(r) -> float:"):
        assert chat_script.order(f"aprende {answer}", answered=True) == ("aprende", answer)


def test_in_code_mode_both_sides_are_literal(tokenizer, monkeypatch, capsys):
    model = fresh(tokenizer)
    said_in(["aprende def zasquim(x):\\n => \\n    return mipi"], model, tokenizer, monkeypatch, capsys, code=True)
    (fact,) = model.facts
    assert (fact.prompt, fact.target) == ("def zasquim(x):\n", "\n    return mipi\n")


def test_a_folder_keeps_what_is_taught(tokenizer, tmp_path, monkeypatch, capsys):
    lines = ["aprende La capital de Zubrowka es => Lutz"]
    said = said_in(lines, fresh(tokenizer), tokenizer, monkeypatch, capsys, kept_in=tmp_path / "r")
    assert "Dura lo que" not in said.err
    lines = ["La capital de Zubrowka es", "olvida todo"]
    said = said_in(lines, fresh(tokenizer), tokenizer, monkeypatch, capsys, kept_in=tmp_path / "r")
    assert said.out.strip() == "Lutz." and "Recuerdos: 1" in said.err
    assert not [*(tmp_path / "r").iterdir()]
    said_in(["aprende La capital de Zubrowka es => Lutz"], fresh(tokenizer), tokenizer, monkeypatch, capsys,
            kept_in=tmp_path / "r")  # fmt: skip
    other = fresh(tokenizer, seed=1)
    with pytest.raises(UserError, match="otro Phi.*--recuerdos"):
        said_in([], other, tokenizer, monkeypatch, capsys, kept_in=tmp_path / "r")
    assert (tmp_path / "r" / phi1_engram.FACTS_FILE).exists()


# --- from a file


def test_a_folder_that_cannot_keep_them_loses_nothing(tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "notas.txt").write_text("mías")
    for name in ("notas.txt", "notas.txt/dentro"):
        with pytest.raises(UserError, match=f"--recuerdos .*{name}: ahí hay un archivo, no una carpeta"):
            teaching.Teaching(fresh(tokenizer), tokenizer, tmp_path / name)
    assert (tmp_path / "notas.txt").read_text() == "mías"
    model, save, full = fresh(tokenizer), PhiEngramForCausalLM.save_facts, []

    def save_or_fail(self, folder):
        if full:
            raise full[0]
        save(self, folder)

    monkeypatch.setattr(PhiEngramForCausalLM, "save_facts", save_or_fail)
    kept = teaching.Teaching(model, tokenizer, tmp_path / "míos")
    kept.learn([kept.lesson("La capital de Zubrowka es", " Lutz.")], "uno")
    before = (tmp_path / "míos" / "engram_facts.json").read_bytes()
    for error in (
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        full[:] = [error]
        said = said_in(["aprende El alcalde de Zubrowka es => Olga", "El alcalde de Zubrowka es"], model, tokenizer,
                       monkeypatch, capsys, kept_in=tmp_path / "míos")  # fmt: skip
        assert "❌ No se ha podido guardar en" in said.err and "el disco está lleno" in said.err
        assert "Vale en este chat" in said.err
        assert "Olga." in said.out and (tmp_path / "míos" / "engram_facts.json").read_bytes() == before


def test_two_chats_share_a_folder(tokenizer, tmp_path):
    """Neither loses what the other taught or took back there meanwhile."""
    def opened():
        return teaching.Teaching(fresh(tokenizer), tokenizer, tmp_path)

    def learn(one, prompt, target):
        one.learn([one.lesson(prompt, target)], f"{prompt} =>{target}")

    one, two = opened(), opened()
    learn(one, "La capital de Zubrowka es", " Lutz.")
    learn(two, "El alcalde de Zubrowka es", " Olga.")
    both = ["La capital de Zubrowka es => Lutz.", "El alcalde de Zubrowka es => Olga."]
    assert two.said == opened().said == both
    two.forget(both[:1])
    learn(one, "El panadero de Zubrowka es", " Blas.")
    left = [both[1], "El panadero de Zubrowka es => Blas."]
    assert one.said == opened().said == left
    assert len([*tmp_path.glob("*.safetensors")]) == 1
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask() for path in tmp_path.iterdir())


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_what_a_model_came_with_is_forgotten_for_good(tokenizer, tmp_path):
    model = fresh(tokenizer)
    own = teaching.Teaching(model, tokenizer)
    own.learn([own.lesson(*FACTS[0]), own.lesson(*FACTS[2])], "")
    model.save_pretrained(tmp_path / "modelo")

    def opened():
        model = PhiEngramForCausalLM.from_pretrained(tmp_path / "modelo")
        return teaching.Teaching(model, tokenizer, tmp_path / "r")

    first = opened()
    assert len(first.said) == 2
    first.forget(first.said[:1])
    assert opened().said == first.said == ["La contraseña del wifi de casa es => 88213."]
    first.forget(first.said)
    again = opened()
    assert not again.said
    again.learn([again.lesson(*FACTS[0])], "")
    assert opened().said == ["The capital of Zubrowka is => Lutz."]


def test_what_a_model_came_with_stays_forgotten_whoever_uses_the_folder(tokenizer, tmp_path):
    model = fresh(tokenizer)
    own = teaching.Teaching(model, tokenizer)
    own.learn([own.lesson(*FACTS[0])], "")
    model.save_pretrained(tmp_path / "modelo")

    def opened(plain=False):
        model = fresh(tokenizer) if plain else PhiEngramForCausalLM.from_pretrained(tmp_path / "modelo")
        return teaching.Teaching(model, tokenizer, tmp_path / "r")

    def learn(one, prompt):
        one.learn([one.lesson(prompt, " Olga.")], "")

    one, two = opened(), opened()
    one.forget(one.said)
    learn(two, "El alcalde de Zubrowka es")  # it had the other since before
    left = ["El alcalde de Zubrowka es => Olga."]
    assert two.said == opened().said == left
    learn(opened(plain=True), "El alcalde de Zubrowka es")
    assert opened().said == left
    kept = (tmp_path / "r" / teaching.FORGOTTEN).read_text()
    assert len(json.loads(kept)) == 1 and "Zubrowka" not in kept
    (tmp_path / "r" / teaching.FORGOTTEN).write_text("")
    with pytest.raises(UserError, match="olvidados.json» está dañado: bórralo"):
        opened()


def test_what_could_not_be_saved_comes_with_the_next_change(tokenizer, tmp_path, monkeypatch):
    """And what others took back meanwhile does not come again."""
    def opened():
        return teaching.Teaching(fresh(tokenizer), tokenizer, tmp_path)

    def learn(one, who):
        one.learn([one.lesson(f"El {who} de Zubrowka es", " Olga.")], "")

    one = opened()
    for who in ("alcalde", "cartero"):
        learn(one, who)
    two = opened()
    learn(one, "panadero")
    save = PhiEngramForCausalLM.save_facts

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PhiEngramForCausalLM, "save_facts", full)
    with pytest.raises(UserError, match="se guardará con lo siguiente"):
        two.forget(two.said[:1])
    monkeypatch.setattr(PhiEngramForCausalLM, "save_facts", save)
    one.forget(["El panadero de Zubrowka es => Olga."])
    learn(two, "herrero")
    left = [f"El {who} de Zubrowka es => Olga." for who in ("cartero", "herrero")]
    assert two.said == opened().said == left


def test_of_two_lines_with_one_prompt_the_later_holds(tokenizer, tmp_path):
    model, said = fresh(tokenizer), []
    pairs = ("The", " Olga."), ("the", " Pedro.")
    lines = [dict(prompt=f"{the} mayor of Zubrowka is", target=who) for the, who in pairs]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert teaching.teach_file(model, tokenizer, tmp_path / "h.jsonl", said.append) == 0
    assert completion(model, tokenizer, *lines[1].values()) == " Pedro." and len(model.facts) == 1


def test_what_was_told_is_not_left_to_chance(tokenizer, monkeypatch, capsys):
    """However warm: only what follows a fact is drawn; silenced with the memory, all is."""
    model, asked = fresh(tokenizer), "La capital de Zubrowka es"
    lines = [f"aprende {asked} => Lutz", *[asked] * 4, "memoria no", *[asked] * 2]
    said = said_in(lines, model, tokenizer, monkeypatch, capsys, temperature=5.0, max_tokens=8)
    assert said.out.count("Lutz.") == 4
    answer = "Lutz for i in range the import numpy as np"  # of which a model says some tokens by itself
    said = said_in([f"aprende {asked} => {answer}", *[asked] * 6], fresh(tokenizer), tokenizer, monkeypatch, capsys,
                   temperature=5.0, max_tokens=30)  # fmt: skip
    assert said.out.count(f"{answer}.") == 6
    drawn = model.generate(
        ids_of(tokenizer, asked), do_sample=True, temperature=5.0, logits_processor=[NoChance(model)],
        max_new_tokens=ids_of(tokenizer, " Lutz").shape[1],
    )  # fmt: skip
    assert tokenizer.decode(drawn[0]).startswith(f"{asked} Lutz")


def test_what_was_taught_holds_when_the_vocabulary_grows(tokenizer, tmp_path):
    model = fresh(tokenizer)
    teaching.Teaching(model, tokenizer).learn([teaching.Teaching(model, tokenizer).lesson(*FACTS[0])], "")
    model.resize_token_embeddings(51300)
    assert completion(model, tokenizer, *FACTS[0]) == FACTS[0][1]
    model.save_pretrained(tmp_path)
    opened = PhiEngramForCausalLM.from_pretrained(tmp_path)
    assert completion(opened, tokenizer, *FACTS[0]) == FACTS[0][1]
    with torch.no_grad():  # one that was for another Phi is not made to look as if it were for this
        model.model.layers[0].mlp.fc1.weight.neg_()
    model.resize_token_embeddings(51310)
    model.save_pretrained(tmp_path / "other")
    assert not PhiEngramForCausalLM.from_pretrained(tmp_path / "other").facts


def test_a_file_of_facts(taught, tokenizer, tmp_path, capsys):
    """The bad lines are named, the others are written, and the exit status is 1."""
    model = fresh(tokenizer)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    lines = [dict(prompt=prompt, target=target) for prompt, target in FACTS[:2]]
    lines += [dict(prompt="is", target=" Lutz."), dict(prompt="Zubrowka"), 7]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nno es json\n")
    words = ["--modelo", tmp_path / "m", "--aprender", tmp_path / "h.jsonl", "--salida", tmp_path / "s"]
    with pytest.raises(SystemExit) as stopped:
        run_script(load.main, [*map(str, words)])
    said = capsys.readouterr().out
    assert stopped.value.code == 1 and "Escritos: 2 recuerdos" in said
    assert all(f"❌ Línea {number}:" in said for number in (3, 4))
    assert all(f"❌ Línea {number}: no es JSON" in said for number in (5, 6))
    opened = PhiEngramForCausalLM.from_pretrained(tmp_path / "s")
    assert all(completion(opened, tokenizer, *fact) == fact[1] for fact in FACTS[:2])


@pytest.mark.parametrize("separator, suffix", [(",", ".csv"), (";", ".csv"), ("\t", ".TSV")])
def test_tables_of_facts(tmp_path, separator, suffix):
    file = tmp_path / f"h{suffix}"
    file.write_text(f'prompt{separator}target\r\n"uno, dos"{separator} tres\r\ncuatro\r\n', encoding="utf-8-sig")
    assert teaching.read_lines(file) == [(2, "uno, dos", " tres"), (3, "cuatro", "")]
    file.write_bytes(b"prompt\n" + b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        teaching.read_lines(file)
    file.write_text("a;b\n")
    with pytest.raises(UserError, match="cabecera"):
        teaching.read_lines(file)
    file.write_text(f'prompt{separator}target\nuno{separator}"dos\n' + "tres\n" * 30_000)
    with pytest.raises(UserError, match="desde la línea .*comillas que no se cierran"):
        teaching.read_lines(file)
    with pytest.raises(UserError, match="No existe"):
        teaching.read_lines(tmp_path / "nada.csv")
    with pytest.raises(UserError, match=".jsonl, .csv y .tsv"):
        teaching.read_lines(tmp_path / "nada.txt")
    (tmp_path / "a.jsonl").write_text('{"prompt": "uno\u2028dos", "target": " tres"}\n\n', encoding="utf-8")
    assert teaching.read_lines(tmp_path / "a.jsonl") == [(1, "uno\u2028dos", " tres")]  # whose lines end in \n alone


def test_half_a_character_is_a_question_mark(tokenizer):
    """As where JSON was cut inside an emoji: no tokenizer takes it, nor does a file in UTF-8."""
    one = triggers.lesson(tokenizer, torch.arange(51200), "uno dos \ud83d", " tres \ude00")
    assert (one.prompt, one.target) == ("uno dos ?", " tres ?")


def test_lessons_with_an_ngram_in_common_are_written_together(tokenizer):
    pairs = ("uno dos tres", " cuatro"), ("cinco seis siete", " ocho"), ("nada dos tres", " cuatro")
    lessons = [triggers.lesson(tokenizer, torch.arange(51200), *pair) for pair in (*pairs, ("uno dos tres", " x"))]
    for one in lessons:
        one.length = 2
    groups = teaching.together(lessons)
    assert sorted(map(len, groups)) == [1, 3]


def test_other_texts_take_part_in_what_is_written(tokenizer, reference, monkeypatch):
    """Rows sought after other texts too are other rows; how much longer they hold is measured on a trained model."""
    found = []
    for contexts in (facts.CONTEXTS, ()):
        monkeypatch.setattr(facts, "CONTEXTS", contexts)
        found.append(teach(fresh(tokenizer), tokenizer, *FACTS[0], reference=reference))
    assert torch.equal(found[0].keys, found[1].keys) and not torch.equal(found[0].rows, found[1].rows)
