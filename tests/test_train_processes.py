"""Runs in several processes, from streams and in other precisions; and that how a step is computed changes nothing."""

import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    ALONE,
    CONVNEXT,
    EXACT,
    MODEL,
    SCRIPT,
    TINY,
    Process,
    assert_close_runs,
    best_row,
    evaluated,
    main,
    pack,
    rows,
    steps_of,
    torchrun,
    two_processes,
    weights,
    write_images,
    write_shards,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mrconvnext.training import checkpoints
from mrconvnext.training.arguments import parse_args
from mrconvnext.training.images import ImageRun
from mrconvnext.training.processes import INTERRUPTED
from mrconvnext.training.trainer import Clock

pytestmark = pytest.mark.slow


# Several processes


def test_all_processes_evaluate_what_is_saved(tmp_path: Path) -> None:
    """The running statistics of a "batch" norm are each process's own; the first one's are saved."""
    write_images(tmp_path / "data")
    pack(tmp_path / "data")
    options = ["--data-dir", tmp_path / "data", *MODEL, *TINY, "branch_norm=batch", "--global-batch", 48]
    options += ["--batch-size", 8, "--lr", 0.01]
    options += ["--model-ema-decay", 0.5, "--output", tmp_path / "run", "--epochs", 2]
    out = torchrun(tmp_path, *options, "--workers", 1)
    assert "2 steps an epoch of 48 images (processes: 2, batches of each: 3 of 8)" in out
    assert len(steps_of(out)) == 4 and len(rows(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "fused" / "model.safetensors").is_file()
    out = Process(tmp_path / "log", *options, "--evaluate").finish()
    found = evaluated(out.splitlines(), "as trained")
    assert {name: found[name] for name in ("loss", "top1")} == pytest.approx(best_row(tmp_path / "run"), rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_starts_its_epoch_again(processes: int, tmp_path: Path) -> None:
    """Its augmentation is one that Pillow often refuses."""
    write_shards(tmp_path / "data")
    options = ["--dataset", "wds/digits", "--data-dir", tmp_path / "data", "--num-classes", 10, *MODEL]
    options += ["--global-batch", 24, "--epochs", 2, "--aa", "rand-m10-inc1", "--checkpoint-interval", 3]
    options += ["--resume", "auto", "--output", tmp_path / "run"]

    def start(log: Path) -> list[Process]:
        return two_processes(log, *options) if processes == 2 else [Process(log, *options)]

    run = start(tmp_path / "first")
    run[0].wait_for_steps(10 + 5)
    run[-1].signal(signal.SIGTERM)  # to one of them
    assert len(steps_of([process.finish(INTERRUPTED) for process in run][0])) >= 15
    out = [process.finish() for process in start(tmp_path / "second")][0]
    assert "epoch 1: a stream can't be resumed in mid-epoch, the epoch starts again" in out
    assert steps_of(out) == [f"epoch 1 step {i}/10" for i in range(1, 11)]
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1]


# Faster and smaller ways


@pytest.mark.parametrize(
    "options", [["--amp-dtype", "bfloat16", "--channels-last"], ["--amp-dtype", "float16"], ["--torchcompile"]]
)
def test_faster_ways_learn_too(options: list[str], tmp_path: Path) -> None:
    options = ["--dataset", "digits", *MODEL, "--global-batch", 128, "--no-aug", *options, "--output", tmp_path / "run"]
    Process(tmp_path / "first", *options, "--epochs", 3).finish()
    Process(tmp_path / "second", *options, "--epochs", 4, "--resume", "auto").finish()
    assert len(rows(tmp_path / "run")) == 4 and best_row(tmp_path / "run")["top1"] > 60


# The same numbers


ONE = [*MODEL, *EXACT, "--sync-norm", "--global-batch", "130"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that takes each step by one batch in one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(*ONE, "--batch-size", 130, "--output", folder) == 0
    start = ImageRun(parse_args([*ONE, "--output", "x"]), ALONE).model.state_dict()
    moved = {name for name, value in weights(folder).items() if not torch.equal(value, start[name])}
    assert {"stem.0.weight", "stages.0.blocks.0.conv_dw.alpha", "head.fc.weight"} < moved
    assert any("running_var" in name for name in moved)
    return folder


def test_two_processes_equal_one(whole: Path, tmp_path: Path) -> None:
    for process in two_processes(tmp_path / "log", *ONE, "--output", tmp_path / "two"):
        process.finish()
    assert checkpoints.read(tmp_path / "two" / checkpoints.LAST)[1]["step"] == 11
    assert_close_runs(whole, tmp_path / "two", tolerance=1e-10)


def test_gradient_checkpointing_changes_nothing(whole: Path, tmp_path: Path) -> None:
    assert main(*ONE, "--batch-size", 130, "--grad-checkpointing", "--output", tmp_path) == 0
    assert_close_runs(whole, tmp_path, tolerance=1e-12)


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    """Of a ConvNeXt: statistics of branches are those of a batch."""
    options = [*CONVNEXT, *EXACT, "--global-batch", 128]
    assert main(*options, "--output", tmp_path / "whole") == 0
    assert main(*options, "--batch-size", 32, "--output", tmp_path / "parts") == 0
    assert_close_runs(tmp_path / "whole", tmp_path / "parts", tolerance=1e-10)


GROUP = """
import multiprocessing, os, signal, time
from mrconvnext.training.processes import ending_workers

os.setsid()
multiprocessing.set_start_method("forkserver")
signal.signal(signal.SIGTERM, lambda *_: None)
with ending_workers():
    worker = multiprocessing.Process(target=time.sleep, args=(60,))
    worker.start()
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.5)
    print(worker.is_alive())
"""


def test_a_signal_to_the_group_spares_workers_and_the_process_that_starts_them() -> None:
    ended = subprocess.run([sys.executable, "-c", GROUP], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


class Waits(TorchDispatchMode):
    """Notes who reads numbers from tensors, which makes a program wait for a GPU; optimizers count on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            callers = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
            if not any("torch/optim/" in caller for caller in callers):
                self.found.add(callers[-3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [[], ["--mixup", "0.8", "--clip-grad", "1", "--batch-size", "12"]])
def test_a_training_step_waits_for_no_gpu(options: list[str], images: Path, tmp_path: Path) -> None:
    words = [*MODEL, "--data-dir", images, "--global-batch", 24, "--output", tmp_path / "run", *options]
    run = ImageRun(parse_args([str(word) for word in words]), ALONE)
    batches, clock = iter(list(run.loaders.epoch(0, 0))), Clock(ALONE.device)
    run.trainer.take_step(batches, 0, clock, run.unreadable)  # the optimizer's state is made in the first one
    with Waits() as waits:
        run.trainer.take_step(batches, 1, clock, run.unreadable)
    assert waits.found == set()
