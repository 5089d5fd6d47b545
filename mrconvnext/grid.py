"""How an image becomes a sequence and back, how a kernel moves to an image of another size, and where pixels meet.

Rows are laid out one after the other, each followed by ``guard`` columns of zeros, so that a row takes
``stride = width + guard`` positions and the tap (dr, dc) of a 2D kernel is the lag dr·stride + dc. A tap with
|dc| ≤ guard then never reaches from one row into another. Seen this way a two-sided kernel is a map of lags
(rows, stride), its rows ``stride`` lags long and centred on column 0.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .constants import constant, shape_of
from .precision import at_least_float32, product, without_autocast


def to_sequence(x: Tensor, guard: int) -> Tensor:
    """Returns images (B, C, H, W) as sequences (B, C, H·(W + guard)), zeros in the guard columns."""
    return F.pad(x, (0, guard)).flatten(2)


def to_image(u: Tensor, height: int, guard: int) -> Tensor:
    """Returns sequences (B, C, height·(W + guard)) as images (B, C, height, W): `to_sequence` undone."""
    rows = u.unflatten(2, (height, u.shape[2] // height))
    return rows[..., : rows.shape[3] - guard]


# Kernels of another size


def lag_map(kernel: Tensor, stride: int) -> Tensor:
    """Returns a two-sided kernel (…, 2·M − 1) as rows of ``stride`` lags, (…, 2·R + 1, stride).

    Row R holds the lags −(stride // 2) … stride − stride // 2 − 1; lags beyond the kernel's are zero.
    """
    lags = shape_of(kernel)[-1]
    rows = (lags // 2 + stride // 2) // stride
    before = rows * stride + stride // 2 - lags // 2
    after = (2 * rows + 1) * stride - lags - before
    return F.pad(kernel, (before, after)).unflatten(-1, (2 * rows + 1, stride))


def from_lag_map(lags: Tensor, stride: int) -> Tensor:
    """Returns the two-sided kernel of a lag map (…, 2·R + 1, columns), its columns padded or cropped to ``stride``.

    Column ``columns // 2`` of the map is dc = 0. No interpolation: the tap (dr, dc) becomes the lag dr·stride + dc.
    """
    columns = shape_of(lags)[-1]
    before = stride // 2 - columns // 2
    kernel = F.pad(lags, (before, stride - columns - before)).flatten(-2)
    # An even stride has one more column before the centre than behind it.
    return F.pad(kernel, (0, 1 - stride % 2))


@torch.fx.wrap
def place_kernel(kernel: Tensor, row_stride: int, x: Tensor, guard: int) -> Tensor:
    """Returns a two-sided kernel (…, 2·M − 1) made for rows of ``row_stride`` positions for images like ``x``.

    It is cut to the lags that two positions of such an image can have, or has fewer.
    """
    return move_kernel(kernel, row_stride, x.shape[3] + guard, x.shape[2] * (x.shape[3] + guard) - 1)


def move_kernel(kernel: Tensor, old: int, new: int, largest: int) -> Tensor:
    """Returns a two-sided kernel made for rows of ``old`` positions for rows of ``new``, without lags above a largest.

    Each lag goes to at most one other, and none comes from two: moving back is the transpose, the way of gradients.
    """
    if old != new:
        kernel = from_lag_map(lag_map(kernel, old), new)
    reach = shape_of(kernel)[-1] // 2
    keep = min(reach, largest)
    return kernel[..., reach - keep : reach + keep + 1]


def move_back(kernel: Tensor, new: int, old: int, reach: int) -> Tensor:
    """Returns what `move_kernel` made of a kernel of the given ``reach`` moved back, lags that were left out zero."""
    kernel = move_kernel(kernel, new, old, reach)
    missing = reach - kernel.shape[-1] // 2
    return F.pad(kernel, (missing, missing)) if missing > 0 else kernel


# Local taps


def local_positions(kernel_size: int, dilation: int, row_stride: int, reach: int, device: torch.device) -> Tensor:
    """Returns where k×k taps stand in a two-sided kernel of largest lag ``reach``, (k·k)."""
    tap = torch.arange(kernel_size * kernel_size, device=device)
    # conv2d correlates, where a long convolution convolves: the tap after the centre is for the pixel before.
    rows, columns = kernel_size // 2 - tap // kernel_size, kernel_size // 2 - tap % kernel_size
    return reach + dilation * (rows * row_stride + columns)


_local_positions = constant(local_positions)


@torch.fx.wrap
def add_local_taps(kernel: Tensor, weight: Tensor, dilation: int, row_stride: int) -> Tensor:
    """Returns a kernel plus the one that acts as a zero-padded depthwise convolution does, on images of any size.

    Args:
        kernel: Two-sided kernel (C, 2·M − 1).
        weight: Weight (C, 1, k, k) of a depthwise ``Conv2d``, k odd.
        dilation: Distance of its taps in pixels.
        row_stride: Row stride that the kernel is made for, at least ``2 · dilation · (k // 2) + 1``; the kernel reaches
            as many rows up and down.
    """
    kernel_size, reach = weight.shape[3], kernel.shape[-1] // 2
    if torch.jit.is_scripting():
        positions = local_positions(kernel_size, dilation, row_stride, reach, kernel.device)
    else:
        positions = _local_positions(kernel_size, dilation, row_stride, reach, kernel.device)
    return kernel.index_add(1, positions, weight.flatten(1).to(kernel.dtype))


@torch.fx.wrap
def convolve_locally(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """Returns the depthwise convolution of images with k×k taps (C, 1, k, k), zero-padded, at least in float32."""
    x, weight = at_least_float32(x), at_least_float32(weight)
    bias = None if bias is None else at_least_float32(bias)
    padding = dilation * (shape_of(weight)[3] // 2)
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])
    with without_autocast(x):
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


# What the pixels of an image make of a kernel


def pair_counts(height: int, width: int, guard: int, device: torch.device) -> Tensor:
    """Returns the number of pixels that have a pixel at each lag 0 … H·(W + guard) − 1, in float64."""
    stride = width + guard
    lag = torch.arange(height * stride, device=device)
    row, column = lag // stride, lag % stride
    same = (width - column).clamp(min=0) * (height - row)
    wrapped = (width + column - stride).clamp(min=0) * (height - row - 1)
    return (same + wrapped).to(torch.float64)


def pair_weights(height: int, width: int, guard: int, device: torch.device) -> Tensor:
    """Returns for every lag the root of the share of pixels that have a pixel there, (2·H·(W + guard) − 1), in float64.

    With white noise on the pixels a kernel times these weights has the energy in its full convolution that the kernel
    has on the pixels: the square at a lag counts once for each pair of pixels that far apart.
    """
    pairs = pair_counts(height, width, guard, device)
    return (torch.cat([pairs[1:].flip(0), pairs]) / pairs[0]).sqrt()


def window(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the matrix (size, 2·size − 1) that sums every ``size`` neighbours."""
    column = torch.arange(2 * size - 1, device=device) - torch.arange(size, device=device)[:, None]
    return ((column >= 0) & (column < size)).to(dtype)


_window = constant(window)


def responses_to_ones(kernels: Tensor, height: int, width: int, guard: int) -> tuple[Tensor, Tensor]:
    """Returns variance and mean over the pixels, (…), of what kernels make of an image of ones.

    Args:
        kernels: Two-sided kernels (…, 2·M − 1), placed for images (H, W).
        height: Height of the images.
        width: Width of the images.
        guard: Columns of zeros between rows.
    """
    stride = width + guard
    if torch.jit.is_scripting():
        over_rows = window(height, kernels.dtype, kernels.device)
        over_columns = window(width, kernels.dtype, kernels.device)
    else:
        over_rows = _window(height, kernels.dtype, kernels.device)
        over_columns = _window(width, kernels.dtype, kernels.device)
    # A row of lags for each row of pixels above and below, each from −(W − 1) to W − 1.
    missing = (height - 1) * stride + width - 1 - kernels.shape[-1] // 2
    lags = F.pad(kernels, (missing, missing)).flatten(0, -2).unfold(-1, 2 * width - 1, stride)  # (…, 2H − 1, 2W − 1)
    sums = product(over_rows.expand(len(lags), -1, -1), product(lags, over_columns.t().expand(len(lags), -1, -1)))
    variance, mean = torch.var_mean(sums, dim=(-2, -1), correction=0)  # of (…, H, W)
    return variance.view(kernels.shape[:-1]), mean.view(kernels.shape[:-1])
