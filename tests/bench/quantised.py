"""What a decoded token costs with Phi in 8 and 4 bits on a CPU, beside transformers' own Phi in float32 and bfloat16.

    python tests/bench/quantised.py                      # 3 layers of Phi-1's width, and as much less of its vocabulary
    python tests/bench/quantised.py --layers 24 --apart  # Phi-1's whole shape: 6 GB on the disk, one model at a time
    python tests/bench/quantised.py --llama              # beside llama.cpp too, of the same weights (bench/llama.py)
    python tests/bench/quantised.py --loss 300           # what a small model loses that is trained here in float32

Random weights, an untrained memory in RAM where nothing else is said, batch 1. With few layers all models are open
together and each decodes a token in turn; with many (--apart) one after the other. Medians with quartiles, of wall and
of process time: the second tells more where other programs run. Torchao's and bitsandbytes' kernels are loaded by
`quantisation`'s own keywords.
"""

import argparse
import gc
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch
import transformers
from transformers import BitsAndBytesConfig, PhiConfig, PhiForCausalLM, TorchAoConfig

from bench.llama import KINDS, LlamaDecoding, quantise, write_gguf
from bench.speed import Variant, write_tables
from engram.quantised import hasten, on_a_cpu
from phi1_engram import CACHE, PhiEngramConfig, PhiEngramForCausalLM, from_torchao

MEMORY = dict(engram_vocab_size=[997, 997], engram_tokenizer_compression=False)
ROWS = 64_000  # per head, where the memory's rows are in files


def rounded_inputs():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return {"quantization_config": TorchAoConfig(Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))}


def four_bits():
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


def ways(shape: dict) -> dict:
    """{name: opens a model from a folder of plain Phi}."""

    def ours(**how):
        how = {"dtype": torch.float32, **how}
        return lambda folder: PhiEngramForCausalLM.from_pretrained(
            folder, **({} if Path(folder, "model-engram-1.safetensors").is_file() else MEMORY), **how
        )

    def plain(dtype):
        return lambda folder: PhiForCausalLM.from_pretrained(folder, dtype=dtype)

    def stored(place, precision):
        def way(folder):
            model, rows = ours()(folder), Path(folder, f"{place}-{precision}")
            write_tables(model, rows, ROWS, getattr(torch, precision))
            return Variant(model, rows, ROWS, place)()

        return way

    return {
        "Phi float32": plain(torch.float32), "Phi bfloat16": plain(torch.bfloat16),
        "nuestro float32": ours(), "nuestro bfloat16": ours(dtype=torch.bfloat16),
        **{f"filas {precision}, {place}": stored(place, precision)
           for precision in ("float32", "int8") for place in ("ram", "disco")},
        "int8 (--cuantizar)": lambda folder: hasten(ours(**on_a_cpu("int8", shape))(folder)),
        "int4 (--cuantizar)": lambda folder: hasten(ours(**on_a_cpu("int4", shape))(folder)),
        "int8 torchao solo": lambda folder: ours(**on_a_cpu("int8", shape), dtype=torch.bfloat16)(folder),
        "int8 dinámico": lambda folder: ours(**rounded_inputs())(folder),
        "nf4 bitsandbytes": lambda folder: ours(**four_bits())(folder),
    }  # fmt: skip


class Decoding:
    """A model that goes on with a text, a token at a time."""

    def __init__(self, model, ids: torch.Tensor):
        """`ids`: int64 [T]."""
        self.model = model.eval()
        state = model.state_dict()
        self.n_bytes = sum(n_bytes(tensor) for key, tensor in state.items() if "engram_tables" not in key)
        for _ in range(2):  # the first reads the weights from the disk
            clock = time.perf_counter()
            output = model(ids[None], use_cache=True, logits_to_keep=1)
        self.prefill, self.past, self.times = time.perf_counter() - clock, output[CACHE], []
        self.token = output.logits.argmax(-1)

    def step(self):
        clock, cpu = time.perf_counter(), time.process_time()
        output = self.model(self.token, use_cache=True, **{CACHE: self.past})
        self.times.append((1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - cpu)))
        self.past, self.token = output[CACHE], output.logits.argmax(-1)


