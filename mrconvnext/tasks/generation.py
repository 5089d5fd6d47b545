"""What both generators share: the same samples from however many processes, and files that are whole or not there."""

import contextlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

SPLITS = ("train", "validation", "test")

Block = TypeVar("Block")


def check_request(sizes: Mapping[str, int], seed: int, processes: int) -> None:
    """Raises a ValueError if a generator is asked for what it can't make."""
    if set(sizes) != set(SPLITS) or min(sizes.values()) < 1:
        raise ValueError(f"sizes must give at least 1 for each of {', '.join(SPLITS)}, got {dict(sizes)}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")


def ordered_blocks(make: Callable[[int], Block], processes: int) -> Generator[Block, None, None]:
    """Gives make(0), make(1), … without end and in this order, whichever process is done first.

    Close it, or the processes stay.

    Args:
        make: Makes a block from its number; a function of a module, which other processes can import.
        processes: How many make blocks; 1 is this one.
    """
    if processes == 1:
        yield from map(make, itertools.count())
    # A forked process would share the locks of this one's threads, which PyTorch has.
    with ProcessPoolExecutor(max_workers=processes, mp_context=multiprocessing.get_context("spawn")) as executor:
        waiting = deque(executor.submit(make, number) for number in range(2 * processes))
        try:
            for number in itertools.count(2 * processes):
                yield waiting.popleft().result()
                waiting.append(executor.submit(make, number))
        finally:
            executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def whole_files(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Gives paths to write to, which take the files' places at the end of the block, all of them or none.

    Raises:
        OSError: If the folder or a file can't be written. What was there before is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f".{os.getpid()}.{name}" for name in names]
    try:
        yield paths
        for path, name in zip(paths, names):
            os.replace(path, folder / name)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
