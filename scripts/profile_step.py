"""Profiles one training step of a model: which kernels a GPU runs, or operations a CPU, and how long.

    python scripts/profile_step.py --output profile --device cuda --amp-dtype bfloat16 --channels-last --batch-size 128

Writes ``profile.csv``, a row for each kernel with its calls and milliseconds, and ``trace.json`` for Perfetto; prints
the rows that take longest.
"""

import argparse
import contextlib
import csv
from pathlib import Path
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import mrconvnext  # noqa: F401  registers the models

SHOWN = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the files")
    add("--model", default="mrconvnext_tiny", help="name in timm (default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    add("--batch-size", type=int, default=128, help="images (default: %(default)s)")
    add("--img-size", type=int, default=224, help="their side in pixels (default: %(default)s)")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="autocast")
    add("--channels-last", action="store_true", help="order of images and weights in memory")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    step = make_step(args)
    for _ in range(3):  # compiles, and makes the optimizer's state
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device == "cuda" else [])
    with profile(activities=activities) as found:
        step()
    found.export_chrome_trace(str(args.output / "trace.json"))
    rows = times(found, on_gpu=args.device == "cuda")
    with open(args.output / "profile.csv", "w", newline="") as file:
        csv.writer(file).writerows([("kernel", "calls", "ms"), *rows])
    print(f"{args.model}: {sum(ms for *_, ms in rows):.2f} ms in {sum(calls for _, calls, _ in rows)} calls")
    for name, calls, ms in rows[:SHOWN]:
        print(f"{ms:9.3f} ms  {calls:5d} ×  {name[:100]}")


def make_step(args: argparse.Namespace) -> Any:
    """Returns a function that takes a training step on random images."""
    order = torch.channels_last if args.channels_last else torch.contiguous_format
    model: Any = timm.create_model(args.model).to(device=args.device)
    model = model.to(memory_format=order).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device).to(memory_format=order)
    targets = torch.zeros(args.batch_size, dtype=torch.int64, device=args.device)
    autocast: Any = contextlib.nullcontext()
    if args.amp_dtype:
        autocast = torch.autocast(args.device, getattr(torch, args.amp_dtype))

    def step() -> None:
        with autocast:
            loss = torch.nn.functional.cross_entropy(model(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()

    return step


def times(found: profile, on_gpu: bool) -> list[tuple[str, int, float]]:
    """Returns name, calls and milliseconds of what ran, the longest first."""
    rows = []
    for event in found.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0 and (not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA):
            rows.append((event.key, event.count, microseconds / 1000))
    return sorted(rows, key=lambda row: -row[2])


if __name__ == "__main__":
    main()
