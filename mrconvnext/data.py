"""Images for training: datasets by name, and batches that depend on seed, epoch and step alone.

Augmentation of an image is drawn from a generator seeded by (seed, epoch, index), and the order of an epoch by
(seed, epoch). So a run goes on in mid-epoch as if it had never stopped, whatever the number of workers.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset, Sampler

# What Pillow raises for files that are no images, or only parts of one.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# The target that stands for no image at all.
NONE = -1

# Kinds of data sets that timm opens by name.
KINDS = ("torch", "hfds", "hfids", "tfds", "wds")

# How many files in a row may be unreadable before there are taken to be no images.
RETRIES = 100

# How often augmentation is drawn for an image: Pillow refuses what RandAugment asks of it now and then, such as to
# posterize to 0 bits.
DRAWS = 10


def derived_seed(*numbers: int) -> int:
    """Returns a seed below 2**63 that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_all(seed: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (timm draws from it)
    # Not `torch.manual_seed`: for every kind of device that isn't there it keeps a trace of the stack, which takes
    # longer than to read a small image.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits as RGB images of 8×8 pixels; every fifth is held out."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        own = [i for i in range(len(digits.images)) if (i % 5 == 0) != train]
        images = (digits.images[own] * 255 / 16).round().astype("uint8")
        self.samples = [(Image.fromarray(image).convert("RGB"), int(t)) for image, t in zip(images, digits.target[own])]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.samples[index]


class Sample(NamedTuple):
    """An image as the model takes it, its class, and the files that could not be read in its place."""

    image: Any
    target: int
    unreadable: str


class Samples(Dataset):
    """A dataset that is asked for (epoch, index), with augmentation that depends on these and the seed alone.

    A file that can't be read is replaced by the one after it, whose target is `NONE` where each image counts.

    Args:
        dataset: Dataset without a transform.
        transform: What makes a tensor of an image.
        seed: Seed of the run.
        train: Whether one image is as good as another.

    Raises:
        OSError: By ``[]``, if too many files in a row can't be read.
    """

    def __init__(self, dataset: Dataset, transform: Callable, seed: int, train: bool) -> None:
        self.dataset, self.transform, self.seed, self.train = dataset, transform, seed, train

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        unreadable = []
        for i in range(index, index + RETRIES):
            i %= len(self)
            try:
                image, target = self._read(i)
            except UNREADABLE as error:
                unreadable.append(f"{self._name(i)} ({error})")
            else:
                if unreadable and not self.train:
                    target = NONE
                return Sample(self._transformed(image, epoch, i), target, "\n".join(unreadable))
        raise OSError(f"{RETRIES} files in a row can't be read, the last one {unreadable[-1]}")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if not isinstance(self.dataset, ImageDataset):
            image, target = self.dataset[index]
            return image.convert("RGB"), target
        file, target, *_ = self.dataset.reader[index]  # timm's dataset would pass over what can't be read
        with file, Image.open(file) as image:
            return image.convert("RGB"), target

    def _transformed(self, image: Image.Image, epoch: int, index: int) -> Any:
        for draw in range(DRAWS):
            seed_all(derived_seed(self.seed, epoch, index, draw))
            with contextlib.suppress(ValueError):
                return self.transform(image)
        return self.transform(image)

    def _name(self, index: int) -> str:
        if isinstance(self.dataset, ImageDataset):
            return self.dataset.filename(index, absolute=True)
        return f"number {index} of {type(self.dataset).__name__}"


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


def open_dataset(name: str, folder: Optional[Path], split: str, train: bool, **options: Any) -> Dataset:
    """Returns a dataset without a transform.

    Args:
        name: ``digits``, or a name as timm's ``create_dataset`` takes it; "" for a folder of class folders.
        folder: Where it lies: for "" a folder that holds one for each split, or ``SPLIT.tar``.
        split: Name of the split.
        train: Whether it is for training.
        **options: Further arguments of ``create_dataset``.

    Raises:
        ValueError: If the name is unknown, or the folder, or the split in it, is missing or empty.
    """
    if name == "digits":
        return Digits(train)
    if name and name.partition("/")[0] not in KINDS:
        raise ValueError(f"--dataset must be digits or {', '.join(f'{kind}/…' for kind in KINDS)}, got {name}")
    if name == "" and (folder is None or not folder.is_dir()):
        raise ValueError(f"--data-dir must be a folder of images, got {folder}")
    root = folder
    if name == "" and (folder / f"{split}.tar").is_file():
        root = folder / f"{split}.tar"
    try:
        dataset = create_dataset(name, root=root and str(root), split=split, is_training=train, **options)
    except (RuntimeError, AssertionError, ImportError, FileNotFoundError) as error:
        raise ValueError(f"no {split} images in --data-dir {folder}: {error}") from error
    if name == "" and root == folder and Path(dataset.reader.root) == folder:
        raise ValueError(f"--data-dir {folder} has neither a folder nor a tar file for the split {split!r}")
    return dataset


def classes_of(dataset: Dataset) -> Optional[list[str]]:
    """Returns the names of a dataset's classes in order, None if it does not say."""
    if isinstance(dataset, (ImageDataset, IterableDataset)):
        # A tar file's reader has another name for it.
        indices = getattr(dataset.reader, "class_to_idx", None) or getattr(dataset.reader, "class_name_to_idx", None)
        return sorted(indices, key=indices.get) if indices else None
    return [str(name) for name in dataset.classes] if hasattr(dataset, "classes") else None
