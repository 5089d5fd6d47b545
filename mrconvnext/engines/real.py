"""The convolution without complex numbers, for exporters that have none: a DFT over the rows and one over the columns.

Let a sequence have H rows of S positions, t = r·S + c. Its spectrum is taken at the odd multiples of half a frequency
of n = 2·H·S, at (k + ½) / n, where a product of spectra is a convolution whose ends would come back with the opposite
sign; n is long enough for nothing to come back. With k = k1 + 2H·k2 the transform

    X[k] = Σ_c e^{−2πi (k + ½) c / n} · Σ_r e^{−2πi (k1 + ½) r / 2H} · x[r, c]

is one matrix over the rows, then one for each k1 over the columns; the conjugate of k is n − 1 − k, so k1 < H are all
there is to compute. The inverse is the transpose times 2 / n. Images are in channels-last order.
Cooley and Tukey 1965, with the matrices that "Monarch" decompositions use (FlashFFTConv, Fu et al. 2023).
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..constants import constant, shape_of
from ..grid import move_kernel
from ..precision import at_least_float32, without_autocast


def row_matrix(height: int, first: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the matrix (2·H, rows) over the rows from number ``first`` on; real and imaginary parts in turn."""
    frequency = torch.arange(height, dtype=torch.float64, device=device) + 0.5
    row = torch.arange(rows, dtype=torch.float64, device=device) + first
    angle = math.pi / height * frequency[:, None] * row
    return torch.stack([angle.cos(), -angle.sin()], 1).flatten(0, 1).to(dtype)


def column_matrix(height: int, stride: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the matrices (H, 2·S, 2·columns); real and imaginary parts are halves of rows and columns."""
    first = torch.arange(height, dtype=torch.float64, device=device) + 0.5
    frequency = first[:, None] + 2 * height * torch.arange(stride, device=device)
    angle = math.pi / (height * stride) * frequency[:, :, None] * torch.arange(columns, device=device)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([torch.cat([cos, sin], 2), torch.cat([-sin, cos], 2)], 1).to(dtype)


_row_matrix, _column_matrix = constant(row_matrix), constant(column_matrix)


def convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    """`longconv.convolve_real`."""
    height, width = shape_of(x)[2:]
    stride = width + guard
    images = at_least_float32(x).permute(0, 2, 3, 1)  # (B, H, W, C)
    kernel = move_kernel(kernel.to(images.dtype), row_stride, stride, height * stride - 1)
    channels, lags = shape_of(kernel)
    # Rows −H … H − 1 of lags.
    around = height * stride - lags // 2
    rows = F.pad(kernel, (around, around - 1)).t().reshape(1, 2 * height, stride, channels)
    if torch.jit.is_scripting():
        y = _convolve(images, rows)
    else:
        with without_autocast(x):
            y = _convolve(images, rows)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.permute(0, 3, 1, 2).to(x.dtype)


def _convolve(images: Tensor, lags: Tensor) -> Tensor:
    """Returns images (B, H, W, C) convolved with a kernel that is given as rows of lags (1, 2·H, S, C)."""
    height, width = shape_of(images)[1:3]
    stride = shape_of(lags)[2]
    dtype, device = images.dtype, images.device
    if torch.jit.is_scripting():
        rows, columns = (
            row_matrix(height, 0, height, dtype, device),
            column_matrix(height, stride, width, dtype, device),
        )
        lag_rows = row_matrix(height, -height, 2 * height, dtype, device)
        lag_columns = column_matrix(height, stride, stride, dtype, device)
    else:
        rows, columns = (
            _row_matrix(height, 0, height, dtype, device),
            _column_matrix(height, stride, width, dtype, device),
        )
        lag_rows = _row_matrix(height, -height, 2 * height, dtype, device)
        lag_columns = _column_matrix(height, stride, stride, dtype, device)
    a, b = _spectrum(images, rows, columns).unbind(2)  # real and imaginary parts (B, H, S, C)
    c, d = (_spectrum(lags, lag_rows, lag_columns) / (height * stride)).unbind(2)
    product = torch.stack([a * c - b * d, a * d + b * c], 2)
    return _image(product, rows, columns, width)


def _spectrum(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the spectra (B, H, 2, S, C) of images (B, R, W, C), real and imaginary parts."""
    batch = images.shape[0]
    height, width, channels = shape_of(images)[1:]
    frequencies, stride = shape_of(rows)[0] // 2, shape_of(columns)[1] // 2
    parts = torch.matmul(rows, images.reshape(batch, height, width * channels))
    parts = torch.matmul(columns, parts.view(batch, frequencies, 2 * width, channels))
    return parts.view(batch, frequencies, 2, stride, channels)


def _image(spectrum: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Returns the images (B, H, W, C) that have spectra (B, H, 2, S, C), times n / 2."""
    batch = spectrum.shape[0]
    height, channels = shape_of(spectrum)[1], shape_of(spectrum)[4]
    parts = torch.matmul(columns.transpose(-2, -1), spectrum.flatten(2, 3)).reshape(batch, 2 * height, width * channels)
    return torch.matmul(rows.transpose(-2, -1), parts).view(batch, height, width, channels)
