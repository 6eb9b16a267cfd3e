"""Training in two phases, from a recipe and a corpus to a folder that is ready to share."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import errno
import hashlib
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import SCALER_NAME, broadcast_object_list, set_seed

from engram.adapters import add_lora, learns, of_phi
from engram.checkpoints import all_checkpoints, identity_of, is_damage, last_checkpoint, prune, write_checkpoint
from engram.console import UserError, spanish
from engram.copies import copies
from engram.corpus import Corpus
from engram.folders import discard, no_space, sweep
from engram.hooks import memory_off, memory_share, shuffled_rows
from engram.opening import FACTS_GONE, LOG
from engram.optimizers import make_optimizer, rate_factor
from engram.processes import (
    gather,
    highest,
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
from engram.sharing import memory_line, result_line, save_trained, start_tracker, what_learns
from engram.signals import StopRequests, stop_requests
from engram.steps import Recipe, evaluate, recompute_activations, run_steps
from phi1_engram import WRAPPED


def fingerprint(model) -> str:
    """Digest of every backbone tensor's bytes: equal before and after means bit-identical."""
    digest = hashlib.blake2b()
    state = {WRAPPED.sub(".", name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(state.items()):
        if of_phi(name):
            digest.update(name.encode())
            digest.update(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Training:
    """One training while it runs: what learns, from what, how, where its files go and where it stands.

    `state` is what a checkpoint tells of it: phase (1 or 2), steps done in it, seconds spent in it, the loss of each
    step, the held-out results so far, and the digest of the backbone before phase 1.
    """

    def __init__(self, model, corpus: Corpus, recipe: Recipe, output: Path, saving: dict, copy, tracker):
        self.model, self.corpus, self.output, self.saving = model, corpus, output, saving
        self.checkpoints = output.with_name(output.name + "-checkpoints")
        self.accelerator = make_accelerator(recipe.shard_model, log_with=tracker, project_dir=output.parent)
        self.recipe = replace(recipe, processes=self.accelerator.num_processes)
        self.identity = identity_of(asdict(self.recipe), corpus.digest, model.config.to_dict())
        self.state = dict(phase=1, step=0, seconds=0.0, history=[], results=[], backbone=fingerprint(model))
        self.saved = None  # the checkpoint to go on from
        self.copies = copies(str(copy), self.checkpoints) if copy and self.accelerator.is_main_process else None
        self.tables = self.running = self.optimizer = self.share = self.lora = None
        self.saved_at = time.monotonic()
        self.accelerator.register_save_state_pre_hook(self.only_trained)

    def steps_before(self, phase: int) -> int:
        return self.recipe.steps[0] if phase == 2 else 0

    # ----- where it begins

    def find_start(self, resume: bool):
        """The last whole checkpoint if it is to be resumed; or a place that no training has begun in."""
        if self.accelerator.is_main_process:
            sweep(self.output.parent, re.escape(self.output.name) + "(?:-checkpoints)?")
            sweep(self.checkpoints, "fase-.*")
            if self.copies:
                self.copies.begin(self.output, resume)
        self.accelerator.wait_for_everyone()
        if not resume:
            if all_checkpoints(self.checkpoints):
                raise UserError(
                    f"En {self.checkpoints} hay un entrenamiento a medias. Para seguirlo añade --reanudar; para "
                    "empezar de nuevo borra esa carpeta o elige otra --salida."
                )
            return
        self.saved, found = last_checkpoint(self.checkpoints, self.output, self.identity, self.corpus.describe())
        own = self.state["backbone"]
        if (found.get("phase") == 1 or self.recipe.lora) and found.get("backbone", own) != own:
            raise UserError(
                f"El punto de control {self.saved} es de otro modelo de partida: los pesos de Phi no son los de "
                "entonces. Indica el mismo con --modelo, o elige otra --salida para empezar uno nuevo."
            )
        self.state |= found

    def load(self):
        """Weights, optimiser, loss scale and rows of the checkpoint to go on from."""
        try:
            if self.recipe.shard_model:
                load_parts(self.model, self.optimizer.optimizer, self.accelerator.scaler, self.saved)
            else:
                with self.scale_of(self.saved):
                    self.accelerator.load_state(str(self.saved), strict=False)
            self.tables.load(self.saved)
        except Exception as error:
            if isinstance(error, UserError) or not is_damage(error):
                raise
            raise UserError(
                f"El punto de control {self.saved} está dañado ({type(error).__name__}). Borra esa carpeta: "
                "--reanudar usa entonces el anterior, si lo hay (--conservar 2 guarda siempre dos)."
            ) from error

    @contextmanager
    def scale_of(self, checkpoint):
        """Meanwhile there is no loss scale where the checkpoint has none: it comes from a machine that needs none."""
        scaler = self.accelerator.scaler
        if not Path(checkpoint, SCALER_NAME).exists():
            self.accelerator.scaler = None
        try:
            yield
        finally:
            self.accelerator.scaler = scaler

    # ----- checkpoints

    def only_trained(self, models, weights, folder):
        """What does not learn is that of the model to begin with: no need to write gigabytes of it every time."""
        for dense in weights if not self.model.model.embed_tokens.weight.requires_grad else ():
            for name in [name for name in dense if of_phi(name)]:
                del dense[name]

    def write(self, folder):
        """What a checkpoint keeps, into the folder that the main process has opened: every process its part."""
        folder, failure = broadcast_object_list([folder and str(folder)])[0], None
        self.writing = True
        try:
            if folder is None:
                raise OSError(errno.ENOSPC, "the main process could not open the folder")
            if self.recipe.shard_model:
                save_parts(self.model, self.optimizer.optimizer, self.accelerator.scaler, folder)
            else:
                self.accelerator.save_state(folder)
            self.tables.save(folder)
        except Exception as error:
            failure = error
        device = self.accelerator.device
        full = in_any_process(failure is not None and no_space(failure), device)
        if in_any_process(failure is not None, device):  # what one could not write is of no use to the others
            words = "another process could not write its part"
            raise failure or (OSError(errno.ENOSPC, words) if full else RuntimeError(words))

    def save(self, stop: StopRequests, **position):
        """A checkpoint of now; all processes get to the end of it, or none does. Then a copy of it is begun."""
        now = dict(self.state, **position, identity=self.identity, data=self.corpus.describe())
        main, failure, self.writing = self.accelerator.is_main_process, None, False
        with stop.saving():
            try:
                if main:
                    checkpoint = write_checkpoint(self.checkpoints, now, self.write)
                else:
                    self.write(None)
            except Exception as error:
                failure = error
            if main and not self.writing:  # the others wait for the folder
                with suppress(Exception):
                    self.write(None)
            if in_any_process(failure is not None, self.accelerator.device):
                # Of a full disk the main process speaks alone: it knows which checkpoint is left.
                raise failure if failure and (main or not no_space(failure)) else SystemExit(1)
        self.saved_at = time.monotonic()
        if main:
            if self.copies:
                self.copies.wait()  # it may still read what is to go now
            prune(checkpoint, self.saving["keep"])
            if self.copies:
                self.copies.send(checkpoint)

    @contextmanager
    def copied_to_the_end(self):
        """Whatever ends the training, the copy that has begun is finished: if the machine goes, it is all there is."""
        try:
            yield
        except BaseException:
            if self.copies:
                self.copies.wait()
            raise

    # ----- a phase

    def measure(self, name: str, done: int, **speed):
        """Held-out loss after `done` steps of all phases, kept and told."""
        with self.accelerator.autocast():
            found = evaluate(self.running, self.corpus, self.recipe, self.accelerator.device)
        put_apart(self.model)
        self.state["results"].append(dict(name=name, **found, **speed))
        self.accelerator.print(result_line(self.state["results"][-1]))
        measured = zip(("pérdida", "perplejidad", "bits por byte"), ("loss", "perplexity", "bits_per_byte"))
        self.accelerator.log({f"texto apartado/{word}": found[key] for word, key in measured}, step=done)

    def begin(self, phase: int):
        """What learns in this phase, and its optimiser with no state yet."""
        recipe = self.recipe
        if phase == 2 and recipe.lora:
            self.lora = add_lora(self.model, recipe.lora)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(learns(name, phase, recipe.lora))
        self.tables.restart()
        self.optimizer = make_optimizer(
            self.model, recipe.backbone_rate, recipe.memory_rates[phase - 1], recipe.table_rates[phase - 1],
            recipe.weight_decay, recipe.optimizer, self.tables,
        )  # fmt: skip
        if in_parts(self.model.lm_head.weight):  # since phase 1
            self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        else:
            self.running, self.optimizer = prepare(self.accelerator, self.model, self.optimizer)

    def log_step(self, phase: int, step: int, loss: float, speed: float):
        recipe = self.recipe
        rates = dict(memoria=recipe.memory_rates[phase - 1], tablas=recipe.table_rates[phase - 1])
        rates |= dict(Phi=recipe.backbone_rate) if phase == 2 else {}
        values = {f"tasa/{word}": rate * rate_factor(step - 1, recipe.steps[phase - 1]) for word, rate in rates.items()}
        values |= {"entrenamiento/pérdida": loss, "entrenamiento/tokens por segundo": speed}
        for layer, (share, gate) in self.state["history"][-1]["memory"].items():
            values |= {f"memoria/aporte, capa {layer}": share, f"memoria/puerta, capa {layer}": gate}
        self.accelerator.log(values, step=self.steps_before(phase) + step)

    def run_phase(self, phase: int, stop: StopRequests):
        """Phase 1 or 2 from where it stands to its end.

        Raises:
            KeyboardInterrupt: one of the processes was asked to stop; after saving.
        """
        steps, first, before, recipe = self.recipe.steps[phase - 1], 0, 0.0, self.recipe
        self.begin(phase)
        if self.saved and phase == self.state["phase"]:
            self.load()
            first, before = self.state["step"], self.state["seconds"]
            self.accelerator.print(f"Sigo desde la fase {phase}, paso {first} de {steps}.")
        elif phase == 2:
            self.save(stop, phase=2, step=0, seconds=0.0)  # phase 1 is not lost to an interruption from here on
        if not self.state["results"]:
            with stop.nothing_to_save():
                self.measure("antes de entrenar", 0)

        def on_step(step, loss, spent):
            share = {layer: [round(value, 6) for value in pair] for layer, pair in self.share.items()}
            self.state["history"].append(dict(phase=phase, step=step, loss=round(loss, 5), memory=share))
            self.log_step(phase, step, loss, recipe.tokens_per_step * (step - first) / spent)
            late = time.monotonic() - self.saved_at > 60 * self.saving["minutes"]
            wish = highest(2 * bool(stop) or late, self.accelerator.device)  # all stop or save, or none
            # At the very end too: what comes next, saving the result, may find the disk full.
            last = step == steps and (phase == 2 or not recipe.steps[1])
            if wish == 2 or last or (step < steps and (wish or step % self.saving["steps"] == 0)):
                self.save(stop, phase=phase, step=step, seconds=before + spent)
            if wish == 2:
                raise KeyboardInterrupt

        seconds = before + run_steps(
            self.accelerator, self.running, self.optimizer, self.corpus, recipe, steps=steps, label=f"Fase {phase}",
            first=first, offset=self.steps_before(phase), on_step=on_step, share=self.share,
        )  # fmt: skip
        frozen, speed = phase == 1 or recipe.lora > 0, recipe.tokens_per_step * steps / seconds
        done, at_end = self.steps_before(phase) + steps, phase == 2 or not recipe.steps[1]
        with stop.nothing_to_save(at_end):  # the last step is in a checkpoint
            name = f"tras la fase {phase} ({what_learns(phase, recipe.lora)})"
            self.measure(name, done, tokens_per_second=speed, seconds=seconds)
            if frozen:
                if fingerprint(self.model) != self.state["backbone"]:
                    raise RuntimeError(f"phase {phase} changed the backbone")
                what = "solo ha aprendido la memoria" if phase == 1 else "han aprendido la memoria y el adaptador LoRA"
                self.accelerator.print(f"✅ Phi no ha cambiado ni un bit: en la fase {phase} {what}.")
            if at_end:
                self.measure_memory()
        self.tell_exchange(max(1, steps - first))
        self.accelerator.unwrap_model(self.running, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def measure_memory(self):
        """Of the last held-out loss, how much is in what the memory remembers."""
        losses = [self.state["results"][-1]["loss"]]
        for changed in (memory_off, shuffled_rows):
            with self.accelerator.autocast(), changed(self.model):
                losses.append(evaluate(self.running, self.corpus, self.recipe, self.accelerator.device)["loss"])
        put_apart(self.model)
        self.state["memory"] = dict(zip(("on", "off", "shuffled"), losses))
        self.accelerator.print(memory_line(self.state["memory"]))

    def tell_exchange(self, steps: int):
        """What a process sent per step since this was last told."""
        if self.accelerator.num_processes > 1:
            pairs, dense = self.tables.sent / steps / 1e6, self.tables.n_bytes / 1e6
            self.accelerator.print(
                f"   Por paso, este proceso ha mandado {spanish(pairs, 2)} MB de pares (fila, gradiente); el gradiente "
                f"denso de las tablas son {spanish(dense, 2)} MB."
            )
            self.tables.sent = 0


def train_model(
    model, tokenizer, corpus: Corpus, recipe: Recipe, output, *, resume=False, save_every=200, save_minutes=10.0,
    keep=1, copy=None, tracker: str | None = None, repo: str | None = None, control: dict | None = None,
) -> dict:  # fmt: skip
    """Run phase 1 (memory alone) and phase 2 (everything) and leave `output` ready to share.

    Args:
        model: PhiEngramForCausalLM in float32; trained in place.
        output: folder to write when all is done; checkpoints go to `<output>-checkpoints` meanwhile.
        resume: go on from the last whole checkpoint.
        save_every: steps between checkpoints, or `save_minutes`, whatever comes first; `keep`: how many of them stay.
        copy: a folder that outlives this machine, or "hub:user/name"; it gets each checkpoint in the background, and at
            the end the result.
        tracker: one of TRACKERS, which gets losses, rates, speed and held-out results.
        repo: user/name under which the card says that the model is found.
        control: held-out result of a twin that was trained without memory, which card and picture then show.
    Returns:
        {"results": [{"name", "loss", "perplexity", "bits_per_byte", "tokens_per_second", "seconds"}, ...],
        "history": [{"phase", "step", "loss", "memory": {layer: [‖Y‖/‖h‖, mean gate]}}, ...], "memory": {"on", "off",
        "shuffled"}, held-out losses at the end, "control", "lora": its PeftModel, merged by now, or None}; results are
        measured before phase 1 and after each phase.
    Raises:
        UserError: nothing to resume, a checkpoint of another corpus, recipe or shape, or one in the way.
        KeyboardInterrupt: on Ctrl-C or kill, after saving a checkpoint.
    """
    output = Path(output)
    saving = dict(steps=save_every, minutes=save_minutes, keep=keep)
    training = Training(model, corpus, recipe, output, saving, copy, tracker)
    accelerator, recipe, state = training.accelerator, training.recipe, training.state
    if model.facts:
        accelerator.print(FACTS_GONE.format(len(model.facts), "el entrenamiento cambia la memoria"))
        model.set_facts([])
    training.find_start(resume)
    set_seed(recipe.seed)
    done = training.steps_before(state["phase"]) + state["step"]
    start_tracker(accelerator, tracker, f"{output.name}-registro", training.identity, done)
    if recipe.recompute:
        recompute_activations(model)
    tables = TrainedTables(model, recipe.row_state, recipe.processes, recipe.shard_rows, accelerator.device)
    with training.copied_to_the_end(), stop_requests() as stop, tables, memory_share(model) as training.share:
        training.tables = tables
        model.to(accelerator.device)
        for phase in (1, 2):
            if recipe.steps[phase - 1] and phase >= state["phase"]:
                training.run_phase(phase, stop)
    if recipe.shard_model:
        gather(model, accelerator.is_main_process)
    outcome = dict(
        results=state["results"], history=state["history"], memory=state["memory"], recipe=recipe, corpus=corpus,
        control=control, lora=training.lora,
    )  # fmt: skip
    for open_tracker in accelerator.trackers:
        open_tracker.finish()
    if accelerator.is_main_process:
        try:
            if output.exists() and not (output / LOG).exists():  # not this training's, half discarded
                raise UserError(f"{output}/ no estaba al empezar y no la voy a pisar: cámbiale el nombre.")
            with training.copied_to_the_end():
                save_trained(model, tokenizer, outcome, output, repo)
            if training.copies:
                training.copies.finish(output)
        except UserError as error:
            raise UserError(
                f"{error} Lo entrenado está en {training.checkpoints}: repite después con --reanudar."
            ) from error
        discard(training.checkpoints)
    accelerator.wait_for_everyone()
    return outcome
