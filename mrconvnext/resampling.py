"""Kernels that follow the image to another grid, so that they span the same share of it.

A kernel says what a pixel makes of another one by their lag, hence by their distance (dr, dc): its map of distances
(2·H − 1, 2·W − 1). On a grid (H', W') what stood at (dr, dc) belongs at (ρ·dr, ρ'·dc), ρ = H' / H and ρ' = W' / W.
Where this lies between pixels it is shared among the nearest, two in rows and two in columns, as linear interpolation
of the image would have it; shares add up to 1. So a kernel makes of a smooth image what it made of it at the other
size, whatever its parameterization; where ρ is whole, of the pixels of the smaller grid exactly that.

On its own grid two distances have one lag, (dr, dc) and (dr + 1, dc − stride). On another one they part, by ρ − 1 rows.
So a kernel that was moved has W' − 1 guard columns, with which all distances have lags of their own.
"""

import functools
import logging
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .constants import constant, shape_of
from .grid import add_local_taps
from .options import BranchOptions, sides_of
from .precision import product

# Positions of a grid, at most.
LARGEST = 2**22

_logger = logging.getLogger(__name__)


def shares(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns what each distance on a side of ``old`` pixels gives those of ``new``, (2·new − 1, 2·old − 1)."""
    before = torch.arange(-(old - 1), old, device=device, dtype=torch.float64)
    after = torch.arange(-(new - 1), new, device=device, dtype=torch.float64)
    nearest = (1 - (after[:, None] - new / old * before).abs()).clamp(min=0)
    return (nearest / nearest.sum(0)).to(dtype)


def behind(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns 1 at the distances of a pixel that comes later in reading order, or is the same, (2·H − 1, 2·W − 1)."""
    rows = torch.arange(-(height - 1), height, device=device)[:, None]
    columns = torch.arange(-(width - 1), width, device=device)
    return ((rows > 0) | (rows == 0) & (columns >= 0)).to(dtype)


_shares = constant(shares)
_behind = constant(behind)


def to_distances(kernel: Tensor, grid: tuple[int, int], guard: int) -> Tensor:
    """Returns what a two-sided kernel (…, 2·M − 1) holds at each distance of two pixels, (…, 2·H − 1, 2·W − 1)."""
    height, width = grid
    stride = width + guard
    missing = (height - 1) * stride + width - 1 - shape_of(kernel)[-1] // 2
    return F.pad(kernel, (missing, missing)).unfold(dimension=-1, size=2 * width - 1, step=stride)


def from_distances(maps: Tensor, guard: int) -> Tensor:
    """Returns the two-sided kernel (…, 2·H·(W + guard) − 1) with these weights at its distances.

    Where two distances have one lag, which is where ``guard`` is less than W − 1, it has the weight of fewer columns.
    """
    height, width = maps.shape[-2] // 2 + 1, maps.shape[-1] // 2 + 1
    stride = width + guard
    if torch.jit.is_scripting():
        own = own_lags(height, width, guard, maps.dtype, maps.device)
    else:
        own = _own_lags(height, width, guard, maps.dtype, maps.device)
    rows = F.pad(maps * own, (guard + 1, guard, 1, 1))  # (…, 2·H + 1, 2·stride): columns −stride … stride − 1
    lags = rows[..., :-1, stride:] + rows[..., 1:, :stride]  # (…, 2·H, stride): from lag −H·stride
    return lags.flatten(-2)[..., 1:]


def own_lags(height: int, width: int, guard: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns 1 at the distances whose weights their lags have, else 0, (2·H − 1, 2·W − 1)."""
    rows = torch.arange(-(height - 1), height, device=device)[:, None]
    columns = torch.arange(-(width - 1), width, device=device)
    before = (width + guard) // 2
    near = (columns >= -before) & (columns < width + guard - before)
    # The other distance of such a lag lies beyond the last row.
    alone = (rows == height - 1) & (columns > 0) | (rows == 1 - height) & (columns < 0)
    return (near | alone).to(dtype)


_own_lags = constant(own_lags)


@torch.fx.wrap
def resample_kernel(
    kernel: Tensor, old: tuple[int, int, int], new: tuple[int, int, int], bidirectional: bool
) -> Tensor:
    """Returns a two-sided kernel (…, 2·M − 1), made for a grid, for another one: (…, 2·H'·(W' + guard') − 1).

    Args:
        kernel: The kernel, or kernels.
        old: Height, width and guard of the grid that it was made for.
        new: Those of the other grid.
        bidirectional: Whether it may reach ahead; of others no weight goes to a pixel ahead.
    """
    maps = to_distances(kernel, (old[0], old[1]), old[2]).flatten(0, -3)  # (K, 2·H − 1, 2·W − 1)
    dtype, device = kernel.dtype, kernel.device
    if torch.jit.is_scripting():
        over_rows, over_columns = shares(old[0], new[0], dtype, device), shares(old[1], new[1], dtype, device)
        places = behind(new[0], new[1], dtype, device)
    else:
        over_rows, over_columns = _shares(old[0], new[0], dtype, device), _shares(old[1], new[1], dtype, device)
        places = _behind(new[0], new[1], dtype, device)
    if not bidirectional:
        kept = over_rows.t() @ places @ over_columns  # of each weight the share that has a place
        maps = maps / torch.where(kept > 0, kept, torch.ones_like(kept))
    over_rows, over_columns = over_rows.expand(len(maps), -1, -1), over_columns.t().expand(len(maps), -1, -1)
    maps = product(product(over_rows, maps), over_columns)
    if not bidirectional:
        maps = maps * places
    return from_distances(maps, new[2]).view(shape_of(kernel)[:-1] + [-1])


def resample_deployed(
    kernel: Tensor,
    local_taps: Optional[Tensor],
    dilation: int,
    old: tuple[int, int, int],
    new: tuple[int, int, int],
    bidirectional: bool,
) -> Tensor:
    """Returns a deployed layer's kernel (C, 2·M − 1) for another grid; see `resample_kernel`.

    Args:
        kernel: The kernel.
        local_taps: Local taps (C, 1, k, k) that are in it, if there are any: they keep their distances.
        dilation: Distance of the taps in pixels.
        old: See `resample_kernel`, as for the arguments below.
        new: The other grid.
        bidirectional: Whether the branches reach ahead.

    Raises:
        RuntimeError: If they do and should not.
    """
    branches = kernel if local_taps is None else add_local_taps(kernel, -local_taps, dilation, old[1] + old[2])
    reach = kernel.shape[-1] // 2
    if not (bidirectional or kernel.is_meta) and (branches[:, :reach].abs() > 1e-4 * kernel.abs().max()).any():
        raise RuntimeError("the kernel reaches ahead, which that of a layer with bidirectional=False does not")
    moved = resample_kernel(branches, old, new, bidirectional)
    return moved if local_taps is None else add_local_taps(moved, local_taps, dilation, new[1] + new[2])


@functools.cache
def say_that_moves_add_up() -> None:
    _logger.warning(
        "a deployed kernel that was moved to another grid before is moved again, which loses unless by whole factors: "
        "better move the training form, or the deployed one as it was first"
    )


def grid_for(grid: Union[int, tuple[int, int]], guard: int) -> tuple[int, int]:
    """Returns height and width of a grid, each at least ``guard + 1``, of at most `LARGEST` positions.

    Raises:
        ValueError: If it is smaller, larger, or not a grid.
    """
    height, width = sides_of(grid)
    if height * width > LARGEST:
        raise ValueError(
            f"grid must have at most {LARGEST} positions, those of a map of 2048×2048 (images of 8192×8192 pixels at a "
            f"stride of 4): the spectra of longer kernels would not fit into memory; got {(height, width)}"
        )
    if min(height, width) < guard + 1:
        raise ValueError(f"grid must be at least {guard + 1} on each side to hold the taps, got {(height, width)}")
    return height, width


class OnGrid:
    """A layer's reference grid, and the grid that its branches' kernels are parameterized for."""

    __constants__ = ("is_resampled",)  # of TorchScript

    if TYPE_CHECKING:  # of the layer
        local_reach: int
        bidirectional: bool
        options: BranchOptions
        build_branches: Any
        build_deployed: Any
        bias: Any
        local_taps: Any
        dilation: int
        kernel: Any
        alpha: Any
        train: Any
        training: bool

    def set_grid(self, grid: Union[int, tuple[int, int]]) -> None:
        """Moves the kernels to another reference grid, where they span the same share of the image, in place.

        Local taps stay as they are. In training form no parameter changes: kernels stay parameterized for the grid that
        they were made for. A deployed kernel is replaced: moved once it is what the branches would merge to, but moved
        again it is interpolated again, and not what it was unless by whole factors. Move the training form, or the
        original, where there is one.

        Args:
            grid: Height and width of the reference grid.

        Raises:
            ValueError: If the grid is too small for the local taps, or these are not known.
            RuntimeError: If a deployed kernel reaches ahead, and the layer is not bidirectional.
        """
        sides = grid_for(grid, self.local_reach)
        if self.kernel is None:
            self._take_grid(sides)
        elif sides != self.reference_grid:
            self._move_deployed(sides)

    def _move_deployed(self, grid: tuple[int, int]) -> None:
        if self.is_resampled:
            say_that_moves_add_up()
        old, new = (*self.reference_grid, self.guard), (*grid, self._guard_on(grid))
        of_taps = (self.local_taps, self.dilation)
        kernel = resample_deployed(self.kernel.detach(), *of_taps, old, new, self.bidirectional)
        self.kernel = nn.Parameter(kernel, self.kernel.requires_grad)
        self._take_grid(grid)

    def make_for(self, grid: tuple[int, int]) -> None:
        """Gives the layer new kernels that are parameterized for a grid, in place; the reference grid stays.

        Those of the training form are as they start; a deployed layer's is zero.
        """
        self.made_for, self.branch_lengths = grid, self._lengths_for(grid)
        self._take_grid(self.reference_grid)
        if self.kernel is not None:
            lags = 2 * self.reference_grid[0] * self.row_stride - 1
            self.build_deployed(self.kernel.new_zeros((len(self.kernel), lags)), self.bias.detach(), self.local_taps)
            return
        requires_grad = self.alpha.requires_grad
        self.build_branches(self.alpha.device, self.alpha.dtype)
        self.train(self.training).requires_grad_(requires_grad)

    def _lengths_for(self, grid: tuple[int, int]) -> list[int]:
        return self.options.lengths(grid[0] * (grid[1] + self.local_reach))

    def _guard_on(self, grid: tuple[int, int]) -> int:
        return self.local_reach if grid == self.made_for else max(self.local_reach, grid[1] - 1)

    def _take_grid(self, grid: tuple[int, int]) -> None:
        self.reference_grid = grid
        self.is_resampled = grid != self.made_for
        self.guard = self._guard_on(grid)
        self.row_stride = grid[1] + self.guard

    def _on_grid(self, kernels: Tensor) -> Tensor:
        """Returns kernels (…, 2·M − 1) as parameterized for the reference grid."""
        moved = kernels
        if self.is_resampled:  # and not at once returned otherwise, or TorchScript would read on
            old = (self.made_for[0], self.made_for[1], self.local_reach)
            new = (self.reference_grid[0], self.reference_grid[1], self.guard)
            moved = resample_kernel(kernels, old, new, self.bidirectional)
        return moved
