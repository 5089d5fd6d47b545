"""The operations on a CPU, compiled: checks, tables and memory for `native/cpu.cpp`.

Nothing of weights or images is kept between calls: tables depend on sizes alone, and scratch memory is written anew.
"""

import ctypes
import functools
import math
import threading
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ..grid import move_back, place_kernel
from ..precision import at_least_float32
from . import plain
from .library import Library, load

# Costs of a pass for a position: vector operations, and some for reading and writing; 16 needs more than registers.
COST_OF_MEMORY = 4.0
RADIX_COST = {2: 8.0, 3: 11.3, 4: 11.0, 5: 14.4, 7: 17.7, 8: 14.5, 16: 19.0}

# Images whose gradients for the kernel are summed as they come. Of more there are at most so many sums.
CHUNK, CHUNKS = 16, 8

# Scratch memory that a thread of Python keeps for its next call, in bytes.
SCRATCH_KEPT = 128 * 2**20

# Positions that the tables can tell apart.
LARGEST = 2**30

_kept = threading.local()


class Job(ctypes.Structure):
    """The struct of that name in native/cpu.cpp, which says what its fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad", "kernel", "bias", "mean", "y", "rows", "partial")),
        *((name, ctypes.c_void_p) for name in ("scratch", "twiddles", "zeta", "pixel_of")),
        *((name, ctypes.c_int64) for name in ("n", "passes")),
        ("radix", ctypes.c_int64 * 32),
        *((name, ctypes.c_int64) for name in ("images", "chunk", "pixels", "channels", "branches", "channels_last")),
        *((name, ctypes.c_int64) for name in ("reach", "threads", "scratch_bytes", "vector_bytes")),
    ]


def library() -> Library:
    """Returns the compiled library."""
    return load(job_bytes=ctypes.sizeof(Job))


def can_serve(*tensors: Optional[Tensor]) -> bool:
    """Returns whether the library is there and can compute on such tensors: ordinary ones in this machine's memory."""
    return library().functions is not None and all(x is None or _is_ordinary(x) for x in tensors)


def _is_ordinary(x: Tensor) -> bool:
    is_tensor = type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.device.type == "cpu"
    return is_tensor and x.is_floating_point() and x.numel() < LARGEST * x.shape[0]


# Tables


class Plan(NamedTuple):
    """The transform of images of one size: its length, the radices of its passes, and the tables that they read."""

    n: int
    radices: tuple[int, ...]
    twiddles: Tensor
    zeta: Tensor
    pixel_of: Tensor


