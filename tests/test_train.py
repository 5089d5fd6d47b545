"""train_imagenet.py as its users run it: what it learns, and that nothing is lost whatever happens to a run."""

import csv
import io
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import small_model
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import train_imagenet
from mrconvnext import checkpoint
from mrconvnext.data import NONE, Digits, Samples

SCRIPT = Path(train_imagenet.__file__)
MODEL = ["--model", "mrconvnext_atto", "--model-kwargs", "depths=(1,1,2,1)", "dims=(16,24,32,48)"]
PARSEVAL = [*MODEL, "branch_norm=parseval"]
# Eleven steps an epoch, of 128 images of 32 pixels.
QUICK = [
    "--img-size",
    "32",
    "--global-batch",
    "128",
    "--workers",
    "0",
    "--ls-init",
    "0.1",
    "--lr",
    "2e-3",
    "--no-lr-scaling",
]
QUICK += ["--warmup-epochs", "1", "--log-interval", "1", "--model-ema-decay", "0.9"]
DIGITS = ["--dataset", "digits", *MODEL, *QUICK]


def run(*arguments: object) -> int:
    return train_imagenet.main([str(argument) for argument in arguments])


def start(*arguments: object, launcher: tuple[str, ...] = (), limit: int | None = None) -> subprocess.Popen:
    def limit_files() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, *launcher, str(SCRIPT), *(str(argument) for argument in arguments)]
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=env, preexec_fn=limit_files, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    out = process.communicate(timeout=600)[0]
    assert process.returncode == status, out
    return out


