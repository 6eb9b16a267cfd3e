"""Phi-1 with a conditional memory (DeepSeek's Engram), as one self-contained transformers model.

    from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM
    model = PhiEngramForCausalLM.from_pretrained("phi1-engram")           # a folder made by load_phi_engram.py
    model = PhiEngramForCausalLM(PhiEngramConfig(hidden_size=256, num_hidden_layers=2))     # or from scratch

The file is read in the order in which data flows: configuration, vocabulary projection, n-gram hash, table, facts,
Engram layer, Phi with rotary attention, checkpoints, language model.

Sources cited below: "paper" is Cheng et al., 2026, "Conditional Memory via Scalable Lookup: A New Axis of Sparsity
for Large Language Models" (arXiv 2601.07372); "demo" is engram_demo_v1.py in deepseek-ai/Engram.

Shapes: B batch, T tokens, d hidden size, V vocabulary, N largest n-gram order, K heads per order,
H = (N-1)*K heads per layer, d_head values per row, L Engram layers.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sympy import nextprime
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers import HfQuantizer
from transformers.utils import cached_file, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.output_capturing import capture_outputs

try:
    import psutil  # accelerate brings it
except ImportError:
    psutil = None

logger = logging.get_logger(__name__)

PHI_1 = "microsoft/phi-1"
# What transformers calls the cache: a new name since 5.24. Both are understood, the old one with its models' warning.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
old_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache") if CACHE == "cache" else lambda f: f
END_OF_TEXT = 50256  # <|endoftext|> in Phi-1's tokenizer; its published config names no stop token


# ----------------------------------------------------------------------------------------------------------------------
# Configuration
# ----------------------------------------------------------------------------------------------------------------------


def check_rope(parameters: dict):
    """Raise ValueError for rotary positions other than Phi-1's."""
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_type={kind!r} no está admitido: Phi-1 usa 'default', sin escalar. Quita rope_scaling.")


def is_whole(value, low: int) -> bool:
    """Whether a value is a whole number from `low` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


class PhiEngramConfig(PhiConfig):
    """Architecture of Phi plus Engram. Where tables are stored is a choice of the running process, never of this class.

    Args (all of `PhiConfig`'s as well; its defaults are Phi-1's shape):
        engram_layer_ids: decoder layers, counted from 0, that read the memory. By default those of [1, 15] that exist.
        engram_vocab_size: for each order 2..max_ngram_size, the size from which that order's head tables are primed.
        max_ngram_size: N, the largest n-gram order.
        n_embed_per_ngram: values retrieved per order (all its heads together).
        n_head_per_ngram: K, hash heads per order.
        engram_kernel_size: taps of the short convolution; its dilation is N.
        engram_seed: seed of the hash multipliers.
        engram_pad_id: token that stands for "before the start"; by default <|endoftext|> (50,256) where it exists,
            else the stop token, else 0.
        engram_bias: biases in the key and value projections, as in the demo. Off by default: with a bias, an n-gram
            that was never trained would still add something.
        engram_tokenizer_compression: hash canonical tokens (case, accents and white space folded) instead of raw ones.
        tokenizer_name_or_path: the tokenizer from which the projection is built, once.
        engram_backbone: digest of the Phi on which the memory was put (`fingerprints`); None where nobody noted it.
        hc_mult: hyper-connection streams. Phi has a single residual stream, so 1 is the only value.

    Raises ValueError: a value is out of range; the message (Spanish) names it and what is allowed.
    """

    model_type = "phi_engram"

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    engram_layer_ids: list[int] | None = None
    engram_vocab_size: list[int] | None = None
    max_ngram_size: int = 3
    n_embed_per_ngram: int = 512
    n_head_per_ngram: int = 8
    engram_kernel_size: int = 4
    engram_seed: int = 0
    engram_pad_id: int | None = None
    engram_bias: bool = False
    engram_tokenizer_compression: bool = True
    tokenizer_name_or_path: str = PHI_1
    engram_backbone: str | None = None
    hc_mult: int = 1

    def __post_init__(self, **kwargs):
        # Derived from engram_layer_ids below, so whatever a file says is not believed.
        kwargs.pop("layer_types", None)
        kwargs.pop("number_of_conv_states", None)
        super().__post_init__(**kwargs)
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_ngram_size", "n_embed_per_ngram", "n_head_per_ngram", "engram_kernel_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if not is_whole(value, 1):
                raise ValueError(f"{name}={value!r} no es válido: tiene que ser un número entero mayor que cero.")
        for name, parts in (
            ("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads"),
            ("n_embed_per_ngram", "n_head_per_ngram"),
        ):  # fmt: skip
            value, n = getattr(self, name), getattr(self, parts)
            if value % n:
                raise ValueError(f"{name}={value} no es divisible entre {parts}={n}: todas las partes son iguales.")
        check_rope(self.rope_parameters)
        if self.hc_mult != 1:
            raise ValueError(f"hc_mult={self.hc_mult!r} no es posible: Phi tiene una sola corriente residual. Usa 1.")
        if self.max_ngram_size < 2:
            raise ValueError(f"max_ngram_size={self.max_ngram_size} no es válido: la memoria empieza en pares (2).")
        if not is_whole(self.engram_seed, 0):
            raise ValueError(f"engram_seed={self.engram_seed!r} no es válida: es un número entero, 0 o mayor.")
        orders = self.max_ngram_size - 1
        if self.engram_vocab_size is None:
            self.engram_vocab_size = [256000] * orders
        sizes = self.engram_vocab_size
        if not isinstance(sizes, (list, tuple)) or len(sizes) != orders or not all(is_whole(size, 2) for size in sizes):
            raise ValueError(
                f"engram_vocab_size={sizes!r} no es válido: con max_ngram_size={self.max_ngram_size} hace falta una "
                f"lista de {orders} tamaño(s), uno por orden, y cada uno es un entero de 2 en adelante."
            )
        self.engram_vocab_size = list(sizes)
        self._check_layers()
        if self.eos_token_id is None and self.vocab_size > END_OF_TEXT:
            self.eos_token_id = END_OF_TEXT
        if self.engram_pad_id is None:
            eos = self.eos_token_id[0] if isinstance(self.eos_token_id, (list, tuple)) else self.eos_token_id
            self.engram_pad_id = END_OF_TEXT if self.vocab_size > END_OF_TEXT else (eos or 0)
        pad = self.engram_pad_id
        if not is_whole(pad, 0) or pad >= self.vocab_size:
            raise ValueError(f"engram_pad_id={pad!r} no es válido: va de 0 a vocab_size-1={self.vocab_size - 1}.")
        # Each Engram layer keeps two states in transformers' own cache: conv inputs (0) and token ids (1).
        self.layer_types = [
            "hybrid" if i in self.engram_layer_ids else "full_attention" for i in range(self.num_hidden_layers)
        ]
        self.number_of_conv_states = 2

    def _check_layers(self):
        layers, last = self.engram_layer_ids, self.num_hidden_layers - 1
        allowed = f"Las capas de este modelo van de 0 a {last}; por ejemplo engram_layer_ids=[{min(1, last)}]."
        if layers is None and last == 0:
            raise ValueError(f"Un modelo de 1 capa no tiene la capa 1, la primera por defecto. {allowed}")
        layers = [i for i in (1, 15) if i <= last] if layers is None else layers
        if not isinstance(layers, (list, tuple)) or not layers:
            raise ValueError(f"engram_layer_ids={layers!r} no es válido: hace falta al menos una capa. {allowed}")
        for i in layers:
            if not is_whole(i, 0) or i > last:
                raise ValueError(f"engram_layer_ids={list(layers)!r}: la capa {i!r} no existe. {allowed}")
        if len(set(layers)) != len(layers):
            raise ValueError(f"engram_layer_ids={list(layers)!r} repite capas: escribe cada una una sola vez.")
        # The order matters: primes are handed out layer by layer.
        self.engram_layer_ids = list(layers)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers sets what is given beside a file afterwards, past all checks and derived values.
        names = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_dict(self):
        # peft asks here for the kind of model when its configuration names no matrices: those that it takes of a Phi.
        peft = sys.modules.get("peft.utils.constants")
        for name in dir(peft) if peft else ():
            if name.endswith("_MODULES_MAPPING") and "phi" in (known := getattr(peft, name)):
                known.setdefault(self.model_type, known["phi"])
        # Left out so that a plain PhiForCausalLM opens the same folder with its own plain cache.
        hidden = ("layer_types", "number_of_conv_states")
        return {key: value for key, value in super().to_dict().items() if key not in hidden}


# ----------------------------------------------------------------------------------------------------------------------
# Vocabulary projection: tokenizer -> LongTensor[vocab_size]
# ----------------------------------------------------------------------------------------------------------------------


def vocabulary_projection(tokenizer, vocab_size: int, pad_id: int) -> torch.LongTensor:
    """Map each token to the canonical token that it shares with its variants (paper §2.2; demo, CompressedTokenizer).

    Decoded text -> NFKC, NFD, accents stripped, lower case, runs of white space to one space, stripped (a text that is
    exactly one space stays one). A token that is no whole character keeps its raw string, and one whose text
    normalises to nothing keeps its text. New ids are given in order of first appearance.

    Returns int64 [vocab_size], the rows of the model's embedding; ids without a token map where `pad_id` maps.
    Raises ValueError: the tokenizer has more tokens than `vocab_size`, or no token `pad_id`.
    """
    from tokenizers import Regex, normalizers

    n_tokens = len(tokenizer)
    if n_tokens > vocab_size:
        raise ValueError(f"El tokenizer tiene {n_tokens} tokens y el modelo solo vocab_size={vocab_size}: usa el suyo.")
    if pad_id >= n_tokens:
        raise ValueError(f"engram_pad_id={pad_id} no es un token del tokenizer, que va de 0 a {n_tokens - 1}.")
    one_space = "\ue000"  # private-use character: survives Strip, which would delete a lone space
    normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "), normalizers.Replace(Regex(r"^ $"), one_space),
        normalizers.Strip(), normalizers.Replace(one_space, " "),
    ])  # fmt: skip
    canonical, projection = {}, []
    for token_id in range(n_tokens):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        raw = "\ufffd" in text  # a part of a character
        key = tokenizer.convert_ids_to_tokens(token_id) if raw else normalizer.normalize_str(text) or text
        projection.append(canonical.setdefault(key, len(canonical)))
    projection += [projection[pad_id]] * (vocab_size - len(projection))
    return torch.tensor(projection, dtype=torch.long)


def _open_tokenizer(name: str):
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError and others for "not to be had"
        raise OSError(
            f"La memoria se construye con el tokenizer '{name}' y no se pudo abrir ({type(error).__name__}). Pasa uno "
            "abierto, PhiEngramForCausalLM(config, tokenizer=…), o la carpeta de uno, tokenizer_name_or_path='…'; "
            "o prescinde de él: PhiEngramConfig(engram_tokenizer_compression=False)."
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# N-gram hash: ids [B, T] and the last N-1 ids -> row indices [B, T, H], all Engram layers at once
# ----------------------------------------------------------------------------------------------------------------------


def head_primes(config: PhiEngramConfig) -> list[list[list[int]]]:
    """Rows of each head's table, [L][N-1][K]: the next prime from `engram_vocab_size` on that no earlier head took.

    Distinct primes keep two heads from colliding on the same pairs of n-grams (demo, NgramHashMapping).
    """
    taken, primes = set(), []
    for _ in config.engram_layer_ids:
        primes.append([])
        for size in config.engram_vocab_size:
            prime, heads = size - 1, []
            while len(heads) < config.n_head_per_ngram:
                prime = nextprime(prime)
                if prime not in taken:
                    taken.add(prime)
                    heads.append(int(prime))
            primes[-1].append(heads)
    return primes


def hash_multipliers(config: PhiEngramConfig, canonical_size: int) -> torch.LongTensor:
    """Odd multipliers m_k of eq. 1, int64 [L, N], small enough that id * m_k stays within int64 (demo)."""
    draws = [np.random.default_rng(config.engram_seed + 10007 * layer_id) for layer_id in config.engram_layer_ids]
    bound = max(1, (np.iinfo(np.int64).max // canonical_size) // 2)
    rows = [draw.integers(0, bound, size=config.max_ngram_size, dtype=np.int64) for draw in draws]
    return torch.from_numpy(np.stack(rows) * 2 + 1)


class EngramHash(nn.Module):
    """Vocabulary projection and multiplicative-XOR hash (paper §2.2, eq. 1) of every Engram layer.

    All its constants are buffers kept in the checkpoint, so that opening one needs no tokenizer.
    """

    def __init__(self, config: PhiEngramConfig, tokenizer=None):
        super().__init__()
        self.config = config
        self.max_ngram_size = config.max_ngram_size
        self._tokenizer = tokenizer
        shape = (len(config.engram_layer_ids), config.max_ngram_size - 1, config.n_head_per_ngram)
        self.register_buffer("token_map", torch.zeros(config.vocab_size, dtype=torch.long))
        self.register_buffer("multipliers", torch.zeros(shape[0], config.max_ngram_size, dtype=torch.long))
        self.register_buffer("primes", torch.zeros(shape, dtype=torch.long))
        self.register_buffer("offsets", torch.zeros(shape[0], shape[1] * shape[2], dtype=torch.long))
        # What needs a tokenizer waits until it is known that no checkpoint brings it.
        if not config.engram_tokenizer_compression and not self.token_map.is_meta:
            self.reset_buffers()

    def reset_buffers(self):
        """Compute every constant that was not read from a checkpoint. Called by `_init_weights`."""
        if not getattr(self.token_map, "_is_hf_initialized", False):
            if self.config.engram_tokenizer_compression:
                tokenizer = self._tokenizer or _open_tokenizer(self.config.tokenizer_name_or_path)
                token_map = vocabulary_projection(tokenizer, self.config.vocab_size, self.config.engram_pad_id)
            else:
                token_map = torch.arange(self.config.vocab_size)
            self.token_map.copy_(token_map)
        self._tokenizer = None
        primes = torch.tensor(head_primes(self.config))
        flat = primes.flatten(1)
        init.copy_(self.primes, primes)
        init.copy_(self.offsets, flat.cumsum(-1) - flat)
        init.copy_(self.multipliers, hash_multipliers(self.config, int(self.token_map.max()) + 1))

    def resize(self, n_tokens: int):
        """Follow a vocabulary that grew or shrank: new tokens get canonical ids of their own, after the last.

        The multipliers depend on how many there were, and stay: every n-gram keeps its rows.
        """
        known = self.token_map[:n_tokens]
        new = torch.arange(n_tokens - len(known), device=known.device) + self.token_map.max() + 1
        self.token_map = torch.cat((known, new))

    def windows(self, history: torch.LongTensor, length: int, reach: torch.LongTensor | None = None):
        """The last `length` canonical tokens at each position, int64 [B, T, length], -1 for "before the start".

        `history`: int64 [B, length-1+T], token id + 1, or 0. What is beyond `reach` (see `text_reach`) becomes -1 too.
        """
        canonical = self.token_map[(history - 1).clamp_min(0)].where(history > 0, -1)
        windows = canonical.unfold(1, length, 1)  # oldest first
        if reach is None:
            return windows
        back = torch.arange(length - 1, -1, -1, device=windows.device)
        return windows.where(back <= reach[..., None], -1)

    def forward(self, windows: torch.LongTensor) -> torch.LongTensor:
        """Hash the last N tokens of `windows` [B, T, N or more].

        Returns int64 [L, B, T, H]: each head's index within its own table, order 2 first, heads in order.
        """
        windows = windows[..., -self.max_ngram_size :]
        windows = windows.where(windows >= 0, self.token_map[self.config.engram_pad_id])
        products = windows * self.multipliers.flip(-1)[:, None, None, :]  # [L, B, T, N]
        mix, mixes = products[..., -1], []
        for back in range(2, self.max_ngram_size + 1):
            mix = mix ^ products[..., -back]
            mixes.append(mix)
        mixed = torch.stack(mixes, dim=-1).unsqueeze(-1)  # [L, B, T, N-1, 1]
        return (mixed % self.primes[:, None, None]).flatten(-2)


# ----------------------------------------------------------------------------------------------------------------------
# Table: row indices -> rows. The only room that knows where rows live and in which precision
# ----------------------------------------------------------------------------------------------------------------------


TABLE_FILE = "model-engram-{}.safetensors"  # the rows of one layer
PLACES = ("auto", "gpu", "ram", "disco")
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}
SCALE_BYTES = 4  # of an int8 row: one float32 after its values, so that one read brings both
CHUNK = 2**25  # bytes of rows converted or copied at a time
PREAD = hasattr(os, "pread")  # not on Windows
FEW_ROWS = 256  # of a decoded token or a small batch of them: read at once where the system has them in memory


def row_width(d_head: int, dtype: torch.dtype) -> int:
    """Stored elements per row."""
    return d_head + SCALE_BYTES if dtype == torch.int8 else d_head


def pack(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows [n, d_head] of any float type -> rows as stored [n, row_width]. Int8: x = q * scale, scale = max|x|/127."""
    if dtype != torch.int8:
        return rows.to(dtype)
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True) / 127
    values = (rows / scale.where(scale > 0, 1)).round().to(torch.int8)
    return torch.cat((values, scale.view(torch.int8)), dim=-1)


