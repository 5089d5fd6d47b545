"""How kernels are parameterized: MRConv's branches, and the single kernels of the methods that it builds on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from torch import nn

from .branches import DilatedKernels, FourierKernels, FourierSparseKernels, SparseKernels, check_lags
from .multires import MULTIRES_ARGS, MultiresKernel
from .sgconv import SGCONV_ARGS, SGConvKernel

__all__ = [
    "KERNELS",
    "DilatedKernels",
    "FourierKernels",
    "FourierSparseKernels",
    "Kind",
    "MultiresKernel",
    "SGConvKernel",
    "SparseKernels",
    "check_lags",
    "create_kernels",
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A parameterization of kernels.

    Attributes:
        module: Its module.
        options: What it takes of modes, taps and seed.
        kernel_args: Further arguments that it takes.
        taps: Number of taps, where nothing else is asked for.
        norm: How kernels are normalised, where nothing else is asked for; see `norms.NORMS`.
        is_single: Whether there is one kernel, as long as the sequence, in the place of branches.
    """

    module: Any
    options: tuple[str, ...]
    kernel_args: tuple[str, ...] = ()
    taps: int = 16
    norm: str = "kernel"
    is_single: bool = False


KERNELS = {
    "fourier_sparse": Kind(FourierSparseKernels, ("modes", "taps", "seed")),
    "fourier": Kind(FourierKernels, ("modes",)),
    "dilated": Kind(DilatedKernels, ("taps",)),
    "sparse": Kind(SparseKernels, ("taps", "seed")),
    "sgconv": Kind(SGConvKernel, ("taps",), SGCONV_ARGS, taps=64, norm="none", is_single=True),
    "multires": Kind(MultiresKernel, ("taps",), MULTIRES_ARGS, taps=2, norm="none", is_single=True),
}


def create_kernels(
    kind: str,
    channels: int,
    lengths: Sequence[int],
    directions: int,
    starts: Optional[Sequence[int]] = None,
    modes: int = 16,
    taps: Optional[int] = None,
    seed: int = 0,
    kernel_args: Optional[Mapping[str, Any]] = None,
    device: Any = None,
    dtype: Any = None,
) -> nn.Module:
    """Returns a module whose call gives the kernels (N, C, 2·L − 1) of all branches.

    Args:
        kind: One of `KERNELS`.
        channels: Number of channels C.
        lengths: Length of every branch's kernel in lags, not shrinking.
        directions: Number of directions D, 1 or 2.
        starts: First lag of every branch's kernel. Default: 0 for all.
        modes: Number of Fourier modes, at least 1.
        taps: Number of dilated or sparse taps, of taps of a piece (sgconv) or of a filter (multires). Default: that of
            the kind.
        seed: Seed of the sparse lags.
        kernel_args: Further arguments of the kind's module.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        TypeError: If the kind has no such further argument.
        ValueError: If ``kind`` is unknown, or an argument outside its range.
    """
    if kind not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kind!r}")
    own = KERNELS[kind]
    given = {"modes": modes, "taps": own.taps if taps is None else taps, "seed": seed}
    further = dict(kernel_args or {})
    for name in further:
        if name not in own.kernel_args:
            allowed = ", ".join(own.kernel_args) or "none"
            raise TypeError(f"kernel_args: {name!r} is not an argument of kernel={kind!r}, which has {allowed}")
    given = {name: given[name] for name in own.options} | further | {"device": device, "dtype": dtype}
    if own.is_single:
        return own.module(channels, lengths[-1], directions, **given)
    return own.module(channels, lengths, [0] * len(lengths) if starts is None else starts, directions, **given)
