"""State between steps: whatever way tokens reach the model, the result is that of recomputing everything.

The reference is a loop over full forward passes without any cache. Tokens have to be equal, logits within 1e-4.
"""

import copy
import shutil

import pytest
import torch
from transformers import DynamicCache, StaticCache

import helpers
import phi1_engram
from phi1_engram import CACHE

ATOL = 1e-4
BOTH = pytest.mark.parametrize("attn", ["eager", "sdpa"])
CACHES = pytest.mark.parametrize("cache_kind", ["dynamic", "static"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def reference_greedy(model, ids, new_tokens):
    """ids [1, T] -> tokens [1, T + new_tokens], logits [1, new_tokens, V], each step from scratch."""
    logits = []
    for _ in range(new_tokens):
        logits.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, torch.stack(logits, dim=1)


def make_cache(model, kind, length=64):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


def feed(model, ids, cache, sizes, mask=None):
    """Feed ids [B, T] in chunks of `sizes` (the last one repeats) -> logits [B, T, V]."""
    start, logits, sizes = 0, [], list(sizes)
    while start < ids.shape[1]:
        end = min(start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]), ids.shape[1])
        kw = {} if mask is None else {"attention_mask": mask[:, :end]}
        # The name of the argument up to transformers 5.23; the others here have its newest.
        logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **kw).logits)
        start = end
    return torch.cat(logits, dim=1)


def generate(model, ids, **kw):
    return model.generate(ids, **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **kw})


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=ATOL)


# ----------------------------------------------------------------------------------------------------------------------
# Ways of decoding
# ----------------------------------------------------------------------------------------------------------------------


@BOTH
@CACHES
@pytest.mark.parametrize("length", [1, 2, 11])
def test_greedy(make_model, attn, cache_kind, length):
    model = make_model(attn=attn)
    ids = helpers.random_ids(model, 1, length)
    expected, logits = reference_greedy(model, ids, 16)
    kw = {"cache_implementation": "static"} if cache_kind == "static" else {}
    output = generate(model, ids, max_new_tokens=16, **kw)
    assert torch.equal(output.sequences, expected)
    assert_close(torch.stack(output.logits, dim=1), logits)


@pytest.mark.parametrize(
    "kw",
    [dict(max_ngram_size=2), dict(max_ngram_size=5), dict(engram_kernel_size=1), dict(engram_kernel_size=2),
     dict(engram_layer_ids=[0]), dict(engram_layer_ids=[3, 0, 1]), dict(engram_layer_ids=[0, 1, 2, 3]),
     dict(engram_bias=True), dict(num_key_value_heads=2), dict(engram_pad_id=9)],
    ids=str,
)  # fmt: skip
def test_greedy_of_other_shapes(make_model, kw):
    model = make_model(**kw)
    ids = helpers.random_ids(model, 1, 5)
    expected, _ = reference_greedy(model, ids, 20)
    assert torch.equal(generate(model, ids, max_new_tokens=20).sequences, expected)
    # Looking up the prompt cuts the cache back, and that reaches every one of its states.
    ids = ids.repeat(1, 4)
    expected, _ = reference_greedy(model, ids, 10)
    assert torch.equal(generate(model, ids, max_new_tokens=10, prompt_lookup_num_tokens=4).sequences, expected)


@pytest.mark.parametrize(
    "kw",
    [{}, dict(num_beams=4, num_return_sequences=2), dict(prompt_lookup_num_tokens=4),
     dict(cache_implementation="static")],
    ids=str,
)  # fmt: skip
def test_memory_switched_off_is_plain_phi(make_model, kw):
    from transformers import PhiConfig, PhiForCausalLM

    model = make_model()
    phi = PhiForCausalLM(PhiConfig(**helpers.plain_fields(model.config))).eval()
    phi.set_attn_implementation("eager")
    phi.load_state_dict(helpers.phi_state_dict(model))
    ids = helpers.random_ids(model, 1, 5).repeat(1, 3)
    with_memory = model(ids).logits
    model.model.use_memory = False
    assert torch.equal(model(ids).logits, phi(ids).logits)
    ours, theirs = (generate(each, ids, max_new_tokens=12, pad_token_id=0, **kw) for each in (model, phi))
    assert torch.equal(ours.sequences, theirs.sequences)
    model.model.use_memory = True
    assert torch.equal(model(ids).logits, with_memory)


