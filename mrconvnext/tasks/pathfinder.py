"""Pathfinder: pictures of dashed snakes, with two round markers on the ends of one snake, or of two.

The algorithm is that of Linsley et al. (2018, arXiv 1805.08315), the parameters are those of Long Range Arena (Tay et
al., 2021, arXiv 2011.04006). Many pictures grow at once, paddle by paddle. Two things differ: two target snakes never
cross, and distractors keep away from the last paddles of both; the published generator lets them, where it takes the
tip of a growing snake for free.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .generation import SPLITS, check_request, ordered_blocks, whole_files
from .paddles import PARAMETERS, Stamp, Tables, marker, tables
from .snakes import Places, Snakes, grow_distractor, grow_targets

SIZES = {"train": 160_000, "validation": 20_000, "test": 20_000}

# Pictures of a block.
_BLOCK = 256


@dataclass(frozen=True)
class Pictures:
    """Pictures and how they came about; coordinates are row and column.

    Attributes:
        images: (N, side, side) bytes.
        labels: (N,) bytes, 1 if both markers are on one snake.
        starts: (N, 2, 2), where the target snakes start.
        tips: (N, 2, 14, 2), the tips of their paddles; that of a first one is its start.
        markers: (N, 2, 2), the centres of the markers: at a start and at a last tip.
        distractors: (N,), how many of the others found a place.
        margins: (N,)
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    starts: Places
    tips: Places
    markers: Places
    distractors: Places
    margins: Places


def files(split: str) -> tuple[str, str]:
    """Returns the names of a split's files: pictures and labels."""
    return f"{split}_images.npy", f"{split}_labels.npy"


def generate(
    folder: Path,
    side: int,
    sizes: Mapping[str, int] = SIZES,
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes `train_images.npy`, bytes (N, side, side), `train_labels.npy`, and so on, whole or not at all.

    The files depend on `side`, `sizes` and `seed` alone.

    Args:
        folder: Where to; it is made.
        side: 32, 64 or 128, which is Path-X.
        sizes: Number of pictures by "train", "validation" and "test".
        seed: Of the random numbers, at least 0.
        processes: How many generate.
        progress: Is called with the number of pictures written since its last call.

    Raises:
        ValueError: If side, sizes, seed or processes are out of range.
        OSError: If the files can't be written.
    """
    check_request(sizes, seed, processes)
    if side not in PARAMETERS:
        raise ValueError(f"side must be one of {', '.join(map(str, PARAMETERS))}, got {side}")
    blocks = ordered_blocks(functools.partial(_block, side, seed), processes)
    names = [name for split in SPLITS for name in files(split)]
    with contextlib.closing(blocks), whole_files(folder, names) as paths:
        made = _Source(blocks)
        for split, path, label_path in zip(SPLITS, paths[::2], paths[1::2]):
            shape = (sizes[split], side, side)
            images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            labels = np.empty(sizes[split], dtype=np.uint8)
            for start in range(0, len(labels), _BLOCK):
                own = slice(start, min(start + _BLOCK, len(labels)))
                images[own], labels[own] = made.take(own.stop - own.start)
                if progress:
                    progress(own.stop - own.start)
            images.flush()
            with open(label_path, "wb") as file:
                np.save(file, labels)


Labelled = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class _Source:
    """Pictures and labels out of blocks, as many as are asked for."""

    def __init__(self, blocks: Iterator[Labelled]) -> None:
        self._blocks = blocks
        self._images, self._labels = next(blocks)

    def take(self, count: int) -> Labelled:
        """Returns the next pictures and their labels."""
        while len(self._labels) < count:
            images, labels = next(self._blocks)
            self._images, self._labels = np.concatenate([self._images, images]), np.concatenate([self._labels, labels])
        taken = self._images[:count], self._labels[:count]
        self._images, self._labels = self._images[count:], self._labels[count:]
        return taken


def _block(side: int, seed: int, block: int) -> Labelled:
    made = pictures(side, seed, block)
    return made.images, made.labels


def pictures(side: int, seed: int, block: int) -> Pictures:
    """Returns the pictures of one block: always the same for one side, seed and number."""
    rng = np.random.default_rng([seed, side, block])
    labels = rng.integers(2, size=_BLOCK).astype(np.uint8)
    margins = rng.choice(PARAMETERS[side].margins, size=_BLOCK)
    # In the order of margins, each with tables of its own; then back.
    groups = [np.flatnonzero(margins == margin) for margin in PARAMETERS[side].margins]
    parts = [
        _draw_pictures(rng, tables(side, margin), labels[group], margin)
        for margin, group in zip(PARAMETERS[side].margins, groups)
        if len(group)
    ]
    order = np.argsort(np.concatenate(groups))
    return Pictures(
        **{own.name: np.concatenate([getattr(part, own.name) for part in parts])[order] for own in fields(Pictures)}
    )


def _draw_pictures(rng: np.random.Generator, table: Tables, labels: NDArray[np.uint8], margin: int) -> Pictures:
    """Returns a picture for each label."""
    own = PARAMETERS[table.side]
    count = len(labels)
    frames, targets = grow_targets(rng, table, count)
    others = [grow_distractor(rng, table, frames, number) for number in range(own.distractors)]

    first = rng.integers(2, size=count)
    last = np.where(labels == 1, first, 1 - first)
    rows = np.arange(count)
    markers = np.stack([targets.tips[rows, first, 0], targets.tips[rows, last, -1]], axis=1)

    canvas = np.zeros(frames.taken.shape, dtype=np.float32)
    for snake in range(2):
        _draw(canvas, table.ink, targets.part(snake), own.target_brightness)
    for other in others:
        _draw(canvas, table.ink, other, own.distractor_brightness)
    _draw(canvas, marker(table.side, table.stride), Snakes(markers, np.zeros_like(markers)), 1.0)
    return Pictures(
        images=_bytes(canvas, table),
        labels=labels,
        starts=table.pixels(targets.tips[:, :, 0]),
        tips=table.pixels(targets.tips),
        markers=table.pixels(markers),
        distractors=np.sum([other.directions[:, 0] >= 0 for other in others], axis=0),
        margins=np.full(count, margin),
    )


def _draw(canvas: NDArray[np.float32], stamp: Stamp, snakes: Snakes, brightness: float) -> None:
    """Draws a snake, or points, into each picture; where things meet the brighter is seen."""
    rows = np.arange(len(canvas))
    for tips, directions in zip(snakes.tips.T, snakes.directions.T):
        own = rows[directions >= 0]
        places = tips[own][:, None] + stamp.offsets[directions[own]]
        drawn = stamp.shades[directions[own]] * brightness
        canvas[own[:, None], places] = np.maximum(canvas[own[:, None], places], drawn)


def _bytes(canvas: NDArray[np.float32], table: Tables) -> NDArray[np.uint8]:
    """Returns the pictures without their borders, the brightest pixel of each at 255."""
    inside = slice(table.border, -table.border)
    images = canvas.reshape(-1, table.stride, table.stride)[:, inside, inside]
    return np.rint(images * (255 / images.max(axis=(1, 2), keepdims=True))).astype(np.uint8)
