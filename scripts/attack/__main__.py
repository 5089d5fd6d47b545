"""Attacks runs of train_imagenet.py, the files that models are made of, and the layers.

    python -m scripts.attack                      # all parts: more than an hour on two cores
    python -m scripts.attack folders --count 20   # one, with so many cases

kills: runs are killed at random moments. operations: before each operation on their files. signals: they get SIGTERM
and SIGINT, at moments spread over them. crowds: two and three start at once in one folder. folders: those of finished
runs are damaged. files: weights and configurations are damaged or hostile, and go in by every way. layers: random ones
are compared with a direct sum in float64. models: so are random models.

A run that was attacked must end as one that never was: the same checkpoints, summary and published files, and no other
file; or say in one line why it can't. Files must give the model that was saved, or an error. Prints each finding and
the counts; the exit status is 1 if there are findings.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import conftest  # noqa: E402, F401  a Hub on loopback takes the place of the real one

from . import files, folders, kills, layers  # noqa: E402

# Each with the number of cases that it has unless --count says otherwise.
PARTS = {
    "kills": (kills.at_random_moments, 100),
    "operations": (kills.before_each_operation, 1000),
    "signals": (kills.by_signals, 26),
    "crowds": (kills.in_crowds, 2),
    "folders": (folders.damaged, 200),
    "files": (files.hostile, 200),
    "layers": (layers.random_layers, 2000),
    "models": (layers.random_models, 100),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--count", type=int, help="cases of each part (default: each has its own number)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}, but {', '.join(PARTS)}")
    findings = []
    for part in args.parts or PARTS:
        attack, count = PARTS[part]
        with tempfile.TemporaryDirectory() as folder:
            findings += attack(Path(folder), random.Random(args.seed), args.count or count)
    print("\n".join(findings))
    return min(len(findings), 1)


if __name__ == "__main__":
    sys.exit(main())
