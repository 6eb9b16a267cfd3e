"""The core's ways of generating once more, with the rows on disk: each against recomputation, as in test_generation."""

import pytest

import helpers
from phi1_engram import PhiEngramForCausalLM
from test_generation import (  # noqa: F401
    crops,
    no_grad,
    test_a_cache_cut_back,
    test_a_cache_kept_over_turns_of_a_chat,
    test_assistant_model,
    test_generate_prefills_in_chunks,
    test_left_padded_rows_equal_each_row_alone,
    test_one_prefix_for_several_continuations,
    test_prefill_in_chunks,
    test_sampling_beams_and_several_sequences,
)


@pytest.fixture
def make_model(tmp_path_factory):
    def make(attn="eager", **kw):
        folder = tmp_path_factory.mktemp("disk")
        helpers.make_model(attn=attn, **kw).save_pretrained(folder)
        model = PhiEngramForCausalLM.from_pretrained(folder, engram_storage="disco", attn_implementation=attn)
        assert model.memory_place == "disco"
        return model

    return make
