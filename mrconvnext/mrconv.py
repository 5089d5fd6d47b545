"""The layers: `MRConv1d` for sequences and `MRConv2d` for images."""

import math
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .layer import LongConvolution
from .options import branch_options, check_positive
from .resampling import grid_for
from .streaming import Stream, start_stream


@torch.fx.wrap
def check_input(x: Tensor, channels: int, dims: int) -> None:
    """Raises if ``x`` is not a floating-point tensor (B, channels, …) of ``dims`` dimensions."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():  # whose sizes are the example's
            return
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.dim() != dims or x.shape[1] != channels:
        raise ValueError(f"x must have {dims} dimensions and {channels} channels (dimension 1), got {list(x.shape)}")
    if min(x.shape[2], x.shape[dims - 1]) < 1:
        raise ValueError(f"x must have at least 1 position, got {list(x.shape)}")


@torch.fx.wrap
def without_padding(x: Tensor, mask: Optional[Tensor], is_refused: bool) -> Tensor:
    """Returns sequences (B, C, L) that are zero where the mask (B, L), if there is one, is False.

    Raises:
        ValueError: If it has another shape or dtype, or is refused.
    """
    if mask is None:
        return x
    if is_refused:
        raise ValueError('branch_norm="parseval" can\'t be trained with a mask: its statistics know no padding')
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] != x.shape[2]:
        expected = [x.shape[0], x.shape[2]]
        raise ValueError(f"mask must be boolean {expected}, got {mask.dtype} {list(mask.shape)}")
    return x.masked_fill(~mask.unsqueeze(1), 0.0)


class MRConv2d(LongConvolution):
    """A depthwise convolution over the whole image: several long kernels over its pixels in sequence, and k×k taps.

    A drop-in for ``Conv2d(channels, channels, kernel_size, padding="same", dilation=dilation, groups=channels)``,
    whose ``weight`` and ``bias`` it keeps: with ``alpha`` zero it computes what that convolution computes. Images may
    have any height and width. Source: MRConv (Cunningham et al. 2024), sections 3 and 5.4; two-sided kernels, guard
    columns (see `grid`), local taps and the norms "parseval" and "kernel" are ours. ``kernel_size=0,
    bidirectional=False, branch_norm="batch"`` is the paper's layer.

    Args:
        channels: Number of channels C.
        grid: Height and width of the reference grid that the kernels are made for, in pixels; each at least
            ``dilation * (kernel_size // 2) + 1``.
        kernel_size: Size k of the local taps, odd; 0 for none.
        dilation: Distance of the local taps in pixels.
        bias: Whether the local taps have a bias.
        seed: Seed of the sparse lags. Default: one that no other layer of this process has.
        inference_mode: Whether the layer is deployed from the start; see `LongConvolution`.
        exportable: Whether the deployed form computes without complex numbers, for exporters that have none.
        made_for: Height and width of another grid that the kernels are parameterized for, to be moved to ``grid``; see
            `set_grid`. Default: ``grid``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: What the branches are like; see `BranchOptions`.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        channels: int,
        grid: Union[int, tuple[int, int]],
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        seed: Optional[int] = None,
        inference_mode: bool = False,
        exportable: bool = False,
        made_for: Optional[Union[int, tuple[int, int]]] = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        check_positive("dilation", dilation)
        if not isinstance(kernel_size, int) or kernel_size < 0 or (kernel_size > 0 and kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be an odd integer, or 0 for no local taps, got {kernel_size!r}")
        guard = dilation * (kernel_size // 2)
        super().__init__(
            channels=channels,
            grid=grid_for(grid, guard),
            made_for=None if made_for is None else grid_for(made_for, guard),
            kernel_size=kernel_size,
            dilation=dilation,
            bias=bias and kernel_size > 0,
            options=branch_options(**options),
            seed=seed,
            inference_mode=inference_mode,
            exportable=exportable,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, of ``x``'s shape and dtype.

        Args:
            x: Floating-point images (B, C, H, W).

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has another number of dimensions or channels.
        """
        check_input(x, self.channels, 4)
        return self._convolve(x)


class MRConv1d(LongConvolution):
    """A depthwise convolution of sequences with several long kernels, each normalised and weighted.

    The layer of MRConv (Cunningham et al. 2024, section 3), on (B, C, L): an image of one column, without local taps.
    Sequences may have any length; the kernels keep theirs. The options and their defaults are those of `MRConv2d`, but
    for ``bidirectional``, which is ``False`` here: a sequence has a direction, and a causal layer can be run step by
    step; an image has none.

    Args:
        channels: Number of channels C.
        length: Length of the longest branch in positions: the reference length.
        seed: See `MRConv2d`, as for the arguments below.
        inference_mode: Whether the layer is deployed from the start.
        exportable: Whether the deployed form computes without complex numbers.
        made_for: Another length that the kernels are parameterized for, to be moved to ``length``; see `resample`.
            Default: ``length``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: See `BranchOptions`.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        seed: Optional[int] = None,
        inference_mode: bool = False,
        exportable: bool = False,
        made_for: Optional[int] = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        check_positive("length", length)
        if made_for is not None:
            check_positive("made_for", made_for)
        super().__init__(
            channels=channels,
            grid=grid_for((length, 1), guard=0),
            made_for=None if made_for is None else grid_for((made_for, 1), guard=0),
            kernel_size=0,
            dilation=1,
            bias=False,
            options=branch_options(**{"bidirectional": False, **options}),
            seed=seed,
            inference_mode=inference_mode,
            exportable=exportable,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns the layer's output, of ``x``'s shape and dtype.

        Args:
            x: Floating-point sequences (B, C, L).
            mask: True at the positions that are no padding, (B, L). What stands in padding does not count, not for the
                statistics of "batch" either; what comes out there is of no use. Default: there is none.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has another number of dimensions or channels, the mask another shape or dtype, or the
                norm is "parseval" in training, which has no statistics of masked sequences.
        """
        check_input(x, self.channels, 3)
        x = without_padding(x, mask, self.norm_is_parseval and self.training)
        return self._convolve(x.unsqueeze(-1), mask).squeeze(-1)

    @torch.jit.unused
    def start(self, batch: int) -> Stream:
        """Returns the state of `step` before the first position, for so many sequences at once.

        It belongs to the weights that the layer has now.

        Raises:
            RuntimeError: If the layer is bidirectional, or its norm takes statistics of the batch.
        """
        check_positive("batch", batch)
        return start_stream(self, batch)

    @torch.jit.unused
    def step(self, x: Tensor, state: Stream) -> tuple[Tensor, Stream]:
        """Returns the layer's output at the next position, and the state after it. Without gradients.

        Any number of positions may follow each other: at each the output is that of `forward` for all inputs so far.

        Args:
            x: The inputs (B, C) at the next position.
            state: What `start` or the step before returned; it is changed. ``copy.deepcopy`` makes another one.

        Returns:
            The outputs (B, C), and the state.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has another shape, or the state is of a layer with other channels.
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        if len(state.bias) != self.channels or list(x.shape) != [state.batch, self.channels]:
            expected = f"x must be [{state.batch}, {self.channels}], and the state of as many channels"
            raise ValueError(f"{expected}, got {list(x.shape)} and {len(state.bias)} channels")
        return state.step(x), state

    def resample(self, factor: float) -> None:
        """Moves the kernels to sequences that are sampled ``factor`` times as densely, in place; see `set_grid`.

        The reference length is rounded up to whole positions.

        Args:
            factor: The new sampling rate over the old one; the reference length is multiplied by it.

        Raises:
            ValueError: If it is not a finite number above 0.
        """
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
            raise ValueError(f"factor must be a finite number above 0, got {factor!r}")
        length = math.ceil(round(factor * self.reference_grid[0], 6))  # but not for the sake of rounding errors
        self.set_grid((max(1, length), 1))
