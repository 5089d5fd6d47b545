"""train_sequences.py: runs on a small ListOps, resumed, evaluated, in several processes; what it refuses."""

import json
import random
import shutil
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch
from runs import ALONE, assert_same_run, command, contents

import train_sequences
from mrconvnext import MRConvSequence
from mrconvnext.kernels import KERNELS
from mrconvnext.tasks import tones
from mrconvnext.tasks.datasets import TASKS, collate, open_task
from mrconvnext.training import checkpoints
from mrconvnext.training.precision import Precision
from mrconvnext.training.presets import METHODS, preset
from mrconvnext.training.sequences import make_model, parse_args

TINY = "--dim 8 --depth 1 --global-batch 16 --epochs 2 --checkpoint-interval 2 --log-interval 1 --device cpu".split()


def expression(choose: random.Random) -> tuple[str, int]:
    """Returns an expression of ListOps as it is published, and its value."""
    numbers = [choose.randrange(10) for _ in range(choose.randrange(2, 12))]
    name, value = choose.choice([("MAX", max(numbers)), ("MIN", min(numbers)), ("SM", sum(numbers) % 10)])
    text = f"( [{name} {numbers[0]} )"
    for number in numbers[1:]:
        text = f"( {text} {number} )"
    return f"( {text} ] )", value


@pytest.fixture(scope="module")
def listops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, choose = tmp_path_factory.mktemp("listops"), random.Random(0)
    for split, count in (("train", 80), ("val", 20), ("test", 30)):
        lines = [f"{source}\t{target}" for source, target in (expression(choose) for _ in range(count))]
        (folder / f"basic_{split}.tsv").write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    return folder


