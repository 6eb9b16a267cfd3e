"""Tiny models, checkpoints and the tokenizer of the tests. Imported by conftest.py, after the environment is set."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

END_OF_TEXT = 50256
DENSE_FILE = "model-00001-of-00001.safetensors"  # of a saved PhiEngram model, where it is one
PHI1_TOKENS = 50295
# microsoft/phi-1's config.json, field by field, nulls included.
PHI1_CONFIG = dict(
    architectures=["PhiForCausalLM"], attention_dropout=0.0, bos_token_id=None, embd_pdrop=0.0, eos_token_id=None,
    hidden_act="gelu_new", hidden_size=2048, initializer_range=0.02, intermediate_size=8192, layer_norm_eps=1e-05,
    max_position_embeddings=2048, model_type="phi", num_attention_heads=32, num_hidden_layers=24,
    num_key_value_heads=None, partial_rotary_factor=0.5, qk_layernorm=False, resid_pdrop=0.0, rope_scaling=None,
    rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="float32", transformers_version="4.37.0",
    use_cache=True, vocab_size=51200,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def fill_hub_cache(cache: Path, repo: str, tokenizer_folder: Path | None):
    """Make `repo` resolve without network: the Hub's cache layout, with tokenizer and configuration but no weights."""
    sha = "0" * 40
    store = cache / f"models--{repo.replace('/', '--')}"
    snapshot = store / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(sha)
    (snapshot / "config.json").write_text(json.dumps(PHI1_CONFIG, indent=2))
    if tokenizer_folder is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer_folder / name, snapshot / name)
    else:
        train_tokenizer().save_pretrained(snapshot)


def train_tokenizer(learned: int = 4096):
    """A byte-level BPE of the standard library's sources, laid out like Phi-1's tokenizer.

    `learned` tokens, unused ones up to <|endoftext|> = 50,256, then the runs of 31..2 spaces and 9..2 tabs. So the
    configuration's defaults hold for it, and only tests of Phi-1's own texts need Phi-1's own tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(errors="ignore") for path in sorted(library.glob("*.py"))[:120]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=learned, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(bpe.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {f"unused{i}": i for i in range(len(vocab), END_OF_TEXT)}
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.add_special_tokens(["<|endoftext|>"])
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    bpe.add_tokens([AddedToken(run, normalized=False) for run in runs])
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end, model_max_length=2048
    )
    assert len(tokenizer) == PHI1_TOKENS and tokenizer.eos_token_id == END_OF_TEXT
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def make_config(**kw):
    """A tiny PhiEngramConfig: vocabulary of 320 ids, 4 layers of 32, memory at layers 1 and 2, no tokenizer, no eos."""
    from phi1_engram import PhiEngramConfig

    tiny = dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, engram_layer_ids=[1, 2], n_embed_per_ngram=16, n_head_per_ngram=4,
        engram_tokenizer_compression=False,
    )  # fmt: skip
    config = {**tiny, **kw}
    config.setdefault("engram_vocab_size", [211, 307, 401, 503][: config.get("max_ngram_size", 3) - 1])
    return PhiEngramConfig(**config)


def make_model(seed: int = 0, attn: str = "eager", tokenizer=None, **kw):
    """A tiny PhiEngramForCausalLM in eval mode whose weights are all random, tables, conv, norms and biases included.

    `kw` goes to `make_config`. That the memory moves the logits is asserted.
    """
    from phi1_engram import PhiEngramForCausalLM

    model = PhiEngramForCausalLM(make_config(**kw), tokenizer=tokenizer).eval()
    model.set_attn_implementation(attn)
    randomise(model, seed)
    assert memory_effect(model) > 0.1, "a memory that changes nothing tests nothing"
    return model


@torch.no_grad()
def randomise(model, seed: int = 0):
    """Give every parameter random values of such sizes that logits differ clearly from token to token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter, mean, std):
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            normal(parameter, 0, 0.1)
        elif "norm" in name:
            normal(parameter, 1, 0.2)
        elif "engram_tables" in name or "embed_tokens" in name:
            normal(parameter, 0, 1)
        elif "engram.conv" in name:
            normal(parameter, 0, 0.5)
        else:
            normal(parameter, 0, (2 if "lm_head" in name else 1.2) / parameter.shape[1] ** 0.5)


@torch.no_grad()
def memory_effect(model) -> float:
    """The largest change of a logit when all rows of the memory are zero."""
    ids = random_ids(model, 2, 12)
    with_memory = model(ids).logits
    weights = [parameter for name, parameter in model.named_parameters() if "engram_tables" in name]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    without = model(ids).logits
    for weight, values in zip(weights, kept):
        weight.copy_(values)
    return (with_memory - without).abs().max().item()


def random_ids(model, batch: int, length: int, seed: int = 1) -> torch.LongTensor:
    """Token ids [batch, length] over the whole vocabulary of the model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


def left_padded(rows: list[torch.Tensor], pad: int = 7) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Rows [T_i] -> ids [B, T], attention mask [B, T]. `pad` is a token that means something elsewhere, on purpose."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# Plain Phi, the oracle
# ----------------------------------------------------------------------------------------------------------------------


def make_phi(seed: int = 0, attn: str = "eager", **kw):
    """A tiny transformers PhiForCausalLM in eval mode with random weights, biases and norms included."""
    from transformers import PhiConfig, PhiForCausalLM

    tiny = dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = PhiForCausalLM(PhiConfig(**{**tiny, **kw})).eval()
    model.set_attn_implementation(attn)
    randomise(model, seed)
    return model


def plain_fields(config) -> dict:
    """A PhiEngramConfig's fields, for a plain PhiConfig."""
    unlike_phi = ("model_type", "architectures", "auto_map", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in unlike_phi}


def phi_state_dict(model) -> dict[str, torch.Tensor]:
    """What plain Phi has of a PhiEngramForCausalLM."""
    return {name: tensor for name, tensor in model.state_dict().items() if "engram" not in name}


def saved_tensors(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whichever of its files it is in."""
    from safetensors.torch import load_file

    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def save_phi(folder, tokenizer=None, seed: int = 0, **kw):
    """Save a tiny plain Phi checkpoint whose config.json has the fields and the nulls of microsoft/phi-1's."""
    folder = Path(folder)
    shape = dict(vocab_size=51200, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    shape.update(kw)
    make_phi(seed, **shape).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**PHI1_CONFIG, **shape}, indent=2))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_grafted(phi_folder, folder):
    """A small phi1-engram/ folder, as load_phi_engram.py leaves it. Returns the model."""
    from engram.graft import load_phi_1_with_engram

    model, tokenizer = load_phi_1_with_engram(
        phi_folder, engram_vocab_size=[499, 499], n_embed_per_ngram=16, n_head_per_ngram=4
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def installed(optimizers):
    """The parameters of a test: those that need an optional package are skipped without it."""
    lacking = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="pip install bitsandbytes")
    return [pytest.param(name, marks=lacking if name == "adamw8bit" else ()) for name in optimizers]


def write_code(folder):
    """60 small Python files, all different, in a new folder."""
    function = "def add_{0}(first, second):\n    return first + second + {0}\n\n\n"
    folder.mkdir()
    for i in range(60):
        (folder / f"m{i:02d}.py").write_text("".join(function.format(100 * i + k) for k in range(5)))
    return folder


def together(processes, *words, **kwargs):
    """Start a script under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs,
    )  # fmt: skip
