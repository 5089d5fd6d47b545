"""Images with their classes, by the names of datasets."""

import argparse
import contextlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset

from .errors import UserError

_logger = logging.getLogger(__name__)

# Where a folder has no splits, one image of so many is held out.
HELD_OUT = 5

# Names that timm takes for the same split.
SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))

# Kinds of datasets that timm opens by name, and those of them that are streams.
KINDS = ("torch", "hfds", "hfids", "tfds", "wds")
STREAMS = ("wds/", "hfids/", "tfds/")


class SizedDataset(Protocol):
    """A dataset whose images have numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits as RGB images of 8×8 pixels; every fifth is held out."""

    classes = tuple("0123456789")

    def __init__(self, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(
                f'--dataset digits needs scikit-learn ({error}): pip install "mrconvnext[train]"'
            ) from error

        digits = load_digits()
        own = [i for i in range(len(digits.images)) if (i % 5 == 0) != train]
        images = (digits.images[own] * 255 / 16).round().astype("uint8")
        self.samples = [(Image.fromarray(image).convert("RGB"), int(t)) for image, t in zip(images, digits.target[own])]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.samples[index]


class Data(NamedTuple):
    """The images of both splits, without transforms, the number of their classes, and the names if they have some."""

    train: Any
    validation: Any
    classes: int
    names: Optional[list[str]] = None


def open_data(args: argparse.Namespace) -> Data:
    """Returns the images that the arguments of a run name.

    Raises:
        UserError: If a split is missing or empty, or the classes of the two differ or are not those of the arguments.
    """
    train, validation = open_dataset(args, train=True), open_dataset(args, train=False)
    names, others = classes_of(train), classes_of(validation)
    if names != others:
        different = sorted(set(names or ()) ^ set(others or ()))
        raise UserError(f"the classes of {args.train_split} and {args.val_split} differ: {', '.join(different[:5])}")
    if names is None:
        if args.num_classes is None:
            raise UserError(f"--dataset {args.dataset} does not say its classes: give --num-classes")
        return Data(train, validation, args.num_classes)
    for name in names:
        if not name.isprintable():  # as what is not text becomes on its way from the disk
            raise UserError(f"the name of the class {name!a} in --data-dir {args.data_dir} is not text")
    if len(names) < 2:
        raise UserError(f"--data-dir {args.data_dir} has one class only, {names[0]}: two or more are needed")
    if args.num_classes not in (None, len(names)):
        raise UserError(f"--num-classes {args.num_classes} and the data's {len(names)} classes disagree")
    return Data(train, validation, len(names), names)


def open_dataset(args: argparse.Namespace, train: bool) -> Any:
    """Returns a split of a dataset: ``digits``, one that timm opens by name, or a folder or tar file of class folders.

    Raises:
        UserError: If the name is unknown, or the folder, or the split in it, is missing or empty.
    """
    name, folder, split = args.dataset, args.data_dir, args.train_split if train else args.val_split
    if name == "digits":
        return Digits(train)
    if name == "":
        if folder is None or not folder.is_dir():
            missing = "" if folder is None or folder.exists() else ", which does not exist"
            raise UserError(f"--data-dir must be a folder of images, got {folder}{missing}")
        if any(has_split(folder, own) for own in (args.train_split, args.val_split)):
            return class_folders(folder, split)
        return part_of(with_classes(class_folders(folder), folder), args.seed, train)
    if name.partition("/")[0] not in KINDS:
        raise UserError(f"--dataset must be digits or {', '.join(f'{kind}/…' for kind in KINDS)}, got {name}")
    options: dict[str, Any] = {"root": folder and str(folder), "split": split, "download": args.dataset_download}
    if name.startswith(STREAMS):
        options |= {"batch_size": args.batch_size or 1, "seed": args.seed}
    with _no_images_said(folder, split):
        return create_dataset(name, is_training=train, **options)


def class_folders(folder: Path, split: str = "") -> ImageDataset:
    """Returns the images of a split, a folder or tar file of class folders, or of class folders in a folder itself.

    Raises:
        UserError: If there are none.
    """
    if split and not has_split(folder, split):
        raise UserError(f"--data-dir {folder} has neither a folder nor a tar file for the split {split!r}")
    tar = folder / f"{split}.tar"
    with _no_images_said(folder, split):
        return create_dataset("", root=str(tar if tar.is_file() else folder), split=split)


def with_classes(dataset: ImageDataset, folder: Path) -> ImageDataset:
    """Returns a data set of class folders.

    Raises:
        UserError: If its images lie in no folders of classes, which timm takes for one class without a name.
    """
    if classes_of(dataset) == [""]:
        raise UserError(
            f"--data-dir {folder} holds images, but no folders of classes, such as {folder / 'cat'}, {folder / 'dog'}"
        )
    return dataset


def has_split(folder: Path, split: str) -> bool:
    """Returns whether a folder has a folder or a tar file for a split, by any name that timm has for it."""
    names = next((names for names in SYNONYMS if split in names), (split,))
    return (folder / f"{split}.tar").is_file() or any((folder / name).is_dir() for name in (split, *names))


def part_of(dataset: ImageDataset, seed: int, train: bool) -> ImageDataset:
    """Returns a data set with four fifths of each class's images for training, or the other fifth, drawn by a seed."""
    classes: dict[int, list] = {}
    for sample in dataset.reader.samples:
        classes.setdefault(sample[1], []).append(sample)
    own = []
    for samples in classes.values():
        random.Random(seed).shuffle(samples)
        held_out = -(-len(samples) // HELD_OUT) if len(samples) > 1 else 0
        own += samples[held_out:] if train else samples[:held_out]
    if train:
        alone = sum(len(samples) == 1 for samples in classes.values())
        if alone:
            _logger.warning(f"{alone} of the classes have one image, of which none is held out")
        _logger.info(f"no splits among the class folders: a fifth of each class is held out, drawn by --seed {seed}")
    dataset.reader.samples = sorted(own)
    return dataset


@contextlib.contextmanager
def _no_images_said(folder: Optional[Path], split: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError, ImportError, FileNotFoundError, ValueError) as error:
        found = f"no {split} images" if split else "no images"
        raise UserError(f"{found} in --data-dir {folder}: {error}") from error


def classes_of(dataset: Any) -> Optional[list[str]]:
    """Returns the names of a dataset's classes in order, None if it does not say."""
    if isinstance(dataset, (ImageDataset, IterableImageDataset)):
        # The reader of a tar file has another name for it.
        indices = getattr(dataset.reader, "class_to_idx", None) or getattr(dataset.reader, "class_name_to_idx", None)
        return sorted(indices, key=indices.get) if indices else None
    return [str(name) for name in dataset.classes] if hasattr(dataset, "classes") else None
