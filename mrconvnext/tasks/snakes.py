"""How the snakes of Pathfinder grow: in many pictures at once, paddle by paddle, each where it is free."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .paddles import DISTRACTOR_PADDLES, FIRST, PARAMETERS, TARGET_PADDLES, Tables

# Pairs of snakes that are begun at once, until enough have grown to their length.
_BEGUN = 1024
# What is tried until a paddle, or a distractor, is given up.
_PADDLE_TRIALS = 3
_DISTRACTOR_TRIALS = 5
# Places that are tried for a distractor's first paddle.
_SEED_TRIALS = 64

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Snakes:
    """Paddles (N, …, paddles) of many pictures.

    Attributes:
        tips: Places in the frame.
        directions: Numbers in the tables, −1 where there is no snake.
    """

    tips: Places
    directions: Places

    def part(self, number: int) -> "Snakes":
        """Returns those of one number in the middle."""
        return Snakes(self.tips[:, number], self.directions[:, number])


@dataclass(frozen=True)
class Frames:
    """What is taken in many pictures, and in borders around them.

    Attributes:
        taken: (N, stride²), 0 where it is free, 1 at the border, else the number of the paddle that took it first.
        near: (N, stride²), where no tip may be: around all paddles, but not around the last one of a growing snake.
    """

    taken: NDArray[np.uint8]
    near: NDArray[np.bool_]

    def of(self, rows: Places) -> "Frames":
        """Returns those of some pictures."""
        return Frames(self.taken[rows], self.near[rows])


def _frames(table: Tables, count: int) -> Frames:
    """Returns frames with nothing but the border, to which a pixel at the picture's edge belongs."""
    taken = np.ones((count, table.stride, table.stride), dtype=np.uint8)
    near = np.ones(taken.shape, dtype=np.bool_)
    for frame, width in ((taken, 1), (near, 1 + table.margin)):
        inside = slice(table.border + width, -table.border - width)
        frame[:, inside, inside] = 0
    return Frames(taken.reshape(count, -1), near.reshape(count, -1))


def _number(snake: int, paddle: int) -> int:
    """Returns the number in frames of a paddle of target snake 0 or 1, or of a distractor, which are 2, 3, …"""
    return 2 + snake * TARGET_PADDLES + paddle


