"""The benchmark as its users run it and as its files are read; what needs no fresh process runs in this one."""

import argparse
import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import benchmark_throughput as script
from mrconvnext.benchmarking import models, timing
from mrconvnext.benchmarking.plots import plot_throughput
from mrconvnext.benchmarking.report import summary
from mrconvnext.benchmarking.rows import Row, reference_of
from scripts import tables

ROOT = Path(__file__).parents[1]
OURS = "mrconvnext_atto:depths=(1,1,1,1):dims=(8,16,24,32)"
CONVNEXT = "test_convnext"
FIXED_SIZE = "test_vit"  # refuses images of another size than it was made for
TOO_LARGE = "100000000000"  # images of 48 kB: more than a processor can address


def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in this process what needs a fresh one, and passes no more often than it must, to save time."""
    monkeypatch.setattr(timing, "measure_apart", timing.measure)
    monkeypatch.setattr(timing, "TURN_SECONDS", 0)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_process(monkeypatch)


@pytest.fixture
def times_only(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out operations and errors as well."""
    monkeypatch.setattr(timing, "count", lambda row, args: None)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of several models and batches, one of which is too large; without operations and errors."""
    folder = tmp_path_factory.mktemp("evaluation")
    options = ["--batch-sizes", TOO_LARGE, "2", "--reference", CONVNEXT]
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_one_process(monkeypatch)
        monkeypatch.setattr(timing, "count", lambda row, args: None)
        assert script.main(arguments(folder, *options, models=(OURS, FIXED_SIZE))) == 0
    return folder


def arguments(folder: Path, *options: str, models: tuple[str, ...] = (OURS,)) -> list[str]:
    size = ["--img-sizes", "32", "--batch-sizes", "2", "--rounds", "2", "--threads", "1", "--reference", OURS]
    return ["--output", str(folder), "--models", *models, *size, *options]


def rows_of(folder: Path, batch_size: str = "2") -> dict[tuple[str, str], dict[str, str]]:
    """Returns the CSV's rows of one batch size by model and form."""
    with open(folder / "benchmark.csv", newline="") as file:
        return {(row["model"], row["form"]): row for row in csv.DictReader(file) if row["batch_size"] == batch_size}


def default_arguments() -> argparse.Namespace:
    return script.parse_arguments(["--output", "out"])


@pytest.mark.slow
def test_runs_as_a_user_runs_it(tmp_path: Path) -> None:
    options = arguments(tmp_path / "out")
    run = subprocess.run([sys.executable, script.__file__, *options], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"benchmark.csv", "benchmark.json", "throughput.png"}

    rows = rows_of(tmp_path / "out")
    assert list(rows) == [(OURS, "training form"), (OURS, "deployed")]
    for row in rows.values():
        assert row["note"] == "" and float(row["images_per_s"]) == pytest.approx(2000 / float(row["ms"]))
        assert 0 < float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"])
        assert 0 < float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
        assert int(row["parameters"]) > 1000 and float(row["gflops"]) > 0 and float(row["gflops_per_pass"]) > 0
        assert row["torch"] == torch.__version__ and row["timm"] == timm.__version__
        assert row["hardware"] and row["threads"] == "1" and row["date"] and row["img_size"] == "32"
        assert row["command"].startswith("python benchmark_throughput.py --output")
        if Path("/proc/self/status").exists():
            assert 1 < float(row["memory_mib"]) < 500 and float(row["memory_ratio"]) > 0
    assert float(rows[OURS, "deployed"]["error"]) < 1e-5
    assert rows[OURS, "training form"]["error"] == ""

    full = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [len(row["rounds_ms"]) for row in full["rows"]] == [2, 2]
    assert full["environment"]["torch"] == torch.__version__
    assert "batch 2, 32 px: round 2 of 2" in run.stdout and "images_per_s" in run.stdout
    assert "\r" not in run.stdout + run.stderr


def test_every_model_has_its_forms_and_its_reference(evaluation: Path) -> None:
    rows = rows_of(evaluation)
    assert list(rows) == [
        (CONVNEXT, "default"),
        (CONVNEXT, "conv_mlp"),
        (CONVNEXT, "fused blocks"),
        (OURS, "training form"),
        (OURS, "deployed"),
        (FIXED_SIZE, "default"),
    ]
    assert all(float(row["first_ms"]) > 0 and float(row["ratio"]) > 0 for row in rows.values())
    assert float(rows[CONVNEXT, "default"]["ratio"]) == 1


def test_out_of_memory_is_noted_and_the_run_goes_on(evaluation: Path) -> None:
    rows = rows_of(evaluation, batch_size=TOO_LARGE)
    assert rows[OURS, "deployed"]["note"] == "out of memory"
    assert all(row["ms"] == "" and row["note"] for row in rows.values())


