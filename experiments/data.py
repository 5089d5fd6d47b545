"""The images of the experiments, as class folders: Fashion-MNIST, parts of it, and Pathfinder-style drawings."""

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image, ImageDraw

# How far apart two curves must stay and how thick they are, in parts of the image's side.
CLEARANCE, WIDTH, MARKER = 0.14, 0.05, 0.08
SHORTEST, LONGEST, STEPS = 0.3, 0.9, 40  # length of a curve, in parts of the side; its points
SUPERSAMPLING = 4

MISSING = (
    "{} is missing: install Debian's package dataset-fashion-mnist, or take the four *-ubyte.gz files from "
    "https://github.com/zalandoresearch/fashion-mnist, and give their folder as --fashion-mnist"
)


class MissingData(Exception):
    """Images that can't be made on the spot are not there; the message says how to get them."""


def write(name: str, folder: Path, fashion_mnist: Path) -> None:
    """Writes images by name.

    ``fashion-N`` are the first N; ``fashion-first-half`` and ``fashion-second-half`` are five classes each, of the
    first 30,000 and 20,000; ``pathfinder-SIDE`` are 45,000 drawings.
    """
    if name == "fashion-first-half":
        write_fashion(fashion_mnist, folder, 30_000, range(5))
    elif name == "fashion-second-half":
        write_fashion(fashion_mnist, folder, 20_000, range(5, 10))
    elif name.startswith("fashion-"):
        write_fashion(fashion_mnist, folder, int(name.removeprefix("fashion-")))
    else:
        write_pathfinder(folder, int(name.removeprefix("pathfinder-")), 45_000)


def write_fashion(source: Path, folder: Path, images: int = 60_000, classes: Iterable[int] = range(10)) -> None:
    """Writes Fashion-MNIST's first training images, and all its test images as ``validation``.

    Args:
        source: Folder of the four ``*-ubyte.gz`` files.
        folder: Where to write.
        images: How many training images, before others than ``classes`` are left out.
        classes: Which classes.

    Raises:
        MissingData: If a file is missing.
    """
    for split, prefix in (("train", "train"), ("validation", "t10k")):
        pixels = _read_ubyte(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = _read_ubyte(source / f"{prefix}-labels-idx1-ubyte.gz", 8)
        count = images if split == "train" else len(labels)
        own = ((Image.fromarray(image), label) for image, label in zip(pixels[:count], labels) if label in classes)
        _write(own, folder / split)


def _read_ubyte(file: Path, header: int) -> np.ndarray:
    if not file.is_file():
        raise MissingData(MISSING.format(file))
    try:
        return np.frombuffer(gzip.open(file).read(), np.uint8, offset=header)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MissingData(f"{file} is damaged ({error}): take it anew") from error


def write_pathfinder(folder: Path, side: int, images: int, seed: int = 0) -> None:
    """Writes drawings of two curves and two discs: class 1 if one curve joins the discs, class 0 if none does.

    After Linsley et al. 2018, "Learning long-range spatial dependencies with horizontal gated recurrent units", with
    one distractor. A tenth as many images again are for validation.

    Args:
        folder: Where to write.
        side: Height and width of an image, in pixels.
        images: How many images are for training.
        seed: Seed of the drawings.
    """
    generator = np.random.default_rng([seed, side])
    for split, count in (("train", images), ("validation", images // 10)):
        own = ((draw_pathfinder(side, bool(i % 2), generator), i % 2) for i in range(count))
        _write(own, folder / split)


def draw_pathfinder(side: int, joined: bool, generator: np.random.Generator) -> Image.Image:
    """Returns a drawing of two curves and of discs on both ends of one, or on an end of each.

    Where the discs are tells nothing: apart, they lie where a curve's ends were, with new curves from there.
    """
    length = generator.uniform(SHORTEST, LONGEST)
    first, second = _two_curves(length, (None, None), generator)
    discs = (first[0], first[-1])
    if not joined:
        first, second = _two_curves(length, discs, generator)
    scale = side * SUPERSAMPLING
    image = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(image)
    for curve in (first, second):
        draw.line([tuple(point) for point in curve * scale], 255, max(1, round(WIDTH * scale)), joint="curve")
    for x, y in discs:
        box = np.array([x - MARKER, y - MARKER, x + MARKER, y + MARKER]) * scale
        draw.ellipse(tuple(box), fill=255)
    return image.resize((side, side), Image.Resampling.BOX)


def _two_curves(
    length: float, starts: Sequence[Optional[np.ndarray]], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns two curves that do not meet, from their starts or, where these are None, from anywhere."""
    while True:
        first, second = (_curve(length, start, generator) for start in starts)
        if np.linalg.norm(first[:, None] - second, axis=-1).min() > CLEARANCE:
            return first, second


def _curve(length: float, start: Optional[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Returns the points (STEPS + 1, 2) of a smooth curve within the unit square that does not meet itself."""
    step = length / STEPS
    along = step * np.abs(np.subtract.outer(range(STEPS + 1), range(STEPS + 1)))
    while True:
        bends = generator.normal(0, 3 * step, STEPS).cumsum()
        angles = generator.uniform(0, 2 * math.pi) + (bends - bends.mean()).cumsum() * 0.5
        moves = np.stack([np.cos(angles), np.sin(angles)], 1) * step
        points = np.concatenate([np.zeros((1, 2)), moves.cumsum(0)])
        room = 1 - 2 * MARKER - np.ptp(points, axis=0)
        points += start if start is not None else MARKER - points.min(0) + generator.uniform(0, 1, 2) * room
        if MARKER <= points.min() and points.max() <= 1 - MARKER:
            apart = np.linalg.norm(points[:, None] - points, axis=-1)
            if apart[along > 2 * CLEARANCE].min(initial=1) > CLEARANCE:
                return points


def _write(samples: Iterator[tuple[Image.Image, int]], folder: Path) -> None:
    for i, (image, label) in enumerate(samples):
        own = folder / str(label)
        own.mkdir(parents=True, exist_ok=True)
        image.save(own / f"{i:05d}.png")
