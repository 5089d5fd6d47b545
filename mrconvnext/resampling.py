"""Kernels that follow the image to another grid, so that they span the same share of it.

A two-sided kernel says what a pixel makes of another one by their lag, hence by their distance (dr, dc): its map of
distances (2·H − 1, 2·W − 1). On a grid (H', W') a weight at (dr, dc) belongs at (ρ·dr, ρ'·dc), ρ = H' / H and
ρ' = W' / W, which lies between pixels, and stands for ρ·ρ' as many of them. So each weight is spread over the distances
around, by a triangle in rows and one in columns as wide as the pixels are apart, ρ or 1 whichever is more: linear
interpolation where the grid grows, and shares of the nearest where it shrinks. Shares add up to 1: a kernel keeps its
sum, the gain of what is smooth.
"""

from typing import TYPE_CHECKING, Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .constants import constant, shape_of
from .options import BranchOptions, branch_lengths, sides_of
from .precision import product


def shares(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns what each distance on a side of ``old`` pixels gives those of ``new``, (2·new − 1, 2·old − 1)."""
    scale = new / old
    before = torch.arange(-(old - 1), old, device=device, dtype=torch.float64)
    after = torch.arange(-(new - 1), new, device=device, dtype=torch.float64)
    triangles = (1 - (after[:, None] - scale * before).abs() / max(1.0, scale)).clamp(min=0)
    return (triangles / triangles.sum(0)).to(dtype)


def pair_shares(height: int, width: int, guard: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns of the pairs of pixels at the lag of each distance the share at this distance, (2·H − 1, 2·W − 1).

    A lag is that of two distances at most, (dr, dc) and (dr + 1, dc − stride), whose shares add up to 1.
    """
    rows = torch.arange(-(height - 1), height, device=device, dtype=torch.float64)[:, None]
    columns = torch.arange(-(width - 1), width, device=device, dtype=torch.float64)

    def pairs(rows: Tensor, columns: Tensor) -> Tensor:
        return (height - rows.abs()).clamp(min=0) * (width - columns.abs()).clamp(min=0)

    stride = width + guard
    here = pairs(rows, columns)
    other = torch.where(columns > 0, pairs(rows + 1, columns - stride), pairs(rows - 1, columns + stride))
    return (here / (here + other)).to(dtype)


def behind(height: int, width: int, guard: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns 1 at the distances of a lag from 0 on, else 0, (2·H − 1, 2·W − 1)."""
    rows = torch.arange(-(height - 1), height, device=device)[:, None]
    columns = torch.arange(-(width - 1), width, device=device)
    return (rows * (width + guard) + columns >= 0).to(dtype)


_shares = constant(shares)
_behind = constant(behind)
_pair_shares = constant(pair_shares)


def to_distances(kernel: Tensor, grid: tuple[int, int], guard: int) -> Tensor:
    """Returns what a two-sided kernel (…, 2·M − 1) holds at each distance of two pixels, (…, 2·H − 1, 2·W − 1)."""
    height, width = grid
    stride = width + guard
    missing = (height - 1) * stride + width - 1 - shape_of(kernel)[-1] // 2
    return F.pad(kernel, (missing, missing)).unfold(-1, 2 * width - 1, stride)


def from_distances(maps: Tensor, guard: int) -> Tensor:
    """Returns the two-sided kernel (…, 2·H·(W + guard) − 1) with the sum of what stands at a lag's distances."""
    width = maps.shape[-1] // 2 + 1
    stride = width + guard
    rows = F.pad(maps, (guard + 1, guard, 1, 1))  # (…, 2·H + 1, 2·stride): columns −stride … stride − 1
    lags = rows[..., :-1, stride:] + rows[..., 1:, :stride]  # (…, 2·H, stride): from lag −H·stride
    return lags.flatten(-2)[..., 1:]


def resample_kernel(
    kernel: Tensor, old: tuple[int, int], new: tuple[int, int], guard: int, bidirectional: bool
) -> Tensor:
    """Returns a two-sided kernel (…, 2·M − 1), made for a grid (H, W), for another one: (…, 2·H'·(W' + guard) − 1).

    Args:
        kernel: The kernel, or kernels.
        old: Height and width of the grid that it was made for.
        new: Those of the other grid.
        guard: Columns of zeros between rows, on both.
        bidirectional: Whether it may reach ahead; of others no weight goes to a lag below zero.
    """
    dd = (kernel.dtype, kernel.device)
    maps = to_distances(kernel, old, guard).flatten(0, -3)  # (K, 2·H − 1, 2·W − 1)
    over_rows, over_columns = _shares(old[0], new[0], *dd), _shares(old[1], new[1], *dd)
    places = _pair_shares(*new, guard, *dd)
    if not bidirectional:
        behind = _behind(*new, guard, *dd)
        kept = over_rows.t() @ behind @ over_columns  # of each weight the share that has a place
        maps, places = maps / kept.clamp(min=torch.finfo(kernel.dtype).tiny), places * behind
    count = len(maps)
    maps = product(product(over_rows.expand(count, -1, -1), maps), over_columns.t().expand(count, -1, -1))
    return from_distances(maps * places, guard).unflatten(0, kernel.shape[:-1])


def resample_deployed(
    kernel: Tensor, old: tuple[int, int], new: tuple[int, int], guard: int, bidirectional: bool
) -> Tensor:
    """Returns a deployed layer's kernel (C, 2·M − 1), local taps in it, for another grid; see `resample_kernel`.

    The taps keep their distances. What the branches add to them is not known any more, and taken to be what the kernel
    is around them, the mean of each direction.
    """
    if guard == 0:
        return resample_kernel(kernel, old, new, guard, bidirectional)
    at, around = _positions(guard, old, guard, kernel.device), _positions(guard + 1, old, guard, kernel.device)
    reach = kernel.shape[-1] // 2
    ring = around[(around.abs() <= reach) & ~torch.isin(around, at)]
    before, after = (kernel[:, reach + own].sum(1) / max(1, len(own)) for own in (ring[ring < 0], ring[ring > 0]))
    global_part = kernel.clone()
    for own, value in ((at[at < 0], before), (at[at > 0], after), (at[at == 0], before + after)):
        global_part[:, reach + own] = value[:, None]
    taps = (kernel - global_part)[:, reach + at]
    resampled = resample_kernel(global_part, old, new, guard, bidirectional)
    places = _positions(guard, new, guard, kernel.device)
    return resampled.index_add(1, resampled.shape[-1] // 2 + places, taps)


def _positions(reach: int, grid: tuple[int, int], guard: int, device: torch.device) -> Tensor:
    """Returns the lags of all distances of at most ``reach`` rows and columns."""
    side = torch.arange(-reach, reach + 1, device=device)
    return (side[:, None] * (grid[1] + guard) + side).flatten()


def grid_for(grid: Union[int, tuple[int, int]], guard: int) -> tuple[int, int]:
    """Returns height and width of a grid, each at least ``guard + 1``.

    Raises:
        ValueError: If it is less, or not a grid.
    """
    height, width = sides_of(grid)
    if min(height, width) < guard + 1:
        raise ValueError(f"grid must be at least {guard + 1} on each side to hold the taps, got {(height, width)}")
    return height, width


class OnGrid:
    """A layer's reference grid, and the grid that its branches' kernels are parameterized for."""

    if TYPE_CHECKING:  # of the layer
        guard: int
        options: BranchOptions
        build_branches: Any
        kernel: Any
        alpha: Any
        train: Any
        training: bool

    def set_grid(self, grid: Union[int, tuple[int, int]]) -> None:
        """Moves the kernels to another reference grid, where they span the same share of the image, in place.

        Local taps stay as they are. In training form no parameter changes: kernels stay parameterized for the grid that
        they were made for. A deployed kernel is replaced, and what of it are taps can only be estimated; see
        `resample_deployed`.

        Args:
            grid: Height and width of the reference grid.

        Raises:
            ValueError: If the grid is too small for the local taps.
        """
        sides = grid_for(grid, self.guard)
        if self.kernel is not None and sides != self.reference_grid:
            kernel = self.kernel.detach()
            kernel = resample_deployed(kernel, self.reference_grid, sides, self.guard, self.options.bidirectional)
            self.kernel = nn.Parameter(kernel, self.kernel.requires_grad)
        self._take_grid(sides)

    def make_for(self, grid: tuple[int, int]) -> None:
        """Gives the branches new kernels that are parameterized for a grid, in place; the reference grid stays."""
        self.made_for, self.branch_lengths = grid, self._lengths_for(grid)
        self._take_grid(self.reference_grid)
        if self.kernel is None:
            requires_grad = self.alpha.requires_grad
            self.build_branches(self.alpha.device, self.alpha.dtype)
            self.train(self.training).requires_grad_(requires_grad)

    def _lengths_for(self, grid: tuple[int, int]) -> list[int]:
        return branch_lengths(grid[0] * (grid[1] + self.guard), self.options.min_length, self.options.max_branches)

    def _take_grid(self, grid: tuple[int, int]) -> None:
        self.reference_grid = grid
        self.row_stride = grid[1] + self.guard
        self.is_resampled = grid != self.made_for

    def _on_grid(self, kernels: Tensor) -> Tensor:
        """Returns kernels (…, 2·M − 1) as parameterized for the reference grid."""
        if self.is_resampled:
            return resample_kernel(kernels, self.made_for, self.reference_grid, self.guard, self.options.bidirectional)
        # or TorchScript would read on
        return kernels