def torchrun(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_images(folder: Path, per_class: int = 20, classes: int = 10) -> None:
    """Writes digits as JPEGs, in class folders for each split."""
    for split, train in (("train", True), ("validation", False)):
        counts = dict.fromkeys(range(classes), 0)
        for image, target in Digits(train).samples:
            if counts.get(target, per_class) < per_class:
                (folder / split / str(target)).mkdir(parents=True, exist_ok=True)
                image.resize((32, 32)).save(folder / split / str(target) / f"{counts[target]}.jpg")
                counts[target] += 1


def pack(folder: Path) -> None:
    """Replaces the folder of each split by a tar file."""
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            archive.add(folder / split, arcname=split)
        for file in sorted((folder / split).rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (folder / split).rmdir()


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-identical weights, averaged weights, optimizer state and summary."""
    (own, own_state), (other, other_state) = checkpoint.read(a / checkpoint.LAST), checkpoint.read(b / checkpoint.LAST)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert own_state["step"] == other_state["step"]
    assert (a / "summary.csv").read_text() == (b / "summary.csv").read_text()


# Learning


def test_learns_digits_and_leaves_both_forms(tmp_path: Path) -> None:
    began = time.monotonic()
    options = ["--dataset", "digits", *PARSEVAL]
    options += ["--global-batch", 48, "--lr", 4e-3, "--no-lr-scaling", "--ls-init", 0.1, "--epochs", 30]
    options += ["--warmup-epochs", 2, "--model-ema-decay", 0.98, "--drop-path", 0, "--log-interval", 100]
    options += ["--aa", "", "--hflip", 0, "--scale", 0.6, 1, "--reprob", 0, "--mixup", 0, "--cutmix", 0]
    finish(start(*options, "--workers", 0, "--output", tmp_path))
    assert time.monotonic() - began < 180
    accuracy = max(float(row[name]) for row in rows(tmp_path) for name in ("top1", "ema_top1"))
    assert accuracy >= 98
    (events,) = tmp_path.glob("events.out.tfevents.*")
    recorded = EventAccumulator(str(tmp_path)).Reload().Scalars("ema_top1")
    assert [(event.step, round(event.value, 3)) for event in recorded] == [
        (int(row["epoch"]), round(float(row["ema_top1"]), 3)) for row in rows(tmp_path)
    ]
    names = {file.name for file in tmp_path.iterdir()} - {events.name}
    assert names == {
        *("args.yaml", "summary.csv", "curves.png", "trained", "fused"),
        *("last.safetensors", "previous.safetensors", "best.safetensors"),
    }
    for name in ("trained", "fused"):
        model = timm.create_model(f"local-dir:{tmp_path}/{name}", pretrained=True).eval()
        assert held_out_accuracy(model) == pytest.approx(accuracy)
        assert f"{accuracy:.2f}".rstrip("0") in (tmp_path / name / "README.md").read_text()
    evaluated = finish(start(*options, "--evaluate", "--finetune", tmp_path / "best.safetensors", "--output", tmp_path))
    for form in ("as trained", "deployed"):
        (line,) = [line for line in evaluated.splitlines() if line.startswith(f"{form}: ")]
        assert float(line.split("top1 ")[1].split(",")[0]) == pytest.approx(accuracy, rel=1e-5)


@torch.no_grad()
def held_out_accuracy(model: torch.nn.Module) -> float:
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    samples = Digits(train=False).samples
    logits = model(torch.stack([transform(image) for image, _ in samples]))
    return 100 * (logits.argmax(1) == torch.tensor([target for _, target in samples])).double().mean().item()


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("processes", [1, 2])
def test_images_of_ones_own(kind: str, processes: int, tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    if kind == "tar":
        pack(tmp_path / "data")
    else:
        (tmp_path / "data" / "validation").rename(tmp_path / "data" / "val")
    launcher = torchrun(2) if processes == 2 else ()
    options = ["--data-dir", tmp_path / "data", *MODEL, *QUICK, "--global-batch", 64, "--batch-size", 16]
    out = finish(start(*options, "--epochs", 2, "--workers", 1, "--output", tmp_path / "run", launcher=launcher))
    assert f"3 steps an epoch of 64 images: {processes} processes × {4 // processes} batches of 16" in out
    assert len(rows(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "fused" / "model.safetensors").is_file()


def write_shards(folder: Path) -> None:
    """Writes digits as WebDataset shards, two for each split."""
    info = {}
    for split in ("train", "validation"):
        names = [f"{split}-{i}.tar" for i in range(2)]
        samples = Digits(split == "train").samples
        parts = [samples[i :: len(names)] for i in range(len(names))]
        for name, part in zip(names, parts):
            with tarfile.open(folder / name, "w") as archive:
                for i, (image, target) in enumerate(part):
                    content = io.BytesIO()
                    image.resize((32, 32)).save(content, "JPEG")
                    for ending, data in (("jpg", content.getvalue()), ("cls", str(target).encode())):
                        entry = tarfile.TarInfo(f"{i:05d}.{ending}")
                        entry.size = len(data)
                        archive.addfile(entry, io.BytesIO(data))
        lengths = [len(part) for part in parts]
        info[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=len(samples))
    (folder / "_info.json").write_text(json.dumps({"splits": info}))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_starts_its_epoch_anew(processes: int, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data")
    launcher = torchrun(2) if processes == 2 else ()
    options = ["--dataset", "wds/digits", "--data-dir", tmp_path / "data", "--num-classes", 10, *MODEL, *QUICK]
    options += ["--no-aug", "--epochs", 2, "--resume", "auto", "--output", tmp_path / "run", "--checkpoint-interval", 3]
    process = start(*options, launcher=launcher)
    kill_somewhere(process, 1437 // 128 + 5, signal.SIGKILL if processes == 1 else signal.SIGTERM)
    out = finish(start(*options, launcher=launcher))
    assert "epoch 1: a stream can't go on in its middle, the epoch starts anew" in out
    assert f"epoch 1 step 1/{1437 // 128}" in out
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1"]
    model = timm.create_model(f"local-dir:{tmp_path}/run/trained", pretrained=True).eval()
    best = max(float(row[name]) for row in rows(tmp_path / "run") for name in ("top1", "ema_top1"))
    assert held_out_accuracy(model) == pytest.approx(best, abs=1) and best > 30  # JPEGs differ a little


def test_all_processes_evaluate_what_is_saved(tmp_path: Path) -> None:
    """Statistics of a "batch" norm are each process's own; the first one's are saved."""
    options = [*DIGITS, "--epochs", 2, "--output", tmp_path, "--lr", 0.01]
    finish(start(*options, launcher=torchrun(2)))
    best = max(float(row[name]) for row in rows(tmp_path) for name in ("top1", "ema_top1"))
    out = finish(start(*options, "--evaluate", "--finetune", tmp_path / "best.safetensors"))
    (line,) = [line for line in out.splitlines() if line.startswith("as trained: ")]
    losses = [float(row[name]) for row in rows(tmp_path) for name in ("loss", "ema_loss")]
    assert min(abs(float(line.split("loss ")[1].split(",")[0]) - loss) for loss in losses) < 1e-5
    assert f"top1 {best:.6g}" in line


@pytest.mark.parametrize(
    "options", [["--amp-dtype", "bfloat16", "--channels-last"], ["--amp-dtype", "float16"], ["--torchcompile"]]
)
def test_faster_ways_learn_too(options: list[str], tmp_path: Path) -> None:
    finish(start(*DIGITS, "--no-aug", "--epochs", 3, *options, "--output", tmp_path))
    finish(start(*DIGITS, "--no-aug", "--epochs", 4, *options, "--output", tmp_path, "--resume", "auto"))
    assert len(rows(tmp_path)) == 4 and max(float(row["top1"]) for row in rows(tmp_path)) > 60


# Nothing lost


def kill_somewhere(process: subprocess.Popen, steps: int, number: signal.Signals) -> list[str]:
    """Lets a run print as many lines of steps, then sends it a signal; returns what it printed."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        steps -= " step " in line
        if steps <= 0:
            break
    process.send_signal(number)
    with process.stdout:
        lines += process.stdout.readlines()
    process.wait(timeout=120)
    return lines


AUGMENTED = [*DIGITS, "--epochs", 3, "--checkpoint-interval", 3, "--drop-path", 0.2]


def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    finish(start(*AUGMENTED, "--output", tmp_path / "whole"))
    steps = random.Random(0)
    for _ in range(10):
        process = start(*AUGMENTED, "--output", tmp_path / "killed", "--resume", "auto")
        kill_somewhere(process, steps.randint(1, 6), signal.SIGKILL)
    finish(start(*AUGMENTED, "--output", tmp_path / "killed", "--resume", "auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not [file for file in (tmp_path / "killed").iterdir() if file.name.endswith(".writing")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_no_step(number: signal.Signals, tmp_path: Path) -> None:
    options = [*DIGITS, "--epochs", 2, "--checkpoint-interval", 1000, "--output", tmp_path, "--workers", 2]
    process = start(*options)
    lines = kill_somewhere(process, 4, number)
    assert process.returncode == train_imagenet.INTERRUPTED, lines
    taken = [line for line in lines if " step " in line and " loss " in line]
    assert checkpoint.read(tmp_path / checkpoint.LAST)[1]["step"] in (len(taken), len(taken) + 1)
    out = finish(start(*options, "--resume", "auto"))
    assert f"epoch 0 step {len(taken) + 1}/" in out and f"epoch 0 step {len(taken)}/" not in out


def test_a_signal_at_the_end_of_an_epoch_loses_no_line_of_the_summary(tmp_path: Path, monkeypatch) -> None:
    options = [*DIGITS, "--epochs", 2]
    assert run(*options, "--output", tmp_path / "whole") == 0
    log_step = train_imagenet.Run.log_step

    def log_and_stop(own: train_imagenet.Run, epoch: int, number: int, clock: object) -> None:
        log_step(own, epoch, number, clock)
        if (epoch, number + 1) == (0, own.loaders.steps):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as context:
        context.setattr(train_imagenet.Run, "log_step", log_and_stop)
        assert run(*options, "--output", tmp_path / "stopped") == train_imagenet.INTERRUPTED
    assert checkpoint.read(tmp_path / "stopped" / checkpoint.LAST)[1]["step"] == 11  # saved before it is evaluated
    assert run(*options, "--output", tmp_path / "stopped", "--resume", "auto") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_truncated_checkpoint_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = [*DIGITS, "--checkpoint-interval", 4, "--output", tmp_path, "--resume", "auto"]
    assert run(*options, "--epochs", 1) == 0
    expected = checkpoint.read(tmp_path / checkpoint.LAST)
    last = tmp_path / checkpoint.LAST
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[: len(content) // 2])
    assert run(*options, "--epochs", 1) == 0
    assert any("last.safetensors is no complete checkpoint" in record.message for record in caplog.records)
    again = checkpoint.read(last)
    assert again[1]["step"] == expected[1]["step"]
    assert all(torch.equal(value, again[0][name]) for name, value in expected[0].items())
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content[:100])
    assert run(*options, "--epochs", 1) == 2


def test_a_full_disk_leaves_what_was_saved(tmp_path: Path) -> None:
    options = [*DIGITS, "--checkpoint-interval", 4, "--output", tmp_path, "--resume", "auto"]
    assert run(*options, "--epochs", 1) == 0
    before = (tmp_path / checkpoint.LAST).read_bytes()
    for _ in range(2):
        out = finish(start(*options, "--epochs", 2, limit=10_000), status=2)
        assert "last.safetensors can't be written" in out
        assert (tmp_path / checkpoint.LAST).read_bytes() == before
        assert checkpoint.read(tmp_path / checkpoint.PREVIOUS)[1]["step"] < 11 + 1
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".writing")]


def test_unreadable_images_are_counted(tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "data")
    for name in ("3/1.jpg", "7/2.jpg"):
        (tmp_path / "data" / "train" / name).write_bytes(b"no image")
    whole = (tmp_path / "data" / "train" / "5" / "3.jpg").read_bytes()
    (tmp_path / "data" / "train" / "5" / "3.jpg").write_bytes(whole[:-200])
    options = ["--data-dir", tmp_path / "data", *MODEL, *QUICK, "--global-batch", 100, "--epochs", 1]
    assert run(*options, "--output", tmp_path / "a") == 0
    messages = [record.message for record in caplog.records if "passed over" in record.message]
    assert sorted(message.split()[2] for message in messages) == [
        str(tmp_path / "data" / "train" / name) for name in ("3/1.jpg", "5/3.jpg", "7/2.jpg")
    ]
    assert run(*options, "--max-unreadable", 2, "--output", tmp_path / "b") == 2
    assert "--max-unreadable 2" in capsys.readouterr().err


def test_unreadable_images_are_not_evaluated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_images(tmp_path / "data")
    options = ["--data-dir", tmp_path / "data", *MODEL, *QUICK, "--global-batch", 100]
    assert run(*options, "--epochs", 1, "--output", tmp_path / "run") == 0
    evaluate = [*options, "--output", tmp_path / "run", "--evaluate"]
    broken = [tmp_path / "data" / "validation" / name for name in ("3/4.jpg", "3/5.jpg", "9/19.jpg")]
    contents = [file.read_bytes() for file in broken]
    for file in broken:
        file.write_bytes(b"no image")
    assert run(*evaluate) == 0
    reported = [record.message for record in caplog.records]
    assert sorted(line.split()[2] for line in reported if "passed over" in line) == sorted(map(str, broken))
    for file in broken:
        file.unlink()
    caplog.clear()
    assert run(*evaluate) == 0  # the same as without these files
    without = [record.message for record in caplog.records if record.message.startswith("as trained: ")]
    assert [line for line in reported if line.startswith("as trained: ")] == without
    for file, content in zip(broken, contents):
        file.write_bytes(content)
    caplog.clear()
    assert run(*evaluate) == 0
    assert [record.message for record in caplog.records if record.message.startswith("as trained: ")] != without


def test_a_batch_of_unreadable_images_counts_for_nothing() -> None:
    args = train_imagenet.parse_args([*map(str, DIGITS), "--epochs", "1", "--output", "x"])
    own = train_imagenet.Run(args, train_imagenet.Processes(0, 1, torch.device("cpu")))
    whole = list(own.loaders.validation)
    images, targets, _ = whole[0]
    expected = own.evaluate(own.model)
    own.loaders = own.loaders._replace(validation=[*whole, (images[:3], torch.full_like(targets[:3], NONE), [""])])
    assert own.evaluate(own.model) == expected and expected["loss"] > 0


def test_an_error_in_a_process_that_reads_images_ends_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "data", per_class=5)
    for file in (tmp_path / "data").rglob("*.jpg"):
        file.write_bytes(b"no image")
    options = ["--data-dir", tmp_path / "data", *MODEL, *QUICK, "--global-batch", 10, "--workers", 2]
    out = finish(start(*options, "--epochs", 1, "--output", tmp_path / "run"), status=2)
    assert out.splitlines()[-1].startswith("train_imagenet.py: ") and "can't be read" in out.splitlines()[-1]
    assert "Traceback" not in out


def test_augmentation_that_pillow_refuses_is_drawn_again() -> None:
    drawn = []

    def transform(image: object) -> float:
        drawn.append(random.random())
        if len(drawn) < 3:
            raise ValueError("bits must be between or equal to 1 and 8")
        return drawn[-1]

    samples = Samples(Digits(train=False), transform, seed=0, train=True)
    image, _, unreadable = samples[0, 5]
    assert image == drawn[2] and unreadable == "" and len(set(drawn)) == 3
    broken = Samples(Digits(train=False), lambda image: int("no number"), seed=0, train=True)
    with pytest.raises(ValueError, match="no number"):
        broken[0, 5]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, capsys) -> None:
    assert run(*DIGITS, "--epochs", 2, "--lr", 1e20, "--warmup-epochs", 0, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert "the loss of step" in error and "there is no good checkpoint" in error


def test_a_checkpoint_whose_weights_take_no_step_is_not_named_good(tmp_path: Path, monkeypatch, capsys) -> None:
    options = [*DIGITS, "--epochs", 2, "--checkpoint-interval", 1, "--output", tmp_path]
    take_step = train_imagenet.Run.train_step

    def take_three(own: train_imagenet.Run, batches: object, clock: object) -> float:
        if own.step == 3:
            own.model.head.fc.weight.data.fill_(float("nan"))
        return take_step(own, batches, clock)

    monkeypatch.setattr(train_imagenet.Run, "train_step", take_three)
    assert run(*options) == 2
    assert checkpoint.read(tmp_path / checkpoint.LAST)[1]["step"] == 3
    assert f"the last good checkpoint is {tmp_path / checkpoint.PREVIOUS}, of step 2" in capsys.readouterr().err


# The same numbers


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        name: value for name, value in checkpoint.read(folder / checkpoint.LAST)[0].items() if name.startswith("model.")
    }


