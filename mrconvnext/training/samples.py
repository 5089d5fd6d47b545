"""Images as the model takes them, with augmentation that depends on seed, epoch and image alone.

Files that can't be read are replaced by others, named and counted.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageOps
from timm.data import ImageDataset
from torch.utils.data import Dataset

from .datasets import SizedDataset
from .errors import UserError
from .processes import Processes
from .seeds import derived_seed, seed_all

_logger = logging.getLogger(__name__)

# What may stand in an image file, by Pillow's names. Its other readers are seldom used, and may run programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# The target of an image that stands in for an unreadable one where each image counts.
NO_TARGET = -1

# How many files in a row may be unreadable before none is taken to be an image.
RETRIES = 100

# How often augmentation is drawn for an image: Pillow refuses what RandAugment asks of it now and then, such as to
# posterize to 0 bits.
DRAWS = 10


class Sample(NamedTuple):
    """An image as the model takes it, its class, and the files that could not be read in its place, one a line."""

    image: Any
    target: int
    unreadable: str


class Samples(Dataset):
    """A dataset that is asked for (epoch, index), with augmentation that depends on these and the seed alone.

    A file that can't be read is replaced by the one after it, in evaluation with `NO_TARGET` as its target.

    Args:
        dataset: Dataset without a transform.
        transform: What makes a tensor of an image.
        seed: Seed of the run.
        train: Whether the images are for training, where one is as good as another.

    Raises:
        OSError: By ``[]``, if too many files in a row can't be read.
    """

    def __init__(self, dataset: SizedDataset, transform: Callable, seed: int, train: bool) -> None:
        self.dataset, self.transform, self.seed, self.train = dataset, transform, seed, train

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        unreadable: list[str] = []
        for i in range(index, index + RETRIES):
            i %= len(self)
            try:
                image, target = self._read(i)
            except Exception as error:  # Pillow's readers raise whatever damaged files make them raise
                line = f"{self._name(i)} ({error})"
                unreadable.append(line.encode(errors="backslashreplace").decode())  # names may be any bytes
            else:
                if unreadable and not self.train:
                    target = NO_TARGET
                return Sample(self._transformed(image, epoch, i), target, "\n".join(unreadable))
        raise OSError(f"{RETRIES} files in a row can't be read, the last one {unreadable[-1]}")

    def _read(self, index: int) -> tuple[Image.Image, int]:
        if not isinstance(self.dataset, ImageDataset):
            image, target = self.dataset[index]
            return as_rgb(image), target
        name = self._name(index)
        if os.path.exists(name) and not os.path.isfile(name):
            raise OSError("it is not a file")  # but a pipe or the like, which would be waited for
        file, target, *_ = self.dataset.reader[index]  # timm's dataset would skip what can't be read
        with file, Image.open(file, formats=FORMATS) as image:
            return as_rgb(image), target

    def _transformed(self, image: Image.Image, epoch: int, index: int) -> Any:
        for draw in range(DRAWS):
            seed_all(derived_seed(self.seed, epoch, index, draw))
            with contextlib.suppress(ValueError):
                return self.transform(image)
        return self.transform(image)

    def _name(self, index: int) -> str:
        if isinstance(self.dataset, ImageDataset):
            if name := self.dataset.filename(index, absolute=True):  # Hugging Face's data sets need not have files
                return name
        return f"number {index} of {type(self.dataset).__name__}"


class Redrawn:
    """A transform that draws its augmentation again where Pillow refuses it; for streams, which have no seeds."""

    def __init__(self, transform: Callable) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        for _ in range(DRAWS):
            with contextlib.suppress(ValueError):
                return self.transform(image)
        return self.transform(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Returns an image in RGB, the way up that its camera noted, and on white where it is transparent.

    Of 16 bits the higher 8 are taken, where Pillow would make white of all but the lowest.

    Raises:
        ValueError: If its pixels are floating-point numbers, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        own = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", own.size, "white"), own).convert("RGB")
    return image.convert("RGB")


class UnreadableFiles:
    """The files of an epoch that a process could not read.

    Args:
        limit: How many there may be over all processes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: list[str] = []

    def note(self, batch: list[list[str]]) -> None:
        """Logs the files of a batch that are not known yet."""
        for line in (line for texts in batch for text in texts for line in text.splitlines()):
            if line not in self.names:
                self.names.append(line)
                _logger.warning(f"skipped {line}")

    def check(self, processes: Processes) -> None:
        """Counts the files over all processes.

        Raises:
            UserError: In every process, if there are too many.
        """
        (count,) = processes.total(len(self.names))
        if count > self.limit:
            last = f", the last one {self.names[-1]}" if self.names else ""
            raise UserError(f"more than --max-unreadable {self.limit} files of an epoch can't be read{last}")
