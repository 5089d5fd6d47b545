"""SGConv's kernel: pieces with as many parameters each, the further from lag 0 the longer and the weaker.

Source: SGConv (Li et al. 2022, arXiv 2210.09298), section 3, and its published code.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import at_least_float32

SGCONV_ARGS = ("merge", "interpolation", "start", "decay", "decay_min", "decay_max", "init_scale")

_ALLOWED = {
    "merge": ("cat", "sum"),
    "interpolation": ("linear", "nearest"),
    "start": ("randn", "cos"),
    "decay": ("scales", "learnable", "fixed"),
}


def sgconv_pieces(values: Tensor, lengths: list[int], concatenated: bool, interpolation: str) -> Tensor:
    """Returns values (S, C, D, d) interpolated to pieces of these lengths, side by side: (S, C, D, T).

    Concatenated, each begins where the one before ends, else all begin at 0; elsewhere they are zero.
    """
    total = sum(lengths) if concatenated else lengths[-1]
    pieces: list[Tensor] = []
    start = 0
    for own, length in zip(values.unbind(0), lengths):
        if interpolation == "linear":
            piece = F.interpolate(own, size=[length], mode="linear", align_corners=False)  # (C, D, length)
        else:
            piece = F.interpolate(own, size=[length], mode="nearest")
        pieces.append(F.pad(piece, (start, total - start - length)))
        if concatenated:
            start += length
    return torch.stack(pieces)


@torch.fx.wrap
def sgconv_kernel(
    values: Tensor,
    exponent: Optional[Tensor],
    lengths: list[int],
    concatenated: bool,
    interpolation: str,
    decay_min: float,
    decay_max: float,
) -> Tensor:
    """Returns the kernel (C, D, T) of values (S, C, D, d), before its norm is taken off.

    Args:
        values: The pieces' parameters.
        exponent: Exponent (C) of the decay by the lag; None for a decay by the scale.
        lengths: The pieces' lengths.
        concatenated: Whether they follow each other.
        interpolation: How they are stretched.
        decay_min: How much weaker each scale is than the one before, in the first channel.
        decay_max: The same in the last one.
    """
    values = at_least_float32(values)
    pieces = sgconv_pieces(values, lengths, concatenated, interpolation)
    scales, channels = values.shape[0], values.shape[1]
    if exponent is None:
        base = torch.linspace(start=decay_min, end=decay_max, steps=channels, dtype=values.dtype, device=values.device)
        power = torch.arange(scales, device=values.device).flip(0)
        pieces = pieces * (base ** power.unsqueeze(1)).view(scales, channels, 1, 1)
    kernel = pieces.sum(0)
    if exponent is not None:
        lag = torch.arange(1, kernel.shape[-1] + 1, dtype=values.dtype, device=values.device)
        kernel = kernel * (-at_least_float32(exponent).view(-1, 1, 1) * lag.log()).exp()
    return kernel


@torch.fx.wrap
def sgconv_two_sided(kernel: Tensor, norm: Tensor, skip: Tensor, length: int) -> Tensor:
    """Returns a kernel (C, D, T) over its norm (C, D, 1), as ``length`` lags each way, with the skip term (C).

    That is (1, C, 2·length − 1). The first direction begins at lag 0, the other one at lag −1.
    """
    kernel = F.pad(kernel / at_least_float32(norm), (0, length - kernel.shape[-1]))  # which cuts if that is below 0
    ahead = kernel[:, 0]
    ahead = torch.cat([(ahead[:, 0] + at_least_float32(skip)).unsqueeze(1), ahead[:, 1:]], 1)
    behind = torch.zeros_like(kernel[:, 0, 1:])
    if kernel.shape[1] == 2:
        behind = kernel[:, 1, : length - 1].flip(-1)
    return torch.cat([behind, ahead], 1).unsqueeze(0)


class SGConvKernel(nn.Module):
    """SGConv's kernel for each channel, with its skip term at lag 0.

    S pieces of ``taps`` parameters are interpolated to the lengths d, d, 2·d, 4·d, …; together they are cut to the
    kernel's length. It is divided by the L2 norm that all of it has at the start, a constant. With these defaults it is
    the published mode "cat_randn".

    Args:
        channels: Number of channels C.
        length: Length L of the kernel in lags.
        directions: Number of directions D, 1 or 2. The second one's kernel begins at lag −1.
        taps: Parameters d of a piece.
        merge: "cat": pieces follow each other. "sum": of lengths d, 2·d, 4·d, …, all from lag 0, added.
        interpolation: "linear" or "nearest".
        start: "randn": normally distributed. "cos": of d points of cosines, the faster the later the channel, which
            are shuffled then.
        decay: "scales": piece i is multiplied by μ^(S − 1 − i). "learnable": the kernel is multiplied by
            (lag + 1)^(−δ), δ one for each channel, drawn at the start and learned. "fixed": the same, not learned.
        decay_min: Smallest μ, that of the first channel, or δ.
        decay_max: Largest μ, that of the last channel, or δ.
        init_scale: How often all pieces are doubled in length; there are as many fewer.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    concatenated: torch.jit.Final[bool]
    initial_norm: Tensor

    def __init__(
        self,
        channels: int,
        length: int,
        directions: int,
        taps: int = 64,
        merge: str = "cat",
        interpolation: str = "linear",
        start: str = "randn",
        decay: str = "scales",
        decay_min: float = 2.0,
        decay_max: float = 2.0,
        init_scale: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check({"merge": merge, "interpolation": interpolation, "start": start, "decay": decay})
        _check_numbers(decay_min, decay_max, init_scale, most=max(1, math.ceil(math.log2(max(1.0, length / taps)))))
        dd = {"device": device, "dtype": dtype}
        scales = max(1, 1 + math.ceil(math.log2(length / taps)) - init_scale)
        self.length, self.concatenated, self.interpolation = length, merge == "cat", interpolation
        self.decay_min, self.decay_max = float(decay_min), float(decay_max)
        doublings = [max(0, i - 1) if merge == "cat" else i for i in range(scales)]
        self.lengths = [taps * 2 ** (n + init_scale) for n in doublings]
        self.values = nn.Parameter(torch.empty(scales, channels, directions, taps, **dd))
        if start == "randn":
            nn.init.normal_(self.values)
        else:
            _init_cosines(self.values)
        self.skip = nn.Parameter(torch.empty(channels, **dd))
        nn.init.normal_(self.skip)
        self.register_parameter("exponent", None)
        if decay != "scales":
            self.exponent = nn.Parameter(torch.empty(channels, **dd), requires_grad=decay == "learnable")
            nn.init.uniform_(self.exponent, a=self.decay_min, b=self.decay_max)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self._kernel(), dim=-1, keepdim=True)
        self.register_buffer("initial_norm", norm.to(self.values.dtype))  # (C, D, 1)

    def forward(self) -> Tensor:
        """Returns the kernel (1, C, 2·L − 1)."""
        return sgconv_two_sided(self._kernel(), self.initial_norm, self.skip, self.length)

    def _kernel(self) -> Tensor:
        return sgconv_kernel(
            self.values,
            self.exponent,
            self.lengths,
            self.concatenated,
            self.interpolation,
            self.decay_min,
            self.decay_max,
        )


