"""Phi-1 with a conditional memory (DeepSeek's Engram), as one self-contained transformers model.

    from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM
    model = PhiEngramForCausalLM.from_pretrained("phi1-engram")           # a folder made by load_phi_engram.py
    model = PhiEngramForCausalLM(PhiEngramConfig(hidden_size=256, num_hidden_layers=2))     # or from scratch

The file is read in the order in which data flows: configuration, vocabulary projection, n-gram hash, table,
Engram layer, Phi with rotary attention, language model.

Sources cited below: "paper" is Cheng et al., 2026, "Conditional Memory via Scalable Lookup: A New Axis of Sparsity
for Large Language Models" (arXiv 2601.07372); "demo" is engram_demo_v1.py in deepseek-ai/Engram.

Shapes: B batch, T tokens, d hidden size, V vocabulary, N largest n-gram order, K heads per order,
H = (N-1)*K heads per layer, d_head values per row, L Engram layers.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sympy import nextprime
from torch import nn
from transformers import (
    AutoConfig,
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
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PHI_1 = "microsoft/phi-1"
END_OF_TEXT = 50256  # <|endoftext|> in Phi-1's tokenizer; its published config names no stop token


# ----------------------------------------------------------------------------------------------------------------------
# Configuration
# ----------------------------------------------------------------------------------------------------------------------


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
        hc_mult: hyper-connection streams. Phi has a single residual stream, so 1 is the only value.

    Raises:
        ValueError: a value is out of range; the message (Spanish) names it and what is allowed.
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
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} no es válido: tiene que ser un número entero mayor que cero.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} no es divisible entre num_attention_heads={self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} no es divisible entre "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(
                f"rope_type={rope_type!r} no está admitido: Phi-1 usa posiciones rotatorias sin escalar "
                "('default'). Quita rope_scaling de la configuración."
            )
        if self.hc_mult != 1:
            raise ValueError(
                f"hc_mult={self.hc_mult!r} no es posible: Phi tiene una sola corriente residual y el único valor es 1. "
                "Las hiperconexiones de varias corrientes exigirían otro modelo base."
            )
        if self.max_ngram_size < 2:
            raise ValueError(f"max_ngram_size={self.max_ngram_size} no es válido: la memoria empieza en pares (2).")
        if self.n_embed_per_ngram % self.n_head_per_ngram:
            raise ValueError(
                f"n_embed_per_ngram={self.n_embed_per_ngram} no es divisible entre "
                f"n_head_per_ngram={self.n_head_per_ngram}: cada cabeza guarda el mismo número de valores."
            )
        if not isinstance(self.engram_seed, int) or self.engram_seed < 0:
            raise ValueError(f"engram_seed={self.engram_seed!r} no es válida: es un número entero, 0 o mayor.")
        orders = self.max_ngram_size - 1
        if self.engram_vocab_size is None:
            self.engram_vocab_size = [256000] * orders
        sizes = self.engram_vocab_size
        if not isinstance(sizes, (list, tuple)) or len(sizes) != orders:
            raise ValueError(
                f"engram_vocab_size={sizes!r} no es válido: con max_ngram_size={self.max_ngram_size} hace falta una "
                f"lista de {orders} tamaño(s), uno por orden de 2 a {self.max_ngram_size}."
            )
        if any(not isinstance(size, int) or isinstance(size, bool) or size < 2 for size in sizes):
            raise ValueError(f"engram_vocab_size={sizes!r} no es válido: cada tamaño es un entero de 2 en adelante.")
        self.engram_vocab_size = list(sizes)
        self._check_layers()
        if self.eos_token_id is None and self.vocab_size > END_OF_TEXT:
            self.eos_token_id = END_OF_TEXT
        if self.engram_pad_id is None:
            eos = self.eos_token_id[0] if isinstance(self.eos_token_id, (list, tuple)) else self.eos_token_id
            self.engram_pad_id = END_OF_TEXT if self.vocab_size > END_OF_TEXT else (eos or 0)
        pad = self.engram_pad_id
        if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < self.vocab_size:
            raise ValueError(
                f"engram_pad_id={pad!r} no es válido: tiene que ser un token de 0 a vocab_size-1={self.vocab_size - 1}."
            )
        # Each Engram layer keeps two states in transformers' own cache: conv inputs (0) and token ids (1).
        self.layer_types = [
            "hybrid" if i in self.engram_layer_ids else "full_attention" for i in range(self.num_hidden_layers)
        ]
        self.number_of_conv_states = 2

    def _check_layers(self):
        layers, depth = self.engram_layer_ids, self.num_hidden_layers
        example = min(1, depth - 1)
        allowed = f"Las capas de este modelo van de 0 a {depth - 1}; por ejemplo engram_layer_ids=[{example}]."
        if layers is None:
            layers = [i for i in (1, 15) if i < depth]
            if not layers:
                raise ValueError(f"Un modelo de {depth} capa no tiene la capa 1, la primera por defecto. {allowed}")
        if not isinstance(layers, (list, tuple)) or not layers:
            raise ValueError(f"engram_layer_ids={layers!r} no es válido: hace falta al menos una capa. {allowed}")
        for i in layers:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < depth:
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

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; ids without a token map where `pad_id` maps.
    Returns:
        int64 [vocab_size].
    Raises:
        ValueError: the tokenizer has more tokens than `vocab_size`, or no token `pad_id`.
    """
    from tokenizers import Regex, normalizers

    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"El tokenizer tiene {len(tokenizer)} tokens y el modelo solo vocab_size={vocab_size}: no es el tokenizer "
            "de este modelo. Indica el suyo con tokenizer_name_or_path o pásalo como tokenizer=…"
        )
    if pad_id >= len(tokenizer):
        raise ValueError(
            f"engram_pad_id={pad_id} no es un token del tokenizer, que va de 0 a {len(tokenizer) - 1}. "
            "Elige uno que exista, por ejemplo el de fin de texto."
        )
    one_space = "\ue000"  # private-use character: survives Strip, which would delete a lone space
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), one_space),
            normalizers.Strip(),
            normalizers.Replace(one_space, " "),
        ]
    )
    canonical, projection = {}, []
    for token_id in range(len(tokenizer)):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in text:
            key = tokenizer.convert_ids_to_tokens(token_id)
        else:
            key = normalizer.normalize_str(text) or text
        projection.append(canonical.setdefault(key, len(canonical)))
    projection += [projection[pad_id]] * (vocab_size - len(projection))
    return torch.tensor(projection, dtype=torch.long)