def unpack(rows: torch.Tensor) -> torch.Tensor:
    """Rows as stored [..., row_width] -> rows [..., d_head]; int8 becomes float32, floats keep their type."""
    if rows.dtype != torch.int8:
        return rows
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return rows[..., :-SCALE_BYTES].float() * scale


def as_stored(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows as stored, in precision `dtype`."""
    return rows if rows.dtype == dtype else pack(unpack(rows), dtype)


def copy_rows(chunks: Iterable[torch.Tensor], to: torch.Tensor):
    """Rows as stored, some [n, row_width] at a time, into all of `to`, in its precision."""
    first = 0
    for rows in chunks:
        to[first : first + len(rows)] = as_stored(rows, to.dtype)
        first += len(rows)


class EngramFileError(OSError):
    """A file of the memory cannot be used; the text says in Spanish why."""


OTHER_ROWS = "sus filas no son las que se guardaron con este modelo"


class TableFile:
    """Rows inside a safetensors file, each read when it is asked for.

    By `pread`: where a file shrinks or a disk fails, that is an error, and in mapped memory the process dies.

    Args:
        path: the file. key: its tensor. n_rows, d_head: what the table has to hold.
        mate: what the dense weights' file says of those beside which it was saved; compared where this one says it too.
    Raises EngramFileError: unreadable, truncated, of another shape, or not the rows that were saved here.
    """

    def __init__(self, path, key: str, n_rows: int, d_head: int, mate: str | None = None):
        self.arguments = (path, key, n_rows, d_head, mate)
        self.path, self.n_rows = path, n_rows
        self.file, self.lock = open(path, "rb"), Lock()
        size = os.fstat(self.file.fileno()).st_size
        try:
            length = int.from_bytes(self._at(0, 8), "little")
            header = json.loads(self._at(8, min(length, size)))
            entry, meta = header[key], header.get("__metadata__", {})
            self.dtype, shape, (begin, end) = SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._bad("su cabecera no se entiende") from error
        expected = [n_rows, row_width(d_head, self.dtype)]
        if shape != expected:
            raise self._bad(f"la tabla es de {shape} y debe ser de {expected}")
        self.width, self.row_bytes = shape[1], shape[1] * self.dtype.itemsize
        self.start, self.step = 8 + length + begin, max(1, CHUNK // self.row_bytes)
        if end - begin != n_rows * self.row_bytes or size < 8 + length + end:
            raise self._bad(f"está a medias: tiene {size} bytes de {8 + length + end}")
        self.mate, self.told = meta.get("engram_mate"), "engram_told" in meta
        if None not in (mate, self.mate) and self.mate != mate:
            raise self._bad(OTHER_ROWS)
        if "engram_digest" in meta and meta["engram_digest"] != self.digest():
            raise self._bad("sus filas no son las que se guardaron")

    def __reduce__(self):  # a copy opens the file anew
        return TableFile, self.arguments

    def _bad(self, why: str) -> EngramFileError:
        return EngramFileError(f"El archivo de la memoria {self.path} no sirve: {why}. Vuelve a copiarlo o a crearlo.")

    def _at(self, offset: int, size: int) -> bytearray:
        data = bytearray()
        while piece := self._piece(offset + len(data), size - len(data)):  # network drives give less than asked
            data += piece
        if len(data) != size:
            raise self._bad("se corta antes de tiempo")
        return data

    def _piece(self, offset: int, size: int) -> bytes:
        if PREAD:
            return os.pread(self.file.fileno(), size, offset)
        with self.lock:
            self.file.seek(offset)
            return self.file.read(size)

    def read(self, row_ids: np.ndarray) -> torch.Tensor:
        """int64 [n] -> rows as stored [n, row_width]."""
        size, descriptor, pieces = self.row_bytes, self.file.fileno(), []
        offsets = (row_ids * size + self.start).tolist()
        clock, watched = time.perf_counter(), len(offsets) > 64 and hasattr(os, "posix_fadvise")
        try:
            for i, offset in enumerate(offsets):
                pieces.append(os.pread(descriptor, size, offset) if PREAD else self._piece(offset, size))
                if i == 31 and watched and time.perf_counter() - clock > 2e-3:
                    # That came from the disk, not from its cache: let it work on all of them at once.
                    for later in offsets[i:]:
                        os.posix_fadvise(descriptor, later, size, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise self._bad(f"el disco ha fallado ({error.strerror})") from error
        data = bytearray().join(pieces)
        if len(data) != len(offsets) * size:
            raise self._bad("se ha cortado mientras estaba abierto")
        return torch.frombuffer(data, dtype=self.dtype).view(len(offsets), self.width)

    def read_cached(self, row_ids: np.ndarray) -> torch.Tensor | None:
        """As `read`, where the system holds all of these rows in memory; None where one would have to be waited for."""
        size, descriptor = self.row_bytes, self.file.fileno()
        data = bytearray(len(row_ids) * size)
        rows = memoryview(data)
        try:
            for i, offset in enumerate((row_ids * size + self.start).tolist()):
                if os.preadv(descriptor, [rows[i * size : (i + 1) * size]], offset, os.RWF_NOWAIT) != size:
                    return None
        except (OSError, AttributeError):  # on the disk alone; or a system that knows of no such reading
            return None
        return torch.frombuffer(data, dtype=self.dtype).view(len(row_ids), self.width)

    def chunks(self) -> Iterable[torch.Tensor]:
        """All rows as stored, some [n, row_width] at a time."""
        for first in range(0, self.n_rows, self.step):
            n = min(self.step, self.n_rows - first)
            data = self._at(self.start + first * self.row_bytes, n * self.row_bytes)
            yield torch.frombuffer(data, dtype=self.dtype).view(n, self.width)

    def digest(self) -> str:
        """Of 512 rows spread over all, their type and shape: at once, however large the table."""
        sample = np.linspace(0, self.n_rows - 1, min(512, self.n_rows)).astype(np.int64).tolist()
        rows = b"".join(self._at(self.start + row * self.row_bytes, self.row_bytes) for row in sample)
        return hashlib.sha256(f"{self.dtype} {self.n_rows} {self.width} ".encode() + rows).hexdigest()


def write_table(path, key: str, chunks: Iterable[torch.Tensor], dtype: torch.dtype, n_rows, d_head: int, mate=None):
    """Write rows as stored, given some [n, row_width] at a time, as the one tensor of a safetensors file.

    Whole or absent. `mate`: see `TableFile`. The rows begin on a page of the disk, so that few lie on two.
    """
    shape = [n_rows, row_width(d_head, dtype)]
    name = next(name for name, known in SAFETENSORS.items() if known == dtype)
    entry = {"dtype": name, "shape": shape, "data_offsets": [0, shape[0] * shape[1] * dtype.itemsize]}

    def header(**digest):
        mates = {"engram_mate": mate, "engram_told": "1"} if mate else {}  # told: the dense weights' file says it too
        text = json.dumps({"__metadata__": {"format": "pt", **mates, **digest}, key: entry}).encode()
        return text.ljust(4096 - 8)  # the format allows spaces

    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(len(header()).to_bytes(8, "little") + header())
            for rows in chunks:
                file.write(rows.contiguous().view(torch.uint8).numpy().data)
        digest = TableFile(temporary, key, n_rows, d_head).digest()
        with open(temporary, "r+b") as file:
            file.seek(8)
            file.write(header(engram_digest=digest))
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def as_any_new_file(path: Path):
    """Give a file the mode that the umask gives: safetensors makes files that their owner alone may read."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    probe.touch()
    with suppress(OSError):  # of a drive that keeps no modes
        path.chmod(probe.stat().st_mode)
    probe.unlink()


def index_files(folder: Path, suffix: str, tables: list[Path]):
    """Finish what transformers has just saved: an index names every tensor's file, and those of `tables` too.

    A lone "model.safetensors" becomes a shard, because every loader takes a file of that name for the whole model.
    Tables of an earlier save go. `suffix`: of a variant, with its dot.
    """
    single, weight_map, size = folder / f"model{suffix}.safetensors", {}, 0
    shards = sorted(folder.glob(f"model{suffix}-?????-of-?????.safetensors"))
    if shards:  # those of an earlier save went when these were made
        single.unlink(missing_ok=True)
    written, shards = shards or [single], []
    for number, path in enumerate(written, 1):
        # Of a variant under another name: transformers deletes shards of all variants when it saves without one.
        name = f"model{suffix}-phi-{number:05}" if suffix else f"model-{number:05}-of-{len(written):05}"
        shards.append(folder / f"{name}.safetensors")
        os.replace(path, shards[-1])
    for path in (*shards, *tables):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            weight_map |= {key: path.name for key in json.loads(file.read(length)) if key != "__metadata__"}
        size += path.stat().st_size - 8 - length
        as_any_new_file(path)
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True)
    temporary = folder / f"model.safetensors.index{suffix}.{os.getpid()}.tmp"
    temporary.write_text(f"{text}\n", encoding="utf-8")
    os.replace(temporary, folder / f"model.safetensors.index{suffix}.json")
    for part in ("engram", "phi") if suffix else ("engram",):
        for path in {*folder.glob(f"model{suffix}-{part}-*.safetensors")} - {*tables, *shards}:
            path.unlink()


