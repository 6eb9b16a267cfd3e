"""The backbone against its oracle, transformers' PhiForCausalLM, with and without a graft."""

import pytest
import torch
from transformers import PhiForCausalLM
from transformers.cache_utils import DynamicCache

import helpers
import phi1_engram
from phi1_engram import CACHE, PhiEngramForCausalLM

SHAPES = {
    "rotary 0.5": dict(partial_rotary_factor=0.5),
    "rotary 0.4": dict(partial_rotary_factor=0.4, hidden_size=64, intermediate_size=96),
    "rotary 1.0": dict(partial_rotary_factor=1.0, rope_theta=500.0),
    "grouped keys": dict(num_key_value_heads=2),
    "one key head": dict(num_key_value_heads=1),
    "qk_layernorm": dict(qk_layernorm=True),
    "all at once": dict(partial_rotary_factor=0.4, hidden_size=64, num_key_value_heads=2, qk_layernorm=True,
                        layer_norm_eps=1e-3, hidden_act="gelu", tie_word_embeddings=True),
}  # fmt: skip


def padded_batch(model, side):
    """Ids [2, 12], mask, and where tokens are real."""
    rows = [helpers.random_ids(model, 1, n, seed=n)[0] for n in (12, 7)]
    ids, mask = helpers.left_padded(rows)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    if side == "none":
        return ids, None, torch.ones_like(ids, dtype=torch.bool)
    return ids, mask, mask.bool()


