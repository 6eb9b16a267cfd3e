"""Train the memory first and the whole model after, or show on this machine that the memory pays.

    python train_phi_engram.py --demo                    # no Hub, no GPU: base, control and Engram, with a table
    python train_phi_engram.py --datos mi-codigo/        # phi1-engram/ -> phi1-engram-trained/
    python train_phi_engram.py --datos mi-codigo/ --reanudar
    python train_phi_engram.py --datos mi-codigo/ --subir mi-usuario/phi1-engram

Phase 1 freezes Phi and trains only Engram; phase 2 trains everything, Engram at five times Phi's rate. Table gradients
are row-sparse: a step touches the rows that its batch reads.
"""

import atexit
import difflib
import errno
import hashlib
import importlib.util
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import current_thread, main_thread

try:
    import numpy as np
    import torch
    import transformers
    from accelerate.utils import broadcast_object_list, set_seed
    from tqdm import tqdm

    from engram.checkpoints import all_checkpoints, identity_of, is_damage, last_checkpoint, write_checkpoint
    from engram.console import SpanishParser, UserError, run_script, spanish
    from engram.corpus import Corpus, batch_at, prepare_corpus
    from engram.folders import discard, hold, no_space, sweep
    from engram.opening import about_memory, add_memory_options, open_model
    from engram.plan import check, from_args, plan
    from engram.processes import (
        average_gradients,
        beside_parts,
        gather,
        in_any_process,
        in_parts,
        leave_processes,
        load_parts,
        make_accelerator,
        prepare,
        put_apart,
        save_parts,
        whole,
    )
    from engram.rows import ROW_STATES, TrainedTables

    # Also found out before hours of training: its matplotlib is only used after them.
    from engram.sharing import (
        LOG,
        TRACKERS,
        check_tracker,
        on_hub,
        result_line,
        result_table,
        save_trained,
        start_tracker,
    )
    from phi1_engram import unpack
except ImportError as error:
    sys.exit(
        f"❌ Falta un paquete de Python, o el instalado es demasiado antiguo ({error}).\n"
        "   Se arregla con: pip install -U -r requirements.txt"
    )


# ---------- Recipes ----------

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
RECIPES = {
    "phi1": PHI_1_RECIPE,
    # The paper's proportions (§4, appendix A) at the same rate of Phi: Muon, only tables at five times it. Nothing is
    # frozen.
    "articulo": replace(PHI_1_RECIPE, memory_rates=(1e-5, 1e-5), table_rates=(5e-5, 5e-5), optimizer="muon"),
}
PATIENCE = 20  # steps in a row without a finite gradient; float16's scale may need fifteen to settle


# ---------- Optimiser, one step, evaluation ----------

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "muon")


class EngramOptimizer(torch.optim.Optimizer):
    """Optimisers of dense weights, and the rows that a step reads, behind one `step`.

    As one optimiser it makes one decision when a float16 gradient overflows: all of it steps, or nothing does.
    """

    def __init__(self, parts, tables=None, table_rate=0.0):
        self.parts, self.tables = parts, tables
        groups = [group for part in parts for group in part.param_groups]
        self.rows = dict(params=[], lr=table_rate)
        super().__init__([*groups, self.rows], {})

    def collect(self):
        """After the last backward of a step: exchange rows between processes, and take their gradients in."""
        if self.tables:
            self.rows["params"] = beside_parts(self.tables.collect(), self.parts[0].param_groups[0]["params"][0])

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()
        if self.tables:
            self.tables.step(self.rows["lr"])

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)
        self.param_groups = [*(group for part in self.parts for group in part.param_groups), self.rows]