def grow_targets(rng: np.random.Generator, table: Tables, count: int) -> tuple[Frames, Snakes]:
    """Returns frames with two target snakes and these (count, 2, 14). Pairs that get stuck are begun anew."""
    begun: list[tuple[Frames, Snakes]] = []
    while sum(len(snakes.tips) for _, snakes in begun) < count:
        begun.append(_grow_pairs(rng, table))

    def joined(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(list(arrays))[:count]

    frames = Frames(joined(own.taken for own, _ in begun), joined(own.near for own, _ in begun))
    return frames, Snakes(joined(own.tips for _, own in begun), joined(own.directions for _, own in begun))


def _grow_pairs(rng: np.random.Generator, table: Tables) -> tuple[Frames, Snakes]:
    """Begins many pairs of snakes and returns those that grow to their full length, and their frames."""
    frames = _frames(table, _BEGUN)
    tips, directions = np.zeros((2, _BEGUN, 2, TARGET_PADDLES), dtype=np.int64)
    starts, headings = _starts(rng, table, _BEGUN)
    pivots = starts + table.pivots[headings]
    rows = np.arange(_BEGUN)
    for snake in range(2):
        tips[:, snake, 0] = starts[:, snake]
        directions[:, snake, 0] = _backwards(headings[:, snake])
        _take(frames, table, rows, tips[:, snake, 0], directions[:, snake, 0], _number(snake, 0))
    for paddle in range(1, TARGET_PADDLES):
        for snake in range(2):
            number = _number(snake, paddle)
            chosen = _next(rng, table, frames, rows, pivots[rows, snake], headings[rows, snake], number - 1)
            rows, chosen = rows[chosen >= 0], chosen[chosen >= 0]
            before = directions[rows, snake, paddle - 1]
            _keep_off(frames, table, rows, tips[rows, snake, paddle - 1], before)
            tips[rows, snake, paddle] = pivots[rows, snake] + table.tips[chosen]
            directions[rows, snake, paddle] = headings[rows, snake] = FIRST + chosen
            pivots[rows, snake] += table.pivots[FIRST + chosen]
            _take(frames, table, rows, tips[rows, snake, paddle], FIRST + chosen, number)
    for snake in range(2):
        _keep_off(frames, table, rows, tips[rows, snake, -1], directions[rows, snake, -1])
    return frames.of(rows), Snakes(tips[rows], directions[rows])


def _backwards(headings: Places) -> Places:
    """Returns the directions of first paddles, which reach from the start on while others reach from the tip back."""
    return (headings + FIRST // 2) % FIRST


def _starts(rng: np.random.Generator, table: Tables, count: int) -> tuple[Places, Places]:
    """Draws where two snakes start (count, 2), the seed distance apart, and their first directions in degrees.

    The first one's paddle lies so far inside that two seed distances are left on all sides.
    """
    own = PARAMETERS[table.side]
    distance = own.seed_distance
    headings = rng.integers(FIRST, size=(count, 2))
    reach = np.rint(own.paddle_length * _unit(table.angles[headings[:, 0]])).astype(np.int64)
    low, high = 2 * distance - np.minimum(reach, 0), table.side - 2 * distance - np.maximum(reach, 0)
    first = rng.integers(low, high)
    second = first + np.rint(distance * _unit(table.angles[rng.integers(FIRST, size=count)])).astype(np.int64)
    pixels = np.stack([first, second], axis=1)
    return table.flat(pixels[..., 0], pixels[..., 1]), headings


def _unit(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns steps (..., 2) of length 1: row and column."""
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1)


def _next(
    rng: np.random.Generator,
    table: Tables,
    frames: Frames,
    rows: Places,
    pivots: Places,
    headings: Places,
    own: int,
) -> Places:
    """Draws the next paddle of a snake in each picture: its number among the tips around the pivot, −1 if none fits.

    Args:
        rows: The pictures (N,) in `frames`.
        pivots: (N,), around which the tips lie.
        headings: (N,), the directions of the paddles before.
        own: The number of the paddle before, which may be touched.
    """
    closed = np.ones(256, dtype=np.bool_)
    closed[[0, own]] = False
    tips = pivots[:, None] + table.tips
    free = ~frames.near[rows[:, None], tips]
    weights = np.cumsum(table.weights[headings] * free, axis=1)
    total = weights[:, -1:]
    drawn = rng.random((len(rows), _PADDLE_TRIALS)) * total
    trials = (weights[:, None] <= drawn[..., None]).sum(axis=-1).clip(max=len(table.tips) - 1)
    covered = np.take_along_axis(tips, trials, axis=1)[..., None] + table.core.offsets[FIRST + trials]
    fits = ~closed[frames.taken[rows[:, None, None], covered]].any(axis=-1) & (total > 1e-4)
    chosen = np.take_along_axis(trials, fits.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(fits.any(axis=1), chosen, -1)


def _take(frames: Frames, table: Tables, rows: Places, tips: Places, directions: Places, number: int) -> None:
    """Marks what a paddle takes of what is free, in each of some pictures."""
    places = rows[:, None], tips[:, None] + table.cover.offsets[directions]
    before = frames.taken[places]
    frames.taken[places] = np.where(before == 0, number, before)


def _keep_off(frames: Frames, table: Tables, rows: Places, tips: Places, directions: Places) -> None:
    """Marks where a paddle leaves no place for tips, in each of some pictures."""
    frames.near[rows[:, None], tips[:, None] + table.around.offsets[directions]] = True


def _give_back(frames: Frames, table: Tables, rows: Places, tips: Places, directions: Places, first: int) -> None:
    """Frees what the paddles of a distractor took, the last one that there is; `first` is the number of its first."""
    for own_tips, own_directions in zip(tips.T, directions.T):
        places = rows[:, None], own_tips[:, None] + table.cover.offsets[own_directions]
        before = frames.taken[places]
        frames.taken[places] = np.where(before < first, before, 0)


def grow_distractor(rng: np.random.Generator, table: Tables, frames: Frames, number: int) -> Snakes:
    """Puts another snake in each picture, where it finds a place, and returns them (N, 4)."""
    snakes = Snakes(*np.full((2, len(frames.taken), DISTRACTOR_PADDLES), -1, dtype=np.int64))
    waiting = np.arange(len(frames.taken))
    for _ in range(_DISTRACTOR_TRIALS):
        grown = _grow_distractors(rng, table, frames, waiting, snakes, 2 + number)
        for tips, directions in zip(snakes.tips[grown].T, snakes.directions[grown].T):
            _keep_off(frames, table, grown, tips, directions)
        waiting = np.setdiff1d(waiting, grown)
    snakes.directions[waiting] = -1
    return snakes


def _grow_distractors(
    rng: np.random.Generator, table: Tables, frames: Frames, waiting: Places, snakes: Snakes, snake: int
) -> Places:
    """Begins a snake in each of some pictures and returns in which it grew to its length; from others it is gone.

    Args:
        waiting: The pictures.
        snakes: Where its paddles are noted.
        snake: Its number.
    """
    rows, starts, headings = _place(rng, table, frames.taken, waiting)
    pivots = starts + table.pivots[headings]
    snakes.tips[rows, 0], snakes.directions[rows, 0] = starts, _backwards(headings)
    _take(frames, table, rows, starts, _backwards(headings), _number(snake, 0))
    for paddle in range(1, DISTRACTOR_PADDLES):
        number = _number(snake, paddle)
        chosen = _next(rng, table, frames, rows, pivots, headings, number - 1)
        stuck = rows[chosen < 0]
        gone = snakes.tips[stuck, :paddle], snakes.directions[stuck, :paddle]
        _give_back(frames, table, stuck, *gone, first=_number(snake, 0))
        rows, pivots, chosen = rows[chosen >= 0], pivots[chosen >= 0], chosen[chosen >= 0]
        headings = FIRST + chosen
        snakes.tips[rows, paddle], snakes.directions[rows, paddle] = pivots + table.tips[chosen], headings
        _take(frames, table, rows, snakes.tips[rows, paddle], headings, number)
        pivots = pivots + table.pivots[headings]
    return rows


def _place(
    rng: np.random.Generator, table: Tables, taken: NDArray[np.uint8], waiting: Places
) -> tuple[Places, Places, Places]:
    """Draws the first paddle of a distractor in each of some pictures, uniformly where it is free.

    Returns:
        The pictures where one was found, and for these start and direction in degrees.
    """
    headings = rng.integers(FIRST, size=len(waiting))
    pixels = rng.integers(1, table.side - 1, size=(2, len(waiting), _SEED_TRIALS))
    starts = table.flat(pixels[0], pixels[1])
    covered = starts[..., None] + table.core.offsets[_backwards(headings)][:, None]
    free = (taken[waiting[:, None, None], covered] == 0).all(axis=-1)
    found = free.any(axis=1)
    chosen = np.take_along_axis(starts, free.argmax(axis=1)[:, None], axis=1)[:, 0]
    return waiting[found], chosen[found], headings[found]
