"""The runner of the experiments as its users run it, with short rows on digits in place of its own."""

import contextlib
import csv
import fcntl
import gzip
import io
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from experiments import report, resolution, rows, run, speed
from experiments.data import MissingData, draw, write, write_fashion
from experiments.photographs import write_weights
from mrconvnext.benchmarking import timing

OPTIONS = "--dataset digits --img-size 32 --model convnext_atto --model-kwargs depths=(1,1,1,1) dims=(8,8,8,8)".split()
OPTIONS += "--global-batch 64 --epochs 2 --workers 0 --mixup 0 --cutmix 0 --log-interval 2 --aa=".split()
OPTIONS += "--model-ema-decay 0 --warmup-epochs 0.1 --lr 0.01 --no-lr-scaling --ls-init 0.1".split()

DOCS = Path(__file__).parent.parent / "docs"


def use_short_rows(monkeypatch: pytest.MonkeyPatch) -> list[rows.Row]:
    """Has the runner take short rows on digits for its own, and returns them."""
    first = rows.Row("first", "ConvNeXt", 0, "digits", tuple(OPTIONS))
    own = [
        first,
        rows.Row("first", "fails", 0, "digits", (*OPTIONS, "--opt", "none")),
        rows.Row("second", "tuned", 0, "digits", tuple(OPTIONS), first.identifier),
        rows.Row("second", "starts from what failed", 0, "digits", tuple(OPTIONS), "first-fails-0"),
    ]
    monkeypatch.setattr(run, "all_rows", lambda: own)
    monkeypatch.setattr(run, "write", lambda name, folder, sources: None)
    return own


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> list[rows.Row]:
    return use_short_rows(monkeypatch)


