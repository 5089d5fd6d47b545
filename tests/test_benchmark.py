import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import benchmark_throughput as benchmark
from scripts import tables

SCRIPT = benchmark.__file__
OURS = "mrconvnext_atto:depths=(1,1,1,1):dims=(8,16,24,32)"
CONVNEXT = "test_convnext"
FIXED_SIZE = "test_vit"  # refuses images of another size than it was made for
TOO_LARGE = "100000000000"  # images of 48 kB: more than a processor can address


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in this process what needs a fresh one, to save the time that it takes to start."""

    def measure_here(row: benchmark.Row, argv: list[str]) -> None:
        benchmark.measured(row, benchmark.parse_arguments(argv))

    monkeypatch.setattr(benchmark, "measure_apart", measure_here)


def arguments(folder: Path, *options: str, models: tuple[str, ...] = (OURS,)) -> list[str]:
    size = ["--img-sizes", "32", "--batch-sizes", "2", "--rounds", "3", "--reference", OURS]
    return ["--output", str(folder), "--models", *models, *size, *options]


def rows_of(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Returns the CSV's rows by model, form and batch size."""
    with open(folder / "benchmark.csv", newline="") as file:
        return {(row["model"], row["form"], row["batch_size"]): row for row in csv.DictReader(file)}


def test_runs_as_a_user_runs_it(tmp_path: Path) -> None:
    options = arguments(tmp_path / "out")
    run = subprocess.run([sys.executable, SCRIPT, *options], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "benchmark.csv",
        "benchmark.json",
        "throughput.png",
    }

    rows = rows_of(tmp_path / "out")
    assert list(rows) == [(OURS, "training form", "2"), (OURS, "deployed", "2")]
    for row in rows.values():
        assert row["note"] == "" and float(row["images_per_s"]) == pytest.approx(2000 / float(row["ms"]))
        assert 0 < float(row["ms_min"]) <= float(row["ms"]) <= float(row["ms_max"])
        assert 0 < float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
        assert int(row["parameters"]) > 1000 and float(row["gflops"]) > 0 and float(row["gflops_per_pass"]) > 0
        assert row["torch"] == torch.__version__ and row["timm"] == timm.__version__
        assert row["hardware"] and row["threads"] and row["date"] and row["img_size"] == "32"
        assert row["command"].startswith("python benchmark_throughput.py --output")
        if Path("/proc/self/status").exists():
            assert 1 < float(row["memory_mib"]) < 500 and float(row["memory_ratio"]) > 0
    assert float(rows[OURS, "deployed", "2"]["error"]) < 1e-5
    assert rows[OURS, "training form", "2"]["error"] == ""

    full = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [len(row["rounds_ms"]) for row in full["rows"]] == [3, 3]
    assert full["environment"]["torch"] == torch.__version__
    assert "batch 2, 32 px: round 3 of 3" in run.stdout and "images_per_s" in run.stdout
    assert "\r" not in run.stdout + run.stderr


def test_every_model_has_its_forms_and_its_reference(one_process: None, tmp_path: Path) -> None:
    assert benchmark.main(arguments(tmp_path, "--rounds", "1", "--reference", CONVNEXT, models=(OURS, FIXED_SIZE))) == 0
    rows = rows_of(tmp_path)
    assert [key[:2] for key in rows] == [
        (CONVNEXT, "default"),
        (CONVNEXT, "conv_mlp"),
        (CONVNEXT, "fast blocks"),
        (OURS, "training form"),
        (OURS, "deployed"),
        (FIXED_SIZE, "default"),
    ]
    assert float(rows[CONVNEXT, "fast blocks", "2"]["error"]) < 1e-5
    assert all(float(row["first_ms"]) > 0 for row in rows.values())
    assert float(rows[CONVNEXT, "default", "2"]["ratio"]) == 1
    assert float(rows[FIXED_SIZE, "default", "2"]["ratio"]) > 0


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
    args = benchmark.parse_arguments(["--output", "out", "--models", model])
    assert benchmark.reference_of(model, args) == reference