EXACT = ["--model-dtype", "float64", "--opt", "sgd", "--lr", 0.05, "--no-aug", "--drop-path", 0, "--epochs", 2]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    options = [*DIGITS, *EXACT, "--sync-norm", "--global-batch", 130]
    finish(start(*options, "--batch-size", 130, "--output", tmp_path / "one"))
    finish(start(*options, "--output", tmp_path / "two", launcher=torchrun(2)))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert checkpoint.read(tmp_path / "two" / checkpoint.LAST)[1]["step"] == 22
    fresh = timm.create_model("mrconvnext_atto", num_classes=10, **SMALL_OPTIONS).state_dict()
    for name, value in one.items():
        if value.is_floating_point():
            scale = value.abs().max().clamp(min=1e-3)
            assert (value - two[name]).abs().max() <= 1e-10 * scale, name
    assert not torch.equal(one["model.head.fc.weight"], fresh["head.fc.weight"].double())


SMALL_OPTIONS = dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), img_size=32)


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    """Of a ConvNeXt: statistics of branches are those of a batch."""
    options = ["--dataset", "digits", "--model", "convnext_atto", *MODEL[2:], *QUICK, *EXACT]
    assert run(*options, "--output", tmp_path / "a") == 0
    assert run(*options, "--batch-size", 32, "--output", tmp_path / "b") == 0
    whole, parts = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-10, rtol=1e-10)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    options = ["--dataset", "digits", *PARSEVAL, *QUICK, *EXACT]
    assert run(*options, "--output", tmp_path / "a") == 0
    assert run(*options, "--grad-checkpointing", "--output", tmp_path / "b") == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any("running_var" in name for name in a)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=1e-12, rtol=1e-12)
    assert [row["train_loss"][:12] for row in rows(tmp_path / "a")] == [
        row["train_loss"][:12] for row in rows(tmp_path / "b")
    ]


