"""How a sequence is convolved with a long kernel: the FFT, its lengths and dtypes, and a direct reference.

A kernel is two-sided: (…, C, 2·M − 1) holds the lags −(M − 1) … M − 1, lag 0 in the middle, and
y[t] = Σ_s kernel[t − s] · u[s]. Its reach is M − 1, its largest lag.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import at_least_float32


def fft_length(length: int) -> int:
    """Returns the smallest multiple of 16 that is at least ``length`` and has no prime factor above 7.

    FFT libraries are fast at such lengths, and slow at lengths with large prime factors.
    """
    good = (length + 15) // 16 * 16
    while not _is_smooth(good):
        good += 16
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
        if x.requires_grad and not torch.compiler.is_compiling():
            return _Spectrum.apply(x, n)
    return _rfft(x, n)


# The FFTs of torch 2.9 and 2.10 refuse an empty batch.


def _rfft(x: Tensor, n: int) -> Tensor:
    if x.numel() == 0:
        return torch.view_as_complex(x.new_empty(list(x.shape[:-1]) + [n // 2 + 1, 2]))
    return torch.fft.rfft(x, n)


def _irfft(x: Tensor, n: int, norm: str = "backward") -> Tensor:
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
        return torch.add(alone, _irfft(grad, ctx.n, norm="forward")[..., : ctx.length], alpha=0.5), None


def apply_spectrum(u_spectrum: Tensor, kernel_spectrum: Tensor, n: int, reach: int, length: int) -> Tensor:
    """Returns the convolution (…, length) of a sequence and a two-sided kernel, both given by their spectra.

    Args:
        u_spectrum: Spectrum of the sequence (…, C, length).
        kernel_spectrum: Spectrum of the kernel (…, C, 2·reach + 1), its first lag at position 0.
        n: FFT length of both, at least ``length + reach``: what wraps round then misses the positions returned.
        reach: Largest lag of the kernel, at most ``length - 1``.
        length: Length of the sequence.
    """
    return _irfft(u_spectrum * kernel_spectrum, n)[..., reach : reach + length]


def convolve_spectrum(u_spectrum: Tensor, kernel: Tensor, n: int, length: int) -> Tensor:
    """Returns `apply_spectrum` for a kernel (…, C, 2·M − 1) that is not transformed yet."""
    return apply_spectrum(u_spectrum, spectrum(kernel, n), n, kernel.shape[-1] // 2, length)


def conv_length(length: int, kernel: Tensor) -> int:
    """Returns the FFT length for the convolution of a sequence of ``length`` with a two-sided kernel."""
    return fft_length(length + kernel.shape[-1] // 2)


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
    n = conv_length(length, kernel)
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


def autocorrelation(u_spectrum: Tensor, n: int, length: int) -> Tensor:
    """Returns r[lag] = Σ_b Σ_t u[b, t] · u[b, t − lag] for the lags 0 … length − 1, (C, length), in float64.

    Sums over the lags cancel where a kernel passes what the sequences hardly have: the power spectrum is exact enough
    in float32, all its terms being positive, but not what is summed after it.

    Args:
        u_spectrum: Spectrum (B, C, n // 2 + 1) of the sequences (B, C, length).
        n: FFT length, at least ``2·length − 1``.
        length: Length of the sequences.
    """
    power = torch.view_as_real(u_spectrum).square().sum(dim=(0, 3))
    # A copy, so that keeping it does not keep the other half.
    return torch.fft.irfft(power.to(torch.float64), n)[..., :length].contiguous()


def response_energy(correlation: Tensor, kernel: Tensor) -> Tensor:
    """Returns Σ_b Σ_t (kernel * u[b])[t]² over the full convolution, without convolving, (C).

    The energy is the product of two autocorrelations, Σ_lag r[lag] · a[lag], r the sequences' and a the kernel's.
    a comes from an FFT no longer than the kernel needs. Only r and the kernel are kept for the backward pass: spectra
    of all the branches would take as much memory as a small batch of images.

    Args:
        correlation: Autocorrelation r of the sequences, lags 0 … L − 1, (C, L), in float64; see `autocorrelation`.
        kernel: Two-sided kernel (C, 2·M − 1).

    Returns:
        The energies, of the kernel's dtype.
    """
    if not torch.jit.is_scripting():
        if not torch.compiler.is_compiling():
            return _ResponseEnergy.apply(correlation, kernel)
    return _response_energy(correlation, kernel)


def _response_energy(correlation: Tensor, kernel: Tensor) -> Tensor:
    n, lags = _energy_length(correlation, kernel)
    products = autocorrelation(spectrum(kernel.to(torch.float64), n).unsqueeze(0), n, lags) * correlation[..., :lags]
    # Both are even in the lag. Rounding may take an energy of zero below it.
    return (2 * products.sum(-1) - products[..., 0]).clamp(min=0).to(kernel.dtype)


def _energy_length(correlation: Tensor, kernel: Tensor) -> tuple[int, int]:
    """Returns an FFT length for the kernel and for it with r, and the number of lags, from 0, that both have."""
    taps = kernel.shape[-1]
    lags = min(taps, correlation.shape[-1])
    return fft_length(taps + lags - 1), lags


class _ResponseEnergy(torch.autograd.Function):
    """`_response_energy`, a quadratic form Σ_s Σ_t k[s] · r[s − t] · k[t] in the kernel and linear in r."""

    @staticmethod
    def forward(correlation: Tensor, kernel: Tensor) -> Tensor:
        return _response_energy(correlation, kernel)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        correlation, kernel = ctx.saved_tensors
        grad = 2 * grad.unsqueeze(-1).to(torch.float64)
        n, lags = _energy_length(correlation, kernel)
        kernel_spectrum = spectrum(kernel.to(torch.float64), n)
        two_sided = torch.cat([correlation[..., 1:lags].flip(-1), correlation[..., :lags]], -1)
        grad_kernel = grad * convolve_spectrum(kernel_spectrum, two_sided, n, kernel.shape[-1])
        grad_correlation = grad * autocorrelation(kernel_spectrum.unsqueeze(0), n, lags)
        grad_correlation[..., 0] /= 2
        return F.pad(grad_correlation, (0, correlation.shape[-1] - lags)), grad_kernel.to(kernel.dtype)


def branch_energies(u_spectrum: Tensor, kernels: list[Tensor], n: int, u: Tensor) -> Tensor:
    """Returns the `response_energy` of every kernel to the sequences ``u`` with spectrum ``u_spectrum``, (kernels, C).

    Args:
        u_spectrum: Spectrum (B, C, n // 2 + 1) of ``u``.
        kernels: Two-sided kernels (C, …).
        n: FFT length, at least ``2·L − 1``.
        u: Sequences (B, C, L).
    """
    correlation = autocorrelation(u_spectrum, n, u.shape[2])
    return torch.stack([response_energy(correlation, kernel) for kernel in kernels])
