"""Pictures for the examples: pieces of two photographs with handwritten digits painted on. All from scikit-learn."""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

PHOTOGRAPHS = [Image.fromarray(image) for image in load_sample_images().images]
DIGITS = load_digits().images


def scene(side: int, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a picture (3, side, side) from 0 to 1, where the digit's strokes are (side, side), and its box (4)."""
    photograph = PHOTOGRAPHS[generator.integers(len(PHOTOGRAPHS))]
    cut = generator.integers(200, min(photograph.size))
    left, top = (generator.integers(full - cut) for full in photograph.size)
    picture = photograph.crop((left, top, left + cut, top + cut)).resize((side, side))
    size = round(side * generator.uniform(0.25, 0.5))
    digit = Image.fromarray((DIGITS[generator.integers(len(DIGITS))] * 15.9).astype("uint8")).resize((size, size))
    strokes = Image.new("L", (side, side))
    corner = tuple(int(generator.integers(side - size)) for _ in range(2))
    strokes.paste(digit, corner)
    colour = tuple(int(value) for value in generator.integers(256, size=3))
    picture.paste(colour, mask=strokes)
    mask = np.asarray(strokes) > 100
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
    return torch.from_numpy(np.asarray(picture) / 255).permute(2, 0, 1).float(), torch.from_numpy(mask), box


def scenes(side: int, count: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns so many scenes, drawn by a seed."""
    generator = np.random.default_rng(seed)
    return [scene(side, generator) for _ in range(count)]
