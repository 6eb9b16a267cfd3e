"""The memory: projection, hash, table, gate, conv, against DeepSeek's own figures (tests/golden) and its promises."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import helpers
import phi1_engram
from phi1_engram import EngramHash, EngramLayer, EngramTable, PhiEngramForCausalLM, vocabulary_projection

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("demo_defaults", "four_gram")
# The demo's parameter names -> ours.
RENAMED = {
    "key_projs.0": "key_proj", "value_proj": "value_proj", "norm1.0": "gate.key_norm", "norm2.0": "gate.query_norm",
    "short_conv.norms.0": "conv_norm", "short_conv.conv": "conv",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Golden files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def golden(request, make_config):
    """One golden file: its arrays, our configuration of it, and a model whose token map is the file's own."""
    arrays = dict(np.load(GOLDEN / f"{request.param}.npz"))
    settings = json.loads((GOLDEN / f"{request.param}.json").read_text())
    config = make_config(
        vocab_size=51200, hidden_size=settings["hidden_size"], num_hidden_layers=16,
        engram_layer_ids=settings["layer_ids"], engram_vocab_size=settings["engram_vocab_size"],
        max_ngram_size=settings["max_ngram_size"], n_embed_per_ngram=settings["n_embed_per_ngram"],
        n_head_per_ngram=settings["n_head_per_ngram"], engram_kernel_size=settings["kernel_size"],
        engram_seed=settings["seed"], engram_pad_id=settings["pad_id"], engram_bias=True,
    )  # fmt: skip
    token_map = torch.from_numpy(arrays["lookup_table"]).long()
    token_map = torch.cat([token_map, token_map[settings["pad_id"]].expand(51200 - len(token_map))])
    model = PhiEngramForCausalLM(config).eval()
    constants = model.model.engram_hash
    constants.token_map.copy_(token_map)
    constants.token_map._is_hf_initialized = True  # as if a checkpoint had brought it
    with torch.no_grad():
        constants.reset_buffers()
    return SimpleNamespace(arrays=arrays, config=config, model=model, token_map=token_map)


def test_golden_projection(golden, phi1_tokenizer):
    ours = vocabulary_projection(phi1_tokenizer, 51200, golden.config.engram_pad_id)
    assert ours.dtype == torch.long
    assert torch.equal(ours, golden.token_map)
    assert int(ours.max()) + 1 == golden.arrays["compressed_vocab_size"] == 32962


def test_golden_multipliers_and_primes(golden):
    constants = golden.model.model.engram_hash
    for i, layer in enumerate(golden.config.engram_layer_ids):
        assert np.array_equal(constants.multipliers[i], golden.arrays[f"multipliers.{layer}"])
        assert np.array_equal(constants.primes[i], golden.arrays[f"primes.{layer}"])
    assert constants.primes.unique().numel() == constants.primes.numel()
    assert constants.multipliers.remainder(2).all()


def test_golden_indices(golden):
    texts = [name for name in golden.arrays if name.startswith("input_ids.")]
    assert len(texts) == 6
    for name in texts:
        indices = golden.model.model.ngram_indices(torch.from_numpy(golden.arrays[name]))
        assert list(indices) == golden.config.engram_layer_ids
        for layer, ours in indices.items():
            assert ours.dtype == torch.long
            assert np.array_equal(ours, golden.arrays[f"hashes.{name[10:]}.{layer}"]), (name, layer)


def test_golden_row_ids(golden):
    # Heads lie end to end in one table: index within the head plus the head's offset.
    arrays, constants = golden.arrays, golden.model.model.engram_hash
    layer = int(arrays["module.layer"])
    indices = golden.model.model.ngram_indices(torch.from_numpy(arrays["module.input_ids"]))[layer]
    offsets = constants.offsets[golden.config.engram_layer_ids.index(layer)]
    assert np.array_equal(indices + offsets, arrays["module.row_ids"])
    rows = golden.model.model.engram_tables[str(layer)].weight.shape[0]
    assert rows == arrays[f"primes.{layer}"].sum() > arrays["module.row_ids"].max()


