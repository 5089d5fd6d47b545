"""The command line of train_imagenet.py: its defaults, and what it refuses before anything is written."""

from pathlib import Path

import pytest
import timm
import torch
from runs import CONVNEXT, MODEL, OPTIONS, TINY, main
from safetensors.torch import save_file

from mrconvnext.training.arguments import parse_args, to_plain
from mrconvnext.training.errors import UserError
from mrconvnext.training.loaders import split_batch
from mrconvnext.training.model import make_model

DIGITS = ["--dataset", "digits", *MODEL, "--global-batch", "128", "--epochs", "1", "--output", "run"]


def test_defaults_are_convnexts_recipe() -> None:
    args = parse_args(["--output", "x", "--data-dir", "y"])
    recipe = dict(epochs=300, opt="adamw", lr=4e-3, weight_decay=0.05, global_batch=4096, warmup_epochs=20)
    recipe |= dict(mixup=0.8, cutmix=1.0, reprob=0.25, smoothing=0.1, model_ema_decay=0.9999, clip_grad=None)
    assert {name: getattr(args, name) for name in recipe} == recipe and args.aa.startswith("rand-m9-mstd0.5")


@pytest.mark.parametrize(
    ("model", "rate"), [("mrconvnext_atto", 0.1), ("mrconvnext_small", 0.4), ("convnext_base.fb_in1k", 0.5)]
)
def test_stochastic_depth_is_that_of_the_size(model: str, rate: float) -> None:
    made = make_model(parse_args(["--output", "x", "--model", model, *TINY]), classes=10)
    assert made.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(rate)
    made = make_model(parse_args(["--output", "x", "--model", model, *TINY, "--drop-path", "0.3"]), classes=10)
    assert made.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize(
    "options",
    [["--epochs", 0], ["--global-batch", -4], ["--log-interval", 0], ["--seed", -1], ["--device", "tpu"]]
    + [["--model-kwargs", "foo"], ["--smoothing", 1.5], ["--scale", 1, 0.5]],
)
def test_arguments_out_of_range(options: list, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(*DIGITS, *options)
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


def test_errors_of_the_command_line_are_one_line_with_a_hint(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(*DIGITS, "--batchsize", 4)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--batchsize 4 (close are --batch-size" in error
    for option in ("--evaluate", "--resume=auto"):
        with pytest.raises(SystemExit, match="2"):
            main("--output", "nothing", option)
        assert "--output nothing does not hold a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--global-batch", 125], ["--global-batch 125", "even"]),
        (["--global-batch", 130, "--batch-size", 65], ["--batch-size 65", "even"]),
        (["--global-batch", 128, "--batch-size", 6], ["--batch-size 6", "128"]),
        (["--global-batch", 5000], ["--global-batch 5000", "1437"]),
        (["--num-classes", 7], ["--num-classes 7", "10"]),
        (["--aa", "foo"], ["--aa", "foo"]),
        (["--opt", "foo"], ["--opt foo"]),
        (["--freeze", "nope"], ["--freeze nope", "stages"]),
        (["--model", "mrconvnext_giant"], ["--model mrconvnext_giant"]),
        (["--model-kwargs", "dims=(16,24)"], ["mrconvnext_atto"]),
        (["--finetune", "none.pth"], ["none.pth"]),
        (["--finetune", "list.pth"], ["list.pth"]),
        (["--finetune", "number.pth"], ["number.pth"]),
        (["--finetune", "resnet.safetensors"], ["ConvNeXt"]),
        (["--evaluate"], ["best.safetensors"]),
        (["--dataset", "foo/bar"], ["--dataset", "foo/bar"]),
    ],
)
def test_bad_arguments_leave_no_trace(options: list, words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([1, 2], "list.pth")
    torch.save({"model": 5}, "number.pth")
    if "resnet.safetensors" in options:
        save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), "resnet.safetensors")
    assert main(*DIGITS, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_imagenet.py: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused_whatever_their_classes(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "resnet.safetensors")
    mobile = timm.create_model("mobilenetv2_035", num_classes=7)
    save_file(mobile.state_dict(), tmp_path / "mobile.safetensors")
    arguments = ["--model", "mobilenetv2_035", "--output", "x", "--finetune"]
    with pytest.raises(UserError, match="Missing key"):
        make_model(parse_args([*arguments, str(tmp_path / "resnet.safetensors")]), classes=5)
    made = make_model(parse_args([*arguments, str(tmp_path / "mobile.safetensors")]), classes=5)
    assert torch.equal(made.conv_stem.weight, mobile.conv_stem.weight) and made.num_classes == 5


def test_a_batch_that_can_not_be_split_over_processes() -> None:
    args = parse_args([*DIGITS, "--global-batch", "9"])
    with pytest.raises(UserError, match="9.*2 processes"):
        split_batch(args, 2)


def test_arguments_are_kept_as_yaml_and_json_hold_them() -> None:
    args = parse_args([*DIGITS, "--data-dir", "images", "--scale", "0.5", "1"])
    plain = to_plain(args)
    assert plain["data_dir"] == "images" and plain["scale"] == [0.5, 1.0]
    assert plain["model_kwargs"] == {name: list(value) for name, value in OPTIONS.items()}


def test_kernels_are_made_for_the_images_and_those_of_weights_follow_them_unless_kept(tmp_path: Path) -> None:
    def grids(file: Path, *more: str) -> tuple[tuple[int, int], ...]:
        args = parse_args([*MODEL, "--img-size", "64", "--finetune", str(file), "--output", "x", *more])
        layer = make_model(args, classes=10).stages[0].blocks[0].conv_dw
        return layer.reference_grid, layer.made_for

    own = timm.create_model("mrconvnext_atto", **OPTIONS, num_classes=10, img_size=32)
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    convnext = make_model(parse_args([*CONVNEXT, "--output", "x"]), classes=10)
    save_file(convnext.state_dict(), tmp_path / "convnext.safetensors")
    for more in ([], ["--keep-kernels"]):
        assert grids(tmp_path / "convnext.safetensors", *more) == ((16, 16), (16, 16))
    assert grids(tmp_path / "own.safetensors") == ((16, 16), (8, 8))
    assert grids(tmp_path / "own.safetensors", "--keep-kernels") == ((8, 8), (8, 8))