# ----------------------------------------------------------------------------------------------------------------------
# Logits
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_phi(make_config, shape, attn):
    """Same state dict, memory present but zero: the backbone alone."""
    phi = helpers.make_phi(attn=attn, **SHAPES[shape])
    model = PhiEngramForCausalLM(make_config(**SHAPES[shape])).eval()
    model.set_attn_implementation(attn)
    missing, unexpected = model.load_state_dict(phi.state_dict(), strict=False)
    assert not unexpected and all("engram" in name for name in missing)
    with torch.no_grad():
        for side in ("none", "left", "right"):
            ids, mask, real = padded_batch(model, side)
            expected = phi(ids, attention_mask=mask).logits[real]
            assert expected.std() > 0.5
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], expected, rtol=0, atol=1e-5)
        position_ids = torch.arange(3, 15).expand(2, -1).clone()
        position_ids[1] = torch.arange(0, 24, 2)
        ids, _, _ = padded_batch(model, "none")
        expected = phi(ids, position_ids=position_ids).logits
        torch.testing.assert_close(model(ids, position_ids=position_ids).logits, expected, rtol=0, atol=1e-5)
        assert (expected - phi(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_phi_under_autocast(make_config, shape, dtype, attn):
    """Bit for bit: rounded to half precision in the same places."""
    phi = helpers.make_phi(attn=attn, **SHAPES[shape])
    model = PhiEngramForCausalLM(make_config(**SHAPES[shape])).eval()
    model.set_attn_implementation(attn)
    model.load_state_dict(phi.state_dict(), strict=False)
    ids, mask, real = padded_batch(model, "left")
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = phi(ids, attention_mask=mask).logits[real]
        assert torch.equal(model(ids, attention_mask=mask).logits[real], expected)
    with torch.no_grad():
        assert not torch.equal(phi(ids, attention_mask=mask).logits[real], expected)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_untrained_graft_changes_no_bit(tmp_path, shape, attn):
    """Opened from the folder of a plain Phi, the graft's logits are Phi's own."""
    helpers.save_phi(tmp_path, vocab_size=320, **SHAPES[shape])
    phi = PhiForCausalLM.from_pretrained(tmp_path, attn_implementation=attn)
    model = PhiEngramForCausalLM.from_pretrained(
        tmp_path, attn_implementation=attn, engram_layer_ids=[0, 2], engram_vocab_size=[211, 307],
        engram_tokenizer_compression=False,
    )  # fmt: skip
    assert not model.training and model.config.engram_layer_ids == [0, 2]
    with torch.no_grad():
        for side in ("none", "left", "right"):
            ids, mask, _ = padded_batch(model, side)
            expected = phi(ids, attention_mask=mask).logits
            assert torch.equal(model(ids, attention_mask=mask).logits, expected)
        # And step by step, with each one's own cache.
        ids, _, _ = padded_batch(model, "none")
        ours, theirs = DynamicCache(config=model.config), DynamicCache(config=phi.config)
        for step in (ids[:, :7], ids[:, 7:8], ids[:, 8:9]):
            expected = phi(step, **{CACHE: theirs}).logits
            assert torch.equal(model(step, **{CACHE: ours}).logits, expected)


def test_graft_on_a_published_style_folder(phi_folder, tokenizer):
    """Nulls in config.json, compression with the tokenizer, half precision: still no bit of difference."""
    for dtype in (torch.float32, torch.float16):
        phi = PhiForCausalLM.from_pretrained(phi_folder, dtype=dtype)
        model = PhiEngramForCausalLM.from_pretrained(
            phi_folder, dtype=dtype, engram_layer_ids=[1], engram_vocab_size=[997, 997], tokenizer=tokenizer
        )
        ids = tokenizer("def print_prime(n):\n    return n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, phi(ids).logits)
        assert model.generation_config.eos_token_id == 50256
        assert model.model.engram_hash.token_map.dtype == torch.long


def test_a_trained_memory_changes_the_backbones_input_not_the_backbone(make_model):
    """What the memory adds comes before attention and MLP: feeding Phi h + Y by hand gives the same."""
    model = make_model(engram_layer_ids=[0])
    ids = helpers.random_ids(model, 2, 9)
    added = []
    model.model.layers[0].engram.register_forward_hook(lambda module, args, output: added.append(output))
    with torch.no_grad():
        expected = model(ids).logits
        phi = helpers.make_phi()
        phi.load_state_dict(helpers.phi_state_dict(model))
        logits = phi(inputs_embeds=model.model.embed_tokens(ids) + added[0]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert added[0].abs().max() > 0.1


# Eager attention adds the mask to the scores, in transformers too, so there a mask of bools makes no sense.
@pytest.mark.parametrize(("attn", "kind"), [("eager", "float"), ("sdpa", "float"), ("sdpa", "bool")])
def test_a_prepared_mask_says_what_is_padding(make_model, kind, attn):
    """A mask [B, 1, T, S] as some callers prepare it: the memory recovers from it which tokens are real."""
    model = make_model(attn=attn)
    ids, mask, real = padded_batch(model, "left")
    attend = real[:, None, None, :] & torch.ones(12, 12).tril().bool()
    prepared = attend if kind == "bool" else torch.zeros(attend.shape).masked_fill(~attend, torch.finfo().min)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        logits = model(ids, attention_mask=prepared).logits
        torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
        cache, steps = DynamicCache(config=model.config), []
        for start, end in ((0, 7), (7, 8), (8, 12)):
            part = prepared[:, :, start:end, :end]
            steps.append(model(ids[:, start:end], attention_mask=part, **{CACHE: cache}).logits)
        torch.testing.assert_close(torch.cat(steps, dim=1)[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.skipif(CACHE != "cache", reason="the cache has but one name in this transformers")
def test_the_old_name_of_the_cache_warns_as_in_transformers(make_model, recwarn):
    model = make_model()
    ids = helpers.random_ids(model, 1, 6)
    with torch.no_grad():
        expected = model(ids, cache=DynamicCache(config=model.config)).logits
        model.generate(ids, max_new_tokens=2)
        assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]
        for each in (model, model.model):
            cache = DynamicCache(config=model.config)
            with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
                output = each(ids, past_key_values=cache)
            assert output.cache is cache and cache.get_seq_length() == 6
        assert torch.equal(model.lm_head(output.last_hidden_state), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Outputs on request
# ----------------------------------------------------------------------------------------------------------------------


def test_hidden_states_and_attentions_equal_phi(make_config):
    phi = helpers.make_phi()
    model = PhiEngramForCausalLM(make_config()).eval()
    model.set_attn_implementation("eager")
    model.load_state_dict(phi.state_dict(), strict=False)
    ids = helpers.random_ids(model, 2, 9)
    with torch.no_grad():
        ours = model(ids, output_hidden_states=True, output_attentions=True)
        theirs = phi(ids, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name)) == (5 if name == "hidden_states" else 4)
        for a, b in zip(getattr(ours, name), getattr(theirs, name)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    plain = model(ids)
    assert plain.hidden_states is None and plain.attentions is None


def test_tuple_and_logits_to_keep(make_model):
    model = make_model()
    ids = helpers.random_ids(model, 2, 9)
    with torch.no_grad():
        output = model(ids, labels=ids)
        loss, logits, *_ = model(ids, labels=ids, return_dict=False)
        assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
        for keep, expected in ((1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([0, 4]), [0, 4])):
            torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, output.logits[:, expected])


# ----------------------------------------------------------------------------------------------------------------------
# inputs_embeds
# ----------------------------------------------------------------------------------------------------------------------


def test_inputs_embeds_alone_is_an_error_that_says_why(make_model):
    model = make_model()
    embeds = model.model.embed_tokens(helpers.random_ids(model, 2, 6))
    for call in (
        lambda: model(inputs_embeds=embeds), lambda: model.generate(inputs_embeds=embeds, max_new_tokens=2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="Falta input_ids: la memoria Engram se consulta con los tokens"):
            call()


def test_inputs_embeds_beside_ids(make_model):
    model = make_model()
    ids = helpers.random_ids(model, 2, 6)
    embeds = model.model.embed_tokens(ids).detach()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids, inputs_embeds=embeds).logits, expected)
        # Both are read: other vectors, or other ids beside the same vectors, give other logits.
        assert (model(ids, inputs_embeds=embeds * 0.5).logits - expected).abs().max() > 0.1
        assert (model(ids.flip(1), inputs_embeds=embeds).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("kw", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_inputs_embeds_beside_ids_through_generate(make_model, kw):
    model = make_model()
    ids = helpers.random_ids(model, 2, 6)
    kw = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, **kw)
    embeds = model.model.embed_tokens(ids).detach()
    expected = model.generate(ids, **kw)
    ours = model.generate(ids, inputs_embeds=embeds, **kw)
    assert torch.equal(ours.sequences, expected.sequences)
    for a, b in zip(ours.logits, expected.logits):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    other = model.generate(ids, inputs_embeds=embeds.flip(-1), **kw)
    assert (other.logits[0] - expected.logits[0]).abs().max() > 0.1


def test_inputs_embeds_beside_ids_over_turns_of_a_chat(make_model):
    """A cache kept by the caller: `generate` takes the whole conversation, and feeds what is new of both."""
    model = make_model()
    ids = helpers.random_ids(model, 2, 9)
    embeds = model.model.embed_tokens(ids).detach()
    kw = dict(max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        cache = model(ids[:, :5]).get(CACHE)
        assert torch.equal(model.generate(ids, inputs_embeds=embeds, **{CACHE: cache}, **kw), model.generate(ids, **kw))


@pytest.mark.parametrize("wrong", [-1, -2, -100, 320, 50256])
def test_ids_that_are_no_tokens(make_model, wrong):
    model = make_model()
    ids = helpers.random_ids(model, 2, 6)
    embeds = model.model.embed_tokens(ids).detach()
    ids[1, 3] = wrong
    for call in (
        lambda: model(ids), lambda: model(ids, inputs_embeds=embeds), lambda: model.model.ngram_indices(ids),
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: model.generate(ids, inputs_embeds=embeds, max_new_tokens=2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"input_ids tiene {wrong}, que no es un token: van de 0 a .*=319"):
            call()


@pytest.mark.parametrize("length", [1, 5, 7])
def test_ids_and_vectors_of_different_lengths(make_model, length):
    model = make_model()
    embeds = model.model.embed_tokens(helpers.random_ids(model, 2, 6)).detach()
    ids = helpers.random_ids(model, 2, length)
    for call in (
        lambda: model(ids, inputs_embeds=embeds),
        lambda: model.generate(ids, inputs_embeds=embeds, max_new_tokens=2),
        lambda: model.generate(ids, inputs_embeds=embeds, max_new_tokens=2, use_cache=False),
        lambda: model(ids[:1].expand(3, -1), inputs_embeds=embeds[:, :length]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"hace falta un token por vector"):
            call()


# ----------------------------------------------------------------------------------------------------------------------
# Loss and gradients
# ----------------------------------------------------------------------------------------------------------------------


def test_loss_equals_transformers(make_config):
    phi = helpers.make_phi()
    model = PhiEngramForCausalLM(make_config()).eval()
    model.set_attn_implementation("eager")
    model.load_state_dict(phi.state_dict(), strict=False)
    ids, mask, real = padded_batch(model, "left")
    labels = ids.masked_fill(~real, -100)
    labels[0, 3:6] = -100
    for kw in ({}, {"num_items_in_batch": torch.tensor(31)}):
        ours = model(ids, attention_mask=mask, labels=labels, **kw).loss
        theirs = phi(ids, attention_mask=mask, labels=labels, **kw).loss
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    # The same by hand: the mean over the positions whose next token counts.
    logits, target = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1), labels[:, 1:]
    counted = target != -100
    by_hand = -logits[counted].gather(-1, target[counted][:, None]).mean()
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=labels).loss, by_hand, rtol=0, atol=1e-5)


def test_accumulation_over_unequal_batches_is_exact(make_model):
    """Two batches, 11 and 4 counted tokens: with num_items_in_batch the gradients of one batch of both."""
    model = make_model()
    ids, mask, real = padded_batch(model, "right")
    labels = ids.masked_fill(~real, -100)
    labels[1, 5:] = -100
    counted = (labels[:, 1:] != -100).sum()
    assert counted == 11 + 4

    def gradients(parts, **kw):
        model.zero_grad()
        for part in parts:
            model(ids[part], attention_mask=mask[part], labels=labels[part], **kw).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients([slice(0, 2)])
    ours = gradients([slice(0, 1), slice(1, 2)], num_items_in_batch=counted)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
    naive = gradients([slice(0, 1), slice(1, 2)])
    assert (naive["lm_head.weight"] / 2 - expected["lm_head.weight"]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "memory alone"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, monkeypatch, reentrant, sparse, frozen):
    model = make_model().train()
    ids, mask, real = padded_batch(model, "left")
    labels = ids.masked_fill(~real, -100)
    for table in model.model.engram_tables.values():
        table.sparse_grad = sparse
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not frozen or "engram" in name  # frozen: phase 1 of training
    calls = []
    forward = phi1_engram.PhiAttention.forward
    monkeypatch.setattr(
        phi1_engram.PhiAttention, "forward", lambda self, *args, **kw: calls.append(1) or forward(self, *args, **kw)
    )

    def gradients():
        calls.clear()
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss, {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.requires_grad}

    loss, expected = gradients()
    assert len(calls) == 4
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, ours = gradients()
    assert len(calls) == 8  # it does recompute
    assert torch.equal(loss, again)
    # A cache would be written a second time by the recomputation, so none is made.
    assert model(ids, attention_mask=mask, use_cache=True).get(CACHE) is None
    assert ours.keys() == expected.keys() and any("engram_tables" in name for name in ours)
    for name in expected:
        assert expected[name].any(), name
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_gradient_checkpointing_over_a_filled_cache_is_refused(make_model):
    model = make_model()
    ids = helpers.random_ids(model, 1, 9)
    cache = model(ids[:, :5]).get(CACHE)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="no se puede entrenar sobre una caché que ya tiene tokens"):
        model(ids[:, 5:], **{CACHE: cache})
    with torch.no_grad():  # nothing is recomputed here
        assert model(ids[:, 5:], **{CACHE: cache}).get(CACHE).get_seq_length() == 9
