"""MultiresConv's kernel: what a tree of two short filters, dilated twice as far at each level, makes of an impulse.

Source: MultiresConv (Shi et al. 2023, arXiv 2305.01638), section 3, and its published code.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import at_least_float32

MULTIRES_ARGS = ("tree", "memory_size", "wavelet", "independent_skip")

TREES = ("fading", "uniform")


def tree_responses(low: Tensor, high: Tensor, depth: int) -> list[Tensor]:
    """Returns what each level's detail, the finest first, and at last the approximation make of an impulse, (P, ·).

    Level i convolves the approximation so far with both filters (P, k), whose taps lie 2^i lags apart. The last of a
    filter's taps is that of lag 0.
    """
    approximation = torch.ones_like(low[:, :1])
    responses: list[Tensor] = []
    for level in range(depth):
        responses.append(dilated_response(approximation, high, 1 << level))
        approximation = dilated_response(approximation, low, 1 << level)
    responses.append(approximation)
    return responses


def dilated_response(response: Tensor, taps: Tensor, dilation: int) -> Tensor:
    """Returns responses (P, n) convolved with filters (P, k) of a dilation, (P, n + (k − 1) · dilation)."""
    # Not PyTorch's convolution, which autocast would have in 16 bits, and GPUs in fewer than 24.
    last = taps.shape[1] - 1
    total = taps[:, last:] * F.pad(response, (0, last * dilation))
    for j in range(1, last + 1):
        shifted = F.pad(response, (j * dilation, (last - j) * dilation))
        total = total + taps[:, last - j : last - j + 1] * shifted
    return total


@torch.fx.wrap
def multires_kernel(low: Tensor, high: Tensor, mixing: Tensor, length: int, depth: int, copies: list[int]) -> Tensor:
    """Returns the kernels (1, C, 2·length − 1) of filters (1, C, D, k), mixed by weights (1, C, D, M).

    Args:
        low: The filter of the approximation.
        high: The filter of the details.
        mixing: The weights: of the approximation, of the details from the coarsest to the finest, and last of the
            impulse itself.
        length: Number of lags.
        depth: Number of levels.
        copies: Number of weights of the approximation and of the details, as far as they have any. Copies of a detail
            are as many lags apart as the next coarser level's taps.
    """
    channels, directions = low.shape[1], low.shape[2]
    mixing = at_least_float32(mixing).flatten(0, 2)  # (P, M), P = C·D
    responses = tree_responses(at_least_float32(low).flatten(0, 2), at_least_float32(high).flatten(0, 2), depth)
    kernel = F.pad(mixing[:, -1:], (0, length - 1))  # (P, length)
    first = 0
    for i, count in enumerate(copies):
        level = depth - i
        response = responses[depth if i == 0 else level]
        response = F.pad(response, (0, length - response.shape[1]))  # which cuts where that is less than 0
        for j in range(count):
            lag = j << (level + 1)
            if lag < length:
                kernel = kernel + mixing[:, first + j : first + j + 1] * F.pad(response, (lag, -lag))
        first += count
    return both_directions(kernel.view(channels, directions, length))


def both_directions(kernels: Tensor) -> Tensor:
    """Returns causal kernels (C, D, L) as two-sided ones (1, C, 2·L − 1), those of both directions added."""
    length = kernels.shape[2]
    two_sided = F.pad(kernels[:, 0], (length - 1, 0))
    if kernels.shape[1] == 2:
        two_sided = two_sided + F.pad(kernels[:, 1].flip(-1), (0, length - 1))
    return two_sided.unsqueeze(0)


class MultiresKernel(nn.Module):
    """MultiresConv's kernel for each channel, with its skip term at lag 0.

    Of each level of the tree there are copies, which count as their weights say. There are as many levels as the
    kernel's length needs, at least one.

    Args:
        channels: Number of channels C.
        length: Length L of the kernel in lags.
        directions: Number of directions D, 1 or 2; each begins at lag 0.
        taps: Taps k of a filter, at least 2. With a wavelet there are as many as it has.
        tree: "fading": one weight for each level, so that of what lies far back the coarse alone remains. "uniform":
            ``memory_size`` weights, of the coarsest levels first, so that they cover all lags.
        memory_size: Number of weights of a "uniform" tree but for the last, at least 2.
        wavelet: Name of a wavelet of PyWavelets whose filters are the start, such as "db4". Default: random filters.
        independent_skip: Whether the last weight starts at the scale of an input, and not of one among all weights.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ImportError: If ``wavelet`` is given and PyWavelets is not installed.
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        directions: int,
        taps: int = 2,
        tree: str = "fading",
        memory_size: Optional[int] = None,
        wavelet: Optional[str] = None,
        independent_skip: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check(tree, memory_size, independent_skip)
        filters = None if wavelet is None else wavelet_filters(wavelet)
        taps = taps if filters is None else filters.shape[1]
        if taps < 2:
            raise ValueError(f"taps must be at least 2 for kernel='multires', got {taps}")
        self.length = length
        self.depth = max(1, math.ceil(math.log2((length - 1) / (taps - 1) + 1)))
        weights = self.depth + 1 if memory_size is None else memory_size
        self.copies = copies_of(self.depth, taps, memory_size)
        dd = {"device": device, "dtype": dtype}
        self.low = nn.Parameter(torch.empty(1, channels, directions, taps, **dd))
        self.high = nn.Parameter(torch.empty(1, channels, directions, taps, **dd))
        self.mixing = nn.Parameter(torch.empty(1, channels, directions, weights + 1, **dd))
        for parameter, scale in ((self.low, taps), (self.high, taps), (self.mixing, weights + 1)):
            nn.init.uniform_(parameter, a=-(scale**-0.5), b=scale**-0.5)
        if filters is not None:
            with torch.no_grad():
                self.low.copy_(filters[0])
                self.high.copy_(filters[1])
        if independent_skip:
            nn.init.uniform_(self.mixing[..., -1], a=-1, b=1)

    def forward(self) -> Tensor:
        """Returns the kernel (1, C, 2·L − 1)."""
        return multires_kernel(self.low, self.high, self.mixing, self.length, self.depth, self.copies)


