"""Measures how fast the models of the experiments train and run, on one thread, by benchmark_throughput.py.

    python -m experiments.speed --output results

Nothing else should run meanwhile. The tables of experiments.report take their times from OUTPUT/speed.
"""

import argparse
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Optional

import benchmark_throughput
from experiments.rows import main_rows, pathfinder_rows
from experiments.run import only_one
from mrconvnext.training.arguments import positive
from mrconvnext.training.errors import UserError


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each model (default: %(default)s)")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        with only_one(args.output):
            os.chdir(args.output)  # what is written names paths relative to it
            return measure(args.rounds)
    except UserError as error:
        print(f"experiments.speed: {error}", file=sys.stderr)
        return 2


def measure(rounds: int) -> int:
    """Measures the models of each size in turns, and returns the exit status."""
    rows = [row for row in (*main_rows(), *pathfinder_rows()) if row.seed == 0 and not row.group.startswith("before")]
    for _, own in groupby(rows, lambda row: row.group):
        models = {row.name: row for row in own}
        first = models["ConvNeXt"]
        size, batch = first.arguments.img_size, first.arguments.global_batch
        command = ["--models", *(row.spec for row in models.values()), "--reference", first.spec, "--threads", "1"]
        command += ["--img-sizes", str(size), "--batch-sizes", str(batch), "--rounds", str(rounds)]
        for name, more in (("deployed", ()), ("training", ("--train",))):
            folder = Path("speed") / f"{name}-{size}"
            if status := benchmark_throughput.main([*command, *more, "--output", str(folder)]):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
