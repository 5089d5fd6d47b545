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
