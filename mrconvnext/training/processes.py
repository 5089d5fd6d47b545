"""The processes of a run: those that train, those that read images, and the signals that stop them."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError

# Exit status of a program that a signal stopped and that can be resumed.
INTERRUPTED = 75

_STOPPING = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Processes:
    """This process among those that ``torchrun`` started, or on its own.

    Attributes:
        rank: Number of this process.
        count: How many there are.
        device: Where this one computes.
        messages: Where they tell each other numbers, on the CPU: no GPU is waited for.
    """

    rank: int
    count: int
    device: torch.device
    messages: Any = None

    def total(self, *values: float) -> list[float]:
        """Returns the sum of each value over all processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.messages)
        return sums.tolist()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` started, if it started this one, and leaves them at the end.

    Args:
        device: ``cuda`` or ``cpu``.

    Raises:
        UserError: If there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, torch.device(device))
        return
    own = torch.device(device)
    if device == "cuda":
        own = torch.device(device, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        messages: Any = dist.new_group(backend="gloo") if device == "cuda" else None
        yield Processes(dist.get_rank(), dist.get_world_size(), own, messages)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def signals_call(function: Callable[[], None]) -> Iterator[None]:
    """Makes SIGTERM and SIGINT call a function, and do nothing else."""
    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    for number in handlers:
        signal.signal(number, lambda *_: function())
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Makes a worker of a data loader ignore signals sent to the whole group: the process that trains ends it."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)


def start_forkserver() -> None:
    """Starts the process that starts workers, where Python has one, so that it and they ignore signals to the group.

    Without it Python takes all workers for dead.
    """
    if multiprocessing.get_start_method() == "forkserver":
        multiprocessing.resource_tracker.ensure_running()  # which changes the mask, once
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        multiprocessing.forkserver.ensure_running()  # which inherits the mask
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ending_workers() -> Iterator[None]:
    """Kills the workers of data loaders, which ignore signals, however the block ends.

    Raises:
        UserError: If a worker was killed by somebody else, or no batch came for too long, in PyTorch's words.
    """
    start_forkserver()
    try:
        yield
    except RuntimeError as error:  # which may come at any moment: PyTorch raises it where a worker's end is signalled
        if not str(error).startswith("DataLoader"):
            raise
        left = ", ".join(str(process.pid) for process in multiprocessing.active_children()) or "none"
        raise UserError(f"images can't be read: {error}; worker processes that are there: {left}") from error
    finally:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes their end for a failure
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, handler)