def in_llama(model, ids, folder, threads: int) -> dict:
    """{name: opens the same weights in llama.cpp}, and how far its float32 is from transformers'."""
    whole = Path(folder, "F32.gguf")
    write_gguf(model, whole)
    exact, found = model.eval()(ids[None]).logits[0, -1], {}
    for kind in KINDS:
        path = whole.with_stem(kind)
        if path != whole:
            quantise(whole, path, kind)
        found[f"llama.cpp {kind}"] = lambda path=path: LlamaDecoding(path, ids, threads)
    first = found["llama.cpp F32"]()
    gap = (torch.from_numpy(first.logits) - exact).abs().max() / exact.std()
    print(f"llama.cpp F32 y Phi float32: se separan {gap:.1e} desviaciones de sus logits")
    first.close()
    return found


def n_bytes(tensor) -> int:
    """Of what a tensor keeps, torchao's too, which says the size that it had."""
    if not from_torchao(tensor):
        return tensor.nbytes
    return sum(part.nbytes for part in map(vars(tensor).get, type(tensor).tensor_data_names))


def told(name: str, decoding: Decoding | LlamaDecoding, prompt: int):
    line = f"{name:20s}{decoding.n_bytes / 1e9:7.2f} GB"
    for kind, times in zip(("reloj", "proceso"), zip(*decoding.times[2:])):
        low, middle, high = statistics.quantiles(times, n=4)
        line += f"   {kind} {middle:8.2f} ms [{low:.2f}, {high:.2f}]"
    print(f"{line}   entrada {prompt / decoding.prefill:7.1f} tokens/s", flush=True)


def losses(steps: int, folder: str):
    """A small model of the standard library's bytes, trained here in float32; the loss on others in each way."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = [torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in part)), dtype=torch.uint8).long()
            for part in (sources[::2], sources[1:40:2])]  # fmt: skip
    shape = dict(hidden_size=256, intermediate_size=1024)
    torch.manual_seed(0)
    config = PhiEngramConfig(
        vocab_size=256, num_hidden_layers=4, num_attention_heads=4, engram_layer_ids=[1], n_embed_per_ngram=64,
        n_head_per_ngram=4, **shape, **{**MEMORY, "engram_vocab_size": [4999, 4999]},
    )  # fmt: skip
    model = PhiEngramForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        starts = torch.randint(len(data[0]) - 128, (4,))
        ids = torch.stack([data[0][start : start + 128] for start in starts])
        model(ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    model.save_pretrained(folder)
    held, exact = data[1][: 16 * 256].view(4, 4, 256), None
    for name, way in ways(shape).items():
        if not name.startswith(("Phi", "filas")):
            with torch.no_grad():
                loss = sum(way(folder)(ids, labels=ids).loss.item() for ids in held) / len(held)
            exact = exact or loss
            print(f"{name:20s} pérdida {loss:.4f} ({100 * (loss / exact - 1):+.2f} %)", flush=True)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--apart", action="store_true", help="one model after the other")
    parser.add_argument("--llama", action="store_true", help="beside llama.cpp, which must be installed")
    parser.add_argument("--only", nargs="*", help="parts of the names of those to be measured")
    parser.add_argument("--folder", help="where the weights are written; by default a temporary folder")
    parser.add_argument("--loss", type=int, metavar="STEPS", help="train a small model for so long, and measure it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.loss:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, torch.enable_grad():
            return losses(options.loss, folder)
    shape = dict(
        vocab_size=51200 * options.layers // 24, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=options.layers, num_attention_heads=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} hilos, {shape}")
    ids = torch.arange(options.prompt) % shape["vocab_size"]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = PhiForCausalLM(PhiConfig(**shape))
        model.save_pretrained(folder)
        openers = {name: lambda way=way: Decoding(way(folder), ids) for name, way in ways(shape).items()}
        if options.llama:
            openers |= in_llama(model, ids, folder, options.threads)
        del model
        opened = {}
        for name, opener in openers.items():
            if options.only and not any(part in name for part in options.only):
                continue
            decoding = opener()
            if options.apart:
                for _ in range(options.tokens):
                    decoding.step()
                told(name, decoding, options.prompt)
                if isinstance(decoding, LlamaDecoding):
                    decoding.close()
                del decoding
                gc.collect()
            else:
                opened[name] = decoding
        for _ in range(options.tokens):
            for decoding in opened.values():
                decoding.step()
        for name, decoding in opened.items():
            told(name, decoding, options.prompt)


if __name__ == "__main__":
    main()
