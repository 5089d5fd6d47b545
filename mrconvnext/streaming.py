"""Causal layers run position by position, with a state in the place of the sequence so far.

A Fourier kernel of length l gives y[t] = Re Σ_m c_m Z_m[t], where Z_m[t] = Σ_{j < l} e^{iω_m j} u[t − j] and
ω_m = 2πm / l. Since a mode has whole turns in l positions, Z_m[t] = e^{iω_m} Z_m[t − 1] + u[t] − u[t − l]: a sliding
Fourier transform (Jacobsen and Lyons 2003), whose cost does not depend on l. Its rounding errors add up, so the Z_m are
kept in float64. Taps, sparse and dilated, read the past inputs at their lags. Kernels of other kinds, and the deployed
form, take blocks: what the positions before a block add to its outputs is one convolution a block, and within it the
kernel is applied as it stands.
"""

import math
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from .kernels import FourierKernels, FourierSparseKernels, SparseKernels
from .longconv import long_conv
from .precision import at_least_float32


class Stream(Protocol):
    """What a layer has seen so far. It belongs to the weights that the layer had when it was made.

    Attributes:
        batch: Number of sequences B.
        bias: Bias of each channel (C).
    """

    batch: int
    bias: Tensor

    def step(self, x: Tensor) -> Tensor:
        """Returns the layer's output (B, C) at the next position, whose input is ``x`` (B, C), which it takes in."""


class BlockStream:
    """The last positions of a convolution with a dense kernel.

    Args:
        kernel: The kernel at the lags from 0 on, (C, M).
        bias: Bias (C).
        batch: Number of sequences.
    """

    def __init__(self, kernel: Tensor, bias: Tensor, batch: int) -> None:
        channels, lags = kernel.shape
        self.bias, self.batch = bias, batch
        # A block costs about M · log M, each of its positions as many products as stand before it in the block.
        self.size = 2 ** max(3, math.ceil(math.log2(lags * max(1, math.log2(lags))) / 2))
        self.near = kernel[:, : self.size].flip(-1)  # what acts within a block, lag 0 last
        self.two_sided = torch.cat([torch.zeros_like(kernel[:, 1:]), kernel], -1)
        self.before = kernel.new_zeros((batch, channels, lags - 1))
        self.block = kernel.new_zeros((batch, channels, self.size))
        self.added = kernel.new_zeros((batch, channels, self.size))  # to the block's outputs by what is before it
        self.position = 0  # in the block

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """See `Stream`."""
        i = self.position
        self.block[:, :, i] = x
        lags = min(i + 1, self.near.shape[1])
        near = self.block[:, :, i + 1 - lags : i + 1] * self.near[:, -lags:]
        y = near.sum(-1) + self.added[:, :, i] + self.bias
        self.position += 1
        if self.position == self.size:
            self._begin_block()
        return y.to(x.dtype)

    def _begin_block(self) -> None:
        past = torch.cat([self.before, self.block], -1)
        self.before = past[:, :, self.size :]
        ahead = torch.cat([self.before, torch.zeros_like(self.block)], -1)
        self.added = long_conv(ahead, self.two_sided)[:, :, -self.size :]
        self.position = 0


class ModesAndTaps:
    """The past inputs of a layer whose kernels are Fourier modes and taps, and the sliding transforms of these inputs.

    Args:
        modes: Fourier modes of the branches, if there are any: their frequencies (N, M) in radians, their coefficients
            (N, C, M), complex, and the first lag and the length of each branch.
        taps: Lags (C, P) and values (C, P) of the taps, if there are any.
        bias: Bias (C).
        length: Number of lags L.
        batch: Number of sequences.
    """

    def __init__(
        self,
        modes: Optional[tuple[Tensor, Tensor, list[int], list[int]]],
        taps: Optional[tuple[Tensor, Tensor]],
        bias: Tensor,
        length: int,
        batch: int,
    ) -> None:
        self.taps, self.bias, self.batch = taps, bias, batch
        # A ring: the input n lags before position t stands at (t − n) mod (L + 1).
        self.past = bias.new_zeros((batch, len(bias), length + 1))
        self.position = 0
        self.is_smooth = modes is not None
        if modes is not None:
            frequencies, coefficients, starts, lengths = modes
            self.turn = torch.polar(torch.ones_like(frequencies), frequencies)  # (N, M)
            self.coefficients = coefficients.transpose(0, 1)  # (C, N, M)
            self.edges = torch.tensor([starts, [s + n for s, n in zip(starts, lengths)]], device=bias.device)
            self.sums = coefficients.new_zeros((batch, *self.coefficients.shape))

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """See `Stream`."""
        ring = self.past.shape[-1]
        self.past[:, :, self.position] = x
        y = self.bias.expand(x.shape)
        if self.is_smooth:
            entering, leaving = self.past[:, :, (self.position - self.edges) % ring].unbind(-2)  # (B, C, N) each
            self.sums.mul_(self.turn).add_((entering.double() - leaving.double()).unsqueeze(-1))
            y = y + (self.sums * self.coefficients).real.sum((-2, -1)).to(y.dtype)
        if self.taps is not None:
            lags, values = self.taps
            index = ((self.position - lags) % ring).expand(len(x), -1, -1)
            y = y + (self.past.gather(2, index) * values).sum(-1)
        self.position = (self.position + 1) % ring
        return y.to(x.dtype)


