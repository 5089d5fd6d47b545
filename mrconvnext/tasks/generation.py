"""What both generators share: the same samples from however many processes, and files that are whole or not there."""

import contextlib
import itertools
import multiprocessing
import os
import threading
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
        given = ", ".join(f"{split} {count}" for split, count in sizes.items())
        raise ValueError(f"there must be at least 1 for each of {', '.join(SPLITS)}, got {given}")
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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=processes, mp_context=context, initializer=_end_with_parent) as executor:
        waiting = deque(executor.submit(make, number) for number in range(2 * processes))
        try:
            for number in itertools.count(2 * processes):
                yield waiting.popleft().result()
                waiting.append(executor.submit(make, number))
        finally:
            executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Has a process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def whole_files(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Gives paths to write to, which take the files' places at the end of the block, all of them or none.

    Raises:
        OSError: If the folder or a file can't be written. What was there before is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f".writing-{name}" for name in names]  # what a killed process leaves is written over
    try:
        yield paths
        for path, name in zip(paths, names):
            os.replace(path, folder / name)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