def test_plots_show_sizes_and_accuracies(times_only: None, tmp_path: Path) -> None:
    (tmp_path / "top1.csv").write_text(f'model,top1\n"{OURS}",71.5\nresnet18,69\n')
    options = ["--img-sizes", "32", "64", "--accuracies", str(tmp_path / "top1.csv"), "--rounds", "1"]
    assert script.main(arguments(tmp_path / "out", *options)) == 0
    for name in ("throughput", "time_per_pixel", "accuracy"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_tables_of_a_document_show_medians_with_their_spread(evaluation: Path) -> None:
    document = evaluation / "document.md"
    document.write_text("before\n<!-- benchmark.csv: model form batch_size ms ratio -->\nold\n<!-- end -->\nafter\n")
    text = tables.with_tables(document)
    deployed = rows_of(evaluation)[OURS, "deployed"]
    assert "| model | form | batch | ms | ratio |" in text
    ratio, least, largest = (f"{float(deployed[key]):.3g}" for key in ("ratio", "ratio_min", "ratio_max"))
    if least != largest:
        ratio = f"{ratio} ({least} … {largest})"
    assert f"| {OURS} | deployed | 2 |" in text
    assert f"| {ratio} |" in text
    assert "old" not in text and "python benchmark_throughput.py" in text


def test_what_a_script_printed_stands_in_a_document(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("| a |\n| --- |\n")
    (tmp_path / "lines.txt").write_text("a: 1\nb: 2\n")
    document = tmp_path / "document.md"
    document.write_text("<!-- table.md -->\nold\n<!-- end -->\nbetween\n<!-- lines.txt -->\n<!-- end -->\n")
    code = "<!-- lines.txt -->\n```\na: 1\nb: 2\n```\n<!-- end -->\n"
    assert tables.with_tables(document) == f"<!-- table.md -->\n| a |\n| --- |\n<!-- end -->\nbetween\n{code}"


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda x: x.name)
def test_tables_of_the_documents_are_those_of_their_files(document: Path) -> None:
    assert tables.with_tables(document) == document.read_text()


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        ("mrconvnext_tiny", "convnext_tiny"),
        ("mrconvnext_base:branch_norm=parseval", "convnext_base"),
        ("swin_small_patch4_window7_224", "convnext_small"),
        ("resnet18", None),
    ],
)
def test_reference_is_the_convnext_of_that_size(model: str, reference: str | None) -> None:
    assert reference_of(model, None) == reference


def test_ratios_are_taken_round_by_round() -> None:
    rows = [
        Row("convnext_tiny", "default", 8, 224, ms=[10, 40, 20], memory_mib=[100]),
        Row("convnext_tiny", "conv_mlp", 8, 224, ms=[5, 5, 5], memory_mib=[50]),
        Row("mrconvnext_tiny", "deployed", 8, 224, ms=[20, 20, 20], memory_mib=[150]),
        Row("mrconvnext_tiny", "deployed", 1, 224, ms=[20]),
    ]
    line, other_batch = summary(rows, "convnext_tiny")[2:]
    assert (line["ratio"], line["ratio_min"], line["ratio_max"]) == (1.0, 0.5, 2.0)
    assert line["images_per_s"] == 400 and line["memory_ratio"] == 1.5
    assert other_batch["ratio"] is None and other_batch["memory_ratio"] is None


def test_options_reach_the_model() -> None:
    row = Row("mrconvnext_atto:branch_norm=parseval:depths=(1, 1, 1, 1)", "training form", 1, 64)
    model = models.create_model(row, default_arguments())
    layer = model.stages[0].blocks[0].conv_dw
    assert layer.options.branch_norm == "parseval" and layer.reference_grid == (16, 16)
    assert len(model.stages[2].blocks) == 1


@pytest.mark.parametrize("branch_norm", ["kernel", "parseval", "batch"])
def test_error_of_a_deployed_model_would_be_seen(branch_norm: str) -> None:
    images, spec = torch.randn(1, 3, 64, 64), f"{OURS}:branch_norm={branch_norm}"
    original, deployed = (
        models.create_model(Row(spec, form, 1, 64), default_arguments()) for form in ("training form", "deployed")
    )
    assert models.largest_error(deployed, original, images) < 1e-5
    with torch.no_grad():
        deployed.stages[2].blocks[0].conv_dw.kernel.normal_()
    assert models.largest_error(deployed, original, images) > 1e-3


def test_fused_blocks_compute_what_the_default_does() -> None:
    original, fused = (
        models.create_model(Row(CONVNEXT, form, 1, 64), default_arguments()) for form in ("default", "fused blocks")
    )
    assert type(fused.stages[0].blocks[0]) is not type(original.stages[0].blocks[0])
    assert models.largest_error(fused, original, torch.randn(1, 3, 64, 64)) < 1e-5


def test_training_steps(times_only: None, tmp_path: Path) -> None:
    parseval = f"{OURS}:branch_norm=parseval"
    assert script.main(arguments(tmp_path, "--train", "--steps", "2", models=(OURS, parseval, CONVNEXT))) == 0
    rows = rows_of(tmp_path)
    convnext_forms = [(CONVNEXT, form) for form in ("default", "conv_mlp", "fused blocks")]
    forms = [(OURS, "training form"), (parseval, "training form"), *convnext_forms]
    assert list(rows) == forms and float(rows[OURS, "training form"]["ratio"]) == 1
    assert all(float(row["ratio"]) > 0 and row["mode"] == "training step" for row in rows.values())
    full = json.loads((tmp_path / "benchmark.json").read_text())
    assert [len(row["rounds_ms"]) for row in full["rows"]] == [2] * 5


