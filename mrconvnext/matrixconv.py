"""How small images are convolved without gradients: by real matrices, a DFT over the rows and one over the columns.

Let a sequence have H rows of S positions, t = r·S + c. Its spectrum is taken at the odd multiples of half a frequency
of n = 2·H·S, at (k + ½) / n, where a product of spectra is a convolution whose ends would come back with the opposite
sign; n is long enough for nothing to come back. With k = k1 + 2H·k2 the transform

    X[k] = Σ_c e^{−2πi (k + ½) c / n} · Σ_r e^{−2πi (k1 + ½) r / 2H} · x[r, c]

is one matrix over the rows, then one for each k1 over the columns; the conjugate of k is n − 1 − k, so k1 < H are all
there is to compute. The inverse is the transpose times 2 / n. Images stay in channels-last order, W columns wide.
Cooley and Tukey 1965, with the matrices that "Monarch" decompositions use (FlashFFTConv, Fu et al. 2023).
"""

import math

import torch
from torch import Tensor

# Rows plus twice the row stride, which the arithmetic for a pixel is proportional to, up to which this is faster
# than FFTs on a CPU.
LARGEST = 80


def is_small(x: Tensor, guard: int) -> bool:
    """Returns whether images like ``x`` (B, C, H, W) are convolved faster by matrices than by FFTs."""
    return x.device.type == "cpu" and x.shape[2] + 2 * (x.shape[3] + guard) <= LARGEST


def transforms(height: int, width: int, guard: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the matrices over the rows (2·H, H) and over the columns (H, 2·S, 2·W), of ``like``'s type.

    Real and imaginary parts are rows of the first one in turn, and halves of the second one's rows and columns.
    """
    stride = width + guard
    first = torch.arange(height, dtype=torch.float64, device=like.device) + 0.5
    angle = math.pi / height * first[:, None] * torch.arange(height, device=like.device)
    rows = torch.stack([angle.cos(), -angle.sin()], 1).flatten(0, 1)
    frequency = first[:, None] + 2 * height * torch.arange(stride, device=like.device)
    angle = math.pi / (height * stride) * frequency[:, :, None] * torch.arange(width, device=like.device)
    cos, sin = angle.cos(), angle.sin()
    columns = torch.cat([torch.cat([cos, sin], 2), torch.cat([-sin, cos], 2)], 1)
    return rows.to(like.dtype), columns.to(like.dtype)


def kernel_factors(kernel: Tensor, height: int, stride: int) -> tuple[Tensor, Tensor]:
    """Returns a kernel's spectrum times 2 / n, its real part (H, 1, S, C) and its imaginary part (H, S, C).

    Args:
        kernel: Two-sided kernel (C, 2·M − 1), M at most H·S.
        height: Number of rows H.
        stride: Row stride S.
    """
    n, reach = 2 * height * stride, kernel.shape[-1] // 2
    lags = torch.arange(-reach, reach + 1, device=kernel.device)
    angle = -math.pi / n * lags.double()
    circular = torch.zeros((kernel.shape[0], n), dtype=torch.complex128, device=kernel.device)
    circular[:, lags % n] = kernel * torch.complex(angle.cos(), angle.sin())
    spectrum = torch.fft.fft(circular, norm="forward").mul_(2)
    parts = torch.view_as_real(spectrum.unflatten(1, (stride, 2 * height))[:, :, :height]).permute(3, 2, 1, 0)
    real, imaginary = parts.to(kernel.dtype, memory_format=torch.contiguous_format)
    return real.unsqueeze(1), imaginary


def convolve_by_matrices(
    x: Tensor, matrices: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor], bias: Tensor
) -> Tensor:
    """Returns images (b, H, W, C) convolved with a kernel, plus a bias.

    Args:
        x: Images (b, H, W, C).
        matrices: Their `transforms`.
        factors: The kernel's `kernel_factors`.
        bias: Bias (C).
    """
    batch, height, width, channels = x.shape
    (rows, columns), (real, imaginary) = matrices, factors
    parts = torch.matmul(rows, x.reshape(batch, height, -1)).view(batch, height, 2 * width, channels)
    parts = torch.matmul(columns, parts).unflatten(2, (2, -1))
    product = parts * real
    product[:, :, 0].addcmul_(parts[:, :, 1], imaginary, value=-1)
    product[:, :, 1].addcmul_(parts[:, :, 0], imaginary)
    parts = torch.matmul(columns.mT, product.flatten(2, 3)).view(batch, 2 * height, -1)
    return torch.matmul(rows.mT, parts).view(x.shape).add_(bias)