class Runs(NamedTuple):
    """The same folder after the runner was stopped in the middle of its first row, after it went on, and once more."""

    folder: Path
    stopped: tuple[int, bool]  # exit status, and whether there were results
    handlers: tuple[dict, dict]  # of signals, before and after
    status: int
    errors: str
    results: bytes
    again: tuple[int, bytes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(io.StringIO()) as errors:
        first = use_short_rows(monkeypatch)[0]
        log, file = folder / "runs" / f"{first.identifier}.log", folder / "results.csv"
        stop = threading.Thread(
            target=after_steps, args=(log, lambda: os.kill(os.getpid(), signal.SIGTERM)), daemon=True
        )
        before = handlers()
        stop.start()
        status = run.main(["--output", str(folder), "--groups", "first", "--jobs", "1"])
        stop.join()
        stopped, after = (status, file.exists()), handlers()
        status = run.main(["--output", str(folder)])
        results = file.read_bytes()
        again = run.main(["--output", str(folder)]), file.read_bytes()
    return Runs(folder, stopped, (before, after), status, errors.getvalue(), results, again)


def handlers() -> dict:
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def after_steps(log: Path, act: Callable[[], None]) -> None:
    """Acts once a row has taken steps."""
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count(" step ") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    act()


def lines_of(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return {line["identifier"]: line for line in csv.DictReader(file)}


@pytest.mark.slow
def test_a_row_that_fails_is_kept_and_the_others_go_on(runs: Runs) -> None:
    found = lines_of(runs.folder)
    assert {name: line["status"] for name, line in found.items()} == {
        "first-ConvNeXt-0": "done",
        "first-fails-0": "failed",
        "second-tuned-0": "done",  # and what starts from the one that failed waits for it
    }
    assert runs.status == 1 and "--opt none" in found["first-fails-0"]["reason"]
    assert "first-fails-0" in runs.errors and "second-starts-from-what-failed-0" in runs.errors
    done = found["first-ConvNeXt-0"]
    assert float(done["top1"]) > 12 and float(done["step_ms"]) > 0 and done["steps"] == str(2 * (1437 // 64))
    assert done["commit"] and done["hardware"] and "--seed 0" in done["command"]
    assert float(found["second-tuned-0"]["top1"]) > float(done["top1"])


@pytest.mark.slow
def test_rows_with_a_result_are_not_run_again(runs: Runs) -> None:
    assert runs.again == (1, runs.results)


@pytest.mark.slow
def test_an_interrupted_row_goes_on(runs: Runs) -> None:
    status, had_results = runs.stopped
    assert status == 75 and not had_results
    assert runs.handlers[0] == runs.handlers[1]
    assert "resuming at step" in (runs.folder / "runs" / "first-ConvNeXt-0.log").read_text()


def test_a_row_that_a_killed_runner_left_keeps_others_out(short_rows: list, tmp_path: Path, capsys) -> None:
    left: list[int] = []
    end = tmp_path / "end"
    wait = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)"
    (tmp_path / "wait.py").write_text(wait)
    with run.only_one(tmp_path) as lock:
        runner = run.Runner(run.parse_args(["--output", str(tmp_path)]), lock)
        command = ["python", str(tmp_path / "wait.py"), str(end)]
        thread = threading.Thread(target=lambda: left.append(runner.call(command, tmp_path / "log")))
        thread.start()
        while not runner.processes:
            time.sleep(0.01)
    assert run.main(["--output", str(tmp_path)]) == 2 and "killed one left" in capsys.readouterr().err
    end.touch()
    thread.join()
    assert left == [0]
    with run.only_one(tmp_path):
        pass


def test_a_row_that_is_killed_says_so(tmp_path: Path) -> None:
    assert run.failure(b"epoch 0 step 1", -9)["reason"] == "killed by SIGKILL"
    assert run.failure(b"first\nlast\n", 1)["reason"] == "exit status 1: last"


def test_a_second_runner_is_refused(short_rows: list, tmp_path: Path, capsys) -> None:
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.main(["--output", str(tmp_path)]) == 2
    assert "another runner" in capsys.readouterr().err and not (tmp_path / "results.csv").exists()


def test_results_of_another_command_or_version_are_refused(short_rows: list, tmp_path: Path, capsys) -> None:
    """What a row was when it ran counts, not its name."""
    row, file = short_rows[0], tmp_path / "results.csv"
    line = dict.fromkeys(run.COLUMNS, "") | {"identifier": row.identifier, "status": "done"}
    for change, word in (
        ({"command": "python -m train_imagenet --seed 1"}, "another command"),
        ({"more": ""}, "version"),
    ):
        run.append(file, line | change)
        assert run.main(["--output", str(tmp_path)]) == 2
        assert word in capsys.readouterr().err
        file.unlink()


def test_what_others_start_from_runs_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (
        rows.Row(name, "", 0, "digits", (), start) for name, start in zip("abc", (None, "a--0", "b--0"))
    )
    monkeypatch.setattr(run, "all_rows", lambda: [third, second, first])
    assert run.in_waves([third]) == run.in_waves([third, second, first]) == [[first], [second], [third]]


def test_missing_images_say_how_to_get_them(tmp_path: Path, capsys) -> None:
    options = ["--output", str(tmp_path), "--fashion-mnist", str(tmp_path / "none")]
    assert run.main([*options, "--groups", "main"]) == 2
    error = capsys.readouterr().err
    assert "dataset-fashion-mnist" in error and "none" in error and error.count("\n") == 1
    assert not list((tmp_path / "data").glob("fashion*"))


def test_damaged_images_name_their_file(tmp_path: Path) -> None:
    file = tmp_path / "train-images-idx3-ubyte.gz"
    for content in (b"no archive", gzip.compress(bytes(1000))[:-20]):
        file.write_bytes(content)
        with pytest.raises(MissingData, match=file.name):
            write_fashion(tmp_path, tmp_path / "out")


def test_rows_of_a_table_differ_in_the_convolution_alone() -> None:
    own = rows.all_rows()
    varied = ("model", "model_kwargs", "output", "keep_kernels", "pretrained", "given")
    assert len({row.identifier for row in own}) == len(own)
    for group in {row.group for row in own} - {"changes"}:
        recipes, shapes = set(), set()
        for row in own:
            if row.group == group:
                args = vars(row.arguments)
                recipes.add(str((row.data, {name: value for name, value in args.items() if name not in varied})))
                shapes.add(str([args["model_kwargs"].get(name) for name in ("depths", "dims", "patch_size")]))
        assert len(recipes) == len(shapes) == 1, group
    assert {row.seed for row in rows.main_rows() if row.name == "ConvNeXt"} == set(range(5))
    assert all(any(other.identifier == row.start for other in own) for row in own if row.start)


def test_every_row_names_its_norm() -> None:
    """A row must mean the same whatever the default is."""
    for row in rows.all_rows():
        named = "branch_norm" in row.arguments.model_kwargs
        assert named or not row.arguments.model.startswith("mrconvnext"), row.identifier


def test_fashion_mnist_is_written_as_it_is(tmp_path: Path) -> None:
    """The test is of the last training images, of which none is trained on; the official test is for choosing."""
    count = 20_000
    pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 3).astype(np.uint8)
    for prefix, own in (("train", count), ("t10k", 6)):
        for name, header, values in (("images-idx3", 16, pixels[:own]), ("labels-idx1", 8, labels[:own])):
            with gzip.open(tmp_path / f"{prefix}-{name}-ubyte.gz", "wb", compresslevel=0) as file:
                file.write(bytes(header) + values.tobytes())
    write_fashion(tmp_path, tmp_path / "out", images=4, classes=(0, 2))
    folders = {
        split: sorted(file.relative_to(tmp_path / "out" / split) for file in (tmp_path / "out" / split).rglob("*.png"))
        for split in ("train", "validation", "test")
    }
    assert [file.parts[0] for file in folders["train"]] == ["0", "0", "2"]
    assert len(folders["validation"]) == 4
    assert len(folders["test"]) == sum(label != 1 for label in labels[-10_000:])
    for split, place, pixel in (("train", 1, 3), ("test", 0, next(i for i in range(10_000, count) if i % 3 == 0))):
        with Image.open(tmp_path / "out" / split / folders[split][place]) as image:
            assert np.array_equal(np.asarray(image), pixels[pixel])


def test_pictures_are_dealt_out_once(tmp_path: Path) -> None:
    """Whatever the number for training, validation and test are the same pictures; transparent ones lie on white."""
    (tmp_path / "img" / "twitter" / "64").mkdir(parents=True)
    own = []
    for i in range(16):
        Image.new("RGBA", (4, 4), (i, 0, 0, 255 if i else 0)).save(tmp_path / "img" / "twitter" / "64" / f"{i}.png")
        own.append({"image": f"{i}.png", "category": "Flags", "has_img_twitter": True})
    own += [{"image": "x.png", "category": "Flags", "has_img_twitter": False}]
    (tmp_path / "emoji.json").write_text(json.dumps(own))
    found = {}
    for count in (3, 100):
        folder = tmp_path / str(count)
        write(f"emoji-{count}", folder, {"emoji": tmp_path})
        for split in ("train", "validation", "test"):
            colours = [np.asarray(Image.open(file))[0, 0].tolist() for file in sorted((folder / split).rglob("*.png"))]
            found[count, split] = sorted(colours)
    assert [len(found[3, split]) for split in ("train", "validation", "test")] == [3, 2, 4]
    assert all(found[3, split] == found[100, split] for split in ("validation", "test"))
    everything = sum((found[100, split] for split in ("train", "validation", "test")), [])
    assert sorted(everything) == [[i, 0, 0] for i in range(1, 16)] + [[255, 255, 255]]
    for kind, option in (("emoji", "--emoji"), ("solar", "--elpv")):
        with pytest.raises(MissingData, match=option):
            write(f"{kind}-3", tmp_path / "none", {"emoji": None, "elpv": None})


def test_efficientnet_with_global_kernels_starts_as_itself(tmp_path: Path) -> None:
    """From a file of weights in the order of the package, and again from a file of its own."""
    plain = timm.create_model("tf_efficientnet_lite0").eval()
    torch.save({str(i): tensor for i, tensor in enumerate(plain.state_dict().values())}, tmp_path / "weights.pth")
    write_weights(tmp_path / "weights.pth", tmp_path / "lite0.safetensors")
    options = {"start": str(tmp_path / "lite0.safetensors"), "img_size": 64}
    model = timm.create_model("tf_efficientnet_lite0_global", **options).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(x), plain(x), atol=1e-5)
        kernels = model.kernel_parameters()
        assert kernels and kernels <= model.no_weight_decay()
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.add_(torch.randn_like(parameter))
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        overlay = {"file": str(tmp_path / "own.safetensors")}
        again = timm.create_model(
            "tf_efficientnet_lite0_global", pretrained=True, pretrained_cfg_overlay=overlay, **options
        ).eval()
        assert torch.equal(again(x), model(x)) and not torch.allclose(model(x), plain(x), atol=1e-2)
    torch.save({"0": torch.zeros(3)}, tmp_path / "other.pth")
    for file in ("other.pth", "none.pth"):
        with pytest.raises(MissingData, match=file):
            write_weights(tmp_path / file, tmp_path / "lite0.safetensors")


def test_drawings_hold_two_curves_and_two_discs() -> None:
    """With the discs in one piece if they are joined, in two if they are not, at the same places."""
    drawings = {joined: draw(64, joined, np.random.default_rng(1)) for joined in (False, True)}
    places = {}
    for joined, image in drawings.items():
        curves = pieces(np.asarray(image) > 60)
        discs = pieces(np.asarray(image.filter(ImageFilter.MinFilter(5))) > 60)
        assert image.size == (64, 64) and len(curves) == len(discs) == 2
        assert sum(any(disc <= curve for disc in discs) for curve in curves) == (1 if joined else 2)
        places[joined] = sorted(np.mean(list(disc), axis=0).tolist() for disc in discs)
        same = draw(64, joined, np.random.default_rng(1))
        assert np.array_equal(np.asarray(image), np.asarray(same))
    assert np.allclose(places[False], places[True], atol=1)


def pieces(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Returns the connected pieces of a mask."""
    left, found = {tuple(place) for place in np.argwhere(mask)}, []
    while left:
        stack, own = [left.pop()], set()
        while stack:
            y, x = stack.pop()
            own.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            stack += near
        found.append(own)
    return found


def test_times_leave_out_interruptions() -> None:
    line = "epoch {} step {}/40 loss 1.0 lr 1.00e-03 data {}s forward 0.0s backward 0.0s step 0.0s\n"
    lines = [line.format(*values) for values in ((0, 20, 2.0), (0, 40, 4.0), (1, 20, 2.0), (1, 30, 0.5), (1, 40, 1.5))]
    assert run.times("".join([*lines[:3], "resuming at step 60\n", *lines[3:]])) == (pytest.approx(100), 40)
    halves = [line.format(0, step, seconds) for step, seconds in ((20, 2.0), (21, 2.1), (40, 2.2), (60, 4.2))]
    log = f"{halves[0]}{halves[1]}resuming at step 21 of 40\n{halves[2]}{halves[3]}"
    assert run.times(log) == (pytest.approx(100), 40)
    step_ms, steps = run.times(line.format(1, 40, 0.1))
    assert step_ms != step_ms and steps == 40  # resumed for its last steps: nothing to tell the time by


def result(group: str, name: str, seed: int, test: float, top1: float = 80) -> dict[str, str]:
    own = {"group": group, "name": name, "seed": str(seed), "status": "done", "top1": str(top1), "test_top1": str(test)}
    identifier = rows.Row(group, name, seed, data="", options=()).identifier
    return {**own, "identifier": identifier, "parameters": "1000", "steps": "9", "wall_s": "7200", "jobs": "2"}


def test_the_tables_say_what_the_results_say() -> None:
    values = {"ConvNeXt": (70, 72), "local taps, kernel": (72, 75)}
    lines = [result("main", name, seed, top1) for name, own in values.items() for seed, top1 in enumerate(own)]
    lines.append({**lines[0], "name": "paper's layer, batch", "status": "failed"})
    spec = rows.main_rows()[0].spec
    speeds = {(spec, "default", 16, 64): 288.0, (spec, "fused blocks", 16, 64): 576.0, (spec, "default", 16, 32): 1.0}
    text = report.with_tables("before\n<!-- main -->\nold\n<!-- end -->\nafter", lines, speeds)
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    assert "| ConvNeXt | 2 | 71.00 ± 1.41 |  | 2 (1 with our blocks) |  | 80.00 ± 0.00 | 1,000 | 9 |" in text
    # Of +2 and +3: 2.5 and 12.706 (Student's t of one degree of freedom) times 0.5.
    difference = "+2.50 (-3.85 … +8.85) |  | +2.00, +3.00"
    assert f"| local taps, kernel | 2 | 73.50 ± 2.12 | {difference} | 80.00 ± 0.00 | 1,000 | 9 |" in text
    assert "| paper's layer, batch | 0 (1 failed) |" in text
    assert report.with_tables(text, lines, speeds) == text
    batch = [result("main", "local taps, batch", seed, 70, top1) for seed, top1 in ((0, 80.5), (1, 79), (2, 99))]
    text = report.with_tables("<!-- kernel less batch -->\n<!-- end -->", lines + batch, speeds)
    assert "| main | 2 | +0.25 (-9.28 … +9.78) | -0.50, +1.00 |" in text
    other = "<!-- of another program -->\nits table\n<!-- end -->"
    assert report.with_tables(other, lines, speeds) == other


def test_the_comparison_is_paired_by_seed() -> None:
    lines = [result("two passes", "ConvNeXt", seed, top1) for seed, top1 in enumerate((70, 80, 99))]
    lines += [result("two passes", "local taps, kernel", seed, top1) for seed, top1 in enumerate((71, 81))]
    lines += [result("equal time", "local taps, kernel", 1, 82.5)]
    text = report.with_tables("<!-- compared -->\n<!-- end -->", lines, {})
    assert "equal steps | 2 | 75.00 | 76.00 | +1.00 (+1.00 … +1.00) |" in text
    assert text.count("\n") == 4  # nothing of a single seed, or of what was not run


def test_readme_has_the_command_of_its_table_and_how_long_it_takes() -> None:
    lines = [result("fine-tuning", name, seed, 75) for name in rows.COMPARED for seed in range(5)]
    lines += [result("before fine-tuning", "ConvNeXt", 0, 70), result("main", "ConvNeXt", 0, 70)]
    text = report.with_tables("<!-- compared in README -->\n<!-- end -->", lines, {})
    assert "| 5 | 75.00 | 75.00 | +0.00 (+0.00 … +0.00) |" in text
    # Eleven rows of two hours, two at once: those that others start from too, and none of other tables.
    assert "    --fashion-mnist FOLDER    # 11.0 hours on two cores\n" in text
    assert report.with_tables(text, lines, {}) == text
    asked = shlex.split(text.partition("experiments.run ")[2].partition("#")[0].replace("\\\n", " "))
    assert tuple(run.parse_args(asked).groups) == report.IN_README


@pytest.mark.parametrize("group", ["main", "drawings 32", "drawings 64, 2 passes"])
def test_what_was_timed_is_what_was_trained(group: str) -> None:
    published = DOCS / "results"
    parameters = {line["identifier"]: int(line["parameters"]) for line in report.read_lines(published / "results.csv")}
    classes, features = (10, 96) if group == "main" else (2, 128)
    for (own, _), row in report.first_rows().items():
        side = row.arguments.img_size
        if own == group:
            timed = report.read_lines(published / "speed" / f"training-{side}" / "benchmark.csv")
            found = {int(line["parameters"]) for line in timed if line["model"] == row.spec}
            # Speeds are taken with a classifier of 1,000 classes.
            assert found == {parameters[row.identifier] + (1000 - classes) * (features + 1)}


def test_readme_compares_five_seeds() -> None:
    accuracies = report.accuracies_of(report.read_lines(DOCS / "results" / "results.csv"))
    for group in report.IN_README:
        assert all(len(accuracies[own]) == 5 for own in ((group, "local taps, kernel"), report.baseline_of(group)))


@pytest.mark.slow
def test_speeds_are_measured_as_the_tables_take_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    # Not in fresh processes, which take long to start, and times alone.
    monkeypatch.setattr(timing, "measure_apart", timing.measure)
    monkeypatch.setattr(timing, "count", lambda row, args: None)
    monkeypatch.setattr(timing, "TURN_SECONDS", 0)
    own = [row for row in rows.main_rows() if row.name in ("ConvNeXt", "local taps, kernel")]
    monkeypatch.setattr(speed, "main_rows", lambda: own)
    monkeypatch.setattr(speed, "drawing_rows", lambda: [])
    emoji = [row for row in rows.photograph_rows() if row.group == "emoji"]
    monkeypatch.setattr(speed, "photograph_rows", lambda: emoji)
    assert speed.main(["--output", "out", "--rounds", "1"]) == 0
    speeds = report.read_speeds(tmp_path / "out" / "speed")
    forms = {"ConvNeXt": ("default", "fused blocks"), "local taps, kernel": ("training form",)}
    assert set(speeds) == {(row.spec, form, 16, 64) for row in own for form in forms[row.name]}
    photographs = report.read_lines(tmp_path / "out" / "speed" / "photographs.csv")
    assert [(line["model"], line["img_size"]) for line in photographs] == [(name, "64") for name in rows.LITE]
    assert float(photographs[0]["ratio"]) == 1 and float(photographs[1]["ms"]) > 0
    assert all(str(tmp_path) not in file.read_text() for file in (tmp_path / "out").rglob("*.csv"))


def test_results_without_a_documents_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    document = tmp_path / "document.md"
    document.write_text(text := "<!-- main -->\n<!-- end -->\n<!-- emoji -->\nold\n<!-- end -->")
    (tmp_path / "results.csv").write_text("group,status\nmain,failed\n")
    monkeypatch.setattr(report, "DOCUMENTS", [document])
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert "no rows of the documents' tables emoji" in capsys.readouterr().err
    assert document.read_text() == text


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda file: file.name)
def test_published_tables_are_those_of_the_published_results(document: Path) -> None:
    published = DOCS / "results"
    lines, speeds = report.read_lines(published / "results.csv"), report.read_speeds(published / "speed")
    assert report.with_tables(document.read_text(), lines, speeds) == document.read_text()


def test_the_tables_of_resolution_are_those_of_its_files() -> None:
    results = Path(__file__).parents[1] / "docs" / "results"
    lines = [
        resolution.line(
            line["kernels"], int(line["img_size"]), line["tuned"] == "True", int(line["seed"]), float(line["top1"])
        )
        for line in resolution.read_lines(results / "resolution.csv")
    ]
    assert resolution.table(lines) in results.with_name("resolution.md").read_text()
    assert [line for line in lines if line["tuned"]] == resolution.tuned(results) != []
