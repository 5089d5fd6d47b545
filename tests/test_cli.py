"""The command line, and the launcher of timm's scripts."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import SMALL, layers_of, randomize, small_model
from hub_server import Hub
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save as as_safetensors
from timm.data import create_transform, resolve_data_config
from torch import nn

import mrconvnext
from mrconvnext.cli import main

FILES = {"README.md", "config.json", "model.safetensors"}
ALLOWED = "give a folder that mrconvnext.save wrote"
OPTIONS = ["-k", *(f"{name}={SMALL[name]}".replace(" ", "") for name in ("depths", "dims"))]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def logits(name: str, **options) -> torch.Tensor:
    model = timm.create_model(name, pretrained=True, **options).eval()
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))


def test_a_convnexts_file_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    convnext = randomize(timm.create_model("convnext_atto", **{k: v for k, v in SMALL.items() if k != "img_size"}))
    torch.save({"state_dict": convnext.state_dict()}, tmp_path / "convnext.pth")
    assert run("convert", tmp_path / "convnext.pth", tmp_path / "out", "--model", "mrconvnext_atto", *OPTIONS) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    with torch.no_grad():
        expected = convnext.eval()(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))
    torch.testing.assert_close(logits(f"local-dir:{tmp_path}/out"), expected, atol=1e-5, rtol=1e-5)
    assert "training form written" in capsys.readouterr().out


@pytest.mark.slow
def test_a_convnext_of_the_hub_becomes_a_model(hub: Hub, tmp_path: Path) -> None:
    convnext = randomize(timm.create_model("convnext_atto"))
    hub.add("timm/convnext_atto.d2_in1k", {"model.safetensors": as_safetensors(convnext.state_dict())})
    assert run("convert", "convnext_atto.d2_in1k", tmp_path / "a") == 0
    assert run("convert", "mrconvnext_atto", tmp_path / "b") == 0
    assert torch.equal(logits(f"local-dir:{tmp_path}/a"), logits(f"local-dir:{tmp_path}/b"))


def test_a_convnexts_name_takes_our_options_and_its_own_size(hub: Hub, capsys: pytest.CaptureFixture) -> None:
    for name in ("convnext_atto.d2_in1k", "convnextv2_base.fcmae_ft_in22k_in1k_384"):
        convnext = timm.create_model(name.partition(".")[0], num_classes=1000)
        hub.add(f"timm/{name}", {"model.safetensors": as_safetensors(convnext.state_dict())})
    assert run("info", "convnext_atto.d2_in1k", "-k", "kernel=sparse", "img_size=96") == 0
    assert "grid 24×24" in (out := capsys.readouterr().out) and "sparse kernels" in out
    assert run("info", "convnextv2_base.fcmae_ft_in22k_in1k_384") == 0
    assert "grid 96×96" in capsys.readouterr().out


@pytest.mark.parametrize("in_chans", [1, 3])
def test_evaluate_takes_the_images_that_training_took(in_chans: int, tmp_path: Path, capsys) -> None:
    mrconvnext.save(small_model(in_chans=in_chans, num_classes=2), tmp_path / "saved")
    for name in ("validation/a", "validation/b", "train/a", "train/b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(1 if name.startswith("validation") else 3):
            Image.effect_noise((80, 70), 60).save(tmp_path / "data" / name / f"{i}.png")
    capsys.readouterr()
    for words, images in (([], 2), (["--split", "train"], 6)):
        assert run("evaluate", tmp_path / "saved", "--data-dir", tmp_path / "data", "--workers", 0, *words) == 0
        assert capsys.readouterr().out.startswith(f"{images} images of ")


@pytest.mark.parametrize("in_chans", [1, 3])
def test_fuse(in_chans: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mrconvnext.save(small_model(in_chans=in_chans), tmp_path / "trained")
    for i in range(3):
        Image.effect_noise((80, 70), 60).convert("RGB").save(tmp_path / f"{i}.png")
    assert run("fuse", tmp_path / "trained", tmp_path / "fused", "--images", tmp_path) == 0
    out = capsys.readouterr().out
    assert "on 2 random images: logits" in out and f"on 3 images of {tmp_path}: logits" in out and "worst layer" in out
    assert layers_of(timm.create_model(f"local-dir:{tmp_path}/fused", pretrained=True))[0].kernel is not None

    assert run("fuse", tmp_path / "trained", tmp_path / "refused", "--limit", 1e-12) == 1
    assert "--limit 1e-12" in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_fuse_skips_images_that_are_broken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mrconvnext.save(small_model(), tmp_path / "trained")
    for i in range(12):
        (tmp_path / f"a{i}.jpg").write_bytes(b"no image")
    Image.effect_noise((80, 70), 60).save(tmp_path / "b.png")
    assert run("fuse", tmp_path / "trained", tmp_path / "fused", "--images", tmp_path) == 0
    captured = capsys.readouterr()
    assert f"on 1 images of {tmp_path}: logits" in captured.out
    assert f"--images {tmp_path}: 12 files are skipped" in captured.err and len(captured.err.splitlines()) == 1


def test_push(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    mrconvnext.save(small_model(), tmp_path / "trained")
    assert run("push", tmp_path / "trained", "someone/fused", "--fused", "--private") == 0
    assert f"{hub.address}/someone/fused/commit/" in capsys.readouterr().out
    assert hub.repositories["someone/fused"].private and set(hub.repositories["someone/fused"].files("main")) == FILES
    assert logits("hf-hub:someone/fused", num_classes=3).shape == (1, 3)
    assert run("info", "hf-hub:someone/fused") == 0
    assert "deployed form" in capsys.readouterr().out


def test_a_hub_that_can_not_be_reached(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    mrconvnext.save(small_model(), tmp_path)
    hub.add("someone/cut", {file.name: file.read_bytes() for file in tmp_path.iterdir()})
    hub.cut = 5000
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    monkeypatch.setattr("mrconvnext.hub.HfApi", functools.partial(HfApi, endpoint="http://127.0.0.1:1"))
    for arguments, words in (
        (["push", tmp_path, "someone/fused"], "the Hub could not be reached to push to someone/fused: ConnectError: "),
        (["info", "hf-hub:someone/cut"], ""),
    ):
        assert run(*arguments) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"mrconvnext {arguments[0]}: {words}"), error
    with pytest.raises(ConnectionError, match="someone/fused"):
        mrconvnext.push_to_hub(small_model(), "someone/fused")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"a\n',
        "\xff",
        "[]",
        "null",
        "{}",
        '{"model_args": null}',
        '{"architecture": 1}',
        '{"architecture": "mrconvnext_atto", "model_args": null}',
        '{"architecture": "mrconvnext_atto", "pretrained_cfg": null}',
    ],
)
def test_a_damaged_configuration(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration"):
        mrconvnext.save(small_model(), tmp_path)
    assert run("info", tmp_path) == 1
    assert f"{tmp_path / 'config.json'} is not a model's configuration" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_classify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, names = small_model(), ["a b", "ż", *map(str, range(8))]
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
    mrconvnext.save(model, tmp_path / "named", fused=True)
    files = [tmp_path / name for name in ("x y.png", "ü.png")]
    for file in files:
        Image.effect_noise((80, 70), 60).save(file)
    assert run("classify", tmp_path / "named", *files, "--top", 10) == 0
    lines = capsys.readouterr().out.splitlines()
    again = timm.create_model(f"local-dir:{tmp_path / 'named'}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=again))
    for file, line in zip(files, lines, strict=True):
        with Image.open(file) as image, torch.no_grad():
            shares = again(transform(image.convert("RGB"))[None]).softmax(-1)[0]
        best = int(shares.argmax())
        assert line.startswith(f"{file}: {names[best]} {100 * shares[best]:.1f} %") and all(
            name in line for name in names
        )
    again.reset_classifier(3)
    mrconvnext.save(again, tmp_path / "other", fused=True)
    assert run("classify", tmp_path / "other", files[0]) == 0
    assert "class 2" in capsys.readouterr().out
    assert run("classify", tmp_path / "named", tmp_path / "nothing.png") == 1
    assert "nothing.png" in capsys.readouterr().err
    assert run("classify", tmp_path / "named", tmp_path) == 1
    assert f"{tmp_path} is a folder: give files" in capsys.readouterr().err


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = small_model(branch_norm="parseval", kernel="dilated")
    for fused, words in ((False, ["training form", "dilated", "28, 56", "parseval"]), (True, ["607 lags"])):
        folder = tmp_path / str(fused)
        mrconvnext.save(model, folder, fused=fused)
        for source in (folder, folder / "model.safetensors"):
            assert run("info", source) == 0
            out = capsys.readouterr().out
            saved = timm.create_model(f"local-dir:{folder}", pretrained=True)
            parameters = f"{sum(parameter.numel() for parameter in saved.parameters()) / 1e6:.2f} M"
            assert all(word in out for word in ["mrconvnext_atto", "grid 16×16", parameters, *words])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "mrconvnext_giant"], ["mrconvnext_giant"]),
        (["info", "hf-hub:no/body"], ["no/body", "Repository Not Found"]),
        (["info", "weights.pth"], ["weights.pth", "--model"]),
        (["info", "weights.pth", "--model", "mrconvnext_tiny"], ["stages.0.blocks.0.conv_dw.alpha", "(4, 96)"]),
        (
            ["fuse", "weights.pth", "out", "--model", "mrconvnext_atto", *OPTIONS, "kernel_sizes=5"],
            ["grid", "kernel_sizes"],
        ),
        (["fuse", "saved", "out", "--images", "empty"], ["--images empty"]),
        (["fuse", "saved", "out", "--images", "broken"], ["--images broken", "0.jpg"]),
        (["fuse", "saved", "out", "--images", "nowhere"], ["nowhere"]),
        (["fuse", "saved", "saved"], ["saved", "training form"]),
        (["info", "finished"], ["finished is the folder of a training run", "finished/fused"]),
        (["info", "run"], ["run is the folder of a training run", "run/best.safetensors"]),
        (["plot", "run", "--output", "out"], ["run is the folder of a training run", "run/best.safetensors"]),
        (["plot", "text.txt", "--output", "out"], ["text.txt is a file", "--model", ALLOWED]),
        (["plot", "text.txt", "--output", "out", "--model", "mrconvnext_atto"], ["text.txt", "not a checkpoint"]),
        (["plot", "pictures/0.jpg", "--output", "out"], ["pictures/0.jpg is a file", ALLOWED]),
        (["plot", "saved/README.md", "--output", "out"], ["saved/README.md is a file", ALLOWED]),
        (["plot", "pictures", "--output", "out"], ["pictures holds no config.json", ALLOWED]),
        (["plot", "sequences", "--output", "out"], ["sequences holds an MRConvSequence", ALLOWED]),
        (["plot", "sequence-run", "--output", "out"], ["sequence-run holds an MRConvSequence", ALLOWED]),
        (["plot", "nowhere", "--output", "out"], ["nowhere is not a file or folder", "timm knows", ALLOWED]),
        (["plot", "resnet18", "--output", "out"], ["resnet18 is not an MRConvNeXt", ALLOWED]),
        (["plot", "local-dir:pictures", "--output", "out"], ["pictures holds no config.json", ALLOWED]),
        (["plot", "text.txt", "--output", "out", "--model", "mrconvnet"], ["mrconvnet is not a model", "close are"]),
        (["plot", "saved", "--output", "text.txt"], ["--output text.txt is not a folder"]),
        (["plot", "saved", "--output", "out", "--images", "broken"], ["--images broken", "0.jpg"]),
        (["evaluate", "saved", "--data-dir", "pictures"], ["--data-dir pictures", "no folders of classes"]),
        (["evaluate", "saved", "--data-dir", "split"], ["--data-dir split has no validation split", "train or test"]),
        (["evaluate", "saved", "--data-dir", "split", "--split", "tets"], ["split", "'tets'"]),
        (["classify", "saved", "pictures/0.png", "broken/0.jpg"], ["broken/0.jpg can't be read"]),
        (["classify", "saved", "huge.png"], ["huge.png can't be read", "decompression bomb"]),
        (["info", "saved", "--model", "mrconvnext_atto"], ["--model mrconvnext_atto", "saved is not a file"]),
        (["info", "text.pth", "--model", "mrconvnext_atto"], ["text.pth"]),
        (["info", "text.safetensors", "--model", "mrconvnext_atto"], ["text.safetensors"]),
        (["convert", "code.pth", "out", "--model", "mrconvnext_atto"], ["weights_only"]),
    ],
    ids=str,
)
def test_errors_are_one_message(
    arguments: list[str], words: list[str], hub: Hub, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(small_model().state_dict(), "weights.pth")
    torch.save({"weight": nn.Linear}, "code.pth")
    mrconvnext.save(small_model(), "saved")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken", "0.jpg").write_text("no image")
    Path("run").mkdir()
    Path("run", "args.yaml").write_text("{}")
    Path("finished", "trained").mkdir(parents=True)
    Path("finished", "args.yaml").write_text("{}")
    Path("pictures").mkdir()
    Image.new("RGB", (64, 64)).save("pictures/0.png")
    Image.new("RGB", (64, 64)).save("pictures/0.jpg")
    for name in ("split/train/a", "split/test/a"):
        Path(name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(f"{name}/0.png")
    Image.new("L", (128, 128)).save("huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    sequences = mrconvnext.MRConvSequence(2, length=8, channels=1, dim=4, depth=1)
    for name in ("sequences", "sequence-run/trained"):
        sequences.save_pretrained(name)
    Path("sequence-run", "args.yaml").write_text("{}")
    for name in ("text.pth", "text.safetensors", "text.txt"):
        Path(name).write_text("no weights")
    capsys.readouterr()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"mrconvnext {arguments[0]}: ") and all(word in error for word in words), error
    assert error.count("\n") == 1 and not Path("out").exists()


@pytest.mark.parametrize("arguments", [["-k", "depths"], ["--max-images", "0"]], ids=str)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["fuse", "saved", "out", *arguments])
    assert "must be" in capsys.readouterr().err


def test_help_names_the_page(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    assert "index.html" in capsys.readouterr().out


# The launcher

SCRIPT = """
import sys

import beside
import timm

# In one piece: two processes may write at once.
sys.stdout.write(f"{__name__} {beside.value} {sys.argv[1:]} {len(timm.list_models('mrconvnext_*'))}\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["-m"], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]], ids=["python", "torchrun"]
)
def test_scripts_know_the_models(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "validate.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "beside.py").write_text("value = 'found'")
    (tmp_path / "beside.py").write_text("value = 'of the current folder'")
    process = subprocess.run(
        [sys.executable, *command, "mrconvnext.timm_script", "scripts/validate.py", "--model", "x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(mrconvnext.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines == ["__main__ found ['--model', 'x'] 8"] * (2 if "2" in command else 1)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["nothing.py"]], ids=["none", "missing"])
def test_the_launcher_names_a_missing_script(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "mrconvnext.timm_script", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and "usage" in process.stderr and all(word in process.stderr for word in arguments)
