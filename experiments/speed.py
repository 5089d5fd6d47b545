"""Measures how fast the models of the experiments train and run, on one thread, by benchmark_throughput.py.

    python -m experiments.speed --output results

Nothing else should run meanwhile. The tables of experiments.report take their times from OUTPUT/speed.
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path

import benchmark_throughput
from experiments.rows import main_rows, pathfinder_rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model (default: %(default)s)")
    args = parser.parse_args()
    rows = [row for row in (*main_rows(), *pathfinder_rows()) if row.seed == 0 and not row.group.startswith("before")]
    for _, own in groupby(rows, lambda row: row.group):
        models = {row.name: row for row in own}
        first = models["ConvNeXt"]
        size, batch = first.arguments.img_size, first.arguments.global_batch
        command = ["--models", *(row.spec for row in models.values()), "--reference", first.spec, "--threads", "1"]
        command += ["--img-sizes", str(size), "--batch-sizes", str(batch), "--rounds", str(args.rounds)]
        for name, more in (("deployed", ()), ("training", ("--train",))):
            folder = args.output / "speed" / f"{name}-{size}"
            if status := benchmark_throughput.main([*command, *more, "--output", str(folder)]):
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
