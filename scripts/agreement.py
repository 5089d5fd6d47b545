"""How often a model under bfloat16 autocast says what it says in float32, of real images.

    python scripts/agreement.py run/fused photos                # class folders, as for mrconvnext evaluate
    python scripts/agreement.py run/trained photos --count 500

Prints the share of images with the same most probable class, and the accuracy of both; the exit status is 1 if it is
less than 99 %. On a GPU where there is one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Subset

import mrconvnext  # noqa: F401
from mrconvnext.training.arguments import positive
from mrconvnext.training.datasets import class_folders
from mrconvnext.training.samples import Samples

LEAST = 99.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that mrconvnext.save wrote")
    parser.add_argument("photos", type=Path, help="folder with a folder of pictures for each class")
    parser.add_argument("--count", type=positive, default=1000, help="number of images (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(f"local-dir:{args.model}", pretrained=True).eval().to(device)
    images = class_folders(args.photos)
    samples = Samples(images, create_transform(**resolve_data_config(model=model)), seed=0, train=False)
    every = max(1, len(images) // args.count)
    keys: Any = [(0, index) for index in range(0, len(images), every)][: args.count]
    chosen = Subset(samples, keys)
    same = right = right_halved = 0
    for batch in DataLoader(chosen, batch_size=50):
        x, target = batch.image.to(device), batch.target.to(device)
        with torch.no_grad():
            expected = model(x).argmax(-1)
            with torch.autocast(device.type, torch.bfloat16):
                found = model(x).argmax(-1)
        same += int((found == expected).sum())
        right += int((expected == target).sum())
        right_halved += int((found == target).sum())
    shares = [100 * number / len(chosen) for number in (same, right, right_halved)]
    print(
        f"{len(chosen)} images on {device.type}: bfloat16 agrees with float32 on {shares[0]:.2f} %; "
        f"right are {shares[1]:.2f} % in float32, {shares[2]:.2f} % in bfloat16"
    )
    return int(shares[0] < LEAST)


if __name__ == "__main__":
    sys.exit(main())
