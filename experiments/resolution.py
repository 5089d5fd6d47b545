"""How models trained at 32 px do at larger sizes, as they are and after a pass of tuning, as a table.

    python -m experiments.run --output results --groups "resolution 32" "resolution 48" "resolution 64"
    python -m experiments.resolution --output results --document docs/resolution.md

Evaluates the weights of the first command without training, at all sizes, and writes OUTPUT/resolution.csv; then the
table of the document that stands between the lines ``<!-- resolution -->`` and ``<!-- end -->``.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from experiments.report import (
    accuracies_of,
    load,
    read_lines,
    spread,
)
from experiments.rows import GOING_ON, LARGER_SIDES, before_resolution_row, resolution_rows
from experiments.run import commit, environment, now
from mrconvnext.benchmarking.report import with_table

SIDES = (32, *LARGER_SIDES)
COLUMNS = ("kernels", "img_size", "tuned", "seed", "top1", "hardware", "torch", "timm", "python", "commit", "date")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--document", type=Path, required=True, help="Markdown file whose table is written")
    args = parser.parse_args()
    if not (args.output / "results.csv").is_file():
        parser.error(f"--output: {args.output / 'results.csv'} is missing: run experiments.run")
    lines = [*evaluated(args.output), *tuned(args.output)]
    with open(args.output / "resolution.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        origin = {**environment(), "commit": commit(), "date": now()}
        writer.writerows({**line, **origin} for line in lines)
    args.document.write_text(with_table(args.document.read_text(), "resolution", table(lines)))
    return 0


@torch.no_grad()
def evaluated(output: Path) -> list[dict[str, Any]]:
    """Returns the accuracy of models trained at 32 px at each size, without training there."""
    lines = []
    cases = [(seed, name, side) for seed in range(3) for name in GOING_ON for side in SIDES]
    for seed, name, side in tqdm(cases, disable=not sys.stderr.isatty()):
        row = before_resolution_row(GOING_ON[name][0], seed)
        model = load(row, output)
        if side != 32 and name == "resampled kernels":
            model.set_input_size(side)
        config = resolve_data_config({"input_size": (3, side, side)}, model=model)
        images = ImageFolder(str(output / "data" / row.data / "test"), create_transform(**config))
        right = sum(int((model(x).argmax(-1) == target).sum()) for x, target in DataLoader(images, batch_size=250))
        lines.append(line(name, side, False, seed, 100 * right / len(images)))
    return lines


def tuned(output: Path) -> list[dict[str, Any]]:
    """Returns the accuracy of the same models after a pass of training at the larger sizes."""
    accuracies = accuracies_of(read_lines(output / "results.csv"))
    lines = []
    for row in resolution_rows():
        if row.start and str(row.seed) in accuracies[row.group, row.name]:
            side = int(row.group.removeprefix("resolution "))
            lines.append(line(row.name, side, True, row.seed, accuracies[row.group, row.name][str(row.seed)]))
    return lines


def line(name: str, side: int, is_tuned: bool, seed: int, top1: float) -> dict[str, Any]:
    return {"kernels": name, "img_size": side, "tuned": is_tuned, "seed": seed, "top1": round(top1, 2)}


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the table in Markdown: a row for each kind of kernels, a column for each size, as it is and tuned."""
    columns = [(side, is_tuned) for is_tuned in (False, True) for side in SIDES if side != 32 or not is_tuned]
    heads = [f"{side} px{', tuned' if is_tuned else ''}" for side, is_tuned in columns]
    rows = [["top-1, %", *heads], ["---"] * (1 + len(heads))]
    for name in GOING_ON:
        cells = []
        for side, is_tuned in columns:
            own = [x for x in lines if (x["kernels"], x["img_size"], x["tuned"]) == (name, side, is_tuned)]
            cells.append(spread([float(x["top1"]) for x in own], ".2f"))
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
