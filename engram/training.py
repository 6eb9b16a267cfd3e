"""Training in two phases, from a recipe and a corpus to a folder that is ready to share."""

import errno
import hashlib
import math
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import current_thread, main_thread

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, set_seed
from tqdm import tqdm

from engram.checkpoints import all_checkpoints, identity_of, is_damage, last_checkpoint, write_checkpoint
from engram.console import UserError, spanish
from engram.corpus import Corpus, batch_at
from engram.folders import discard, no_space, sweep
from engram.optimizers import clip_gradients, make_optimizer, rate_factor
from engram.processes import (
    gather,
    in_any_process,
    in_parts,
    load_parts,
    make_accelerator,
    prepare,
    put_apart,
    save_parts,
    whole,
)
from engram.rows import TrainedTables
from engram.sharing import LOG, result_line, save_trained, start_tracker


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Rates are Adam's; each phase warms up and then decays to a tenth by a cosine."""

    backbone_rate: float  # phase 2
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

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length * self.accumulate * self.processes


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """All rates times `factor`."""
    pairs = {name: tuple(factor * rate for rate in getattr(recipe, name)) for name in ("memory_rates", "table_rates")}
    return replace(recipe, backbone_rate=factor * recipe.backbone_rate, **pairs)


# Not yet tried on Phi-1's real weights: rates from the project that this one mirrors, fit for a pretrained backbone.
PHI_1_RECIPE = Recipe(1e-5, memory_rates=(1e-4, 5e-5), table_rates=(1e-4, 5e-5), batch=2, length=512, accumulate=8)
PATIENCE = 20  # steps in a row without a finite gradient; float16's scale may need fifteen to settle


@torch.no_grad()
def evaluate(model, corpus: Corpus, recipe: Recipe, device, max_blocks: int = 256) -> dict:
    """Loss (nats per token), perplexity and bits per byte on the held-out part, at blocks spread evenly over it."""
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
        loss=loss, perplexity=math.exp(min(loss, 700)), bits_per_byte=loss / math.log(2) / corpus.bytes_per_token
    )


