"""The operations on a GPU, by `triton_kernels`: which maps they serve, in which precision, and their tables.

Nothing of weights or images is kept between calls: tables depend on sizes alone.
"""

import contextlib
import functools
import logging
import math
from types import ModuleType
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..grid import move_back, place_kernel
from . import plain

_logger = logging.getLogger(__name__)

# Positions of the shortest transform: tensor cores take matrices of 16 rows at least.
SHORTEST = 16 * 16

# Positions of the longest transforms by the shared memory that they take, in bytes: `python scripts/triton_sizes.py`.
LONGEST = {8192: 200_704, 4096: 98_304, 1024: 49_152}
LONGEST_POWER = {4096: 163_840, 1024: 98_304}

# Positions of all channels that a program transforms at once, if one channel has no more.
AT_ONCE = 2048

# Programs that a GPU should have of sums over images, to be busy: images are summed in so many chunks.
PROGRAMS = 1024

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Plan(NamedTuple):
    """A transform: its two lengths, the channels of a program, and the tables that `triton_kernels` reads."""

    n1: int
    n2: int
    channels: int
    tables: Tensor

    @property
    def n(self) -> int:
        return self.n1 * self.n2


@functools.cache
def kernels() -> Optional[ModuleType]:
    """Returns `triton_kernels`, or nothing where Triton is not installed."""
    try:
        from . import triton_kernels
    except ImportError as error:
        _logger.info("layers on a GPU are computed by PyTorch's FFTs, since Triton can't be imported: %s", error)
        return None
    return triton_kernels


def description() -> str:
    """Returns in words what serves tensors on a GPU."""
    if kernels() is None:
        return "plain, since Triton can't be imported"
    return f"Triton, for up to {max(LONGEST)} positions"


def can_serve(x: Tensor, *others: Optional[Tensor]) -> bool:
    """Returns whether Triton is there and its programs serve such tensors: ordinary ones on a GPU."""
    return all(other is None or _is_ordinary(other) for other in (x, *others)) and kernels() is not None


def serves(x: Tensor, guard: int, reach: int, longest: dict[int, int]) -> bool:
    """Returns whether a card has the memory for a transform of images and kernels, and there are images."""
    return x.numel() > 0 and positions(x, guard, reach) <= _longest(x.device, tuple(longest.items()))


@functools.cache
def _longest(device: torch.device, sizes: tuple[tuple[int, int], ...]) -> int:
    if device.type != "cuda":  # interpreted, or counted
        return max(sizes)[0]
    if torch.version.hip is not None:  # whose programs take less of it
        return 4096
    card: Any = torch.cuda.get_device_properties(device)
    return max((n for n, needed in sizes if needed <= card.shared_memory_per_block_optin), default=0)


def _is_ordinary(x: Tensor) -> bool:
    is_tensor = type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided
    return is_tensor and x.device.type == "cuda" and x.dtype in DTYPES and is_recent(x.device)


@functools.cache
def is_recent(device: torch.device) -> bool:
    """Returns whether Triton compiles for a card. If not, it is said once."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        _logger.info("layers on %s are computed by PyTorch's FFTs: it is too old", torch.cuda.get_device_name(device))
        return False
    return True


def precision_of(x: Tensor) -> str:
    """Returns how products are computed: to the precision of float32, or for half images by 10 bits of the factors."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def positions(x: Tensor, guard: int, reach: int) -> int:
    """Returns how many positions a transform of images and kernels must have."""
    return max((x.shape[2] - 1) * (x.shape[3] + guard) + x.shape[3], reach + 1)