def test_the_kernels_are_a_group_of_their_own() -> None:
    args = train_imagenet.parse_args(
        [*map(str, DIGITS), "--output", "x", "--layer-decay", "0.8", "--kernel-lr-scale", "0.5"]
    )
    model = small_model()
    optimizer = train_imagenet.make_optimizer(model, args)
    kernels = model.no_weight_decay()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = group
    assert set(seen) == set(names.values())
    assert all(seen[name]["weight_decay"] == 0 for name in kernels)
    assert seen["stages.0.blocks.0.conv_dw.weight"]["weight_decay"] == 0.05
    layer = "stages.0.blocks.0."
    ratio = seen[layer + "conv_dw.alpha"]["lr_scale"] / seen[layer + "mlp.fc1.weight"]["lr_scale"]
    assert ratio == pytest.approx(0.5) and seen["stem.0.weight"]["lr_scale"] < 0.8


def test_frozen_modules_stay_as_they_are(tmp_path: Path) -> None:
    args = train_imagenet.parse_args(
        [*map(str, DIGITS), "--epochs", "1", "--freeze", "stem", "stages.0", "--output", "x"]
    )
    own = train_imagenet.Run(args, train_imagenet.Processes(0, 1, torch.device("cpu")))
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    own.args.output = tmp_path
    own.train()
    changed = {name for name, value in own.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith(("stem", "stages.0."))} & changed
    assert {"stages.1.blocks.0.conv_dw.alpha", "head.fc.weight"} < changed


