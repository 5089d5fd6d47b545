"""The parameters of Pathfinder's pictures, and what a paddle covers: tables, since paddles have few directions."""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Pictures are drawn so many times as large and made smaller.
ANTIALIASING = 2
# The published masks are antialiased, and two paddles collide if those of a pixel add up to 1.8: where all of it is in
# one mask and four fifths are in the other. Its centre is then so much inside.
WHOLLY, MOSTLY = 0.5, 0.25
# Directions that a snake's first paddle may have, one for each degree.
FIRST = 360


@dataclass(frozen=True)
class Parameters:
    """What the pictures of one side are like, lengths in pixels.

    Attributes:
        margins: Half of what is free between paddles; one of them for each picture.
        seed_distance: Between the starts of the two target snakes.
        marker_radius: Of the round markers.
        paddle_length: Of the line that is a paddle.
        thickness: Of that line.
        continuity: How straight snakes are; the largest turn is a right angle divided by it.
        distractors: Number of other snakes, of which those are left out that find no place.
        target_brightness: Of the paddles of target snakes; markers have 1.
        distractor_brightness: Of the others.
    """

    margins: tuple[int, ...]
    seed_distance: int
    marker_radius: float
    paddle_length: int
    thickness: float
    continuity: float
    distractors: int
    target_brightness: float
    distractor_brightness: float


# Of Long Range Arena (Tay et al., 2021, arXiv 2011.04006). Its distractors are 20 // 4, 22 / (14 / 3) and 35 / (14 / 3)
# snakes, begun as long as there are fewer, of 4 and twice 14 / 3 paddles, of which whole ones are drawn. Its contrast
# at side 32 is 2, for targets times 0.75, to make up for lines that are thinner than a pixel.
PARAMETERS = {
    32: Parameters((1,), 7, 1.5, 2, 0.5, 1.0, 5, 1.5, 2.0),
    64: Parameters((1,), 12, 2.5, 5, 1.0, 1.8, 5, 0.8, 0.8),
    128: Parameters((2, 3), 20, 3.0, 5, 1.5, 1.8, 8, 0.9, 0.9),
}
TARGET_PADDLES = 14
DISTRACTOR_PADDLES = 4


@dataclass(frozen=True)
class Stamp:
    """Pixels as offsets in a flat frame, for each of T directions of a paddle; short rows repeat their first pixel.

    Attributes:
        offsets: (T, P), relative to the paddle's tip.
        shades: (T, P), 0 to 1, how much of the pixel is covered.
    """

    offsets: NDArray[np.int64]
    shades: NDArray[np.float32]


