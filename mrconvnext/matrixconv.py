"""How small images are convolved without gradients: by real matrices, a DFT over the rows and one over the columns.

Let a sequence have H rows of S positions, t = r·S + c. Its spectrum is taken at the odd multiples of half a frequency
of n = 2·H·S, at (k + ½) / n, where a product of spectra is a convolution whose ends would come back with the opposite
sign; n is long enough for nothing to come back. With k = k1 + 2H·k2 the transform

    X[k] = Σ_c e^{−2πi (k + ½) c / n} · Σ_r e^{−2πi (k1 + ½) r / 2H} · x[r, c]

is one matrix over the rows, then one for each k1 over the columns; the conjugate of k is n − 1 − k, so k1 < H are all
there is to compute. The inverse is the transpose times 2 / n. Images stay in channels-last order, W columns wide.
Cooley and Tukey 1965, with the matrices that "Monarch" decompositions use (FlashFFTConv, Fu et al. 2023).
"""

import functools
import math

import torch
from torch import Tensor

# Rows plus twice the row stride, which the arithmetic for a pixel is proportional to, up to which this is faster
# than FFTs on a CPU.
LARGEST = 80


def is_small(x: Tensor, guard: int) -> bool:
    """Returns whether images like ``x`` (B, C, H, W) are convolved faster by matrices than by FFTs."""
    return x.device.type == "cpu" and x.shape[2] + 2 * (x.shape[3] + guard) <= LARGEST


@functools.lru_cache(maxsize=8)  # layers of one stage share them
def transforms(height: int, width: int, guard: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the matrices over the rows (2·H, H) and over the columns (H, 2·S, 2·W).

    Real and imaginary parts are rows of the first one in turn, and halves of the second one's rows and columns.
    """
    stride = width + guard
    first = torch.arange(height, dtype=torch.float64, device=device) + 0.5
    angle = math.pi / height * first[:, None] * torch.arange(height, device=device)
    rows = torch.stack([angle.cos(), -angle.sin()], 1).flatten(0, 1)
    frequency = first[:, None] + 2 * height * torch.arange(stride, device=device)
    angle = math.pi / (height * stride) * frequency[:, :, None] * torch.arange(width, device=device)
    cos, sin = angle.cos(), angle.sin()
    columns = torch.cat([torch.cat([cos, sin], 2), torch.cat([-sin, cos], 2)], 1)
    return rows.to(dtype), columns.to(dtype)


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
    real, imaginary = factors
    parts = spectrum_parts(x, matrices)
    product = parts * real
    product[:, :, 0].addcmul_(parts[:, :, 1], imaginary, value=-1)
    product[:, :, 1].addcmul_(parts[:, :, 0], imaginary)
    return images_of(product, x, matrices).add_(bias)


def convolve_by_constants(
    x: Tensor, matrices: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor], bias: Tensor
) -> Tensor:
    """Returns what `convolve_by_matrices` returns, by operations that an ONNX file has: none of them in place."""
    real, imaginary = factors[0], factors[1].unsqueeze(1)
    parts = spectrum_parts(x, matrices)
    # Each factor once: a graph holds a constant for each use.
    product = parts * real + (parts * imaginary).flip(2) * parts.new_tensor([-1.0, 1.0]).view(2, 1, 1)
    return images_of(product, x, matrices) + bias


def spectrum_parts(x: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the spectra (b, H, 2, S, C) of images (b, H, W, C), real and imaginary parts, by their `transforms`."""
    batch, height, width, channels = x.shape
    rows, columns = matrices
    parts = torch.matmul(rows, x.reshape(batch, height, width * channels)).view(batch, height, 2 * width, channels)
    return torch.matmul(columns, parts).view(batch, height, 2, columns.shape[1] // 2, channels)


def images_of(parts: Tensor, like: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the images (b, H, W, C), of ``like``'s size, that have a spectrum, times n / 2."""
    batch, height, width, channels = like.shape
    rows, columns = matrices
    parts = torch.matmul(columns.mT, parts.flatten(2, 3)).view(batch, 2 * height, width * channels)
    return torch.matmul(rows.mT, parts).view(batch, height, width, channels)