def _new_reader():
    """One thread for all tables: rows come in the order in which layers need them."""
    global _reader
    _reader = ThreadPoolExecutor(1, thread_name_prefix="engram")


_new_reader()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_reader)  # a thread does not come along


BESIDE = "las filas de la memoria están en RAM o en disco; torch.compile las quiere en 'gpu'"


class EngramTable(nn.Module):
    """One layer's rows, all heads end to end (paper eq. 2). Zero means "never trained" and adds exactly nothing.

    Rows are `weight`, or stay in `file` (place "disco"). In place "ram" beside a GPU, `weight` does not follow the
    model there: touched rows alone do, each once, while the earlier layers compute (paper §2.5).
    """

    def __init__(self, n_rows: int, d_head: int, empty: bool = False):
        super().__init__()
        self.n_rows, self.d_head = n_rows, d_head
        self.weight = None if empty else nn.Parameter(torch.zeros(n_rows, d_head))
        self.file = None  # that the rows came from, and may still be read from
        self.place = "ram"
        self.stays = False  # whether rows have to be brought to where the model computes
        self.prefetches = True
        self._coming = None  # the indices that were announced, and their rows to be
        self._stream = None
        # Row-sparse gradients are a choice of the training loop: AdamW, the usual optimiser, refuses them.
        self.sparse_grad = False
        self.read = None  # of a training loop that keeps the rows itself: row_ids -> rows (engram/rows.py)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as stored."""
        return self.file.dtype if self.weight is None else self.weight.dtype

    @property
    def writable(self) -> bool:
        return self.read is not None or (self.weight is not None and self.weight.is_floating_point())

    @property
    def brings(self) -> bool:
        """Whether the next forward pass fetches rows instead of differentiating the table."""
        return self.stays and not (self.writable and torch.is_grad_enabled())

    def __getstate__(self):  # for copies: what is on its way cannot be copied
        return {**self.__dict__, "_coming": None, "_stream": None}

    def _apply(self, fn, recurse=True):
        return self if self.stays else super()._apply(fn, recurse)

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of the rows when stored in precision `dtype`."""
        return self.n_rows * row_width(self.d_head, dtype) * dtype.itemsize

    def own(self, rows: torch.Tensor):
        """Have these rows as stored, which are in no file."""
        self.weight, self.file = nn.Parameter(rows, requires_grad=rows.is_floating_point()), None

    def hold(self, dtype: torch.dtype):
        """Read all rows of the file into memory, in precision `dtype`."""
        rows = torch.empty(self.n_rows, row_width(self.d_head, dtype), dtype=dtype, device="cpu")
        copy_rows(self.file.chunks(), rows)
        self.weight = nn.Parameter(rows, requires_grad=dtype.is_floating_point)
        self._unchanged = self.weight._version

    def settle(self, place: str, dtype: torch.dtype | None = None):
        """Put the rows in "gpu", "ram" or "disco"; `dtype`, if not the file's, is for those that come from it.

        Raises ValueError: "disco", and no file holds these rows.
        """
        if place == "disco" and self.weight is not None:
            if self.file is None or self.weight._version != self._unchanged:
                raise ValueError(
                    "Estas filas no están en ningún archivo, o han cambiado desde que se leyeron. Guarda antes el "
                    'modelo con save_pretrained, y ábrelo con engram_storage="disco".'
                )
            self.weight = None
        elif place != "disco" and self.weight is None:
            self.hold(dtype or self.file.dtype)
        self.place, self.stays = place, place == "disco" or (place == "ram" and torch.cuda.is_available())
        if self.stays and self.weight is not None:
            self.weight.data = self.weight.data.cpu()  # not pinned: rows are gathered into other memory, and that is

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """Rows of any precision, into the precision of these. Rows on the disk that are to be others come to RAM."""
        given = state_dict.get(f"{prefix}weight")
        if given is None:
            if self.weight is not None and strict:
                missing_keys.append(f"{prefix}weight")
            return
        expected = [self.n_rows, row_width(self.d_head, given.dtype)]
        if list(given.shape) != expected or given.dtype not in SAFETENSORS.values():
            errors.append(
                f"Las filas de {prefix}weight son de {list(given.shape)} en {given.dtype} y deben ser de {expected} en "
                f"{', '.join(PRECISIONS)}: son de otra forma de memoria."
            )
        elif self.weight is None and self.read is not None:
            errors.append(f"Las filas de {prefix}weight se están entrenando: cárgalas antes de empezar o al acabar.")
        elif self.weight is None:
            file = self.file
            same = file is not None and file.dtype == given.dtype
            if not (same and all(map(torch.equal, given.cpu().split(file.step), file.chunks()))):
                self.own(given.clone())
                self.settle("ram")
        elif self.weight.is_meta or local_metadata.get("assign_to_params_buffers"):
            self.own(given)
        else:
            with torch.no_grad():
                copy_rows(given.split(max(1, CHUNK // (4 * self.d_head))), self.weight)

    def chunks(self, dtype: torch.dtype) -> Iterable[torch.Tensor]:
        """All rows as stored in precision `dtype`, some at a time, on the CPU."""
        step = max(1, CHUNK // (4 * self.d_head))
        for rows in self.file.chunks() if self.weight is None else self.weight.detach().split(step):
            yield as_stored(rows.cpu(), dtype)

    def announce(self, row_ids: torch.LongTensor):
        """Begin to bring the rows that the next `forward` will be asked for."""
        if self.read or not (self.brings and self.prefetches) or torch.compiler.is_compiling():
            return
        ready = None
        if row_ids.is_cuda:
            self._stream = self._stream or torch.cuda.Stream(row_ids.device)
            ready = torch.cuda.current_stream(row_ids.device).record_event()
        elif self.weight is None and row_ids.numel() <= FEW_ROWS:
            # To pass them from one thread to another would take longer than to read them.
            if (found := self._stored(row_ids, self.file.read_cached)) is not None:
                self._coming = row_ids, (found, None)
                return
        self._coming = row_ids, _reader.submit(self._bring, row_ids, ready)

    @torch.no_grad()
    def _bring(self, row_ids, ready=None):
        """What `_laid_out` needs, and when it is there; on a GPU the rows themselves."""
        if ready is None:
            return self._stored(row_ids), None
        # A new thread stands on the first card, and would open a context there.
        with torch.cuda.device(row_ids.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return (self._laid_out(row_ids, *self._stored(row_ids)), None), self._stream.record_event()

    def _stored(self, row_ids, read=None) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Each distinct row once, as stored, and for each index its place among them; none for those of one token.

        By NumPy alone: torch would keep threads at hand for the reader's too, and more threads than cores wait worse.
        """
        wanted, inverse = row_ids.cpu().numpy().ravel(), None  # the one wait for a card
        if wanted.size > row_ids.shape[-1]:  # the heads of one token never share a row
            wanted, inverse = np.unique(wanted, return_inverse=True)
            inverse = torch.from_numpy(inverse).view(row_ids.shape)
        if self.weight is None:
            rows = (read or self.file.read)(wanted)
        else:
            rows = self.weight.detach()[torch.from_numpy(wanted)]
        return None if rows is None else (rows, inverse)

    def _laid_out(self, row_ids, rows, inverse):
        """Rows [..., d_head] on the indices' device."""
        if row_ids.is_cuda:
            rows, inverse = (
                x if x is None else x.pin_memory().to(row_ids.device, non_blocking=True) for x in (rows, inverse)
            )
        rows = rows.view(*row_ids.shape, -1) if inverse is None else rows[inverse]
        return unpack(rows).to(row_ids.device)

    @torch.compiler.disable(reason=BESIDE)
    def _brought(self, row_ids):
        coming, self._coming = self._coming, None
        if coming is None or coming[0] is not row_ids:
            return self._laid_out(row_ids, *self._stored(row_ids))
        (rows, inverse), there = coming[1] if isinstance(coming[1], tuple) else coming[1].result()
        if there is None:
            return self._laid_out(row_ids, rows, inverse)
        stream = torch.cuda.current_stream(rows.device)
        stream.wait_event(there)
        rows.record_stream(stream)
        return rows

    def forward(self, row_ids: torch.LongTensor) -> torch.Tensor:
        """int64 [B, T, H] in 0..n_rows-1 -> rows [B, T, H, d_head] of any floating type."""
        if self.read:
            return self.read(row_ids)
        if self.brings:
            return self._brought(row_ids)
        rows = F.embedding(row_ids.to(self.weight.device), self.weight, sparse=self.sparse_grad and self.writable)
        return unpack(rows).to(row_ids.device)


