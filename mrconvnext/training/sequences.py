"""A run on sequences: its arguments, its data in batches, its model."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from mrconvnext.options import BranchOptions
from mrconvnext.sequence import MRConvSequence
from mrconvnext.sequence_block import NORMS
from mrconvnext.tasks.datasets import TASKS, DataError, collate, open_task

from .arguments import (
    OF_CALL,
    KeyValue,
    Parser,
    add_optimization_arguments,
    add_run_arguments,
    arguments_of,
    folder,
    fraction,
    natural,
    positive,
    with_those_of_run,
)
from .datasets import Data
from .errors import UserError
from .loaders import EvalBatches, Loaders, TrainBatches, loader_options, split_batch
from .lstm import LSTMSequence
from .presets import METHODS, WARM_UP, preset
from .processes import Processes
from .run import Run

# Sequences of a batch that is evaluated, unless the arguments say how many.
EVALUATED_AT_ONCE = 64

# Arguments of training that images have and sequences have not.
OF_IMAGES: dict[str, Any] = {"no_lr_scaling": True, "no_aug": True, "mixup": 0.0, "cutmix": 0.0}
OF_IMAGES |= {"freeze": [], "max_unreadable": 0, "channels_last": False}

# What --options may name: the rest of the layers' options have arguments of their own.
OPTIONS = tuple(field.name for field in fields(BranchOptions) if field.name not in ("kernel", "bidirectional"))


def parse_args(argv: Optional[list[str]] = None, description: Optional[str] = None) -> argparse.Namespace:
    """Returns the arguments of a run; those that nobody gave are those of the task's preset, see `presets`.

    Args:
        argv: Words of the command line, those of this program if None.
        description: What ``--help`` begins with.

    Raises:
        SystemExit: If the command line is invalid, after printing why.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser)
    add_model_arguments(parser)
    add_optimization_arguments(parser)
    add_run_arguments(parser)
    task, method = named_task(argv)
    source, own = preset(task, method) if task in TASKS and method in METHODS else ("", {"options": {}})
    parser.set_defaults(model_ema_decay=0.0, source=source, **own)
    args, of_run = with_those_of_run(parser, argv)
    if (args.resume or args.evaluate) and not of_run and args.data_dir is None:
        parser.error(f"--output {args.output} does not hold a run")
    for name in ("task", "data_dir"):
        if getattr(args, name) is None:
            parser.error(f"the following arguments are required: --{name.replace('_', '-')}")
    if TASKS[args.task].length < max(args.rate, args.test_rate or 1):
        parser.error(f"--rate and --test-rate must be at most the {TASKS[args.task].length} positions of the task")
    if args.keep_kernels and (args.test_rate or args.rate) < args.rate:
        parser.error(
            f"--keep-kernels: sequences at --test-rate {args.test_rate} are longer than the kernels are made for"
        )
    if "min_length" in own["options"]:
        own["options"]["min_length"] = min(own["options"]["min_length"], positions(args))
    args.options = {**own["options"], **args.options}
    check_options(parser, args)
    if "warmup_epochs" not in args.given:
        args.warmup_epochs = WARM_UP * args.epochs
    for name, value in OF_IMAGES.items():
        setattr(args, name, value)
    return args


