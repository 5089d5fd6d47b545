"""What measured numbers depend on: the hardware and the versions."""

import platform
import re
from pathlib import Path

import timm
import torch


def processor() -> str:
    """Returns the processor's name: on Linux, where Python often has none, the system's."""
    found = re.search(r"model name\s*: (.*)", read_proc("cpuinfo"))
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Returns the versions of PyTorch, timm and Python."""
    return {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}


def read_proc(name: str) -> str:
    """Returns the text of a file in Linux's ``/proc``; empty on other systems."""
    path = Path("/proc", name)
    return path.read_text() if path.exists() else ""
