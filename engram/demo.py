"""The demo of `python train_phi_engram.py --demo`: a small Phi from scratch, then memory against no memory.

It goes through the same functions as the real model, on code that every machine with Python has, and needs no Hub and
no GPU. There is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from engram.cards import write_control_card
from engram.choices import told
from engram.console import UserError, short, spanish
from engram.corpus import prepare_corpus
from engram.folders import whole_folder
from engram.graft import CHAT_TEMPLATE, load_phi_1_with_engram
from engram.optimizers import make_optimizer
from engram.processes import make_accelerator, prepare
from engram.sharing import result_line, result_table
from engram.signals import stop_requests
from engram.steps import Recipe, evaluate, run_steps
from engram.texts import Skipped, documents, standard_library, text_files
from engram.training import train_model

# A small model trained from scratch takes, and needs, far higher rates.
DEMO_RECIPE = Recipe(
    1e-3, memory_rates=(2.5e-3, 2.5e-3), table_rates=(2e-2, 2e-2), batch=16, length=256, steps=(40, 80)
)
DEMO_BASE_STEPS, DEMO_BASE_RATE, DEMO_CONTROL_RATES = 480, 2e-3, (1e-3, 2e-3, 4e-3)
DEMO_SHAPE = dict(
    vocab_size=4096, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=1024,
)  # fmt: skip
DEMO_ENGRAM = dict(layer_ids=[1, 2], engram_vocab_size=[20000, 20000], n_embed_per_ngram=128, n_head_per_ngram=8)


def demo_tokenizer(files: list[Path], vocab_size: int):
    """Byte-level BPE trained on `files`, with <|endoftext|> as stop token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((piece.text for piece in documents(files, Skipped())), trainer)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_plain(model, corpus, recipe, rate, *, steps, offset, label) -> dict:
    """Train a Phi without memory, in place, with the same loop, and measure it."""
    accelerator = make_accelerator()
    set_seed(recipe.seed)
    model, optimizer = prepare(accelerator, model, make_optimizer(model, rate, 0, 0, recipe.weight_decay))
    with stop_requests() as stop:

        def on_step(*_):
            if stop:
                raise KeyboardInterrupt

        seconds = run_steps(
            accelerator, model, optimizer, corpus, recipe, steps=steps, label=label, offset=offset, on_step=on_step
        )
    measured = evaluate(model, corpus, recipe, accelerator.device)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # to be measured again as it is
    accelerator.free_memory()
    return dict(**measured, seconds=seconds, tokens_per_second=recipe.tokens_per_step * steps / seconds)


def demo(output="phi1-engram-demo", recipe: Recipe = DEMO_RECIPE, base_steps: int = DEMO_BASE_STEPS) -> list[dict]:
    """Small Phi from scratch on the standard library; then Engram in two phases against the same Phi without memory.

    Both go on from the same base, on the same tokens in the same order; the control at the best of three rates.
    Returns the rows of the table printed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--demo va en un solo proceso, sin accelerate launch: python train_phi_engram.py --demo")
    output = Path(output)
    control_output = output.with_name(output.name + "-control")
    for place in (output, control_output):
        if place.exists():
            raise UserError(
                f"{place}/ ya existe y no la voy a pisar. Cámbiale el nombre, o bórrala si es de una demostración que "
                f"ya no quieres: mv {place} {place}-1"
            )
    further = sum(recipe.steps)
    print("Demostración sin Hub: entreno un Phi pequeño con la biblioteca estándar de Python, le injerto la memoria")
    print("y lo comparo con el mismo Phi sin memoria. Unos 15 minutos con dos núcleos.\n")
    started = time.perf_counter()
    tokenizer = demo_tokenizer(text_files(standard_library()), DEMO_SHAPE["vocab_size"])
    corpus = prepare_corpus(tokenizer, length=recipe.length, seed=recipe.seed)
    print(corpus.describe())
    with tempfile.TemporaryDirectory() as scratch:
        set_seed(recipe.seed)
        end = tokenizer.eos_token_id
        base = PhiForCausalLM(PhiConfig(**DEMO_SHAPE, bos_token_id=end, eos_token_id=end))
        results = [
            dict(
                name="Phi de partida",
                **train_plain(base, corpus, recipe, DEMO_BASE_RATE, steps=base_steps, offset=0, label="Phi de partida"),
            )
        ]
        print(result_line(results[-1]))
        base.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        # A new order, the same for control and memory.
        rest = replace(recipe, seed=recipe.seed + 1)
        best = None
        for rate in DEMO_CONTROL_RATES:
            control = PhiForCausalLM.from_pretrained(scratch)
            label = f"Control (tasa {short(rate)})"
            row = dict(name=label, **train_plain(control, corpus, rest, rate, steps=further, offset=0, label=label))
            print(result_line(row))
            if best is None or row["loss"] < best["loss"]:
                best, twin = row, control
            results.append(row)
        shutil.rmtree(output.with_name(output.name + "-checkpoints"), ignore_errors=True)
        model, _ = load_phi_1_with_engram(scratch, **DEMO_ENGRAM)
        named = dict(best, name=f"{best['name']}: el mismo Phi sin memoria, con los mismos pasos")
        outcome = train_model(model, tokenizer, corpus, rest, output, save_every=10**9, control=named)
    with whole_folder(control_output) as folder:
        twin.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_control_card(twin, folder, control_output.name, output.name)
    results += [dict(row, name=f"Engram, {row['name']}") for row in outcome["results"][1:]]
    print(f"\nPérdida en {spanish(results[-1]['tokens'])} tokens que ningún modelo ha visto (menos es mejor):\n")
    print(result_table(results))
    text, gain, error = told(model, twin, tokenizer, corpus.held_out, recipe.length)
    print(f"\n{text}")
    mark, verb = ("✅", "gana") if gain > 2 * error else ("❌", "pierde") if gain < -2 * error else ("➖", "empata:")
    gained = f"{verb} {spanish(abs(gain), 3)} ± {spanish(error, 3)} nats por token"
    print(f"\n{mark} Con los mismos {further} pasos más, la memoria {gained} frente al mejor control.")
    seconds = time.perf_counter() - started
    print(f"Una sola semilla: el ± es de otros textos, no de otros entrenamientos. Tiempo total: {spanish(seconds)} s.")
    print(f"Guardado en {output}/ y {control_output}/. Ahora: python chat_phi_engram.py --modelo {output}")
    return results
