"""The operations on a CPU: those of `plain`, a few images at a time.

Spectra take more than twice the memory of the images, and fresh memory costs a CPU more time than the arithmetic on it.
A few images' spectra stay in its cache, and their memory is used again.
"""

from typing import Optional

import torch
from torch import Tensor

from ..grid import place_kernel, to_image
from . import plain

# Of the padded sequences of a piece.
PIECE_BYTES = 3 * 2**20


def piece_size(x: Tensor, branches: int, n: int) -> int:
    """Returns how many images are computed at a time: at least one."""
    return max(1, PIECE_BYTES // max(1, branches * x.shape[1] * n * x.element_size()))


def convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    """`longconv.convolve`."""
    kernel = place_kernel(kernel, row_stride, x, guard)
    reach = kernel.shape[-1] // 2
    length = x.shape[2] * (x.shape[3] + guard)
    n = plain.fft_length(length + reach)
    spectrum = plain.kernel_spectrum(x, kernel, n)
    bias = spectrum.real.new_zeros(kernel.shape[0]) if bias is None else bias.to(spectrum.real.dtype)
    y = plain.empty_output(x, kernel.shape[0])
    size = piece_size(x, len(spectrum), n)
    # Written to for every piece, but for the zeros between rows and behind them.
    sequences = spectrum.real.new_zeros((min(size, x.shape[0]), x.shape[1], n))
    pixels = to_image(sequences[..., :length], x.shape[2], guard)
    for images, out in zip(x.split(size), y.split(size)):
        pixels[: len(images)].copy_(images)
        product = plain.rfft(sequences[: len(images)]).unsqueeze(1)
        product = product.mul_(spectrum) if len(spectrum) == 1 else product * spectrum
        own = plain.irfft(product.flatten(1, 2), n)[..., reach : reach + length]
        torch.add(to_image(own, x.shape[2], guard), bias[:, None, None], out=out)
    return y


def convolve_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, row_stride: int, guard: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`longconv.convolve_backward`."""
    placed = place_kernel(kernel, row_stride, x, guard)
    reach = placed.shape[-1] // 2
    n = plain.fft_length(x.shape[2] * (x.shape[3] + guard) + reach)
    conjugate = plain.kernel_spectrum(x, placed, n).conj_physical()
    grad_x = plain.empty_output(x, x.shape[1])
    cross = torch.zeros_like(conjugate).flatten(0, 1)
    size = piece_size(x, len(conjugate), n)
    for images, grads, out in zip(x.split(size), grad.split(size), grad_x.split(size)):
        own_grad, own_cross = plain.gradients(grads, images, conjugate, reach, guard, n)
        out.copy_(own_grad)
        cross += own_cross
    grad_kernel = plain.kernel_gradient(cross, x, kernel, reach, row_stride, guard, n)
    return grad_x, grad_kernel, plain.bias_gradient(grad)


def autocorrelation(x: Tensor, mean: Tensor, guard: int) -> Tensor:
    """`longconv.autocorrelation`."""
    length = x.shape[2] * (x.shape[3] + guard)
    n = plain.fft_length(2 * length - 1)
    power = x.new_zeros((x.shape[1], n // 2 + 1), dtype=mean.dtype)
    for images in x.split(piece_size(x, 1, n)):
        power = power + plain.power(images, mean, guard, n)
    return plain.correlation_of(power, length, n)