def test_golden_layer_output(golden):
    arrays = golden.arrays
    layer = EngramLayer(golden.config, int(arrays["module.layer"]))
    state = {}
    for name, values in arrays.items():
        if name.startswith("module.weight."):
            module, kind = name.removeprefix("module.weight.").rsplit(".", 1)
            state[f"{RENAMED[module]}.{kind}"] = torch.from_numpy(values)
    layer.load_state_dict(state, strict=True)
    with torch.no_grad():
        ours = layer(torch.from_numpy(arrays["module.hidden_states"]), torch.from_numpy(arrays["module.row_values"]))
    expected = torch.from_numpy(arrays["module.output"])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Vocabulary projection
# ----------------------------------------------------------------------------------------------------------------------


def test_projection_folds_variants_and_covers_all_ids(tokenizer):
    projection = vocabulary_projection(tokenizer, 51200, 50256)
    assert projection.shape == (51200,)
    distinct = projection.unique()
    assert torch.equal(distinct, torch.arange(len(distinct)))  # no canonical id is skipped
    assert len(distinct) < len(tokenizer)
    assert (projection[len(tokenizer) :] == projection[50256]).all()

    def canonical(text):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 1, f"{text!r} is not one token"
        return projection[ids[0]].item()

    assert canonical("self") == canonical(" self") != canonical(" return")
    assert canonical("A") == canonical("a") == canonical(" a")
    assert canonical(" " * 4) == canonical(" " * 8) == canonical("\t\t") == canonical(" ") == canonical("\n")
    assert canonical("<|endoftext|>") != canonical(" ")


def test_projection_of_accents_and_of_parts_of_characters(phi1_tokenizer):
    projection = vocabulary_projection(phi1_tokenizer, 51200, 50256)

    def canonical(text):
        (token_id,) = phi1_tokenizer(text)["input_ids"]
        return projection[token_id].item()

    assert canonical("é") == canonical("É") == canonical("e") == canonical(" E")
    assert canonical(" café") == canonical(" cafe")
    # Parts of a character decode to U+FFFD and keep their raw strings apart.
    parts = [i for i in range(256) if "\ufffd" in phi1_tokenizer.decode([i])]
    assert len(parts) > 100 and projection[parts].unique().numel() == len(parts)


def test_every_id_below_vocab_size_is_legal(tokenizer):
    model = helpers.make_model(
        vocab_size=51200, num_hidden_layers=2, engram_layer_ids=[1], engram_tokenizer_compression=True,
        tokenizer=tokenizer,
    )  # fmt: skip
    as_pad = model.model.ngram_indices(torch.tensor([[5, 50256, 6, 7, 8]]))[1]
    for token_id in (0, 50294, 50295, 51199):
        ids = torch.tensor([[5, token_id, 6, 7, 8]])
        assert model(ids).logits.isfinite().all()
        same = torch.equal(model.model.ngram_indices(ids)[1], as_pad)
        assert same == (token_id >= len(tokenizer))  # ids without a token are addressed like the pad token


def test_tokenizer_of_another_model_is_refused(make_config, tokenizer):
    with pytest.raises(ValueError, match="El tokenizer tiene 50295 tokens y el modelo solo vocab_size=320"):
        PhiEngramForCausalLM(make_config(engram_tokenizer_compression=True), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="engram_pad_id=50300 no es un token del tokenizer, que va de 0 a 50294"):
        vocabulary_projection(tokenizer, 51200, 50300)