@pytest.mark.parametrize(
    "kw",
    [dict(do_sample=True, top_k=0), dict(do_sample=True, temperature=0.7, top_p=0.9),
     dict(do_sample=True, num_return_sequences=3), dict(num_beams=4), dict(num_beams=4, num_return_sequences=4),
     dict(num_beams=4, do_sample=True, num_return_sequences=2), dict(repetition_penalty=1.3)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_sampling_beams_and_several_sequences(make_model, kw, cache):
    """Against generate itself without a cache; two prompts, the second left-padded."""
    model = make_model()
    ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n, seed=n)[0] for n in (8, 3)])
    kw = dict(attention_mask=mask, max_new_tokens=12, pad_token_id=0, **kw)
    torch.manual_seed(5)
    expected = generate(model, ids, use_cache=False, **kw)
    assert expected.get(CACHE) is None
    torch.manual_seed(5)
    output = generate(model, ids, **cache, **kw)
    assert torch.equal(output.sequences, expected.sequences)
    assert_close(torch.stack(output.logits), torch.stack(expected.logits))
    rows = output.sequences[:, 8:]
    assert len(rows.unique(dim=0)) == len(rows)  # several answers, not one several times


@BOTH
@CACHES
def test_left_padded_rows_equal_each_row_alone(make_model, attn, cache_kind):
    model = make_model(attn=attn)
    rows = [helpers.random_ids(model, 1, n, seed=n)[0] for n in (13, 1, 6, 2)]
    kw = {"cache_implementation": "static"} if cache_kind == "static" else {}
    for pad in (7, 0):
        ids, mask = helpers.left_padded(rows, pad)
        output = generate(model, ids, attention_mask=mask, max_new_tokens=14, **kw)
        for i, row in enumerate(rows):
            expected, logits = reference_greedy(model, row[None], 14)
            assert torch.equal(output.sequences[i, -14:], expected[0, -14:])
            assert_close(torch.stack([step[i] for step in output.logits]), logits[0])


def test_every_position_of_a_left_padded_row(make_model):
    model = make_model()
    rows = [helpers.random_ids(model, 1, n, seed=n)[0] for n in (13, 1, 6)]
    ids, mask = helpers.left_padded(rows)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        assert_close(logits[i, -len(row) :], model(row[None]).logits[0])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize(
    "kw", [{}, dict(num_beams=3), dict(prompt_lookup_num_tokens=3), dict(cache_implementation="static")], ids=str
)
def test_a_model_in_training_generates_the_same(make_model, kw, reentrant):
    """Gradient checkpointing recomputes where there are gradients, and `generate` has none (all dropouts are 0)."""
    model = make_model()
    ids = helpers.random_ids(model, 2, 6).repeat(1, 2)[: 1 if "prompt_lookup_num_tokens" in kw else 2]
    expected = generate(model, ids, max_new_tokens=12, pad_token_id=0, **kw).sequences
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(generate(model, ids, max_new_tokens=12, pad_token_id=0, **kw).sequences, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Prefill in chunks
# ----------------------------------------------------------------------------------------------------------------------


@CACHES
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (7,), (1, 50), (1, 2, 9), (12, 1), (9, 20)], ids=str)
def test_prefill_in_chunks(make_model, sizes, padded, cache_kind):
    model = make_model()
    if padded:  # one row begins within a later chunk, one at the border, one with its last token
        rows = [helpers.random_ids(model, 1, n, seed=n)[0] for n in (22, 14, 21, 1)]
        ids, mask = helpers.left_padded(rows)
    else:
        ids, mask = helpers.random_ids(model, 2, 22), None
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    logits = feed(model, ids, make_cache(model, cache_kind), sizes, mask)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert_close(logits[real], expected[real])


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_generate_prefills_in_chunks(make_model, size, attn):
    model = make_model(attn=attn)
    rows = [helpers.random_ids(model, 1, n, seed=n)[0] for n in (15, 6)]
    ids, mask = helpers.left_padded(rows)
    output = generate(model, ids, attention_mask=mask, max_new_tokens=8, prefill_chunk_size=size)
    for i, row in enumerate(rows):
        expected, logits = reference_greedy(model, row[None], 8)
        assert torch.equal(output.sequences[i, -8:], expected[0, -8:])
        assert_close(torch.stack([step[i] for step in output.logits]), logits[0])


