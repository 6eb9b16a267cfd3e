"""PhiEngramConfig: defaults, every check with its Spanish message, config.json."""

import json

import pytest
from transformers import AutoConfig, PhiConfig

import helpers
from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM


def test_defaults_are_phi_1_with_the_papers_memory():
    config = PhiEngramConfig()
    phi = PhiConfig.from_dict(helpers.PHI1_CONFIG)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                 "hidden_act", "layer_norm_eps", "max_position_embeddings", "rope_parameters",
                 "tie_word_embeddings"):  # fmt: skip
        assert getattr(config, name) == getattr(phi, name), name
    assert config.engram_layer_ids == [1, 15]
    assert config.engram_vocab_size == [256000, 256000]
    assert (config.max_ngram_size, config.n_embed_per_ngram, config.n_head_per_ngram) == (3, 512, 8)
    assert (config.engram_kernel_size, config.engram_seed, config.hc_mult) == (4, 0, 1)
    assert config.engram_bias is False and config.engram_tokenizer_compression is True
    assert config.tokenizer_name_or_path == "microsoft/phi-1"
    assert config.engram_pad_id == config.eos_token_id == 50256


def test_issue_example_limits_the_default_layers():
    config = PhiEngramConfig(hidden_size=256, num_hidden_layers=2, vocab_size=51200)
    assert config.engram_layer_ids == [1]
    assert PhiEngramConfig(num_hidden_layers=15).engram_layer_ids == [1]
    assert PhiEngramConfig(num_hidden_layers=16).engram_layer_ids == [1, 15]


def test_pad_id_of_a_small_vocabulary(make_config):
    assert make_config(vocab_size=320).engram_pad_id == 0
    assert make_config(vocab_size=320).eos_token_id is None
    assert make_config(vocab_size=320, eos_token_id=5).engram_pad_id == 5
    assert make_config(vocab_size=320, eos_token_id=[6, 5]).engram_pad_id == 6
    assert make_config(vocab_size=320, eos_token_id=5, engram_pad_id=9).engram_pad_id == 9


