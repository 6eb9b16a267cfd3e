"""What `verify_phi_engram.py` has where nothing is saved yet: the libraries, a tokenizer and a small model."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import importlib.metadata
import platform
import sysconfig
import urllib.error
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from packaging.requirements import Requirement
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engram.checks import SEED, note
from engram.console import counted, spanish
from phi1_engram import PHI_1, PhiEngramConfig, PhiEngramForCausalLM

CORE = ("torch", "transformers", "tokenizers", "numpy", "sympy", "accelerate")


def check_versions():
    """Print the libraries found; how many of the six are missing or older than requirements.txt asks for."""
    requirements = Path(__file__).parents[1] / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").split() if requirements.exists() else CORE
    wrong, found = [], []
    for requirement in map(Requirement, lines):
        if requirement.name not in CORE:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "0"
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(str(requirement))
    print(f"   Python {platform.python_version()}, " + ", ".join(found))
    if wrong:
        note(f"Hace falta {', '.join(wrong)}. Ejecuta: pip install -U -r requirements.txt")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            print(f"   GPU {i}: {gpu.name}, {spanish(gpu.total_memory / 2**30, 1)} GiB{', la que se usa' * (i == 0)}")
    else:
        print(f"   Sin GPU: se usa la CPU ({counted(torch.get_num_threads(), 'hilo')})")
    return float(len(wrong)), 0.0, f"{len(found) - len(wrong)} de {len(found)} librerías sirven"


def phi_1_tokenizer():
    """Phi-1's tokenizer from the local cache or the Hub; None where neither has it, within seconds."""
    try:
        return AutoTokenizer.from_pretrained(PHI_1, local_files_only=True)
    except Exception:  # of tokenizers, where a file is damaged, there is no other kind
        pass
    if hub.HF_HUB_OFFLINE:
        return None
    try:  # huggingface_hub would retry for most of a minute
        urllib.request.urlopen(hub.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError:
        return None
    try:
        return AutoTokenizer.from_pretrained(PHI_1)
    except Exception:  # as above
        return None


def tokenizer_on_the_spot():
    """A byte-level BPE of 2,000 tokens, trained in a second on files that every Python has."""
    from tokenizers import ByteLevelBPETokenizer

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    bpe = ByteLevelBPETokenizer()
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    bpe.train_from_iterator(texts, vocab_size=2000, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")


def small_model(tokenizer, vocab_size: int) -> PhiEngramForCausalLM:
    """Phi-1 in miniature: its kind of tokens and blocks, random weights, two Engram layers."""
    config = PhiEngramConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, engram_layer_ids=[1, 2], engram_vocab_size=[5000, 5000], n_embed_per_ngram=128,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return PhiEngramForCausalLM(config, tokenizer=tokenizer)
