"""A vocabulary that grows or shrinks: the model answers as before to the tokens that it had, and the memory stays."""

import copy

import pytest
import torch
from transformers import PhiForCausalLM

import helpers
from engram import checks
from engram.memories import load_memory, remove_memory, save_memory
from phi1_engram import PhiEngramForCausalLM, hash_multipliers

SIZES = pytest.mark.parametrize("size", [300, 321, 400])


def resized(model, size, **kw):
    model = copy.deepcopy(model)
    torch.manual_seed(3)
    model.resize_token_embeddings(size, **kw)
    return model


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@SIZES
def test_what_was_there_stays(make_model, size):
    model = make_model()
    before, constants = copy.deepcopy(model), model.model.engram_hash
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size == model.lm_head.out_features == len(constants.token_map)
    kept = min(size, 320)
    ids = helpers.random_ids(model, 2, 20) % kept
    # Sums of a product with more columns are rounded otherwise.
    torch.testing.assert_close(logits(model, ids)[..., :kept], logits(before, ids)[..., :kept], rtol=0, atol=1e-5)
    for layer, indices in before.model.ngram_indices(ids).items():
        assert torch.equal(model.model.ngram_indices(ids)[layer], indices)
    # Odd multipliers of another vocabulary would be others.
    assert torch.equal(constants.multipliers, hash_multipliers(model.config, 320))
    assert not torch.equal(constants.multipliers, hash_multipliers(model.config, size))
    assert torch.equal(constants.token_map, torch.arange(size))
    assert model.generate(ids, max_new_tokens=4).shape == (2, 24)


def test_new_tokens_have_ids_of_their_own_after_the_last(tokenizer):
    model = helpers.make_model(
        vocab_size=51200, num_hidden_layers=2, engram_layer_ids=[1], engram_tokenizer_compression=True,
        tokenizer=tokenizer,
    )  # fmt: skip
    before = model.model.engram_hash.token_map
    model.resize_token_embeddings(51203, pad_to_multiple_of=64)
    after, last = model.model.engram_hash.token_map, int(before.max())
    assert len(after) == 51264 and torch.equal(after[:51200], before)
    assert torch.equal(after[51200:], torch.arange(last + 1, last + 65))
    ids = torch.tensor([[5, 51200, 6], [5, 51201, 6], [5, 50256, 6]])
    indices = model.model.ngram_indices(ids)[1][:, 1]
    assert len(indices.unique(dim=0)) == 3
    assert logits(model, ids).isfinite().all()
    # Phi-1's rows without a token need no resizing: they are addressed like the pad token.
    spare = copy.deepcopy(tokenizer)
    spare.add_tokens(["<|uno|>", "<|dos|>"])
    assert checks.check_projection(spare)(model, ids)[:2] == (0.0, 0.0)
    model.model.engram_hash.token_map[50294] += 1
    assert checks.check_projection(spare)(model, ids)[:2] == (1.0, 0.0)


@SIZES
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_opened_again(make_model, tmp_path, size, tied):
    model = resized(make_model(attn="sdpa", tie_word_embeddings=tied), size)
    model.save_pretrained(tmp_path)
    ids = helpers.random_ids(model, 2, 20)
    assert ids.max() >= 290
    for place in ("ram", "disco"):
        again = PhiEngramForCausalLM.from_pretrained(tmp_path, engram_storage=place)
        assert torch.equal(logits(again, ids), logits(model, ids))
        for name, buffer in model.model.engram_hash.named_buffers():
            assert torch.equal(again.get_buffer(f"model.engram_hash.{name}"), buffer), name


@SIZES
def test_an_untrained_graft_stays_exact(tmp_path, size):
    helpers.save_phi(tmp_path, vocab_size=320)
    kw = dict(engram_layer_ids=[0, 2], engram_vocab_size=[211, 307], engram_tokenizer_compression=False)
    model = resized(PhiEngramForCausalLM.from_pretrained(tmp_path, **kw), size)
    phi = resized(PhiForCausalLM.from_pretrained(tmp_path), size)
    ids = helpers.random_ids(phi, 2, 20)
    assert torch.equal(logits(model, ids), logits(phi, ids))


def test_it_learns_new_tokens(make_model):
    model = resized(make_model(), 330).train()
    ids = torch.tensor([[5, 329, 6, 329]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[329].any() and model.lm_head.weight.grad[329].any()


def test_the_pad_token_cannot_be_lost(make_model):
    model = make_model(engram_pad_id=310)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kw in (dict(new_num_tokens=310), dict(new_num_tokens=290, pad_to_multiple_of=2)):
        with pytest.raises(ValueError, match="se perdería engram_pad_id=310.* el menor tamaño es 311"):
            model.resize_token_embeddings(**kw)
    assert model.config.vocab_size == 320
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.resize_token_embeddings(290, pad_to_multiple_of=64)  # 320
    model.resize_token_embeddings(311)
    assert len(model.model.engram_hash.token_map) == 311
    assert model.resize_token_embeddings() is model.model.embed_tokens


# ----------------------------------------------------------------------------------------------------------------------
# Memories that travel
# ----------------------------------------------------------------------------------------------------------------------


def test_a_memory_saved_before_the_vocabulary_grew(make_model, tmp_path):
    model = make_model()
    save_memory(model, tmp_path)
    grown = resized(model, 333)
    ids = helpers.random_ids(grown, 2, 20)
    expected = logits(grown, ids)
    remove_memory(grown)
    assert not torch.equal(logits(grown, ids), expected)
    load_memory(grown, tmp_path)
    assert torch.equal(logits(grown, ids), expected)
    with torch.no_grad():
        grown.model.embed_tokens.weight[:320].neg_()  # the tokens that were there are others
    with pytest.raises(ValueError, match="sobre otro Phi"):
        load_memory(grown, tmp_path)


@pytest.mark.parametrize("compressed", [False, True], ids=["raw ids", "compressed"])
def test_a_memory_of_a_larger_vocabulary_says_so(make_model, tmp_path, tokenizer, compressed):
    kw = {}
    if compressed:
        kw = dict(vocab_size=51200, tokenizer=tokenizer, num_hidden_layers=2, engram_layer_ids=[1])
    model = make_model(engram_tokenizer_compression=compressed, engram_pad_id=7, **kw)
    size = model.config.vocab_size
    save_memory(model, tmp_path / "before")
    shrunk = resized(model, size - 900 if compressed else 300)  # ids without a token, or tokens
    before = {name: tensor.clone() for name, tensor in shrunk.state_dict().items()}
    with pytest.raises(ValueError, match=f"de {size} tokens, y este modelo tiene .* carga la memoria antes"):
        load_memory(shrunk, tmp_path / "before")
    assert all(torch.equal(tensor, before[name]) for name, tensor in shrunk.state_dict().items())
    save_memory(resized(model, size + 5), tmp_path / "grown")
    with pytest.raises(ValueError, match=f"de {size + 5} tokens, y este modelo tiene {size}"):
        load_memory(model, tmp_path / "grown")
