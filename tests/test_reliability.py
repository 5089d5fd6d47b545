"""What must not be lost, or pass in silence, whatever happens to a run: found by an attack on it."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import EPOCHS, STEPS, Process, assert_same_run, contents, main, refused
from timm.data import ImageDataset
from torch import nn

import mrconvnext
from mrconvnext.training import checkpoints, files, loaders, run
from mrconvnext.training import images as image_runs
from mrconvnext.training.arguments import parse_args
from mrconvnext.training.errors import UserError
from mrconvnext.training.model import make_optimizer
from mrconvnext.training.samples import FORMATS, NO_TARGET, Samples, as_rgb
from mrconvnext.training.trainer import Trainer

pytestmark = pytest.mark.slow  # all of them together


def step_of(file: Path) -> int:
    return checkpoints.read(file)[1]["step"]


# What is not finite


@pytest.mark.parametrize(
    "failing", [STEPS - 1, STEPS, 2 * STEPS - 1], ids=["end of an epoch", "start", "end of the run"]
)
def test_weights_that_are_not_finite_are_never_saved(
    failing: int, finished: Path, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """They have a finite loss: it is of before the step that spoils them."""
    update = Trainer._update

    def spoil(self: Trainer, step: int) -> None:
        update(self, step)
        if step == failing:
            self.model.head.fc.weight.data[0, 0] = float("nan")

    arguments = [*options, *EPOCHS, "--output", tmp_path / "run", "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", spoil)
        error = refused(arguments, capsys)
        assert "nan" in error or "not finite" in error
        last = tmp_path / "run" / checkpoints.LAST
        assert f"the last good checkpoint is {last}, of step {step_of(last)}" in error
        assert step_of(last) <= failing
    assert main(*arguments) == 0
    assert_same_run(finished, tmp_path / "run")


def test_logits_that_are_not_finite_are_never_the_best(
    copied: Path, options, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    before = (copied / checkpoints.BEST).read_bytes()
    monkeypatch.setattr(run, "evaluate", lambda *args: {"loss": float("nan"), "top1": 100.0, "top5": 100.0})
    error = refused([*options, "--epochs", 3, "--output", copied, "--resume", "auto"], capsys)
    assert "the loss of evaluation is nan after epoch 2" in error
    assert (copied / checkpoints.BEST).read_bytes() == before


def test_the_previous_checkpoint_is_of_an_earlier_step(finished: Path) -> None:
    assert step_of(finished / checkpoints.PREVIOUS) < step_of(finished / checkpoints.LAST) == 2 * STEPS


# What a killed process leaves, and damage


def test_what_a_killed_process_left_goes(copied: Path, options: list[str]) -> None:
    names = set(contents(copied))
    (copied / files.WRITING).mkdir()
    (copied / files.WRITING / ".tmpAb3").write_bytes(bytes(1000))
    (copied / files.LOCK).touch()
    assert main(*options, *EPOCHS, "--output", copied, "--resume", "auto") == 0
    assert {name for name in contents(copied) if "tfevents" not in name} <= names


@pytest.mark.parametrize("text", ["", "{", "- 1", "a: [", "\x00"], ids=repr)
def test_damaged_arguments_are_those_of_the_checkpoint(
    text: str, copied: Path, finished: Path, options: list[str], caplog, capsys
) -> None:
    (copied / "args.yaml").write_text(text)
    arguments = [*options, *EPOCHS, "--output", copied, "--resume", "auto"]
    assert "--seed 42" in refused([*arguments, "--seed", 7], capsys)
    assert main(*arguments) == 0
    assert any("args.yaml is damaged" in message for message in caplog.messages)
    own, other = (yaml.safe_load((folder / "args.yaml").read_text()) for folder in (copied, finished))
    assert {name for name in own if own[name] != other[name]} == {"output", "resume"}


def test_a_damaged_summary_is_written_anew(copied: Path, finished: Path, options: list[str]) -> None:
    (copied / "summary.csv").write_bytes(b"epoch,lr\n")
    assert main(*options, *EPOCHS, "--output", copied, "--resume", "auto") == 0
    assert (copied / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()


@pytest.mark.parametrize("place", [0.3, 0.6, 0.95])
def test_a_changed_bit_of_a_checkpoint_is_seen(
    place: float, copied: Path, finished: Path, options: list[str], caplog
) -> None:
    file = copied / checkpoints.LAST
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    assert main(*options, *EPOCHS, "--output", copied, "--resume", "auto") == 0
    assert any(f"skipped: {file} is not a complete checkpoint" in message for message in caplog.messages)
    assert_same_run(finished, copied)


# Two runs in a folder


def test_a_second_run_in_a_folder_is_refused(options: list[str], tmp_path: Path) -> None:
    """By a lock that goes with the process that has it."""
    arguments = [*options, "--epochs", 500, "--output", tmp_path / "run", "--resume", "auto"]
    first = Process(tmp_path / "log", *arguments)
    first.wait_for_steps(1)
    first.signal(signal.SIGSTOP)
    before = contents(tmp_path / "run")
    out = Process(tmp_path / "second.log", *arguments).finish(2)
    assert f"--output {tmp_path / 'run'} is the folder of a run that is still going on" in out
    assert contents(tmp_path / "run") == before
    first.signal(signal.SIGKILL)
    first.finish(-signal.SIGKILL)
    with files.locked(tmp_path / "run"):
        pass


# Signals outside of training


def test_a_signal_while_a_run_is_loading_is_not_lost(
    finished: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*options, *EPOCHS, "--output", tmp_path / "run", "--resume", "auto"]
    make_model = image_runs.make_model

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return make_model(*args)

    with monkeypatch.context() as patch:
        patch.setattr(image_runs, "make_model", interrupted)
        assert main(*arguments) == 75
    assert main(*arguments) == 0
    assert_same_run(finished, tmp_path / "run")


def test_a_signal_while_a_run_is_publishing_lets_it_end(copied: Path, options, monkeypatch: pytest.MonkeyPatch) -> None:
    save = mrconvnext.save

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return save(*args, **kwargs)

    monkeypatch.setattr(mrconvnext, "save", interrupted)
    shutil.rmtree(copied / "fused")
    assert main(*options, *EPOCHS, "--output", copied, "--resume", "auto") == 0
    assert (copied / "fused" / "model.safetensors").is_file()


# Publishing


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / ".saving-a").mkdir(),
    ],
)
def test_publishing_replaces_what_it_left(damage: Callable, copied: Path, finished: Path, options: list[str]) -> None:
    damage(copied / "fused")
    assert main(*options, *EPOCHS, "--output", copied, "--resume", "auto") == 0
    assert contents(copied / "fused").keys() == contents(finished / "fused").keys()
    config = json.loads((copied / "fused" / "config.json").read_text())
    assert config == json.loads((finished / "fused" / "config.json").read_text())


def test_publishing_leaves_other_files_alone(copied: Path, options: list[str], capsys) -> None:
    (copied / "trained" / "notes.txt").write_text("mine")
    before = contents(copied / "trained")
    error = refused([*options, *EPOCHS, "--output", copied, "--resume", "auto"], capsys)
    assert "notes.txt" in error and "trained" in error
    assert contents(copied / "trained") == before


def test_files_are_not_written_through_links(copied: Path, options: list[str], tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.png"
    target.write_text("mine")
    (copied / "curves.png").unlink()
    (copied / "curves.png").symlink_to(target)
    assert main(*options, "--epochs", 3, "--output", copied, "--resume", "auto") == 0
    assert target.read_text() == "mine" and not (copied / "curves.png").is_symlink()


# Optimizers


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5))


def take_steps(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        module(torch.randn(2, 3, 5, 5)).square().sum().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")  # of optimizers
@pytest.mark.parametrize("name", timm.optim.list_optimizers())
def test_every_optimizer_of_timm_resumes_exactly_or_is_refused(name: str) -> None:
    args = parse_args(["--output", "x", "--opt", name, "--lr", "0.1", "--no-lr-scaling"])
    try:
        checkpoints.check_resumable(lambda module: make_optimizer(module, args))
    except (UserError, ValueError):  # the former where it needs a library that is not there
        return
    whole, parts, resumed = layer(), layer(), layer()
    take_steps(whole, make_optimizer(whole, args), range(6))
    optimizer = make_optimizer(parts, args)
    take_steps(parts, optimizer, range(3))
    tensors, rest = checkpoints.flatten_optimizer(optimizer)
    resumed.load_state_dict(parts.state_dict())
    second = make_optimizer(resumed, args)
    tensors = {key: value.clone() for key, value in tensors.items()}
    checkpoints.restore_optimizer(second, tensors, json.loads(json.dumps(rest)))
    take_steps(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


@pytest.mark.filterwarnings("ignore")
def test_most_optimizers_are_not_refused() -> None:
    refusals = []
    names = [name for name in timm.optim.list_optimizers() if not name.startswith(("bnb", "fused"))]  # of libraries
    for name in names:
        args = parse_args(["--output", "x", "--opt", name])
        try:
            checkpoints.check_resumable(lambda module, args=args: make_optimizer(module, args))
        except (UserError, ValueError):
            refusals.append(name)
    assert len(refusals) < 0.2 * len(names), refusals
    assert not {"adamw", "sgd", "lamb", "lion", "nadamw", "adafactorbv", "muon"} & set(refusals)


# Images


def test_images_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    gray = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(gray).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        found = np.asarray(as_rgb(image))
    assert np.abs(found[..., 0].astype(int) - (gray >> 8)).max() <= 1
    with pytest.raises(ValueError, match="floating-point"):
        as_rgb(Image.new("F", (2, 2)))


def test_what_is_no_image_is_passed_over(images: Path, options: list[str], tmp_path: Path, caplog) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    Image.new("RGB", (8, 8)).save(data / "train" / "0" / "0.eps")
    (data / "train" / "0" / "0.eps").rename(data / "train" / "0" / "0.jpg")
    os.mkfifo(data / "train" / "1" / "pipe.jpg")
    Image.new("RGB", (8, 8)).save(data / "train" / "2" / "0.dds")
    (data / "train" / "2" / "0.dds").rename(data / "train" / "2" / "0.jpg")
    arguments = [*options, "--data-dir", data, "--epochs", 1, "--output", tmp_path / "run"]
    assert main(*arguments) == 0
    skipped = "\n".join(message for message in caplog.messages if message.startswith("skipped "))
    assert "0/0.jpg" in skipped or "2/0.jpg" in skipped or "pipe.jpg" in skipped


@pytest.mark.filterwarnings("ignore::DeprecationWarning:PIL")
@pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning")
def test_images_cut_anywhere_are_read_or_passed_over(tmp_path: Path) -> None:
    """Of every format that Pillow writes, whatever their names say."""
    Image.init()
    folder, good = tmp_path / "0", Image.new("RGB", (16, 16), "red")
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    written = set()
    for form in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1"):
            with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
                noise.convert(mode).save(tmp_path / "whole", format=form)
                written.add(form)
                break
        content = (tmp_path / "whole").read_bytes()
        for cut in range(21):
            (folder / f"{form}-{cut:02}.png").write_bytes(content[: len(content) * cut // 20])
            good.save(folder / f"{form}-{cut:02}a.png")  # what stands in for one that can't be read
    samples = Samples(ImageDataset(str(tmp_path)), transform=lambda image: image.mode, seed=0, train=False)
    found = [samples[0, i] for i in range(len(samples))]
    assert {sample.image for sample in found} == {"RGB"} and len(found) == 42 * len(Image.SAVE)
    assert all(bool(sample.unreadable) == (sample.target == NO_TARGET) for sample in found)
    readable = {Path(samples.dataset.filename(i)).name for i, sample in enumerate(found) if not sample.unreadable}
    assert all(f"{form}-20.png" in readable for form in written & set(FORMATS))
    assert not any(name.startswith("EPS") and not name.endswith("a.png") for name in readable)


# Workers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_gone_is_named(
    number: int, options: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "WORKER_SECONDS", 3)
    take_step, hit = Trainer.take_step, []

    def step(*args: Any) -> float:
        if not hit:
            hit.extend(process.pid for process in multiprocessing.active_children())
            os.kill(hit[0], number)
        return take_step(*args)

    monkeypatch.setattr(Trainer, "take_step", step)
    arguments = [*options, "--workers", 2, "--epochs", 3, "--output", tmp_path / "run"]
    assert str(hit[0] if (error := refused(arguments, capsys)) else None) in error


def test_names_of_any_bytes(images: Path, options: list[str], tmp_path: Path, capsys) -> None:
    data = Path(shutil.copytree(images, tmp_path / "data"))
    name = os.fsencode(data / "train" / "1") + b"/\xff\xfe.jpg"
    with open(name, "wb") as file:
        file.write(b"no image")
    assert main(*options, "--data-dir", data, "--epochs", 1, "--output", tmp_path / "run") == 0
    for split in ("train", "validation"):
        os.rename(data / split / "1", os.fsencode(data / split) + b"/\xff")
    error = refused([*options, "--data-dir", data, "--epochs", 1, "--output", tmp_path / "other"], capsys)
    assert "\\udcff" in error and "is not text" in error


# Arguments


@pytest.mark.parametrize(
    "words",
    ["--lr -1", "--lr inf", "--lr 0", "--min-lr -1", "--warmup-lr -1", "--warmup-epochs -2", "--clip-grad -1"]
    + ["--clip-grad 0", "--layer-decay -1", "--layer-decay 2", "--mixup nan", "--cutmix inf", "--crop-pct 0"]
    + ["--weight-decay -1", "--kernel-lr-scale nan", "--ls-init nan", "--opt-betas 0.9 2", "--scale 0 1"]
    + ["--img-size 20000", "--img-size 0", "--seed 1180591620717411303424"],
)
def test_senseless_numbers_are_refused(words: str, capsys, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main("--dataset", "digits", "--output", tmp_path / "run", *words.split())
    assert words.split()[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_run_has_a_name(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main("--dataset", "digits", "--output", "")
    assert "--output" in capsys.readouterr().err


def test_text_is_not_taken_for_true(options: list[str], tmp_path: Path, capsys) -> None:
    arguments = [*options, "--model-kwargs", "bidirectional=false", "--output", tmp_path / "run"]
    assert "bidirectional must be True or False, got 'false'" in refused(arguments, capsys)
    assert not (tmp_path / "run").exists()
