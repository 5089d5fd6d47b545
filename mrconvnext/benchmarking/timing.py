"""Times forward passes and training steps, in turns, and measures their memory, in fresh processes."""

import argparse
import dataclasses
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .environment import read_proc
from .models import count, create_model, make_images
from .rows import Row

WARM_UP = 2  # passes before the first that counts: allocators settle, what depends on sizes alone is made
TURN_SECONDS = 0.2  # in its turn a model makes as many passes as take about this long, at least one


# Turns


def pass_in_turns(rows: list[Row], args: argparse.Namespace, done: Callable[[str], None]) -> None:
    """Measures each model in a fresh process, then times forward passes, in this one, of those that did not fail.

    Args:
        rows: Rows of one batch size and image size, which are filled.
        args: The script's arguments.
        done: Called after every step of the work, with what was done.
    """
    for row in rows:
        measure_apart(row, args)
        done(f"{row}: {row.note or 'measured in a fresh process'}")
    turns = []
    for row in rows:
        if not row.note:
            with failures_noted(row):
                step = make_step(row, make_images(row, args), args)
                seconds = [timed(step, args.device) for _ in range(WARM_UP)]
                row.first_ms = 1000 * seconds[0]
                turns.append((row, step, max(1, round(TURN_SECONDS / seconds[-1]))))
    for i in range(args.rounds):
        for row, step, passes in turns:
            if not row.note:
                with failures_noted(row):
                    row.ms.append(1000 * timed(step, args.device, passes) / passes)
        done(f"{rows[0].size}: round {i + 1} of {args.rounds}")


def train_in_turns(rows: list[Row], args: argparse.Namespace, done: Callable[[str], None]) -> None:
    """Times training steps, every round in a fresh process for each model. Arguments are those of `pass_in_turns`."""
    for i in range(args.rounds):
        for row in rows:
            if not row.note:
                measure_apart(row, args)
        done(f"{rows[0].size}: round {i + 1} of {args.rounds}")


# Fresh processes


def measure_apart(row: Row, args: argparse.Namespace) -> None:
    """Adds to a row what a fresh process measures, or why it could not."""
    command = [sys.executable, *args.command, "--measure", json.dumps(dataclasses.asdict(row))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode == -signal.SIGKILL:
        row.note = "out of memory: the system killed the process"
    elif process.returncode != 0:
        row.note = f"the process ended with status {process.returncode}"
    else:
        vars(row).update(json.loads(process.stdout.splitlines()[-1]))


def measure(row: Row, args: argparse.Namespace) -> None:
    """Adds to a row what this process, which must be fresh, measures of its model."""
    with failures_noted(row):
        images = make_images(row, args)
        before = memory_mib(args.device)
        step = make_step(row, images, args)
        timed(step, args.device, WARM_UP)
        reset_peak_memory(args.device)
        seconds = [timed(step, args.device) for _ in range(args.steps if args.train else 1)]
        peak = memory_mib(args.device, peak=True)
        if before is not None and peak is not None:
            row.memory_mib.append(peak - before)
        if args.train:
            row.ms.append(1000 * statistics.median(seconds))
        if row.parameters is None:
            count(row, args)


@contextmanager
def failures_noted(row: Row) -> Iterator[None]:
    """Turns an error inside into the row's note: the other rows go on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text
        row.note = "out of memory" if out_of_memory else f"{type(error).__name__}: {text[:200]}"


# One model


def make_step(row: Row, images: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that runs a forward pass of a row's model, or a training step."""
    model: Any = create_model(row, args)
    run_model = compiled(model) if args.compile else model
    dtype = getattr(torch, args.amp_dtype or "float32")
    autocast = torch.autocast(device_type=args.device, dtype=dtype, enabled=args.amp_dtype is not None)

    @torch.no_grad()
    def forward_pass() -> None:
        with autocast:
            run_model(images)

    if not args.train:
        return forward_pass

    model.train().set_grad_checkpointing(enable=args.grad_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters())
    targets = torch.arange(len(images), device=args.device) % model.num_classes

    def training_step() -> None:
        with autocast:
            loss = F.cross_entropy(run_model(images), target=targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return training_step


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns a model, compiled whole and for each size of images."""
    # Models of one class share code, of which the compiler by default keeps no more than eight versions. The limit's
    # public name, torch.compiler.config.recompile_limit, is not there in torch 2.9.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(model, fullgraph=True, dynamic=False)


def timed(step: Callable[[], None], device: str, passes: int = 1) -> float:
    """Returns how long a step takes ``passes`` times, in seconds."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(passes):
        step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits until a device has done what it was asked to."""
    if device == "cuda":
        torch.cuda.synchronize()


def memory_mib(device: str, peak: bool = False) -> Optional[float]:
    """Returns the memory in use, or its peak, in MiB: PyTorch's on CUDA, else the process's, known on Linux only."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    kib = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", read_proc("self/status"))
    return int(kib[1]) / 1024 if kib else None


def reset_peak_memory(device: str) -> None:
    """Lets the peak start anew from the memory in use: making a model may take more than running it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not Linux, or not allowed: then the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
