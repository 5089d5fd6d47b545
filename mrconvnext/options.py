"""What the branches of a layer are like: options of the layers and, by the same names, of the models."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from .kernels import KERNELS
from .norms import NORMS


def branch_lengths(length: int, min_length: Optional[int] = None, max_branches: int = 5) -> list[int]:
    """Returns the lengths of a layer's branches: l_0, 2·l_0, 4·l_0, …, the last one ``length``.

    With the defaults these are the paper's lengths at 224 px (MRConv, appendix D.6), where the grid has no guard.

    Args:
        length: Length L of the sequence in positions.
        min_length: Length l_0 of the shortest branch, 1 … L. Default: ``min(L, max(28, L // 16))``.
        max_branches: Largest number of branches, at least 1.

    Raises:
        ValueError: If ``min_length`` is outside its range.
    """
    shortest = shortest_length(length, min_length)
    branches = min(max_branches, round(math.log2(length / shortest)) + 1)
    return [shortest * 2**i for i in range(branches - 1)] + [length]


def concatenated_lengths(length: int, min_length: Optional[int] = None, max_branches: int = 5) -> list[int]:
    """Returns the lengths of branches that follow each other: l_0, l_0, 2·l_0, 4·l_0, …, the last one what is left.

    The arguments are those of `branch_lengths`.
    """
    shortest = shortest_length(length, min_length)
    branches = min(max_branches, int(math.log2(length / shortest)) + 1)
    before = [shortest * 2 ** max(0, i - 1) for i in range(branches - 1)]
    return [*before, length - sum(before)]


def shortest_length(length: int, min_length: Optional[int]) -> int:
    """Returns the length of the shortest of branches for a sequence of ``length`` positions; see `branch_lengths`."""
    if min_length is None:
        return min(length, max(28, length // 16))
    if not isinstance(min_length, int) or not 1 <= min_length <= length:
        raise ValueError(f"min_length must be an integer from 1 to the sequence's length {length}, got {min_length!r}")
    return min_length


@dataclasses.dataclass(frozen=True)
class BranchOptions:
    """What a layer's branches are like.

    Args:
        kernel: Parameterization of the kernels, one of `kernels.KERNELS`.
        branch_norm: How branches are normalised, one of `norms.NORMS`. Default: "kernel", and "none" for "sgconv" and
            "multires", which have a single one.
        sync_norm: Whether "parseval" takes its statistics over all processes. For "batch", convert with
            ``nn.SyncBatchNorm.convert_sync_batchnorm``.
        bidirectional: Whether branches reach to positions ahead as well, with a kernel for each direction.
        min_length: Length of the shortest branch in positions; see `branch_lengths`.
        max_branches: Largest number of branches.
        modes: Fourier modes a kernel. The paper does not state it.
        taps: Dilated or sparse taps a kernel, of which the paper does not state how many; parameters of a piece of
            "sgconv", taps of a filter of "multires". Default: 16, 64 and 2.
        concat_decay: If given, branches follow each other, each this many times weaker than the one before, instead of
            all beginning at lag 0. So the paper's Path-X has it.
        kernel_args: Further arguments of "sgconv" and "multires"; see `SGConvKernel` and `MultiresKernel`.
        alpha_init: Start of ``alpha``. Default: 1 / number of branches. The paper does not state it.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option is outside its range.
    """

    kernel: str = "fourier_sparse"
    branch_norm: Optional[str] = None
    sync_norm: bool = False
    bidirectional: bool = True
    min_length: Optional[int] = None
    max_branches: int = 5
    modes: int = 16
    taps: Optional[int] = None
    concat_decay: Optional[float] = None
    kernel_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alpha_init: Optional[float] = None

    def __post_init__(self) -> None:
        for name in ("max_branches", "modes", "taps"):
            if name != "taps" or self.taps is not None:
                check_positive(name, getattr(self, name))
        for name in ("sync_norm", "bidirectional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.alpha_init is not None and not _is_finite(self.alpha_init):
            raise ValueError(f"alpha_init must be a finite number or None, got {self.alpha_init!r}")
        if not isinstance(self.kernel, str) or self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.norm not in NORMS:
            raise ValueError(f"branch_norm must be one of {', '.join(NORMS)}, got {self.branch_norm!r}")
        if self.sync_norm and self.norm != "parseval":
            raise ValueError(
                f'sync_norm is for branch_norm="parseval", got {self.norm!r}: '
                "use nn.SyncBatchNorm.convert_sync_batchnorm for BatchNorm"
            )
        if not isinstance(self.kernel_args, Mapping):
            raise ValueError(f"kernel_args must be names with their values, got {self.kernel_args!r}")
        self._check_concatenation()

    def _check_concatenation(self) -> None:
        if KERNELS[self.kernel].is_single:
            for name in ("min_length", "concat_decay"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for kernels of several branches, got it for kernel={self.kernel!r}")
        elif self.concat_decay is not None and not (_is_finite(self.concat_decay) and self.concat_decay >= 1):
            raise ValueError(f"concat_decay must be a finite number of at least 1, or None, got {self.concat_decay!r}")

    @property
    def norm(self) -> str:
        """How branches are normalised: as asked for, or as the kernels have it."""
        return KERNELS[self.kernel].norm if self.branch_norm is None else self.branch_norm

    @property
    def digest(self) -> int:
        """A number for the options that neither names nor shapes of the parameters show, as given; 0 without any."""
        if self.concat_decay is None and not self.kernel_args:
            return 0
        given = {"concat_decay": self.concat_decay, **self.kernel_args}
        words = sorted(f"{name}={float(value) if _is_finite(value) else value}" for name, value in given.items())
        return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=4).digest(), "little")

    def lengths(self, length: int) -> list[int]:
        """Returns the lengths of the branches' kernels on a sequence of ``length`` positions, not shrinking."""
        if KERNELS[self.kernel].is_single:
            return [length]
        if self.concat_decay is None:
            return branch_lengths(length, self.min_length, self.max_branches)
        return concatenated_lengths(length, self.min_length, self.max_branches)

    def starts(self, lengths: list[int]) -> list[int]:
        """Returns the first lags of branches with these lengths."""
        if self.concat_decay is None:
            return [0] * len(lengths)
        return [0, *itertools.accumulate(lengths[:-1])]


def branch_options(**options: Any) -> BranchOptions:
    """Returns the options of a layer's branches.

    Raises:
        TypeError: If one is unknown.
        ValueError: If one is outside its range.
    """
    allowed = [field.name for field in dataclasses.fields(BranchOptions)]
    for name in options:
        if name not in allowed:
            raise TypeError(f"{name!r} is not an argument of the layer; options of its branches: {', '.join(allowed)}")
    return BranchOptions(**options)


def sides_of(grid: Union[int, Sequence[int]]) -> tuple[int, int]:
    """Returns the height and width of a grid that is given by both, or by one number.

    Raises:
        ValueError: If it is neither.
    """
    sides = (grid, grid) if isinstance(grid, int) else grid
    if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2:
        raise ValueError(f"grid must be an integer or (height, width), got {grid!r}")
    for side in sides:
        check_positive("grid", side)
    return sides[0], sides[1]


def check_positive(name: str, value: Any) -> None:
    """Raises a ValueError if an argument is not a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
