"""transformers' `Trainer` and those built on it, with rows that cost and change only where they are read.

    class Entrenador(SparseRows, Trainer): pass          # or TRL's SFTTrainer

Left to themselves they give the whole table to AdamW: a step costs by its size, and weight decay shrinks rows that no
text has read.
"""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

from pathlib import Path

from torch import nn

from engram.optimizers import EngramOptimizer
from engram.rows import TrainedTables
from engram.steps import PHI_1_RECIPE


class SparseRows:
    """Goes before a Trainer in the list of base classes. Checkpoints, resuming and the best model are the Trainer's.

    The memory learns at rates of its own, `memory_rate` its dense weights and `row_rate` its rows, which may be set on
    the class or the instance before `train`: at a rate that suits a pretrained model it learns nothing. `learning_rate`
    is that of all else. The schedule is the Trainer's; so is clipping, of dense gradients and rows' together. Nothing
    of the memory decays.
    Where the rows do not require a gradient (beside LoRA, say) they stay as they are.

    Raises (from `train`):
        ValueError: rows that are not float32, that another package wraps, or a model that is divided between cards; a
            checkpoint of which a Trainer would not read the rows, or from when the memory had no rate of its own.
    """

    memory_rate: float = PHI_1_RECIPE.memory_rates[1]
    row_rate: float = PHI_1_RECIPE.table_rates[1]
    _rows: TrainedTables | None = None

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._rows is not None:
                self._rows.release()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_whole(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        check_whole(self.state.best_model_checkpoint)
        super()._load_best_model()

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "engram" not in name]

    def create_optimizer(self, model=None):
        def has_tables(module):
            return "engram_tables" in dict(getattr(module, "model", module).named_children())

        inner = next(filter(has_tables, self.model.modules()))  # what LoRA wraps, perhaps
        if not any(p.requires_grad for table in inner.model.engram_tables.values() for p in table.parameters()):
            return super().create_optimizer(model)
        if self.optimizer is not None:
            if self._rows is None:
                raise ValueError(
                    "SparseRows pone su propio optimizador para las filas: en vez de optimizers=(…), elige el de lo "
                    "demás con optim=… en los argumentos, o con optimizer_cls_and_kwargs=(clase, opciones)."
                )
            self._rows.take()  # trained again
            return self.optimizer
        self._check(inner.model.engram_tables.values())
        args = self.args
        betas = args.adam_beta1, args.adam_beta2
        self._rows = SeenTables(inner, world=args.world_size, device=args.device, betas=betas, eps=args.adam_epsilon)
        self._rows.take()  # now, because a parameter that requires a gradient would go to the dense optimiser
        dense = super().create_optimizer(model)
        set_apart(dense, {p for name, p in inner.named_parameters() if "engram" in name}, self.memory_rate)
        self.optimizer = RowOptimizer(dense, self._rows, self.row_rate)
        return self.optimizer

    def _check(self, tables):
        if any(hasattr(table, "modules_to_save") for table in tables):
            raise ValueError(
                "peft ha hecho una copia de las tablas: quita engram_tables de modules_to_save, o no uses SparseRows."
            )
        kinds = {str(table.dtype).removeprefix("torch.") for table in tables}
        if kinds != {"float32"}:
            raise ValueError(
                f"Las filas están en {', '.join(sorted(kinds))} y se entrenan en float32: abre el modelo con "
                'dtype="float32" y engram_storage="ram". La media precisión se pide con bf16=True o fp16=True.'
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1:
            raise ValueError(
                "SparseRows no admite FSDP, DeepSpeed ni varias tarjetas en un solo proceso. Usa una tarjeta "
                "(CUDA_VISIBLE_DEVICES=0), un proceso por tarjeta (accelerate launch --multi_gpu) o "
                "train_phi_engram.py --repartir-modelo."
            )

    def training_step(self, *args, **kwargs):
        if self._rows is not None:
            self._rows.hide()
        loss = super().training_step(*args, **kwargs)
        if self._rows is not None and self.accelerator.sync_gradients:
            self._inner_optimizer().collect()
            self._rows.show()
        return loss

    def _inner_optimizer(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it


def set_apart(optimizer, parameters: set, rate: float):
    """Give those `parameters` that an optimiser has a group of their own, with this rate, for each that they are in."""
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if p in parameters]
        if own:
            group["params"] = [p for p in group["params"] if p not in parameters]
            optimizer.add_param_group({**group, "params": own, "lr": rate})


def check_whole(folder):
    """Raise ValueError where a lone model.safetensors has no rows: a Trainer takes it for the whole model."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists() and next(folder.glob("model*-engram-*.safetensors"), None):
        raise ValueError(
            f"«{folder}» es de una versión anterior, y Trainer leería sus pesos sin las filas de la memoria. Guárdalo "
            f'antes como ahora: PhiEngramForCausalLM.from_pretrained("{folder}").save_pretrained("{folder}")'
        )


class SeenTables(TrainedTables):
    """Tables whose rows a Trainer goes on seeing as a parameter, that of the model: it saves and loads them."""

    def take(self):
        for part in self.parts.values():
            part.weight = part.table.weight.detach() if part.table.weight is not None else part.weight
            part.table.weight = nn.Parameter(part.weight, requires_grad=False)
            part.table.read = part.read

    def release(self):
        self.hide()
        for part in self.parts.values():
            if part.table.read is not None:
                part.reads = []
                part.release()

    def show(self):
        """The rows of this step among the model's parameters, so that a gradient's norm counts them."""
        for name, (_, rows) in self.pairs.items():
            self.parts[name].table.rows_of_this_step = rows

    def hide(self):
        for part in self.parts.values():
            if hasattr(part.table, "rows_of_this_step"):
                del part.table.rows_of_this_step


class RowOptimizer(EngramOptimizer):
    """With the rows' state beside that of the rest: a Trainer keeps one file for all of it."""

    def step(self, closure=None):
        super().step(closure)
        for part in self.tables.parts.values():
            part.wait()  # whoever saves now reads the rows
        self.tables.hide()

    def state_dict(self):
        parts = {name: part.tensors() for name, part in self.tables.parts.items() if part.steps}
        rows = {name: {key: value for key, value in state.items() if key != "weight"} for name, state in parts.items()}
        return {**super().state_dict(), "lr": self.rows["lr"], "rows": rows}

    def load_state_dict(self, state):
        if len(state["parts"][0]["param_groups"]) < len(self.dense.param_groups):
            raise ValueError(
                "Este punto de control es de una versión anterior, en la que la memoria no tenía tasa propia: entrena "
                "sin resume_from_checkpoint, desde el modelo que hay en él (PhiEngramForCausalLM.from_pretrained)."
            )
        super().load_state_dict(state)
        self.rows["lr"] = state["lr"]
        for name, part in self.tables.parts.items():
            if name in state["rows"]:
                part.load(dict(state["rows"][name], weight=part.weight).__getitem__)
            else:
                part.restart()
