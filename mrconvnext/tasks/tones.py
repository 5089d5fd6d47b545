"""Tones: a second of a sound whose loudness swells at one of five rates, with one of two timbres.

Made for trials of another sampling rate: all of a tone lies below 400 Hz, so that every second sample of 2,000 a second
holds it too, but to a layer that counts positions its swells are then twice as fast, and another class's.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .generation import SPLITS, check_request, ordered_blocks, whole_files

SIZES = {"train": 4000, "validation": 500, "test": 1000}

RATE = 2000  # samples of a second, which is all of a tone
SWELLS = (4.0, 7.0, 11.0, 16.0, 22.0)  # a second
TIMBRES = ((1, 2, 3), (1, 3))  # multiples of the lowest frequency
CLASSES = len(SWELLS) * len(TIMBRES)

# Hz of the lowest frequency; deviation of the noise beside a loudness of at most 1.
LOWEST, NOISE = (60.0, 120.0), 0.3

_BLOCK = 250


def files(split: str) -> tuple[str, str]:
    """Returns the names of a split's files: sounds and labels."""
    return f"{split}_sounds.npy", f"{split}_labels.npy"


def generate(
    folder: Path,
    sizes: Mapping[str, int] = SIZES,
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes `train_sounds.npy`, 16 bits (N, 2000), `train_labels.npy`, and so on, whole or not at all.

    The files depend on `sizes` and `seed` alone; the arguments are those of `pathfinder.generate`.

    Raises:
        ValueError: If sizes, seed or processes are out of range.
        OSError: If the files can't be written.
    """
    check_request(sizes, seed, processes)
    names = [name for split in SPLITS for name in files(split)]
    with whole_files(folder, names) as paths:
        for number, split in enumerate(SPLITS):
            blocks = ordered_blocks(functools.partial(sounds, seed, number), processes)
            made = [next(blocks) for _ in range(-(-sizes[split] // _BLOCK))]
            blocks.close()
            for path, parts in zip(paths[2 * number :], zip(*made)):
                with open(path, "wb") as file:
                    np.save(file, np.concatenate(parts)[: sizes[split]])
            if progress:
                progress(sizes[split])


def sounds(seed: int, split: int, block: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Returns the tones of one block, (N, 2000), and their classes, 2 · swell + timbre."""
    rng = np.random.default_rng([seed, split, block])
    labels = rng.integers(CLASSES, size=_BLOCK).astype(np.uint8)
    time = np.arange(RATE) / RATE
    swell = np.asarray(SWELLS)[labels // 2] * rng.uniform(0.97, 1.03, _BLOCK)
    loudness = 1 + 0.8 * np.sin(2 * np.pi * (swell[:, None] * time + rng.uniform(size=(_BLOCK, 1))))
    lowest = rng.uniform(*LOWEST, size=_BLOCK)
    wave = np.zeros((_BLOCK, RATE))
    for multiple in max(TIMBRES, key=len):
        has = np.array([multiple in timbre for timbre in TIMBRES])[labels % 2]
        phase = multiple * lowest[:, None] * time + rng.uniform(size=(_BLOCK, 1))
        wave += has[:, None] / multiple * np.sin(2 * np.pi * phase)
    wave *= loudness / np.abs(wave * loudness).max(axis=1, keepdims=True)
    wave = rng.uniform(0.3, 1, (_BLOCK, 1)) * (wave + NOISE * rng.standard_normal(wave.shape))
    return np.rint(wave.clip(-2, 2) * 16_000).astype(np.int16), labels