# ----------------------------------------------------------------------------------------------------------------------
# Drafting: tokens are tried and some are taken back
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def crops(monkeypatch):
    """How many tokens each crop of a cache took back."""
    seen, crop = [], DynamicCache.crop

    def spy(self, *args):
        before = self.get_seq_length()
        crop(self, *args)
        seen.append(before - self.get_seq_length())

    monkeypatch.setattr(DynamicCache, "crop", spy)
    return seen


@BOTH
@pytest.mark.parametrize("start", [3, 20], ids=["short prompt", "long prompt"])
def test_prompt_lookup(make_model, crops, attn, start):
    model = make_model(attn=attn)
    ids = helpers.random_ids(model, 1, start).repeat(1, 3)
    expected, logits = reference_greedy(model, ids, 24)
    output = generate(model, ids, max_new_tokens=24, prompt_lookup_num_tokens=5)
    assert torch.equal(output.sequences, expected)
    assert_close(torch.stack(output.logits, dim=1), logits)
    assert max(crops) >= 3  # guesses were taken back, so the state had to be cut


def assistants(model):
    """Who drafts: one that is always right, one sometimes, one never, and a plain Phi."""
    similar = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in similar.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    drafters = {
        "the same": copy.deepcopy(model), "similar": similar, "another": helpers.make_model(seed=9),
        "plain Phi": helpers.make_phi(seed=9),
    }  # fmt: skip
    for drafter in drafters.values():  # five tokens each time, however unsure
        drafter.generation_config.num_assistant_tokens = 5
        drafter.generation_config.num_assistant_tokens_schedule = "constant"
        drafter.generation_config.assistant_confidence_threshold = 0
    return drafters


@BOTH
@pytest.mark.parametrize("who", ["the same", "similar", "another", "plain Phi"])
def test_assistant_model(make_model, crops, attn, who):
    model = make_model(attn=attn)
    ids = helpers.random_ids(model, 1, 7)
    expected, logits = reference_greedy(model, ids, 24)
    output = generate(model, ids, max_new_tokens=24, assistant_model=assistants(model)[who])
    assert torch.equal(output.sequences, expected)
    assert_close(torch.stack(output.logits, dim=1), logits)
    # The drafter's cache is cut too, by one token at most where all guesses were right.
    assert (max(crops) >= 4) == (who != "the same")


@pytest.mark.parametrize("layers", [[1, 2], [0, 3], [3]], ids=str)
@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_early_exit(make_model, layers, exit_layer):
    """The model drafts with its own first layers; those of the memory above them are neither read nor written."""
    model = make_model(engram_layer_ids=layers)
    ids = helpers.random_ids(model, 1, 7)
    expected, logits = reference_greedy(model, ids, 24)
    output = generate(model, ids, max_new_tokens=24, assistant_early_exit=exit_layer)
    assert torch.equal(output.sequences, expected)
    assert_close(torch.stack(output.logits, dim=1), logits)
    assert model.config.num_hidden_layers == 4


