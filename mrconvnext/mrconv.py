"""The layers: `MRConv1d` for sequences and `MRConv2d` for images.

A layer has two forms. In its training form several branches of doubling length, each normalised and weighted by
``alpha``, are added (MRConv, Cunningham et al. 2024, section 3). `reparameterize` folds them, and the local taps of
`MRConv2d`, into the deployed form: one kernel and one bias.
"""

import copy
import dataclasses
import itertools
import math
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import add_local_taps, place_kernel
from .kernels import KERNELS, at_least_float32, create_kernels, product, without_autocast
from .longconv import convolve, convolve_real, is_in_onnx_export
from .norms import NORMS, create_norm, norm_affine

# Of what a layer's state dict holds. 1 had a module for each branch.
FORMAT = 2

# Seeds of layers made without one, far from those that a model gives its layers. The generator uses 32 bits of them.
_seeds = itertools.count(2**31)

# FX keeps these as single nodes: they depend on sizes and dtypes that are known only when the traced model runs.
for _name in ("add_local_taps", "at_least_float32", "convolve", "convolve_real", "norm_affine", "place_kernel"):
    torch.fx.wrap(_name)


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
    """What a layer's branches are like: options of the layers and, by the same names, of the models.

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
        for name, allowed in (("kernel", KERNELS), ("branch_norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.sync_norm and self.branch_norm != "parseval":
            raise ValueError(
                f'sync_norm is for branch_norm="parseval", got {self.branch_norm!r}: '
                "use nn.SyncBatchNorm.convert_sync_batchnorm for BatchNorm"
            )


def check_positive(name: str, value: Any) -> None:
    """Raises a ValueError if an argument is not a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


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
def check_not_onnx() -> None:
    """Raises if an ONNX exporter runs this call, of the training form."""
    if not torch.jit.is_scripting():
        if is_in_onnx_export():
            raise RuntimeError("the training form can't be exported to ONNX: reparameterize the model before")


@torch.fx.wrap
def merge_kernels(kernels: Tensor, gain: Tensor) -> Tensor:
    """Returns the sum (C, 2·M − 1) of kernels (N, C, 2·M − 1), each times its gain (N, C)."""
    return product(gain.t().unsqueeze(1), kernels.transpose(0, 1)).squeeze(1)  # of (C, 1, N) and (C, N, 2·M − 1)


@torch.fx.wrap
def merge_shifts(alpha: Tensor, shift: Optional[Tensor], bias: Optional[Tensor]) -> Optional[Tensor]:
    """Returns the bias (C) that branches with shifts (N, C), weighted by alpha (N, C), and local taps add up to."""
    if shift is None:
        return bias
    total = (alpha * shift).sum(0)
    return total if bias is None else total + at_least_float32(bias)


@torch.fx.wrap
def weigh_branches(c: Tensor, alpha: Tensor) -> Tensor:
    """Returns the sum (B, C, H, W) of branches (B, N · C, H, W), each times alpha (N, C)."""
    weights = at_least_float32(alpha).unsqueeze(-1).unsqueeze(-1)
    return (c.unflatten(1, [alpha.shape[0], alpha.shape[1]]) * weights).sum(1)


@torch.fx.wrap
def convolve_locally(x: Tensor, weight: Tensor, bias: Optional[Tensor], dilation: int) -> Tensor:
    """Returns the depthwise convolution of images with k×k taps (C, 1, k, k), zero-padded, at least in float32."""
    x, weight = at_least_float32(x), at_least_float32(weight)
    bias = None if bias is None else at_least_float32(bias)
    padding = dilation * (weight.shape[3] // 2)
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])
    else:
        with without_autocast(x):
            return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


