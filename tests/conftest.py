import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, HubServer

# huggingface_hub reads these when it is imported. No test reaches the real Hub, or a cache that is not its own.
SERVER = HubServer()
HOME = tempfile.TemporaryDirectory(prefix="hub-")
os.environ.update(HF_ENDPOINT=SERVER.address, HF_HOME=HOME.name, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)

# Triton reads this when it is imported: without a GPU its programs are interpreted, on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub, on which the client's cache is empty as well."""
    SERVER.hub = Hub(SERVER.address)
    yield SERVER.hub
    SERVER.hub = Hub(SERVER.address)
    shutil.rmtree(Path(HOME.name, "hub"), ignore_errors=True)


# A small run of train_imagenet.py. What it takes is imported only where a test asks for it.


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from runs import write_images

    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def options(images: Path) -> list[str]:
    """A recipe with all kinds of random numbers."""
    from runs import MODEL

    recipe = "--global-batch 24 --batch-size 12 --model-ema-decay 0.9 --drop-path 0.2 --checkpoint-interval 2".split()
    return ["--data-dir", str(images), *MODEL, *recipe]


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that came to its end. Not to be changed."""
    from runs import EPOCHS, main

    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert main(*options, *EPOCHS, "--output", folder) == 0
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