def test_early_exit_leaves_the_model_whole(make_model, monkeypatch):
    model = make_model()
    ids = helpers.random_ids(model, 1, 7)
    expected = generate(model, ids, max_new_tokens=6).sequences
    for wrong in (-1, 0, 5):
        with pytest.raises(ValueError, match=f"assistant_early_exit={wrong} no es una capa: van de 1 a 4"):
            generate(model, ids, max_new_tokens=6, assistant_early_exit=wrong)
    depths, forward = [], phi1_engram.PhiEngramModel.forward

    def interrupted(self, *args, **kw):
        depths.append(self.config.num_hidden_layers)
        if depths[-1] == 2:
            raise KeyboardInterrupt
        return forward(self, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(phi1_engram.PhiEngramModel, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, max_new_tokens=6, assistant_early_exit=2)
    assert 2 in depths and torch.equal(generate(model, ids, max_new_tokens=6).sequences, expected)


def test_memory_model_assists_plain_phi(make_model):
    phi = helpers.make_phi(seed=4)
    ids = helpers.random_ids(phi, 1, 7)
    expected, _ = reference_greedy(phi, ids, 16)
    assert torch.equal(generate(phi, ids, max_new_tokens=16, assistant_model=make_model()).sequences, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Caches kept by the caller
# ----------------------------------------------------------------------------------------------------------------------


@BOTH
@CACHES
def test_a_cache_kept_over_turns_of_a_chat(make_model, attn, cache_kind):
    model = make_model(attn=attn)
    cache, ids = make_cache(model, cache_kind, 100), torch.empty(1, 0, dtype=torch.long)
    for turn, length in enumerate((9, 1, 4)):
        ids = torch.cat([ids, helpers.random_ids(model, 1, length, seed=turn)], dim=1)
        expected, logits = reference_greedy(model, ids, 7)
        output = generate(model, ids, max_new_tokens=7, **{CACHE: cache})
        assert torch.equal(output.sequences, expected)
        assert_close(torch.stack(output.logits, dim=1), logits)
        ids = output.sequences


@BOTH
@pytest.mark.parametrize("recorded", ["from the start", "later"])
def test_a_cache_cut_back(make_model, attn, recorded):
    """At most one crop after each forward pass, as far back as the first tokens; then other tokens follow."""
    model = make_model(attn=attn)
    cache = make_cache(model, "dynamic")
    if recorded == "from the start":
        cache.activate_past_recording()
    kept = helpers.random_ids(model, 2, 10)
    feed(model, kept, cache, (10,))
    cache.activate_past_recording()
    turns = [(6, 6, 6), (5, 2, 5), (1, 1, 1), (12, 11, 5), (3, 0, 3), (8, 7, 1), (4, 3, 2)]
    for turn, (fed, removed, size) in enumerate(turns):
        new = helpers.random_ids(model, 2, fed, seed=turn)
        assert_close(feed(model, new, cache, (size,)), model(torch.cat([kept, new], 1)).logits[:, -fed:])
        cache.crop(-removed)
        kept = torch.cat([kept, new[:, : fed - removed]], dim=1)
        assert cache.get_seq_length() == kept.shape[1]
    if recorded == "from the start":  # into the very first chunk, shorter than the conv's reach
        cache = make_cache(model, "dynamic")
        cache.activate_past_recording()
        feed(model, kept[:, :5], cache, (5,))
        cache.crop(-3)
        ids = torch.cat([kept[:, :2], kept[:, 6:12]], dim=1)
        assert_close(feed(model, ids[:, 2:], cache, (1,)), model(ids).logits[:, 2:])


def test_one_prefix_for_several_continuations(make_model):
    # transformers' recipe for a shared prompt: copy the cache.
    model = make_model()
    prefix = helpers.random_ids(model, 1, 9)
    cache = make_cache(model, "dynamic")
    model(prefix, **{CACHE: cache})
    for seed in range(3):
        ids = torch.cat([prefix, helpers.random_ids(model, 1, 3, seed=seed)], dim=1)
        expected, _ = reference_greedy(model, ids, 5)
        output = generate(model, ids, max_new_tokens=5, **{CACHE: copy.deepcopy(cache)})
        assert torch.equal(output.sequences, expected)


@BOTH
def test_a_static_cache_driven_by_hand_and_used_again(make_model, attn):
    model = make_model(attn=attn)
    cache = make_cache(model, "static", 40)
    for seed in range(2):
        ids = helpers.random_ids(model, 2, 12, seed=seed)
        assert_close(feed(model, ids, cache, (5, 1)), model(ids, use_cache=False).logits)
        cache.reset()


def test_a_cache_that_cannot_hold_the_memory_is_refused(make_model):
    model = make_model()
    ids = helpers.random_ids(model, 1, 4)
    plain = helpers.make_phi().config
    for cache in (DynamicCache(), DynamicCache(config=plain), StaticCache(config=plain, max_cache_len=9)):
        with pytest.raises(ValueError, match=r"Esta caché no puede guardar.* DynamicCache\(config=model.config\)"):
            model(ids, **{CACHE: cache})


def test_caches_that_transformers_makes_without_room_for_the_memory(make_model):
    """Refused before anything changes: transformers switches attention and stop token on its way to its own error."""
    model = make_model()
    ids = helpers.random_ids(model, 1, 7)
    expected, before = generate(model, ids, max_new_tokens=6).sequences, model.generation_config.to_dict()
    static = StaticCache(config=model.config, max_cache_len=20)
    for call, message in (
        (lambda: model.generate_batch([[1, 2, 3]], max_new_tokens=3), "La generación por lotes continuos"),
        (lambda: model.generate(ids, cache_implementation="paged"), "La generación por lotes continuos"),
        (lambda: model.generate(ids, cache_implementation="quantized"), 'cache_implementation="quantized" no puede'),
        (lambda: model.generate(ids, cache_implementation="offloaded"), 'cache_implementation="offloaded" no puede'),
        (lambda: model.generate(ids, cache_implementation="static", prompt_lookup_num_tokens=3), "caché estática"),
        (lambda: model.generate(ids, past_key_values=static, assistant_model=model), "assistant_model no va con"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert model.config._attn_implementation == "eager" and model.generation_config.to_dict() == before
        assert torch.equal(generate(model, ids, max_new_tokens=6).sequences, expected)


def test_rows_padded_on_the_right_are_refused(make_model):
    model = make_model()
    ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n, seed=n)[0] for n in (9, 4)], pad=0)
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0).sequences
    assert torch.equal(generate(model, ids, max_new_tokens=4, pad_token_id=0).sequences, expected)
    ids[1], mask[1] = ids[1].roll(4), mask[1].roll(4)
    for kw in (dict(attention_mask=mask), dict(attention_mask=mask[1:], inputs=ids[1:]), {}):
        for more in ({}, dict(num_beams=2), dict(cache_implementation="static")):
            with pytest.raises(ValueError, match='rellenadas por la derecha.* tokenizer.padding_side = "left"'):
                model.generate(**{"inputs": ids, "pad_token_id": 0, "max_new_tokens": 4, **more, **kw})
    # Forward passes take them: what is asked for is not behind the padding.
    assert_close(model(ids, attention_mask=mask).logits[1, :4], model(ids[1:, :4]).logits[0])


