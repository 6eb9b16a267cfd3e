"""Speed beside transformers' own Phi of the same shape, in the same run.

    python tests/bench_engram.py                # hidden 512 x 8 layers, Engram at 1 and 4: about five minutes
    python tests/bench_engram.py --rapido       # fewer repetitions: about two minutes
    python tests/bench_engram.py --json medidas.json

Each measurement alternates plain Phi and Phi with memory, so that what else the machine does falls on both; what is
printed are medians, and the ratio is the median of the ratios of neighbouring pairs. Tables are warm and in float32.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PhiConfig, PhiForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_phi_engram import SpanishParser, run_script  # noqa: E402
from phi1_engram import PhiEngramConfig, PhiEngramForCausalLM  # noqa: E402

SHAPE = dict(
    vocab_size=51200, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
    eos_token_id=50256,
)  # fmt: skip
MEMORY = dict(
    engram_layer_ids=[1, 4], n_embed_per_ngram=512, n_head_per_ngram=8, engram_vocab_size=[256000, 256000],
    engram_tokenizer_compression=False,
)  # fmt: skip
DECODED = 32  # tokens per decoding measurement


def pair():
    """Plain Phi, and the same weights with a memory whose rows are all filled."""
    torch.manual_seed(0)
    plain = PhiForCausalLM(PhiConfig(**SHAPE)).eval()
    ours = PhiEngramForCausalLM(PhiEngramConfig(**SHAPE, **MEMORY)).eval()
    ours.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "engram_tables" in name or "engram.conv.weight" in name:
                parameter.normal_(0, 0.02)
    return plain, ours


@torch.inference_mode()
def prefill(model, batch: int, length: int) -> float:
    """Seconds for one forward pass over fresh tokens, last logits only as in `generate`."""
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, length))
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


@torch.inference_mode()
def decode(model, batch: int, context: int = 64) -> float:
    """Seconds per token of plain greedy decoding after a short prompt."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, context))
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(DECODED):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / DECODED


def compare(measure, plain, ours, repetitions: int, *arguments) -> dict:
    for model in (plain, ours):
        measure(model, *arguments)
    times = [(measure(plain, *arguments), measure(ours, *arguments)) for _ in range(repetitions)]
    ratios = [b / a for a, b in times]
    return dict(
        plain=statistics.median(a for a, _ in times), engram=statistics.median(b for _, b in times),
        ratio=statistics.median(ratios), ratios=sorted(ratios),
    )  # fmt: skip


def main(argv=None):
    parser = SpanishParser(
        description="Velocidad de Phi con memoria frente al Phi de transformers, en la misma ejecución.",
        epilog="Ejemplo: python tests/bench_engram.py --rapido --json medidas.json",
    )
    parser.add_argument("--rapido", action="store_true", help="menos repeticiones: unos dos minutos")
    parser.add_argument("--json", metavar="ARCHIVO", help="guardar también las medidas")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    repetitions = 7 if options.rapido else 21
    plain, ours = pair()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} hilos. Float32,"
        f" 512 × 8 capas, memoria en 1 y 4, {MEMORY['engram_vocab_size'][0]:,} filas por cabeza; {repetitions} pares\n"
    )
    results = {}
    print("| medida | Phi | con Engram | razón | razones, del 1.º al 3.er cuartil |\n| --- | --- | --- | --- | --- |")
    for name, measure, arguments in (
        ("prefill 1×512", prefill, (1, 512)),
        ("prefill 4×512", prefill, (4, 512)),
        ("decodificar, lote 1", decode, (1,)),
        ("decodificar, lote 8", decode, (8,)),
    ):
        row = results[name] = compare(measure, plain, ours, repetitions, *arguments)
        low, _, high = statistics.quantiles(row["ratios"], n=4)
        print(
            f"| {name} | {row['plain'] * 1e3:.1f} ms | {row['engram'] * 1e3:.1f} ms | {row['ratio']:.3f} "
            f"| {low:.3f}–{high:.3f} |", flush=True
        )  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