# Each case: the wrong value, and what its message has to say: the value and what is allowed.
WRONG = [
    (dict(engram_layer_ids=[1, 4]), r"engram_layer_ids=\[1, 4\]: la capa 4 no existe.* van de 0 a 3"),
    (dict(engram_layer_ids=[-1]), r"la capa -1 no existe.* van de 0 a 3"),
    (dict(engram_layer_ids=["1"]), r"la capa '1' no existe"),
    (dict(engram_layer_ids=[True]), r"la capa True no existe"),
    (dict(engram_layer_ids=[]), r"hace falta al menos una capa.* engram_layer_ids=\[1\]"),
    (dict(engram_layer_ids=2), r"engram_layer_ids=2 no es válido"),
    (dict(engram_layer_ids=None, num_hidden_layers=1), r"1 capa no tiene la capa 1.* engram_layer_ids=\[0\]"),
    (dict(engram_layer_ids=[2, 1, 2]), r"engram_layer_ids=\[2, 1, 2\] repite capas"),
    (dict(hc_mult=4), r"hc_mult=4 no es posible: Phi tiene una sola corriente residual"),
    (dict(hc_mult=0), r"hc_mult=0 no es posible"),
    (dict(engram_vocab_size=[211]), r"max_ngram_size=3 hace falta una lista de 2"),
    (dict(engram_vocab_size=[211, 211, 211]), r"engram_vocab_size=\[211, 211, 211\].* lista de 2"),
    (dict(engram_vocab_size=211), r"engram_vocab_size=211 no es válido"),
    (dict(engram_vocab_size=[211, 0]), r"engram_vocab_size=\[211, 0\].* entero de 2 en adelante"),
    (dict(engram_vocab_size=[211, 2.5]), r"entero de 2 en adelante"),
    (dict(max_ngram_size=1), r"max_ngram_size=1 no es válido.* \(2\)"),
    (dict(n_embed_per_ngram=10), r"n_embed_per_ngram=10 no es divisible entre n_head_per_ngram=4"),
    (dict(num_attention_heads=5), r"hidden_size=32 no es divisible entre num_attention_heads=5"),
    (dict(num_attention_heads=4, num_key_value_heads=3), r"num_attention_heads=4 .*num_key_value_heads=3"),
    (dict(engram_pad_id=320), r"engram_pad_id=320 no es válido.*=319"),
    (dict(engram_pad_id=-1), r"engram_pad_id=-1 no es válido"),
    (dict(engram_seed=-1), r"engram_seed=-1 no es válid"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), r"rope_type='linear' no está admitido"),
    *[
        (dict(**{name: value}), rf"{name}={value!r} no es válido: tiene que ser un número entero mayor que cero")
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_ngram_size", "n_embed_per_ngram", "n_head_per_ngram", "engram_kernel_size",
        )
        for value in (0, -3)
    ],
    (dict(n_head_per_ngram=2.0), r"n_head_per_ngram=2.0 no es válido"),
    (dict(engram_kernel_size=True), r"engram_kernel_size=True no es válido"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_wrong_values_are_refused_in_spanish(make_config, wrong, message):
    kw = {"engram_vocab_size": [211, 307], **wrong}
    with pytest.raises(ValueError, match=message):
        make_config(**kw)


def test_layers_keep_their_order(make_config):
    # Primes are handed out in this order, so sorting would address other rows of a trained table.
    assert make_config(engram_layer_ids=(2, 0)).engram_layer_ids == [2, 0]


def test_config_json_round_trip(make_config, tmp_path):
    config = make_config(
        engram_layer_ids=[3, 0], max_ngram_size=4, engram_seed=9, engram_kernel_size=3, engram_bias=True,
        engram_pad_id=11, partial_rotary_factor=0.4, rope_theta=500.0, num_key_value_heads=2, qk_layernorm=True,
        tokenizer_name_or_path="somewhere", eos_token_id=12,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "phi_engram"
    # Derived values stay out: with `layer_types` a plain Phi could not open the folder with its own cache.
    assert "layer_types" not in written and "number_of_conv_states" not in written
    for again in (PhiEngramConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is PhiEngramConfig
        assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert again.layer_types == ["hybrid", "full_attention", "full_attention", "hybrid"]
        assert again.number_of_conv_states == 2
        assert again.rope_parameters["partial_rotary_factor"] == 0.4 and again.rope_parameters["rope_theta"] == 500.0


def test_stored_layer_types_are_not_believed(make_config, tmp_path):
    make_config(engram_layer_ids=[1]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text()) | {"layer_types": ["full_attention"] * 4, "number_of_conv_states": 1}
    file.write_text(json.dumps(stored))
    config = PhiEngramConfig.from_pretrained(tmp_path)
    assert config.layer_types == ["full_attention", "hybrid", "full_attention", "full_attention"]
    assert config.number_of_conv_states == 2


def test_config_says_nothing_about_storage():
    # Where tables live is a choice of the running process (design.md), so it has no place in a shared file.
    ours = set(PhiEngramConfig().to_dict()) - set(PhiConfig().to_dict())
    assert ours == {
        "engram_layer_ids", "engram_vocab_size", "max_ngram_size", "n_embed_per_ngram", "n_head_per_ngram",
        "engram_kernel_size", "engram_seed", "engram_pad_id", "engram_bias", "engram_tokenizer_compression",
        "tokenizer_name_or_path", "engram_backbone", "hc_mult",
    }  # fmt: skip


def test_published_phi_1_config_opens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(helpers.PHI1_CONFIG))
    config = PhiEngramConfig.from_pretrained(tmp_path)
    assert config.num_key_value_heads == 32 and config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.eos_token_id == 50256  # null in the published file, and generation needs a stop token
    assert config.engram_layer_ids == [1, 15]


def test_values_given_beside_a_file_are_checked_and_derived_from(tmp_path):
    # transformers alone would set them after the checks, and leave `layer_types` as the file's values had it.
    (tmp_path / "config.json").write_text(json.dumps(helpers.PHI1_CONFIG))
    config = PhiEngramConfig.from_pretrained(tmp_path, num_hidden_layers=3, engram_layer_ids=[0, 2], max_ngram_size=2)
    assert config.layer_types == ["hybrid", "full_attention", "hybrid"] and config.engram_vocab_size == [256000]
    assert PhiEngramConfig.from_pretrained(tmp_path, num_hidden_layers=3).engram_layer_ids == [1]
    with pytest.raises(ValueError, match="la capa 24 no existe"):
        PhiEngramConfig.from_pretrained(tmp_path, engram_layer_ids=[24])
    config, unused = PhiEngramConfig.from_pretrained(tmp_path, engram_seed=3, other=4, return_unused_kwargs=True)
    assert config.engram_seed == 3 and unused == {"other": 4}


def test_positions_scaled_afterwards_are_refused_too(make_config):
    config = make_config()
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type='linear' no está admitido"):
        PhiEngramForCausalLM(config)
