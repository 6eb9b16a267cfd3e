"""What a training does over and over: recipes, steps, and the loss on text held out."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import json
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from engram.adapters import RANK
from engram.console import Progress, UserError, spanish
from engram.corpus import Corpus, batch_at
from engram.optimizers import clip_gradients, rate_factor


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Rates are Adam's; each phase warms up and then decays to a tenth by a cosine."""

    backbone_rate: float  # phase 2; of Phi's weights, or of the adapters in their place
    memory_rates: tuple[float, float]  # dense Engram weights, phase 1 and 2
    table_rates: tuple[float, float]  # table rows, phase 1 and 2; never with weight decay
    batch: int  # blocks per micro-batch
    length: int  # tokens per block
    accumulate: int = 1  # micro-batches per step
    steps: tuple[int, int] = (0, 0)  # of phase 1 and phase 2; 0 skips the phase
    weight_decay: float = 0.1  # backbone matrices only
    clip: float = 1.0  # joint norm of all gradients
    seed: int = 0
    optimizer: str = "adamw"  # of dense weights: one of OPTIMIZERS
    row_state: str = "adam"  # of table rows: one of ROW_STATES
    recompute: bool = False  # activations again in backward (gradient checkpointing): less memory, a third more time
    processes: int = 1  # that train together, each on micro-batches of its own
    shard_rows: bool = False  # each process keeps a part of the rows instead of all
    shard_model: bool = False  # and of the dense weights, their gradients and states (FSDP2)
    lora: int = 0  # rank of the adapters that phase 2 trains in the place of Phi's weights; 0: Phi itself

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length * self.accumulate * self.processes


# Found with a pretrained SmolLM2-135M (DOCUMENTACION_TECNICA.md, 6.1); Phi-1's real weights have not seen them yet.
PHI_1_RECIPE = Recipe(5e-5, memory_rates=(3e-3, 3e-3), table_rates=(3e-2, 3e-2), batch=2, length=512, accumulate=8)
LORA_RECIPE = replace(PHI_1_RECIPE, backbone_rate=3e-3, weight_decay=0.0, lora=RANK)
# With which trainings that are half done may have begun.
EARLIER_RECIPES = (
    replace(PHI_1_RECIPE, backbone_rate=2e-5),
    replace(PHI_1_RECIPE, backbone_rate=2e-5, memory_rates=(3e-3, 1e-4), table_rates=(3e-2, 1e-3)),
    replace(PHI_1_RECIPE, backbone_rate=1e-5, memory_rates=(1e-4, 5e-5), table_rates=(1e-4, 5e-5)),
)
RATES = ("backbone_rate", "memory_rates", "table_rates")
PATIENCE = 20  # steps in a row without a finite gradient; float16's scale may need fifteen to settle


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """All rates times `factor`."""
    pairs = {name: tuple(factor * rate for rate in getattr(recipe, name)) for name in RATES[1:]}
    return replace(recipe, backbone_rate=factor * recipe.backbone_rate, **pairs)


def phi_1_recipe(factor: float, then: dict | None = None, lora=False) -> Recipe:
    """The default recipe, or the one with LoRA, its rates times `factor`; an earlier one where that gives the rates of
    `then`, what a checkpoint says of the training that it is from."""
    if lora:
        return scaled(LORA_RECIPE, factor)
    for earlier in (scaled(recipe, factor) for recipe in EARLIER_RECIPES):
        if then and all(then.get(name) == json.loads(json.dumps(getattr(earlier, name))) for name in RATES):
            return earlier
    return scaled(PHI_1_RECIPE, factor)


