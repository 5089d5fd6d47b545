"""Measures how fast the models of the experiments train, on one thread, by benchmark_throughput.py.

    python -m experiments.speed --output results

Nothing else should run meanwhile. The tables of experiments.report take their times from OUTPUT/speed, where
photographs.csv has the training steps of both kinds of EfficientNet-Lite0.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from torch.nn.functional import cross_entropy

import benchmark_throughput
from experiments.rows import LITE, Row, drawing_rows, main_rows, photograph_rows
from experiments.run import commit, environment, now, only_one
from mrconvnext.benchmarking.report import spread
from mrconvnext.training.arguments import positive
from mrconvnext.training.errors import UserError

BATCH = 16  # of photographs and emoji


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each model (default: %(default)s)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        with only_one(args.output):
            os.chdir(args.output)  # what is written names paths relative to it
            return measure(args.rounds) or measure_photographs(args.rounds)
    except UserError as error:
        print(f"experiments.speed: {error}", file=sys.stderr)
        return 2


def measure(rounds: int) -> int:
    """Measures the models of each size in turns, and returns the exit status."""
    rows = [row for row in (*main_rows(), *drawing_rows()) if row.seed == 0 and not row.group.startswith("before")]
    for _, own in groupby(sorted(rows, key=side_of), side_of):
        models = {row.name: row for row in own}
        first = models["ConvNeXt"]
        size, batch = first.arguments.img_size, first.arguments.global_batch
        command = ["--models", *(row.spec for row in models.values()), "--reference", first.spec, "--threads", "1"]
        command += ["--img-sizes", str(size), "--batch-sizes", str(batch), "--rounds", str(rounds)]
        command += ["--train", "--output", str(Path("speed") / f"training-{size}")]
        if status := benchmark_throughput.main(command):
            return status
    return 0


def measure_photographs(rounds: int) -> int:
    """Measures training steps of both networks of the photographs in turns, on images of their sizes and batch."""
    torch.set_num_threads(1)
    lines = []
    for side in dict.fromkeys(row.arguments.img_size for row in photograph_rows()):
        steps = {name: training_step(LITE[name], side) for name in LITE}
        times: dict[str, list[float]] = {name: [] for name in LITE}
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - start))
        first = times["EfficientNet-Lite0"]
        for name, own in times.items():
            line = {"model": name, "img_size": side, "batch_size": BATCH, **spread("ms", own)}
            lines.append(line | spread("ratio", [theirs / mine for theirs, mine in zip(first, own)]))
    origin = {**environment(), "threads": 1, "rounds": rounds, "commit": commit(), "date": now()}
    with open("speed/photographs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], *origin])
        writer.writeheader()
        writer.writerows({**line, **origin} for line in lines)
    return 0


def training_step(name: str, side: int) -> Callable[[], None]:
    """Returns a training step of a network on random images, which was taken once."""
    made_for: dict[str, Any] = {"img_size": side} if name == LITE["global kernels"] else {}
    model = timm.create_model(name, num_classes=2, **made_for).to(memory_format=torch.channels_last).train()
    images = torch.randn(BATCH, 3, side, side).to(memory_format=torch.channels_last)
    targets = torch.arange(BATCH) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), targets).backward()
        optimizer.step()

    step()
    return step


def side_of(row: Row) -> int:
    return row.arguments.img_size


if __name__ == "__main__":
    sys.exit(main())