def positions(args: argparse.Namespace) -> int:
    """Returns the largest number of positions of a run's sequences."""
    return -(-TASKS[args.task].length // args.rate)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if ``--options`` names what is not an option of the method."""
    allowed = () if args.method == "lstm" else OPTIONS
    for name in args.options:
        if name not in allowed:
            said = f"has the options {', '.join(allowed)}" if allowed else "has no options"
            parser.error(f"--options {name}: --method {args.method} {said}")


def named_task(argv: Optional[list[str]]) -> tuple[str, str]:
    """Returns the task and the method that a command line names, or the run that it resumes or evaluates."""
    parser = Parser(add_help=False)
    for name in ("--task", "--method", "--output", "--resume"):
        parser.add_argument(name)
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_known_args(argv)[0]
    of_run = arguments_of(Path(args.output), OF_CALL) if args.output and (args.resume or args.evaluate) else {}
    return args.task or of_run.get("task", ""), args.method or of_run.get("method", METHODS[0])


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--task", choices=tuple(TASKS), help="what is learned; it also sets the defaults below")
    add("--data-dir", type=folder, help="folder of its data")
    add("--samples", type=positive, help="train on so many sequences, the first ones in an order drawn by 42")
    rate = "of tones and speech take one position in so many (default: %(default)s)"
    add("--rate", type=positive, default=1, help=rate)
    add("--test-rate", type=positive, help="the same for the test (default: --rate); kernels are resampled for it")
    add("--keep-kernels", action="store_true", help="leave kernels as many positions long, whatever --test-rate")
    add("--workers", "-j", type=natural, default=0, help="processes that read sequences (default: %(default)s)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    methods = "parameterization of the long kernels, or lstm for PyTorch's (default: %(default)s)"
    add("--method", choices=METHODS, default=METHODS[0], help=methods)
    add("--depth", type=positive, default=6, help="number of blocks (default: %(default)s)")
    add("--dim", type=positive, default=128, help="number of channels (default: %(default)s)")
    add("--norm", choices=NORMS, default="batch", help="(default: %(default)s)")
    either = argparse.BooleanOptionalAction
    add("--prenorm", action=either, default=False, help="the norm of a block stands before it (default: %(default)s)")
    add("--causal", action=either, default=False, help="no position sees those ahead (default: %(default)s)")
    add("--dropout", type=fraction, default=0.0, help="(default: %(default)s)")
    options = "options of MRConv1d, beside those of the preset (default: %(default)s)"
    add("--options", nargs="*", default={}, action=KeyValue, metavar="NAME=VALUE", help=options)


def make_model(args: argparse.Namespace) -> nn.Module:
    """Returns the model that the arguments of a run describe.

    Raises:
        UserError: If it can't have these options.
    """
    task = TASKS[args.task]
    inputs: dict[str, Any] = {"num_classes": task.classes, "vocabulary": task.vocabulary, "channels": task.channels}
    inputs |= {"dim": args.dim, "depth": args.depth, "dropout": args.dropout, "pairs": task.pairs}
    bidirectional = not args.causal
    try:
        if args.method == "lstm":
            return LSTMSequence(**inputs, bidirectional=bidirectional)
        options = {"kernel": args.method, "bidirectional": bidirectional, **args.options}
        return MRConvSequence(**inputs, length=positions(args), norm=args.norm, prenorm=args.prenorm, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"--options: {error}") from error


class Keyed(Dataset):
    """Sequences by the keys (epoch, index) that batches are made of."""

    def __init__(self, sequences: Any) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        return self.sequences[key[1]]


def batch_of(samples: list[tuple[Any, int]]) -> tuple[tuple[Tensor, Optional[Tensor]], Tensor]:
    """Returns a batch as the model takes it, (sequences, mask), and its classes."""
    inputs, mask, targets = collate(samples)
    return (inputs, mask), targets


def open_splits(args: argparse.Namespace, rate: int) -> tuple[Any, Any, Any]:
    """Returns the sequences of a task: to train, to choose the best epoch by, and to test.

    Raises:
        UserError: If they are missing or damaged, or the task has no such rate.
    """
    try:
        train, validation, test = open_task(args.task, args.data_dir, rate=rate)
    except (DataError, ValueError) as error:
        at = f" at --rate or --test-rate {rate}" if rate > 1 else ""
        raise UserError(f"--task {args.task}{at}: {error}") from error
    if args.samples is not None:
        if args.samples > len(train):
            raise UserError(f"--samples {args.samples} is more than the {len(train)} sequences to train")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(42))
        return Subset(cast(Dataset, train), order[: args.samples].tolist()), validation, test
    return train, validation, test


def evaluation_loader(sequences: Any, args: argparse.Namespace, processes: Processes) -> DataLoader:
    """Returns the loader of sequences that are evaluated."""
    size = args.batch_size or EVALUATED_AT_ONCE
    batches = EvalBatches(len(sequences), size, rank=processes.rank, processes=processes.count)
    options = loader_options(args, processes)
    return DataLoader(Keyed(sequences), batch_sampler=batches, collate_fn=batch_of, **options)


class SequenceRun(Run):
    """A model of sequences in training."""

    things = "sequences"

    def open_data(self) -> Data:
        """See `Run`."""
        train, validation, self.test = open_splits(self.args, self.args.rate)
        if self.args.global_batch > len(train):
            raise UserError(
                f"--global-batch {self.args.global_batch} is more than the {len(train)} sequences to train: give a "
                "smaller one"
            )
        return Data(train, validation, TASKS[self.args.task].classes)

    def make_model(self, data: Data) -> nn.Module:
        """See `Run`."""
        return make_model(self.args)

    def make_loaders(self, data: Data) -> Loaders:
        """See `Run`."""
        args, processes = self.args, self.processes
        size = split_batch(args, processes.count)
        own = {"rank": processes.rank, "processes": processes.count}
        batches = TrainBatches(len(data.train), args.global_batch, batch_size=size, seed=args.seed, **own)
        options = loader_options(args, processes)
        train = DataLoader(Keyed(data.train), batch_sampler=batches, collate_fn=batch_of, **options)
        validation = evaluation_loader(data.validation, args, processes)
        return Loaders(train, validation, batches.steps, args.global_batch // processes.count // size)

    def describe(self) -> str:
        """See `Run`."""
        args = self.args
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return "\n".join(
            [
                f"task {args.task}, method {args.method}, {parameters / 1e6:.2f}M parameters; hyperparameters of "
                f"{args.source}, where not given",
                f"sequences {self.counts[0]} to train, {self.counts[1]} held out, {len(self.test)} to test, of up to "
                f"{positions(args)} positions; {args.epochs} epochs",
                self.describe_steps(),
            ]
        )
