"""Fixtures for all tests: nothing here, nor in a subprocess started by a test, ever asks the network for anything.

They see no card, so that they are the same on every machine: a card's rules are those of pretended.py, and a real card
is asked by `python tests/bench/card.py`.
The environment is set while this file is imported, because huggingface_hub and transformers read it once, at import.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHI1_TOKENIZER = ROOT.parent / "shared" / "phi-1-tokenizer"  # Phi-1's own, where the machine has it

_home = tempfile.TemporaryDirectory(prefix="phi1-engram-tests-")  # deleted when the process ends
for name in [name for name in os.environ if name.startswith("HF_") or name == "TRANSFORMERS_CACHE"]:
    del os.environ[name]
os.environ["HF_HOME"] = _home.name
os.environ["HF_HUB_CACHE"] = str(Path(_home.name) / "hub")
os.environ["XDG_CACHE_HOME"] = str(Path(_home.name) / "cache")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
sys.path.insert(0, str(ROOT))

import pytest
import torch

import helpers

torch.set_num_threads(1)  # the models are so small that threads only wait for each other
helpers.fill_hub_cache(
    Path(os.environ["HF_HUB_CACHE"]), "microsoft/phi-1", PHI1_TOKENIZER if PHI1_TOKENIZER.is_dir() else None
)


@pytest.fixture(scope="session")
def has_phi1_tokenizer():
    """Whether `tokenizer` is Phi-1's own; otherwise it is the tests' stand-in with the same ids for special tokens."""
    return PHI1_TOKENIZER.is_dir()


@pytest.fixture(scope="session")
def tokenizer():
    """What `AutoTokenizer.from_pretrained("microsoft/phi-1")` opens in the tests: 50,295 tokens, end of text 50,256."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained("microsoft/phi-1")


@pytest.fixture(scope="session")
def phi1_tokenizer(tokenizer, has_phi1_tokenizer):
    """Phi-1's own tokenizer, for what no other can show."""
    if not has_phi1_tokenizer:
        pytest.skip(f"needs Phi-1's own tokenizer in {PHI1_TOKENIZER}")
    return tokenizer


@pytest.fixture(scope="session")
def make_config():
    """make_config(**kw): a tiny PhiEngramConfig, see helpers.make_config."""
    return helpers.make_config


@pytest.fixture(scope="session")
def make_model():
    """make_model(**kw): a tiny PhiEngramForCausalLM whose memory really acts, see helpers.make_model."""
    return helpers.make_model


@pytest.fixture(scope="session")
def phi_folder(tmp_path_factory, tokenizer):
    """A tiny plain Phi checkpoint with tokenizer, its config.json written like microsoft/phi-1's. Not to be changed."""
    folder = tmp_path_factory.mktemp("phi")
    helpers.save_phi(folder, tokenizer)
    return folder


@pytest.fixture
def corpus_cache(tmp_path, monkeypatch):
    """Tokenised corpora go to a folder of the test's own, in subprocesses too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "phi-engram"


@pytest.fixture
def code(tmp_path):
    """A folder of 60 small Python files, all different."""
    return helpers.write_code(tmp_path / "codigo")


def pytest_terminal_summary(terminalreporter):
    """Names of what was skipped, for a run with the optional packages: `.ci/run` asks for them."""
    if path := os.environ.get("SKIPPED_TO"):
        skipped = dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", []))
        Path(path).write_text("\n".join(skipped), encoding="utf-8")
