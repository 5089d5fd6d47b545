"""What the branches of a layer are like: options of the layers and, by the same names, of the models."""

import dataclasses
import math
from collections.abc import Sequence
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
    if min_length is None:
        min_length = min(length, max(28, length // 16))
    if not isinstance(min_length, int) or not 1 <= min_length <= length:
        raise ValueError(f"min_length must be an integer from 1 to the sequence's length {length}, got {min_length!r}")
    branches = min(max_branches, round(math.log2(length / min_length)) + 1)
    return [min_length * 2**i for i in range(branches - 1)] + [length]


@dataclasses.dataclass(frozen=True)
class BranchOptions:
    """What a layer's branches are like.

    Args:
        kernel: Parameterization of the kernels, one of `kernels.KERNELS`.
        branch_norm: How branches are normalised, one of `norms.NORMS`.
        sync_norm: Whether "parseval" takes its statistics over all processes. For "batch", convert with
            ``nn.SyncBatchNorm.convert_sync_batchnorm``.
        bidirectional: Whether branches reach to positions ahead as well, with a kernel for each direction.
        min_length: Length of the shortest branch in positions; see `branch_lengths`.
        max_branches: Largest number of branches.
        modes: Fourier modes a kernel. The paper does not state it.
        taps: Dilated or sparse taps a kernel. The paper does not state it.
        alpha_init: Start of ``alpha``. Default: 1 / number of branches. The paper does not state it.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option is outside its range.
    """

    kernel: str = "fourier_sparse"
    branch_norm: str = "kernel"
    sync_norm: bool = False
    bidirectional: bool = True
    min_length: Optional[int] = None
    max_branches: int = 5
    modes: int = 16
    taps: int = 16
    alpha_init: Optional[float] = None

    def __post_init__(self) -> None:
        for name in ("max_branches", "modes", "taps"):
            check_positive(name, getattr(self, name))
        for name in ("sync_norm", "bidirectional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.alpha_init is not None and not _is_finite(self.alpha_init):
            raise ValueError(f"alpha_init must be a finite number or None, got {self.alpha_init!r}")
        for name, allowed in (("kernel", KERNELS), ("branch_norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.sync_norm and self.branch_norm != "parseval":
            raise ValueError(
                f'sync_norm is for branch_norm="parseval", got {self.branch_norm!r}: '
                "use nn.SyncBatchNorm.convert_sync_batchnorm for BatchNorm"
            )


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
