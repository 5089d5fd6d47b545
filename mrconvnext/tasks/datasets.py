"""The sequence tasks by name: what each is like, its data as datasets, and how sequences are put into batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from . import signals, texts, tones
from .errors import DataError

__all__ = ["TASKS", "DataError", "Task", "collate", "open_task"]

# The part of the training data that is held out where no validation data is published.
HELD_OUT = 0.1
# Recordings, at most, that the mean and deviation of speech are taken from: all of them would take minutes to read.
MEASURED = 1000


@dataclass(frozen=True)
class Task:
    """A task of classifying sequences.

    Attributes:
        name: What it is opened by.
        classes: Number of classes.
        vocabulary: Number of tokens, or 0 if sequences are of numbers.
        channels: Numbers at a position, or 0 for tokens.
        length: The largest number of positions.
        pairs: Whether two sequences are classified together.
    """

    name: str
    classes: int
    vocabulary: int
    channels: int
    length: int
    pairs: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("listops", classes=10, vocabulary=18, channels=0, length=texts.LISTOPS_LENGTH),
        Task("text", classes=2, vocabulary=135, channels=0, length=texts.TEXT_LENGTH),
        Task("retrieval", classes=2, vocabulary=98, channels=0, length=texts.RETRIEVAL_LENGTH, pairs=True),
        Task("image", classes=10, vocabulary=0, channels=1, length=32 * 32),
        Task("scifar", classes=10, vocabulary=0, channels=3, length=32 * 32),
        Task("pathfinder", classes=2, vocabulary=0, channels=1, length=32 * 32),
        Task("pathx", classes=2, vocabulary=0, channels=1, length=128 * 128),
        Task("smnist", classes=10, vocabulary=0, channels=1, length=28 * 28),
        Task("fashion", classes=10, vocabulary=0, channels=1, length=28 * 28),
        Task("tones", classes=tones.CLASSES, vocabulary=0, channels=1, length=tones.RATE),
        Task("speech", classes=35, vocabulary=0, channels=1, length=signals.SPEECH_RATE),
    )
}

# Mean and deviation of pixels in [0, 1], for each channel.
_CENTRED = ((0.5,), (0.5,))
_SCALES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "image": ((122.6 / 255,), (61 / 255,)),
    "scifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "pathfinder": _CENTRED,
    "pathx": _CENTRED,
    "smnist": _CENTRED,
    "fashion": _CENTRED,
}

Sample = tuple[Any, int]


class Sequences(Protocol):
    """Arrays by number."""

    def __getitem__(self, index: int, /) -> NDArray[Any]: ...


class TokenDataset(Dataset[Sample]):
    """Sequences of tokens, int64 (L,), and labels; or pairs of such, whose sequences are 2·i and 2·i + 1.

    Args:
        sequences: The tokens of all.
        labels: The label of each sequence or pair.
        numbers: Which sequences or pairs are part of it, in its order.
        pairs: Whether they are pairs.
    """

    def __init__(
        self, sequences: Sequences, labels: NDArray[np.int64], numbers: NDArray[np.int64], pairs: bool = False
    ) -> None:
        self.sequences, self.labels, self.numbers, self.pairs = sequences, labels, numbers, pairs

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        number = int(self.numbers[index])
        own = (2 * number, 2 * number + 1) if self.pairs else (number,)
        tokens = tuple(torch.from_numpy(self.sequences[i].astype(np.int64)) for i in own)
        return tokens if self.pairs else tokens[0], int(self.labels[number])


class ImageDataset(Dataset[Sample]):
    """Images as sequences of pixels, float32 (L, channels), and labels.

    Args:
        images: Bytes (N, L, channels).
        labels: The label of each image.
        numbers: Which images are part of it, in its order.
        mean: Is taken off pixels in [0, 1], for each channel.
        deviation: Then divides them.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        numbers: NDArray[np.int64],
        mean: Sequence[float],
        deviation: Sequence[float],
    ) -> None:
        self.images, self.labels, self.numbers = images, labels, numbers
        self.mean, self.deviation = torch.tensor(mean), torch.tensor(deviation)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        number = int(self.numbers[index])
        pixels = torch.from_numpy(self.images[number].astype(np.float32)) / 255
        return (pixels - self.mean) / self.deviation, int(self.labels[number])


class SpeechDataset(Dataset[Sample]):
    """Recordings, float32 (16000 / rate, 1), read when they are asked for, and labels.

    Args:
        paths: Of all recordings.
        labels: The label of each.
        numbers: Which are part of it, in its order.
        scale: Mean and deviation of samples, which are taken off and divide them.
        rate: One sample in so many is kept.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: NDArray[np.int64],
        numbers: NDArray[np.int64],
        scale: tuple[float, float],
        rate: int,
    ) -> None:
        self.paths, self.labels, self.numbers, self.scale, self.rate = paths, labels, numbers, scale, rate

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        number = int(self.numbers[index])
        mean, deviation = self.scale
        samples = torch.from_numpy(signals.read_recording(self.paths[number])[:: self.rate].copy())
        return (samples - mean) / deviation, int(self.labels[number])


class ToneDataset(Dataset[Sample]):
    """Tones, float32 (2000 / rate, 1), and labels.

    Args:
        sounds: 16 bits (N, 2000).
        labels: The label of each.
        rate: One sample in so many is kept.
    """

    def __init__(self, sounds: NDArray[np.int16], labels: NDArray[np.int64], rate: int) -> None:
        self.sounds, self.labels, self.rate = sounds, labels, rate

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        samples = self.sounds[index, :: self.rate].astype(np.float32) / 2**14  # deviations of about a half
        return torch.from_numpy(samples).unsqueeze(-1), int(self.labels[index])


class Samples(Protocol):
    """Sequences and labels by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


