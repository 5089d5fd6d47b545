"""The data sets of numbers, in their published form: images as sequences of pixels, and spoken words."""

import gzip
import wave
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from numpy.typing import NDArray

from . import pathfinder, tones
from .errors import damaged, missing

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]

_CIFAR_REMEDY = "get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there"

# Each data set's remedy and the folder that torchvision puts its files in.
MNIST = ("get the four files from https://yann.lecun.com/exdb/mnist", "MNIST")
FASHION_MNIST = (
    "get the four files from https://github.com/zalandoresearch/fashion-mnist or Debian's dataset-fashion-mnist",
    "FashionMNIST",
)

SPEECH_RATE = 16_000
SPEECH_WORDS = (
    *("backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy"),
    *("house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop"),
    *("three", "tree", "two", "up", "visual", "wow", "yes", "zero"),
)
_SPEECH_REMEDY = "get http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz and unpack it there"


def read_cifar(folder: Path, gray: bool) -> tuple[Images, Images]:
    """Returns CIFAR-10's images (N, 1024, channels) and labels: training and test.

    Args:
        folder: That of cifar-10-batches-py.
        gray: Whether to take the luma of ITU-R 601, one channel, as Pillow computes it, for the three.

    Raises:
        DataError: If a file is missing or not the published one.
    """
    parts = []
    for train in (True, False):
        try:
            data = torchvision.datasets.CIFAR10(root=folder, train=train, download=False)
        except RuntimeError as error:  # which doesn't tell a missing file from a damaged one
            raise missing(folder / torchvision.datasets.CIFAR10.base_folder, "CIFAR-10", _CIFAR_REMEDY) from error
        images = data.data.reshape(len(data.data), -1, 3)
        parts.append((_luma(images) if gray else images, np.array(data.targets)))
    return parts[0], parts[1]


def _luma(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the gray (..., 1) of colours (..., 3)."""
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)  # .299, .587, .114, times 2^16
    return ((images @ weights + (1 << 15)) >> 16).astype(np.uint8)[..., None]


def read_digits(folder: Path, source: tuple[str, str]) -> tuple[Images, Images]:
    """Returns the images (N, 784, 1) and labels of MNIST or Fashion-MNIST: training and test.

    Args:
        folder: That of the four files, packed or not, or the one that torchvision keeps them in.
        source: `MNIST` or `FASHION_MNIST`.

    Raises:
        DataError: If a file is missing or damaged.
    """
    parts = []
    for name in ("train", "t10k"):
        images = _read_idx(folder, f"{name}-images-idx3-ubyte", source)
        labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", source)
        if len(images) != len(labels) or images.shape[1:] != (28, 28):
            shapes = f"{list(images.shape)} for {len(labels)} labels"
            raise damaged(folder / f"{name}-images-idx3-ubyte", shapes, source[0])
        parts.append((images.reshape(len(images), -1, 1), labels.astype(np.int64)))
    return parts[0], parts[1]


def _read_idx(folder: Path, name: str, source: tuple[str, str]) -> NDArray[np.uint8]:
    """Returns the array of an idx file: two zeros, type 8 for bytes, number of sizes, sizes of 4 bytes, bytes."""
    remedy, title = source
    rooms = (folder, folder / title / "raw")
    found = [path for room in rooms for path in (room / name, room / f"{name}.gz") if path.is_file()]
    if not found:
        raise missing(folder / f"{name}.gz", title, remedy)
    try:
        content = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
        start = 4 + 4 * content[3]
        shape = np.frombuffer(content[4:start], dtype=">u4").astype(np.int64)
        return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
    except (EOFError, OSError, IndexError, ValueError, zlib.error) as error:
        raise damaged(found[0], error, remedy) from error


def read_pathfinder(folder: Path, side: int) -> list[Images]:
    """Returns Pathfinder's pictures (N, side², 1), which stay on the disk, and labels: training, validation, test.

    Raises:
        DataError: If a file is missing or damaged, or of another side.
    """
    remedy = f"generate it: python -m mrconvnext.tasks pathfinder FOLDER --side {side}"
    parts = []
    for split in pathfinder.SPLITS:
        images, labels = (_load(folder / name, "Pathfinder", remedy) for name in pathfinder.files(split))
        if images.shape != (len(labels), side, side) or images.dtype != np.uint8:
            shape = f"{images.dtype} of {list(images.shape)} for {len(labels)} labels"
            raise damaged(folder / pathfinder.files(split)[0], shape, remedy)
        parts.append((images.reshape(len(images), -1, 1), np.array(labels, dtype=np.int64)))
    return parts


def read_tones(folder: Path) -> list[tuple[NDArray[np.int16], NDArray[np.int64]]]:
    """Returns the tones (N, 2000), which stay on the disk, and labels: training, validation, test.

    Raises:
        DataError: If a file is missing or damaged.
    """
    remedy = "generate it: python -m mrconvnext.tasks tones FOLDER"
    parts = []
    for split in pathfinder.SPLITS:
        sounds, labels = (_load(folder / name, "tones", remedy) for name in tones.files(split))
        if sounds.shape != (len(labels), tones.RATE) or sounds.dtype != np.int16:
            shape = f"{sounds.dtype} of {list(sounds.shape)} for {len(labels)} labels"
            raise damaged(folder / tones.files(split)[0], shape, remedy)
        parts.append((sounds, np.array(labels, dtype=np.int64)))
    return parts


def _load(path: Path, title: str, remedy: str) -> NDArray[Any]:
    """Returns an array of numbers that stays in its file."""
    if not path.is_file():
        raise missing(path, title, remedy)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        raise damaged(path, error, remedy) from error


def list_speech(folder: Path) -> tuple[list[Path], NDArray[np.int64]]:
    """Returns the recordings of Speech Commands, version 2, and their labels: numbers of the words, by alphabet.

    Raises:
        DataError: If a word's folder is missing or empty.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, word in enumerate(SPEECH_WORDS):
        found = sorted((folder / word).glob("*.wav"))
        if not found:
            raise missing(folder / word / "*.wav", "Speech Commands", _SPEECH_REMEDY)
        paths += found
        labels += [label] * len(found)
    return paths, np.array(labels)


def read_recording(path: Path) -> NDArray[np.float32]:
    """Returns a recording of one second (16000, 1) in [−1, 1), with zeros after a shorter one.

    Raises:
        DataError: If it is not one channel of 16 bit at 16 kHz.
    """
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            content = file.readframes(SPEECH_RATE)
    except (EOFError, OSError, wave.Error) as error:
        raise damaged(path, error, _SPEECH_REMEDY) from error
    if form != (1, 2, SPEECH_RATE):
        raise damaged(path, "{} channels of {} bytes at {} Hz".format(*form), _SPEECH_REMEDY)
    samples = np.frombuffer(content[: len(content) // 2 * 2], dtype="<i2")
    recording = np.zeros((SPEECH_RATE, 1), dtype=np.float32)
    recording[: len(samples), 0] = samples / 2**15
    return recording


def moments(recordings: Sequence[Path]) -> tuple[float, float]:
    """Returns the mean and the deviation of the recordings' samples."""
    samples = np.stack([read_recording(path) for path in recordings])
    return float(samples.mean(dtype=np.float64)), float(samples.std(dtype=np.float64))