def test_kernels_are_made_for_the_images_unless_the_weights_have_some(tmp_path: Path) -> None:
    def grid(file: Path) -> tuple[int, int]:
        args = train_imagenet.parse_args(
            [*map(str, DIGITS), "--img-size", "64", "--finetune", str(file), "--output", "x"]
        )
        return train_imagenet.make_model(args, 10).stages[0].blocks[0].conv_dw.reference_grid

    options = dict(num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 48))
    save_file(timm.create_model("convnext_atto", **options).state_dict(), tmp_path / "convnext.safetensors")
    save_file(
        timm.create_model("mrconvnext_atto", **SMALL_OPTIONS, num_classes=10).state_dict(), tmp_path / "own.safetensors"
    )
    assert grid(tmp_path / "convnext.safetensors") == (16, 16)
    assert grid(tmp_path / "own.safetensors") == (8, 8)


def test_another_model_of_timm_keeps_its_classifier(tmp_path: Path) -> None:
    start_of_scales = QUICK.index("--ls-init")
    quick = QUICK[:start_of_scales] + QUICK[start_of_scales + 2 :]
    options = ["--dataset", "digits", "--model", "resnet18", *quick, "--output", tmp_path]
    assert run(*options, "--epochs", 1, "--layer-decay", 0.9) == 0
    best = max(float(row[name]) for row in rows(tmp_path) for name in ("top1", "ema_top1"))
    out = finish(start(*options, "--evaluate"))
    assert "as trained: " in out and f"top1 {best:.6g}" in out
    assert float(rows(tmp_path)[0]["lr"]) > 1e-7