Split = tuple[Samples, Samples, Samples]


def open_task(name: str, folder: Path, seed: int = 42, rate: int = 1) -> Split:
    """Returns the training, validation and test data of a task, each with `len` and (sequence, label) by number.

    A sequence is int64 (L,) for tokens, float32 (L, channels) else; for pairs it is a tuple of two.

    Args:
        name: One of `TASKS`.
        folder: Where the data is, in the form that it is published in.
        seed: Draws what is held out for validation, where that is not published, and the three parts of speech.
        rate: One sample in so many is kept, of speech and tones alone: a model for 16 kHz is tested at 8 kHz with 2.

    Raises:
        ValueError: If there is no such task, or `rate` is not one that it can have.
        DataError: If the data is missing or damaged.
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of {', '.join(TASKS)}, got {name!r}")
    if rate < 1 or (rate > 1 and name not in ("speech", "tones")):
        raise ValueError(f"rate must be 1, or for speech and tones more, got {rate} for {name}")
    if name == "speech":
        return _open_speech(folder, seed, rate)
    if name == "tones":
        train, validation, test = (ToneDataset(*part, rate) for part in signals.read_tones(folder))
        return train, validation, test
    if TASKS[name].vocabulary:
        return _open_tokens(TASKS[name], folder, seed)
    return _open_images(TASKS[name], folder, seed)


def _open_tokens(task: Task, folder: Path, seed: int) -> Split:
    if task.name == "text":
        reviews, unseen = texts.read_text(folder, task.vocabulary)
        own, held_out = _hold_out(len(reviews[1]), seed)
        return TokenDataset(*reviews, own), TokenDataset(*reviews, held_out), TokenDataset(*unseen, _all(unseen[1]))
    parts = texts.read_retrieval(folder, task.vocabulary) if task.pairs else texts.read_listops(folder)
    train, validation, test = (TokenDataset(*part, _all(part[1]), pairs=task.pairs) for part in parts)
    return train, validation, test


def _open_images(task: Task, folder: Path, seed: int) -> Split:
    scale = _SCALES[task.name]
    if task.name in ("pathfinder", "pathx"):
        parts = signals.read_pathfinder(folder, round(task.length**0.5))
        first, second, third = (ImageDataset(*part, _all(part[1]), *scale) for part in parts)
        return first, second, third
    if task.name in ("image", "scifar"):
        train, test = signals.read_cifar(folder, gray=task.name == "image")
    else:
        train, test = signals.read_digits(folder, signals.MNIST if task.name == "smnist" else signals.FASHION_MNIST)
    own, held_out = _hold_out(len(train[1]), seed)
    validation = ImageDataset(*train, held_out, *scale)
    return ImageDataset(*train, own, *scale), validation, ImageDataset(*test, _all(test[1]), *scale)


def _open_speech(folder: Path, seed: int, rate: int) -> Split:
    paths, labels = signals.list_speech(folder)
    parts = _stratified(labels, (0.7, 0.85), seed)
    scale = signals.moments([paths[i] for i in parts[0][:MEASURED]])
    train, validation, test = (SpeechDataset(paths, labels, part, scale, rate) for part in parts)
    return train, validation, test


def _all(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.arange(len(labels))


def _hold_out(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the numbers of what is trained on and of what is held out, drawn as S4's readers draw them."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    kept = int(count * (1 - HELD_OUT))
    return order[:kept], order[kept:]


def _stratified(labels: NDArray[np.int64], cuts: Sequence[float], seed: int) -> list[NDArray[np.int64]]:
    """Returns the numbers of each part, in random order, cut at the same fractions of every class."""
    rng = np.random.default_rng(seed)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(len(cuts) + 1)]
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        places = [round(cut * len(own)) for cut in cuts]
        for part, numbers in zip(parts, np.split(own, places)):
            part.append(numbers)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def collate(batch: Sequence[Sample]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns a batch of samples, padded with zeros on the right to the longest, token 0 being padding.

    Returns:
        Inputs (B, L) of tokens, (B, L, channels) of numbers or (B, 2, L) of pairs; a mask (B, L) or (B, 2, L), True
        at real positions, or None if all sequences are equally long; labels (B).
    """
    pairs = isinstance(batch[0][0], tuple)
    sequences = [sequence for own, _ in batch for sequence in (own if pairs else (own,))]
    inputs = pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(inputs.shape[1]) < lengths[:, None] if lengths.min() < lengths.max() else None
    if pairs:
        inputs = inputs.unflatten(0, (-1, 2))
        mask = None if mask is None else mask.unflatten(0, (-1, 2))
    return inputs, mask, torch.tensor([label for _, label in batch])
