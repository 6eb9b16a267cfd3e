"""The study on a pretrained model: its graft is exact, and it measures what it says. Its figures are its own."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from study import counts, measures, methods, pretrained, pretrained_tables
from study import pretrained_study as study

SMALL = dict(
    engram_layer_ids=[0, 2], engram_vocab_size=[101, 101], n_embed_per_ngram=16, n_head_per_ngram=2,
    engram_tokenizer_compression=False,
)  # fmt: skip


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
    ).eval()


@pytest.fixture
def tokenizer():
    """Of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(code): place for place, code in enumerate([10, *range(32, 127)], 1)}
    inner = Tokenizer(models.WordLevel({"<fin>": 0, **letters}, unk_token="<fin>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<fin>")


def train(model, engram, steps=3, row_state="adam"):
    tables = methods.TrainedTables(engram.trainable, row_state)
    optimizer = methods.make_optimizer(model, 0.0, 1e-2, 1e-1, 0.0, tables=tables)
    for _ in range(steps):
        ids = torch.randint(1, 300, (2, 16))
        model(ids, labels=ids).loss.backward()
        optimizer.collect()
        optimizer.step()
        optimizer.zero_grad()
    tables.__exit__(None)


def test_an_untrained_memory_changes_no_logit_and_a_trained_one_does(llama):
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        before = llama(ids).logits
        engram = pretrained.graft(llama, None, **SMALL)
        assert torch.equal(llama(ids).logits, before)
    weights = {name: p.clone() for name, p in llama.named_parameters() if "engram" not in name}
    for name, parameter in llama.named_parameters():
        parameter.requires_grad_("engram" in name)
    train(llama.train(), engram)
    with torch.no_grad():
        assert not torch.equal(llama.eval()(ids).logits, before)
    assert all(torch.equal(p, weights[name]) for name, p in llama.named_parameters() if name in weights)


def test_controls_of_content(llama):
    engram = pretrained.graft(llama, None, **SMALL)
    engram.one_row = True
    train(llama.train(), engram)
    heads = SMALL["n_head_per_ngram"] * 2
    assert [int(table.weight.any(-1).sum()) for table in engram.tables.values()] == [heads, heads]
    engram.one_row = False
    train(llama, engram)
    before = {layer: table.weight.detach().clone() for layer, table in engram.tables.items()}
    methods.rearranged(engram, "barajadas", torch.Generator().manual_seed(0))
    for layer, table in engram.tables.items():
        assert not torch.equal(table.weight, before[layer])
        assert torch.equal(table.weight.sort(0).values, before[layer].sort(0).values)
        assert torch.equal(table.weight.any(-1), before[layer].any(-1))
    methods.rearranged(engram, "media", None)
    first = int(engram.hash.primes[0].flatten()[0])
    rows = engram.tables["0"].weight[:first]
    assert rows.any(-1).sum() > 1 and len(rows[rows.any(-1)].unique(dim=0)) == 1


def test_an_mlp_has_what_the_memory_uses(llama):
    engram = pretrained.graft(llama, None, **SMALL)
    sizes = methods.used(engram)
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        before = llama(ids).logits
        control = methods.Mlp(llama.model, sizes, 0.02)
        assert torch.equal(llama(ids).logits, before)
    for layer, size in sizes.items():
        assert abs(sum(p.numel() for p in control.parts[layer].parameters()) - size) <= 64 + 32


def test_identifiers():
    text = "import os\nclass A:\n    def run(self):\n        return self.año.value  # no\nx = 'no'\n"
    found = pretrained.identifiers(text)
    assert [text[first:last] for first, last, _, _ in found] == [name for *_, name, _ in found]
    assert [name for *_, name, _ in found] == ["os", "A", "run", "self", "self", "año", "value", "x"]
    assert [name for *_, name, dot in found if dot] == ["año", "value"]
    assert pretrained.identifiers("uno = (") == [(0, 3, "uno", False)]


def test_identifiers_lie_where_the_blocks_say(tokenizer, monkeypatch):
    monkeypatch.setattr(pretrained, "LENGTH", 16)
    texts = ["alfa.beta = alfa\n", "def gamma(x): return alfa\n"]
    blocks, names = pretrained.held_out_blocks(tokenizer, texts, 2)
    inside = [("".join(tokenizer.convert_ids_to_tokens(blocks[b, i:j])), *rest) for b, i, j, *rest in names]
    assert inside == [
        ("alfa", "alfa", False, False), ("beta", "beta", True, False), ("gamma", "gamma", False, False),
        ("x", "x", False, False),
    ]  # fmt: skip


def test_completed_counts_whole_names():
    names = [(0, 1, 3, "dos", True, False), (0, 4, 5, "uno", False, False), (0, 6, 7, "uno", False, True)]
    hits = torch.tensor([[False, True, False, True, True, True, True, False]])
    found = measures.completed(hits, names, {"uno", "dos"})
    assert found == dict(punto=[0, 1, 0, 1], vistos=[2, 2, 1, 1], nuevos=[0] * 4)
    assert measures.completed(hits, names, {"uno"})["nuevos"] == [0, 1, 0, 1]


def test_forgetting_of_the_base_itself_is_nothing(llama):
    blocks = torch.randint(0, 300, (5, 12))
    said = {"propio": [p for _, p in measures.predictions(llama, blocks)]}
    rounded = {"propio": [p.half() for p in said["propio"]]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "LENGTH", 12)
        same = measures.forgetting(llama, {"propio": blocks}, said)["propio"]
        nearly = measures.forgetting(llama, {"propio": blocks}, rounded)["propio"]
        loss, _ = measures.loss_and_hits(llama, blocks)
        llama.lm_head.weight.data[:150] *= 1.5
        other = measures.forgetting(llama, {"propio": blocks}, said)["propio"]
    assert same["kl"] == same["changed"] == 0
    # float16 moves each of 55 * 300 log-probabilities of 4 to 8 by 2**-9 at most, 1e-3 in the root mean square: their
    # mean by 9e-6. Six times that, for bfloat16's logits have few values and err together.
    assert nearly["kl"] == pytest.approx(0, abs=5e-5) and nearly["changed"] < 0.02
    assert same["loss"] == pytest.approx(loss, rel=1e-5) and other["kl"] > 1e-4


def test_lora_begins_at_nothing(llama):
    pytest.importorskip("peft", reason="sin peft no hay filas de LoRA")
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        before = llama(ids).logits
        methods.add_lora(llama, 2)
        assert torch.equal(llama(ids).logits, before)
    assert {name.split(".")[-3] for name, p in llama.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_rows_kept_are_of_rows_that_exist():
    done = study.read_results()
    rows = study.study_rows(done)
    assert all(name in rows or name.startswith(("corpus-", "cuentas-", "engram-peft-")) for name in done)
    assert study.study_rows({})["nada"] == dict(parte=1, steps=0, domain="sympy", seed=0)


def test_rows_that_differ_by_their_seed_are_one_line():
    def row(loss, kl, right, **more):
        return dict(
            loss=loss, steps=240, old={text: dict(kl=kl) for text in pretrained_tables.TEXTS},
            identifiers=dict(punto=[right, 200, 0, 0]), **more,
        )  # fmt: skip

    memory = dict(dense=0.01, rows=0.03)
    base = row(2.0, 0.0, 80)
    rows = [
        row(1.8, 0.02, 90, memory=memory, seed=0, barajadas=1.99, apagada=2.0),
        row(1.7, 0.04, 94, memory=memory, seed=1, barajadas=1.97, apagada=2.0),
        row(1.6, 0.5, 90, memory=memory, seed=0, control="sin-conv"),
        row(1.5, 0.5, 90, memory=dict(memory, shape={}), seed=0),
        row(1.5, 0.5, 90, lora=dict(rank=8, rate=1e-3), seed=0),
    ]
    head, _, ours, theirs, end = pretrained_tables.seeds_table(rows, base, 240).split("\n")
    assert ours == (
        "| memoria 0.01 × 3 | 2 | 1,7500 | 0,2500 ± 0,0707 | 8 ± 4 % | 0 ± 0 % "
        "| 0,030 ± 0,014 | 0,030 ± 0,014 | 0,030 ± 0,014 | 6,0 ± 1,4 |"
    )
    assert theirs == "| LoRA r8 0.001 | 1 | 1,5000 | 0,5000 | – | – | 0,500 | 0,500 | 0,500 | 5,0 |"
    assert head.count("|") == ours.count("|") == theirs.count("|") and not end


def test_counts_know_what_followed():
    read, blocks = torch.tensor([[1, 2, 3, 1, 2, 4], [1, 2, 3, 9, 9, 9]]), torch.tensor([[1, 2, 3, 5], [2, 1, 2, 4]])
    shares, times = counts.looked_up(counts.following(read, 2), blocks, 2)
    torch.testing.assert_close(shares, torch.tensor([[0, 2 / 3, 0], [0, 0, 1 / 3]]))
    assert times.tolist() == [[0, 2, 2], [0, 0, 2]]  # three times: two bits; what followed 2 3 twice is no 5


def test_a_mixture_leaves_to_the_base_what_was_never_seen():
    kinds = torch.tensor([[0, 1]] * 40)
    base, expert = torch.full((40, 2), 0.25), torch.tensor([[0.0, 0.5]] * 40)
    loss = counts.mixed_loss(torch.stack([base, expert]), kinds)
    # Of 20 tokens each: the base alone; the expert with w = 19/21, where 20 log(0.25 + 0.25 w) + log(1 - w) is most.
    assert loss == pytest.approx(-math.log(0.25 * 0.25 * (1 + 19 / 21)) / 2, abs=1e-3)
    assert counts.mixed_loss(torch.stack([base, 0 * base]), kinds) == pytest.approx(math.log(4), abs=1e-6)


def test_a_sinkhorn_step_has_the_rates_size_and_skips_what_has_no_gradient():
    part = SimpleNamespace(weight=torch.zeros(40, 8), first=torch.zeros(40, 8))
    part.first[8] = 1.0  # of earlier steps
    grad = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    grad[3] = 0
    methods.sinkhorn_step(part, torch.arange(5, 35), grad, 0.5, None, 1e-8, 1)
    moved = part.weight[5:35]
    assert not moved[3].any() and part.first[8].eq(1).all() and not part.weight[:5].any() and (moved * grad).sum() < 0
    # Unit rows times the root of their width: 0.18 of the rate is what a value moves by, on average of squares.
    torch.testing.assert_close(moved[4:].square().mean(-1).sqrt(), torch.full((26,), 0.09), rtol=1e-5, atol=0)


@pytest.fixture
def own_accelerator():
    """accelerate keeps one precision for the whole process; the study's is not that of other tests."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learned_and_measured_in_the_processors_own_precision(llama, own_accelerator, monkeypatch, dtype):
    monkeypatch.setattr(pretrained, "DTYPE", dtype)
    seen, ids = [], torch.randint(1, 300, (200,))
    llama.model.norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    recipe = SimpleNamespace(batch=2, length=16, seed=0, accumulate=1, clip=1.0, tokens_per_step=32)
    methods.learn(llama, None, recipe, ids, 2, {}, backbone=1e-3)
    measures.loss_and_hits(llama, ids.view(4, 50))
    assert seen == 3 * [dtype == torch.bfloat16]


def test_a_memory_learns_with_its_gate_open_and_its_rows_cleared(llama, own_accelerator):
    llama.requires_grad_(False)
    engram = pretrained.graft(llama, None, **SMALL)
    methods.prepare(engram, "sin-puerta", 0.0)
    gates = []
    engram.layers["0"].gate.register_forward_hook(lambda _, args, alpha: gates.append(alpha))
    recipe = SimpleNamespace(batch=2, length=16, seed=0, accumulate=1, clip=1.0, tokens_per_step=32)
    rates = dict(dense=1e-2, rows=1e-1)
    before = {name: p.clone() for name, p in llama.named_parameters()}
    loss = methods.learn(llama, engram, recipe, torch.randint(1, 300, (200,)), 2, rates)
    assert 4 < loss < 8 and all(bool((alpha == 1).all()) for alpha in gates)
    moved = {name for name, p in llama.named_parameters() if not torch.equal(p, before[name])}
    assert any("value_proj" in name for name in moved) and all("engram" in name for name in moved)
    assert any(table.weight.any() for table in engram.tables.values())
    methods.cleared(engram)
    assert not any(table.weight.any() for table in engram.tables.values())
