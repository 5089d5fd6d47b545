"""A run: epochs of steps, evaluation and checkpoints, to the end or until a signal."""

import argparse
import dataclasses
import logging
import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from typing import Any, Optional

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoints
from .arguments import to_plain
from .datasets import Data
from .errors import UserError
from .evaluation import evaluate
from .loaders import Loaders
from .model import learning_rate
from .output import Summary, check_output, check_same
from .precision import Precision
from .processes import Processes
from .samples import UnreadableFiles
from .seeds import seed_all
from .trainer import Clock, Trainer

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps taken.
        losses: Those of the steps of this epoch.
        best: Highest top-1 accuracy so far, %.
        rows: The summary's line of each finished epoch.
    """

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    best: float = -math.inf
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Run(ABC):
    """A model in training, with all that a checkpoint holds.

    Which model, and which data, is what `images.ImageRun` and `sequences.SequenceRun` say.

    Args:
        args: The run's arguments.
        processes: This process among those of the run.
        stop: Ends training after the step that is being taken, once it is set.

    Raises:
        UserError: If the arguments ask for what cannot be done.
    """

    things = "samples"  # what the data are, in words

    def __init__(self, args: argparse.Namespace, processes: Processes, stop: Optional[threading.Event] = None) -> None:
        self.args, self.processes, self.stop = args, processes, stop or threading.Event()
        data = self.open_data()
        check_output(args)
        seed_all(args.seed)
        self.precision = Precision.of(args, processes.device)
        self.model: Any = self.precision.model(self.make_model(data))
        self.loaders = self.make_loaders(data)
        self.trainer = Trainer(self.model, args, processes, self.precision, self.loaders, data.classes)
        self.unreadable = UnreadableFiles(args.max_unreadable)
        self.progress = Progress()
        self.unread: list[Tensor] = []  # losses of the last steps
        self.counts = (len(data.train), len(data.validation))
        self.summary: Optional[Summary] = None  # of the first process, once it trains
        self.stopped = False  # of all processes

    @abstractmethod
    def open_data(self) -> Data:
        """Returns the data, after checking the arguments that have to do with it and settling those that follow it."""

    @abstractmethod
    def make_model(self, data: Data) -> nn.Module:
        """Returns the model."""

    @abstractmethod
    def make_loaders(self, data: Data) -> Loaders:
        """Returns the loaders of both splits."""

    @abstractmethod
    def describe(self) -> str:
        """Returns what is about to be done, in a few lines."""

    def describe_steps(self) -> str:
        """Returns the line of it that tells of the steps."""
        args, loaders, count = self.args, self.loaders, self.processes.count
        share = args.global_batch // count
        return (
            f"{loaders.steps} steps an epoch of {args.global_batch} {self.things} (processes: {count}, batches of "
            f"each: {loaders.accumulation} of {share // loaders.accumulation}), on {self.processes.device}, at a "
            f"learning rate of up to {learning_rate(args):.2g}"
        )

    def save(self) -> None:
        """Writes a checkpoint, on which all the rest of the run depends and on nothing else: seeds follow from it.

        Raises:
            UserError: If there is something in it that is not finite. The checkpoints before it stay.
        """
        if self.processes.rank != 0:
            return
        tensors, state = self.trainer.state()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                good = checkpoints.describe_last_good(self.args.output, self.progress.step)
                raise UserError(f"{name} is not finite after step {self.progress.step}; {good}")
        state |= {**dataclasses.asdict(self.progress), "unreadable": self.unreadable.names}
        checkpoints.write_last(self.args.output, tensors, {**state, "arguments": to_plain(self.args)})

    def restore(self) -> bool:
        """Takes over the newest complete checkpoint; returns whether there is one.

        Raises:
            UserError: If there are checkpoints and none is complete, or they are of a run with other arguments.
        """
        try:
            found = checkpoints.read_newest(self.args.output)
        except ValueError as error:
            raise UserError(str(error)) from error
        if found is None:
            return False
        tensors, state = found
        check_same(self.args, state["arguments"])
        self.trainer.load_state(tensors, state)
        self.progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        self.unreadable.names = state["unreadable"] if self.processes.rank == 0 else []
        return True

    def train(self) -> None:
        """Trains to the last epoch, or until a stop is requested; `stopped` then says so.

        Raises:
            UserError: If a loss is not finite, or too many images can't be read.
            OSError: If a file can't be written.
        """
        progress, steps = self.progress, self.loaders.steps
        if self.processes.rank == 0:
            self.summary = Summary(self.args.output, epoch=len(progress.rows))
            if progress.rows:  # the file may have been damaged; the checkpoint has all of them
                self.summary.write_table(progress.rows)
        while len(progress.rows) < self.args.epochs:
            epoch = len(progress.rows)
            first = progress.step - epoch * steps
            start = time.monotonic()
            if first < steps:
                self._train_epoch(epoch, first)
            if self.stopped:
                return
            self._finish_epoch(epoch)
            seconds, left = time.monotonic() - start, self.args.epochs - epoch - 1
            if first == 0 and left:  # a whole one
                _logger.info(
                    f"epoch {epoch} took {in_words(seconds)}, {left} are left: about {in_words(left * seconds)}"
                )

    def _train_epoch(self, epoch: int, first: int) -> None:
        """Trains an epoch from a step on, to its end or until a stop is requested."""
        progress, args, steps = self.progress, self.args, self.loaders.steps
        if first and self.loaders.is_stream:
            _logger.info(f"epoch {epoch}: a stream can't be resumed in mid-epoch, the epoch starts again")
            progress.step, progress.losses, first = epoch * steps, [], 0
        batches = self.loaders.epoch(epoch, first)
        clock = Clock(self.processes.device)
        hidden = self.processes.rank != 0 or not sys.stderr.isatty()
        for number in tqdm(range(first, steps), desc=f"epoch {epoch}", leave=False, disable=hidden):
            self.unread.append(self.trainer.take_step(batches, progress.step, clock, self.unreadable))
            self.unreadable.check(self.processes)
            progress.step += 1
            ended = number == steps - 1
            if ended or (number + 1) % args.log_interval == 0:
                self._read_losses()
                self._log_step(epoch, number, clock)
            (requests,) = self.processes.total(float(self.stop.is_set()))
            self.stopped = requests > 0
            if ended or self.stopped or progress.step % args.checkpoint_interval == 0:
                self._read_losses()
                self.save()
            if self.stopped:
                return

    def _read_losses(self) -> None:
        """Adds the last steps' losses, over the global batch, to those of the epoch.

        Raises:
            UserError: If one is not finite.
        """
        if not self.unread:
            return
        first = self.progress.step - len(self.unread)
        losses = self.processes.total(*(torch.stack(self.unread) / self.processes.count).tolist())
        self.unread = []
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                good = checkpoints.describe_last_good(self.args.output, step)
                raise UserError(f"the loss of step {step} is {loss}; {good}")
        self.progress.losses += losses

    def _log_step(self, epoch: int, number: int, clock: Clock) -> None:
        recent = self.progress.losses[-self.args.log_interval :]
        loss = sum(recent) / len(recent)
        rate = self.trainer.rate
        _logger.info(f"epoch {epoch} step {number + 1}/{self.loaders.steps} loss {loss:.4f} lr {rate:.2e} {clock}")

    def _finish_epoch(self, epoch: int) -> None:
        """Evaluates the model and the averaged one, and saves the better one of them if it is the best so far."""
        progress, losses = self.progress, self.progress.losses
        row = {"epoch": epoch, "lr": self.trainer.rate, "train_loss": sum(losses) / len(losses)}
        best, best_model = -math.inf, self.model
        for prefix, model in self.trainer.models().items():
            row |= {f"{prefix}{name}": value for name, value in self.evaluate(model).items()}
            if not math.isfinite(row[f"{prefix}loss"]):
                good = checkpoints.describe_last_good(self.args.output, progress.step)
                raise UserError(f"the loss of evaluation is {row[f'{prefix}loss']} after epoch {epoch}; {good}")
            if row[f"{prefix}top1"] >= best:
                best, best_model = row[f"{prefix}top1"], model
        progress.losses, self.unreadable.names = [], []
        progress.rows.append(row)
        is_best = best > progress.best
        progress.best = max(best, progress.best)
        _logger.info(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
        if self.summary is not None:
            if is_best:
                checkpoints.write(self.args.output / checkpoints.BEST, best_model.state_dict(), row)
            self.summary.write(progress.rows)  # before the checkpoint: no epoch of a checkpoint may be missing here
            self.save()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns loss and accuracies in % of a model over all validation data."""
        return evaluate(model, self.loaders.validation, self.precision, self.processes, self.unreadable)


def in_words(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
