"""Runs of ``train_imagenet.py``: in this process, or in processes of their own, which a signal may hit."""

import csv
import io
import json
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import unittest.mock
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train_imagenet
from mrconvnext.training import checkpoints
from mrconvnext.training.datasets import Digits
from mrconvnext.training.processes import Processes

SCRIPT = Path(train_imagenet.__file__)

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))

OPTIONS = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}
TINY = ["--model-kwargs", *(f"{name}={value}" for name, value in OPTIONS.items())]
RECIPE = "--recipe imagenet --device cpu --workers 0".split()
RECIPE += "--ls-init 0.1 --lr 2e-3 --no-lr-scaling --warmup-epochs 1 --log-interval 1".split()
RECIPE += ["--img-size", "32"]
MODEL = ["--model", "mrconvnext_atto", *TINY, *RECIPE]
CONVNEXT = ["--model", "convnext_atto", *TINY, *RECIPE]

# Of the run that tests share: steps of an epoch, and epochs.
STEPS = 5
EPOCHS = ["--epochs", "2"]

# The same steps whatever the processes and batches that take them: no augmentation, and rounding that makes little.
EXACT = "--dataset digits --model-dtype float64 --opt sgd --lr 0.05 --no-aug --drop-path 0 --epochs 1".split()


def main(*arguments: object) -> int:
    """Returns the exit status of a run in this process, on one thread.

    Two threads wait for each other longer than they compute, where other programs run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with unittest.mock.patch.object(sys, "argv", [str(SCRIPT)]):  # whose name stands before errors
            return train_imagenet.main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def refused(arguments: list, capsys: pytest.CaptureFixture) -> str:
    """Returns the one line in which a run says why it can't be done."""
    capsys.readouterr()
    assert main(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_imagenet.py: ") and error.count("\n") == 1
    return error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Process:
    """A run in a process of its own, whose log can be read meanwhile.

    The process is a copy of one that has imported all that a run needs, which takes far longer than a tiny run.

    Args:
        log: Where the run's output goes.
        *arguments: Those of ``train_imagenet.py``.
        file_limit: Bytes that a file may have.
        env: Environment variables.
        before: Called in the process before the run.
    """

    def __init__(
        self,
        log: Path,
        *arguments: object,
        file_limit: int | None = None,
        env: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        log.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        options = [str(argument) for argument in arguments]
        self.process = context.Process(target=_run, args=(options, log, file_limit, env or {}, before))
        self.process.start()

    def signal(self, number: int) -> None:
        """Sends a signal to the process and its workers, as terminals and batch systems do."""
        os.killpg(self.process.pid, number)

    def wait_for_steps(self, count: int) -> None:
        """Returns once the run has logged as many steps since it started, or has ended."""
        while len(steps_of(self.log.read_text())) < count and self.process.is_alive():
            time.sleep(0.005)

    def finish(self, status: int = 0) -> str:
        """Returns what the run printed, after checking its exit status."""
        self.process.join()
        assert self.process.exitcode == status, self.log.read_text()
        return self.log.read_text()


def _run(
    arguments: list[str],
    log: Path,
    file_limit: int | None,
    env: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    os.setsid()
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if before is not None:
        before()
    sys.exit(main(*arguments))


def two_processes(log: Path, *arguments: object) -> list[Process]:
    """Starts a run in two processes, as torchrun does, the first of which writes to the log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    logs = (log, log.with_suffix(".second"))
    return [
        Process(own, *arguments, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, own in enumerate(logs)
    ]


def torchrun(folder: Path, *arguments: object) -> str:
    """Returns what a run in two processes printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return command([*launcher, str(SCRIPT), *map(str, arguments)], folder)


def command(words: list[str], folder: Path) -> str:
    """Returns what a command printed that is run in a folder."""
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(words, cwd=folder, env=env, timeout=600, **pipes)
    assert done.returncode == 0, done.stdout
    return done.stdout


def steps_of(log: str) -> list[str]:
    """Returns the steps that a log has a line of, such as ``epoch 0 step 3/5``."""
    return [line.partition(" loss ")[0] for line in log.splitlines() if " step " in line and " loss " in line]


def rows(folder: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's summary."""
    with open(folder / "summary.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def best_row(folder: Path) -> dict[str, float]:
    """Returns loss and top1 of the best weights of a run."""
    found = [
        {"loss": row[f"{prefix}loss"], "top1": row[f"{prefix}top1"]}
        for row in rows(folder)
        for prefix in ("", "ema_")
        if f"{prefix}top1" in row
    ]
    return max(found, key=lambda row: row["top1"])


def evaluated(lines: Iterable[str], form: str) -> dict[str, float]:
    """Returns what ``--evaluate`` printed of a form of the model."""
    (line,) = [line for line in lines if line.startswith(f"{form}: ")]
    words = line.removeprefix(f"{form}: ").replace(",", "").split()
    return {name: float(value) for name, value in zip(words[::2], words[1::2])}


def weights(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of the model in a run's newest checkpoint."""
    tensors, _ = checkpoints.read(folder / checkpoints.LAST)
    return {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-identical weights, averaged weights, optimizer state and summary."""
    (own, own_state), (other, other_state) = (checkpoints.read(folder / checkpoints.LAST) for folder in (a, b))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert own_state["step"] == other_state["step"]
    assert (a / "summary.csv").read_text() == (b / "summary.csv").read_text()


def assert_close_runs(a: Path, b: Path, tolerance: float) -> None:
    """Weights, statistics and losses that agree but for rounding."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    for name, value in one.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (value - two[name]).abs().max() <= tolerance * scale, name
    for row, other in zip(rows(a), rows(b), strict=True):
        assert abs(row["train_loss"] - other["train_loss"]) <= tolerance * row["train_loss"]


def write_images(folder: Path, train: int = 12, validation: int = 5, classes: int = 10) -> None:
    """Writes digits as JPEGs in class folders for each split, so many of each class."""
    for split, per_class in (("train", train), ("validation", validation)):
        counts = dict.fromkeys(range(classes), 0)
        for image, target in Digits(split == "train").samples:
            if counts.get(target, per_class) < per_class:
                (folder / split / str(target)).mkdir(parents=True, exist_ok=True)
                image.resize((32, 32)).save(folder / split / str(target) / f"{counts[target]}.jpg")
                counts[target] += 1


def pack(folder: Path) -> None:
    """Replaces the folder of each split by a tar file."""
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            archive.add(folder / split, arcname=split)
        shutil.rmtree(folder / split)


def write_shards(folder: Path, train: int = 240, validation: int = 60) -> None:
    """Writes the first digits of each split as two WebDataset shards."""
    folder.mkdir()
    info = {}
    for split, count in (("train", train), ("validation", validation)):
        names = [f"{split}-{i}.tar" for i in range(2)]
        samples = Digits(split == "train").samples[:count]
        for i, name in enumerate(names):
            with tarfile.open(folder / name, "w") as archive:
                for number in range(i, count, 2):
                    content = io.BytesIO()
                    image, target = samples[number]
                    image.resize((32, 32)).save(content, "PNG")
                    _add(archive, f"{number:05d}.png", content.getvalue())
                    _add(archive, f"{number:05d}.cls", str(target).encode())
        lengths = [len(range(i, count, 2)) for i in range(2)]
        info[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=count)
    (folder / "_info.json").write_text(json.dumps({"splits": info}))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
