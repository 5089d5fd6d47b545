"""Batches that depend on seed, epoch and step alone.

Augmentation of an image is drawn from a generator seeded by (seed, epoch, index), and the order of an epoch by
(seed, epoch). So a run that is resumed in mid-epoch sees the batches that it would have seen, whatever the number of
workers.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from timm.data import IterableImageDataset, create_transform
from torch.utils.data import DataLoader, Sampler

from .datasets import Data
from .errors import UserError
from .processes import Processes, ignore_signals
from .samples import Redrawn, Samples
from .seeds import derived_seed

# How long a worker may take for a batch: it may have been stopped, or wait for a disk that is gone.
WORKER_SECONDS = 600

# Images of a batch that is evaluated, unless the arguments say how many.
EVALUATED_AT_ONCE = 128


class TrainBatches(Sampler):
    """The keys, (epoch, index), of one process's batches of an epoch in random order, from a step on.

    Each step takes ``global_batch`` images; every process takes an equal share of it, in batches of ``batch_size``.

    Args:
        images: Number of images.
        global_batch: Images of a step, over all processes.
        batch_size: Images of a batch.
        seed: Seed of the run.
        rank: Number of the process.
        processes: Number of processes.
    """

    def __init__(self, images: int, global_batch: int, batch_size: int, seed: int, rank: int, processes: int) -> None:
        self.images, self.global_batch, self.batch_size, self.seed = images, global_batch, batch_size, seed
        self.rank, self.share = rank, global_batch // processes
        self.steps = images // global_batch
        self.epoch = self.first = 0

    def start(self, epoch: int, first: int) -> None:
        """Sets the epoch, and its step that comes first."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return (self.steps - self.first) * self.share // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        for step in range(self.first, self.steps):
            start = step * self.global_batch + self.rank * self.share
            for i in range(start, start + self.share, self.batch_size):
                yield [(self.epoch, index) for index in order[i : i + self.batch_size]]


class EvalBatches(Sampler):
    """The keys of one process's batches of all images, each image once over the processes."""

    def __init__(self, images: int, batch_size: int, rank: int, processes: int) -> None:
        own = [(0, index) for index in range(rank, images, processes)]
        self.batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class Loaders(NamedTuple):
    """The batches of one process.

    Attributes:
        train: Batches of training.
        validation: Batches of evaluation.
        steps: Steps of an epoch.
        accumulation: Batches that a process takes for a step.
    """

    train: DataLoader
    validation: DataLoader
    steps: int
    accumulation: int

    @property
    def is_stream(self) -> bool:
        """Whether the images come in an order that can't be entered in its middle."""
        return isinstance(self.train.dataset, IterableImageDataset)

    def epoch(self, number: int, first: int) -> Iterator:
        """Returns the batches of an epoch from a step on, of a stream from its beginning."""
        if isinstance(self.train.dataset, IterableImageDataset):
            self.train.dataset.set_epoch(number)
        if isinstance(self.train.batch_sampler, TrainBatches):
            self.train.batch_sampler.start(number, first)
        return iter(self.train)


def make_loaders(data: Data, args: argparse.Namespace, config: dict[str, Any], processes: Processes) -> Loaders:
    """Returns loaders of both splits.

    Args:
        data: The images.
        args: The run's arguments.
        config: What timm's ``resolve_data_config`` found for the model.
        processes: Those of the run.

    Raises:
        UserError: If the batches do not fit the processes or the number of images, or the augmentation is unknown.
    """
    size = split_batch(args, processes.count)
    transform = make_transforms(args, config)[0]
    accumulation = args.global_batch // processes.count // size
    validation = validation_loader(data, args, config, processes)
    if isinstance(data.train, IterableImageDataset):
        data.train.transform = Redrawn(transform)
        data.train.set_loader_cfg(num_workers=args.workers)
        steps = len(data.train) * processes.count // args.global_batch  # timm's length is a process's share
        train = DataLoader(data.train, batch_size=size, **loader_options(args, processes))
        return Loaders(train, validation, steps, accumulation)
    own = {"rank": processes.rank, "processes": processes.count}
    batches = TrainBatches(len(data.train), args.global_batch, batch_size=size, seed=args.seed, **own)
    samples = Samples(data.train, transform, args.seed, train=True)
    train = DataLoader(samples, batch_sampler=batches, **loader_options(args, processes))
    return Loaders(train, validation, batches.steps, accumulation)


def validation_loader(data: Data, args: argparse.Namespace, config: dict[str, Any], processes: Processes) -> DataLoader:
    """Returns the loader of the images that are evaluated; see `make_loaders`."""
    size = args.batch_size or EVALUATED_AT_ONCE
    transform = make_transforms(args, config)[1]
    options = loader_options(args, processes)
    if isinstance(data.validation, IterableImageDataset):
        data.validation.transform = Redrawn(transform)
        data.validation.set_loader_cfg(num_workers=args.workers)
        return DataLoader(data.validation, batch_size=size, **options)
    samples = Samples(data.validation, transform, args.seed, train=False)
    batches = EvalBatches(len(data.validation), size, rank=processes.rank, processes=processes.count)
    return DataLoader(samples, batch_sampler=batches, **options)


def loader_options(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Returns what the loaders of both splits have in common."""
    return {
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "pin_memory": processes.device.type == "cuda",
        "worker_init_fn": ignore_signals,
        "timeout": WORKER_SECONDS if args.workers > 0 else 0,
    }


def split_batch(args: argparse.Namespace, processes: int) -> int:
    """Returns the images at once in a process: a step takes ``--global-batch``, each process an equal share of it.

    Raises:
        UserError: If it can't be split so.
    """
    share, rest = divmod(args.global_batch, processes)
    if rest or share == 0:
        raise UserError(f"--global-batch {args.global_batch} can't be split over {processes} processes")
    unit = 2 if is_mixed(args) else 1  # mixup takes images in pairs
    if share % unit:
        raise UserError(f"--global-batch {args.global_batch}: mixup needs an even number of images in a process")
    size = args.batch_size or max(size for size in range(unit, min(share, 128) + 1, unit) if share % size == 0)
    if share % size or size % unit:
        raise UserError(
            f"--batch-size {size} must {'be even for mixup and ' if unit == 2 else ''}divide a process's share {share} "
            f"of --global-batch {args.global_batch}"
        )
    return size


def is_mixed(args: argparse.Namespace) -> bool:
    """Returns whether a run mixes images in pairs, by mixup or cutmix."""
    return not args.no_aug and (args.mixup > 0 or args.cutmix > 0)


def make_transforms(args: argparse.Namespace, config: dict[str, Any]) -> tuple[Callable, Callable]:
    """Returns timm's transforms of images for training and for evaluation.

    Raises:
        UserError: If timm does not know the augmentation.
    """
    common = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    augmentation = dict(scale=args.scale, hflip=args.hflip, auto_augment=args.aa or None, re_prob=args.reprob)
    try:
        train = create_transform(**common, is_training=True, no_aug=args.no_aug, re_mode="pixel", **augmentation)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--aa must be an augmentation that timm knows, got {args.aa!r} ({error})") from error
    return train, create_transform(**common, crop_pct=config["crop_pct"])