def forbid_tokenizers(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a tokenizer was opened")

    monkeypatch.setattr(phi1_engram.AutoTokenizer, "from_pretrained", forbidden)


def test_without_compression_no_tokenizer_is_opened(make_config, monkeypatch):
    forbid_tokenizers(monkeypatch)
    constants = PhiEngramForCausalLM(make_config(engram_tokenizer_compression=False)).model.engram_hash
    assert torch.equal(constants.token_map, torch.arange(320))
    expected = phi1_engram.hash_multipliers(make_config(), 320)  # |V'| is vocab_size then
    assert torch.equal(constants.multipliers, expected)


def test_a_checkpoint_needs_no_tokenizer(tokenizer, make_config, monkeypatch, tmp_path):
    # The name in the configuration leads nowhere: whoever opens the folder may not have the tokenizer.
    model = helpers.make_model(
        vocab_size=51200, num_hidden_layers=2, engram_layer_ids=[1], engram_tokenizer_compression=True,
        tokenizer=tokenizer, tokenizer_name_or_path="nobody/nothing",
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    forbid_tokenizers(monkeypatch)
    again = PhiEngramForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = helpers.random_ids(model, 2, 20)
    assert torch.equal(again(ids).logits, model(ids).logits)
    for name, buffer in model.model.engram_hash.named_buffers():
        assert torch.equal(again.get_buffer(f"model.engram_hash.{name}"), buffer), name


def test_tokenizer_from_its_name_or_handed_over(make_config, tokenizer, monkeypatch, phi_folder):
    # microsoft/phi-1 is the default name; conftest.py makes it resolve.
    kw = dict(vocab_size=51200, num_hidden_layers=2, engram_layer_ids=[1], engram_tokenizer_compression=True)
    expected = vocabulary_projection(tokenizer, 51200, 50256)
    named = PhiEngramForCausalLM(make_config(**kw))
    forbid_tokenizers(monkeypatch)
    given = PhiEngramForCausalLM(make_config(**kw), tokenizer=tokenizer)
    grafted = PhiEngramForCausalLM.from_pretrained(phi_folder, tokenizer=tokenizer, engram_vocab_size=[211, 211])
    for model in (named, given, grafted):
        assert torch.equal(model.model.engram_hash.token_map, expected)


def test_without_a_tokenizer_the_error_names_the_ways_out(make_config):
    config = make_config(engram_tokenizer_compression=True, tokenizer_name_or_path="nobody/nothing")
    with pytest.raises(OSError) as caught:
        PhiEngramForCausalLM(config)
    message = str(caught.value)
    for needed in ("'nobody/nothing'", "tokenizer=…", "tokenizer_name_or_path=", "engram_tokenizer_compression=False"):
        assert needed in message


# ----------------------------------------------------------------------------------------------------------------------
# Names, indices, rows
# ----------------------------------------------------------------------------------------------------------------------


def test_exactly_the_memory_has_engram_in_its_name(make_model):
    model = make_model(qk_layernorm=True, engram_bias=True)
    names = set(model.state_dict()) | {name for name, _ in model.named_buffers()}
    plain = helpers.make_phi(qk_layernorm=True)
    backbone = set(plain.state_dict()) | {name for name, _ in plain.named_buffers() if "original_inv_freq" not in name}
    assert {name for name in names if "engram" not in name} == backbone
    memory = sorted(name for name in names if "engram" in name)
    per_layer = ["conv.weight", "conv_norm.weight", "gate.key_norm.weight", "gate.query_norm.weight"]
    per_layer += ["key_proj.bias", "key_proj.weight", "value_proj.bias", "value_proj.weight"]
    expected = [f"model.engram_hash.{name}" for name in ("multipliers", "offsets", "primes", "token_map")]
    expected += [f"model.engram_tables.{i}.weight" for i in (1, 2)]
    expected += [f"model.layers.{i}.engram.{name}" for i in (1, 2) for name in per_layer]
    assert memory == sorted(expected)


def test_indices_by_hand(make_model):
    """Equation 1 with Python's own integers, wrapped by hand to 64 bits."""
    model = make_model(max_ngram_size=4, engram_pad_id=3)
    constants = model.model.engram_hash
    ids = helpers.random_ids(model, 2, 9)
    indices = model.model.ngram_indices(ids)
    for layer_number, layer in enumerate(model.config.engram_layer_ids):
        multipliers = constants.multipliers[layer_number].tolist()
        for b in range(2):
            row = [3] * 3 + ids[b].tolist()
            for t in range(9):
                mix, expected = row[t + 3] * multipliers[0], []
                for order in (2, 3, 4):
                    mix ^= row[t + 4 - order] * multipliers[order - 1]
                    assert 0 <= mix < 2**63
                    expected += [mix % prime for prime in constants.primes[layer_number, order - 2].tolist()]
                assert indices[layer][b, t].tolist() == expected


def test_padding_counts_as_before_the_start(make_model):
    model = make_model()
    rows = [helpers.random_ids(model, 1, n, seed=n)[0] for n in (9, 4, 1)]
    ids, mask = helpers.left_padded(rows)
    padded = model.model.ngram_indices(ids, mask)
    for i, row in enumerate(rows):
        for layer, alone in model.model.ngram_indices(row[None]).items():
            assert alone.shape == (1, len(row), 8)
            assert torch.equal(padded[layer][i : i + 1, -len(row) :], alone)
    # And the padding's content does not matter.
    other = torch.where(mask.bool(), ids, 99)
    for layer, indices in model.model.ngram_indices(other, mask).items():
        assert torch.equal(indices[mask.bool()], padded[layer][mask.bool()])


def test_forward_reads_the_rows_that_ngram_indices_names(make_model):
    """Changing one named row changes that position; changing any row that was not named changes nothing."""
    model = make_model(engram_layer_ids=[2])
    ids = helpers.random_ids(model, 1, 6)
    before = model(ids).logits
    table, offsets = model.model.engram_tables["2"].weight, model.model.engram_hash.offsets[0]
    read = (model.model.ngram_indices(ids)[2] + offsets).flatten(0, 1)  # [T, H]
    with torch.no_grad():
        unread = torch.ones(len(table), dtype=torch.bool)
        unread[read.flatten()] = False
        assert unread.sum() > 100
        table[unread] += 1.0
        assert torch.equal(model(ids).logits, before)
        earlier = set(read[:-1].flatten().tolist())
        only_last = next(row for row in read[-1].tolist() if row not in earlier)
        table[only_last] += 1.0
    after = model(ids).logits
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_add_exactly_zero(make_model, dtype):
    model = make_model().to(dtype)
    layer = model.model.layers[1].engram
    hidden = torch.randn(2, 9, 32, dtype=dtype) * 5
    output = layer(hidden, torch.zeros(2, 9, 8, 4, dtype=dtype))
    assert output.dtype == dtype
    assert torch.equal(output, torch.zeros_like(output))
    # With a bias it is not so, which is why the default has none.
    biased = make_model(engram_bias=True).model.layers[1].engram
    assert biased(hidden.float(), torch.zeros(2, 9, 8, 4)).abs().max() > 1e-3


def test_a_fresh_memory_is_zero_where_it_must_be(make_config):
    model = PhiEngramForCausalLM(make_config())
    for name, parameter in model.named_parameters():
        if "engram_tables" in name or "engram.conv.weight" in name:
            assert not parameter.any(), name
        elif "engram" in name and "norm" in name:
            assert (parameter == 1).all(), name
        elif "engram" in name:
            assert parameter.std() > 0.01, name  # the projections: zero there too, and nothing would ever learn


def test_table_gradient_row_sparse_or_dense(make_model):
    model = make_model()
    ids = helpers.random_ids(model, 2, 7)
    tables = model.model.engram_tables
    gradients = {}
    for sparse in (False, True):
        for table in tables.values():
            table.sparse_grad = sparse
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients[sparse] = {layer: table.weight.grad for layer, table in tables.items()}
    indices = model.model.ngram_indices(ids)
    for i, layer in enumerate(tables):
        dense, sparse = gradients[False][layer], gradients[True][layer]
        assert not dense.is_sparse and sparse.is_sparse and sparse.sparse_dim() == 1
        # Same sums in another order.
        torch.testing.assert_close(sparse.to_dense(), dense, rtol=1e-5, atol=1e-7)
        named = (indices[int(layer)] + model.model.engram_hash.offsets[i]).unique()
        assert torch.equal(sparse.coalesce().indices()[0], named)
        assert dense.abs().sum(-1).count_nonzero() > 20


def test_gate_is_read_by_a_hook_and_bounded(make_model):
    model = make_model()
    seen = []
    model.model.layers[1].engram.gate.register_forward_hook(lambda module, args, output: seen.append(output))
    model(helpers.random_ids(model, 2, 5))
    (alpha,) = seen
    assert alpha.shape == (2, 5, 1) and alpha.dtype == torch.float32
    assert ((alpha > 0) & (alpha < 1)).all() and alpha.std() > 0.01


def test_conv_reaches_back_kernel_minus_one_dilations(make_config):
    layer = EngramLayer(make_config(max_ngram_size=3, engram_kernel_size=4), 1)
    with torch.no_grad():
        layer.conv.weight.normal_()
        hidden, rows = torch.randn(1, 15, 32), torch.randn(1, 15, 8, 4)
        before = layer(hidden, rows)
        rows[0, 2] += 1
        changed = (layer(hidden, rows) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 5, 8, 11]  # taps 3 apart, none ahead, none later


# ----------------------------------------------------------------------------------------------------------------------
# Numbers stay finite
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["random", "all zero", "half zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_half_precision_has_no_nan(make_model, dtype, rows, attn):
    model = make_model(attn=attn).to(dtype).train()
    with torch.no_grad():
        for table in model.model.engram_tables.values():
            if rows == "all zero":
                table.weight.zero_()
            elif rows == "half zero":
                table.weight[::2] = 0
    ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n, seed=n)[0] for n in (12, 5)])
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.logits.dtype == dtype
    assert output.logits.isfinite().all() and output.loss.isfinite()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if rows == "all zero":  # a fresh graft has to be able to learn in half precision
        assert all(table.weight.grad.any() for table in model.model.engram_tables.values())