@torch.no_grad()
def start_stream(layer: Any, batch: int) -> Stream:
    """Returns the stream of a causal layer before the first position.

    Args:
        layer: An `MRConv1d` in either form, in evaluation if its norm has statistics.
        batch: Number of sequences.

    Raises:
        RuntimeError: If the layer is bidirectional, or its deployed kernel reaches ahead, or it would take statistics
            of a batch.
    """
    if layer.bidirectional:
        raise RuntimeError(
            "a layer with bidirectional=True can't be run position by position: it needs the positions ahead"
        )
    if layer.training and layer.kernel is None and layer.options.norm in ("parseval", "batch"):
        raise RuntimeError(f'branch_norm="{layer.options.norm}" takes statistics in training: call eval() before')
    if layer.kernel is None and not layer.is_resampled and not layer.is_single:
        return _structured(layer, batch)
    kernel, bias = layer.merged_kernel()
    lags = kernel.shape[-1] // 2 + 1
    if (kernel[:, : lags - 1].abs() > 1e-4 * kernel.abs().max()).any():
        raise RuntimeError("the kernel reaches ahead: the weights are those of a layer with bidirectional=True")
    return BlockStream(at_least_float32(kernel[:, lags - 1 :]).contiguous(), at_least_float32(bias), batch)


def _structured(layer: Any, batch: int) -> ModesAndTaps:
    kernels = layer.kernels
    gain, bias = layer.branch_gains()  # (N, C), (C)
    modes = taps = None
    if isinstance(kernels, (FourierKernels, FourierSparseKernels)):
        frequencies, coefficients = spectrum_of(kernels)
        modes = frequencies, coefficients * gain.unsqueeze(-1), kernels.starts, kernels.lengths
    if not isinstance(kernels, FourierKernels):
        lags, values = taps_of(kernels)  # (N, C, P) each
        values = at_least_float32((values * gain.unsqueeze(-1)).to(layer.alpha.dtype))
        taps = lags.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1)
    return ModesAndTaps(
        modes, taps, at_least_float32(bias.to(layer.alpha.dtype)), kernels.starts[-1] + kernels.lengths[-1], batch
    )


def spectrum_of(kernels: Any) -> tuple[Tensor, Tensor]:
    """Returns the Fourier modes of causal kernels: frequencies (N, M) in radians, coefficients (N, C, M), in float64.

    Those of `branches.fourier_basis` as complex numbers. Modes that a length does not have are zero.
    """
    scale = kernels.fourier_scale.double() if isinstance(kernels, FourierSparseKernels) else None
    parts = kernels.coefficients.double()[:, :, 0]  # (N, C, 2·M)
    parts = parts if scale is None else parts * scale
    real, imaginary = parts.unflatten(-1, (-1, 2)).unbind(-1)
    mode = torch.arange(real.shape[-1], device=real.device, dtype=torch.float64)
    length = torch.tensor(kernels.lengths, device=real.device, dtype=torch.float64).unsqueeze(1)
    doubled = (mode > 0) & (2 * mode < length)  # (N, M): these have a conjugate
    size = ((2 * mode <= length) * (1 + doubled.double()) / length.sqrt()).unsqueeze(1)
    return 2 * math.pi / length * mode, torch.complex(size * real, size * doubled.unsqueeze(1) * imaginary)


def taps_of(kernels: Any) -> tuple[Tensor, Tensor]:
    """Returns the taps of causal kernels: their lags and values, (N, C, P) each, the values in float64."""
    values = kernels.values.double()[:, :, 0]
    starts = torch.tensor(kernels.starts, device=values.device).view(-1, 1, 1)
    if isinstance(kernels, SparseKernels):
        if isinstance(kernels, FourierSparseKernels):
            values = values * kernels.sparse_scale.double()
        return kernels.lags[:, :, 0].to(values.device) + starts, values
    tap = torch.arange(values.shape[-1], device=values.device)
    lengths = torch.tensor(kernels.lengths, device=values.device).view(-1, 1, 1)
    lags = tap * (lengths // len(tap)).clamp(min=1)  # (N, 1, P)
    inside = lags < lengths  # taps beyond a kernel's end have no effect
    return torch.where(inside, lags + starts, 0).expand_as(values), values * inside