# Bad input


def refused(arguments: list, capsys: pytest.CaptureFixture) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_imagenet.py: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda data: None, ["--data-dir", "nowhere"], ["nowhere"]),
        (lambda data: None, ["--data-dir", "data", "--val-split", "test"], ["data", "test"]),
        (lambda data: None, ["--data-dir", "data", "--num-classes", 7], ["7", "3"]),
        (lambda data: None, ["--data-dir", "data", "--global-batch", 5000], ["5000", "15"]),
        (lambda data: None, ["--data-dir", "data", "--global-batch", 10, "--batch-size", 4], ["4", "10"]),
        (lambda data: None, ["--data-dir", "data", "--model", "mrconvnext_giant"], ["mrconvnext_giant"]),
        (lambda data: None, ["--data-dir", "data", "--finetune", "none.pth"], ["none.pth"]),
        (lambda data: None, ["--data-dir", "data", "--finetune", "resnet.safetensors"], ["ConvNeXt"]),
        (lambda data: (data / "validation" / "2").rename(data / "validation" / "x"), ["--data-dir", "data"], ["2, x"]),
        (lambda data: [f.unlink() for f in data.rglob("*.jpg")], ["--data-dir", "data"], ["data", "0 images"]),
        (lambda data: [f.write_text("text") for f in data.rglob("*.jpg")], ["--data-dir", "data"], ["can't be read"]),
        (lambda data: keep_one_class(data), ["--data-dir", "data"], ["one class only"]),
    ],
    ids=[
        *(
            "no folder",
            "no split",
            "classes",
            "batch",
            "parts",
            "model",
            "no file",
            "family",
            "differ",
            "empty",
            "text",
        ),
        "one class",
    ],
)
def test_bad_input(change, options: list, words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", per_class=5, classes=3)
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), "resnet.safetensors")
    change(tmp_path / "data")
    error = refused([*MODEL, *QUICK, "--global-batch", 4, "--epochs", 1, "--output", "run", *options], capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--global-batch", 125], ["--global-batch 125", "even"]),
        (["--global-batch", 130, "--batch-size", 65], ["--batch-size 65", "even"]),
        (["--aa", "foo"], ["--aa", "foo"]),
        (["--opt", "foo"], ["--opt foo"]),
        (["--freeze", "nope"], ["--freeze nope", "stages"]),
        (["--model-kwargs", "dims=(16,24)"], ["mrconvnext_atto"]),
        (["--finetune", "list.pth"], ["list.pth"]),
        (["--finetune", "number.pth"], ["number.pth"]),
        (["--evaluate"], ["best.safetensors"]),
        (["--dataset", "foo/bar"], ["--dataset", "foo/bar"]),
    ],
)
def test_bad_arguments_leave_no_trace(options: list, words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([1, 2], "list.pth")
    torch.save({"model": 5}, "number.pth")
    error = refused([*DIGITS, "--epochs", 1, "--output", "run", *options], capsys)
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [["--epochs", 0], ["--global-batch", -4], ["--log-interval", 0], ["--seed", -1], ["--device", "tpu"]]
    + [["--model-kwargs", "foo"], ["--smoothing", 1.5], ["--scale", 1, 0.5]],
)
def test_arguments_out_of_range(options: list, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*DIGITS, "--output", "run", *options)
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


