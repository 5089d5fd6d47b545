"""train_imagenet.py as its users run it: what it learns and leaves, and that nothing is lost whatever happens to it."""

import logging
import os
import random
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import (
    ALONE,
    EPOCHS,
    SCRIPT,
    STEPS,
    TINY,
    Process,
    assert_same_run,
    best_row,
    command,
    contents,
    evaluated,
    main,
    refused,
    rows,
    steps_of,
    weights,
)
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder

from mrconvnext.training import checkpoints
from mrconvnext.training.arguments import parse_args
from mrconvnext.training.images import ImageRun
from mrconvnext.training.processes import INTERRUPTED

# What a run leaves


def test_a_run_leaves_what_the_documentation_says(finished: Path) -> None:
    text = (SCRIPT.parent / "docs" / "training.md").read_text()
    table = text[text.index("| file | what |") :].partition("\n\n")[0]
    named = {name.rstrip("/") for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert {file.name for file in finished.iterdir() if "tfevents" not in file.name} == named
    assert yaml.safe_load((finished / "args.yaml").read_text())["model"] == "mrconvnext_atto"
    assert [row["epoch"] for row in rows(finished)] == [0, 1]
    with Image.open(finished / "curves.png") as picture:
        assert min(picture.size) >= 400
    modes = {file.stat().st_mode for file in finished.iterdir() if file.is_file() and "tfevents" not in file.name}
    assert len(modes) == 1  # a group that may read one of them may read all


def test_tensorboard_shows_the_summary(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    for name in ("lr", "train_loss", "top1", "ema_loss"):
        recorded = [(event.step, event.value) for event in events.Scalars(name)]
        assert recorded == [(row["epoch"], pytest.approx(row[name], rel=1e-5)) for row in rows(finished)]


def test_both_forms_hold_the_best_weights(finished: Path, images: Path) -> None:
    best = load_file(finished / "best.safetensors")
    models = {}
    for form in ("trained", "fused"):
        models[form] = timm.create_model(f"local-dir:{finished}/{form}", pretrained=True).eval()
        assert f"{round(best_row(finished)['top1'], 2)}" in (finished / form / "README.md").read_text()
    state = models["trained"].state_dict()
    assert state.keys() == best.keys() and all(torch.equal(state[name], best[name]) for name in best)
    assert len(models["fused"].state_dict()) < len(best)
    for model in models.values():
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
        held_out = ImageFolder(images / "validation", transform)
        with torch.no_grad():
            logits = model(torch.stack([image for image, _ in held_out]))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(held_out.targets))
        assert loss.item() == pytest.approx(best_row(finished)["loss"], rel=1e-5)


def test_evaluation_finds_what_the_summary_says(finished: Path, options: list[str], caplog) -> None:
    caplog.set_level(logging.INFO)
    before = contents(finished)
    assert main("--output", finished, "--evaluate") == 0  # with the run's own arguments
    for form in ("as trained", "deployed"):
        found = evaluated(caplog.messages, form)
        assert {name: found[name] for name in ("loss", "top1")} == pytest.approx(best_row(finished), rel=1e-5)
    assert contents(finished) == before


@pytest.mark.slow
def test_the_documented_trial_learns_digits(tmp_path: Path) -> None:
    text = (SCRIPT.parent / "docs" / "training.md").read_text()
    lines = re.search(r"^python (train_imagenet.py --dataset digits (?:.*\\\n)*.*)$", text, re.M)[1]
    words = shlex.split(lines.replace("\\\n", " "))
    command([sys.executable, str(SCRIPT), *words[1:], "--device", "cpu"], tmp_path)
    assert best_row(tmp_path / "digits-run")["top1"] >= 98


# Resuming


class Stop(logging.Handler):
    """Sends this process SIGTERM once a step is logged."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def emit(self, record: logging.LogRecord) -> None:
        if steps_of(record.getMessage()) == [self.step]:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(f"epoch 0 step 3/{STEPS}", id="mid-epoch"),
        pytest.param(f"epoch 0 step {STEPS}/{STEPS}", id="end of epoch", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_one_that_never_stopped(step: str, finished: Path, options, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    handler = Stop(step)
    logging.getLogger().addHandler(handler)
    try:
        assert main(*options, *EPOCHS, "--output", tmp_path / "stopped") == INTERRUPTED
    finally:
        logging.getLogger().removeHandler(handler)
    assert not (tmp_path / "stopped" / "summary.csv").exists()
    assert main(*options, *EPOCHS, "--output", tmp_path / "stopped", "--resume", "auto") == 0
    steps = steps_of("\n".join(caplog.messages))
    assert len(steps) == len(set(steps)) == 2 * STEPS  # none was lost, none taken twice
    assert_same_run(finished, tmp_path / "stopped")


@pytest.mark.slow
def test_ten_kills_change_nothing(finished: Path, options: list[str], tmp_path: Path) -> None:
    arguments = [*options, *EPOCHS, "--output", tmp_path / "killed", "--resume", "auto"]
    random_steps = random.Random(0)
    for i in range(10):
        process = Process(tmp_path / f"{i}.log", *arguments)
        process.wait_for_steps(random_steps.randint(1, 3))
        process.signal(signal.SIGKILL)
        process.finish(-signal.SIGKILL)
    Process(tmp_path / "last.log", *arguments).finish()
    assert_same_run(finished, tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.writing"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_loses_no_step(number: int, finished: Path, options, tmp_path: Path) -> None:
    arguments = [*options, *EPOCHS, "--output", tmp_path / "run", "--workers", 2]
    process = Process(tmp_path / "first.log", *arguments)
    process.wait_for_steps(3)
    process.signal(number)
    first = steps_of(process.finish(INTERRUPTED))
    second = steps_of(Process(tmp_path / "second.log", *arguments, "--resume", "auto").finish())
    assert 3 <= len(first) < 2 * STEPS and len(set(first + second)) == len(first + second) == 2 * STEPS
    assert_same_run(finished, tmp_path / "run")


def test_a_truncated_checkpoint_is_skipped(copied: Path, options: list[str], finished: Path, caplog) -> None:
    last = copied / checkpoints.LAST
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    assert main(*options, *EPOCHS, "--output", copied, "--resume", "auto") == 0
    assert any("last.safetensors is not a complete checkpoint" in message for message in caplog.messages)
    assert_same_run(finished, copied)


def test_a_run_does_not_start_anew_where_all_checkpoints_are_damaged(copied: Path, options, capsys) -> None:
    for name in (checkpoints.LAST, checkpoints.PREVIOUS):
        (copied / name).write_bytes((copied / name).read_bytes()[:100])
    before = contents(copied)
    assert "complete" in refused([*options, *EPOCHS, "--output", copied, "--resume", "auto"], capsys)
    assert contents(copied) == before


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_saved(copied: Path, options: list[str], tmp_path: Path) -> None:
    before = (copied / checkpoints.LAST).read_bytes()
    for i in range(2):
        arguments = [*options, "--epochs", 3, "--output", copied, "--resume", "auto"]
        out = Process(tmp_path / f"{i}.log", *arguments, file_limit=10_000).finish(2)
        assert "last.safetensors can't be written" in out
        assert (copied / checkpoints.LAST).read_bytes() == before
        assert checkpoints.read(copied / checkpoints.PREVIOUS)[1]["step"] == 2 * STEPS - 2
    assert not list(copied.glob("*.writing"))


@pytest.mark.parametrize("previous", [2 * STEPS - 1, 2 * STEPS])
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(previous: int, copied, options, capsys) -> None:
    """That is one from before the step that failed."""
    tensors, state = checkpoints.read(copied / checkpoints.LAST)
    checkpoints.write(copied / checkpoints.PREVIOUS, tensors, {**state, "step": previous})
    tensors["model.head.fc.weight"].fill_(float("nan"))
    checkpoints.write(copied / checkpoints.LAST, tensors, state)
    error = refused([*options, "--epochs", 3, "--output", copied, "--resume", "auto"], capsys)
    assert f"the loss of step {2 * STEPS} is nan" in error
    good = f"the last good checkpoint is {copied / checkpoints.PREVIOUS}, of step {2 * STEPS - 1}"
    assert (good if previous < 2 * STEPS else "there is no good checkpoint") in error


# Another run's folder


def test_a_folder_of_another_run_is_refused(finished: Path, options: list[str], capsys) -> None:
    before = contents(finished)
    arguments = [*options, *EPOCHS, "--output", finished]
    assert "--resume auto" in refused(arguments, capsys)
    assert "--seed 42" in refused([*arguments, "--seed", 7, "--resume", "auto"], capsys)
    assert contents(finished) == before


def test_checkpoints_without_arguments_are_not_overwritten(copied: Path, options: list[str], capsys) -> None:
    (copied / "args.yaml").unlink()
    before = contents(copied)
    arguments = [*options, *EPOCHS, "--output", copied]
    assert "--resume auto" in refused(arguments, capsys)
    other = [*arguments, "--model", "convnext_atto", "--resume", "auto"]
    assert "--model mrconvnext_atto" in refused(other, capsys)
    assert contents(copied) == before


# What is trained


def test_frozen_modules_stay_as_they_are(options: list[str], tmp_path: Path) -> None:
    """Parameters and statistics; all others change."""
    frozen = ("stem.", "stages.0.")
    arguments = [*options, "--epochs", "1", "--warmup-epochs", "0", "--freeze", "stem", "stages.0"]
    arguments += [*TINY, "branch_norm=batch", "--output", str(tmp_path)]
    start = ImageRun(parse_args(arguments), ALONE).model
    before, parameters = start.state_dict(), dict(start.named_parameters())
    assert main(*arguments) == 0
    after = weights(tmp_path)
    assert after.keys() == before.keys()
    unchanged = {name for name in after if torch.equal(before[name], after[name])}
    assert unchanged >= {name for name in after if name.startswith(frozen)}
    rest = {name for name in after if not name.startswith(frozen)}
    assert {name for name in rest if "running_mean" in name}
    assert not unchanged & {name for name in rest if name in parameters or "running_" in name}


def test_another_model_of_timm_keeps_its_classifier(images: Path, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    recipe = ["--data-dir", images, "--global-batch", 24, "--img-size", 32, "--workers", 0, "--device", "cpu"]
    recipe += ["--lr", 0.01, "--no-lr-scaling", "--warmup-epochs", 0, "--model-ema-decay", 0]
    arguments = [*recipe, "--model", "resnet10t", "--model-kwargs", "channels=(8,8,16,16)", "--output", tmp_path]
    assert main(*arguments, "--epochs", 1, "--layer-decay", 0.9) == 0
    assert main(*arguments, "--evaluate") == 0
    found = evaluated(caplog.messages, "as trained")
    assert {name: found[name] for name in ("loss", "top1")} == pytest.approx(best_row(tmp_path), rel=1e-5)
    assert not (tmp_path / "trained").exists()  # which other models don't have