def test_ratios_are_taken_round_by_round() -> None:
    args = benchmark.parse_arguments(["--output", "out", "--reference", "convnext_tiny"])
    rows = [
        benchmark.Row("convnext_tiny", "default", 8, 224, ms=[10, 40, 20], memory_mib=[100]),
        benchmark.Row("convnext_tiny", "conv_mlp", 8, 224, ms=[5, 5, 5], memory_mib=[50]),
        benchmark.Row("mrconvnext_tiny", "deployed", 8, 224, ms=[20, 20, 20], memory_mib=[150]),
        benchmark.Row("mrconvnext_tiny", "deployed", 1, 224, ms=[20]),
    ]
    line, other_batch = benchmark.summary(rows, args)[2:]
    assert (line["ratio"], line["ratio_min"], line["ratio_max"]) == (1.0, 0.5, 2.0)
    assert line["images_per_s"] == 400 and line["memory_ratio"] == 1.5
    assert other_batch["ratio"] is None and other_batch["memory_ratio"] is None


def test_options_reach_the_model() -> None:
    args = benchmark.parse_arguments(["--output", "out"])
    row = benchmark.Row("mrconvnext_atto:branch_norm=parseval:depths=(1, 1, 1, 1)", "training form", 1, 64)
    model = benchmark.create_model(row, args)
    layer = model.stages[0].blocks[0].conv_dw
    assert layer.branch_norm == "parseval" and layer.reference_grid == (16, 16) and len(model.stages[2].blocks) == 1


def test_error_would_be_seen() -> None:
    args = benchmark.parse_arguments(["--output", "out"])
    images = torch.randn(1, 3, 64, 64)
    deployed, original = (
        benchmark.create_model(benchmark.Row("mrconvnext_atto", form, 1, 64), args)
        for form in ("deployed", "training form")
    )
    assert benchmark.largest_error(deployed, original, images) < 1e-5
    with torch.no_grad():
        deployed.stages[2].blocks[1].conv_dw.kernel.normal_()
    assert benchmark.largest_error(deployed, original, images) > 1e-3


def test_training_steps(one_process: None, tmp_path: Path) -> None:
    parseval = f"{OURS}:branch_norm=parseval"
    assert benchmark.main(arguments(tmp_path, "--train", "--steps", "2", models=(OURS, parseval, CONVNEXT))) == 0
    rows = rows_of(tmp_path)
    forms = {(CONVNEXT, form) for form in ("default", "conv_mlp", "fast blocks")}
    forms |= {(OURS, "training form"), (parseval, "training form")}
    assert {key[:2] for key in rows} == forms and float(rows[OURS, "training form", "2"]["ratio"]) == 1
    assert all(float(row["ratio"]) > 0 and row["mode"] == "training step" for row in rows.values())
    full = json.loads((tmp_path / "benchmark.json").read_text())
    assert [len(row["rounds_ms"]) for row in full["rows"]] == [3] * 5


def test_gradient_checkpointing_saves_memory(tmp_path: Path) -> None:
    peaks = []
    for i, options in enumerate(([], ["--grad-checkpointing"])):
        size = ["--batch-sizes", "128", "--img-sizes", "96", "--rounds", "1", "--steps", "1", "--train"]
        model = "mrconvnext_atto"
        options += ["--reference", model]
        assert benchmark.main(arguments(tmp_path / str(i), *size, *options, models=(model,))) == 0
        peaks.append(float(rows_of(tmp_path / str(i))[model, "training form", "128"]["memory_mib"]))
    assert peaks[1] < 0.8 * peaks[0]


def test_autocast_and_channels_last(one_process: None, tmp_path: Path) -> None:
    assert benchmark.main(arguments(tmp_path, "--amp-dtype", "bfloat16", "--channels-last", "--rounds", "1")) == 0
    row = rows_of(tmp_path)[OURS, "deployed", "2"]
    assert float(row["ms"]) > 0 and row["dtype"] == "bfloat16 autocast" and row["channels_last"] == "True"
    assert float(row["error"]) < 1e-5