class LongConvolution(nn.Module):
    """What both layers are: branches over a reference grid, in training or deployed form.

    The layer takes the form of the state dict that it is given, unless ``inference_mode`` is set: then it always ends
    deployed. A change of form makes new parameters, which an optimizer made before does not know. Beside parameters and
    statistics a state dict holds the grid and the branches' lengths, which are compared with the layer's, and the
    sparse lags. None of them is a buffer, which averages of weights or casts could change.

    In the deployed form ``alpha`` is empty: it has no branches. So nobody who assigns weights by their names, whatever
    the form, can take the weights of one form for those of the other.

    Args:
        channels: Number of channels C.
        grid: Height and width of the reference grid.
        guard: Columns of zeros between rows.
        kernel_size: Size k of the local taps, odd; 0 for none.
        dilation: Distance of the local taps in pixels.
        bias: Whether there is a bias.
        options: What the branches are like.
        seed: Seed of the sparse lags. Default: one that no other layer of this process has.
        inference_mode: Whether the layer is deployed from the start.
        exportable: Whether the deployed form computes without complex numbers, for exporters that have none.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    merges: torch.jit.Final[bool]
    exportable: torch.jit.Final[bool]

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        guard: int,
        kernel_size: int,
        dilation: int,
        bias: bool,
        options: BranchOptions,
        seed: Optional[int],
        inference_mode: bool,
        exportable: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.channels = channels
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.guard = guard
        self.reference_grid = grid
        self.row_stride = grid[1] + guard
        self.branch_lengths = branch_lengths(grid[0] * self.row_stride, options.min_length, options.max_branches)
        self.options = options
        self.has_bias = bias
        self.seed = next(_seeds) if seed is None else seed
        self.inference_mode = inference_mode
        self.merges = options.branch_norm != "batch"
        self.exportable = exportable
        self._build_branches(device, dtype)
        self.register_state_dict_post_hook(_write_reference)
        self.register_load_state_dict_pre_hook(_take_form)
        self.register_load_state_dict_post_hook(_reparameterize_after_load)
        if inference_mode:
            self.reparameterize()

    # The two forms

    def _build_branches(self, device: Any, dtype: Any) -> None:
        """Gives the layer its training form, with new parameters."""
        dd = {"device": device, "dtype": dtype}
        channels, branches, options = self.channels, len(self.branch_lengths), self.options
        alpha = 1 / branches if options.alpha_init is None else options.alpha_init
        self._drop("alpha", "kernel", "weight", "bias")
        self.register_parameter("kernel", None)
        self.register_parameter("weight", None)
        if self.kernel_size > 0:
            self.weight = nn.Parameter(torch.empty(channels, 1, self.kernel_size, self.kernel_size, **dd))
            nn.init.trunc_normal_(self.weight, std=0.02)  # as ConvNeXt's
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels, **dd)) if self.has_bias else None)
        self.alpha = nn.Parameter(torch.full((branches, channels), float(alpha), **dd))
        self.kernels = create_kernels(
            options.kernel,
            channels,
            self.branch_lengths,
            directions=2 if options.bidirectional else 1,
            modes=options.modes,
            taps=options.taps,
            seed=self.seed,
            **dd,
        )
        self.norm = create_norm(options.branch_norm, branches, channels, sync=options.sync_norm, **dd)

    def _build_deployed(self, kernel: Tensor, bias: Tensor) -> None:
        """Gives the layer its deployed form."""
        requires_grad = any(parameter.requires_grad for parameter in self.parameters())
        self._drop("alpha", "kernel", "weight", "bias", "kernels", "norm")
        self.kernel = nn.Parameter(kernel, requires_grad)
        self.register_parameter("weight", None)
        self.bias = nn.Parameter(bias, requires_grad)
        self.register_buffer("alpha", kernel.new_empty((0, self.channels)))

    def _drop(self, *names: str) -> None:
        for name in names:
            if hasattr(self, name):
                delattr(self, name)

    def branch_kernels(self) -> list[Tensor]:
        """Returns the branches' two-sided kernels (C, 2·l_i − 1) as parameterized: before norm and α.

        Raises:
            RuntimeError: If the layer is deployed, its branches gone.
        """
        if self.kernel is not None:
            raise RuntimeError("a deployed layer has no branches: call branch_kernels() before reparameterize()")
        longest = self.branch_lengths[-1]
        return [own[:, longest - n : longest + n - 1] for own, n in zip(self.kernels(), self.branch_lengths)]

    @torch.no_grad()
    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        """Returns the kernel (C, 2·L − 1) and bias (C) that the layer equals in eval mode, folded in float64.

        They act on the reference grid laid out by `grid.to_sequence`, L its number of positions.
        """
        if self.kernel is not None:
            return self.kernel.detach().clone(), self.bias.detach().clone()
        layer = copy.deepcopy(self).double().eval()
        reference = layer.alpha.new_empty((1, 1, *self.reference_grid))
        kernels = layer.kernels()
        if layer.merges:
            gain, shift = layer.norm(reference, kernels, kernels, self.guard)
        else:
            norm, shape = layer.norm, layer.alpha.shape
            gain, shift = norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
            gain, shift = gain.view(shape), shift.view(shape)
        kernel, bias = layer._merge(reference, kernels, gain, shift)
        bias = kernel.new_zeros(self.channels) if bias is None else bias
        return kernel.to(self.alpha.dtype), bias.to(self.alpha.dtype)

    def reparameterize(self) -> None:
        """Folds branches, norms, α and local taps into one kernel and one bias, in place. Idempotent."""
        if self.kernel is None:
            self._build_deployed(*self.merged_kernel())

    # Forward

    def _convolve(self, x: Tensor) -> Tensor:
        """Returns the layer's output for images (B, C, H, W)."""
        if self.kernel is not None:
            kernel = place_kernel(self.kernel, self.row_stride, x, self.guard)
            if self.exportable:
                return convolve_real(x, kernel, self.bias, self.guard)
            return convolve(x, kernel, self.bias, self.guard)
        check_not_onnx()
        kernels = self.kernels()  # (N, C, 2·L − 1)
        placed = place_kernel(kernels, self.row_stride, x, self.guard)
        if self.merges:
            gain, shift = self.norm(x, kernels, placed, self.guard)
            kernel, bias = self._merge(x, placed, gain, shift)
            return convolve(x, kernel, bias, self.guard)
        else:
            c = self.norm(convolve(x, placed.flatten(0, 1), None, self.guard))
            return self._add_branches(x, c)

    def _merge(
        self, x: Tensor, placed: Tensor, gain: Tensor, shift: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Returns the kernel and bias (C), if any, that normalised branches, α and local taps add up to.

        Args:
            x: Images (B, C, H, W).
            placed: The branches' kernels (N, C, 2·M − 1), placed for images like ``x``.
            gain: Factor of every branch by its norm (N, C).
            shift: Summand of every branch by its norm (N, C), if it has one.
        """
        alpha = at_least_float32(self.alpha)
        kernel = merge_kernels(placed, alpha * gain)
        if self.weight is not None:
            kernel = add_local_taps(kernel, self.weight, self.dilation, x, self.guard)
        return kernel, merge_shifts(alpha, shift, self.bias)

    def _add_branches(self, x: Tensor, c: Tensor) -> Tensor:
        """Returns the sum of normalised branches ``c`` (B, N · C, H, W), α and what the local taps make of ``x``."""
        y = weigh_branches(c, self.alpha)
        if self.weight is not None:
            y = y + convolve_locally(x, self.weight, self.bias, self.dilation)
        return y.to(x.dtype)


# State dicts


def _write_reference(layer: LongConvolution, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Writes what the weights were made for: the format, the grid [height, width, guard], the branches' lengths."""
    state_dict[prefix + "format"] = torch.tensor(FORMAT)
    state_dict[prefix + "grid"] = torch.tensor([*layer.reference_grid, layer.guard])
    if layer.kernel is None:
        state_dict[prefix + "lengths"] = torch.tensor(layer.branch_lengths)


def _take_form(
    layer: LongConvolution, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any
) -> None:
    """Changes a layer to the form, training or deployed, of the weights in a state dict, after checking these.

    Raised here, not collected: the layer's children would be loaded all the same.
    """
    check_reference(layer, state_dict, prefix)
    for name in ("format", "grid", "lengths"):
        state_dict.pop(prefix + name, None)
    if prefix + "kernel" in state_dict:
        state_dict.setdefault(prefix + "alpha", layer.alpha.new_empty((0, layer.channels)))
        if layer.kernel is None:
            kernel = layer.alpha.new_zeros(state_dict[prefix + "kernel"].shape)
            layer._build_deployed(kernel, layer.alpha.new_zeros(layer.channels))
    elif layer.kernel is None:
        if prefix + "weight" in state_dict and not any(prefix + name in state_dict for name in _names_of_branches(layer)):
            # A convolution's own weights: its function, not that plus branches that it never had.
            state_dict[prefix + "alpha"] = torch.zeros_like(layer.alpha)
    elif any(name.startswith(prefix) for name in state_dict):
        deployed, requires_grad = (layer.kernel.detach(), layer.bias.detach()), layer.kernel.requires_grad
        layer._drop("alpha", "kernel", "bias")
        layer._build_branches(deployed[0].device, deployed[0].dtype)
        layer.train(layer.training).requires_grad_(requires_grad)
        missing = [prefix + name for name in trainable_names(layer) if prefix + name not in state_dict]
        if missing:
            layer._build_deployed(*deployed)
            raise RuntimeError(
                f"the state dict has neither {prefix}kernel nor all of the training form; missing are "
                f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. A deployed layer can't take part of "
                "a training form: load it into a model in training form, then reparameterize."
            )


def _names_of_branches(layer: LongConvolution) -> list[str]:
    return [name for name in trainable_names(layer) if name not in ("weight", "bias")]


def trainable_names(layer: LongConvolution) -> list[str]:
    """Returns the names in a layer's state dict that a layer of its form can't do without."""
    return [name for name in layer.state_dict() if name not in ("format", "grid", "lengths")]


def check_reference(layer: LongConvolution, state_dict: dict[str, Any], prefix: str) -> None:
    """Raises a RuntimeError if a state dict's layer is of another format, grid, branches or channels than this one."""
    if any(name.startswith((f"{prefix}branches.", f"{prefix}norms.")) for name in state_dict):
        raise RuntimeError(
            f"{prefix}branches: these weights have the parameter names of mrconvnext 0.1, which this version can't read "
            "in training form. Deploy them with that version (model.reparameterize()): deployed weights still load."
        )
    own = {"format": FORMAT, "grid": [*layer.reference_grid, layer.guard], "lengths": layer.branch_lengths}
    for name, value in own.items():
        given = state_dict.get(prefix + name)
        if given is not None and not given.is_meta and given.tolist() != value:
            raise RuntimeError(
                f"{prefix}{name} is {given.tolist()} in the state dict and {value} in the layer. "
                "Weights keep the grid [height, width, guard] and the branch lengths that they were made with: "
                "build the model with the same img_size, kernel_sizes, output_stride, min_lengths and max_branches."
            )
    shapes = {
        "kernel": [(layer.channels, 2 * layer.branch_lengths[-1] - 1)],
        "alpha": [(len(layer.branch_lengths), layer.channels), (0, layer.channels)],
    }
    for name, allowed in shapes.items():
        given = state_dict.get(prefix + name)
        if given is not None and tuple(given.shape) not in allowed:
            raise RuntimeError(f"size mismatch for {prefix}{name}: {tuple(given.shape)} given, {allowed[0]} in the layer")


def _reparameterize_after_load(layer: LongConvolution, incompatible_keys: Any) -> None:
    if layer.inference_mode:
        layer.reparameterize()


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
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        height, width = (grid, grid) if isinstance(grid, int) else grid
        check_positive("dilation", dilation)
        for side in (height, width):
            check_positive("grid", side)
        if not isinstance(kernel_size, int) or kernel_size < 0 or (kernel_size > 0 and kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be an odd integer, or 0 for no local taps, got {kernel_size!r}")
        guard = dilation * (kernel_size // 2)
        if min(height, width) < guard + 1:
            raise ValueError(f"grid must be at least {guard + 1} on each side to hold the taps, got {(height, width)}")
        super().__init__(
            channels=channels,
            grid=(height, width),
            guard=guard,
            kernel_size=kernel_size,
            dilation=dilation,
            bias=bias and kernel_size > 0,
            options=BranchOptions(**options),
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
    Sequences may have any length; the kernels keep theirs. Causal and with Fourier kernels unless the options say
    otherwise.

    Args:
        channels: Number of channels C.
        length: Length of the longest branch in positions: the reference length.
        seed: See `MRConv2d`, as for the arguments below.
        inference_mode: Whether the layer is deployed from the start.
        exportable: Whether the deployed form computes without complex numbers.
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
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        check_positive("length", length)
        super().__init__(
            channels=channels,
            grid=(length, 1),
            guard=0,
            kernel_size=0,
            dilation=1,
            bias=False,
            options=BranchOptions(**{"kernel": "fourier", "bidirectional": False, **options}),
            seed=seed,
            inference_mode=inference_mode,
            exportable=exportable,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output, of ``x``'s shape and dtype.

        Args:
            x: Floating-point sequences (B, C, L).

        Raises:
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If ``x`` has another number of dimensions or channels.
        """
        check_input(x, self.channels, 3)
        return self._convolve(x.unsqueeze(-1)).squeeze(-1)