def test_checkpoints_without_arguments_are_not_overwritten(tmp_path: Path, capsys) -> None:
    assert run(*DIGITS, "--epochs", 1, "--output", tmp_path / "run") == 0
    (tmp_path / "run" / "args.yaml").unlink()
    assert "--resume auto" in refused([*DIGITS, "--epochs", 1, "--output", tmp_path / "run"], capsys)
    other = ["--dataset", "digits", "--model", "convnext_atto", *MODEL[2:], *QUICK]
    error = refused([*other, "--epochs", 1, "--output", tmp_path / "run", "--resume", "auto"], capsys)
    assert "--model mrconvnext_atto" in error
    assert (tmp_path / "run" / "last.safetensors").stat().st_mode == (tmp_path / "run" / "summary.csv").stat().st_mode


def keep_one_class(data: Path) -> None:
    for file in data.rglob("[12]/*.jpg"):
        file.unlink()


def test_a_folder_of_another_run_is_refused(tmp_path: Path, capsys) -> None:
    assert run(*DIGITS, "--epochs", 1, "--output", tmp_path) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert "--resume auto" in refused([*DIGITS, "--epochs", 1, "--output", tmp_path], capsys)
    error = refused([*DIGITS, "--seed", 7, "--epochs", 1, "--output", tmp_path, "--resume", "auto"], capsys)
    assert "--seed 42" in error
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_a_batch_that_can_not_be_split_over_processes() -> None:
    args = train_imagenet.parse_args([*map(str, DIGITS), "--output", "x", "--global-batch", "9"])
    with pytest.raises(train_imagenet.Refused, match="9.*2 processes"):
        train_imagenet.split_batch(args, 2)


def test_defaults_are_convnexts_recipe() -> None:
    args = train_imagenet.parse_args(["--output", "x", "--data-dir", "y"])
    recipe = dict(epochs=300, opt="adamw", lr=4e-3, weight_decay=0.05, global_batch=4096, warmup_epochs=20)
    recipe |= dict(mixup=0.8, cutmix=1.0, reprob=0.25, smoothing=0.1, model_ema_decay=0.9999, clip_grad=None)
    assert {name: getattr(args, name) for name in recipe} == recipe and args.aa.startswith("rand-m9-mstd0.5")
    assert yaml.safe_dump(train_imagenet.plain(args))
    model = train_imagenet.make_model(train_imagenet.parse_args(["--output", "x", "--model", "mrconvnext_small"]), 10)
    assert model.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.4)
