"""MRConv's kernels: a few real numbers a channel give a kernel of any length.

A layer has N branches, each with a kernel for D directions (1 or 2) and C channels. The parameters of all of them are
stacked, and all kernels are evaluated at once as two-sided kernels (N, C, 2·L − 1): lag 0 in the middle, where both
directions start and add; L is the length of all of them, and a kernel is zero beyond its own. The lags of branch i are
``starts[i]`` … ``starts[i] + lengths[i] − 1`` in each direction; L is where the last one ends.

Every parameterization has as many parameters for a long kernel as for a short one (MRConv, Cunningham et al. 2024,
section 3), and starts with an expected energy Σ k[lag]² of 1 a channel and direction, so that branches of different
length start with outputs of about the same scale. The paper does not state the number of Fourier modes and sparse taps,
nor how the parameters start; what stands here is our choice.
"""

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..constants import constant
from ..precision import at_least_float32, product


def fourier_basis(
    lengths: list[int], starts: list[int], directions: int, modes: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns what each Fourier coefficient adds to a two-sided kernel, (N, directions · modes · 2, 2·L − 1).

    The rows are those of the unitary inverse real transform of each branch's length: real and imaginary part of mode 0,
    of mode 1, and so on. Modes that a length does not have are zero.
    """
    rows: list[Tensor] = []
    for length, start in zip(lengths, starts):
        lag = torch.arange(starts[-1] + lengths[-1], device=device) - start
        mode = torch.arange(modes, device=device)
        # Whole turns are taken off as integers: the angle is exact however long the kernel.
        angle = (2 * math.pi / length) * (mode[:, None] * lag % length).to(torch.float64)  # (modes, L)
        doubled = (mode > 0) & (2 * mode < length)  # these have a conjugate
        scale = (2 * mode <= length).to(torch.float64) * (1 + doubled.to(torch.float64)) / math.sqrt(length)
        inside = ((lag >= 0) & (lag < length)).to(torch.float64) * scale[:, None]
        parts = torch.stack([inside * angle.cos(), -inside * doubled[:, None] * angle.sin()], 1)
        rows.append(parts.flatten(0, 1))  # (modes · 2, L)
    return towards_both(torch.stack(rows), directions).to(dtype)


def dilated_basis(
    lengths: list[int], starts: list[int], directions: int, taps: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Returns where each dilated tap stands in a two-sided kernel, (N, directions · taps, 2·L − 1)."""
    tap = torch.arange(taps, device=device)
    rows: list[Tensor] = []
    for length, start in zip(lengths, starts):
        lag = torch.arange(starts[-1] + lengths[-1], device=device) - start
        position = tap * max(1, length // taps)
        rows.append((position[:, None] == lag) & (position[:, None] < length))
    return towards_both(torch.stack(rows), directions).to(dtype)


def towards_both(causal: Tensor, directions: int) -> Tensor:
    """Returns rows (N, P, L) over lags 0 … L − 1 as rows (N, directions · P, 2·L − 1), those of each direction."""
    zeros = torch.zeros_like(causal[..., 1:])
    ahead = torch.cat([zeros, causal], -1)
    return ahead if directions == 1 else torch.cat([ahead, torch.cat([causal.flip(-1), zeros], -1)], 1)


_fourier_basis = constant(lambda lengths, starts, *args: fourier_basis(list(lengths), list(starts), *args))
_dilated_basis = constant(lambda lengths, starts, *args: dilated_basis(list(lengths), list(starts), *args))


@torch.fx.wrap
def fourier_kernels(coefficients: Tensor, scale: Optional[Tensor], lengths: list[int], starts: list[int]) -> Tensor:
    """Returns the kernels (N, C, 2·L − 1) with Fourier coefficients (N, C, D, 2 · modes) times a scale (N, C, D)."""
    directions, modes = coefficients.shape[2], coefficients.shape[3] // 2
    values = _scaled(coefficients, scale)
    if torch.jit.is_scripting():
        basis = fourier_basis(lengths, starts, directions, modes, values.dtype, values.device)
    else:
        basis = _fourier_basis(tuple(lengths), tuple(starts), directions, modes, values.dtype, values.device)
    return _combined(values, basis)


@torch.fx.wrap
def dilated_kernels(values: Tensor, lengths: list[int], starts: list[int]) -> Tensor:
    """Returns the kernels (N, C, 2·L − 1) with values (N, C, D, taps) at evenly spaced lags."""
    directions, taps = values.shape[2], values.shape[3]
    values = at_least_float32(values)
    if torch.jit.is_scripting():
        basis = dilated_basis(lengths, starts, directions, taps, values.dtype, values.device)
    else:
        basis = _dilated_basis(tuple(lengths), tuple(starts), directions, taps, values.dtype, values.device)
    return _combined(values, basis)


def _scaled(values: Tensor, scale: Optional[Tensor]) -> Tensor:
    values = at_least_float32(values)
    return values if scale is None else values * at_least_float32(scale).unsqueeze(-1)


def _combined(values: Tensor, basis: Tensor) -> Tensor:
    """Returns Σ_p values (N, C, D, P) · basis (N, D · P, 2·L − 1), in full precision under autocast as well."""
    return product(values.flatten(2), basis)


@torch.fx.wrap
def add_taps(kernels: Tensor, values: Tensor, scale: Optional[Tensor], positions: Tensor) -> Tensor:
    """Returns kernels (N, C, 2·L − 1) plus values (N, C, D, taps) at positions (N, C, D · taps)."""
    return kernels.scatter_add(2, positions.to(kernels.device), _scaled(values, scale).flatten(2))


@torch.fx.wrap
def sparse_kernels(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """Returns the kernels (N, C, 2·length − 1) that are zero but for values (N, C, D, taps) at positions."""
    values = at_least_float32(values)
    zeros = values.new_zeros((values.shape[0], values.shape[1], 2 * length - 1))
    return add_taps(zeros, values, None, positions)


class DilatedKernels(nn.Module):
    """Kernels of evenly spaced taps whose spacing grows with the length (MRConv, section 3: dilated).

    Args:
        channels: Number of channels C.
        lengths: Length of every branch's kernel in lags, not shrinking.
        starts: Its first lag: 0 for all of them, or where the one before ends.
        directions: Number of directions D, 1 or 2.
        taps: Number of taps, ``length // taps`` lags apart. Taps beyond a kernel's end have no effect.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        channels: int,
        lengths: Sequence[int],
        starts: Sequence[int],
        directions: int,
        taps: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.lengths, self.starts = list(lengths), list(starts)
        values = torch.empty(len(lengths), channels, directions, taps, device=device, dtype=dtype)
        for own, length in zip(values, lengths):
            nn.init.normal_(own, std=min(taps, length) ** -0.5)
        self.values = nn.Parameter(values)

    def forward(self) -> Tensor:
        """Returns the kernels (N, C, 2·L − 1)."""
        return dilated_kernels(self.values, self.lengths, self.starts)


class FourierKernels(nn.Module):
    """Smooth kernels given by their lowest Fourier modes (MRConv, section 3: Fourier).

    The coefficients are real and imaginary parts as pairs of real numbers. The transform is unitary, where the paper
    divides by the length: the factor √length between the two makes the start independent of the length.

    Args:
        channels: See `DilatedKernels`, as for the arguments that are not here.
        modes: Number of lowest modes, the constant one included. A kernel has ``length // 2 + 1`` modes in all; where
            that is less, the surplus coefficients have no effect.
    """

    def __init__(
        self,
        channels: int,
        lengths: Sequence[int],
        starts: Sequence[int],
        directions: int,
        modes: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.lengths, self.starts = list(lengths), list(starts)
        self.coefficients = _fourier_coefficients(channels, lengths, directions, modes, device, dtype)

    def forward(self) -> Tensor:
        """Returns the kernels (N, C, 2·L − 1)."""
        return fourier_kernels(self.coefficients, None, self.lengths, self.starts)


def _fourier_coefficients(
    channels: int, lengths: Sequence[int], directions: int, modes: int, device: Any, dtype: Any
) -> nn.Parameter:
    # Four dimensions, as there may be in a model that is moved to channels-last order.
    coefficients = torch.empty(len(lengths), channels, directions, 2 * modes, device=device, dtype=dtype)
    for own, length in zip(coefficients, lengths):
        # The energy is that of all modes: each has two parts and a conjugate, but for the constant and, where the
        # length is even, the highest mode, which are real and alone.
        used = min(modes, length // 2 + 1)
        alone = 1 if 2 * (used - 1) < length else 2
        nn.init.normal_(own, std=(4 * (used - alone) + alone) ** -0.5)
    return nn.Parameter(coefficients)


class SparseKernels(nn.Module):
    """Kernels that are zero but at a few lags, drawn once and then fixed (MRConv, section 3: sparse).

    Every channel has lags of its own. The paper does not say whether channels share them: with lags of its own for
    each, a layer's channels together cover the whole length. Lags travel in the state dict, as ``lags`` (N, C, D,
    taps), but are no buffer: averages of weights and casts to another dtype must leave them what they are.

    Args:
        channels: See `DilatedKernels`, as for the arguments that are not here.
        taps: Number of lags that are not zero, at most the shortest length.
        seed: Seed of the lags; the global generator is left alone.
    """

    positions: Tensor
    __jit_unused_properties__ = ["lags", "_middle"]

    def __init__(
        self,
        channels: int,
        lengths: Sequence[int],
        starts: Sequence[int],
        directions: int,
        taps: int,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.lengths, self.starts = list(lengths), list(starts)
        self.directions = directions
        taps = min(taps, *lengths)
        generator = torch.Generator("cpu").manual_seed(seed)
        draws = [torch.rand(channels, directions, n, generator=generator, device="cpu") for n in lengths]
        self._place(torch.stack([draw.topk(taps).indices for draw in draws]))
        self.values = nn.Parameter(torch.empty(self.lags.shape, device=device, dtype=dtype))
        nn.init.normal_(self.values, std=taps**-0.5)
        self._follow_device()
        self.register_state_dict_post_hook(_write_lags)
        self.register_load_state_dict_pre_hook(_read_lags)

    def forward(self) -> Tensor:
        """Returns the kernels (N, C, 2·L − 1)."""
        return sparse_kernels(self.values, self.positions, self.starts[-1] + self.lengths[-1])

    @property
    def lags(self) -> Tensor:
        """The distances (N, C, D, taps) from the branch's first lag, in each direction."""
        lags = (self.positions - self._middle).abs().unflatten(2, (self.directions, -1))
        return lags - self._starts(lags.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lags":  # as libraries do that assign the entries of a state dict by name
            check_lags(self, {"lags": value}, "")
            self._place(value.detach().to(self.positions.device))
        else:
            super().__setattr__(name, value)

    def _place(self, lags: Tensor) -> None:
        """Takes lags (N, C, D, taps) for its own: as positions in the two-sided kernels, (N, C, D · taps)."""
        sign = torch.tensor([1, -1][: self.directions], device=lags.device)
        from_zero = lags.to(torch.int64) + self._starts(lags.device)
        self.positions = (self._middle + sign[:, None] * from_zero).flatten(2)

    @property
    def _middle(self) -> int:
        return self.starts[-1] + self.lengths[-1] - 1

    @torch.jit.unused
    def _starts(self, device: torch.device) -> Tensor:
        return torch.tensor(self.starts, device=device).view(-1, 1, 1, 1)

    def _follow_device(self) -> None:
        if not self.values.is_meta:
            self.positions = self.positions.to(self.values.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseKernels":
        # Every move of a module goes through here. PyTorch has no public hook for tensors that are no buffers.
        super()._apply(fn, recurse)
        self._follow_device()
        return self


def _write_lags(module: SparseKernels, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    state_dict[prefix + "lags"] = module.lags.to(torch.int32)


def _read_lags(module: SparseKernels, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Takes the lags of a state dict, after `check_lags`."""
    check_lags(module, state_dict, prefix)
    given = state_dict.pop(prefix + "lags", None)
    if given is not None and not given.is_meta:
        module._place(given.to(module.positions.device))


def check_lags(module: SparseKernels, state_dict: dict[str, Any], prefix: str) -> None:
    """Raises a RuntimeError if the lags in a state dict are not as many as the layer's, not whole, or not lags of it.

    These are in range, and different from each other.
    """
    given = state_dict.get(prefix + "lags")
    if given is None:
        if prefix + "values" in state_dict:
            raise RuntimeError(f"{prefix}lags is missing in the state dict, which has {prefix}values at these lags")
        return
    own = module.lags
    if given.is_floating_point() or given.is_complex() or given.shape != own.shape:
        raise RuntimeError(
            f"{prefix}lags must be integers {tuple(own.shape)}, the state dict has {given.dtype} {tuple(given.shape)}"
        )
    if given.is_meta:
        return
    lags = given.to(own.device, torch.int64)
    limits = torch.tensor(module.lengths, device=lags.device).view(-1, 1, 1, 1)
    if (lags < 0).any() or (lags >= limits).any() or (lags.sort(-1).values.diff(dim=-1) == 0).any():
        raise RuntimeError(
            f"{prefix}lags must be different from each other and lie in 0 … length − 1 of the branches' lengths "
            f"{module.lengths}; those in the state dict range from {lags.min()} to {lags.max()}"
        )


class FourierSparseKernels(SparseKernels):
    """The rescaled sums of a Fourier and a sparse kernel of equal length (MRConv, section 3: linear rescaling).

    Args:
        channels: See `SparseKernels`, as for the arguments that are not here.
        modes: See `FourierKernels`.
    """

    def __init__(
        self,
        channels: int,
        lengths: Sequence[int],
        starts: Sequence[int],
        directions: int,
        modes: int,
        taps: int,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(channels, lengths, starts, directions, taps, seed, device, dtype)
        self.coefficients = _fourier_coefficients(channels, lengths, directions, modes, device, dtype)
        shape = self.values.shape[:3]
        self.fourier_scale = nn.Parameter(torch.full(shape, 0.5**0.5, device=device, dtype=dtype))
        self.sparse_scale = nn.Parameter(torch.full(shape, 0.5**0.5, device=device, dtype=dtype))

    def forward(self) -> Tensor:
        """Returns the kernels (N, C, 2·L − 1)."""
        smooth = fourier_kernels(self.coefficients, self.fourier_scale, self.lengths, self.starts)
        return add_taps(smooth, self.values, self.sparse_scale, self.positions)
