"""The compiled library of `native`: where it is, what it can do here, or why there is none."""

import ctypes
import functools
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import torch

_logger = logging.getLogger(__name__)

FILE = Path(__file__).with_name("_native.so")

VECTORS = {64: "AVX-512", 32: "AVX2", 16: "vectors of 16 bytes"}

_is_forked = False


class Library(NamedTuple):
    """The library's functions, or none; the bytes of a vector; whether PyTorch's threads are there; that in words."""

    functions: Optional[ctypes.CDLL]
    vector_bytes: int
    has_threads: bool
    description: str

    @property
    def threads(self) -> int:
        """As many threads as PyTorch uses; one in a process that was forked, whose copy of the pool has none."""
        return torch.get_num_threads() if self.has_threads and not _is_forked else 1


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def load(file: Path = FILE, job_bytes: int = 0) -> Library:
    """Returns the library in a file. Where there is none, or a foreign or broken one, it has no functions and says why.

    Args:
        file: The shared object.
        job_bytes: What the library must say that its struct ``Job`` takes.
    """
    if not file.is_file():
        reason = "no compiled library lies in its folder, where pip builds one if it finds a C++ compiler"
        return Library(None, 0, False, f"plain, since {reason}")
    try:
        functions = ctypes.CDLL(str(file))
        found = functions.job_bytes()
        if found != job_bytes:
            raise OSError(f"it is of another version: {found} bytes for a job, not {job_bytes}")
        vector_bytes = functions.widest_vector()
    except (OSError, AttributeError) as error:
        _logger.warning("The compiled library can't be used, PyTorch's FFTs are: %s: %s", file, error)
        return Library(None, 0, False, f"plain, since {file} can't be used: {error}")
    has_threads = _use_threads(functions)
    threads = "PyTorch's OpenMP threads" if has_threads else "one thread, since PyTorch's OpenMP was not found"
    return Library(functions, vector_bytes, has_threads, f"compiled, with {VECTORS[vector_bytes]} and {threads}")


def _use_threads(functions: ctypes.CDLL) -> bool:
    """Gives the library the OpenMP runtime that PyTorch has loaded, whatever its name, if it has GNU's entry points."""
    torch_cpu = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{'dylib' if sys.platform == 'darwin' else 'so'}"
    try:
        # A library's handle finds what the libraries that it needs define.
        openmp = ctypes.CDLL(str(torch_cpu))
        names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
        functions.use_openmp(*(ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in names))
    except (OSError, AttributeError):
        return False
    return True