def main(*arguments: object) -> int:
    """Returns the exit status of a run in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with unittest.mock.patch.object(sys, "argv", ["train_sequences.py"]):
            return train_sequences.main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def options(listops: Path) -> list[str]:
    return ["--task", "listops", "--data-dir", str(listops), "--method", "fourier", "--dropout", "0.1", *TINY]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(*options, "--output", folder) == 0
    return folder


def test_a_run_leaves_its_weights_in_both_forms(finished: Path, listops: Path) -> None:
    test = json.loads((finished / "test.json").read_text())
    assert set(test) == {"as trained", "deployed"} and abs(test["deployed"]["loss"] - test["as trained"]["loss"]) < 1e-4
    sequences = open_task("listops", listops)[2]
    x, mask, targets = collate([sequences[i] for i in range(len(sequences))])
    for form in ("trained", "fused"):
        model = MRConvSequence.from_pretrained(finished / form).eval()
        with torch.no_grad():
            right = (model(x, mask).argmax(1) == targets).double().mean()
        assert 100 * right.item() == pytest.approx(test["as trained"]["top1"])
    assert (finished / "curves.png").is_file() and len((finished / "summary.csv").read_text().splitlines()) == 3


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not(finished: Path, options: list[str], tmp_path: Path) -> None:
    class StoppedAfter(train_sequences.SequenceRun):
        def save(self) -> None:
            super().save()
            if self.progress.step == 7:
                self.stop.set()

    arguments = [*options, "--checkpoint-interval", "7", "--output", tmp_path / "run"]
    with unittest.mock.patch.object(train_sequences, "SequenceRun", StoppedAfter):
        assert main(*arguments) == 75
    assert not (tmp_path / "run" / "test.json").exists()
    assert main("--output", tmp_path / "run", "--resume", "auto") == 0
    assert_same_run(tmp_path / "run", finished)


def test_processes_share_the_steps(options: list[str], tmp_path: Path) -> None:
    exact = [*options, "--model-dtype", "float64", "--opt", "sgd", "--lr", "0.01", "--dropout", "0", "--epochs", "1"]
    exact += ["--norm", "layer", "--batch-size", "4"]
    assert main(*exact, "--output", tmp_path / "one") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command([*launcher, train_sequences.__file__, *exact, "--output", str(tmp_path / "two")], tmp_path)
    one, two = (checkpoints.read(tmp_path / name / checkpoints.LAST)[0] for name in ("one", "two"))
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-9 * value.abs().max().clamp(min=1), name


def test_evaluates_a_run(finished: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    test = json.loads((finished / "test.json").read_text())
    before = contents(finished)
    with caplog.at_level("INFO"):
        assert main("--output", finished, "--evaluate") == 0
    for form, found in test.items():
        line = next(line for line in caplog.messages if line.startswith(f"test, {form}: "))
        assert float(line.split("top1 ")[1].split(",")[0]) == pytest.approx(found["top1"], rel=1e-4)
    assert contents(finished) == before


def test_an_lstm_to_compare_with(listops: Path, tmp_path: Path) -> None:
    arguments = ["--task", "listops", "--data-dir", listops, "--method", "lstm", *TINY, "--output", tmp_path / "run"]
    assert main(*arguments) == 0
    assert set(json.loads((tmp_path / "run" / "test.json").read_text())) == {"as trained"}
    assert not (tmp_path / "run" / "trained").exists()
    model = make_model(parse_args([str(word) for word in arguments])).eval()
    sequences = [open_task("listops", listops)[2][i] for i in range(4)]
    x, mask, _ = collate(sequences)
    single = torch.cat([model(sequence[None]) for sequence, _ in sequences])
    torch.testing.assert_close(model(x, mask), single)


def test_another_rate_with_kernels_that_follow_it_or_stay(tmp_path: Path) -> None:
    tones.generate(tmp_path / "tones", {"train": 64, "validation": 16, "test": 40})
    run = ["--output", tmp_path / "run"]
    assert main("--task", "tones", "--data-dir", tmp_path / "tones", "--method", "fourier", *TINY, *run) == 0
    found = {}
    for name, more in {"kept": ["--keep-kernels"], "resampled": []}.items():
        model = make_model(parse_args(["--output", str(run[1]), "--evaluate"]))
        model.load_state_dict(checkpoints.read(run[1] / checkpoints.BEST)[0])
        found[name] = train_sequences.test(
            model,
            parse_args([*map(str, run), "--evaluate", "--test-rate", "2", *more]),
            ALONE,
            Precision.of(parse_args([*map(str, run), "--evaluate"]), torch.device("cpu")),
        )
        assert found[name]["deployed"]["loss"] == pytest.approx(found[name]["as trained"]["loss"], rel=1e-4)
    assert found["kept"]["deployed"]["loss"] != pytest.approx(found["resampled"]["deployed"]["loss"], rel=1e-3)
    whole = json.loads((run[1] / "test.json").read_text())["deployed"]["loss"]
    assert abs(found["resampled"]["deployed"]["loss"] - whole) < abs(found["kept"]["deployed"]["loss"] - whole)


# Presets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_and_method_has_a_preset_that_makes_a_model(task: str, method: str) -> None:
    if method == "lstm" and TASKS[task].pairs:
        return
    words = ["--task", task, "--method", method, "--data-dir", "x", "--output", "y", "--dim", "4", "--depth", "1"]
    args = parse_args(words)
    source, own = preset(task, method)
    assert args.lr == own["lr"] and args.epochs == own["epochs"] and args.source == source
    with torch.device("meta"):
        model = make_model(args)
    assert model.head.out_features == TASKS[task].classes


def test_presets_are_the_published_ones() -> None:
    args = parse_args("--task pathx --method sgconv --data-dir x --output y".split())
    assert (args.depth, args.dim, args.prenorm, args.lr, args.weight_decay) == (6, 256, True, 0.004, 0.03)
    assert args.options == {
        "taps": 64,
        "kernel_args": {"init_scale": 1, "start": "cos", "decay_min": 1, "decay_max": 3},
    }
    assert args.kernel_lr_scale * args.lr == pytest.approx(1e-3)
    args = parse_args("--task listops --method multires --data-dir x --output y".split())
    assert (args.depth, args.dim, args.dropout, args.lr, args.epochs) == (10, 128, 0.1, 0.003, 100)
    assert args.causal and args.options == {"taps": 4} and args.kernel_lr_scale == 1
    args = parse_args("--task listops --data-dir x --output y --epochs 2".split())
    assert args.warmup_epochs == pytest.approx(0.1)
    args = parse_args("--task tones --data-dir x --output y --rate 200".split())
    assert args.options["min_length"] == 10
    args = parse_args("--task pathx --method fourier --data-dir x --output y --no-prenorm --options modes=3".split())
    assert args.options["concat_decay"] == 2.0 and args.options["modes"] == 3 and not args.prenorm
    assert {kind for kind in KERNELS} < set(METHODS)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--samples", "81"], "--samples 81 is more than the 80 sequences to train"),
        (["--global-batch", "81"], "--global-batch 81 is more than the 80 sequences to train"),
        (["--rate", "2"], "--task listops at --rate or --test-rate 2: rate must be 1"),
        (["--options", "taps=-1"], "--options: taps must be an integer of at least 1, got -1"),
        (["--data-dir", "nowhere"], "python -m mrconvnext.tasks listops"),
        (["--opt", "oak"], "--opt oak"),
    ],
)
def test_bad_arguments_are_one_line(
    change: list[str], words: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(*options, *change, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("train_sequences.py: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output y", "the following arguments are required: --task"),
        ("--task listops --output y", "the following arguments are required: --data-dir"),
        ("--task oak --data-dir x --output y", "invalid choice: 'oak'"),
        ("--task listops --method oak --data-dir x --output y", "invalid choice: 'oak'"),
        ("--output y --evaluate", "--output y does not hold a run"),
        ("--task tones --data-dir x --output y --rate 4 --test-rate 2 --keep-kernels", "longer than the kernels"),
        (
            "--task listops --data-dir x --output y --options oak=1",
            "--options oak: --method fourier_sparse has the options",
        ),
        (
            "--task listops --data-dir x --output y --options kernel=sparse",
            "--options kernel: --method fourier_sparse has",
        ),
        ("--task listops --data-dir x --output y --method lstm --options taps=3", "--method lstm has no options"),
        ("--task tones --data-dir x --output y --rate 3000", "must be at most the 2000 positions of the task"),
    ],
)
def test_missing_and_unknown_words_are_named(words: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_args(words.split())
    assert message in capsys.readouterr().err


def test_damaged_weights_are_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copied = shutil.copytree(finished, tmp_path / "copy")
    (copied / "best.safetensors").write_bytes(b"oak")
    assert main("--output", copied, "--evaluate") == 2
    assert "best.safetensors is not a complete checkpoint" in capsys.readouterr().err
