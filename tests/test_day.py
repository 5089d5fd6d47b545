"""A newcomer's day with a folder of pictures: the guide's commands, one after the other."""

import os
from pathlib import Path

import onnxruntime
import pytest
from runs import write_images

from scripts import day

# Fewer epochs than the recipe's, for the sake of time; the guide's commands are run as they stand but for these.
SMALLER = ["--epochs", "3", "--model-kwargs", "depths=(1,1,1,1)", "dims=(8,16,24,32)"]


@pytest.mark.slow
def test_the_day(tmp_path: Path) -> None:
    write_images(tmp_path / "images", train=20, validation=1)
    photos = tmp_path / "images" / "train"
    os.rename(photos / "0", photos / "nought (0) – ноль")

    first, *others = day.live(photos, tmp_path / "day", SMALLER)
    assert first.status in (0, 75), first.error
    assert "recipe small for 160 images: " in first.output
    assert "10 classes: 1, 2, 3, 4, 5, …" in first.output
    assert [(done.status, done.error) for done in others] == [(0, "")] * len(others)

    out = {done.words[1] if done.words[0] == "mrconvnext" else done.words[-1]: done.output for done in others}
    resumed = next(done.output for done in others if "--resume" in done.words)
    assert "resuming at step" in resumed and 'timm.create_model("local-dir:run/fused"' in resumed
    assert resumed.count("%") == 1 and ".writing" not in resumed and ".saving" not in resumed
    assert "\nas trained: loss " in out["--evaluate"] and "200 images of photos: loss" in out["evaluate"]
    assert out["classify"].startswith("photo.jpg: ")
    session = onnxruntime.InferenceSession(tmp_path / "day" / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]
    pictures = {file.name for file in (tmp_path / "day" / "pictures").iterdir()}
    assert pictures == {"index.html", "kernels.png", "alpha.png", "receptive-fields.png"}
