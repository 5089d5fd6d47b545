"""The generator of Pathfinder: what lies where, labels, and that it is repeatable."""

import numpy as np
import pytest

from mrconvnext.tasks import __main__ as command
from mrconvnext.tasks import pathfinder
from mrconvnext.tasks.paddles import FIRST, PARAMETERS, TARGET_PADDLES, tables
from mrconvnext.tasks.pathfinder import Pictures, pictures
from mrconvnext.tasks.snakes import grow_targets

SIZES = {"train": 300, "validation": 7, "test": 5}


@pytest.fixture(scope="module", params=[32, 128])
def made(request) -> tuple[int, Pictures]:
    return request.param, pictures(request.param, seed=3, block=0)


def test_pictures_are_dark_with_bright_marks(made):
    side, own = made
    assert own.images.shape == (256, side, side) and own.images.dtype == np.uint8
    assert (own.images.max(axis=(1, 2)) == 255).all()
    bright = (own.images > 64).mean(axis=(1, 2))
    assert 0.03 < bright.min() and bright.max() < 0.3
    assert len(np.unique(own.images.reshape(256, -1), axis=0)) == 256


def test_snakes_start_the_seed_distance_apart_in_the_middle(made):
    side, own = made
    distance = PARAMETERS[side].seed_distance
    apart = np.linalg.norm(own.starts[:, 0] - own.starts[:, 1], axis=-1)
    assert np.abs(apart - distance).max() < 1
    assert own.starts[:, 0].min() >= 2 * distance and own.starts[:, 0].max() < side - 2 * distance


def test_paddles_follow_each_other(made):
    """A tip lies a length and a margin from its pivot, and that two margins and a length from the one before."""
    side, own = made
    assert own.tips.shape == (256, 2, TARGET_PADDLES, 2)
    steps = np.linalg.norm(np.diff(own.tips, axis=2), axis=-1)[:, :, 1:]
    longest = PARAMETERS[side].paddle_length + 2 * own.margins
    assert (steps.max(axis=(1, 2)) < longest + 3).all()
    assert (np.median(steps, axis=(1, 2)) > longest - 2).all()
    assert own.tips.min() >= 1 and own.tips.max() <= side - 2


def test_paddles_and_markers_are_drawn_where_they_are(made):
    side, own = made
    rows = np.arange(256)[:, None, None]
    brightest = own.images.reshape(256, -1).max(axis=1)[:, None, None]
    at_tips = np.max([own.images[rows, own.tips[..., 0] + y, own.tips[..., 1] + x] for y, x in around(1)], axis=0)
    assert (at_tips > 0.2 * brightest).all()
    markers = own.images[rows[..., 0], own.markers[..., 0], own.markers[..., 1]]
    target, other = PARAMETERS[side].target_brightness, PARAMETERS[side].distractor_brightness
    assert (markers >= 255 / max(target, other, 1) - 1).all()


def around(distance: int) -> list[tuple[int, int]]:
    places = range(-distance, distance + 1)
    return [(y, x) for y in places for x in places]


def test_labels_tell_whether_the_markers_are_on_one_snake(made):
    _, own = made
    starts_on = (own.markers[:, None, 0] == own.tips[:, :, 0]).all(axis=-1)
    ends_on = (own.markers[:, None, 1] == own.tips[:, :, -1]).all(axis=-1)
    assert (starts_on.sum(axis=1) == 1).all() and (ends_on.sum(axis=1) == 1).all()
    np.testing.assert_array_equal((starts_on & ends_on).any(axis=1), own.labels == 1)
    assert 0.35 < own.labels.mean() < 0.65 and 0.35 < starts_on[:, 0].mean() < 0.65


def test_target_snakes_keep_a_distance(made):
    _, own = made
    apart = np.linalg.norm(own.tips[:, 0, :, None] - own.tips[:, 1, None], axis=-1)
    assert (apart.min(axis=(1, 2)) > own.margins).all()


def test_distractors_find_a_place(made):
    side, own = made
    assert own.distractors.max() == PARAMETERS[side].distractors
    assert own.distractors.mean() > 0.6 * PARAMETERS[side].distractors
    assert sorted(set(own.margins)) == list(PARAMETERS[side].margins)


def test_side_64_grows():
    table = tables(64, 1)
    frames, snakes = grow_targets(np.random.default_rng(0), table, 2)
    tips = table.pixels(snakes.tips)
    assert tips.shape == (2, 2, TARGET_PADDLES, 2) and tips.min() >= 1 and tips.max() <= 62
    assert set(np.unique(frames.taken)) >= set(range(2 * TARGET_PADDLES + 2))


@pytest.mark.parametrize("side", PARAMETERS)
def test_turns_are_drawn_by_the_squared_cosine(side):
    table = tables(side, PARAMETERS[side].margins[0])
    heading = 60
    turns = table.angles[FIRST:] - np.deg2rad(heading)
    turns = np.abs(np.arctan2(np.sin(turns), np.cos(turns)))
    limit = np.pi / 2 / PARAMETERS[side].continuity
    expected = np.where(turns < limit, np.cos(PARAMETERS[side].continuity * turns) ** 2, 0)
    np.testing.assert_allclose(table.weights[heading], expected, atol=1e-12)


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_processes(tmp_path):
    def written(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}

    pathfinder.generate(tmp_path / "a", 32, SIZES, seed=1, processes=1)
    pathfinder.generate(tmp_path / "b", 32, SIZES, seed=1, processes=2)
    pathfinder.generate(tmp_path / "c", 32, SIZES, seed=2, processes=1)
    files = written("a")
    assert sorted(files) == sorted(name for split in SIZES for name in pathfinder.files(split))
    assert files == written("b")
    assert all(files[name] != written("c")[name] for name in files if name.endswith("_images.npy"))
    for split, size in SIZES.items():
        images, labels = (np.load(tmp_path / "a" / name) for name in pathfinder.files(split))
        assert images.shape == (size, 32, 32) and labels.shape == (size,)
        assert images.dtype == labels.dtype == np.uint8


def test_splits_follow_each_other(tmp_path):
    pathfinder.generate(tmp_path, 32, SIZES, seed=5)
    parts = [[np.load(tmp_path / name) for name in pathfinder.files(split)] for split in SIZES]
    expected = [pictures(32, 5, block) for block in range(2)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    np.testing.assert_array_equal(images, np.concatenate([own.images for own in expected])[:312])
    np.testing.assert_array_equal(labels, np.concatenate([own.labels for own in expected])[:312])


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match="side must be one of 32, 64, 128, got 48"):
        pathfinder.generate(tmp_path, 48, SIZES)
    with pytest.raises(ValueError, match="there must be at least 1 for each of train"):
        pathfinder.generate(tmp_path, 32, {"train": 1})
    assert not list(tmp_path.iterdir())


def test_command_writes_files(tmp_path):
    sizes = ["--train", "20", "--validation", "5", "--test", "5", "--processes", "1", "--seed", "4"]
    assert command.main(["pathfinder", str(tmp_path / "data"), "--side", "32", *sizes]) == 0
    assert np.load(tmp_path / "data" / "train_images.npy").shape == (20, 32, 32)
