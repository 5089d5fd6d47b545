"""The training step: forward, backward, optimizer, schedule and averaged weights."""

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoints
from .errors import UserError
from .loaders import Loaders, is_mixed
from .model import make_optimizer
from .precision import Precision
from .processes import Processes
from .samples import UnreadableFiles
from .seeds import derived_seed, seed_all


class Clock:
    """Seconds that the parts of training steps took: on a GPU as it worked, which is not waited for but to be told."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(("data", "forward", "backward", "step"), 0.0)
        self.passed: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """Begins a part."""
        self.last = self._now()

    def lap(self, part: str) -> None:
        """Ends a part and begins the next one."""
        now = self._now()
        if self.device.type == "cuda":
            self.passed.append((part, self.last, now))
        else:
            self.seconds[part] += now - self.last
        self.last = now

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __str__(self) -> str:
        for part, first, last in self.passed:
            last.synchronize()
            self.seconds[part] += first.elapsed_time(last) / 1000
        self.passed.clear()
        return " ".join(f"{part} {seconds:.1f}s" for part, seconds in self.seconds.items())


class Trainer:
    """Takes the steps of a run.

    Args:
        model: Model on its device.
        args: The run's arguments.
        processes: Those of the run.
        precision: What the model computes in.
        loaders: Where the batches of a step come from.
        classes: Number of classes.

    Raises:
        UserError: If there is no such optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        args: argparse.Namespace,
        processes: Processes,
        precision: Precision,
        loaders: Loaders,
        classes: int,
    ) -> None:
        self.model, self.args, self.processes, self.precision = model, args, processes, precision
        self.accumulation = loaders.accumulation
        self.optimizer = make_optimizer(model, args)
        of_one_layer = argparse.Namespace(**{**vars(args), "layer_decay": None})
        try:
            checkpoints.check_resumable(lambda module: make_optimizer(module, of_one_layer))
        except ValueError as error:
            raise UserError(f"--opt {args.opt}: {error}") from error
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            step_on_epochs=False,
            updates_per_epoch=loaders.steps,
        )
        self.scaler = precision.scaler()
        self.ema: Optional[ModelEmaV3] = None
        if args.model_ema_decay:
            self.ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True)
        self._make_loss(classes)
        self._wrap_model()

    def _make_loss(self, classes: int) -> None:
        args = self.args
        smoothing = 0.0 if args.no_aug else args.smoothing
        self.mixup: Optional[Mixup] = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(smoothing)
        if is_mixed(args):
            options = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "label_smoothing": smoothing}
            self.mixup, self.loss = Mixup(num_classes=classes, **options), SoftTargetCrossEntropy()

    def _wrap_model(self) -> None:
        """Sets what is called in training: the model, over all processes and compiled if the run asks for it."""
        self.distributed: Optional[DistributedDataParallel] = None
        called: nn.Module = self.model
        if self.processes.count > 1:
            devices = [self.processes.device] if self.processes.device.type == "cuda" else None
            called = self.distributed = DistributedDataParallel(self.model, device_ids=devices)
        self.called: Any = called
        if self.args.torchcompile:
            self.called = torch.compile(called, mode=self.args.torchcompile_mode)

    def take_step(self, batches: Iterator, step: int, clock: Clock, unreadable: UnreadableFiles) -> Tensor:
        """Takes a step of the optimizer. Waits for no GPU.

        Args:
            batches: Batches of inputs, classes and names of unreadable files.
            step: Number of the step in the run.
            clock: Takes the time of the parts.
            unreadable: Takes the names.

        Returns:
            The loss over this process's inputs, still to be read.
        """
        self.called.train()
        for name in self.args.freeze:
            self.model.get_submodule(name).eval()
        losses = []
        for i in range(self.accumulation):
            clock.start()
            batch, targets, *names = next(batches)
            unreadable.note(names)
            seed_all(derived_seed(self.args.seed, step, i, self.processes.rank))  # of mixup, dropout and drop path
            inputs: Sequence = self.precision.inputs(batch)
            targets = targets.to(self.processes.device, non_blocking=True)
            if self.mixup is not None:
                images, targets = self.mixup(inputs[0], targets)
                inputs = (images,)
            clock.lap("data")
            losses.append(self._backward(inputs, targets, clock, is_last=i == self.accumulation - 1))
        self._update(step)
        clock.lap("step")
        return torch.stack(losses).double().sum()

    def _backward(self, inputs: Sequence, targets: Tensor, clock: Clock, is_last: bool) -> Tensor:
        """Adds the gradients of a batch, which the last one of a step sums over all processes; returns its loss."""
        waiting: Any = contextlib.nullcontext()
        if self.distributed is not None and not is_last:
            waiting = self.distributed.no_sync()
        with waiting:
            with self.precision.autocast():
                loss = self.loss(self.called(*inputs), targets) / self.accumulation
            clock.lap("forward")
            self.scaler.scale(loss).backward()
            clock.lap("backward")
        return loss.detach()

    def _update(self, step: int) -> None:
        """Changes the weights by their gradients, the learning rate, and the averaged weights."""
        if self.args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step_update(step + 1)
        if self.ema is not None:
            self.ema.update(self.model, step=step + 1)

    @property
    def rate(self) -> float:
        """Learning rate of a parameter whose rate is not scaled."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group["lr_scale"]

    def models(self) -> dict[str, nn.Module]:
        """Returns what is to be evaluated after an epoch, by the prefix of its columns: the model, the averaged one.

        In all processes with the running statistics of the first one, which are those that it saves.
        """
        models = {"": self.model}
        if self.ema is not None:
            models["ema_"] = self.ema.module
        if self.processes.count > 1:
            for model in models.values():
                distribute_bn(model, world_size=self.processes.count)
        return models

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns all that later steps depend on: tensors by name, and what JSON can hold."""
        parts = {"model": self.model.state_dict()}
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        parts["optimizer"], rest = checkpoints.flatten_optimizer(self.optimizer)
        tensors = {f"{part}.{name}": value for part, own in parts.items() for name, value in own.items()}
        return tensors, {"scaler": self.scaler.state_dict(), "optimizer": rest}

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = value
        self.model.load_state_dict(parts["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])
        checkpoints.restore_optimizer(self.optimizer, parts["optimizer"], state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