def steps_of_phases(asked_1: int | None, asked_2: int | None, tokens: int, tokens_per_step: int) -> tuple[int, int]:
    """What was asked, or one pass over `tokens` in phase 2 and a tenth of one in phase 1, where longer ones lost in our
    study (DOCUMENTACION_TECNICA.md, 6.4.1). A whole pass in phase 1 when it is the only one."""
    one_pass = max(1, tokens // tokens_per_step)
    first = one_pass if asked_2 == 0 else -(-one_pass // 10)
    return first if asked_1 is None else asked_1, one_pass if asked_2 is None else asked_2


@torch.no_grad()
def evaluate(model, corpus: Corpus, recipe: Recipe, device, max_blocks: int = 256) -> dict:
    """Loss (nats per token), perplexity and bits per byte of the held-out part, and on how many tokens: blocks spread
    evenly over it."""
    was_training = model.training
    model.eval()
    n_blocks = len(corpus.held_out) // recipe.length
    chosen = np.unique(np.linspace(0, n_blocks - 1, min(n_blocks, max_blocks)).astype(int))
    total = count = 0
    for start in range(0, len(chosen), recipe.batch):
        rows = [corpus.held_out[i * recipe.length :][: recipe.length] for i in chosen[start : start + recipe.batch]]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        loss = model(ids, labels=ids, use_cache=False).loss
        total += loss.double().item() * ids.shape[0]
        count += ids.shape[0]
    model.train(was_training)
    loss = total / count
    return dict(
        loss=loss, tokens=count * recipe.length, perplexity=math.exp(min(loss, 700)),
        bits_per_byte=loss / math.log(2) / corpus.bytes_per_token,
    )  # fmt: skip


def run_steps(
    accelerator, model, optimizer, corpus, recipe, *, steps, label, first=0, offset=0, on_step=None, share=None
):
    """Train from step `first` to `steps`. Returns the seconds spent computing.

    Args:
        offset: steps of earlier phases, whose batches are not read again before the corpus is through.
        on_step: called after each step with (steps done, loss in nats per token, seconds so far); may raise to stop.
        share: as `hooks.memory_share` yields it; numbers of each step's last batch take the place of its tensors,
            and are shown: a memory that adds nothing is seen in the first steps.
    Raises:
        UserError: gradients that are not finite, too many steps in a row.
    """
    model.train()
    tables = getattr(optimizer, "optimizer", optimizer).tables
    world, seconds, recent, skipped, in_a_row = accelerator.num_processes, 0.0, [], 0, 0

    def batch(number):  # of this process
        index = number * world + accelerator.process_index
        ids = batch_at(corpus.train, index, recipe)
        if accelerator.device.type == "cuda":  # without waiting for the card
            return ids.pin_memory().to(accelerator.device, non_blocking=True)
        return ids.to(accelerator.device)

    ids = batch((offset + first) * recipe.accumulate)
    hidden = not accelerator.is_main_process
    bar = Progress(range(first, steps), initial=first, total=steps, desc=label, unit="paso", disable=hidden)
    for step in bar:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate_factor(step, steps)
        loss = torch.zeros((), device=accelerator.device)
        for micro in range(recipe.accumulate):
            following = batch((offset + step) * recipe.accumulate + micro + 1)
            with accelerator.autocast():  # accelerate does not wrap a model in parts in it
                part = model(ids, labels=ids, use_cache=False).loss / recipe.accumulate
            if tables:  # this batch has its rows: those of the next may come
                tables.expect(following)
            accelerator.backward(part)
            loss += part.detach()
            ids = following
        finite = math.isfinite(clip_gradients(accelerator, optimizer, recipe.clip))
        if finite or accelerator.scaler is not None:  # the scaler skips by itself, and then scales less
            optimizer.step()
        optimizer.zero_grad()
        skipped, in_a_row = (skipped, 0) if finite else (skipped + 1, in_a_row + 1)
        if in_a_row == PATIENCE:
            raise UserError(
                f"{PATIENCE} pasos seguidos con gradientes que no son números: el entrenamiento ha divergido. El "
                "último punto de control sigue entero. Empieza de nuevo con otra --salida y --tasas 0,3 (un tercio), o "
                "mira antes si el modelo de partida está sano: python verify_phi_engram.py --modelo CARPETA"
            )
        loss = accelerator.reduce(loss, "mean").item()
        if share:
            share.update(zip(share, torch.stack([*share.values()]).tolist()))
        seconds += time.perf_counter() - started
        recent = [*recent[-19:], loss]
        speed = recipe.tokens_per_step * (step + 1 - first) / seconds
        mean = spanish(sum(recent) / len(recent), 3)
        adds = 100 * sum(ratio for ratio, _ in share.values()) / len(share) if share else 0
        note = f", la memoria aporta {spanish(adds, 2)} %" if share else ""
        note += f", {skipped} saltados" if skipped else ""
        bar.set_postfix_str(f"pérdida {mean}, {spanish(speed)} tokens/s{note}", refresh=False)
        if on_step:
            on_step(step + 1, loss, seconds)
    return seconds


def recompute_activations(model):
    # The first name from transformers 5.23 on.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