def make_optimizer(
    model, backbone_rate: float, memory_rate: float, table_rate: float, decay: float, kind="adamw", tables=None
) -> EngramOptimizer:
    """Groups of the parameters that require a gradient, beside `tables`, the rows (TrainedTables; no weight decay).

    Args:
        kind: "adamw"; "adamw8bit", with 8-bit states (bitsandbytes); "adafactor", whose second moments are factored
            (Shazeer and Stern, 2018); or "muon" for matrices inside the layers and AdamW for the rest.
    """
    groups = {"matrices": [], "outer": [], "vectors": [], "memory": [], "memory_vectors": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim != 2
            if "engram" in name:
                groups["memory_vectors" if vector else "memory"].append(parameter)
            elif vector:
                groups["vectors"].append(parameter)
            else:
                groups["matrices" if ".layers." in name else "outer"].append(parameter)
    rates = dict.fromkeys(groups, backbone_rate) | dict(memory=memory_rate, memory_vectors=memory_rate)
    # full_lr is what the schedule multiplies.
    groups = {
        name: dict(
            params=parameters, lr=rates[name], full_lr=rates[name],
            weight_decay=decay if name in ("matrices", "outer") else 0.0,
        )
        for name, parameters in groups.items() if parameters
    }  # fmt: skip
    parts = []
    if kind == "muon":
        hidden = [groups.pop(name) for name in ("matrices", "memory") if name in groups]
        # Its updates scaled to those of AdamW, so that the same rates serve.
        parts.append(torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw"))
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as rest
    else:
        rest = torch.optim.Adafactor if kind == "adafactor" else torch.optim.AdamW
    if groups:
        parts.append(rest(list(groups.values())))
    optimizer = EngramOptimizer(parts, tables, table_rate)
    optimizer.rows["full_lr"] = table_rate
    return optimizer


def clip_gradients(accelerator, optimizer, limit: float) -> float:
    """Bring together what all processes found, and scale all gradients, those of rows too, to a joint norm of at most
    `limit`. Returns the norm before.

    The norm is what it would be with the whole tables' dense gradients.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    dense = [p for part in inner.parts for group in part.param_groups for p in group["params"] if p.grad is not None]
    average_gradients(dense)
    inner.collect()
    rows = [row for _, row in inner.tables.pairs.values()] if inner.tables else []
    if accelerator.scaler is not None and inner.tables and inner.tables.sharded:
        # Rows that overflow are seen by their keeper alone, and the scalers of all have to skip the same steps.
        if in_any_process(not all(row.grad.isfinite().all() for row in rows), accelerator.device):
            dense[0].grad.mul_(math.nan)
    accelerator.unscale_gradients(optimizer)
    squares = whole(torch.nn.utils.get_total_norm([p.grad for p in dense]) ** 2)
    own = sum((p.grad.square().sum() for p in rows), torch.zeros((), device=squares.device))
    if inner.tables and inner.tables.sharded:
        torch.distributed.all_reduce(own)
    norm = (squares + own).sqrt().float()
    for parameters in (dense, rows):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.item()


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


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


# ---------- Two phases ----------

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


# ---------- Command line ----------

# What a plan repeats of the command line in the command that it proposes; the rest it proposes itself.
REPEATED = (
    "datos", "dataset", "max_tokens", "receta", "tasas", "pasos_fase1", "pasos_fase2", "semilla", "salida",
    "guardar_cada", "conservar", "registro", "subir", "publico", "cambiar_memoria", "reanudar",
)  # fmt: skip


def parse(argv):
    parser = SpanishParser(
        description="Entrena la memoria Engram (fase 1) y después todo el modelo (fase 2).",
        epilog="Ejemplo: python train_phi_engram.py --datos mi-codigo/ --salida phi1-engram-trained",
    )
    parser.add_argument("--demo", action="store_true", help="sin Hub ni GPU: unos 15 minutos, con control y tabla")
    parser.add_argument("--modelo", default="phi1-engram", help="carpeta o usuario/nombre (por defecto, %(default)s)")
    parser.add_argument("--datos", help="carpeta o archivo .py, .txt, .md o .jsonl (sin él, la biblioteca estándar)")
    parser.add_argument("--dataset", help="dataset del Hub, con el paquete opcional datasets")
    parser.add_argument("--max-tokens", type=int, help="dejar de leer el corpus tras tantos tokens")
    parser.add_argument("--salida", default="phi1-engram-trained", help="carpeta final (por defecto, %(default)s)")
    parser.add_argument(
        "--pasos-fase1", type=int, help="pasos de la fase 1 (por defecto, un décimo de pasada; sin fase 2, una entera)"
    )
    parser.add_argument("--pasos-fase2", type=int, help="pasos de la fase 2 (por defecto, una pasada al corpus)")
    parser.add_argument("--longitud", type=int, default=PHI_1_RECIPE.length, help="tokens por bloque (%(default)s)")
    parser.add_argument("--lote", type=int, default=PHI_1_RECIPE.batch, help="bloques a la vez (%(default)s)")
    parser.add_argument("--acumular", type=int, default=PHI_1_RECIPE.accumulate, help="lotes por paso (%(default)s)")
    parser.add_argument(
        "--receta", choices=RECIPES, default="phi1",
        help="phi1 (por defecto), o articulo: la del artículo de Engram, Muon y sin fase 1; sin probar con Phi-1",
    )  # fmt: skip
    parser.add_argument("--tasas", type=float, default=1.0, help="multiplica todas las tasas (%(default)s)")
    parser.add_argument(
        "--optimizador", choices=OPTIMIZERS, help="de los pesos densos (por defecto, adamw; muon en --receta articulo)"
    )
    parser.add_argument(
        "--estado-filas", choices=ROW_STATES, default="adam",
        help="lo que se guarda para entrenar la tabla: dos números por valor, o uno por fila (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--recalcular", action="store_true", help="menos memoria, un tercio más de tiempo")
    parser.add_argument(
        "--repartir-filas", action="store_true", help="con varios procesos: cada uno guarda una parte de las tablas"
    )
    parser.add_argument(
        "--repartir-modelo", action="store_true", help="con varios procesos: cada uno guarda una parte de Phi (FSDP2)"
    )
    parser.add_argument(
        "--plan", nargs="?", const="", metavar="MÁQUINA",
        help="solo decir si cabe y con qué orden: en este equipo, o en t4, t4x2, colab o kaggle",
    )  # fmt: skip
    parser.add_argument("--semilla", type=int, default=0, help="del orden y del reparto (%(default)s)")
    parser.add_argument("--guardar-cada", type=int, default=200, help="pasos entre puntos de control (%(default)s)")
    parser.add_argument("--conservar", type=int, default=1, help="puntos de control que se guardan (%(default)s)")
    parser.add_argument("--reanudar", action="store_true", help="seguir desde el último punto de control")
    parser.add_argument("--registro", choices=TRACKERS, help="apuntar también la marcha ahí (paquete opcional)")
    parser.add_argument("--subir", metavar="USUARIO/NOMBRE", help="subir el resultado al Hub, privado")
    parser.add_argument("--publico", action="store_true", help="con --subir: repositorio público")
    add_memory_options(parser)
    args = parser.parse_args(argv)
    given = {name for name in vars(args) if getattr(args, name) != parser.get_default(name)}
    if args.demo and given != {"demo"}:
        raise UserError("--demo va sola, sin más opciones: python train_phi_engram.py --demo")
    args.given = []
    for name in REPEATED:
        value = getattr(args, name)
        if name in given and value != 0:  # a phase that is left out is the plan's own word
            words = f"--{name.replace('_', '-')}"
            args.given.append(words if value is True else f"{words} {shlex.quote(str(value))}")
    args.optimizador = args.optimizador or RECIPES[args.receta].optimizer
    if args.receta == "articulo" and args.pasos_fase1 is None:
        args.pasos_fase1 = 0
    least = dict(longitud=2, lote=1, acumular=1, guardar_cada=1, conservar=1, max_tokens=1)
    for name, low in (least | dict(pasos_fase1=0, pasos_fase2=0, semilla=0)).items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**32:
            raise UserError(f"--{name.replace('_', '-')} {value} no es válido: va de {low} a {spanish(2**32 - 1)}.")
    if args.pasos_fase1 == args.pasos_fase2 == 0:
        raise UserError("Con 0 pasos en las dos fases no hay nada que entrenar.")
    if not 0 < args.tasas < math.inf:
        raise UserError(f"--tasas {args.tasas:g} no es válido: tiene que ser mayor que 0 (1 las deja como están).")
    if args.memoria == "disco":
        raise UserError("Con --memoria disco las filas solo se leen, y así no aprenden: usa --memoria ram, o auto.")
    for name in ("datos", "salida"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise UserError(f"--{name} está vacío: escribe detrás una carpeta (¿una variable sin valor?).")
    args.salida = os.path.expanduser(args.salida)
    if args.repartir_modelo and args.optimizador != "adamw":
        raise UserError(
            f"--repartir-modelo no va con --optimizador {args.optimizador}, que necesita las matrices enteras: deja "
            "adamw, cuyos estados ya se reparten."
        )
    if args.optimizador == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"--optimizador muon pide torch 2.9 o posterior y este es {torch.__version__}: pip install -U torch"
        )
    # A plan may be for another machine.
    if args.optimizador == "adamw8bit" and args.plan is None and not importlib.util.find_spec("bitsandbytes"):
        raise UserError("--optimizador adamw8bit necesita un paquete más. Instálalo con: pip install bitsandbytes")
    if args.plan is None:
        check_tracker(args.registro)
    if args.datos and args.dataset:
        raise UserError("Elige uno: --datos (archivos tuyos) o --dataset (del Hub).")
    if args.publico and not args.subir:
        raise UserError("--publico solo tiene sentido con --subir usuario/nombre.")
    if args.subir and args.subir.count("/") != 1:
        raise UserError(f"--subir {args.subir} no es válido: escribe tu-usuario/nombre.")
    if args.datos and args.plan is None and not Path(args.datos).expanduser().exists():
        near = Path(args.datos).expanduser().absolute()
        close = difflib.get_close_matches(near.name, (p.name for p in near.parent.glob("*")), 1)
        hint = f" ¿Querías decir {Path(args.datos).with_name(close[0])}?" if close else ""
        raise UserError(f"No existe «{args.datos}».{hint} Indica una carpeta o un archivo con --datos.")
    return args


def steps_of_phases(asked_1: int | None, asked_2: int | None, tokens: int, recipe: Recipe) -> tuple[int, int]:
    """What was asked, or one pass over `tokens` in phase 2 and a tenth of one in phase 1, where longer ones lost in our
    study (DOCUMENTACION_TECNICA.md, 6.4.1). A whole pass in phase 1 when it is the only one."""
    one_pass = max(1, tokens // recipe.tokens_per_step)
    first = one_pass if asked_2 == 0 else -(-one_pass // 10)
    return first if asked_1 is None else asked_1, one_pass if asked_2 is None else asked_2


def writable_memory(model):
    """Rows of a memory that can be trained: float32, and not on disk."""
    if model.memory_place == "disco":
        raise UserError(
            f"{about_memory(model)} Para entrenarla tiene que poder escribirse: usa --memoria ram en una máquina "
            "donde quepa, o crea una memoria menor: python load_phi_engram.py --filas 64000"
        )
    for table in model.model.engram_tables.values():
        if table.dtype != torch.float32:
            table.weight = torch.nn.Parameter(unpack(table.weight.detach()).float())


def main(argv=None):
    args = parse(argv)
    transformers.logging.disable_progress_bar()  # its bars are English
    transformers.logging.set_verbosity_error()
    if args.demo:
        from engram.demo import demo  # it stands on this module

        try:
            demo()
        except KeyboardInterrupt:
            print("\nLa demostración no se reanuda; para empezarla de nuevo: python train_phi_engram.py --demo")
            raise
        return
    if args.plan is not None:
        print(plan(*from_args(args)))
        return
    accelerator = make_accelerator(args.repartir_modelo)
    atexit.register(leave_processes)
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process speaks
    if accelerator.num_processes == 1:
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ
        if args.repartir_filas:
            raise UserError(
                "--repartir-filas es para varios procesos y este está solo: accelerate launch --multi_gpu "
                "--num_processes 2 train_phi_engram.py --repartir-filas, con las demás opciones detrás."
            )
        if launched and not torch.cuda.is_available():
            print(
                "⚠️  accelerate ha empezado un solo proceso. Sin tarjetas, para que sean dos: accelerate launch "
                "--multi_gpu --num_processes 2 train_phi_engram.py …"
            )
    output = Path(args.salida)
    if any(parent.is_file() for parent in (output, *output.parents)):
        raise UserError(f"--salida {output}: ahí hay un archivo, no una carpeta. Elige otra --salida.")
    if output.exists() and not args.reanudar:
        raise UserError(f"{output}/ ya existe y no la voy a pisar. Elige otra, por ejemplo --salida {output}-2")
    if args.subir and accelerator.is_main_process:
        # Before training, so that a wrong name or key is not found out after it.
        on_hub(
            lambda hub: hub.create_repo(args.subir, private=not args.publico, exist_ok=True), args.subir,
            "Escribe --subir tu-usuario/nombre con tu usuario, y una llave con permiso de escritura.",
        )  # fmt: skip
    choice = from_args(args)
    accelerator.wait_for_everyone()  # all have measured the free memory before one takes any
    check(*choice)
    model, tokenizer = open_model(args.modelo, torch.float32, None, args.memoria, args.cambiar_memoria)
    writable_memory(model)
    print(about_memory(model))
    checkpoints = output.with_name(output.name + "-checkpoints")
    if not args.reanudar:  # from here on there is something to resume
        checkpoints.mkdir(parents=True, exist_ok=True)
    # The others wait for the main process in whatever it does next, and end with it.
    with hold(checkpoints) if accelerator.is_main_process and checkpoints.is_dir() else nullcontext(True) as alone:
        if not alone:
            raise UserError(f"Ya hay un entrenamiento en marcha con --salida {output}: espera, o elige otra.")
        run(args, accelerator, model, tokenizer, output)


def run(args, accelerator, model, tokenizer, output: Path):
    """Corpus, recipe, both phases and the Hub, as the command line asks."""
    if not args.datos and not args.dataset:
        print("Sin --datos: entreno con la biblioteca estándar de Python.")
    with accelerator.main_process_first():  # the others find it tokenised
        corpus = prepare_corpus(
            tokenizer, args.datos, dataset=args.dataset, length=args.longitud, seed=args.semilla,
            max_tokens=args.max_tokens, fresh=accelerator.is_main_process,
        )  # fmt: skip
    print(corpus.describe())
    if corpus.skipped:
        print(corpus.skipped.describe())
    recipe = replace(
        scaled(RECIPES[args.receta], args.tasas), length=args.longitud, batch=args.lote, accumulate=args.acumular,
        seed=args.semilla, optimizer=args.optimizador, row_state=args.estado_filas, recompute=args.recalcular,
        processes=accelerator.num_processes, shard_rows=args.repartir_filas, shard_model=args.repartir_modelo,
    )  # fmt: skip
    recipe = replace(recipe, steps=steps_of_phases(args.pasos_fase1, args.pasos_fase2, len(corpus.train), recipe))
    tokens = spanish(recipe.tokens_per_step)
    together = f", entre {recipe.processes} procesos" if recipe.processes > 1 else ""
    print(f"Fase 1: {recipe.steps[0]} pasos; fase 2: {recipe.steps[1]}; {tokens} tokens por paso{together}.")
    print("Son las tasas de un Phi-1 ya entrenado (--receta); con sus pesos reales aún no se han probado aquí.")
    try:
        outcome = train_model(
            model, tokenizer, corpus, recipe, output, resume=args.reanudar, save_every=args.guardar_cada,
            keep=args.conservar, tracker=args.registro, repo=args.subir,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("\nPara seguir donde estaba: repite la misma orden con --reanudar")
        raise
    print(result_table(outcome["results"]))
    print(f"✅ Guardado en {output}/ (pesos, tokenizer, código, tarjeta, registro y curvas).")
    if args.subir and accelerator.is_main_process:
        on_hub(
            lambda hub: hub.upload_folder(repo_id=args.subir, folder_path=output), args.subir,
            f"El modelo está entero en {output}/; súbelo cuando haya conexión con: hf upload {args.subir} {output}",
        )  # fmt: skip
        print(f"✅ Subido a https://huggingface.co/{args.subir}")
    print(f"Ahora: python chat_phi_engram.py --modelo {output}")


if __name__ == "__main__":
    run_script(main)
