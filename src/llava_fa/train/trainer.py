"""transformers' `Trainer` for recovery: our loss, our optimiser groups, and checkpoints of what is trained alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import get_last_checkpoint

from llava_fa.errors import FourierError
from llava_fa.hub.shards import Item, file_metadata, read_header, write_file
from llava_fa.train.data import ROWS_LEFT_OUT
from llava_fa.train.loss import LossFunction
from llava_fa.train.parts import groups
from llava_fa.train.settings import TrainingSettings

TRAINED = "trained.safetensors"
"""File of a checkpoint that holds every parameter that is trained, float32, by name."""


class RecoveryTrainer(Trainer):
    """Trains what ``requires_grad`` says, with any loss of the form of `train.loss.LossFunction`.

    Args:
        model: to be trained; parameters chosen (`train.parts.choose`).
        loss: called as loss(model, inputs) → terms.
        dataset, collator: of the samples.
        settings: the run's.
        folder: where checkpoints and logs go.
        identity: of the model that is trained; a checkpoint with another one is refused.
        report: called with every log entry.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        dataset: Any,
        collator: Any,
        settings: TrainingSettings,
        folder: Path,
        *,
        identity: str = "",
        report: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        self.loss_function, self.settings, self.identity = loss, settings, identity
        self.rows_left_out: set[int] = set()
        self.history: list[dict[str, float]] = []
        self._terms: dict[str, Tensor] = {}
        self._count = 0
        super().__init__(
            model=model,
            args=arguments(settings, folder),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[_Report(self, report)],
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = False  # a mean over the batch
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW without decay over `train.parts.groups`."""
        if self.optimizer is None:
            parameters = groups(self.model if model is None else model, self.settings.rate)
            self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Our loss; its terms are noted for the log.

        Raises:
            FourierError: it is not finite; the last checkpoint stays as it is.
        """
        self.rows_left_out.update(inputs.pop(ROWS_LEFT_OUT, ()))
        terms = self.loss_function(model, inputs)
        loss = terms["loss"]
        if not _everywhere(bool(torch.isfinite(loss.detach())), loss.device):
            bad = ", ".join(name for name, term in terms.items() if not torch.isfinite(term).all())
            raise self.not_finite(f"loss ({bad or 'on another process'})")
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0) + term.detach()
        self._count += 1
        return loss

    def not_finite(self, what: str) -> FourierError:
        """The error that ends a run, with the last checkpoint in it."""
        step = self.state.global_step
        checkpoint = self.last_checkpoint()
        last = f"the last good state is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        return FourierError(
            f"not finite at step {step + 1}: the {what}; {last}",
            remedy="Lower --lr and give --fresh, or mend the samples of this step and run the same command again",
        )

    def last_checkpoint(self) -> str | None:
        """Folder of the newest checkpoint, None before there is one."""
        folder = self.args.output_dir
        return get_last_checkpoint(folder) if Path(folder).is_dir() else None

    def take_terms(self) -> dict[str, float]:
        """Means of the loss's terms since the last call."""
        means = {name: float(term) / self._count for name, term in self._terms.items()}
        self._terms, self._count = {}, 0
        return means

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what is trained: the rest is in the model that was given."""
        folder = Path(output_dir or self.args.output_dir)
        tensors = trained_tensors(self.accelerator.unwrap_model(self.model))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            items = [Item.of(name, tensor) for name, tensor in tensors.items()]
            write_file(folder / TRAINED, items, {"model": self.identity})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        load_trained(model, Path(resume_from_checkpoint), self.identity)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing of what is not trained is in a checkpoint."""


def _name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "").removeprefix("module.")


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that is trained, whole, on the CPU. Where parameters are sharded all processes must call it."""
    tensors = {}
    for name, value in _own(model).items():
        value = value.detach()
        tensors[name] = (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous()
    return tensors


def _own(model: nn.Module) -> dict[str, Tensor]:
    return {_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path, identity: str) -> None:
    """Take a checkpoint's parameters into a model.

    Raises:
        FourierError: there is none, or it belongs to another model.
    """
    path = folder / TRAINED
    if not path.is_file():
        raise FourierError("it is no checkpoint of a training run", remedy="Give --fresh", where=str(folder))
    entries = read_header(path)[0]
    own = _own(model)
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if file_metadata(path).get("model") != identity or {n: e.shape for n, e in entries.items()} != shapes:
        raise FourierError(
            "this checkpoint is of another model", remedy="Give --fresh to start over, or another OUT", where=str(path)
        )
    for name, mine in own.items():
        value = entries[name].read()
        if isinstance(mine, DTensor):
            value = distribute_tensor(value.to(mine.device), mine.device_mesh, mine.placements)
        mine.copy_(value)


def arguments(settings: TrainingSettings, folder: Path) -> TrainingArguments:
    """The settings in the words of transformers."""
    fsdp: dict[str, Any] = {}
    if settings.fsdp:
        config = {"fsdp_version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT",
                  "cpu_ram_efficient_loading": False}  # fmt: skip
        fsdp = {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    cpu = settings.device == "cpu" or not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        max_grad_norm=1.0,
        bf16=bool(settings.bf16),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,
        use_cpu=cpu,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        disable_tqdm=True,
        **fsdp,
        **(_checkpointing() if settings.checkpointing else {}),
    )


def _checkpointing() -> dict[str, Any]:
    """Gradient checkpointing under the name that the installed transformers has for it."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _everywhere(fine: bool, device: torch.device) -> bool:
    """Whether it holds in all processes: they stop together, since one that waits for another waits forever."""
    if not dist.is_initialized():
        return fine
    flag = torch.tensor(float(fine), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


class _Report(TrainerCallback):
    """Hands log entries on, with the loss's terms in them; lets no gradient pass that is not finite."""

    def __init__(self, trainer: RecoveryTrainer, report: Callable[[dict[str, Any]], None]) -> None:
        self.trainer, self.report = trainer, report

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before parameters, and so the next checkpoint, are spoilt."""
        gradients = [parameter.grad for parameter in self.trainer.model.parameters() if parameter.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        fine = all(bool(torch.isfinite(gradient).all()) for gradient in local)
        device = local[-1].device if local else torch.device("cpu")
        if not _everywhere(fine, device):
            raise self.trainer.not_finite("gradient")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One entry: step, terms, rate."""
        if logs is None or "loss" not in logs:
            return
        logs.update(self.trainer.take_terms())
        row = {"step": state.global_step, "of": state.max_steps, **logs}
        if state.is_world_process_zero:
            self.trainer.history.append(row)
            self.report(row)
