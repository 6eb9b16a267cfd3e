"""Several texts in one row, told apart by positions that begin again: each as if it were alone.

The reference is the same text alone; plain Phi, which has no memory to leak, sets how near that is.
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

import helpers
import phi1_engram
from phi1_engram import CACHE
from test_generation import BACKEND, fresh_compiler  # noqa: F401

ATOL = 1e-4
ROWS = [(7, 1, 2, 14), (10, 3, 11)]  # lengths of the texts in each row of 24 tokens


def packed(model, rows=ROWS):
    """Texts per row, their ids [B, T], and positions [B, T] that begin again with each."""
    texts = [
        [helpers.random_ids(model, 1, n, seed=10 * i + j)[0] for j, n in enumerate(row)] for i, row in enumerate(rows)
    ]
    positions = torch.stack([torch.cat([torch.arange(len(text)) for text in row]) for row in texts])
    return texts, torch.stack([torch.cat(row) for row in texts]), positions


def alone(model, texts):
    """Logits [B, T, V] of each text by itself."""
    return torch.stack([torch.cat([model(text[None], use_cache=False).logits[0] for text in row]) for row in texts])


def block_mask(positions, dtype=torch.float32):
    """Mask [B, 1, T, T] in which each text sees itself alone: with a cache, transformers does not look for them."""
    text = (positions == 0).cumsum(-1)
    attend = (text[:, :, None] == text[:, None]) & torch.ones(text.shape[1], text.shape[1]).tril().bool()
    return torch.zeros(attend.shape, dtype=dtype).masked_fill(~attend, torch.finfo(dtype).min)[:, None]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "kw",
    [{}, dict(max_ngram_size=2), dict(max_ngram_size=5), dict(engram_kernel_size=1), dict(engram_layer_ids=[3, 0]),
     dict(engram_bias=True)],
    ids=str,
)  # fmt: skip
def test_each_text_is_as_it_is_alone(make_model, attn, kw):
    model, phi = make_model(attn=attn, **kw), helpers.make_phi(attn=attn)
    texts, ids, positions = packed(model)
    with torch.no_grad():
        for each in (phi, model):
            logits = each(ids, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(logits, alone(each, texts), rtol=0, atol=ATOL)
        # The memory does look back where positions go on.
        assert (model(ids, use_cache=False).logits - logits).abs().max() > 0.1
        one = model(ids[:1], position_ids=positions[:1], use_cache=False).logits
        torch.testing.assert_close(one, logits[:1], rtol=0, atol=ATOL)


def test_indices_begin_again(make_model):
    model = make_model(max_ngram_size=4)
    texts, ids, positions = packed(model)
    for start in (0, 5):  # from 0 or from elsewhere, down to where they were or not
        for layer, indices in model.model.ngram_indices(ids, position_ids=positions + start).items():
            expected = [torch.cat([model.model.ngram_indices(text[None])[layer][0] for text in row]) for row in texts]
            assert torch.equal(indices, torch.stack(expected))


def test_padding_between_texts(make_model):
    """Rows of packed texts, padded on either side: padding has position 0, as `generate` counts it, or another."""
    model = make_model(attn="sdpa")
    texts, ids, positions = packed(model)
    with torch.no_grad():
        expected = alone(model, texts)
        for pad_position in (0, 1, 500):
            padding = torch.full((2, 3), 7), torch.full((2, 3), pad_position), torch.zeros(2, 3, dtype=torch.long)
            parts = ids, positions, torch.ones_like(ids)
            for i in (0, 10, 24):
                wide, places, mask = (torch.cat([x[:, :i], y, x[:, i:]], dim=1) for x, y in zip(parts, padding))
                if i == 10:  # where the second row's second text begins; the first row's last text goes on
                    wide, places, mask = wide[1:], places[1:], mask[1:]
                real = mask.bool()
                text = (places == 0).cumsum(-1)
                attend = (text[:, None] == text[..., None]) & torch.ones(27, 27).tril().bool()
                attend &= real[:, None] & real[..., None]
                logits = model(wide, attention_mask=attend[:, None], position_ids=places, use_cache=False).logits
                torch.testing.assert_close(logits[real], expected[-len(wide) :].flatten(0, 1), rtol=0, atol=ATOL)


def test_in_bfloat16(make_model):
    """Rounding differs with the length of a product, in plain Phi as well: no more than twice its difference."""
    differences = []
    for model in (helpers.make_phi(attn="sdpa").bfloat16(), make_model(attn="sdpa").bfloat16()):
        texts, ids, positions = packed(model)
        with torch.no_grad():
            logits = model(ids, position_ids=positions, use_cache=False).logits
            differences.append((logits - alone(model, texts)).abs().max())
    assert differences[1] <= max(2 * differences[0], 2**-4)


def test_gradients_are_the_texts_own(make_model):
    model = make_model(attn="sdpa").train()
    texts, ids, positions = packed(model)
    labels = ids.masked_fill(positions == 0, -100)

    def gradients(run):
        model.zero_grad()
        run()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    def each_alone():
        for text in (text[None] for row in texts for text in row if len(text) > 1):
            model(text, labels=text, num_items_in_batch=(labels != -100).sum()).loss.backward()

    def together():
        model(
            ids, position_ids=positions, labels=labels, use_cache=False, num_items_in_batch=(labels != -100).sum()
        ).loss.backward()

    expected, ours = gradients(each_alone), gradients(together)
    for name in expected:  # sums in another order
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(together).items():
        torch.testing.assert_close(gradient, ours[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("sizes", [(24,), (8, 16), (7, 1, 2, 14), (9, 2, 1), (1,), (3,)], ids=str)
def test_in_chunks_with_a_cache(make_model, sizes):
    """What the cache holds of an earlier text is left alone, however near the border a chunk begins."""
    model = make_model(attn="sdpa")
    texts, ids, positions = packed(model)
    mask, cache = block_mask(positions), DynamicCache(config=model.config)
    start, logits, sizes = 0, [], list(sizes)
    with torch.no_grad():
        while start < 24:
            end = min(start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]), 24)
            part = model(
                ids[:, start:end], position_ids=positions[:, start:end], attention_mask=mask[:, :, start:end, :end],
                **{CACHE: cache},
            )  # fmt: skip
            logits.append(part.logits)
            start = end
        torch.testing.assert_close(torch.cat(logits, dim=1), alone(model, texts), rtol=0, atol=ATOL)


def test_flattening_collator_and_flash_attentions_lengths(make_model):
    """transformers' collator, with positions or with cumulative lengths alone."""
    model = make_model(attn="sdpa")
    (texts, _), _, _ = packed(model)
    features = [{"input_ids": text.tolist()} for text in texts]
    with torch.no_grad():
        expected = alone(model, [texts])
        lengths = dict(return_flash_attn_kwargs=True)
        for kw in ({}, lengths, dict(return_position_ids=False, **lengths)):
            batch = DataCollatorWithFlattening(**kw)(features, return_tensors="pt")
            logits = model(**batch, use_cache=False).logits
            torch.testing.assert_close(logits, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("card", [False, True], ids=["looked", "as on a card"])
def test_ordinary_positions_change_no_bit(make_model, monkeypatch, card):
    model = make_model()
    ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n, seed=n)[0] for n in (24, 15)])
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    calls = []
    reach = phi1_engram.text_reach

    def spy(*args):
        with monkeypatch.context() as patch:
            if card:  # where a look is a wait, nobody looks
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            calls.append(reach(*args))
        return calls[-1]

    monkeypatch.setattr(phi1_engram, "text_reach", spy)
    with torch.no_grad():
        logits = model(ids[:1]).logits
        padded = model(ids, attention_mask=mask).logits
        assert not calls  # without positions nothing is computed
        assert torch.equal(model(ids[:1], position_ids=torch.arange(24)[None]).logits, logits)
        assert (calls[-1] is None) != card
        assert torch.equal(model(ids, attention_mask=mask, position_ids=places).logits[0], padded[0])
        # The second row's angles are others, and round otherwise.
        counted = model(ids, attention_mask=mask, position_ids=places).logits[1, 9:]
        torch.testing.assert_close(counted, padded[1, 9:], rtol=0, atol=ATOL)
        calls.clear()
        model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        assert len(calls) == 5 and all((call is None) != card for call in calls)


def test_compiled_as_one_graph(make_model, fresh_compiler):  # noqa: F811
    model = make_model(attn="sdpa", num_hidden_layers=1, engram_layer_ids=[0])
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    texts, ids, positions = packed(model)
    with torch.no_grad():
        logits = compiled(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(logits, alone(model, texts), rtol=0, atol=ATOL)
