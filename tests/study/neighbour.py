"""engram-peft 1.2.7 on the study's base, by its own optimiser, in rows of pretrained_study.py.

    pip install engram-peft==1.2.7                       # Python 3.12 or later
    python tests/study/neighbour.py --tasa 1e-3 3e-3 1e-2

The same layers, orders, heads, rows and values a token as our memory, all else as it comes: the rate is that of its
dense weights, its rows take five times as much. Its hash leaves the present token out of bigrams.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]
from engram.console import SpanishParser, run_script
from engram.corpus import batch_at
from engram.optimizers import rate_factor
from study import measures
from study import pretrained_study as study
from study.pretrained import BASE, BATCH, DOMAINS, LENGTH, SHAPE, products


def neighbour_row(ruler, rate: float) -> dict:
    from engram_peft import EngramConfig, get_engram_model
    from engram_peft.utils import get_optimizer

    model, tokenizer = ruler.open()
    ids, blocks, names = ruler.domain(DOMAINS[0], tokenizer)
    torch.manual_seed(0)
    config = EngramConfig(
        engram_vocab_size_per_ngram=SHAPE["engram_vocab_size"], target_layers=SHAPE["engram_layer_ids"],
        embedding_dim=2 * SHAPE["n_embed_per_ngram"], n_head_per_ngram=SHAPE["n_head_per_ngram"],
        tokenizer_name_or_path=str(ruler.folder),
    )  # fmt: skip
    wrapped = get_engram_model(model, config, tokenizer, train_mode="engram_only").to(model.device).train()
    optimizer = get_optimizer(wrapped, base_learning_rate=rate)
    rates = [group["lr"] for group in optimizer.param_groups]
    recipe = SimpleNamespace(batch=BATCH, length=LENGTH, seed=0)
    started, losses = time.perf_counter(), []
    for step in range(study.SHORT):
        batch = batch_at(ids, step, recipe).to(model.device)
        with products():
            loss = wrapped(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        dense = [p for p in wrapped.parameters() if p.grad is not None and not p.grad.is_sparse]
        torch.nn.utils.clip_grad_norm_(dense, 1.0)
        for group, full in zip(optimizer.param_groups, rates):
            group["lr"] = full * rate_factor(step, study.SHORT)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(step, losses[-1], flush=True)
    row = dict(train_loss=sum(losses[-20:]) / 20, seconds=time.perf_counter() - started)
    row["loss"], hits = measures.loss_and_hits(wrapped, blocks)
    known = measures.names_read(tokenizer, ids, study.SHORT, recipe)
    return row | dict(identifiers=measures.completed(hits, names, known), old=ruler.forgetting(wrapped))


def main(argv=None):
    parser = SpanishParser(description="engram-peft sobre la base del estudio.", epilog="Ejemplo: --tasa 1e-3 1e-2")
    parser.add_argument("--tasa", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="de sus pesos densos")
    parser.add_argument("--base", type=Path, default=BASE, help="carpeta del modelo de partida (%(default)s)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    ruler = study.Ruler(args.base)
    for rate in args.tasa:
        name, settings = f"engram-peft-{rate:g}", dict(parte=5, domain=DOMAINS[0], steps=study.SHORT, seed=0)
        if name not in study.read_results():
            study.keep(dict(fila=name, **settings, **neighbour_row(ruler, rate), rate=rate))


if __name__ == "__main__":
    run_script(main)
