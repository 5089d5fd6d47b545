"""The tones: their swells and timbres measured, and the same bytes from however many processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mrconvnext.tasks import DataError, open_task, tones

SIZES = {"train": 60, "validation": 20, "test": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tmp_path_factory.mktemp("tones")
    tones.generate(own, SIZES, seed=3)
    return own


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_swells_and_timbres_are_those_of_the_class() -> None:
    sounds, labels = tones.sounds(seed=0, split=0, block=0)
    spectrum = np.abs(np.fft.rfft(sounds.astype(np.float64)))  # a bin for each Hz
    loudness = np.abs(np.fft.rfft(np.abs(sounds.astype(np.float64)), axis=1))[:, 2:30]
    swells = np.array([tones.SWELLS[label // 2] for label in labels])
    measured = 2 + loudness.argmax(axis=1)
    assert (np.abs(measured - swells) <= 1).mean() > 0.9
    low = 60 + spectrum[:, 60:121].argmax(axis=1)
    second = np.array([own[2 * f - 2 : 2 * f + 3].max() for own, f in zip(spectrum, low)])
    assert np.median(second[labels % 2 == 0]) > 3 * np.median(second[labels % 2 == 1])


def test_every_second_sample_holds_all_of_a_tone() -> None:
    sounds, _ = tones.sounds(seed=0, split=0, block=0)
    power = np.abs(np.fft.rfft(sounds.astype(np.float64))) ** 2
    signal = power[:, :420].mean(axis=1)
    assert (power[:, 450:].mean(axis=1) < 0.5 * signal).all()  # noise alone


def test_classes_are_balanced() -> None:
    labels = np.concatenate([tones.sounds(0, 0, block)[1] for block in range(20)])
    assert (np.abs(np.bincount(labels, minlength=tones.CLASSES) / len(labels) - 0.1) < 0.02).all()


@pytest.mark.slow
def test_same_bytes_from_several_processes(folder: Path, tmp_path: Path) -> None:
    tones.generate(tmp_path / "two", SIZES, seed=3, processes=2)
    assert contents(tmp_path / "two") == contents(folder)


def test_other_seeds_and_splits_are_other_tones(folder: Path, tmp_path: Path) -> None:
    tones.generate(tmp_path / "other", SIZES, seed=4)
    own, other = contents(folder), contents(tmp_path / "other")
    assert own["train_sounds.npy"] != other["train_sounds.npy"]
    assert own["validation_sounds.npy"] != own["test_sounds.npy"]


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_read_at_any_rate(folder: Path, rate: int) -> None:
    train, validation, test = open_task("tones", folder, rate=rate)
    assert [len(part) for part in (train, validation, test)] == [60, 20, 20]
    sound, label = train[5]
    assert sound.shape == (-(-2000 // rate), 1) and sound.dtype == torch.float32 and 0 <= label < 10
    assert torch.equal(sound, open_task("tones", folder)[0][5][0][::rate])


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_sounds.npy is missing, .* python -m mrconvnext.tasks tones FOLDER"):
        open_task("tones", tmp_path)
    for name in ("train", "validation", "test"):
        for file in tones.files(name):
            (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "test_sounds.npy").write_bytes(b"oak")
    with pytest.raises(DataError, match="test_sounds.npy is damaged"):
        open_task("tones", tmp_path)
