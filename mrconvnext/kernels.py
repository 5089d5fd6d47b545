"""How a kernel is parameterized: a few real numbers a channel give a kernel of any length.

Every parameterization has as many parameters for a long kernel as for a short one (MRConv, Cunningham et al. 2024,
section 3), and starts with an expected energy Σ k[lag]² of 1 a channel, so that branches of different length start
with outputs of about the same scale. The paper does not state the number of Fourier modes and sparse taps, nor how
the parameters start; what stands here is our choice.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.fx.wrap
def at_least_float32(x: Tensor) -> Tensor:
    """Returns ``x`` in float32, or unchanged if it is float64: the precision that kernels and FFTs are computed in."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


# Each kernel is computed in one function of its parameters, which FX keeps as one node.


@torch.fx.wrap
def dilated_kernel(values: Tensor, length: int) -> Tensor:
    """Returns the kernel (C, length) with ``values`` (C, taps) at evenly spaced lags."""
    spacing = max(1, length // values.shape[1])
    kernel = F.pad(at_least_float32(values).unsqueeze(-1), (0, spacing - 1)).flatten(1)
    return F.pad(kernel, (0, length - kernel.shape[1]))


@torch.fx.wrap
def fourier_kernel(coefficients: Tensor, length: int) -> Tensor:
    """Returns the kernel (C, length) with the lowest modes ``coefficients`` (C, modes, 2), by the unitary transform."""
    return torch.fft.irfft(torch.view_as_complex(at_least_float32(coefficients)), n=length, norm="ortho")


@torch.fx.wrap
def sparse_kernel(values: Tensor, lags: Tensor, length: int) -> Tensor:
    """Returns the kernel (C, length) with ``values`` (C, taps) at ``lags`` (C, taps), all different."""
    values = at_least_float32(values)
    return values.new_zeros((values.shape[0], length)).scatter(1, lags.to(torch.int64), values)


@torch.fx.wrap
def rescaled(values: Tensor, scale: Tensor) -> Tensor:
    """Returns parameters ``values`` (C, …) times a scale (C)."""
    return at_least_float32(values) * at_least_float32(scale).unflatten(0, [-1] + [1] * (values.dim() - 1))


@torch.fx.wrap
def two_sided_kernel(causal: Tensor, anticausal: Optional[Tensor]) -> Tensor:
    """Returns the kernel (C, 2·length − 1) of two kernels (C, length), lag 0, where they add, in the middle."""
    if anticausal is None:
        return F.pad(causal, (causal.shape[-1] - 1, 0))
    middle = causal[..., :1] + anticausal[..., :1]
    return torch.cat([anticausal[..., 1:].flip(-1), middle, causal[..., 1:]], -1)


class DilatedKernel(nn.Module):
    """A kernel with evenly spaced taps whose spacing grows with its length (MRConv, section 3: dilated).

    Args:
        channels: Number of channels C.
        length: Number of lags; the taps lie ``length // taps`` lags apart.
        taps: Number of taps a channel. Where the kernel is shorter than that, the taps beyond its end have no effect.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, channels: int, length: int, taps: int = 16, device=None, dtype=None) -> None:
        super().__init__()
        self.length = length
        self.values = nn.Parameter(torch.empty(channels, taps, device=device, dtype=dtype))
        nn.init.normal_(self.values, std=min(taps, length) ** -0.5)

    def forward(self) -> Tensor:
        """Returns the kernel (C, length)."""
        return dilated_kernel(self.values, self.length)


class FourierKernel(nn.Module):
    """A smooth kernel given by its lowest Fourier modes (MRConv, section 3: Fourier).

    The coefficients are real and imaginary parts as pairs of real numbers. The transform is unitary, where the paper
    divides by the length: the factor √length between the two makes the start independent of the length.

    Args:
        channels: Number of channels C.
        length: Number of lags.
        modes: Number of lowest modes, the constant one included. A kernel has ``length // 2 + 1`` modes in all; where
            that is less, the surplus coefficients have no effect.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, channels: int, length: int, modes: int = 16, device=None, dtype=None) -> None:
        super().__init__()
        self.length = length
        self.coefficients = nn.Parameter(torch.empty(channels, modes, 2, device=device, dtype=dtype))
        # The energy is that of all modes: each has two parts and a conjugate, but for the constant and, where the
        # length is even, the highest mode, which are real and alone.
        used = min(modes, length // 2 + 1)
        alone = 1 if 2 * (used - 1) < length else 2
        nn.init.normal_(self.coefficients, std=(4 * (used - alone) + alone) ** -0.5)

    def forward(self) -> Tensor:
        """Returns the kernel (C, length)."""
        return fourier_kernel(self.coefficients, self.length)


class SparseKernel(nn.Module):
    """A kernel that is zero but at a few lags, drawn once and then fixed (MRConv, section 3: sparse).

    Every channel has lags of its own; they are kept with the weights. The paper does not say whether channels share
    them: with lags of its own for each, a layer's channels together cover the whole length.

    Args:
        channels: Number of channels C.
        length: Number of lags.
        taps: Number of lags that are not zero, at most ``length``.
        generator: Source of the lags, on the CPU; the global generator is left alone. Default: one with seed 0.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    lags: Tensor

    def __init__(
        self,
        channels: int,
        length: int,
        taps: int = 16,
        generator: Optional[torch.Generator] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.length = length
        taps = min(taps, length)
        generator = generator or torch.Generator("cpu").manual_seed(0)
        lags = torch.rand(channels, length, generator=generator, device="cpu").topk(taps).indices
        self.register_buffer("lags", lags.to(device=device or torch.get_default_device(), dtype=torch.int32))
        self.values = nn.Parameter(torch.empty(channels, taps, device=device, dtype=dtype))
        nn.init.normal_(self.values, std=taps**-0.5)

    def forward(self) -> Tensor:
        """Returns the kernel (C, length)."""
        return sparse_kernel(self.values, self.lags, self.length)


class FourierSparseKernel(nn.Module):
    """The rescaled sum of a Fourier and a sparse kernel of equal length (MRConv, section 3: linear rescaling).

    Args:
        channels: Number of channels C.
        length: Number of lags.
        modes: See `FourierKernel`.
        taps: See `SparseKernel`.
        generator: See `SparseKernel`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        modes: int = 16,
        taps: int = 16,
        generator: Optional[torch.Generator] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.length = length
        self.fourier = FourierKernel(channels, length, modes, device=device, dtype=dtype)
        self.sparse = SparseKernel(channels, length, taps, generator, device=device, dtype=dtype)
        self.fourier_scale = nn.Parameter(torch.full((channels,), 0.5**0.5, device=device, dtype=dtype))
        self.sparse_scale = nn.Parameter(torch.full((channels,), 0.5**0.5, device=device, dtype=dtype))

    def forward(self) -> Tensor:
        """Returns the kernel (C, length)."""
        # Both are linear in their parameters: scaling these, not the kernels, keeps no kernel for the backward pass.
        coefficients = rescaled(self.fourier.coefficients, self.fourier_scale)
        values = rescaled(self.sparse.values, self.sparse_scale)
        return fourier_kernel(coefficients, self.length) + sparse_kernel(values, self.sparse.lags, self.length)


KERNELS = ("fourier_sparse", "fourier", "dilated", "sparse")


def create_kernel(
    kind: str,
    channels: int,
    length: int,
    modes: int = 16,
    taps: int = 16,
    generator: Optional[torch.Generator] = None,
    device=None,
    dtype=None,
) -> nn.Module:
    """Returns a module whose call gives a kernel (channels, length) of the named kind.

    Args:
        kind: One of `KERNELS`.
        channels: Number of channels C.
        length: Number of lags, at least 1.
        modes: Number of Fourier modes, at least 1.
        taps: Number of dilated or sparse taps, at least 1.
        generator: Source of the sparse lags; see `SparseKernel`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If ``kind`` is unknown or a size is below 1.
    """
    for name, value in (("length", length), ("modes", modes), ("taps", taps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    dd = {"device": device, "dtype": dtype}
    if kind == "dilated":
        return DilatedKernel(channels, length, taps, **dd)
    if kind == "fourier":
        return FourierKernel(channels, length, modes, **dd)
    if kind == "sparse":
        return SparseKernel(channels, length, taps, generator, **dd)
    if kind == "fourier_sparse":
        return FourierSparseKernel(channels, length, modes, taps, generator, **dd)
    raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kind!r}")


class TwoSidedKernel(nn.Module):
    """A kernel over negative and positive lags, made of one kernel for each direction.

    Args:
        causal: Gives the kernel (C, length) of lags 0 … length − 1.
        anticausal: Gives the kernel (C, length) of lags 0 … −(length − 1), or None for a causal kernel.
    """

    def __init__(self, causal: nn.Module, anticausal: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.causal = causal
        self.anticausal = anticausal

    def forward(self) -> Tensor:
        """Returns the kernel (C, 2·length − 1), lag 0 in the middle, where both directions add."""
        return two_sided_kernel(self.causal(), None if self.anticausal is None else self.anticausal())


def merge_kernels(kernels: list[Tensor], gains: Tensor) -> Tensor:
    """Returns the sum of two-sided kernels, each times its gain.

    Args:
        kernels: Two-sided kernels (C, 2·l_i − 1), lag 0 in the middle, in any order of length.
        gains: One gain for each kernel and channel, (kernels, C).

    Returns:
        The merged kernel (C, 2·max l_i − 1).
    """
    merged = gains[0].unsqueeze(-1) * kernels[0]
    for i in range(1, len(kernels)):
        kernel = gains[i].unsqueeze(-1) * kernels[i]
        merged = add_kernels(merged, kernel)
    return merged


def add_kernels(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sum of two two-sided kernels (…, C, 2·l − 1) of any lengths, lag 0 on lag 0."""
    grow = (b.shape[-1] - a.shape[-1]) // 2
    if grow >= 0:
        return F.pad(a, (grow, grow)) + b
    return a + F.pad(b, (-grow, -grow))
