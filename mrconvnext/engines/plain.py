"""The operations in plain PyTorch, for any device, by FFTs; and a convolution without complex numbers, for export.

Images are laid out as sequences by `grid.to_sequence`. A sequence of L positions is padded to an FFT length n of at
least L + reach: what wraps round then misses the positions that are returned. All is computed in float32, or in float64
if the images are.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import move_back, place_kernel, to_image, to_sequence
from ..precision import at_least_float32


def fft_length(length: int) -> int:
    """Returns an FFT length of at least ``length`` that FFT libraries are fast at.

    It has no prime factor above 7, and as many factors 2 as cost at most a sixteenth more length, at least four.
    """
    step = 16
    while 32 * step <= length:
        step *= 2
    good = (length + step - 1) // step * step
    while not _is_smooth(good):
        good += step
    return good


def _is_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n = n // prime
    return n == 1


def image_spectrum(x: Tensor, guard: int, n: int, before: int = 0, norm: str = "backward") -> Tensor:
    """Returns the spectra (B, C, n // 2 + 1) of images (B, C, H, W) as sequences, ``before`` zeros before them."""
    u = to_sequence(at_least_float32(x), guard)
    return rfft(F.pad(u, (before, n - before - u.shape[2])), norm=norm)


# The FFTs of torch 2.9 and 2.10 refuse an empty batch.


def rfft(u: Tensor, norm: str = "backward") -> Tensor:
    """Returns the one-sided spectra (…, n // 2 + 1) of real sequences (…, n), over n if ``norm`` is "forward"."""
    if u.numel() == 0:
        return torch.view_as_complex(u.new_empty(list(u.shape[:-1]) + [u.shape[-1] // 2 + 1, 2]))
    return torch.fft.rfft(u, norm=norm)


def irfft(spectrum: Tensor, n: int) -> Tensor:
    """Returns the real sequences (…, n) with one-sided spectra (…, n // 2 + 1)."""
    if spectrum.numel() == 0:
        return torch.view_as_real(spectrum).new_empty(list(spectrum.shape[:-1]) + [n])
    return torch.fft.irfft(spectrum, n)


def convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    """`longconv.convolve`: a product of spectra."""
    kernel = place_kernel(kernel, row_stride, x, guard)
    reach = kernel.shape[-1] // 2
    n = fft_length(x.shape[2] * (x.shape[3] + guard) + reach)
    y = convolve_spectrum(x, kernel_spectrum(x, kernel, n), reach, guard, n)
    if bias is not None:
        y = y + bias.to(y.dtype).unsqueeze(-1).unsqueeze(-1)
    return as_output(y, x)


def kernel_spectrum(x: Tensor, kernel: Tensor, n: int) -> Tensor:
    """Returns the spectra (N, C, n // 2 + 1) of a two-sided kernel (N · C, 2·M − 1) for images (B, C, H, W)."""
    spectrum = rfft(F.pad(kernel.to(at_least_float32(x).dtype), (0, n - kernel.shape[-1])))
    return spectrum.unflatten(0, (kernel.shape[0] // x.shape[1], x.shape[1]))


def convolve_spectrum(x: Tensor, spectrum: Tensor, reach: int, guard: int, n: int) -> Tensor:
    """Returns images convolved with the kernel that has the given `kernel_spectrum`, of largest lag ``reach``."""
    product = image_spectrum(x, guard, n).unsqueeze(1) * spectrum  # (B, N, C, n // 2 + 1)
    y = irfft(product.flatten(1, 2), n)[..., reach : reach + x.shape[2] * (x.shape[3] + guard)]
    return to_image(y, x.shape[2], guard)


def as_output(y: Tensor, x: Tensor) -> Tensor:
    """Returns images ``y`` in the dtype of ``x``, and in channels-last order if ``x`` is."""
    y = y.to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Returns whether images are in channels-last order, and not in the usual one as well."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def empty_output(x: Tensor, channels: int) -> Tensor:
    """Returns empty images with as many channels that have the size, dtype and order of ``x``."""
    order = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


def convolve_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, row_stride: int, guard: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`longconv.convolve_backward`: with the output's gradient moved by the reach, both are products of spectra."""
    placed = place_kernel(kernel, row_stride, x, guard)
    reach = placed.shape[-1] // 2
    n = fft_length(x.shape[2] * (x.shape[3] + guard) + reach)
    conjugate = kernel_spectrum(x, placed, n).conj_physical()
    grad_x, cross = gradients(grad, x, conjugate, reach, guard, n)
    return as_output(grad_x, x), kernel_gradient(cross, x, kernel, reach, row_stride, guard, n), bias_gradient(grad)


def gradients(grad: Tensor, x: Tensor, conjugate: Tensor, reach: int, guard: int, n: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients for the images and, as a spectrum (N · C, n // 2 + 1), for the kernel.

    Args:
        grad: Gradient of the output (B, N · C, H, W).
        x: The images (B, C, H, W).
        conjugate: Conjugate of the `kernel_spectrum`.
        reach: Largest lag of the kernel.
        guard: Columns of zeros between rows.
        n: The FFT length.
    """
    branches, channels = conjugate.shape[0], conjugate.shape[1]
    grads = image_spectrum(grad, guard, n, before=reach).unflatten(1, (branches, channels))
    product = grads * conjugate
    product = product.squeeze(1) if branches == 1 else product.sum(1)
    grad_x = to_image(irfft(product, n)[..., : x.shape[2] * (x.shape[3] + guard)], x.shape[2], guard)
    images = image_spectrum(x, guard, n).conj_physical().unsqueeze(1)
    return grad_x, (grads * images).sum(0).flatten(0, 1)


def kernel_gradient(
    cross: Tensor, x: Tensor, kernel: Tensor, reach: int, row_stride: int, guard: int, n: int
) -> Tensor:
    """Returns the gradient for a kernel (N · C, 2·M − 1), of which that of its placed form is given as a spectrum."""
    placed = irfft(cross, n)[..., : 2 * reach + 1]
    return move_back(placed, x.shape[3] + guard, row_stride, kernel.shape[-1] // 2).contiguous()


def bias_gradient(grad: Tensor) -> Tensor:
    """Returns the gradient for a bias (N · C)."""
    return at_least_float32(grad).sum((0, 2, 3))


def autocorrelation(x: Tensor, mean: Tensor, guard: int) -> Tensor:
    """`longconv.autocorrelation`: the inverse transform of the power spectrum."""
    length = x.shape[2] * (x.shape[3] + guard)
    n = fft_length(2 * length - 1)
    return correlation_of(power(x, mean, guard, n), length, n)


def power(x: Tensor, mean: Tensor, guard: int, n: int) -> Tensor:
    """Returns the power spectrum (C, n // 2 + 1) of images less the mean (C) of their channels, summed over them."""
    v = at_least_float32(x) - mean.unsqueeze(-1).unsqueeze(-1)
    # Spectra over n: squares of sums over all pixels would leave the range of float32 long before the variance does.
    spectrum = torch.view_as_real(image_spectrum(v, guard, n, norm="forward"))
    return (n * torch.linalg.vector_norm(spectrum, dim=(0, 3)).to(torch.float64)).square()


def correlation_of(power: Tensor, length: int, n: int) -> Tensor:
    """Returns the lags 0 … length − 1 of the autocorrelation with a power spectrum (C, n // 2 + 1), in float64.

    Sums over the lags cancel where a kernel passes what the images hardly have: the power spectrum is exact enough in
    float32, all its terms being positive, but not what is summed after it.
    """
    return irfft(power.to(torch.complex128), n)[..., :length].contiguous()
