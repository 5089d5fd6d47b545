"""Writes random JPEGs in ImageNet's folder layout, to try a training run with before the real data is there.

    python scripts/random_imagenet.py imagenet --per-class 2
    python train_imagenet.py --data-dir imagenet --recipe imagenet --epochs 1 --warmup-epochs 0 --global-batch 64 \
        --log-interval 1 --output trial
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write train/ and validation/")
    parser.add_argument("--classes", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--per-class", type=int, default=1, help="training images of a class (default: %(default)s)")
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    for split, count in (("train", args.per_class), ("validation", 1)):
        for number in range(args.classes):
            folder = args.folder / split / f"n{number:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                # Coarse noise compresses about as photographs do.
                pixels = generator.integers(low=0, high=256, size=(25, 32, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize(size=(500, 375), resample=Image.Resampling.BICUBIC)
                image.save(folder / f"{i}.JPEG")


if __name__ == "__main__":
    main()