@contextmanager
def stop_requests():
    """Yield a list that is empty until Ctrl-C or kill asks to stop after the current step; twice stops at once."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        tqdm.write("\nTermino este paso y lo dejo; otra vez Ctrl-C para salir ya.")

    numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()
    old = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_steps(accelerator, model, optimizer, corpus, recipe, *, steps, label, first=0, offset=0, on_step=None):
    """Train from step `first` to `steps`. Returns the seconds spent computing.

    Args:
        offset: steps of earlier phases, whose batches are not read again before the corpus is through.
        on_step: called after each step with (steps done, loss in nats per token, seconds so far); may raise to stop.
    Raises:
        UserError: gradients that are not finite, too many steps in a row.
    """
    model.train()
    tables = getattr(optimizer, "optimizer", optimizer).tables
    world, seconds, recent, skipped, in_a_row = accelerator.num_processes, 0.0, [], 0, 0

    def batch(number):  # of this process
        index = number * world + accelerator.process_index
        return batch_at(corpus.train, index, recipe).to(accelerator.device)

    ids = batch((offset + first) * recipe.accumulate)
    hidden = not accelerator.is_main_process
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=label, unit="paso", disable=hidden)
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
                "último punto de control sigue entero. Empieza de nuevo con otra --salida y --tasas 0.3 (un tercio), o "
                "mira antes si el modelo de partida está sano: python verify_phi_engram.py --modelo CARPETA"
            )
        loss = accelerator.reduce(loss, "mean").item()
        seconds += time.perf_counter() - started
        recent = [*recent[-19:], loss]
        speed = recipe.tokens_per_step * (step + 1 - first) / seconds
        mean = spanish(sum(recent) / len(recent), 3)
        note = f", {skipped} saltados" if skipped else ""
        bar.set_postfix_str(f"pérdida {mean}, {spanish(speed)} tokens/s{note}", refresh=False)
        if on_step:
            on_step(step + 1, loss, seconds)
    return seconds


def recompute_activations(model):
    # The first name from transformers 5.23 on.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def fingerprint(model) -> str:
    """Digest of every backbone tensor's bytes: equal before and after means bit-identical."""
    digest = hashlib.blake2b()
    for name, tensor in sorted(model.state_dict().items()):
        if "engram" not in name:
            digest.update(name.encode())
            digest.update(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def train_model(
    model, tokenizer, corpus: Corpus, recipe: Recipe, output, *, resume=False, save_every=200, keep=1,
    tracker: str | None = None, repo: str | None = None,
) -> dict:  # fmt: skip
    """Run phase 1 (memory alone) and phase 2 (everything) and leave `output` ready to share.

    Args:
        model: PhiEngramForCausalLM in float32; trained in place.
        output: folder to write when all is done; checkpoints go to `<output>-checkpoints` meanwhile.
        resume: go on from the last whole checkpoint.
        save_every: steps between checkpoints; `keep`: how many of them stay.
        tracker: one of TRACKERS, which gets losses, rates, speed and held-out results.
        repo: user/name under which the card says that the model is found.
    Returns:
        {"results": [{"name", "loss", "perplexity", "bits_per_byte", "tokens_per_second", "seconds"}, ...],
        "history": [{"phase", "step", "loss"}, ...]}; results are measured before phase 1 and after each phase.
    Raises:
        UserError: nothing to resume, a checkpoint of another corpus, recipe or shape, or one in the way.
        KeyboardInterrupt: on Ctrl-C or kill, after saving a checkpoint.
    """
    output = Path(output)
    checkpoints = output.with_name(output.name + "-checkpoints")
    accelerator = make_accelerator(recipe.shard_model, log_with=tracker, project_dir=output.parent)
    recipe = replace(recipe, processes=accelerator.num_processes)
    if accelerator.is_main_process:
        sweep(output.parent, re.escape(output.name) + "(?:-checkpoints)?")
        sweep(checkpoints, "fase-.*")
    identity = identity_of(asdict(recipe), corpus.digest, model.config.to_dict())
    saved = None
    state = dict(phase=1, step=0, seconds=0.0, history=[], results=[], backbone=fingerprint(model))
    if resume:
        saved, found = last_checkpoint(checkpoints, output, identity, corpus.describe())
        if found.get("phase") == 1 and found["backbone"] != state["backbone"]:
            raise UserError(
                f"El punto de control {saved} es de otro modelo de partida: los pesos de Phi no son los de entonces. "
                "Indica el mismo con --modelo, o elige otra --salida para empezar uno nuevo."
            )
        state |= found
    elif all_checkpoints(checkpoints):
        raise UserError(
            f"En {checkpoints} hay un entrenamiento a medias. Para seguirlo añade --reanudar; para empezar de nuevo "
            "borra esa carpeta o elige otra --salida."
        )
    set_seed(recipe.seed)
    history, results = state["history"], state["results"]
    before = (0, recipe.steps[0])  # steps of the phases before each
    start_tracker(accelerator, tracker, f"{output.name}-registro", identity, before[state["phase"] - 1] + state["step"])

    def save(**position):
        def write(folder):  # every process writes a part of the folder that the main one has opened
            folder, failure = broadcast_object_list([str(folder)])[0], None
            try:
                if recipe.shard_model:
                    save_parts(model, optimizer.optimizer, accelerator.scaler, folder)
                else:
                    accelerator.save_state(folder)
                tables.save(folder)
            except Exception as error:
                failure = error
            full = in_any_process(failure is not None and no_space(failure), device)
            if in_any_process(failure is not None, device):  # what one could not write is of no use to the others
                words = "another process could not write its part"
                raise failure or (OSError(errno.ENOSPC, words) if full else RuntimeError(words))

        now, failure = dict(state, **position, identity=identity, data=corpus.describe()), None
        try:
            if accelerator.is_main_process:
                write_checkpoint(checkpoints, now, write, keep)
            else:
                write(None)
        except Exception as error:
            failure = error
        if in_any_process(failure is not None, device):
            # Of a full disk the main process speaks alone: it knows which checkpoint is left.
            raise failure if failure and (accelerator.is_main_process or not no_space(failure)) else SystemExit(1)

    def only_memory(models, weights, folder):
        """In phase 1 the backbone is that of the model to begin with: no need to write gigabytes of it every time."""
        for dense in weights if not model.model.embed_tokens.weight.requires_grad else ():
            for name in [name for name in dense if "engram" not in name]:
                del dense[name]

    def measure(name, done, **speed):
        with accelerator.autocast():
            results.append(dict(name=name, **evaluate(running, corpus, recipe, accelerator.device), **speed))
        put_apart(model)
        accelerator.print(result_line(results[-1]))
        measured = zip(("pérdida", "perplejidad", "bits por byte"), ("loss", "perplexity", "bits_per_byte"))
        accelerator.log({f"texto apartado/{word}": results[-1][key] for word, key in measured}, step=done)

    accelerator.register_save_state_pre_hook(only_memory)
    if recipe.recompute:
        recompute_activations(model)
    world, device = accelerator.num_processes, accelerator.device
    with stop_requests() as stop, TrainedTables(model, recipe.row_state, world, recipe.shard_rows, device) as tables:
        model.to(device)
        for phase in (1, 2):
            steps, first, seconds = recipe.steps[phase - 1], 0, 0.0
            if not steps or phase < state["phase"]:
                continue
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(phase == 2 or "engram" in name)
            tables.restart()
            optimizer = make_optimizer(
                model, recipe.backbone_rate, recipe.memory_rates[phase - 1], recipe.table_rates[phase - 1],
                recipe.weight_decay, recipe.optimizer, tables,
            )  # fmt: skip
            if in_parts(model.lm_head.weight):  # since phase 1
                optimizer = accelerator.prepare_optimizer(optimizer)
            else:
                running, optimizer = prepare(accelerator, model, optimizer)
            if saved and phase == state["phase"]:
                try:
                    if recipe.shard_model:
                        load_parts(model, optimizer.optimizer, accelerator.scaler, saved)
                    else:
                        accelerator.load_state(str(saved), strict=False)
                    tables.load(saved)
                except Exception as error:
                    if not is_damage(error):
                        raise
                    raise UserError(
                        f"El punto de control {saved} está dañado ({type(error).__name__}). Borra esa carpeta: "
                        "--reanudar usa entonces el anterior, si lo hay (--conservar 2 guarda siempre dos)."
                    ) from error
                first, seconds = state["step"], state["seconds"]
                accelerator.print(f"Sigo desde la fase {phase}, paso {first} de {steps}.")
            elif phase == 2:
                save(phase=2, step=0, seconds=0.0)  # phase 1 is not lost to an interruption from here on
            if not results:
                measure("antes de entrenar", 0)

            def on_step(step, loss, spent, phase=phase, steps=steps, first=first, seconds=seconds):
                history.append(dict(phase=phase, step=step, loss=round(loss, 5)))
                rates = dict(memoria=recipe.memory_rates[phase - 1], tablas=recipe.table_rates[phase - 1])
                rates |= dict(Phi=recipe.backbone_rate) if phase == 2 else {}
                values = {f"tasa/{word}": rate * rate_factor(step - 1, steps) for word, rate in rates.items()}
                values["entrenamiento/tokens por segundo"] = recipe.tokens_per_step * (step - first) / spent
                accelerator.log({"entrenamiento/pérdida": loss, **values}, step=before[phase - 1] + step)
                stopping = in_any_process(bool(stop), accelerator.device)  # all stop, or none
                # At the very end too: what comes next, saving the result, may find the disk full.
                last = step == steps and (phase == 2 or not recipe.steps[1])
                if stopping or last or (step % save_every == 0 and step < steps):
                    save(phase=phase, step=step, seconds=seconds + spent)
                if stopping:
                    raise KeyboardInterrupt

            seconds += run_steps(
                accelerator, running, optimizer, corpus, recipe, steps=steps, label=f"Fase {phase}", first=first,
                offset=before[phase - 1], on_step=on_step,
            )  # fmt: skip
            what = "solo la memoria" if phase == 1 else "todo el modelo"
            speed = recipe.tokens_per_step * steps / seconds
            done = before[phase - 1] + steps
            measure(f"tras la fase {phase} ({what})", done, tokens_per_second=speed, seconds=seconds)
            if phase == 1:
                if fingerprint(model) != state["backbone"]:
                    raise RuntimeError("phase 1 changed the backbone")
                accelerator.print("✅ Phi no ha cambiado ni un bit: en la fase 1 solo ha aprendido la memoria.")
            if world > 1:
                pairs, dense = tables.sent / max(1, steps - first), tables.n_bytes
                accelerator.print(
                    f"   Por paso, este proceso ha mandado {spanish(pairs / 1e6, 2)} MB de pares (fila, gradiente); el "
                    f"gradiente denso de las tablas son {spanish(dense / 1e6, 2)} MB."
                )
                tables.sent = 0
            accelerator.unwrap_model(running, keep_fp32_wrapper=False)
            accelerator.free_memory()
    if recipe.shard_model:
        gather(model, accelerator.is_main_process)
    outcome = dict(results=results, history=history, recipe=recipe, corpus=corpus)
    for open_tracker in accelerator.trackers:
        open_tracker.finish()
    if accelerator.is_main_process:
        try:
            if output.exists() and not (output / LOG).exists():  # not this training's, half discarded
                raise UserError(f"{output}/ no estaba al empezar y no la voy a pisar: cámbiale el nombre.")
            save_trained(model, tokenizer, outcome, output, repo)
        except UserError as error:
            raise UserError(f"{error} Lo entrenado está en {checkpoints}: repite después con --reanudar.") from error
        discard(checkpoints)
    accelerator.wait_for_everyone()
    return outcome