@pytest.mark.slow
def test_gradient_checkpointing_saves_memory(tmp_path: Path) -> None:
    def peak_mib(*options: str) -> float:
        size = ["--batch-sizes", "64", "--img-sizes", "64", "--steps", "1", "--train"]
        row = Row("mrconvnext_atto:depths=(20,1,1,1):dims=(32,32,32,32)", "training form", batch_size=64, img_size=64)
        timing.measure_apart(row, script.parse_arguments(arguments(tmp_path, *size, *options)))
        return row.memory_mib[0]

    with ThreadPoolExecutor() as pool:  # each in a process of its own; chance only adds to a peak
        tries = {own: [pool.submit(peak_mib, *own) for _ in range(2)] for own in ((), ("--grad-checkpointing",))}
    usual, saving = (min(one.result() for one in own) for own in tries.values())
    assert saving < 0.8 * usual


def test_autocast_and_channels_last(one_process: None, tmp_path: Path) -> None:
    assert script.main(arguments(tmp_path, "--amp-dtype", "bfloat16", "--channels-last", "--rounds", "1")) == 0
    row = rows_of(tmp_path)[OURS, "deployed"]
    assert float(row["ms"]) > 0 and row["dtype"] == "bfloat16 autocast" and row["channels_last"] == "True"
    assert float(row["error"]) < 1e-5


def test_throughput_of_models_with_many_options_has_room_for_its_bars() -> None:
    options = ":depths=(1, 1, 2, 1):dims=(64, 64, 128, 128):patch_size=2:branch_norm=batch:kernel_sizes=0"
    names = ["convnext_atto", f"mrconvnext_atto{options}:bidirectional=False"]
    row = dict(form="training form", batch_size=1, img_size=32, images_per_s=3.5)
    figure = plot_throughput([dict(row, model=name) for name in names])
    figure.draw_without_rendering()
    (ax,) = figure.axes
    assert ax.get_position().width > 0.4
    tops = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert tops[0].y0 > tops[1].y1  # the labels do not touch


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--models", "mrconvnext_tinny"], ["mrconvnext_tinny is not a model", "mrconvnext_tiny"]),
        (["--reference", "convnext_tine"], ["convnext_tine is not a model", "convnext_tiny"]),
        (["--models", "%%%"], ["%%% is not a model", "timm.list_models()"]),
        (["--models", "convnext_tiny:conv_mlp"], ["name=value", "conv_mlp"]),
        (["--batch-sizes", "0"], ["at least 1", "0"]),
        (["--accuracies", "no-such-file.csv"], ["no-such-file.csv", "top1"]),
        (["--grad-checkpointing"], ["--grad-checkpointing needs --train"]),
    ],
)
def test_bad_arguments_are_named(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_:
        script.main(["--output", str(tmp_path / "out"), *options])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        script.main(arguments(tmp_path, "--device", "cuda"))
    assert "no CUDA device" in capsys.readouterr().err


# What goes wrong on the way


@pytest.mark.parametrize(("status", "note"), [(-9, "out of memory"), (-11, "status -11")])
def test_process_that_ends_early_is_noted(
    status: int, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], status, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ended)
    assert script.main(arguments(tmp_path)) == 0
    assert all(note in row["note"] and row["ms"] == "" for row in rows_of(tmp_path).values())


def test_model_that_cannot_be_compiled_says_why(
    times_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        if model.stages[0].blocks[0].conv_dw.kernel is not None:
            raise RuntimeError("no compiler\nfor this")
        return model

    monkeypatch.setattr(timing, "compiled", compiled)
    assert script.main(arguments(tmp_path, "--compile")) == 0
    rows = rows_of(tmp_path)
    assert rows[OURS, "deployed"]["note"] == "RuntimeError: no compiler for this"
    assert float(rows[OURS, "training form"]["ms"]) > 0


@pytest.mark.parametrize("mode", [[], ["--train", "--steps", "1"]])
def test_interrupted_run_keeps_its_rows(
    mode: list[str], times_only: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save, rounds = script.save, []

    def save_and_interrupt(rows: list[Row], *args) -> None:
        save(rows, *args)
        if all(row.ms or row.note for row in rows) and not rounds:
            rounds.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "save", save_and_interrupt)
    assert script.main(arguments(tmp_path, *mode)) == 130
    rows = [row for row in rows_of(tmp_path).values() if not row["note"]]
    assert rows and all(float(row["ms"]) > 0 for row in rows)
    full = json.loads((tmp_path / "benchmark.json").read_text())
    assert {len(row["rounds_ms"]) for row in full["rows"] if not row["note"]} == {1}
    assert "Interrupted" in capsys.readouterr().out