def _open_tokenizer(name: str):
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError and others for "not to be had"
        raise OSError(
            f"La memoria se construye con el tokenizer '{name}' y no se pudo abrir "
            f"({type(error).__name__}). Salidas: pasa uno ya abierto, PhiEngramForCausalLM(config, tokenizer=…); "
            "o la carpeta de uno, PhiEngramConfig(tokenizer_name_or_path='carpeta'); o prescinde de él con "
            "PhiEngramConfig(engram_tokenizer_compression=False)."
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
    bound = max(1, (np.iinfo(np.int64).max // canonical_size) // 2)
    rows = [
        np.random.default_rng(config.engram_seed + 10007 * layer_id).integers(
            0, bound, size=config.max_ngram_size, dtype=np.int64
        )
        for layer_id in config.engram_layer_ids
    ]
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

    def forward(self, history: torch.LongTensor) -> torch.LongTensor:
        """Hash the last N tokens at each position.

        Args:
            history: int64 [B, N-1+T]; token id + 1, and 0 for "before the start".
        Returns:
            int64 [L, B, T, H]: each head's index within its own table, order 2 first, heads in order.
        """
        ids = torch.where(history == 0, self.config.engram_pad_id, history - 1)
        windows = self.token_map[ids].unfold(1, self.max_ngram_size, 1)  # [B, T, N], oldest first
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


class EngramTable(nn.Module):
    """One layer's rows, all heads end to end (paper eq. 2). Zero means "never trained" and adds exactly nothing."""

    def __init__(self, n_rows: int, d_head: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_rows, d_head))
        # Row-sparse gradients are a choice of the training loop: AdamW, the usual optimiser, refuses them.
        self.sparse_grad = False

    def forward(self, row_ids: torch.LongTensor) -> torch.Tensor:
        """int64 [B, T, H] in 0..n_rows-1 -> rows [B, T, H, d_head]."""
        return F.embedding(row_ids.to(self.weight.device), self.weight, sparse=self.sparse_grad)


# ----------------------------------------------------------------------------------------------------------------------
# Engram layer: rows + hidden -> Y. Knows nothing of tokens or storage
# ----------------------------------------------------------------------------------------------------------------------


def with_history(x: torch.Tensor, length: int, cache: Cache | None, layer_idx: int, state_idx: int) -> torch.Tensor:
    """Put the `length` values that came before in front of x, and leave the last ones in the cache for the next call.

    Args:
        x: [B, ..., T], time last. Zeros mean "before the start".
    Returns:
        [B, ..., length + T].
    """
    if cache is not None:
        new = x.shape[-1]
        # At least one is kept, whatever its use: a cache layer with an empty state cannot be cut back.
        x = cache.update_conv_state(x, layer_idx, state_idx=state_idx, conv_kernel_size=max(length, 1))
        # While it records the past the cache returns more than was asked, and after a short first chunk less.
        x = x[..., -(length + new) :]
        return F.pad(x, (length + new - x.shape[-1], 0))
    return F.pad(x, (length, 0))


class EngramRMSNorm(nn.Module):
    """RMSNorm in float32 whatever the model's precision; returns float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, d, history + T] -> [B, T, d]."""
        length = x.shape[-1] - self.history
        # A sum of shifted products gives the same bits whatever T is, so that cached steps equal the whole.
        taps = [
            x[..., k * self.dilation : k * self.dilation + length].transpose(1, 2) * self.weight[:, 0, k]
            for k in range(self.weight.shape[-1])
        ]
        return sum(taps[1:], taps[0])


class EngramLayer(nn.Module):
    """Rows + hidden -> Y, what the memory adds to the hidden state (paper §2.3, eq. 3-5)."""

    def __init__(self, config: PhiEngramConfig, layer_idx: int):
        super().__init__()
        d_mem = (config.max_ngram_size - 1) * config.n_embed_per_ngram
        self.layer_idx = layer_idx
        self.key_proj = nn.Linear(d_mem, config.hidden_size, bias=config.engram_bias)
        self.value_proj = nn.Linear(d_mem, config.hidden_size, bias=config.engram_bias)
        self.gate = EngramGate(config.hidden_size)
        self.conv_norm = EngramRMSNorm(config.hidden_size, eps=1e-5)
        self.conv = EngramShortConv(config.hidden_size, config.engram_kernel_size, config.max_ngram_size)

    def forward(
        self, hidden: torch.Tensor, rows: torch.Tensor, real: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """
        Args:
            hidden: [B, T, d].
            rows: [B, T, H, d_head].
            real: bool [B, T], False where the token is padding; None when none is.
            cache: keeps the last conv inputs.
        Returns:
            Y [B, T, d], hidden's dtype; exactly zero where all rows in reach are zero and there is no bias.
        """
        memory = rows.flatten(-2).to(hidden.dtype)  # [B, T, d_mem]
        alpha = self.gate(hidden, self.key_proj(memory))
        gated = alpha.to(hidden.dtype) * self.value_proj(memory)
        if real is not None:
            gated = gated.masked_fill(~real[..., None], 0)
        conv_input = self.conv_norm(gated).to(hidden.dtype).transpose(1, 2)  # [B, d, T]
        conv_input = with_history(conv_input, self.conv.history, cache, self.layer_idx, state_idx=0)
        return F.silu(self.conv(conv_input)) + gated


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
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = int(head_dim * parameters["partial_rotary_factor"])
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.float) / rotary))

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B or 1, T] -> cos, sin, each [B or 1, T, rotary] in hidden's dtype."""
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden.device, torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, heads, T, rotary] by the angles of cos, sin [B, 1, T, rotary]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (turned * sin)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain softmax attention, the fallback of transformers' attention interface.

    query [B, heads, T, head_dim]; key, value [B, key heads, S, head_dim] -> output [B, T, heads, head_dim], weights.
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
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.dense = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)
        if config.qk_layernorm:
            self.q_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def forward(self, hidden, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        """[B, T, d] -> [B, T, d], attention weights or None."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden).view(shape).transpose(1, 2)  # [B, heads, T, head_dim]
        key = self.k_proj(hidden).view(shape).transpose(1, 2)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        if self.config.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        cos, sin = (angles.unsqueeze(1) for angles in position_embeddings)
        rotary = cos.shape[-1]
        query = torch.cat((rotate(query[..., :rotary], cos, sin), query[..., rotary:]), dim=-1)
        key = torch.cat((rotate(key[..., :rotary], cos, sin), key[..., rotary:]), dim=-1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(output.reshape(*hidden.shape[:-1], -1).contiguous()), weights


class PhiMLP(nn.Module):
    """[B, T, d] -> [B, T, d]."""

    def __init__(self, config: PhiEngramConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


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
        self, hidden, rows=None, real=None, *, attention_mask=None, position_embeddings=None, past_key_values=None,
        **kwargs,
    ):  # fmt: skip
        """[B, T, d] -> [B, T, d], attention weights or None.

        `rows` is positional, so that reentrant gradient checkpointing sees that it needs a gradient.
        """
        if self.engram is not None and rows is not None:
            hidden = hidden + self.engram(hidden, rows, real, past_key_values)
        normed = self.input_layernorm(hidden)
        attended, weights = self.self_attn(normed, position_embeddings, attention_mask, past_key_values, **kwargs)
        attended = self.resid_dropout(attended)
        return attended + self.resid_dropout(self.mlp(normed)) + hidden, weights


# ----------------------------------------------------------------------------------------------------------------------
# The model: ids -> hidden -> logits, loss
# ----------------------------------------------------------------------------------------------------------------------


def real_tokens(attention_mask, n_tokens: int, past_length) -> torch.Tensor | None:
    """Which of the last `n_tokens` tokens are no padding: bool [B, T], or None when nothing says that any is.

    Args:
        attention_mask: [B, S] as a user gives it; or [B, 1, T, S] prepared (bool, or float with 0 for "attend"), where
            a real token is one that attends to itself.
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


class PhiEngramPreTrainedModel(PreTrainedModel):
    config_class = PhiEngramConfig
    config: PhiEngramConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiEngramDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise what no checkpoint gave. Tables and conv start at zero, so that a fresh graft changes nothing."""
        if isinstance(module, EngramHash):
            module.reset_buffers()
        elif isinstance(module, (EngramTable, EngramShortConv)):
            init.zeros_(module.weight)
        elif isinstance(module, EngramRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, PhiRotaryEmbedding):
            init.copy_(module.inv_freq, module.inverse_frequencies())
        else:
            super()._init_weights(module)


class PhiEngramModel(PhiEngramPreTrainedModel):
    """Phi's decoder stack with memory: ids -> last hidden state."""

    def __init__(self, config: PhiEngramConfig, tokenizer=None):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.engram_hash = EngramHash(config, tokenizer)
        d_head = config.n_embed_per_ngram // config.n_head_per_ngram
        self.engram_tables = nn.ModuleDict(
            {
                str(layer_id): EngramTable(sum(map(sum, primes)), d_head)
                for layer_id, primes in zip(config.engram_layer_ids, head_primes(config))
            }
        )
        self.layers = nn.ModuleList([PhiEngramDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.rotary_emb = PhiRotaryEmbedding(config)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.use_memory = True  # False: plain Phi, to the last bit; of the running process, never saved
        self.gradient_checkpointing = False
        self.post_init()

    def _head_indices(self, input_ids, real, cache):
        """int64 [L, B, T, H]; the last N-1 ids come from the cache, and stay in it for the next call."""
        stored = input_ids + 1  # 0 is left to mean "before the start"
        if real is not None:
            stored = stored.masked_fill(~real, 0)
        length = self.config.max_ngram_size - 1
        # Every Engram layer keeps the ids: a cache layer with an unused state cannot be cut back.
        for layer_id in self.config.engram_layer_ids:
            # Kept where the layer computes (its weights are on "meta" while accelerate has them offloaded): beam search
            # reorders all states of a cache layer on one device.
            device = self.layers[layer_id].engram.value_proj.weight.device
            ids = stored if device.type == "meta" else stored.to(device)
            history = with_history(ids, length, cache, layer_id, state_idx=1)
        return self.engram_hash(history.to(stored.device))

    @torch.no_grad()
    def ngram_indices(self, input_ids: torch.LongTensor, attention_mask=None) -> dict[int, torch.LongTensor]:
        """Rows that each position reads, as every head's index within its own table.

        Args:
            input_ids: int64 [B, T]; attention_mask: [B, T], 0 for padding.
        Returns:
            {layer_id: int64 [B, T, (N-1)*K]}, order 2 first, heads in order (the golden files' layout).
        """
        real = real_tokens(attention_mask, input_ids.shape[1], 0)
        return dict(zip(self.config.engram_layer_ids, self._head_indices(input_ids, real, None)))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: int64 [B, T]. Always needed: the memory is addressed by tokens.
            inputs_embeds: [B, T, d]; replaces the token embeddings, beside `input_ids`.
            attention_mask: [B, S] with 0 for padding, S = cached + T; [B, 1, T, S]; or the dict that
                `create_masks_for_generate` prepared.
            past_key_values: a cache made with `config=model.config`.
        Returns:
            `last_hidden_state` [B, T, d]; on request `hidden_states`, one more than layers, the last one normalised,
            and `attentions`.
        Raises:
            ValueError: no ids, or a cache that cannot hold the memory's state.
        """
        if input_ids is None:
            raise ValueError(
                "Falta input_ids: la memoria Engram se consulta con los tokens, y un vector de inputs_embeds no dice "
                "de qué token viene. Pasa los dos: model(input_ids=ids, inputs_embeds=vectores)."
            )
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None  # the replay in backward would write the cache a second time
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None and (
            len(past_key_values.layers) < config.num_hidden_layers
            or not all(hasattr(past_key_values.layers[i], "conv_states") for i in config.engram_layer_ids)
        ):
            raise ValueError(
                "Esta caché no puede guardar el estado de la memoria Engram. Créala con la configuración del modelo: "
                "DynamicCache(config=model.config) o StaticCache(config=model.config, max_cache_len=…)."
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past_length).unsqueeze(0)
        if isinstance(attention_mask, dict):
            causal_mask, real = attention_mask["full_attention"], attention_mask["engram"]
        else:
            real = real_tokens(attention_mask, hidden.shape[1], past_length)
            causal_mask = create_causal_mask(
                config=config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=past_key_values,
                position_ids=position_ids,
            )  # fmt: skip

        indices = self._head_indices(input_ids, real, past_key_values) + self.engram_hash.offsets[:, None, None]
        rows = {}
        for layer_id, index in zip(config.engram_layer_ids, indices):
            if self.use_memory:
                rows[layer_id] = self.engram_tables[str(layer_id)](index)
            else:  # a cache layer with an unused state can neither be cut back nor reordered
                silence = hidden.new_zeros(*hidden.shape[:2], config.hidden_size).transpose(1, 2)
                history = self.layers[layer_id].engram.conv.history
                with_history(silence, history, past_key_values, layer_id, state_idx=0)
        hidden = self.embed_dropout(hidden)
        position_embeddings = self.rotary_emb(hidden, position_ids)
        all_hidden, all_weights = [], []
        for i, layer in enumerate(self.layers):
            if output_hidden_states:
                all_hidden.append(hidden)
            hidden, weights = layer(
                hidden, rows.get(i), real, attention_mask=causal_mask, position_embeddings=position_embeddings,
                past_key_values=past_key_values, position_ids=position_ids, **kwargs,
            )  # fmt: skip
            if output_attentions:
                all_weights.append(weights)
        hidden = self.final_layernorm(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()


class PhiEngramForCausalLM(PhiEngramPreTrainedModel, GenerationMixin):
    """Phi-1 with Engram as a language model: ids -> logits, loss. Generating, saving and sharing are inherited.

    Opening a plain Phi checkpoint grafts an untrained memory on it, whose logits are the plain model's exactly.

    Args:
        tokenizer: from which to build the vocabulary projection; by default `config.tokenizer_name_or_path` is opened.
            Not used when a checkpoint brings the projection.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PhiEngramConfig, tokenizer=None):
        super().__init__(config)
        self.model = PhiEngramModel(config, tokenizer)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        if model.generation_config.eos_token_id is None:  # Phi-1's published files name no stop token
            model.generation_config.eos_token_id = model.config.eos_token_id
        return loaded

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`PhiEngramModel.forward`, plus:

        Args:
            labels: int64 [B, T], -100 for "not counted"; shifted here. `num_items_in_batch` in kwargs divides the sum,
                which makes accumulation over unequal batches exact.
            logits_to_keep: compute only the last n positions' logits (0: all), or those of a 1D index tensor.
        Returns:
            `logits` [B, T, V], and `loss`, nats per token, when labels were given.
        """
        outputs = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_hidden_states=output_hidden_states,
            output_attentions=output_attentions, return_dict=True, **kwargs,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs):
        """What `generate` prepares ahead for a static cache: the causal mask, and which new tokens are real."""
        return {
            "full_attention": create_causal_mask(
                config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                past_key_values=past_key_values, position_ids=position_ids,
            ),  # fmt: skip
            "engram": real_tokens(attention_mask, inputs_embeds.shape[1], 0),
        }

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # transformers drops the ids where it uses embeddings; the memory needs both.
        if inputs.get("inputs_embeds") is not None and input_ids.shape[1] == inputs["inputs_embeds"].shape[1]:
            inputs["input_ids"] = input_ids
        return inputs


PhiEngramConfig.register_for_auto_class()
PhiEngramForCausalLM.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register("phi_engram", PhiEngramConfig, exist_ok=True)
AutoModelForCausalLM.register(PhiEngramConfig, PhiEngramForCausalLM, exist_ok=True)
