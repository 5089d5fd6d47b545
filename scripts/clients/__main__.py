"""Tries the situations that other libraries put our models in, each with the library itself.

    pip install torch_ema ema-pytorch torchao peft grad-cam accelerate transformers openvino   # any of them
    python -m scripts.clients                    # all cases
    python -m scripts.clients torch_ema fsdp2    # some of them

Prints a line for each case: ok, FAILED or not installed, seconds, and a figure or what is wrong. The exit status is 1
if any failed. What is right is what a new model with the same weights computes, or what ConvNeXt does.
"""

import argparse
import importlib.util
import sys
import time

import timm
import torch

from . import adapters, averages, exporters, finetuning, sharding  # noqa: F401 — each makes its cases known
from .case import CASES, quiet, said_by


def tried(name: str) -> tuple[str, str]:
    """Returns how a case ends, ok, FAILED or not installed, and its figure or what is wrong."""
    missing = [library for library in CASES[name].libraries if importlib.util.find_spec(library) is None]
    if missing:
        return "not installed", ", ".join(missing)
    torch.manual_seed(0)
    try:
        with quiet():
            return "ok", CASES[name].run()
    except Exception as error:
        return "FAILED", said_by(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases (default: all): {', '.join(CASES)}")
    names = parser.parse_args().names or list(CASES)
    for name in names:
        if name not in CASES:
            parser.error(f"there is no case {name!r}, but {', '.join(CASES)}")
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads", flush=True)
    failed = 0
    for name in names:
        start = time.perf_counter()
        result, figure = tried(name)
        failed += result == "FAILED"
        print(f"{name:28} {result:14} {time.perf_counter() - start:6.1f} s  {figure}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
