"""The demo of `python train_phi_engram.py --demo`: a small Phi from scratch learns a library with its memory alone.

It goes through the same functions as the real model, on code that every machine with Python has, and needs no Hub and
no GPU. Beside it, all weights of the same Phi learn the same; both are asked what they have learned and what they have
forgotten. There is nothing to run here.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from accelerate.utils import set_seed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from engram.cards import write_control_card
from engram.choices import NAT, WORDS, comparison, examples, learned_line, measured, verdict, worth_comparing
from engram.console import UserError, short, spanish
from engram.corpus import prepare_corpus
from engram.folders import whole_folder
from engram.graft import CHAT_TEMPLATE, load_phi_1_with_engram
from engram.hooks import shuffled_rows
from engram.opening import LOG
from engram.optimizers import make_optimizer
from engram.pictures import draw_trade
from engram.probes import held_out_blocks
from engram.processes import make_accelerator, prepare
from engram.signals import stop_requests
from engram.steps import Recipe, evaluate, run_steps
from engram.texts import Skipped, documents, package_folder, standard_library, text_files
from engram.training import train_model

# A small model trained from scratch takes, and needs, far higher rates. Memory alone: phase 2 is for whoever trains.
DEMO_RECIPE = Recipe(
    1e-3, memory_rates=(1e-2, 2.5e-3), table_rates=(1e-1, 2e-2), batch=16, length=256, steps=(120, 0)
)
DEMO_BASE_STEPS, DEMO_BASE_RATE, DEMO_CONTROL_RATES = 360, 2e-3, (2.5e-4, 1e-3, 4e-3)
LIBRARY = "sympy"  # requirements.txt brings it, and the small Phi has never read it
PLAN = f"""Demostración sin Hub: entreno un Phi pequeño con la biblioteca estándar de Python, lo congelo, le injerto la
memoria, y ella sola aprende {LIBRARY}, que él no ha leído. A su lado lo aprende el mismo Phi sin memoria, con todos sus
pesos. Al final se ve qué ha aprendido y qué ha olvidado cada uno. Unos 10 minutos con dos núcleos.
"""
BLOCKS = 256, 128  # at most, of the library and of what the small Phi has read, that models are measured on
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
    """Small Phi from scratch on the standard library; then its memory learns LIBRARY, and a twin does with all weights.

    Both go on from the same base, on the same tokens in the same order; the control at three rates.
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
    steps = sum(recipe.steps)
    print(PLAN)
    started = time.perf_counter()
    tokenizer = demo_tokenizer(text_files(standard_library()), DEMO_SHAPE["vocab_size"])
    known = prepare_corpus(tokenizer, length=recipe.length, seed=recipe.seed)
    print(f"Lo que lee primero: {known.describe()}")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary) / "phi-de-la-demostracion"  # a name that cards give
        set_seed(recipe.seed)
        end = tokenizer.eos_token_id
        base = PhiForCausalLM(PhiConfig(**DEMO_SHAPE, bos_token_id=end, eos_token_id=end))
        train_plain(base, known, recipe, DEMO_BASE_RATE, steps=base_steps, offset=0, label="Phi de partida")
        base.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        corpus = prepare_corpus(tokenizer, package_folder(LIBRARY), length=recipe.length, seed=recipe.seed)
        print(f"Lo que no ha leído: {corpus.describe()}")
        new = held_out_blocks(tokenizer, package_folder(LIBRARY), BLOCKS[0], recipe.length)
        old = held_out_blocks(tokenizer, None, BLOCKS[1], recipe.length)
        rows = [measured("Phi de partida", base, base, new, old)]
        print(learned_line(rows[0], LIBRARY))
        best = None
        for rate in DEMO_CONTROL_RATES:
            control = PhiForCausalLM.from_pretrained(scratch)
            label = f"Control (tasa {short(rate)})"
            row = train_plain(control, corpus, recipe, rate, steps=steps, offset=0, label=label)
            rows.append(measured(label, control, base, new, old))
            print(learned_line(rows[-1], LIBRARY))
            if best is None or row["loss"] < best["loss"]:
                best, twin = dict(row, name=f"{label}: el mismo Phi sin memoria, con los mismos pasos"), control
        shutil.rmtree(output.with_name(output.name + "-checkpoints"), ignore_errors=True)
        model, _ = load_phi_1_with_engram(scratch, **DEMO_ENGRAM)
        train_model(model, tokenizer, corpus, recipe, output, save_every=10**9, control=best)
    with whole_folder(control_output) as folder:
        twin.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_control_card(twin, folder, control_output.name, output.name)
    rows.append(measured("Phi con la memoria", model, base, new, old))
    with shuffled_rows(model):
        rows.append(measured("… con las filas de otros n-gramas", model, base, new, old))
    counts = [spanish(sample.ids[:, 1:].numel()) for sample in (new, old)]
    print(f"\nEn {counts[0]} tokens de {LIBRARY} y {counts[1]} de la biblioteca estándar que ningún modelo ha visto.")
    print(f"{WORDS}\n\n{comparison(rows, LIBRARY)}\n")
    on, off = rows[-2]["choices"], rows[0]["choices"]  # switched off, it is the Phi of before
    print(f"{NAT}\n\n{examples(tokenizer, new.ids, on, off)}\n")
    prompt = worth_comparing(model, tokenizer, new.ids, on, off)
    draw_trade(rows, LIBRARY, output / "aprender-y-olvidar.png")
    with open(output / LOG, "a", encoding="utf-8") as log:
        log.write(json.dumps(dict(demo=dict(library=LIBRARY, prompt=prompt)), ensure_ascii=False) + "\n")
    print(verdict(rows, LIBRARY))
    print(f"Una sola semilla. Tiempo total: {spanish(time.perf_counter() - started)} s.")
    print(f"Guardado en {output}/ y {control_output}/; el dibujo, {output}/aprender-y-olvidar.png")
    print(f"Ahora: python chat_phi_engram.py --modelo {output}")
    if prompt:
        print(f"   y dentro escribe: comparar {prompt}")
    return rows