def copies_of(depth: int, taps: int, memory_size: Optional[int]) -> list[int]:
    """Returns how many weights the approximation and the details have, the coarsest first, as far as they have any.

    Without a memory's size one each.
    """
    if memory_size is None:
        return [1] * (depth + 1)
    copies, count = [1], 1
    while len(copies) <= depth and sum(copies) < memory_size:
        count = min(count, memory_size - sum(copies))
        copies.append(count)
        count = 2 * (count - 1) + taps
    return copies


def wavelet_filters(name: str) -> Tensor:
    """Returns the decomposition filters of an orthogonal wavelet, (2, k): low and high, their last tap that of lag 0.

    Raises:
        ImportError: If PyWavelets is not installed.
        ValueError: If it knows no such wavelet.
    """
    try:
        import pywt
    except ImportError as error:
        message = f"kernel_args: wavelet={name!r} needs PyWavelets: pip install 'mrconvnext[wavelets]'"
        raise ImportError(message) from error
    if name not in pywt.wavelist(kind="discrete"):
        raise ValueError(
            f"kernel_args: wavelet must be the name of a discrete one of PyWavelets, such as 'db4', got {name!r}"
        )
    wavelet = pywt.Wavelet(name)
    return torch.tensor([wavelet.dec_lo[::-1], wavelet.dec_hi[::-1]])


def _check(tree: str, memory_size: Optional[int], independent_skip: bool) -> None:
    if tree not in TREES:
        raise ValueError(f"kernel_args: tree must be one of {', '.join(TREES)}, got {tree!r}")
    if tree == "fading" and memory_size is not None:
        raise ValueError(f"kernel_args: memory_size is for tree='uniform', got {memory_size!r} for 'fading'")
    is_size = isinstance(memory_size, int) and not isinstance(memory_size, bool) and memory_size >= 2
    if tree == "uniform" and not is_size:
        raise ValueError(f"kernel_args: memory_size must be an integer of at least 2, got {memory_size!r}")
    if not isinstance(independent_skip, bool):
        raise ValueError(f"kernel_args: independent_skip must be True or False, got {independent_skip!r}")