@dataclass(frozen=True)
class Tables:
    """All about paddles of one side and margin, in frames with a border around the picture.

    Directions 0 to 359 are those of a snake's first paddle, in degrees; the others are those of the K pixels on the
    circle around a pivot that a next paddle's tip may lie on. A paddle reaches from its tip back.

    Attributes:
        side: Of the picture.
        margin: Of the paddles.
        border: Of the frame, so wide that no paddle that is tried leaves it.
        angles: (T,) in radians, of both kinds.
        tips: (K,) offsets of next tips from a pivot.
        weights: (T, K): how likely a next tip is, by the direction of the paddle before.
        pivots: (T,) offsets from a pivot to the next one, or from the start of a first paddle to the pivot.
        core: What must be free for a paddle.
        cover: What it takes then.
        around: Where it leaves no place for the tips of others, a margin farther.
        ink: What is drawn of it.
    """

    side: int
    margin: int
    border: int
    angles: NDArray[np.float64]
    tips: NDArray[np.int64]
    weights: NDArray[np.float64]
    pivots: NDArray[np.int64]
    core: Stamp
    cover: Stamp
    around: Stamp
    ink: Stamp

    @property
    def stride(self) -> int:
        """The side of the frame."""
        return self.side + 2 * self.border

    def flat(self, y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns pixels of the picture as places in the frame."""
        return (y + self.border) * self.stride + x + self.border

    def pixels(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns places in the frame as pixels (..., 2) of the picture: row and column."""
        return np.stack(np.divmod(places, self.stride), axis=-1) - self.border


@functools.cache
def tables(side: int, margin: int) -> Tables:
    """Returns the tables for pictures of one side and margin."""
    own = PARAMETERS[side]
    reach = own.paddle_length + margin
    border = 2 * reach + 4
    stride = side + 2 * border
    circle = _circle(reach)
    turned = np.arctan2(circle[:, 0], circle[:, 1])
    angles = np.concatenate([np.deg2rad(np.arange(FIRST)), turned])
    steps = np.where(np.arange(len(angles)) < FIRST, reach, own.paddle_length + 2 * margin)
    offsets = np.rint(steps * np.stack([np.sin(angles), np.cos(angles)])).astype(np.int64)
    turns = np.abs((turned - angles[:, None] + np.pi) % (2 * np.pi) - np.pi)
    half = own.thickness / 2

    def covers(distance: float) -> Stamp:
        return _stamp([_covered(angle, own.paddle_length, distance, border) for angle in angles], stride)

    return Tables(
        side=side,
        margin=margin,
        border=border,
        angles=angles,
        tips=circle @ (stride, 1),
        weights=np.cos(np.minimum(own.continuity * turns, np.pi / 2)) ** 2,
        pivots=offsets[0] * stride + offsets[1],
        core=covers(margin + half - WHOLLY),
        cover=covers(margin + half - MOSTLY),
        around=covers(2 * margin + half),
        ink=_stamp([_drawn(angle, own.paddle_length, half, reach + 2) for angle in angles], stride),
    )


def marker(side: int, stride: int) -> Stamp:
    """Returns a round marker (1, P) around its centre."""
    radius = PARAMETERS[side].marker_radius
    return _stamp([_drawn(0.0, 0, radius, int(radius) + 2)], stride)


def _circle(radius: int) -> NDArray[np.int64]:
    """Returns the pixels (K, 2) that a circle goes through, as steps of a pixel along it find them."""
    angles = np.arange(0, 2 * np.pi, 1 / radius)
    return np.unique(np.rint(radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)).astype(np.int64), axis=0)


def _distances(y: NDArray[np.float64], x: NDArray[np.float64], angle: float, length: float) -> NDArray[np.float64]:
    """Returns how far points are from a line that reaches from 0 back, against `angle`."""
    along = np.clip(y * -np.sin(angle) + x * -np.cos(angle), a_min=0, a_max=length)
    distances: NDArray[np.float64] = np.hypot(y + along * np.sin(angle), x + along * np.cos(angle))
    return distances


def _covered(angle: float, length: float, distance: float, radius: int) -> NDArray[np.float32]:
    """Returns 1 at the pixels (2 · radius + 1)² that are nearer to a line than `distance`, else 0."""
    places = np.arange(-radius, radius + 1, dtype=np.float64)
    return (_distances(places[:, None], places[None], angle, length) <= distance).astype(np.float32)


def _drawn(angle: float, length: float, half: float, radius: int) -> NDArray[np.float32]:
    """Returns the pixels (2 · radius + 1)² of a line of thickness 2 · half, antialiased."""
    side = 2 * radius + 1
    places = (np.arange(side * ANTIALIASING) + 0.5) / ANTIALIASING - side / 2
    fine = _distances(places[:, None], places[None], angle, length) <= half
    image = Image.fromarray(fine.astype(np.uint8) * 255).resize(size=(side, side), resample=Image.Resampling.LANCZOS)
    return (np.asarray(image) / 255).astype(np.float32)


def _stamp(pictures: list[NDArray[np.float32]], stride: int) -> Stamp:
    """Returns the pixels of square pictures that aren't 0, around their centres."""
    widest = max(np.count_nonzero(picture) for picture in pictures)
    offsets, shades = [], []
    for picture in pictures:
        places = np.argwhere(picture)
        values = picture[tuple(places.T)]
        own = (places - picture.shape[0] // 2) @ (stride, 1)
        missing = widest - len(own)
        offsets.append(np.concatenate([own, np.repeat(own[:1], missing)]))
        shades.append(np.concatenate([values, np.repeat(values[:1], missing)]))
    return Stamp(np.stack(offsets), np.stack(shades))
