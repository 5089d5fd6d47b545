"""ListOps: nested operations on lists of digits, of which the result is to be told.

The distribution is that of Long Range Arena (Tay et al., 2021, section 2.1, arXiv 2011.04006), which makes the lists of
Nangia and Bowman (2018, arXiv 1804.06028) longer; so is the form of the files.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .generation import SPLITS, check_request, ordered_blocks, whole_files

OPERATORS = ("MIN", "MAX", "MED", "SM")
# The largest depth, that of the whole expression being 1; there all nodes are digits.
DEPTH = 10
LEAF_PROBABILITY = 0.75
FEWEST_ARGUMENTS, MOST_ARGUMENTS = 2, 10
# Lengths between these, themselves left out: a digit counts 1, an operation its arguments and 2, for "[MAX" and "]".
SHORTEST, LONGEST = 500, 2000

SIZES = {"train": 96_000, "validation": 2_000, "test": 2_000}
FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
HEADER = "Source\tTarget"
# What the published files end their lines with.
NEWLINE = "\r\n"

# Expressions that are begun in one block, of which about one in twelve is kept.
_ATTEMPTS = 8192

Example = tuple[str, int]


def generate(
    folder: Path,
    sizes: Mapping[str, int] = SIZES,
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv`, whole or not at all.

    The files depend on `sizes` and `seed` alone. No expression is there twice.

    Args:
        folder: Where to; it is made.
        sizes: Number of expressions by "train", "validation" and "test".
        seed: Of the random numbers, at least 0.
        processes: How many generate.
        progress: Is called with the number of expressions written since its last call.

    Raises:
        ValueError: If sizes, seed or processes are out of range.
        OSError: If the files can't be written.
    """
    check_request(sizes, seed, processes)
    blocks = ordered_blocks(functools.partial(examples, seed), processes)
    with contextlib.closing(blocks), whole_files(folder, [FILES[split] for split in SPLITS]) as paths:
        distinct = _distinct(itertools.chain.from_iterable(blocks))
        for split, path in zip(SPLITS, paths):
            _write(path, itertools.islice(distinct, sizes[split]), progress)


def examples(seed: int, block: int) -> list[Example]:
    """Returns the expressions of one block and their values: always the same for one seed and one number."""
    levels = _grow(np.random.default_rng([seed, block]), _ATTEMPTS)
    return list(zip(_texts(levels), _values(levels)))


def _distinct(pairs: Iterable[Example]) -> Iterator[Example]:
    """Leaves out expressions that were there before."""
    seen: set[bytes] = set()
    for text, value in pairs:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()  # the texts would take half a gigabyte
        if digest not in seen:
            seen.add(digest)
            yield text, value


def _write(path: Path, pairs: Iterable[Example], progress: Callable[[int], object] | None) -> None:
    """Writes a file of Long Range Arena's form."""
    with open(path, "w", encoding="ascii", newline="") as file:
        file.write(HEADER + NEWLINE)
        for text, value in pairs:
            file.write(f"{text}\t{value}{NEWLINE}")
            if progress:
                progress(1)


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth, of all trees; those of one tree, and of one parent, follow each other.

    Attributes:
        trees: The tree of each node.
        arguments: Number of arguments, 0 for a digit.
        operators: Index in `OPERATORS`; of no meaning for a digit.
        digits: 0 to 9; of no meaning for an operation.
    """

    trees: NDArray[np.int64]
    arguments: NDArray[np.int64]
    operators: NDArray[np.int64]
    digits: NDArray[np.int64]

    def of(self, kept: NDArray[np.bool_]) -> "_Level":
        """Returns the nodes of the trees that are marked."""
        chosen = kept[self.trees]
        return _Level(self.trees[chosen], self.arguments[chosen], self.operators[chosen], self.digits[chosen])


def _grow(rng: np.random.Generator, attempts: int) -> list[_Level]:
    """Draws trees, depth by depth, and returns the levels of those whose length is in range.

    A tree that gets too long stops growing there: by then the nodes that are still to be drawn, of length 1 at least,
    have been counted.
    """
    trees = np.arange(attempts)
    lengths = np.zeros(attempts, dtype=np.int64)
    kept = np.ones(attempts, dtype=np.bool_)
    levels = []
    for depth in range(1, DEPTH + 1):
        level = _draw(rng, trees, deepest=depth == DEPTH)
        levels.append(level)
        lengths += _sums(trees, np.where(level.arguments > 0, 2, 1), attempts)
        kept &= lengths + _sums(trees, level.arguments, attempts) < LONGEST
        children = np.repeat(trees, level.arguments)
        trees = children[kept[children]]
    kept &= lengths > SHORTEST
    return [level.of(kept) for level in levels]


def _draw(rng: np.random.Generator, trees: NDArray[np.int64], deepest: bool) -> _Level:
    """Draws a node for each entry of `trees`."""
    count = len(trees)
    leaf = (rng.random(count) < LEAF_PROBABILITY) | deepest
    arguments = rng.integers(FEWEST_ARGUMENTS, MOST_ARGUMENTS, size=count, endpoint=True)
    operators = rng.integers(len(OPERATORS), size=count)
    return _Level(trees, np.where(leaf, 0, arguments), operators, rng.integers(10, size=count))


def _sums(trees: NDArray[np.int64], numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Returns the sum of the nodes' numbers for each of `count` trees."""
    return np.bincount(trees, weights=numbers, minlength=count).astype(np.int64)


def _values(levels: list[_Level]) -> list[int]:
    """Returns the value of each tree, from the deepest nodes up."""
    values = np.zeros(0, dtype=np.int64)
    for level in reversed(levels):
        operation = level.arguments > 0
        results = _apply(level.operators[operation], level.arguments[operation], values)
        values = level.digits.copy()
        values[operation] = results
    return values.tolist()


def _apply(operators: NDArray[np.int64], arguments: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the results of operations whose arguments' values follow each other."""
    rows = np.arange(len(operators))
    given = np.arange(MOST_ARGUMENTS) < arguments[:, None]
    table = np.full(given.shape, 10)  # more than every digit, so that what is missing is sorted to the end
    table[given] = values
    table.sort(axis=1)
    smallest, largest = table[:, 0], table[rows, arguments - 1]
    median = (table[rows, (arguments - 1) // 2] + table[rows, arguments // 2]) // 2
    total = np.where(given, table, 0).sum(axis=1) % 10
    return np.stack([smallest, largest, median, total])[operators, rows]


def _texts(levels: list[_Level]) -> list[str]:
    """Returns the text of each tree: `( ( ( [MAX 3 ) 4 ) ] )`, from the deepest nodes up.

    The round brackets pair the operator and its first argument, that pair and the second one, and so on to "]".
    """
    texts: list[str] = []
    for level in reversed(levels):
        inner = iter(texts)
        texts = [
            f"{'( ' * (count + 1)}[{OPERATORS[operator]} {' ) '.join(itertools.islice(inner, count))} ) ] )"
            if count
            else str(digit)
            for count, operator, digit in zip(level.arguments.tolist(), level.operators.tolist(), level.digits.tolist())
        ]
    return texts