def test_the_state_is_in_the_cache_and_nowhere_else(make_model):
    """Two conversations in turn on one model do not see each other."""
    model = make_model()
    ids = [helpers.random_ids(model, 1, 8, seed=seed) for seed in (1, 2)]
    caches = [make_cache(model, "dynamic") for _ in ids]
    logits = [[], []]
    for step in range(8):
        for i in (0, 1):
            logits[i].append(model(ids[i][:, step : step + 1], **{CACHE: caches[i]}).logits)
    for i in (0, 1):
        assert_close(torch.cat(logits[i], dim=1), model(ids[i]).logits)


# ----------------------------------------------------------------------------------------------------------------------
# The tests above notice a cache that forgets
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", [0, 1], ids=["conv inputs", "token ids"])
def test_a_forgetful_cache_is_noticed(make_model, monkeypatch, forgotten):
    model = make_model()
    ids = helpers.random_ids(model, 1, 11)
    expected, logits = reference_greedy(model, ids, 16)
    remember = phi1_engram.with_history

    def forget(x, length, cache, layer_idx, state_idx):
        history = remember(x, length, cache, layer_idx, state_idx)
        if state_idx == forgotten:
            history[..., :length] = 0
        return history

    monkeypatch.setattr(phi1_engram, "with_history", forget)
    output = generate(model, ids, max_new_tokens=16)
    assert not torch.equal(output.sequences, expected)
    assert_close(output.logits[0], logits[:, 0])  # the prompt itself was read whole
    assert (output.logits[1] - logits[:, 1]).abs().max() > 100 * ATOL
    whole = model(ids, use_cache=False).logits
    for sizes in ((1,), (2,), (3,), (7,)):
        assert (feed(model, ids, make_cache(model, "dynamic"), sizes) - whole).abs().max() > 100 * ATOL


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile
# ----------------------------------------------------------------------------------------------------------------------

# The default compiler builds C++ on a CPU; without one, the same graph runs uncompiled.
BACKEND = "inductor" if shutil.which("g++") else "aot_eager"


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_forward_has_no_graph_break(make_model, fresh_compiler):
    model = make_model(attn="sdpa", num_hidden_layers=1, engram_layer_ids=[0])
    compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
    ids, mask = helpers.left_padded([helpers.random_ids(model, 1, n, seed=n)[0] for n in (9, 4)])
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    logits = compiled(ids, attention_mask=mask, use_cache=False).logits
    assert_close(logits[mask.bool()], expected[mask.bool()])


@CACHES
def test_compiled_steps_with_a_cache(make_model, fresh_compiler, cache_kind):
    """Prefill and single steps, each one graph, with the state carried from one to the next."""
    model = make_model(attn="sdpa", num_hidden_layers=2, engram_layer_ids=[1])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = helpers.random_ids(model, 2, 7)
    logits = feed(compiled, ids, make_cache(model, cache_kind, 16), (4, 1))
    assert_close(logits, model(ids, use_cache=False).logits)