def plan_for(x: Tensor, guard: int, reach: int) -> Plan:
    """Returns the transform of images (B, C, H, W) and of kernels of the given reach."""
    bits = (max(positions(x, guard, reach), SHORTEST) - 1).bit_length()
    return _plan(1 << (bits - bits // 2), 1 << (bits // 2), x.device)


@functools.lru_cache(maxsize=32)
def _plan(n1: int, n2: int, device: torch.device) -> Plan:
    n = n1 * n2
    a, b = (torch.arange(size, dtype=torch.float64) for size in (n1, n2))
    turns = (torch.outer(a - 0.25, a) / n1, torch.outer(b, b) / n2, torch.outer(a - 0.25, b) / n)
    parts = [part(-2 * math.pi * (own % 1)).flatten() for own in turns for part in (torch.cos, torch.sin)]
    return Plan(n1, n2, max(AT_ONCE // n, 1), torch.cat(parts).to(device, torch.float32))


@functools.lru_cache(maxsize=32)
def _untwist(n: int, device: torch.device) -> Tensor:
    angle = torch.arange(n, dtype=torch.float64, device=device) * (-math.pi / (2 * n))
    return torch.polar(torch.ones_like(angle), angle)


def launch(name: str, programs: int, plan: Plan, *args: Any, **options: Any) -> None:
    """Has the GPU that holds the plan run a function of `triton_kernels`, as so many programs."""
    sizes = {"N1": plan.n1, "N2": plan.n2, "CB": plan.channels}
    device = plan.tables.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        getattr(kernels(), name)[(programs,)](*args, **sizes, **options, num_warps=8, num_stages=1)


def _chunks(x: Tensor, plan: Plan) -> tuple[int, int]:
    """Returns how many images a program sums over, and how many such chunks there are."""
    images, blocks = x.shape[0], -(-x.shape[1] // plan.channels)
    chunk = -(-images // min(images, -(-PROGRAMS // blocks)))
    return chunk, -(-images // chunk)


def _layout(x: Tensor, guard: int) -> tuple[int, int, int]:
    """Returns the width of images, of their rows as sequences, and their number of pixels."""
    return x.shape[3], x.shape[3] + guard, x.shape[2] * x.shape[3]


def _spectrum(placed: Tensor, plan: Plan) -> Tensor:
    """Returns the spectra of kernels (rows, 2 · reach + 1) as real and imaginary parts (2, rows, N)."""
    rows, reach = placed.shape[0], placed.shape[1] // 2
    spectrum = placed.new_empty((2, rows, plan.n), dtype=torch.float32)
    programs = -(-rows // plan.channels)
    launch("spectra", programs, plan, placed, spectrum, plan.tables, rows, reach, PRECISION=precision_of(placed))
    return spectrum


def _placed(kernel: Tensor, row_stride: int, x: Tensor, guard: int) -> Tensor:
    return place_kernel(kernel, row_stride, x, guard).to(torch.float32).contiguous()


def _in_order(x: Tensor, like: Tensor) -> Tensor:
    order = torch.channels_last if plain.is_channels_last(like) else torch.contiguous_format
    return x.contiguous(memory_format=order)


def convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    """`longconv.convolve`: a program for some channels of an image, which reads and writes them once."""
    placed = _placed(kernel, row_stride, x, guard)
    if not serves(x, guard, placed.shape[1] // 2, LONGEST):
        return plain.convolve(x, kernel, bias, row_stride, guard)
    x, rows = _in_order(x, x), kernel.shape[0]
    plan, precision = plan_for(x, guard, placed.shape[1] // 2), precision_of(x)
    spectrum = _spectrum(placed, plan)
    y = plain.empty_output(x, rows)
    programs = x.shape[0] * (rows // x.shape[1]) * -(-x.shape[1] // plan.channels)
    pointers = (x, spectrum, spectrum if bias is None else bias.to(torch.float32).contiguous(), y, plan.tables)
    options = {"LAST": plain.is_channels_last(x), "HAS_BIAS": bias is not None, "PRECISION": precision}
    launch("convolve", programs, plan, *pointers, x.shape[1], rows, *_layout(x, guard), **options)
    return y


def convolve_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, row_stride: int, guard: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`longconv.convolve_backward`: grad's spectra times the conjugate of the kernel's, and of the images'."""
    placed = _placed(kernel, row_stride, x, guard)
    reach, rows, channels = placed.shape[1] // 2, kernel.shape[0], x.shape[1]
    if not serves(x, guard, reach, LONGEST):
        return plain.convolve_backward(grad, x, kernel, row_stride, guard)
    x = _in_order(x, x)
    grad = _in_order(grad, x)
    plan, precision = plan_for(x, guard, reach), precision_of(x)
    spectrum = _spectrum(placed, plan)
    branches, (chunk, chunks) = rows // channels, _chunks(x, plan)
    grad_x = torch.empty_like(x, dtype=x.dtype if branches == 1 else torch.float32)
    sums = placed.new_empty((2, chunks, rows, plan.n))
    totals = placed.new_empty((chunks, rows))
    programs = chunks * -(-channels // plan.channels)
    for branch in range(branches):
        pointers = (grad, x, spectrum, grad_x, sums, totals, plan.tables)
        sizes = (x.shape[0], chunk, channels, rows, branch, *_layout(x, guard))
        options = {"LAST": plain.is_channels_last(x), "ADD": branch > 0, "PRECISION": precision}
        launch("convolve_backward", programs, plan, *pointers, *sizes, **options)
    moved, bias = torch.empty_like(placed), placed.new_empty(rows)
    outputs = (moved, bias, plan.tables, chunks, rows, reach)
    launch("kernels_of", -(-rows // plan.channels), plan, sums, totals, *outputs, PRECISION=precision_of(placed))
    grad_kernel = move_back(moved, x.shape[3] + guard, row_stride, kernel.shape[1] // 2).contiguous()
    return grad_x.to(x.dtype), grad_kernel, bias


def autocorrelation(x: Tensor, mean: Tensor, guard: int) -> Tensor:
    """`longconv.autocorrelation`: a sum of power spectra, transformed back in float64 as in `plain.correlation_of`."""
    reach = (x.shape[2] - 1) * (x.shape[3] + guard) + x.shape[3] - 1
    if not serves(x, guard, reach, LONGEST_POWER):
        return plain.autocorrelation(x, mean, guard)
    x, channels = _in_order(x, x), x.shape[1]
    plan, precision = plan_for(x, guard, reach), precision_of(x)
    chunk, chunks = _chunks(x, plan)
    sums = torch.empty((chunks, channels, plan.n), dtype=torch.float32, device=x.device)
    pointers = (x, mean.to(torch.float32).contiguous(), sums, plan.tables)
    sizes = (x.shape[0], chunk, channels, *_layout(x, guard))
    programs = chunks * -(-channels // plan.channels)
    launch("power", programs, plan, *pointers, *sizes, LAST=plain.is_channels_last(x), PRECISION=precision)
    power = plan.n**2 * sums.to(torch.float64).sum(0)
    # Frequency k1 + N1 · k2 stands at [k1, k2].
    power = power.unflatten(1, (plan.n1, plan.n2)).transpose(1, 2).flatten(1)
    rows = (torch.fft.ifft(power) * _untwist(plan.n, x.device)).real
    return torch.nn.functional.pad(rows[:, : reach + 1], (0, guard))
