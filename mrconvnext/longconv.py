"""How a sequence is convolved with a long kernel: the FFT, its lengths and dtypes, and a direct reference.

A kernel is two-sided: (…, C, 2·M − 1) holds the lags −(M − 1) … M − 1, lag 0 in the middle, and
y[t] = Σ_s kernel[t − s] · u[s]. Its reach is M − 1, its largest lag.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .derived import is_eager
from .kernels import at_least_float32


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


def crop_lags(kernel: Tensor, length: int) -> Tensor:
    """Returns a two-sided kernel without the lags that a sequence of ``length`` has no two positions for."""
    reach = kernel.shape[-1] // 2
    keep = min(reach, length - 1)
    return kernel[..., reach - keep : reach + keep + 1]


def spectrum(x: Tensor, n: int) -> Tensor:
    """Returns the one-sided spectrum (…, n // 2 + 1) of real ``x`` zero-padded to ``n``, computed in float32 or 64."""
    x = at_least_float32(x)
    if not torch.jit.is_scripting():
        if x.requires_grad and is_eager(x):
            return _Spectrum.apply(x, n)
    return _rfft(x, n)


# The FFTs of torch 2.9 and 2.10 refuse an empty batch.


def _rfft(x: Tensor, n: int) -> Tensor:
    if x.numel() == 0:
        return torch.view_as_complex(x.new_empty(list(x.shape[:-1]) + [n // 2 + 1, 2]))
    return torch.fft.rfft(x, n)


def inverse(x: Tensor, n: int, norm: str = "backward") -> Tensor:
    """Returns the real sequences (…, n) with one-sided spectrum ``x``, scaled as ``torch.fft.irfft`` does."""
    if x.numel() == 0:
        return torch.view_as_real(x).new_empty(list(x.shape[:-1]) + [n])
    return torch.fft.irfft(x, n, norm=norm)


class _Spectrum(torch.autograd.Function):
    """``torch.fft.rfft``, which by itself keeps its padded input for a backward pass that needs none of it."""

    @staticmethod
    def forward(x: Tensor, n: int) -> Tensor:
        return _rfft(x, n)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.n = inputs
        ctx.length = x.shape[-1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # Half of the inverse transform, which counts every frequency twice that has a conjugate, and half of those that
        # have none: the first and, of an even n, the last.
        alone = grad[..., :1].real / 2
        if ctx.n % 2 == 0:
            alternating = 1 - 2 * (torch.arange(ctx.length, device=grad.device) % 2).to(alone.dtype)
            alone = torch.addcmul(alone, grad[..., -1:].real / 2, alternating)
        return torch.add(alone, inverse(grad, ctx.n, norm="forward")[..., : ctx.length], alpha=0.5), None


def convolve_spectrum(u_spectrum: Tensor, kernel: Tensor, n: int, length: int) -> Tensor:
    """Returns the convolution (…, length) of a sequence, given by its spectrum, and a two-sided kernel.

    Args:
        u_spectrum: Spectrum of the sequence (…, C, length).
        kernel: Two-sided kernel (…, C, 2·M − 1), M at most ``length``.
        n: FFT length, at least ``length + M − 1``: what wraps round then misses the positions returned.
        length: Length of the sequence.
    """
    reach = kernel.shape[-1] // 2
    return inverse(u_spectrum * spectrum(kernel, n), n)[..., reach : reach + length]


def check_sequences(u: Tensor, kernel: Tensor) -> None:
    """Raises if ``u`` (…, C, L) and a two-sided kernel (…, C, 2·M − 1) can't be convolved."""
    if not (u.is_floating_point() and kernel.is_floating_point()):
        raise TypeError(f"u and kernel must be floating-point tensors, got {u.dtype} and {kernel.dtype}")
    if kernel.shape[-1] % 2 == 0:
        raise ValueError(f"kernel must have an odd number of lags, lag 0 in the middle, got {kernel.shape[-1]}")
    if u.shape[-1] < 1:
        raise ValueError(f"u must have at least 1 position, got {list(u.shape)}")
    if kernel.shape[-2] != u.shape[-2] and u.shape[-2] != 1:
        raise ValueError(f"kernel must have the channels of u, {u.shape[-2]}, got {kernel.shape[-2]}")


def long_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Returns y[t] = Σ_s kernel[t − s] · u[s] for every position t of ``u``, by FFT.

    Computed in float32 (float64 if ``u`` is), whatever autocast says. Leading dimensions broadcast.

    Args:
        u: Sequences (B, C, L).
        kernel: Two-sided kernel (C, 2·M − 1), lag 0 in the middle. M and L are independent.

    Returns:
        Sequences (B, C, L) of ``u``'s dtype.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If ``u`` is empty, the channels differ, or the kernel's length is even, so that it has no middle.
    """
    check_sequences(u, kernel)
    length = u.shape[-1]
    kernel = crop_lags(kernel, length)
    n = fft_length(length + kernel.shape[-1] // 2)
    return convolve_spectrum(spectrum(u, n), kernel, n, length).to(u.dtype)


def long_conv_reference(u: Tensor, kernel: Tensor) -> Tensor:
    """Returns what `long_conv` returns, by the direct sum: the definition, in O(L·M) time and memory.

    Args:
        u: Sequences (B, C, L).
        kernel: Two-sided kernel (C, 2·M − 1), lag 0 in the middle.

    Returns:
        Sequences (B, C, L).

    Raises:
        TypeError: As `long_conv`.
        ValueError: As `long_conv`.
    """
    check_sequences(u, kernel)
    reach = kernel.shape[-1] // 2
    windows = F.pad(u, (reach, reach)).unfold(-1, kernel.shape[-1], 1)  # (B, C, L, 2M − 1): u[t − reach … t + reach]
    return (windows * kernel.flip(-1).unsqueeze(-2)).sum(-1)


def centred_spectrum(kernel: Tensor, n: int) -> Tensor:
    """Returns the spectrum of a two-sided kernel (C, 2·M − 1) with lag 0 at position 0, ``n`` at least 2·M − 1."""
    reach = kernel.shape[-1] // 2
    first = kernel.new_zeros((kernel.shape[0], n))
    first[:, : reach + 1] = kernel[:, reach:]
    first[:, n - reach :] = kernel[:, :reach]
    return torch.fft.rfft(first)


def centred_taps(first: Tensor, taps: int) -> Tensor:
    """Returns the ``taps`` lags round position 0 of circular (C, n), lag 0 in the middle."""
    reach = taps // 2
    return torch.cat([first[:, first.shape[1] - reach :], first[:, : reach + 1]], 1)


def correlation_of(power: Tensor, n: int, length: int) -> Tensor:
    """Returns the lags 0 … length − 1 of the autocorrelation with power spectrum (C, n // 2 + 1), in float64.

    Sums over the lags cancel where a kernel passes what the sequences hardly have: the power spectrum is exact enough
    in float32, all its terms being positive, but not what is summed after it.
    """
    # A copy, so that keeping it does not keep the other half.
    return torch.fft.irfft(power.to(torch.float64), n)[..., :length].contiguous()


def autocorrelation(u_spectrum: Tensor, n: int, length: int) -> Tensor:
    """Returns r[lag] = Σ_b Σ_t u[b, t] · u[b, t − lag] for the lags 0 … length − 1, (C, length), in float64.

    Args:
        u_spectrum: Spectrum (B, C, n // 2 + 1) of the sequences (B, C, length).
        n: FFT length, at least ``2·length − 1``.
        length: Length of the sequences.
    """
    return correlation_of(torch.view_as_real(u_spectrum).square().sum(dim=(0, 3)), n, length)


def branch_energies(correlation: Tensor, kernels: list[Tensor], weights: Tensor) -> Tensor:
    """Returns Σ_b Σ_t (kernel * u[b])[t]² over the full convolution with every weighted kernel, without convolving.

    By Parseval's theorem the energy is Σ_f |K(f)|² P(f) at any FFT length that the full convolution fits into, K the
    kernel's spectrum and P the sequences' power spectrum. Only the arguments are kept for the backward pass: spectra
    of all the branches would take as much memory as a small batch of images.

    Args:
        correlation: Autocorrelation of the sequences, lags 0 … L − 1, (C, L), in float64; see `autocorrelation`.
        kernels: Two-sided kernels (C, 2·M − 1), M at most L.
        weights: Factor of every lag (2·L − 1) of the kernels, constant.

    Returns:
        The energies (kernels, C), of the kernels' dtype.
    """
    if not torch.jit.is_scripting():
        if is_eager(correlation):
            return _BranchEnergies.apply(correlation, weights, *kernels)
    return _branch_energies(correlation, kernels, weights)


def _branch_energies(correlation: Tensor, kernels: list[Tensor], weights: Tensor) -> Tensor:
    power, n = _energy_power(correlation, kernels)
    energies: list[Tensor] = []
    for kernel in kernels:
        step = _frequency_step(kernel, correlation, n)
        parts = _spectrum_parts(kernel * _weights_of(kernel, weights), n // step)
        energies.append(_energy(parts, _every(power, step), n // step))
    return torch.stack(energies)


def _energy_power(correlation: Tensor, kernels: list[Tensor]) -> tuple[Tensor, int]:
    """Returns the power spectrum of sequences, each value twice as `_spectrum_parts` has two, and its FFT length n."""
    taps = max([kernel.shape[-1] for kernel in kernels])
    n = 2 * fft_length((taps + correlation.shape[-1]) // 2)
    power = (2 * torch.fft.rfft(correlation, n).real - correlation[:, :1]).clamp(min=0).to(kernels[0].dtype)
    return torch.stack([power, power], -1).flatten(1), n


def _weights_of(kernel: Tensor, weights: Tensor) -> Tensor:
    return crop_lags(weights, kernel.shape[-1] // 2 + 1).to(kernel.dtype)


def _frequency_step(kernel: Tensor, correlation: Tensor, n: int) -> int:
    """Returns 2 if every second of n frequencies is enough for a kernel as short as this one, else 1."""
    return 2 if kernel.shape[-1] + correlation.shape[-1] - 1 <= n // 2 else 1


def _every(parts: Tensor, step: int) -> Tensor:
    """Returns the view of every ``step``-th frequency in parts (C, 2·F) as `_spectrum_parts` lays them out."""
    return parts.unflatten(1, (-1, 2))[:, ::step].flatten(1)


def _spectrum_parts(kernel: Tensor, n: int) -> Tensor:
    """Returns a kernel's spectrum as (C, 2·(n // 2 + 1)), real and imaginary parts in turn."""
    return torch.view_as_real(torch.fft.rfft(kernel, n)).flatten(1)


def _energy(parts: Tensor, power: Tensor, n: int) -> Tensor:
    terms = parts.square() * power
    # Both halves of the spectrum; the first frequency and, of an even n, the last have no conjugate.
    total = 2 * terms.sum(-1) - terms[:, :2].sum(-1)
    if n % 2 == 0:
        total = total - terms[:, -2:].sum(-1)
    return total / n


class _BranchEnergies(torch.autograd.Function):
    """`_branch_energies`, quadratic in the kernels and linear in the autocorrelation."""

    @staticmethod
    def forward(ctx, correlation: Tensor, weights: Tensor, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(correlation, weights, *kernels)
        return _branch_energies(correlation, kernels, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        correlation, weights, *kernels = ctx.saved_tensors
        power, n = _energy_power(correlation, kernels)
        power *= 2
        powers = {1: power, 2: _every(power, 2)}
        squares = {step: torch.zeros_like(power) for step, power in powers.items()}
        grad_kernels = []
        for kernel, own in zip(kernels, grad.unsqueeze(-1)):
            step = _frequency_step(kernel, correlation, n)
            lags = _weights_of(kernel, weights)
            parts = _spectrum_parts(kernel * lags, n // step)
            scaled = parts * own
            squares[step].addcmul_(parts, scaled)
            product = torch.view_as_complex(scaled.mul_(powers[step]).unflatten(1, (-1, 2)))
            grad_kernels.append(torch.fft.irfft(product, n // step)[:, : kernel.shape[-1]] * lags)
        # Half as many frequencies count twice.
        total = squares[1].unflatten(1, (-1, 2)).sum(-1)
        total[:, ::2] += 2 * squares[2].unflatten(1, (-1, 2)).sum(-1)
        grad_correlation = 2 * torch.fft.irfft(total, n)[:, : correlation.shape[1]].to(torch.float64)
        grad_correlation[:, 0] /= 2
        return grad_correlation, None, *grad_kernels
