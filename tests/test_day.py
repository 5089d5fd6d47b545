"""A newcomer's day with a folder of pictures: README's commands, one after the other."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import pytest
from PIL import Image
from runs import SCRIPT, write_images

pytestmark = pytest.mark.slow

# Fewer epochs than the recipe's, for the sake of time; README's commands are run as they stand but for these.
SMALLER = ["--epochs", "3", "--model-kwargs", "depths=(1,1,1,1)", "dims=(8,16,24,32)"]


def commands() -> list[list[str]]:
    """Returns the words of README's commands, without those that install."""
    block = re.search(r"<!-- day -->\n```\n(.*?)```", (SCRIPT.parent / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    return [words for words in lines if words[0] != "pip"]


def start(words: list[str], folder: Path) -> subprocess.Popen:
    program = Path(sys.executable).with_name(words[0])
    more = SMALLER if words[0] == "mrconvnext-train" and "--model" in words else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([program, *words[1:], *more], cwd=folder, env=env, **pipes)


def test_the_day(tmp_path: Path) -> None:
    write_images(tmp_path / "images", train=20, validation=1)
    os.rename(tmp_path / "images" / "train", tmp_path / "photos")
    os.rename(tmp_path / "photos" / "0", tmp_path / "photos" / "nought (0) – ноль")
    Image.open(tmp_path / "photos" / "7" / "3.jpg").save(tmp_path / "photo.jpg")
    train, *others = commands()

    first = start(train, tmp_path)
    while not list((tmp_path / "run").glob("last.safetensors")) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    said, error = first.communicate()
    assert first.returncode in (0, 75), error
    assert "recipe small for 160 images: " in said
    assert "10 classes: 1, 2, 3, 4, 5, …" in said

    out = {}
    for words in others:
        process = start(words, tmp_path)
        output, error = process.communicate()
        assert process.returncode == 0 and error == "", (words, output, error)
        out[words[1] if words[0] == "mrconvnext" else words[-1]] = output
    assert "resuming at step" in out["auto"] and 'timm.create_model("local-dir:run/fused"' in out["auto"]
    assert out["auto"].count("%") == 1 and ".writing" not in out["auto"] and ".saving" not in out["auto"]
    assert "\nas trained: loss " in out["--evaluate"] and "200 images of photos: loss" in out["evaluate"]
    assert out["classify"].startswith("photo.jpg: ")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {
        "kernels.png",
        "alpha.png",
        "receptive-fields.png",
    }