# ----------------------------------------------------------------------------------------------------------------------
# Facts: rows of whole n-grams, in front of what the table holds (engram/facts.py writes them)
# ----------------------------------------------------------------------------------------------------------------------


LONGEST_KEY = 20  # canonical tokens; the cache keeps one less
FACTS_FILE = "engram_facts.json"  # what was taught, in plain text, and the name of the file with its rows
TOLD = ("prompt", "target", "layer", "length")  # of a fact, in FACTS_FILE beside its notes


@dataclass(frozen=True)
class Fact:
    """What was taught once: after `prompt` comes `target`.

    `keys` are canonical tokens, int64 [n, LONGEST_KEY] ending in the last `length` of them, -1 before; `rows` the
    values that positions which end in one of them read, float32 [n, d_mem]; `notes` whatever else is to be kept;
    `made_for` what `fact_digests` gave when it was taught.
    """

    prompt: str
    target: str
    layer: int
    length: int
    keys: torch.LongTensor
    rows: torch.Tensor
    notes: dict
    made_for: dict


class EngramFacts(nn.Module):
    """One layer's facts: a position whose last tokens are exactly a key, compared whole, reads that key's row."""

    def __init__(self):
        super().__init__()
        self.lengths: tuple[int, ...] = ()  # of the keys, ascending: the longest that fits is the one that is read
        for name in ("codes", "keys", "rows", "multipliers", "beyond"):
            self.register_buffer(name, None, persistent=False)

    def set(self, facts: list[Fact], device=None):
        """Have these facts and no others; of two with one key the later stays."""
        self.__init__()
        if not facts:
            return
        keys, rows = torch.cat([fact.keys for fact in facts]), torch.cat([fact.rows for fact in facts])
        last = {tuple(key): place for place, key in enumerate(keys.tolist())}
        cpu = dict(device="cpu")  # whatever torch.set_default_device says
        chosen = torch.tensor([*last.values()], dtype=torch.long, **cpu)
        generator = torch.Generator().manual_seed(0)
        self.multipliers = torch.randint(2**62, (LONGEST_KEY,), generator=generator, **cpu) * 2 + 1
        codes, order = ((keys[chosen] + 1) * self.multipliers).sum(-1).sort()
        self.codes, self.keys, self.lengths = codes, keys[chosen][order], (*sorted({fact.length for fact in facts}),)
        self.beyond = torch.arange(LONGEST_KEY, **cpu) < LONGEST_KEY - torch.tensor(self.lengths, **cpu)[:, None]
        self.order = chosen[order]  # of the given rows, which a search for them may go on changing
        self.rows = rows[self.order]
        self.to(device)

    def forward(self, rows: torch.Tensor, windows: torch.LongTensor) -> torch.Tensor:
        """rows [B, T, H, d_head]; windows int64 [B, T, LONGEST_KEY], canonical, -1 before the start -> rows."""
        if self.lengths:
            own = windows[..., None, :].masked_fill(self.beyond, -1)  # [B, T, lengths, LONGEST_KEY]
            codes = ((own + 1) * self.multipliers).sum(-1)
            place = torch.searchsorted(self.codes, codes).clamp_max(len(self.codes) - 1)
            same = (self.keys[place] == own).all(-1)
            place = place.gather(-1, same.cumsum(-1).argmax(-1, keepdim=True))[..., 0]  # the last, which is the longest
            rows = torch.where(same.any(-1)[..., None, None], self.rows[place].view(*rows.shape), rows)
        return rows


# ----------------------------------------------------------------------------------------------------------------------
# Engram layer: rows + hidden -> Y. Knows nothing of tokens or storage
# ----------------------------------------------------------------------------------------------------------------------


def with_history(x: torch.Tensor, length: int, cache: Cache | None, layer_idx: int, state_idx: int) -> torch.Tensor:
    """Put the `length` values that came before in front of x, and leave the last ones in the cache for the next call.

    x [B, ..., T], time last, zero for "before the start" -> [B, ..., length + T].
    """
    total = length + x.shape[-1]
    if cache is not None:
        # At least one is kept, whatever its use: a cache layer with an empty state cannot be cut back.
        x = cache.update_conv_state(x, layer_idx, state_idx=state_idx, conv_kernel_size=max(length, 1))
        x = x[..., -total:]  # it returns more than was asked while it records, and less after a short first chunk
    return x if x.shape[-1] == total else F.pad(x, (total - x.shape[-1], 0))


class EngramRMSNorm(nn.RMSNorm):
    """In float32 whatever the model's precision; returns float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class EngramGate(nn.Module):
    """How much of the retrieved value the context lets in (paper eq. 4; signed square root from the demo).

    A module of its own so that a forward hook reads the gate: its output is alpha, float32 [B, T, 1], in 0..1.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        eps = torch.finfo(torch.float32).eps  # nn.RMSNorm's default, as in the demo
        self.key_norm = EngramRMSNorm(hidden_size, eps)
        self.query_norm = EngramRMSNorm(hidden_size, eps)
        self.scale = 1 / math.sqrt(hidden_size)

    def forward(self, hidden: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        score = (self.query_norm(hidden) * self.key_norm(key)).sum(-1, keepdim=True) * self.scale
        # The floor keeps the square root's gradient finite where the score is zero.
        return torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())


class EngramShortConv(nn.Module):
    """Depthwise causal convolution with dilation N, without bias, zero at initialisation (paper eq. 5)."""

    def __init__(self, hidden_size: int, kernel_size: int, dilation: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, 1, kernel_size))
        self.dilation = dilation
        self.history = (kernel_size - 1) * dilation  # inputs that one output looks back on

    def forward(self, x: torch.Tensor, reach: torch.LongTensor | None = None) -> torch.Tensor:
        """[B, d, history + T] -> [B, T, d]; inputs farther back than `reach` (see `text_reach`) count as zero."""
        length, output = x.shape[-1] - self.history, None
        # A sum of shifted products gives the same bits whatever T is, so that cached steps equal the whole.
        for k in range(self.weight.shape[-1]):
            first = k * self.dilation
            inputs, back = x[..., first : first + length].transpose(1, 2), self.history - first
            if reach is not None and back:
                inputs = inputs.masked_fill((reach < back)[..., None], 0)
            product = inputs * self.weight[:, 0, k]
            output = product if output is None else output.add_(product)
        return output


class EngramLayer(nn.Module):
    """Rows + hidden -> Y, what the memory adds to the hidden state (paper §2.3, eq. 3-5)."""

    def __init__(self, config: PhiEngramConfig, layer_idx: int):
        super().__init__()
        d_mem = (config.max_ngram_size - 1) * config.n_embed_per_ngram
        self.layer_idx = layer_idx
        self.key_proj = nn.Linear(d_mem, config.hidden_size, bias=config.engram_bias)
        self.value_proj = nn.Linear(d_mem, config.hidden_size, bias=config.engram_bias)
        self.gate = EngramGate(config.hidden_size)
        self.draw = config.engram_seed, layer_idx, config.initializer_range
        self.conv_norm = EngramRMSNorm(config.hidden_size, eps=1e-5)
        self.conv = EngramShortConv(config.hidden_size, config.engram_kernel_size, config.max_ngram_size)

    def fresh_projection(self, place: int) -> torch.Tensor:
        """The weight that an untrained graft's key (0) or value (1) projection has: the same for everybody, so that
        facts written into one graft hold in another of the same Phi."""
        seed, layer_idx, std = self.draw
        generator = torch.Generator().manual_seed((seed * 10007 + layer_idx) * 2 + place)
        return torch.empty(self.key_proj.weight.shape, device="cpu").normal_(0, std, generator=generator)

    def forward(self, hidden, rows, real=None, cache: Cache | None = None, reach=None) -> torch.Tensor:
        """
        Args:
            hidden: [B, T, d]. rows: [B, T, H, d_head]. cache: keeps the last conv inputs.
            real: bool [B, T], False where the token is padding; None when none is. reach: see `text_reach`.
        Returns:
            Y [B, T, d], hidden's dtype; exactly zero where all rows in reach are zero and there is no bias.
        """
        memory = rows.flatten(-2).to(hidden.device, hidden.dtype)  # [B, T, d_mem]
        alpha = self.gate(hidden, self.key_proj(memory))
        gated = alpha.to(hidden.dtype) * self.value_proj(memory)
        if real is not None:
            gated = gated.masked_fill(~real[..., None], 0)
        conv_input = self.conv_norm(gated).to(hidden.dtype).transpose(1, 2)  # [B, d, T]
        conv_input = with_history(conv_input, self.conv.history, cache, self.layer_idx, state_idx=0)
        return F.silu(self.conv(conv_input, reach), inplace=not torch.is_grad_enabled()).add_(gated)


# ----------------------------------------------------------------------------------------------------------------------
# Phi with rotary attention: hidden -> hidden. Phi-1's parameter names; the oracle is transformers' PhiForCausalLM
# ----------------------------------------------------------------------------------------------------------------------


class PhiRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions for the first `partial_rotary_factor` of each head."""

    def __init__(self, config: PhiEngramConfig):
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.inverse_frequencies(), persistent=False)

    def inverse_frequencies(self) -> torch.Tensor:
        """float32 [rotary/2]."""
        parameters = self.config.rope_parameters
        check_rope(parameters)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = int(head_dim * parameters["partial_rotary_factor"])
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.float) / rotary))

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B or 1, T] -> cos, sin [B or 1, 1, T, rotary] in hidden's dtype; sin's first half is negated."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(hidden.device, torch.float)
        cos, sin = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first values of x [B, heads, T, head_dim] by the angles of cos, sin [B, 1, T, rotary]."""
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    spun = turning.roll(size // 2, -1)
    # In place it would be rounded to the half precision that autocast gave x.
    spun = spun.mul_(sin) if spun.dtype == sin.dtype else spun * sin
    turned = (turning * cos).add_(spun)
    return torch.cat((turned, rest), dim=-1)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain softmax attention, the fallback of transformers' attention interface.

    query [B, heads, T, head_dim]; key, value [B, key heads, S, head_dim] -> output [B, T, heads, head_dim], weights.
    The order of product and scale is transformers', and with it float16's overflow past 65,504: "sdpa" has none.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PhiAttention(nn.Module):
    """Multi-head attention with partial rotary positions, grouped keys and optional query/key LayerNorm."""

    def __init__(self, config: PhiEngramConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True  # read by transformers' attention functions
        self.dropout, self.qk_layernorm = config.attention_dropout, config.qk_layernorm  # a config is slow to ask
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)
        if self.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def forward(self, hidden, attention, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """[B, T, d] -> [B, T, d], weights or None. `attention` is one of transformers' attention functions."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden).view(shape).transpose(1, 2)  # [B, heads, T, head_dim]
        key = self.k_proj(hidden).view(shape).transpose(1, 2)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        if self.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling, **kwargs,
        )  # fmt: skip
        return self.dense(output.reshape(*hidden.shape[:-1], -1).contiguous()), weights


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """transformers' "gelu_new" bit for bit, with two new tensors instead of eight: a third of its time on a CPU."""
    t = torch.pow(x, 3.0).mul_(0.044715).add_(x).mul_(math.sqrt(2.0 / math.pi)).tanh_().add_(1.0)
    return t.mul_(0.5 * x)


class PhiMLP(nn.Module):
    """[B, T, d] -> [B, T, d]."""

    def __init__(self, config: PhiEngramConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.is_gelu_new = config.hidden_act == "gelu_new"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(hidden)
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.is_gelu_new
        return self.fc2(self.activation(hidden) if plain else gelu_new(hidden))


class PhiEngramDecoderLayer(GradientCheckpointingLayer):
    """Phi's parallel block. The memory comes first, so that attention and MLP both read it (paper §2.1)."""

    def __init__(self, config: PhiEngramConfig, layer_idx: int):
        super().__init__()
        self.self_attn = PhiAttention(config, layer_idx)
        self.mlp = PhiMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.engram = EngramLayer(config, layer_idx) if layer_idx in config.engram_layer_ids else None

    def forward(
        self, hidden, rows=None, real=None, *, attention=None, attention_mask=None, position_embeddings=None,
        cache=None, reach=None, **kwargs,
    ):  # fmt: skip
        """[B, T, d] -> [B, T, d]. `rows` is positional: reentrant checkpointing sees that it needs a gradient."""
        if self.engram is not None and rows is not None:
            hidden = hidden + self.engram(hidden, rows, real, cache, reach)
        normed = self.input_layernorm(hidden)
        attended, _ = self.self_attn(normed, attention, position_embeddings, attention_mask, cache, **kwargs)
        computed = self.mlp(normed)
        if self.training:
            attended, computed = self.resid_dropout(attended), self.resid_dropout(computed)
        return attended + computed + hidden


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: folder or name on the Hub <-> weights, with the rows in the place where they fit
# ----------------------------------------------------------------------------------------------------------------------


def from_torchao(weight) -> bool:
    return type(weight).__module__.startswith("torchao")


def dequantised(weight: torch.Tensor) -> torch.Tensor:
    """[out, in], also where torchao keeps a weight in a way that cannot be turned back but by multiplying."""
    if not from_torchao(weight):
        return weight
    if type(weight).dequantize is not torch.Tensor.dequantize:
        return weight.dequantize()
    return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T


class ThroughQuantised(torch.autograd.Function):
    """x -> x W^T + b by a kernel without a derivative; its gradient is that of the same weights dequantised."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ dequantised(ctx.layer.weight).to(gradient.dtype), None


class FrozenLinear(nn.Linear):
    """A layer of torchao's, which alone would let a gradient by (the residual stream's) and stop its own unsaid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return ThroughQuantised.apply(x, self)
        return super().forward(x)


def unpack_4bit(layer, args):
    """What bitsandbytes packs 4 bits into on a CPU has no derivative, and is unpacked to be saved."""
    packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    if packed and torch.is_grad_enabled() and args[0].requires_grad:
        layer.state_dict()


class Saving(HfQuantizer):
    """How transformers learns which tensors it saves and what their files say: it asks a model's quantiser alone."""

    is_trainable = False

    def __init__(self, inner: HfQuantizer | None, state: dict, told: dict[str, str]):
        self.inner, self.state, self.told = inner, state, told

    def get_state_dict_and_metadata(self, model, *args):
        state, told = self.inner.get_state_dict_and_metadata(model, *args) if self.inner else (None, {})
        state = self.state if state is None else {key: state[key] for key in state if "engram_tables" not in key}
        return state, {**told, **self.told}

    def is_serializable(self, *args) -> bool:
        return self.inner is None or self.inner.is_serializable(*args)


def sign_digest(tensors: dict[str, torch.Tensor]) -> str | None:
    """Digest of weights that is the same in every precision: rounding keeps the sign bit of a number.

    Up to 65,536 numbers spread over each tensor; of packed ones, the bytes. None where a tensor is offloaded.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = dequantised(tensors[name]).detach().flatten()
        if flat.device.type == "meta":
            return None
        sample = flat[:: max(1, len(flat) // 2**16)].cpu()
        bits = np.packbits(torch.signbit(sample).numpy()) if flat.is_floating_point() else sample.numpy()
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode() + bits.tobytes())
    return digest.hexdigest()


def free_ram() -> int:
    """Bytes of RAM that this process could still take."""
    return psutil.virtual_memory().available if psutil else 2**62


def choose_place(wanted: str, size: int, to_move: int, on_file: bool, device=None) -> tuple[str, str]:
    """Where the memory's rows go, and why (Spanish).

    Args:
        wanted: one of PLACES. size: bytes of rows in memory. on_file: whether a file holds them.
        to_move: bytes of the model that are yet to go to the GPU. device: which; None: the present one.
    Raises ValueError: no such place, or no GPU.
    """
    if wanted not in PLACES:
        raise ValueError(f"«{wanted}» no es un sitio para la memoria: elige entre {', '.join(PLACES)}.")
    if wanted == "gpu" and not torch.cuda.is_available():
        raise ValueError("La memoria no puede ir a 'gpu': aquí no hay ninguna. Elige 'ram', 'disco' o 'auto'.")
    free, gpu = free_ram(), torch.cuda.is_available()
    giga, room = (f"{count / 1e9:.2f} GB".replace(".", ",") for count in (size, free))
    if wanted in ("gpu", "disco"):
        return wanted, f"ocupa {giga}; así se ha pedido"
    # A fifth is to compute in.
    if wanted == "auto" and gpu and size + to_move < 0.8 * torch.cuda.mem_get_info(device)[0]:
        return "gpu", f"ocupa {giga} y cabe en la GPU"
    no_gpu = "" if wanted == "ram" else " no cabe en la GPU;" if gpu else " no hay GPU;"
    if size < 0.9 * free or not on_file:
        return "ram", f"ocupa {giga};{no_gpu} {room} libres en RAM"
    if wanted == "ram":
        logger.warning(f"La memoria ocupa {giga} y solo hay {room} libres en RAM: se lee del disco.")
    return "disco", f"ocupa {giga};{no_gpu} y solo hay {room} libres en RAM"


REWRITTEN = (
    "Los pesos densos de la memoria de «{}», capa {}, los ha escrito otro programa después de guardarse con sus filas "
    "(una mezcla de modelos, por ejemplo). Se abre; si no los has mezclado tú, vuelve a copiar el modelo entero."
)
MIXED = "si has mezclado sus pesos tú, abre antes cada modelo, guárdalo con save_pretrained y mezcla lo guardado"
WRAPPED = re.compile(r"\.(base_layer|original_module)\.")  # names of what peft has put something around
MADE_FOR = {
    "projection": "otra proyección del vocabulario (otro tokenizer)",
    "hash": "otra forma de memoria (capas, tamaños o semilla)",
    "backbone": "otro Phi, o este se ha entrenado después",
    "layer": "otra memoria, o esta se ha entrenado después",
}


def differing(made_for: dict[str, str], own: dict[str, str]) -> str | None:
    """What of a model a memory or a fact was not made for, in Spanish, by their digests."""
    return next((words for kind, words in MADE_FOR.items() if made_for.get(kind) != own.get(kind)), None)


def find_file(name, file: str, hub: dict) -> str | None:
    """Path of a checkpoint's file, in a folder or on the Hub; None where it is not to be had."""
    try:
        return cached_file(name, file, **hub)
    except OSError:
        return None


def weight_files(name, variant, hub: dict) -> dict[str, str]:
    """{tensor: file} of a checkpoint, of one file or of an index, in transformers' own order."""
    suffix = f".{variant}" if variant else ""
    single = f"model{suffix}.safetensors"
    if (path := find_file(name, single, hub)) is not None:
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    path = find_file(name, f"model.safetensors.index{suffix}.json", hub)
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]


def read_tensors(name, weights: dict[str, str], hub: dict) -> tuple[dict, dict[str, str]]:
    """Tensors of a checkpoint, {tensor: file}, as they are on the disk, and what these files say."""
    tensors, told = {}, {}
    for path in {*weights.values()}:
        with safe_open(find_file(name, path, hub), "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys() if weights.get(key) == path}
            told |= file.metadata() or {}
    return tensors, told


def bad_table(name, variant, hub: dict) -> str | None:
    """Which file of rows that the index names cannot be opened, in Spanish."""
    for file in {file for key, file in weight_files(name, variant, hub).items() if "engram_tables" in key}:
        try:
            with safe_open(find_file(name, file, hub) or "", "pt"):
                pass
        except (OSError, SafetensorError):
            return f"A «{name}» le falta el archivo de la memoria {file}, o está a medias o sin cabecera: cópialo."
    return None


class PhiEngramPreTrainedModel(PreTrainedModel):
    config_class = PhiEngramConfig
    config: PhiEngramConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiEngramDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    memory_reason = ""  # why the rows are where they are, in Spanish
    was_phi: str | None = None  # digest of what a quantised Phi was before
    _can_record_outputs = {"hidden_states": PhiEngramDecoderLayer, "attentions": PhiAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise what no checkpoint gave. Tables and conv start at zero, so that a fresh graft changes nothing."""
        if isinstance(module, EngramHash):
            module.reset_buffers()
        elif isinstance(module, (EngramTable, EngramShortConv)):
            if module.weight is not None:
                init.zeros_(module.weight)
        elif isinstance(module, EngramLayer):
            for place, projection in enumerate((module.key_proj, module.value_proj)):
                init.copy_(projection.weight, module.fresh_projection(place))
        elif isinstance(module, PhiRotaryEmbedding):
            init.copy_(module.inv_freq, module.inverse_frequencies())
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path=None, *args, engram_storage: str = "auto", output_loading_info=False,
        **kwargs,
    ):  # fmt: skip
        """transformers' own, plus where the memory's rows live in this process.

        `engram_storage`: "gpu" (they follow the model), "ram", "disco" (read from the file as they are needed), or
        "auto", the fastest that fits into what is free.

        Raises ValueError: no such place. EngramFileError: a file of the memory is not what was saved.
        """
        if engram_storage not in PLACES:
            raise ValueError(f"engram_storage={engram_storage!r} no existe: elige entre {', '.join(PLACES)}.")
        name = pretrained_model_name_or_path
        empty = {} if name is None else {"empty_tables": True}
        hub = ("cache_dir", "token", "revision", "subfolder", "proxies", "local_files_only")
        source = name, kwargs.get("variant"), {key: kwargs[key] for key in hub if key in kwargs}
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **empty, **kwargs)
        except (OSError, SafetensorError) as error:  # transformers opens all files that the index names
            if bad := bad_table(*source):
                raise EngramFileError(bad) from error
            raise
        if name is not None and getattr(model, "_hf_peft_config_loaded", False):
            source = model.config.name_or_path, *source[1:]  # `name` is an adapter's, which says what it is for
        if getattr(model, "is_quantized", False):
            model._settle_quantised(*(source if empty else ()))
        if empty:
            absent = model._open_tables(*source, info["missing_keys"], engram_storage)
            info["missing_keys"] = type(info["missing_keys"])([*info["missing_keys"], *absent])
        elif engram_storage != "auto":
            model.move_memory(engram_storage)
        if model.can_generate() and model.generation_config.eos_token_id is None:  # as in Phi-1's published files
            model.generation_config.eos_token_id = model.config.eos_token_id
        if empty and model.can_generate() and find_file(name, FACTS_FILE, source[2]) is not None:
            try:
                model.set_facts(model.read_facts(name, **source[2]))
            except ValueError as error:
                logger.warning(f"{error} Se abre sin ellos.")
        return (model, info) if output_loading_info else model

    @property
    def memory_place(self) -> str:
        """"gpu", "ram" or "disco"; where they are, if the model was moved by hand."""
        table = next(iter(self.base_model.engram_tables.values()))
        return "gpu" if table.weight is not None and table.weight.is_cuda else table.place

    def move_memory(self, place: str):
        """Move the memory's rows to "gpu", "ram" or "disco", or to the fastest that fits ("auto").

        Raises ValueError: no such place; no GPU; or rows that are in no file cannot be left on disk.
        """
        self._place(place, {layer_id: table.dtype for layer_id, table in self.base_model.engram_tables.items()})

    def _place(self, wanted: str, kinds: dict[str, torch.dtype]):
        """As `move_memory`, in the precisions `kinds` where rows are read from a file."""
        tables = self.base_model.engram_tables
        size = sum(table.size(kinds[layer_id]) for layer_id, table in tables.items())
        on_file = all(table.file is not None for table in tables.values())
        dense = sum(p.nbytes for name, p in self.named_parameters() if "engram_tables" not in name)
        there = self.device if self.device.type == "cuda" else None
        place, reason = choose_place(wanted, size, 0 if there else dense, on_file, there)
        for layer_id, table in tables.items():
            device = self.base_model.layers[int(layer_id)].engram.value_proj.weight.device
            offloaded = place == "gpu" and device.type == "meta"  # by accelerate, which brings the layer alone
            table.settle("ram" if offloaded else place, kinds[layer_id])
            if place == "gpu" and not offloaded:
                table.to(device)
        self.memory_reason = reason

    def _settle_quantised(self, name=None, variant=None, hub=None):
        """Of a quantised model: the memory in the model's own precision, gradients through every layer, and what its
        Phi was before, for `fingerprints`."""
        for module in [*self.modules()]:
            if isinstance(module, EngramLayer):
                module.to(self.dtype)
            elif type(module) is nn.Linear and from_torchao(module.weight):
                module.__class__ = FrozenLinear
            elif type(module).__name__ == "Linear4bit":
                module.register_forward_pre_hook(unpack_4bit)
        if name is not None and self.can_generate():
            weights = weight_files(name, variant, hub)
            tensors, told = read_tensors(name, {key: weights[key] for key in self._phi if key in weights}, hub)
            self.was_phi = told.get("engram_phi") or sign_digest(tensors)

    def _open_tables(self, name, variant, hub, missing, wanted: str) -> list[str]:
        """Give the empty tables the rows of a checkpoint, in their precision or the model's where that is smaller.

        Zeros where it has none, and in a layer whose dense weights are `missing` from it: rows mean nothing beside new
        ones. Returns the names of these tables.
        """
        weights, absent, kinds = weight_files(name, variant, hub), [], {}
        for layer_id, table in self.base_model.engram_tables.items():
            key = f"engram_tables.{layer_id}.weight"  # as `PhiEngramModel` alone writes it
            key = key if key in weights else f"model.{key}"
            # Where none is named, an earlier version wrote it beside the others, under a name without variant.
            path = find_file(name, weights.get(key, TABLE_FILE.format(layer_id)), hub)
            lost = [key for key in missing if f"layers.{layer_id}.engram." in key]
            part = {name: file for name, file in weights.items() if f"layers.{layer_id}.engram." in name}
            dense, told = read_tensors(name, part, hub)
            # A value in both files tells a pair, whatever was done to the weights since.
            mate = None if lost else told.get(f"engram_mate_{layer_id}")
            if path is not None:
                table.file = TableFile(path, key, table.n_rows, table.d_head, mate)
                own = mate or self._mate(layer_id, None if lost else dense)
                mixed = table.file.mate not in (None, own)
                if mixed and lost:
                    table.file = None
                    logger.warning(
                        f"A «{name}» le falta {min(lost)}: sus filas de la capa {layer_id} no se leen, y esa memoria "
                        "queda sin entrenar. Vuelve a copiar el modelo entero."
                    )
                elif mixed and table.file.told:
                    logger.warning(REWRITTEN.format(name, layer_id))
                elif mixed:  # of an earlier version, whose dense weights' file says nothing
                    raise table.file._bad(f"{OTHER_ROWS} ({MIXED})")
            elif not lost:
                logger.warning(f"A «{name}» le faltan las filas de la capa {layer_id}: esa memoria queda sin entrenar.")
            if table.file is None:
                table.own(torch.zeros(table.n_rows, table.d_head, dtype=self.dtype, device="cpu"))
                absent.append(self._table_key(layer_id))
            kinds[layer_id] = min(table.dtype, self.dtype, key=lambda dtype: dtype.itemsize)
        self._place(wanted, kinds)
        return absent

    def _table_key(self, layer_id: int) -> str:
        return f"{'' if self.base_model is self else 'model.'}engram_tables.{layer_id}.weight"

    def _mate(self, layer_id: int, state: dict | None = None) -> str | None:
        """Digest of the dense weights beside which a layer's rows were trained."""
        state = self.state_dict() if state is None else state
        state = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in state.items()}
        start = f"model.layers.{layer_id}.engram."
        return sign_digest({name: tensor for name, tensor in state.items() if name.startswith(start)})

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, variant=None,
        engram_precision: str | None = None, **kwargs,
    ):  # fmt: skip
        """transformers' own, with the rows of each Engram layer in a file of its own, written some at a time, and an
        index that names them beside the other tensors, so that whoever loads a sharded checkpoint loads them too.

        `engram_precision`: "float32", "float16", "bfloat16" or "int8"; by default that which the rows have.

        Raises ValueError: no such precision; pickled weights in the folder; a model inside an adapter of peft; or
            `push_to_hub` with a precision, a variant or other weights, none of which it would heed.
        """
        if engram_precision not in (None, *PRECISIONS):
            raise ValueError(f"engram_precision={engram_precision!r} no existe: elige entre {', '.join(PRECISIONS)}.")
        if push_to_hub and (engram_precision or variant or state_dict is not None):  # it saves once more, its own way
            cure = f"Guarda sin él, y después: hf upload NOMBRE {save_directory}"
            raise ValueError(f"push_to_hub subiría otra cosa. {cure}")
        code = __name__.split(".")[-1]  # either class opens what the other one saved
        classes = {"AutoModel": f"{code}.PhiEngramModel", "AutoModelForCausalLM": f"{code}.PhiEngramForCausalLM"}
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **classes}
        state = dict(self.state_dict() if state_dict is None else state_dict)
        given = {name: state.pop(name) for name in list(state) if "engram_tables" in name}
        token = {} if kwargs.get("token") is None else {"token": kwargs["token"]}
        repo = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr", "private") if key in kwargs}
        adapter = getattr(self, "_hf_peft_config_loaded", False)  # of LoRA, say: it alone is saved then
        if not adapter and any(map(WRAPPED.search, state)):
            raise ValueError(
                "Este modelo lleva un adaptador de peft, y así no se abriría lo guardado. Guarda el adaptador, con el "
                "save_pretrained del PeftModel, o fúndelo antes: peft_model.merge_and_unload().save_pretrained(…)"
            )
        folder, suffix, tables = Path(save_directory), f".{variant}" if variant else "", []
        mates = {} if adapter else {i: self._mate(i, state) for i in self.config.engram_layer_ids}
        if is_main_process and not adapter:
            folder.mkdir(parents=True, exist_ok=True)
            if stale := next(folder.glob("pytorch_model.bin*"), None):
                raise ValueError(f"Otros leerían {stale} en lugar de lo que se guarda: bórralo o elige otra carpeta.")
            for layer_id, mate in mates.items():
                table, key = self.base_model.engram_tables[str(layer_id)], self._table_key(layer_id)
                if key in given:  # gathered by a trainer, perhaps
                    table = EngramTable(table.n_rows, table.d_head, empty=True)
                    table.own(given[key])
                tables.append(folder / TABLE_FILE.format(layer_id).replace("model", f"model{suffix}"))
                dtype = PRECISIONS.get(engram_precision, table.dtype)
                write_table(tables[-1], key, table.chunks(dtype), dtype, table.n_rows, table.d_head, mate)
        kwargs |= dict(is_main_process=is_main_process, variant=variant, state_dict=None if adapter else state)
        told = {"engram_phi": self.was_phi, **{f"engram_mate_{i}": mate for i, mate in mates.items()}}
        told, quantiser = {key: text for key, text in told.items() if text}, vars(self).get("hf_quantizer")
        try:
            self.hf_quantizer = quantiser if adapter else Saving(quantiser, state, told)
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.hf_quantizer = quantiser
        if tables:
            index_files(folder, suffix, tables)
            if self.can_generate():
                self.save_facts(folder)
        if push_to_hub and is_main_process:
            self.push_to_hub(repo.pop("repo_id", folder.name), **repo, **token)

    def push_to_hub(self, repo_id, **kwargs):
        """transformers' own. A lone "model.safetensors" of an earlier version goes: loaders would prefer it."""
        pushed = super().push_to_hub(repo_id, **kwargs)
        hub, repo_id = HfApi(token=kwargs.get("token")), pushed.repo_url.repo_id
        revision = pushed.pr_revision or kwargs.get("revision")
        adapter = getattr(self, "_hf_peft_config_loaded", False)  # pushed alone, beside whatever is there
        if not adapter and hub.file_exists(repo_id, "model.safetensors", revision=revision):
            hub.delete_file("model.safetensors", repo_id, revision=revision)
        return pushed

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """transformers' own, and the memory's vocabulary projection with it.

        Raises ValueError: the token that stands for "before the start" would be lost.
        """
        size, multiple = new_num_tokens or self.config.vocab_size, pad_to_multiple_of or 1
        pad = self.config.engram_pad_id
        if -(-size // multiple) * multiple <= pad:
            raise ValueError(f"Con {size} tokens se perdería engram_pad_id={pad}: el menor tamaño es {pad + 1}.")
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.base_model.engram_hash.resize(self.config.vocab_size)
        return embeddings


# ----------------------------------------------------------------------------------------------------------------------
# The model: ids -> hidden -> logits, loss
# ----------------------------------------------------------------------------------------------------------------------


def real_tokens(attention_mask, n_tokens: int, past_length) -> torch.Tensor | None:
    """Which of the last `n_tokens` tokens are no padding: bool [B, T], or None when nothing says that any is.

    Args:
        attention_mask: [B, S]; or [B, 1, T, S] (bool, or float with 0 for "attend"): a real token attends to itself.
        past_length: tokens in the cache, an int or an int64 tensor.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        return attention_mask[:, -n_tokens:].bool()
    device = attention_mask.device
    own = (torch.arange(n_tokens, device=device) + past_length).expand(attention_mask.shape[0], -1)[..., None]
    diagonal = attention_mask[:, 0].gather(-1, own)[..., 0]  # [B, T]
    return diagonal if diagonal.dtype == torch.bool else diagonal >= 0


def check_ids(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, vocab_size: int):
    """Raise ValueError where ids are missing, do not fit the vectors beside them, or are no tokens.

    Looking at ids on a card is a wait for it: there an embedding's own check is left to find them, unless vectors take
    its place.
    """
    if input_ids is None:
        raise ValueError(
            "Falta input_ids: la memoria Engram se consulta con los tokens. Pásalos con inputs_embeds. (De peft, "
            "prompt tuning y p-tuning solo dan vectores: usa LoRA.)"
        )
    if inputs_embeds is not None and inputs_embeds.shape[:2] != input_ids.shape:
        raise ValueError(
            f"input_ids es de {list(input_ids.shape)} e inputs_embeds de {list(inputs_embeds.shape)}: hace falta un "
            "token por vector, engram_pad_id si no viene de ninguno."
        )
    if torch.compiler.is_compiling() or not input_ids.numel():
        return
    if input_ids.device.type == "cpu" or (inputs_embeds is not None and input_ids.device.type != "meta"):
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids tiene {low if low < 0 else high}, que no es un token: van de 0 a vocab_size-1="
                f"{vocab_size - 1}. El relleno se marca en attention_mask y lo que no cuenta, con -100, en labels."
            )


def packed_positions(cu_seq_lens: torch.Tensor, n_tokens: int) -> torch.LongTensor:
    """Cumulative lengths [n_texts + 1] of the texts in one row, as flash attention takes them -> positions [1, T]."""
    places = torch.arange(n_tokens, device=cu_seq_lens.device)
    return (places - cu_seq_lens[torch.searchsorted(cu_seq_lens, places, right=True) - 1])[None]


def text_reach(position_ids, real, past_length, longest: int) -> torch.LongTensor | None:
    """How many tokens back each token's own text begins, by the caller's positions: int64 [B or 1, T].

    A text begins where positions begin again. What the cache holds belongs to the first token's text as far back as
    its position says. None where all that is within `longest` is of one text; on a card that would be a wait for it,
    so there nobody looks.

    Args:
        position_ids: int64 [B or 1, T]. real, past_length: see `real_tokens`.
    """
    first = position_ids[:, :1]
    begins = position_ids[:, 1:] <= position_ids[:, :-1].clamp_min(0)
    if real is not None:
        begins = begins & real[:, 1:].to(begins.device)
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        if not begins.any() and first.min() >= min(longest, int(past_length)):
            return None
    if position_ids.shape[1] == 1:
        return position_ids
    places = torch.arange(position_ids.shape[1], device=begins.device)
    # Where the text of each token begins: a place in this call, or before it.
    origin = torch.cat((-first.expand(len(begins), 1), places[1:].where(begins, -first)), dim=1).cummax(dim=1).values
    return places - origin


class PhiEngramModel(PhiEngramPreTrainedModel):
    """Phi's decoder stack with memory: ids -> last hidden state."""

    def __init__(self, config: PhiEngramConfig, tokenizer=None, empty_tables: bool = False):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.engram_hash = EngramHash(config, tokenizer)
        d_head = config.n_embed_per_ngram // config.n_head_per_ngram
        sizes = {str(i): sum(map(sum, primes)) for i, primes in zip(config.engram_layer_ids, head_primes(config))}
        self.engram_tables = nn.ModuleDict({i: EngramTable(n, d_head, empty_tables) for i, n in sizes.items()})
        self.layers = nn.ModuleList([PhiEngramDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.facts = nn.ModuleDict({str(layer_id): EngramFacts() for layer_id in config.engram_layer_ids})
        self.rotary_emb = PhiRotaryEmbedding(config)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # Tokens that the memory looks back on.
        self.longest = max(LONGEST_KEY - 1, (config.engram_kernel_size - 1) * config.max_ngram_size)
        if empty_tables:  # transformers need not know of what is read apart
            self._keys_to_ignore_on_load_unexpected = [rf"engram_tables\.{i}\.weight$" for i in config.engram_layer_ids]
        if getattr(config, "quantization_config", None):  # the memory's own weights are few, and stay as they are
            self._keep_in_fp32_modules = [r".+\.engram\."]
        self.use_memory = True  # False: plain Phi, to the last bit; of the running process, never saved
        self.gradient_checkpointing = False
        self.post_init()

    def _reading(self) -> list[int]:
        """Engram layers below `config.num_hidden_layers`, which transformers lowers while a draft exits early."""
        return [i for i in self.config.engram_layer_ids if i < self.config.num_hidden_layers]

    def _windows(self, input_ids, real, cache, reach) -> torch.LongTensor:
        """Canonical tokens up to each position, as many as are looked up; the cache keeps ids for the next call."""
        stored = input_ids + 1  # 0 is left to mean "before the start"
        if real is not None:
            stored = stored.masked_fill(~real, 0)
        kept = max(self.config.max_ngram_size, LONGEST_KEY) - 1
        history = with_history(stored, kept, None, 0, 0)
        # Every Engram layer keeps the ids: a cache layer with an unused state cannot be cut back.
        for layer_id in self._reading():
            # Kept where the layer computes (its weights are on "meta" while accelerate has them offloaded): beam search
            # reorders all states of a cache layer on one device.
            device = self.layers[layer_id].engram.value_proj.weight.device
            ids = stored if device.type == "meta" else stored.to(device)
            history = with_history(ids, kept, cache, layer_id, state_idx=1)
        length = kept + 1 if any(facts.lengths for facts in self.facts.values()) else self.config.max_ngram_size
        history = history[:, -(input_ids.shape[1] + length - 1) :].to(stored.device)
        return self.engram_hash.windows(history, length, reach)

    @torch.no_grad()
    def ngram_indices(
        self, input_ids: torch.LongTensor, attention_mask=None, position_ids: torch.LongTensor | None = None
    ) -> dict[int, torch.LongTensor]:
        """Rows that each position of ids [B, T] reads, as every head's index within its own table.

        Returns {layer_id: int64 [B, T, (N-1)*K]}, order 2 first, heads in order (the golden files' layout).
        """
        check_ids(input_ids, None, self.config.vocab_size)
        real = real_tokens(attention_mask, input_ids.shape[1], 0)
        reach = None if position_ids is None else text_reach(position_ids, real, 0, self.longest)
        return dict(zip(self.config.engram_layer_ids, self.engram_hash(self._windows(input_ids, real, None, reach))))

    def _usable_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache that this forward pass reads and writes: the given one, a new one, or None."""
        config = self.config
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # The replay in backward would write a cache a second time.
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "Con gradient_checkpointing no se puede entrenar sobre una caché que ya tiene tokens. Pasa el "
                    "texto entero sin caché, o apágalo antes: model.gradient_checkpointing_disable()."
                )
            if cache is not None or use_cache:
                logger.warning_once("Con gradient_checkpointing se entrena sin caché: use_cache=True no se atiende.")
            return None
        if cache is None:
            wanted = config.use_cache if use_cache is None else use_cache
            return DynamicCache(config=config) if wanted else None
        roomy = all(hasattr(cache.layers[i], "conv_states") for i in self._reading() if i < len(cache.layers))
        if not roomy or len(cache.layers) < config.num_hidden_layers or getattr(cache, "offloading", False):
            raise ValueError(
                "Esta caché no puede guardar el estado de la memoria Engram. Créala con la configuración del modelo: "
                "DynamicCache(config=model.config) o StaticCache(config=model.config, max_cache_len=…). (La de prefix "
                "tuning, de peft, no sirve: usa LoRA.)"
            )
        if config.num_hidden_layers < len(self.layers):
            del cache.layers[config.num_hidden_layers :]  # a draft's: layers that stay empty cannot be cut back
        return cache

    def _check_writable(self):
        """Raise ValueError where a forward pass of training would train rows that can only be read."""
        for layer_id in self.config.engram_layer_ids if self.training and torch.is_grad_enabled() else ():
            trained = self.layers[layer_id].engram.value_proj.weight.requires_grad
            if trained and not self.engram_tables[str(layer_id)].writable:
                raise ValueError(
                    "Esta memoria solo se puede leer (está en disco o en int8) y así no aprende. Ábrela en 'ram', y en "
                    "float32: python load_phi_engram.py --modelo CARPETA --precision-memoria float32 --salida OTRA"
                )

    def _expect(self, indices: dict[int, torch.LongTensor], hidden: torch.Tensor, cache: Cache | None):
        """Begin to bring the rows; where the memory is off, leave in the cache that it added nothing."""
        if self.use_memory:
            for layer_id in sorted(indices):
                self.engram_tables[str(layer_id)].announce(indices[layer_id])
            return
        # A cache layer with an unused state can neither be cut back nor reordered.
        silence = hidden.new_zeros(*hidden.shape[:2], self.config.hidden_size).transpose(1, 2)
        for layer_id in indices:
            with_history(silence, self.layers[layer_id].engram.conv.history, cache, layer_id, state_idx=0)

    @torch.compiler.disable(reason=BESIDE)
    def _bring(self, indices: dict[int, torch.LongTensor]) -> dict[int, torch.Tensor]:
        return {i: self.engram_tables[str(i)](index) for i, index in indices.items()}

    @capture_outputs
    @old_cache_name
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None, cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None, use_cache: bool | None = None,
        past_key_values: Cache | None = None, **kwargs,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """
        Args:
            input_ids: int64 [B, T]; always needed, as the memory is addressed by tokens.
            inputs_embeds: [B, T, d], beside them, in place of the token embeddings.
            position_ids: int64 [B or 1, T]; where they begin again, so does the memory (several texts in one row).
            attention_mask: [B, S], 0 for padding, S = cached + T; [B, 1, T, S]; or of `create_masks_for_generate`.
            cache: made with `config=model.config`; `past_key_values` is its name up to transformers 5.23.
        Returns:
            `last_hidden_state` [B, T, d]; with `output_hidden_states` or `output_attentions` what transformers records.
        Raises:
            ValueError: ids that are missing or no tokens, a cache without room, or rows to train that are only read.
        """
        check_ids(input_ids, inputs_embeds, self.config.vocab_size)
        config = self.config
        cache = self._usable_cache(past_key_values if cache is None else cache, use_cache)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_length = cache.get_seq_length() if cache is not None else 0
        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            position_ids = packed_positions(kwargs["cu_seq_lens_q"], hidden.shape[1])
        given_positions = position_ids
        if position_ids is None:
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past_length).unsqueeze(0)
        if isinstance(attention_mask, dict):
            causal_mask, real = attention_mask["full_attention"], attention_mask["engram"]
        else:
            real = real_tokens(attention_mask, hidden.shape[1], past_length)
            causal_mask = create_causal_mask(
                config=config, inputs_embeds=hidden, attention_mask=attention_mask, **{CACHE: cache},
                # It looks for texts that begin again among the caller's alone: a look is a wait for the card.
                position_ids=given_positions,
            )  # fmt: skip
        reach = None if given_positions is None else text_reach(given_positions, real, past_length, self.longest)
        windows = self._windows(input_ids, real, cache, reach)
        indices = self.engram_hash(windows) + self.engram_hash.offsets[:, None, None]
        indices = {i: index for i, index in zip(config.engram_layer_ids, indices) if i < config.num_hidden_layers}
        self._check_writable()
        self._expect(indices, hidden, cache)
        # A graph that is cut inside the loop is compiled layer by layer, and no more than eight: rows come before it.
        ahead = self.use_memory and torch.compiler.is_compiling()
        ahead = ahead and any(self.engram_tables[str(i)].brings for i in indices)
        brought = self._bring(indices) if ahead else {}
        hidden = self.embed_dropout(hidden)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
        position_embeddings = self.rotary_emb(hidden, position_ids)
        for i, layer in zip(range(config.num_hidden_layers), self.layers):
            rows = None
            if self.use_memory and i in indices:
                rows = brought[i] if brought else self.engram_tables[str(i)](indices[i])
                rows = self.facts[str(i)](rows, windows)
            hidden = layer(
                hidden, rows, real, attention=attention, attention_mask=causal_mask,
                position_embeddings=position_embeddings, cache=cache, position_ids=position_ids, reach=reach, **kwargs,
            )  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden), **{CACHE: cache})


class PhiEngramForCausalLM(PhiEngramPreTrainedModel, GenerationMixin):
    """Phi-1 with Engram as a language model: ids -> logits, loss. Generating, saving and sharing are inherited.

    Opening a plain Phi checkpoint grafts an untrained memory on it, whose logits are the plain model's exactly.
    `tokenizer` gives the vocabulary projection where no checkpoint does; by default, `config.tokenizer_name_or_path`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}  # as in Phi, whose configuration brings the rest of the plan

    def __init__(self, config: PhiEngramConfig, tokenizer=None, empty_tables: bool = False):
        super().__init__(config)
        self.model = PhiEngramModel(config, tokenizer, empty_tables)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._keys_to_ignore_on_load_unexpected = self.model._keys_to_ignore_on_load_unexpected
        self.facts: list[Fact] = []  # in the order in which they were taught
        self._phi = [name for name in self.state_dict() if "engram" not in name]  # as they are named without peft
        self.post_init()

    def fingerprints(self, n_tokens: int | None = None) -> dict[str, str]:
        """What a memory depends on, {"backbone", "hash", "projection"}: the same in every precision and inside peft.

        `n_tokens`: of the first tokens of the vocabulary only, as before it grew.
        """
        config, ids = self.config, self.model.engram_hash
        layout = (
            config.engram_layer_ids, config.max_ngram_size, config.n_embed_per_ngram, config.n_head_per_ngram,
            config.engram_kernel_size, config.engram_pad_id, config.engram_bias, config.hidden_size,
            ids.primes.tolist(), ids.multipliers.tolist(),
        )  # fmt: skip
        plain = {WRAPPED.sub(".", name): tensor for name, tensor in self.state_dict().items()}
        by_token = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
        names = () if self.was_phi else self._phi
        backbone = {name: plain[name][: n_tokens if name in by_token else None] for name in names}
        return {
            "projection": hashlib.sha256(ids.token_map[:n_tokens].cpu().numpy().tobytes()).hexdigest(),
            "hash": hashlib.sha256(repr(layout).encode()).hexdigest(),
            "backbone": self.was_phi or sign_digest(backbone),
        }

    def resize_token_embeddings(self, *args, **kwargs):
        """As above; what was taught, and put on this Phi, is noted as of the one with the new vocabulary."""
        phi, then = self.fingerprints()["backbone"], {fact.layer: self.fact_digests(fact.layer) for fact in self.facts}
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        now = {layer: self.fact_digests(layer) for layer in then}
        held = [fact.made_for == then[fact.layer] for fact in self.facts]
        self.set_facts(replace(f, made_for=now[f.layer]) if same else f for f, same in zip(self.facts, held))
        if self.config.engram_backbone == phi:
            self.config.engram_backbone = self.fingerprints()["backbone"]
        return embeddings

    def set_facts(self, facts: Iterable[Fact]):
        """Have these facts and no others; of two with the same key the later one is read."""
        self.facts = [*facts]
        device = self.model.embed_tokens.weight.device
        for layer_id, overlay in self.model.facts.items():
            overlay.set([fact for fact in self.facts if str(fact.layer) == layer_id], device)

    def fact_digests(self, layer: int) -> dict[str, str]:
        """What a layer's facts depend on, the same in every precision."""
        return {**self.fingerprints(), "layer": self._mate(layer)}

    def save_facts(self, folder):
        """Save the facts in `folder`, whole or not at all: FACTS_FILE, and beside it their rows. Those of before a
        training, which changed what they were written for, are left out, and a warning says so."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        digests = {str(layer): self.fact_digests(layer) for layer in {fact.layer for fact in self.facts}}
        facts = [fact for fact in self.facts if fact.made_for == digests[str(fact.layer)]]
        if lost := len(self.facts) - len(facts):
            logger.warning(f"{lost} recuerdos no se guardan: el modelo ha cambiado desde que se escribieron.")
        tensors = {f"{i}.{part}": getattr(fact, part) for i, fact in enumerate(facts) for part in ("keys", "rows")}
        bits = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors.values())
        name = f"engram_facts-{hashlib.sha256(bits).hexdigest()[:12]}.safetensors"
        if facts:
            told = [{key: getattr(fact, key) for key in TOLD} | fact.notes for fact in facts]
            text = dict(format=1, rows=name, digests=digests, facts=told)
            temporary = folder / f"{FACTS_FILE}.{os.getpid()}.tmp"
            save_file(tensors, folder / name, {"format": "pt"})
            as_any_new_file(folder / name)
            temporary.write_text(json.dumps(text, ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(temporary, folder / FACTS_FILE)
        else:
            (folder / FACTS_FILE).unlink(missing_ok=True)
        for old in folder.glob("engram_facts-*.safetensors"):
            if not facts or old.name != name:
                old.unlink(missing_ok=True)

    def read_facts(self, name, **hub) -> list[Fact]:
        """Facts that `save_facts` wrote, for `set_facts`, from a folder or a name on the Hub (`hub`: `token`…).

        Raises ValueError: they are of another Phi, memory or layer, or the files are of no use; the text says which.
        """
        try:
            said, facts = json.loads(Path(cached_file(name, FACTS_FILE, **hub)).read_text(encoding="utf-8")), []
            if said["format"] != 1:
                raise ValueError(f"Los recuerdos de «{name}» tienen el formato {said['format']} y aquí se lee el 1.")
            with safe_open(cached_file(name, Path(said["rows"]).name, **hub), "pt") as file:
                for i, text in enumerate(said["facts"]):
                    known = {key: text.pop(key) for key in TOLD}
                    known |= {key: file.get_tensor(f"{i}.{key}") for key in ("keys", "rows")}
                    known["keys"] = F.pad(known["keys"], (LONGEST_KEY - known["keys"].shape[-1], 0), value=-1)
                    facts.append(Fact(**known, notes=text, made_for=said["digests"][str(known["layer"])]))
        except (KeyError, TypeError, OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise ValueError(f"Los recuerdos de «{name}» están dañados o a medias: vuelve a copiarlos.") from error
        for layer, digests in said["digests"].items():
            if str(layer) not in self.model.facts:
                raise ValueError(f"Los recuerdos de «{name}» son de la capa {layer}, y aquí no hay memoria en ella.")
            if reason := differing(digests, self.fact_digests(int(layer))):
                raise ValueError(f"Los recuerdos de «{name}» (capa {layer}) no valen aquí: son de {reason}.")
        return facts

    @old_cache_name
    @can_return_tuple
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None, cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None, labels: torch.LongTensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | torch.Tensor = 0, past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """`PhiEngramModel.forward`, plus:

        Args:
            labels: int64 [B, T], -100 for "not counted"; shifted here. `num_items_in_batch` in kwargs divides the sum,
                which makes accumulation over unequal batches exact.
            logits_to_keep: compute only the last n positions' logits (0: all), or those of a 1D index tensor.
        Returns:
            `logits` [B, T, V], and `loss`, nats per token, when labels were given.
        """
        outputs = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=past_key_values if cache is None else cache, inputs_embeds=inputs_embeds, use_cache=use_cache,
            **kwargs,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        rest = {key: outputs[key] for key in outputs if key != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """transformers' own; refuses, before anything changes, what would answer wrongly or leave the model broken.

        Raises ValueError: rows padded on the right, a cache that is quantised or offloaded, a draft with a static one,
            or an early exit from no layer.
        """

        def option(name):
            configs = generation_config, self.generation_config
            given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in given if value is not None), None)

        kind, given = option("cache_implementation") or "", kwargs.get("past_key_values", kwargs.get("cache"))
        if "quantized" in kind or "offloaded" in kind:
            raise ValueError(f'cache_implementation="{kind}" no puede guardar la memoria Engram. Usa "static".')
        drafts = [*filter(option, ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"))]
        if drafts and ("static" in kind or isinstance(given, StaticCache)):
            raise ValueError(f"{drafts[0]} no va con una caché estática, que no se recorta. Quita una de las dos.")
        depth, early = len(self.model.layers), option("assistant_early_exit")
        if early is not None and not 1 <= early <= depth:
            raise ValueError(f"assistant_early_exit={early} no es una capa: van de 1 a {depth}.")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        self._check_padding(ids, kwargs.get("attention_mask"), option("pad_token_id"), option("eos_token_id"))
        try:
            return super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            self.config.num_hidden_layers = depth  # lowered still, where a draft that exits early was interrupted

    def _check_padding(self, ids, mask, pad, eos):
        if mask is None and ids is not None and pad is not None and ids.ndim == 2 and ids.shape[1]:
            ends = (torch.as_tensor(-1 if eos is None else eos) == int(pad)).any()
            mask = None if ends else ids != pad  # so transformers tells padding where no mask is given
        if mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise ValueError('Hay filas rellenadas por la derecha. Por la izquierda: tokenizer.padding_side = "left".')

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: the paged cache of continuous batching has no place for the memory's state."""
        raise ValueError("La generación por lotes continuos no puede guardar la memoria Engram. Usa model.generate.")

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, cache=None, position_ids=None, past_key_values=None, **kwargs
    ):
        """What `generate` prepares ahead for a static cache: the causal mask, and which new tokens are real."""
        return {
            "full_attention": create_causal_mask(
                config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                position_ids=position_ids, **{CACHE: past_key_values if cache is None else cache},
            ),  # fmt: skip
            "engram": real_tokens(attention_mask, inputs_embeds.shape[1], 0),
        }

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # transformers drops the ids where it uses embeddings; the memory needs both.
        if inputs.get("inputs_embeds") is not None and input_ids.shape[1]:
            check_ids(input_ids, inputs_embeds, self.config.vocab_size)
            inputs["input_ids"] = input_ids[:, -inputs["inputs_embeds"].shape[1] :]
        return inputs


PhiEngramConfig.register_for_auto_class()
PhiEngramModel.register_for_auto_class("AutoModel")
PhiEngramForCausalLM.register_for_auto_class("AutoModelForCausalLM")
if __name__.startswith("transformers_modules."):
    # A saved folder's code serves that folder alone: registered, it would be run for all. What AutoTokenizer finds, so
    # as not to ask again whether to trust it, is a configuration that counts as one of transformers' own.
    if "phi_engram" not in CONFIG_MAPPING:
        names = {"model_type": "phi_engram", "__module__": PhiConfig.__module__}
        AutoConfig.register("phi_engram", type("PhiEngramConfig", (PhiConfig,), names))
else:
    AutoConfig.register("phi_engram", PhiEngramConfig, exist_ok=True)
    AutoModel.register(PhiEngramConfig, PhiEngramModel, exist_ok=True)
    AutoModelForCausalLM.register(PhiEngramConfig, PhiEngramForCausalLM, exist_ok=True)


if __name__ == "__main__":
    raise SystemExit("Este archivo es el modelo y no se ejecuta. Para hablar con él: python chat_phi_engram.py")
