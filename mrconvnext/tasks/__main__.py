"""Generates the data sets that no one need download.

python -m mrconvnext.tasks listops FOLDER
python -m mrconvnext.tasks pathfinder FOLDER --side 32
python -m mrconvnext.tasks tones FOLDER
"""

import argparse
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from . import listops, pathfinder, tones
from .generation import SPLITS
from .paddles import PARAMETERS

_logger = logging.getLogger("mrconvnext.tasks")

# Seconds between lines where there is no terminal for a bar.
PAUSE = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Generates a data set and returns the exit status: 0, or 2 after one line of what is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parser().parse_args(arguments)
    sizes = {split: getattr(args, split) for split in SPLITS}
    make: Callable[..., None] = tones.generate if args.task == "tones" else listops.generate
    if args.task == "pathfinder":
        make = functools.partial(pathfinder.generate, side=args.side)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with _Progress(sum(sizes.values())) as progress:
            make(folder=args.folder, sizes=sizes, seed=args.seed, processes=args.processes, progress=progress)
    except (OSError, ValueError) as error:
        _logger.error("%s: %s", args.task, error)
        return 2
    except KeyboardInterrupt:
        _logger.error("%s: interrupted, nothing was written", args.task)
        return 130
    _logger.info("%s: written to %s", args.task, args.folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mrconvnext.tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, sizes, text in (
        ("listops", listops.SIZES, "nested operations on lists of digits, 500 to 2,000 tokens"),
        ("pathfinder", pathfinder.SIZES, "pictures of dashed snakes; Path-X is --side 128"),
        ("tones", tones.SIZES, "sounds of a second, to be tried at other sampling rates"),
    ):
        own = tasks.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own.add_argument("folder", metavar="FOLDER", type=Path, help="where to; it is made")
        for split in SPLITS:
            own.add_argument(f"--{split}", metavar="N", type=int, default=sizes[split], help="how many")
        own.add_argument("--seed", type=int, default=0, help="of the random numbers; the files follow from it")
        own.add_argument("--processes", metavar="N", type=int, default=os.cpu_count() or 1, help="how many generate")
        if name == "pathfinder":
            own.add_argument("--side", type=int, choices=list(PARAMETERS), default=32, help="of the pictures")
    return parser


class _Progress:
    """A bar on a terminal, elsewhere a line now and then."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._next = time.monotonic() + PAUSE
        self._bar = tqdm(total=total, disable=None)  # which hides it where there is no terminal

    def __enter__(self) -> Callable[[int], None]:
        return self._add

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _add(self, count: int) -> None:
        self._bar.update(count)
        self._done += count
        if self._bar.disable and time.monotonic() >= self._next:
            _logger.info("%d of %d", self._done, self._total)
            self._next = time.monotonic() + PAUSE


if __name__ == "__main__":
    sys.exit(main())
