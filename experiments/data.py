"""The images of the experiments, as class folders: Fashion-MNIST, drawings after Pathfinder, photographs, emoji."""

import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# How far apart two curves must stay, how thick they are, and the radius of the discs, in parts of the image's side.
CLEARANCE, WIDTH, MARKER = 0.14, 0.05, 0.08
SHORTEST, LONGEST, STEPS = 0.3, 0.9, 40  # length of a curve, in parts of the side; its points
SUPERSAMPLING = 4

MISSING = (
    "{} is missing: install Debian's package dataset-fashion-mnist, or take the four *-ubyte.gz files from "
    "https://github.com/zalandoresearch/fashion-mnist, and give their folder as --fashion-mnist"
)


class MissingData(Exception):
    """Images that can't be made on the spot are not there; the message says how to get them."""


def write(name: str, folder: Path, sources: Mapping[str, Optional[Path]]) -> None:
    """Writes images by name, in class folders of the splits ``train``, ``validation`` and ``test``.

    ``fashion-N`` are the first N; ``fashion-first-half`` and ``fashion-second-half`` are five classes each, of the
    first 30,000 and 20,000; ``drawings-SIDE`` are 45,000 drawings; ``solar-N`` and ``emoji-N`` are N photographs and
    pictures for training, or all that there are.

    Args:
        name: Which images.
        folder: Where to write.
        sources: Where real images lie: "fashion_mnist", "elpv", "emoji".

    Raises:
        MissingData: If they do not.
    """
    kind, _, number = name.partition("-")
    if name == "fashion-first-half":
        write_fashion(sources["fashion_mnist"], folder, 30_000, range(5))
    elif name == "fashion-second-half":
        write_fashion(sources["fashion_mnist"], folder, 20_000, range(5, 10))
    elif kind == "fashion":
        write_fashion(sources["fashion_mnist"], folder, int(number))
    elif kind == "drawings":
        write_drawings(folder, int(number), 45_000)
    else:
        write_parts({"solar": solar_cells, "emoji": emoji}[kind](sources), folder, int(number))


def write_fashion(
    source: Optional[Path], folder: Path, images: int = 50_000, classes: Iterable[int] = range(10)
) -> None:
    """Writes Fashion-MNIST's first training images, its test images as ``validation``, on which the defaults of this
    project were chosen, and its last 10,000 training images, on which nothing was chosen, as ``test``.

    Args:
        source: Folder of the four ``*-ubyte.gz`` files.
        folder: Where to write.
        images: How many training images, before others than ``classes`` are left out; at most 50,000.
        classes: Which classes.

    Raises:
        MissingData: If a file is missing.
    """
    if source is None:
        raise MissingData(MISSING.format("Fashion-MNIST"))
    train, test = (
        (_read_ubyte(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28), labels_of(source, prefix))
        for prefix in ("train", "t10k")
    )
    for split, (pixels, labels), part in (
        ("train", train, slice(images)),
        ("validation", test, slice(None)),
        ("test", train, slice(-10_000, None)),
    ):
        own = zip(pixels[part], labels[part])
        _write(((Image.fromarray(image), str(label)) for image, label in own if label in classes), folder / split)


def labels_of(source: Path, prefix: str) -> np.ndarray:
    return _read_ubyte(source / f"{prefix}-labels-idx1-ubyte.gz", 8)


def solar_cells(sources: Mapping[str, Optional[Path]]) -> list[tuple[Path, str]]:
    """Returns photographs of solar cells, 300×300 (Buerhop-Lutz et al. 2018), with whether they are held defective."""
    folder = sources["elpv"]
    if folder is None or not (folder / "labels.csv").is_file():
        raise MissingData(
            f"{folder or '--elpv'}: labels.csv is missing: give elpv_dataset/data of PyPI's elpv-dataset as --elpv"
        )
    lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    return [(folder / file, "defective" if float(share) > 0.5 else "functional") for file, share, _ in lines]


def emoji(sources: Mapping[str, Optional[Path]]) -> list[tuple[Path, str]]:
    """Returns Twitter's emoji, 64×64, without those that differ by the tone of the skin alone, with their category."""
    folder = sources["emoji"]
    if folder is None or not (folder / "emoji.json").is_file():
        raise MissingData(
            f"{folder or '--emoji'}: emoji.json is missing: give npm's emoji-datasource-twitter as --emoji"
        )
    own = [one for one in json.loads((folder / "emoji.json").read_text()) if one["has_img_twitter"]]
    images = folder / "img" / "twitter" / "64"
    return [(images / one["image"], one["category"]) for one in own if one["category"] != "Component"]


def write_parts(images: list[tuple[Path, str]], folder: Path, count: int) -> None:
    """Writes some images for training; a quarter of all are for the test and an eighth for validation, always the same
    ones."""
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    test, validation = len(images) // 4, len(images) // 8
    for split, part in (
        ("test", order[:test]),
        ("validation", order[test : test + validation]),
        ("train", order[test + validation :][:count]),
    ):
        _write(((_on_white(images[i][0]), images[i][1]) for i in part), folder / split)


def _on_white(file: Path) -> Image.Image:
    with Image.open(file) as image:
        own = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", own.size, "white"), own).convert("RGB")


def _read_ubyte(file: Path, header: int) -> np.ndarray:
    if not file.is_file():
        raise MissingData(MISSING.format(file))
    try:
        return np.frombuffer(gzip.open(file).read(), np.uint8, offset=header)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MissingData(f"{file} is damaged ({error}): take it anew") from error


def write_drawings(folder: Path, side: int, images: int, seed: int = 0) -> None:
    """Writes drawings of two curves and two discs: class 1 if one curve joins the discs, class 0 if none does.

    After Linsley et al. 2018, "Learning long-range spatial dependencies with horizontal gated recurrent units", with
    one distractor. A tenth as many images again are for validation, and as many for the test.

    Args:
        folder: Where to write.
        side: Height and width of an image, in pixels.
        images: How many images are for training.
        seed: Seed of the drawings.
    """
    generator = np.random.default_rng([seed, side])
    for split, count in (("train", images), ("validation", images // 10), ("test", images // 10)):
        numbers = tqdm(range(count), f"drawing {split}", leave=False, disable=not sys.stderr.isatty())
        own = ((draw(side, bool(i % 2), generator), str(i % 2)) for i in numbers)
        _write(own, folder / split)


def draw(side: int, joined: bool, generator: np.random.Generator) -> Image.Image:
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


def _write(samples: Iterator[tuple[Image.Image, str]], folder: Path) -> None:
    for i, (image, label) in enumerate(samples):
        own = folder / label
        own.mkdir(parents=True, exist_ok=True)
        image.save(own / f"{i:05d}.png")
