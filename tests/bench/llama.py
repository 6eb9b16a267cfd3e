"""The same Phi in llama.cpp: its weights written as GGUF, in llama.cpp's own 8 and 4 bits, and a text that goes on.

Measured beside ours by `tests/bench/quantised.py --llama`. Needs: pip install gguf llama-cpp-python, which compiles
llama.cpp: eight minutes of CPU time.
"""

import ctypes
import os
import time
from pathlib import Path

import numpy
import torch

KINDS = {"F32": "LLAMA_FTYPE_ALL_F32", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def write_gguf(model, path: Path):
    """The weights of a transformers `PhiForCausalLM` in float32, as llama.cpp's architecture "phi2", no vocabulary."""
    import gguf

    config, arch = model.config, gguf.MODEL_ARCH.PHI2
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    rotary = config.rope_parameters
    writer.add_rope_dimension_count(
        int(rotary["partial_rotary_factor"] * config.hidden_size // config.num_attention_heads)
    )
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, target: Path, kind: str):
    """Write `source`, a GGUF of float32, in one of KINDS."""
    import llama_cpp

    silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, KINDS[kind])
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise RuntimeError(f"llama.cpp no ha podido escribir {target}.")


def silence():
    import llama_cpp

    global quiet  # llama.cpp calls it as long as it lives
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())


class LlamaDecoding:
    """A GGUF that goes on with a text, a token at a time; as `quantised.Decoding`."""

    def __init__(self, path: Path, ids: torch.Tensor, threads: int):
        """`ids`: int64 [T]."""
        import llama_cpp

        silence()
        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        # Read whole, as ours are: a file mapped into memory would be counted where it is first read.
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 512, 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_bytes, self.times = llama_cpp.llama_model_size(self.model), []
        for _ in range(2):  # the first makes room
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
            clock = time.perf_counter()
            self.logits = self.read(ids.tolist())
            self.prefill = time.perf_counter() - clock
        self.token = int(self.logits.argmax())

    def read(self, ids: list[int]) -> numpy.ndarray:
        """Logits float32 [V] after `ids`, which go on where the last call ended."""
        tokens = (self.lib.llama_token * len(ids))(*ids)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp no ha podido leer el texto.")
        return numpy.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def step(self):
        clock, cpu = time.perf_counter(), time.process_time()
        token = int(self.read([self.token]).argmax())
        self.times.append((1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - cpu)))
        self.token = token

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