@functools.lru_cache(maxsize=4096)
def cheapest_passes(n: int) -> tuple[float, tuple[int, ...]]:
    """Returns the least cost, for a position, of a transform of length ``n``, and its radices, odd ones first."""
    if n == 1:
        return 0.0, ()
    best: tuple[float, tuple[int, ...]] = (math.inf, ())
    for radix, cost in RADIX_COST.items():
        if n % radix == 0:
            rest, radices = cheapest_passes(n // radix)
            order = tuple(sorted((radix, *radices), key=lambda r: (r % 2 == 0, r)))
            best = min(best, (cost + rest, order))
    return best


def smooth_numbers(least: int, primes: tuple[int, ...] = (7, 5, 3, 2)) -> list[int]:
    """Returns the numbers from ``least`` up to twice that which have no prime factors but the given ones."""
    if not primes:
        return [1] if least <= 1 else []
    found, power = [], 1
    while power <= 2 * least:
        found += [power * n for n in smooth_numbers(-(-least // power), primes[1:])]
        power *= primes[0]
    return found


def transform_length(positions: int) -> int:
    """Returns the length of the cheapest transform of two passes or more for at least as many positions."""
    lengths = [n for n in smooth_numbers(max(positions, 4)) if len(cheapest_passes(n)[1]) > 1]
    return min(lengths, key=lambda n: n * cheapest_passes(n)[0])


@functools.lru_cache(maxsize=32)
def plan_for(height: int, width: int, guard: int, reach: int, dtype: torch.dtype) -> Plan:
    """Returns the transform of images (H, W) and of kernels of the given reach."""
    stride = width + guard
    n = transform_length(max((height - 1) * stride + width, reach + 1))
    radices = cheapest_passes(n)[1]
    twiddles, m = [], n
    for radix in radices:
        m //= radix
        j = torch.arange(m, dtype=torch.float64, device="cpu").unsqueeze(1)
        a = torch.arange(1, radix, dtype=torch.float64, device="cpu")
        twiddles.append(_on_circle(-2 * math.pi / (m * radix) * (j * a).flatten(), dtype).flatten())
    t = torch.arange(n, device="cpu")
    row, column = t // stride, t % stride
    pixel_of = torch.where((row < height) & (column < width), row * width + column, -1).to(torch.int32)
    return Plan(n, radices, torch.cat(twiddles), _on_circle(math.pi / (2 * n) * t.to(torch.float64), dtype), pixel_of)


def _on_circle(angles: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


# Calls


def _call(name: str, x: Tensor, guard: int, reach: int, branches: int = 1, **tensors: Optional[Tensor]) -> None:
    """Calls a function of the library for images ``x``.

    Args:
        name: The function.
        x: Images (B, C, H, W), of the type and the order in memory of all others.
        guard: Columns of zeros between rows.
        reach: Largest lag of the kernels.
        branches: Kernels of a channel.
        tensors: What else it reads and writes.
    """
    found = library()
    plan = plan_for(x.shape[2], x.shape[3], guard, reach, x.dtype)
    pixels = x.shape[2] * x.shape[3]
    lanes = 2 * max(pixels, 2 * reach + 1, plan.n) + 2 * (2 + branches) * plan.n
    scratch_bytes = -(-lanes * found.vector_bytes // 4096) * 4096
    memory = scratch(scratch_bytes * found.threads)
    pointers = {key: None if tensor is None else tensor.data_ptr() for key, tensor in tensors.items()}
    job = Job(
        x=x.data_ptr(),
        **pointers,
        scratch=memory.data_ptr(),
        twiddles=plan.twiddles.data_ptr(),
        zeta=plan.zeta.data_ptr(),
        pixel_of=plan.pixel_of.data_ptr(),
        n=plan.n,
        passes=len(plan.radices),
        radix=(ctypes.c_int64 * 32)(*plan.radices),
        images=x.shape[0],
        chunk=chunk_of(x),
        pixels=pixels,
        channels=x.shape[1],
        branches=branches,
        channels_last=plain.is_channels_last(x),
        reach=reach,
        threads=found.threads,
        scratch_bytes=scratch_bytes,
        vector_bytes=found.vector_bytes,
    )
    kind = "double" if x.dtype == torch.float64 else "float"
    getattr(found.functions, f"{name}_{kind}")(ctypes.byref(job))


def scratch(size: int) -> Tensor:
    """Returns as many bytes, or more. Fresh memory costs more time than what is computed in it."""
    memory: Optional[Tensor] = getattr(_kept, "scratch", None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        _kept.scratch = memory if size <= SCRATCH_KEPT else None
    return memory


def chunk_of(x: Tensor) -> int:
    """Returns how many images are summed as they come: by their number alone, so that threads change no sum."""
    return max(CHUNK, -(-x.shape[0] // CHUNKS))


def _partial(x: Tensor, guard: int, reach: int, numbers: int) -> Tensor:
    """Returns memory for the sums over each chunk of images, of as many numbers for each frequency and channel."""
    lanes = library().vector_bytes // x.element_size()
    groups, chunks = -(-x.shape[1] // lanes), -(-x.shape[0] // chunk_of(x))
    n = plan_for(x.shape[2], x.shape[3], guard, reach, x.dtype).n
    return torch.empty(numbers * chunks * groups * lanes * n, dtype=x.dtype, device="cpu")


def _in_order(x: Tensor, like: Tensor) -> Tensor:
    """Returns images at least in float32, in channels-last order if ``like`` is and else in the usual one."""
    order = torch.channels_last if plain.is_channels_last(like) else torch.contiguous_format
    return at_least_float32(x).contiguous(memory_format=order)


def convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    """`longconv.convolve`."""
    u = _in_order(x, x)
    kernel = place_kernel(kernel, row_stride, x, guard).to(u.dtype).contiguous()
    bias = None if bias is None else bias.to(u.dtype).contiguous()
    y = plain.empty_output(u, kernel.shape[0])
    branches = kernel.shape[0] // x.shape[1]
    _call("convolve", u, guard, kernel.shape[1] // 2, branches, kernel=kernel, bias=bias, y=y)
    return y.to(x.dtype)


def convolve_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, row_stride: int, guard: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`longconv.convolve_backward`."""
    u, grads = _in_order(x, x), _in_order(grad, x)
    placed = place_kernel(kernel, row_stride, x, guard).to(u.dtype).contiguous()
    reach, branches = placed.shape[1] // 2, placed.shape[0] // x.shape[1]
    y, rows = torch.empty_like(u), torch.empty_like(placed)
    partial = _partial(u, guard, reach, 2 * branches)
    _call("convolve_backward", u, guard, reach, branches, grad=grads, kernel=placed, y=y, rows=rows, partial=partial)
    grad_kernel = move_back(rows, x.shape[3] + guard, row_stride, kernel.shape[1] // 2).contiguous()
    return y.to(x.dtype), grad_kernel, plain.bias_gradient(grad)


def autocorrelation(x: Tensor, mean: Tensor, guard: int) -> Tensor:
    """`longconv.autocorrelation`: a sum of power spectra, transformed back in float64 as in `plain.correlation_of`."""
    u = _in_order(x, x)
    reach = (x.shape[2] - 1) * (x.shape[3] + guard) + x.shape[3] - 1
    n = plan_for(x.shape[2], x.shape[3], guard, reach, u.dtype).n
    power = u.new_empty((x.shape[1], n))
    mean = mean.to(u.dtype).contiguous()
    _call("power", u, guard, reach, mean=mean, rows=power, partial=_partial(u, guard, reach, 1))
    power = n**2 * power.to(torch.float64)
    rows = power.new_empty((x.shape[1], reach + 1))
    _call("correlation", power.new_empty((1, *x.shape[1:])), guard, reach, kernel=power, rows=rows)
    return torch.nn.functional.pad(rows, (0, guard))