def test_plots_show_sizes_and_accuracies(one_process: None, tmp_path: Path) -> None:
    (tmp_path / "top1.csv").write_text(f'model,top1\n"{OURS}",71.5\nresnet18,69\n')
    options = ["--img-sizes", "32", "64", "--accuracies", str(tmp_path / "top1.csv"), "--rounds", "1"]
    assert benchmark.main(arguments(tmp_path / "out", *options)) == 0
    for name in ("throughput", "time_per_pixel", "accuracy"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 300


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--models", "mrconvnext_tinny"], ["unknown model 'mrconvnext_tinny'", "mrconvnext_tiny"]),
        (["--reference", "convnext_tine"], ["unknown model 'convnext_tine'", "convnext_tiny"]),
        (["--models", "%%%"], ["unknown model '%%%'", "timm.list_models()"]),
        (["--models", "convnext_tiny:conv_mlp"], ["name=value", "conv_mlp"]),
        (["--batch-sizes", "0"], ["at least 1", "0"]),
        (["--accuracies", "no-such-file.csv"], ["no-such-file.csv", "top1"]),
    ],
)
def test_bad_arguments_are_named(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--output", str(tmp_path / "out"), *options])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments(tmp_path, "--device", "cuda"))
    assert "no CUDA device" in capsys.readouterr().err


def test_out_of_memory_is_noted_and_the_run_goes_on(one_process: None, tmp_path: Path) -> None:
    assert benchmark.main(arguments(tmp_path, "--batch-sizes", TOO_LARGE, "2", "--rounds", "1")) == 0
    rows = rows_of(tmp_path)
    assert rows[OURS, "deployed", TOO_LARGE]["note"] == "out of memory"
    assert rows[OURS, "deployed", TOO_LARGE]["ms"] == "" and float(rows[OURS, "deployed", "2"]["ms"]) > 0


@pytest.mark.parametrize(("status", "note"), [(-9, "out of memory"), (-11, "status -11")])
def test_process_that_ends_early_is_noted(
    status: int, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], status, stdout="")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *args, **kwargs: ended)
    assert benchmark.main(arguments(tmp_path)) == 0
    assert all(note in row["note"] and row["ms"] == "" for row in rows_of(tmp_path).values())


def test_model_that_cannot_be_compiled_says_why(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        if model.stages[0].blocks[0].conv_dw.kernel is not None:
            raise RuntimeError("no compiler\nfor this")
        return model

    monkeypatch.setattr(benchmark, "compiled", compiled)
    assert benchmark.main(arguments(tmp_path, "--compile")) == 0
    rows = rows_of(tmp_path)
    assert rows[OURS, "deployed", "2"]["note"] == "RuntimeError: no compiler for this"
    assert float(rows[OURS, "training form", "2"]["ms"]) > 0


@pytest.mark.parametrize("mode", [[], ["--train", "--steps", "1"]])
def test_interrupted_run_keeps_its_rows(
    mode: list[str], one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save, rounds = benchmark.save, []

    def save_and_interrupt(rows: list[benchmark.Row], *args) -> None:
        save(rows, *args)
        if all(row.ms or row.note for row in rows) and not rounds:
            rounds.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "save", save_and_interrupt)
    assert benchmark.main(arguments(tmp_path, *mode)) == 130
    rows = [row for row in rows_of(tmp_path).values() if not row["note"]]
    assert rows and all(float(row["ms"]) > 0 for row in rows)
    full = json.loads((tmp_path / "benchmark.json").read_text())
    assert {len(row["rounds_ms"]) for row in full["rows"] if not row["note"]} == {1}
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "count"), [("performance.md", 7), ("training.md", 2)])
def test_tables_of_the_documents_are_those_of_their_files(name: str, count: int) -> None:
    document = Path(tables.__file__).parent.parent / "docs" / name
    text = document.read_text()
    assert text.count("<!-- end -->") == len(tables.TABLE.findall(text)) == count
    assert tables.with_tables(document) == text


def test_tables_show_medians_with_their_spread(one_process: None, tmp_path: Path) -> None:
    assert benchmark.main(arguments(tmp_path)) == 0
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- benchmark.csv: model form batch_size ms ratio -->\nold\n<!-- end -->\nafter\n")
    text = tables.with_tables(document)
    deployed = rows_of(tmp_path)[OURS, "deployed", "2"]
    assert "| model | form | batch | ms | ratio |" in text
    ratio = f"{float(deployed['ratio']):.3g} ({float(deployed['ratio_min']):.3g} … {float(deployed['ratio_max']):.3g})"
    assert f"| {OURS} | deployed | 2 |" in text
    assert ratio in text
    assert "old" not in text and "python benchmark_throughput.py" in text