def _check(given: dict[str, str]) -> None:
    for name, value in given.items():
        if value not in _ALLOWED[name]:
            raise ValueError(f"kernel_args: {name} must be one of {', '.join(_ALLOWED[name])}, got {value!r}")


def _check_numbers(decay_min: float, decay_max: float, init_scale: int, most: int) -> None:
    for value in (decay_min, decay_max):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"kernel_args: decay_min and decay_max must be numbers above 0, got {value!r}")
    if decay_min > decay_max:
        raise ValueError(f"kernel_args: decay_min must not be above decay_max, got {decay_min!r} and {decay_max!r}")
    if not isinstance(init_scale, int) or isinstance(init_scale, bool) or not 0 <= init_scale <= most:
        raise ValueError(
            f"kernel_args: init_scale must be an integer from 0 to {most}, from where on one piece is as long as the "
            f"kernel, got {init_scale!r}"
        )


@torch.no_grad()
def _init_cosines(values: Tensor) -> None:
    """Fills values (S, C, D, d) with cosines of 0, 1, 2, … turns over the d points, a number of turns a channel."""
    scales, channels, _, taps = values.shape
    turns = torch.linspace(start=0, end=1, steps=taps)
    for own in values:
        order = torch.randperm(channels).unsqueeze(1)
        own.copy_((2 * math.pi * order * turns).cos().unsqueeze(1))
