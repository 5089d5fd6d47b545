"""The images of a run: where they come from, in which batches, and what becomes of those that can't be read."""

import gc
import io
import logging
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import ALONE, MODEL, Process, evaluated, main, pack, write_images, write_shards
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from torch import nn

from mrconvnext.training.arguments import parse_args
from mrconvnext.training.datasets import Digits, open_data
from mrconvnext.training.errors import UserError
from mrconvnext.training.evaluation import evaluate
from mrconvnext.training.loaders import EvalBatches, TrainBatches
from mrconvnext.training.precision import Precision
from mrconvnext.training.recipes import choices
from mrconvnext.training.samples import NO_TARGET, Redrawn, Samples, UnreadableFiles

RUN = [*MODEL, "--global-batch", "10", "--epochs", "1", "--model-ema-decay", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five digits of each of three classes in both splits. Not to be changed."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, train=5, validation=5, classes=3)
    return folder


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    """A copy of them, to be changed."""
    return Path(shutil.copytree(images, tmp_path / "data"))


# Datasets


@pytest.fixture
def left_open() -> Iterator[None]:
    """Closes files that readers of tar files leave open, whose test ignores the warning."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("left_open")
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_of_class_folders(kind: str, data: Path) -> None:
    if kind == "tar":
        pack(data)
    else:
        (data / "validation").rename(data / "val")
    train, validation, classes, names = open_data(parse_args(["--data-dir", str(data), "--output", "x"]))
    assert classes == len(names) == 3 and len(train) == len(validation) == 15
    for split in (train, validation):
        samples = Samples(split, lambda image: image.size, seed=0, train=False)
        sizes, targets, unreadable = zip(*(samples[0, i] for i in range(15)))
        assert Counter(targets) == {0: 5, 1: 5, 2: 5} and set(sizes) == {(32, 32)} and set(unreadable) == {""}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("left_open")
def test_a_tar_file_is_not_open_before_workers_read_it(data: Path) -> None:
    pack(data)
    own = open_data(parse_args(["--data-dir", str(data), "--output", "x"]))
    choices("small", own, {})
    pickle.dumps(own.train)  # which an open file would refuse


class Rows(Reader):
    """Images in memory, as those of Hugging Face's data sets that have no files."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, format="png")
        file.seek(0)
        return file, index

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> None:
        return None


def test_images_without_files() -> None:
    samples = Samples(ImageDataset("", reader=Rows()), lambda image: image.size, seed=0, train=False)
    assert [samples[0, i] for i in range(3)] == [((32, 32), i, "") for i in range(3)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("left_open")
def test_images_of_a_stream(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", train=16, validation=6)
    options = ["--dataset", "wds/digits", "--data-dir", str(tmp_path / "data"), "--num-classes", "10"]
    data = open_data(parse_args([*options, "--output", "x"]))
    assert data.classes == 10 and len(data.train) == 16 and len(data.validation) == 6
    for split, train in ((data.train, True), (data.validation, False)):
        written = {image.resize((32, 32)).tobytes(): target for image, target in Digits(train).samples[: len(split)]}
        assert {image.tobytes(): target for image, target in split} == written


def keep_one_class(data: Path) -> None:
    for file in data.rglob("[12]/*.jpg"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda data: shutil.rmtree(data), [], ["--data-dir", "data", "does not exist"]),
        (lambda data: None, ["--val-split", "test"], ["data", "'test'"]),
        (lambda data: None, ["--num-classes", "7"], ["7", "3 classes"]),
        (lambda data: (data / "validation" / "2").rename(data / "validation" / "x"), [], ["differ: 2, x"]),
        (lambda data: [file.unlink() for file in data.rglob("*.jpg")], [], ["data", "0 images"]),
        (keep_one_class, [], ["one class only"]),
    ],
    ids=["no folder", "no split", "classes", "differ", "empty", "one class"],
)
def test_data_that_can_not_be_used(change, options: list[str], words: list[str], data: Path) -> None:
    change(data)
    with pytest.raises(UserError) as error:
        open_data(parse_args(["--data-dir", str(data), *options, "--output", "x"]))
    assert all(word in str(error.value) for word in words), error.value


# Batches


def test_the_processes_share_the_images_of_each_step() -> None:
    options = dict(images=50, global_batch=12, seed=3)
    whole = TrainBatches(**options, batch_size=12, rank=0, processes=1)
    shares = [TrainBatches(**options, batch_size=3, rank=rank, processes=2) for rank in (0, 1)]
    epochs = []
    for epoch in (0, 1):
        for batches in (whole, *shares):
            batches.start(epoch, first=0)
        steps = list(whole)
        parts = [list(share) for share in shares]
        assert len(steps) == len(whole) == 4 and [len(share) for share in shares] == [8, 8]
        for i, step in enumerate(steps):
            assert sorted(sum((part[2 * i] + part[2 * i + 1] for part in parts), [])) == sorted(step)
        assert len({key for step in steps for key in step}) == 48
        epochs.append(steps)
        whole.start(epoch, first=3)
        assert list(whole) == steps[3:]
    assert [[index for _, index in step] for step in epochs[0]] != [[index for _, index in step] for step in epochs[1]]


def test_every_image_is_evaluated_once() -> None:
    parts = [EvalBatches(images=23, batch_size=4, rank=rank, processes=3) for rank in range(3)]
    assert sorted(index for part in parts for batch in part for _, index in batch) == list(range(23))


def test_augmentation_depends_on_seed_epoch_and_image_alone() -> None:
    def draw(image: object) -> float:
        return random.random() + torch.rand(()).item()

    def sample(seed: int, epoch: int, index: int) -> float:
        random.random()
        return Samples(Digits(train=False), draw, seed, train=True)[epoch, index].image

    keys = [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]
    first = [sample(*key) for key in keys]
    assert [sample(*key) for key in reversed(keys)] == first[::-1] and len(set(first)) == len(keys)


def test_augmentation_that_pillow_refuses_is_drawn_again() -> None:
    drawn = []

    def transform(image: object) -> float:
        drawn.append(random.random())
        if len(drawn) % 3:
            raise ValueError("bits must be between or equal to 1 and 8")
        return drawn[-1]

    samples = Samples(Digits(train=False), transform, seed=0, train=True)
    image, _, unreadable = samples[0, 5]
    assert image == drawn[2] and unreadable == "" and len(set(drawn)) == 3
    assert Redrawn(transform)(None) == drawn[5]
    broken = Samples(Digits(train=False), lambda image: int("no number"), seed=0, train=True)
    with pytest.raises(ValueError, match="no number"):
        broken[0, 5]


# Files that can't be read


def test_unreadable_images_are_named_and_counted(data: Path, tmp_path: Path, capsys, caplog) -> None:
    broken = [data / "train" / name for name in ("0/1.jpg", "1/3.jpg", "2/2.jpg")]
    whole = broken[1].read_bytes()
    for file in broken:
        file.write_bytes(b"no image")
    broken[1].write_bytes(whole[:-200])
    options = ["--data-dir", data, *RUN, "--global-batch", 14]
    assert main(*options, "--output", tmp_path / "a") == 0
    named = [message.split()[1] for message in caplog.messages if message.startswith("skipped ")]
    assert set(named) <= set(map(str, broken)) and len(set(named)) == len(named) >= 2  # an image of 15 is left out
    assert main(*options, "--max-unreadable", 1, "--output", tmp_path / "b") == 2
    assert "--max-unreadable 1" in capsys.readouterr().err


def test_unreadable_images_are_not_evaluated(data: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    options = ["--data-dir", data, *RUN, "--output", tmp_path / "run"]
    assert main(*options) == 0
    broken = [data / "validation" / name for name in ("0/4.jpg", "1/1.jpg", "2/4.jpg")]

    def found() -> dict[str, float]:
        caplog.clear()
        assert main(*options, "--evaluate") == 0
        return evaluated(caplog.messages, "as trained")

    whole = found()
    for file in broken:
        file.write_bytes(b"no image")
    skipping = found()
    named = {message.split()[1] for message in caplog.messages if message.startswith("skipped ")}
    assert named == set(map(str, broken))
    for file in broken:
        file.unlink()
    assert found() == skipping != whole


def test_a_batch_of_unreadable_images_counts_for_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    precision = Precision.of(parse_args(["--output", "x", "--device", "cpu"]), ALONE.device)
    images, targets = torch.randn(10, 3, 2, 2), torch.arange(10) % 7
    whole = [(images[:4], targets[:4], [""] * 4), (images[4:], targets[4:], [""] * 6)]
    unreadable = (images[:3], torch.full((3,), NO_TARGET), ["a", "b", "c"])
    expected = evaluate(model, whole, precision, ALONE, UnreadableFiles(0))
    loss = nn.functional.cross_entropy(model(images), targets).item()
    assert expected["loss"] == pytest.approx(loss) and 0 < expected["top5"] < 100
    assert evaluate(model, [*whole, unreadable], precision, ALONE, UnreadableFiles(3)) == expected
    with pytest.raises(UserError, match="--max-unreadable 2"):
        evaluate(model, [*whole, unreadable], precision, ALONE, UnreadableFiles(2))


@pytest.mark.slow
def test_an_error_in_a_process_that_reads_images_ends_the_run(data: Path, tmp_path: Path) -> None:
    for file in data.rglob("*.jpg"):
        file.write_bytes(b"no image")
    options = ["--data-dir", data, *RUN, "--workers", 2, "--output", tmp_path / "run"]
    out = Process(tmp_path / "log", *options).finish(2)
    assert out.splitlines()[-1].startswith("train_imagenet.py: ") and "can't be read" in out.splitlines()[-1]
    assert "Traceback" not in out