@pytest.mark.parametrize("rows", ["random", "all zero"])
def test_autocast_has_no_nan_and_keeps_float32_parameters(make_model, rows):
    model = make_model().train()
    if rows == "all zero":
        torch.nn.init.zeros_(model.model.engram_tables["1"].weight)
    ids = helpers.random_ids(model, 2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert abs(loss - model(ids, labels=ids).loss) < 0.1


def test_gate_in_half_precision_equals_float32_for_large_hidden_states(make_model):
    """A sum of squares of 300s overflows float16; norms, score and square root are float32 inside."""
    gate = make_model().model.layers[1].engram.gate
    hidden, key = 300 * torch.randn(2, 5, 32), 300 * torch.randn(2, 5, 32)
    hidden, key = hidden.half().float(), key.half().float()
    with torch.no_grad():
        gate.key_norm.weight.copy_(gate.key_norm.weight.half())
        gate.query_norm.weight.copy_(gate.query_norm.weight.half())
        expected = gate(hidden, key)
        assert torch.equal(gate.half()(hidden.half(), key.half()), expected)


def test_gate_gradient_is_finite_where_the_score_is_zero(make_model):
    # sign(s)*sqrt(|s|) alone has an infinite slope at 0 (deepseek-ai/Engram #18: NaN when grafted).
    gate = make_model().model.layers[1].engram.gate
    for key in (torch.zeros(1, 3, 32), torch.full((1, 3, 32), 1e-20)):
        hidden, key = torch.randn(1, 3, 32, requires_grad=True), key.requires_grad_()
        alpha = gate(hidden, key)
        assert (alpha - 0.5).abs().max() < 1e-3
        alpha.sum().backward()
        assert hidden.grad.isfinite().all() and key.grad.isfinite().all()


def test_table_and_hash_stand_alone(make_config):
    # The rooms of design.md know nothing of each other.
    table = EngramTable(10, 4)
    assert table(torch.tensor([[[9, 0]]])).shape == (1, 1, 2, 4)
    constants = EngramHash(make_config())
    with torch.no_grad():
        constants.reset_buffers()
    assert constants(constants.windows(torch.tensor([[0, 0, 5, 6]]), 3)).shape == (2, 1, 2, 8)
