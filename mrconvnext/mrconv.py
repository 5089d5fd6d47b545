"""The layers: `MRConv1d` for sequences and `MRConv2d` for images.

A layer has two forms. In its training form several branches of doubling length, each normalised and weighted by
``alpha``, are added (MRConv, Cunningham et al. 2024, section 3). `reparameterize` folds them, and the local taps of
`MRConv2d`, into the deployed form: one kernel and one bias.
"""

import copy
import itertools
import math
from typing import Optional, Union

import torch
import torch.distributed as dist
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from .derived import DropsDerived, is_compiled_for_inference, is_eager, is_ordinary, is_traced_for_onnx
from .grid import (
    convolve_image,
    image_fft_length,
    long_conv_image,
    pair_weights,
    place_kernel,
    place_taps,
    responses_to_ones,
    to_sequence,
)
from .imageconv import (
    AdaptiveConvolution,
    channel_sums,
    convolve_deployed,
    convolve_for_onnx,
)
from .kernels import TwoSidedKernel, add_kernels, at_least_float32, create_kernel, merge_kernels
from .longconv import autocorrelation, branch_energies, spectrum

BRANCH_NORMS = ("batch", "parseval")

# Seeds of layers made without one, far from those that a model gives its layers. The generator uses 32 bits of them.
_seeds = itertools.count(2**31)

# FX keeps these as single nodes: they depend on sizes and dtypes that are known only when the traced model runs.
for _name in (
    "add_kernels",
    "at_least_float32",
    "autocorrelation",
    "branch_energies",
    "channel_sums",
    "convolve_image",
    "image_fft_length",
    "long_conv_image",
    "merge_kernels",
    "pair_weights",
    "place_kernel",
    "place_taps",
    "responses_to_ones",
    "spectrum",
    "to_sequence",
):
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


def norm_affine(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns a normalisation with fixed statistics as (gain, shift): norm(c) = gain · c + shift."""
    gain = weight * (variance + eps).rsqrt()
    return gain, bias - gain * mean


class _AllReduce(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad.contiguous())


@torch.fx.wrap
def sum_over_processes(x: Tensor, sync: bool) -> Tensor:
    """Returns the sum of ``x`` over all processes if ``sync`` is set and there are several, else ``x``."""
    if not torch.jit.is_scripting():
        if sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return _AllReduce.apply(x)
    return x


@torch.fx.wrap
def _track_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    momentum: float,
) -> Tensor:
    """Moves the running statistics towards the batch's as ``nn.BatchNorm1d`` does; returns ``mean``.

    The return value ties the update into an FX graph, which drops calls whose result nobody uses.
    """
    if not torch.jit.is_scripting():
        # Gradient checkpointing recomputes the forward pass inside the backward pass: the batch was counted already.
        # A compiled graph has its own way of recomputing, which leaves buffers alone.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return mean
    with torch.no_grad():
        unbiased = variance * (count / (count - 1).clamp(min=1))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        num_batches_tracked.add_(1)
    return mean


class ParsevalNorm(nn.Module):
    """Normalises the branches of a layer by statistics that are known before any branch is convolved.

    A branch's input is the mean of its channel on all pixels, zero beyond, and what deviates from it. What the kernel
    makes of the former has a mean and a variance over the pixels that are known exactly. For the latter the variance is
    estimated from the batch's autocovariance, as if the signal were stationary, each lag of the kernel weighted by the
    share of pixels that have a pixel there: by Parseval's theorem a product of spectra, summed. For white noise that is
    exact. So the branches' scales are known while they are still kernels, and all of them merge into one convolution in
    training too. Parameters, running statistics and momentum are those of ``nn.BatchNorm1d``, for all branches at once.

    Args:
        branches: Number of branches N.
        channels: Number of channels C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, branches: int, channels: int, eps: float = 1e-5, momentum: float = 0.1, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(branches, channels, **dd))
        self.bias = nn.Parameter(torch.zeros(branches, channels, **dd))
        self.register_buffer("running_mean", torch.zeros(branches, channels, **dd))
        self.register_buffer("running_var", torch.ones(branches, channels, **dd))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def forward(self, mean: Tensor, variance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the branches' gain and shift (N, C) by the statistics of a batch, and tracks these.

        Args:
            mean: Mean of every branch's output (N, C).
            variance: Variance of every branch's output (N, C), biased.
            count: Number of pixels (0-dimensional) that the statistics are taken over.
        """
        mean = _track_statistics(
            self.running_mean, self.running_var, self.num_batches_tracked, mean, variance, count, self.momentum
        )
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return norm_affine(mean, variance, weight, bias, self.eps)

    def running(self) -> tuple[Tensor, Tensor]:
        """Returns the branches' gain and shift (N, C) by the running statistics."""
        return norm_affine(
            at_least_float32(self.running_mean),
            at_least_float32(self.running_var),
            at_least_float32(self.weight),
            at_least_float32(self.bias),
            self.eps,
        )


@torch.fx.wrap
def scaled(y: Tensor, factor: Tensor) -> Tensor:
    """Returns images ``y`` (B, C, H, W) times a factor (C)."""
    return y * at_least_float32(factor).unsqueeze(-1).unsqueeze(-1)


@torch.fx.wrap
def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """Returns images ``y`` (B, C, H, W) plus a bias (C)."""
    return y + at_least_float32(bias).unsqueeze(-1).unsqueeze(-1)


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


def _reparameterize_after_load(layer: nn.Module, incompatible_keys) -> None:
    if layer.inference_mode:
        layer.reparameterize()


class MRConv2d(DropsDerived):
    """A depthwise convolution over the whole image: several long kernels over its pixels in sequence, and k×k taps.

    A drop-in for ``Conv2d(channels, channels, kernel_size, padding="same", dilation=dilation, groups=channels)``,
    whose ``weight`` and ``bias`` it keeps: with ``alpha`` zero it computes what that convolution computes. Images may
    have any height and width. Source: MRConv (Cunningham et al. 2024), sections 3 and 5.4; two-sided kernels, guard
    columns (see `grid`), local taps and the "parseval" norm are ours. ``kernel_size=0, bidirectional=False`` is the
    paper's layer.

    The layer takes the form, training or deployed, of the state dict that it is given, unless ``inference_mode`` is
    set: then it always ends deployed. A change of form makes new parameters, which an optimizer made before does not
    know. The deployed form keeps the kernel's spectrum of the last two image sizes while gradients are off; in-place
    changes through ``kernel.data`` go unseen by it.

    Args:
        channels: Number of channels C.
        grid: Height and width of the reference grid that the kernels are made for, in pixels; each at least
            ``dilation * (kernel_size // 2) + 1``.
        kernel_size: Size k of the local taps, odd; 0 for none.
        dilation: Distance of the local taps in pixels.
        bias: Whether the local taps have a bias.
        kernel: Parameterization of the branches, one of `kernels.KERNELS`.
        min_length: Length of the shortest branch in positions; see `branch_lengths`.
        max_branches: Largest number of branches.
        bidirectional: Whether branches reach to positions ahead as well, with a kernel for each direction.
        branch_norm: "batch", the paper's: a convolution and an ``nn.BatchNorm1d`` for each branch; or "parseval":
            one convolution in all, see `ParsevalNorm`.
        sync_norm: Whether "parseval" takes its statistics over all processes. For "batch", convert with
            ``nn.SyncBatchNorm.convert_sync_batchnorm``.
        modes: Fourier modes a kernel. The paper does not state it.
        taps: Dilated or sparse taps a kernel. The paper does not state it.
        alpha_init: Start of ``alpha``. Default: 1 / number of branches. The paper does not state it.
        seed: Seed of the sparse lags. Default: one that no other layer of this process has.
        inference_mode: Whether the layer is deployed from the start.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If an argument is unknown or outside its range.
    """

    def __init__(
        self,
        channels: int,
        grid: Union[int, tuple[int, int]],
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        kernel: str = "fourier_sparse",
        min_length: Optional[int] = None,
        max_branches: int = 5,
        bidirectional: bool = True,
        branch_norm: str = "parseval",
        sync_norm: bool = False,
        modes: int = 16,
        taps: int = 16,
        alpha_init: Optional[float] = None,
        seed: Optional[int] = None,
        inference_mode: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        grid = to_2tuple(grid)
        sizes = dict(channels=channels, dilation=dilation, max_branches=max_branches, modes=modes, taps=taps)
        for name, value in (*sizes.items(), *(("grid", side) for side in grid)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(kernel_size, int) or kernel_size < 0 or (kernel_size > 0 and kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be an odd integer, or 0 for no local taps, got {kernel_size!r}")
        self.guard = dilation * (kernel_size // 2)
        if min(grid) < self.guard + 1:
            raise ValueError(f"grid must be at least {self.guard + 1} on each side to hold the taps, got {grid}")
        if branch_norm not in BRANCH_NORMS:
            raise ValueError(f"branch_norm must be one of {', '.join(BRANCH_NORMS)}, got {branch_norm!r}")
        if sync_norm and branch_norm != "parseval":
            raise ValueError(
                f'sync_norm is for branch_norm="parseval", got {branch_norm!r}: '
                "use nn.SyncBatchNorm.convert_sync_batchnorm for BatchNorm"
            )
        self.channels = channels
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.has_bias = bias and kernel_size > 0
        self.reference_grid = tuple(grid)
        self.row_stride = grid[1] + self.guard
        self.branch_lengths = branch_lengths(grid[0] * self.row_stride, min_length, max_branches)
        self.kernel_kind = kernel
        self.bidirectional = bidirectional
        self.branch_norm = branch_norm
        self.sync_norm = sync_norm
        self.modes = modes
        self.taps = taps
        self.alpha_init = 1 / len(self.branch_lengths) if alpha_init is None else alpha_init
        self.seed = next(_seeds) if seed is None else seed
        self.inference_mode = inference_mode

        self.register_buffer("grid", torch.tensor([*grid, self.guard], device=device))
        self.register_buffer("lengths", None)
        for name in ("kernel", "weight", "bias", "alpha"):
            self.register_parameter(name, None)
        for name in ("branches", "norms", "norm"):
            self.register_module(name, None)
        self._build_branches(device, dtype)
        self.register_load_state_dict_post_hook(_reparameterize_after_load)
        if inference_mode:
            self.reparameterize()

    def extra_repr(self) -> str:
        form = "deployed" if self.branches is None else f"branches={self.branch_lengths}, norm={self.branch_norm}"
        return f"{self.channels}, grid={self.reference_grid}, kernel_size={self.kernel_size}, {form}"

    # The two forms

    def _build_branches(self, device, dtype) -> None:
        """Gives the layer its training form, its parameters as at the start."""
        dd = {"device": device, "dtype": dtype}
        channels, branches = self.channels, len(self.branch_lengths)
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def one_sided(length: int) -> nn.Module:
            return create_kernel(self.kernel_kind, channels, length, self.modes, self.taps, generator, **dd)

        self.kernel = None
        self.branches = nn.ModuleList(
            TwoSidedKernel(one_sided(length), one_sided(length) if self.bidirectional else None)
            for length in self.branch_lengths
        )
        if self.branch_norm == "batch":
            self.norms = nn.ModuleList(nn.BatchNorm1d(channels, **dd) for _ in self.branch_lengths)
        else:
            self.norm = ParsevalNorm(branches, channels, **dd)
        self.alpha = nn.Parameter(torch.full((branches, channels), float(self.alpha_init), **dd))
        self.lengths = torch.tensor(self.branch_lengths, device=device)
        self.bias = nn.Parameter(torch.zeros(channels, **dd)) if self.has_bias else None
        if self.kernel_size > 0:
            self.weight = nn.Parameter(torch.empty(channels, 1, self.kernel_size, self.kernel_size, **dd))
            nn.init.trunc_normal_(self.weight, std=0.02)  # as ConvNeXt's

    def _build_deployed(self, kernel: Tensor, bias: Tensor) -> None:
        """Gives the layer its deployed form."""
        requires_grad = any(parameter.requires_grad for parameter in self.parameters())
        self.branches = self.norms = self.norm = self.alpha = self.weight = self.lengths = None
        self.kernel = nn.Parameter(kernel, requires_grad)
        self.bias = nn.Parameter(bias, requires_grad)

    def branch_kernels(self) -> list[Tensor]:
        """Returns the branches' two-sided kernels (C, 2·l_i − 1) as parameterized: before norm and α.

        Raises:
            RuntimeError: If the layer is deployed, its branches gone.
        """
        if self.branches is None:
            raise RuntimeError("a deployed layer has no branches: call branch_kernels() before reparameterize()")
        return [branch() for branch in self.branches]

    @torch.no_grad()
    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        """Returns the kernel (C, 2·M − 1) and bias (C) that the layer equals in eval mode, folded in float64.

        They act on the reference grid laid out by `grid.to_sequence`, M its number of positions.
        """
        if self.kernel is not None:
            return self.kernel.detach().clone(), self.bias.detach().clone()
        layer = copy.deepcopy(self).double()
        if layer.norm is not None:
            gain, shift = layer.norm.running()
        else:
            affine = [norm_affine(n.running_mean, n.running_var, n.weight, n.bias, n.eps) for n in layer.norms]
            gain, shift = (torch.stack(values) for values in zip(*affine))
        reference = layer.alpha.new_empty((1, 1, *self.reference_grid))
        kernel, bias = layer._merge(layer.branch_kernels(), gain, shift, reference)
        return kernel.to(self.alpha.dtype), bias.to(self.alpha.dtype)

    def reparameterize(self) -> None:
        """Folds branches, norms, α and local taps into one kernel and one bias, in place. Idempotent."""
        if self.kernel is None:
            self._build_deployed(*self.merged_kernel())

    # Forward

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

    def _convolve(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = at_least_float32(x)
        if self.kernel is not None:
            y = self._forward_deployed(x)
        else:
            y = self._forward_branches(x)
        return y.to(dtype)

    def _forward_deployed(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if not torch.is_grad_enabled() and is_ordinary(x, [self.kernel, self.bias]):
                return convolve_deployed(x, self.kernel, self.bias, self.row_stride, self.guard)
            if is_traced_for_onnx():
                return convolve_for_onnx(x, self.kernel, self.bias, self.row_stride, self.guard)
            if is_compiled_for_inference():
                return torch.ops.mrconvnext.convolve(x, self.kernel, self.bias, self.row_stride, self.guard)
        y = long_conv_image(x, place_kernel(self.kernel, self.row_stride, x, self.guard), self.guard)
        return add_bias(y, self.bias)

    def _forward_branches(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_traced_for_onnx():
                raise RuntimeError("the ONNX exporter can't trace the training form: reparameterize the model before")
        return self._forward_batch(x) if self.norm is None else self._forward_parseval(x)

    def _forward_batch(self, x: Tensor) -> Tensor:
        """The paper's form: a convolution and a BatchNorm for each branch."""
        n = image_fft_length(x, self.guard)
        u_spectrum = spectrum(to_sequence(x, self.guard), n)
        y = torch.zeros_like(x)
        if self.weight is not None:
            y = convolve_image(u_spectrum, place_taps(self.weight, self.dilation, x, self.guard), n, x, self.guard)
        if self.bias is not None:
            y = add_bias(y, self.bias)
        kernels = self._placed_kernels(x)
        for i, norm in enumerate(self.norms):
            c = convolve_image(u_spectrum, kernels[i], n, x, self.guard)
            c = norm(c.flatten(2).to(self.alpha.dtype)).reshape_as(x)
            y = y + scaled(c, self.alpha[i])
        return y

    def _forward_parseval(self, x: Tensor) -> Tensor:
        """One convolution for all branches, merged while they are kernels."""
        if self.norm.training:
            return self._forward_parseval_training(x)
        gain, shift = self.norm.running()
        kernel, bias = self._merge(self._placed_kernels(x), gain, shift, x)
        return add_bias(long_conv_image(x, kernel, self.guard), bias)

    def _forward_parseval_training(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if is_eager(x):
                functions = self._mean, self._merge_with
                return AdaptiveConvolution.apply(*functions, self.guard, x, *self.parameters())
        # The mean of a feature map may lie far above its spread: take it out before anything is squared.
        mean, count = self._mean(channel_sums(x))
        v = to_sequence(add_bias(x, -mean), self.guard)
        n = image_fft_length(x, self.guard)
        correlation = autocorrelation(spectrum(v, n), n, v.shape[2])
        kernel, bias = self._merge_by_statistics(x, correlation, mean, count)
        return add_bias(long_conv_image(x, kernel, self.guard), bias)

    def _mean(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean (C) of a batch and the number of pixels (0-dimensional) in it, by its `channel_sums`."""
        sums = sum_over_processes(sums, self.sync_norm)
        count = sums[-1].clamp(min=1)
        return sums[:-1] / count, count

    def _merge_by_statistics(
        self, x: Tensor, correlation: Tensor, mean: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the kernel and bias (C) that the branches, normalised by a batch's statistics, merge into.

        Args:
            x: Images (B, C, H, W).
            correlation: Autocorrelation of their sequences less the mean, see `longconv.autocorrelation`.
            mean: Mean of the channels (C).
            count: Number of pixels (0-dimensional).
        """
        kernels = self._placed_kernels(x)
        energies = branch_energies(correlation, kernels, pair_weights(x, self.guard))
        variance, response = responses_to_ones(kernels, x, self.guard)
        variance = sum_over_processes(energies, self.sync_norm) / count + mean.square() * variance
        gain, shift = self.norm(mean * response, variance, count)
        return self._merge(kernels, gain, shift, x)

    def _merge_with(self, parameters: list[Tensor], *statistics: Tensor) -> tuple[Tensor, Tensor]:
        """`_merge_by_statistics` with other tensors in the place of the layer's parameters."""
        names = [name for name, _ in self.named_parameters()]
        with _reparametrize_module(self, dict(zip(names, parameters))):
            return self._merge_by_statistics(*statistics)

    def _placed_kernels(self, x: Tensor) -> list[Tensor]:
        """Returns the branches' kernels for images like ``x``."""
        kernels: list[Tensor] = []
        for branch in self.branches:
            kernels.append(place_kernel(branch(), self.row_stride, x, self.guard))
        return kernels

    def _merge(self, kernels: list[Tensor], gain: Tensor, shift: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the kernel and bias (C) that normalised branches, α and local taps add up to.

        Args:
            kernels: The branches' kernels, placed for images like ``x``.
            gain: Factor of every branch by its norm (N, C).
            shift: Summand of every branch by its norm (N, C).
            x: Images (B, C, H, W).
        """
        alpha = at_least_float32(self.alpha)
        kernel = merge_kernels(kernels, alpha * gain)
        if self.weight is not None:
            kernel = add_kernels(kernel, place_taps(self.weight, self.dilation, x, self.guard))
        bias = (alpha * shift).sum(0)
        if self.bias is not None:
            bias = bias + at_least_float32(self.bias)
        return kernel, bias

    # Loading

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Raised here, not collected: the layer's children would be loaded all the same.
        self.check_reference(state_dict, prefix)
        self._take_form_of(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.jit.unused
    def check_reference(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Raises a RuntimeError if a state dict's layer has another grid, other branches or channels than this one."""
        own = {"grid": [*self.reference_grid, self.guard], "lengths": self.branch_lengths}
        for name, value in own.items():
            given = state_dict.get(prefix + name)
            if given is not None and not given.is_meta and given.tolist() != value:
                raise RuntimeError(
                    f"{prefix}{name} is {given.tolist()} in the state dict and {value} in the layer. "
                    "Weights keep the grid [height, width, guard] and the branch lengths that they were made with: "
                    "build the model with the same img_size, kernel_sizes, output_stride, min_lengths and max_branches."
                )
        shapes = {
            "kernel": (self.channels, 2 * self.reference_grid[0] * self.row_stride - 1),
            "alpha": (len(self.branch_lengths), self.channels),
        }
        for name, shape in shapes.items():
            given = state_dict.get(prefix + name)
            if given is not None and given.shape != shape:
                raise RuntimeError(
                    f"size mismatch for {prefix}{name}: {tuple(given.shape)} given, {shape} in the layer"
                )

    def _take_form_of(self, state_dict, prefix: str) -> None:
        """Changes to the form, training or deployed, of the weights in a state dict."""
        if prefix + "kernel" in state_dict:
            if self.kernel is None:
                kernel = self.alpha.new_zeros(state_dict[prefix + "kernel"].shape)
                self._build_deployed(kernel, self.alpha.new_zeros(self.channels))
        elif self.kernel is not None and any(name.startswith(prefix) for name in state_dict):
            requires_grad = self.kernel.requires_grad
            deployed = self.kernel.detach(), self.bias.detach()
            self._build_branches(self.kernel.device, self.kernel.dtype)
            self.train(self.training).requires_grad_(requires_grad)
            missing = [prefix + name for name in self.state_dict() if prefix + name not in state_dict]
            if missing:
                self._build_deployed(*deployed)
                raise RuntimeError(
                    f"the state dict has neither {prefix}kernel nor all of the training form; missing are "
                    f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. A deployed layer can't take part of "
                    "a training form: load it into a model in training form, then reparameterize."
                )


class MRConv1d(MRConv2d):
    """A depthwise convolution of sequences with several long kernels, each normalised and weighted.

    The layer of MRConv (Cunningham et al. 2024, section 3), on (B, C, L): an image of one column, without local taps.
    Sequences may have any length; the kernels keep theirs.

    Args:
        channels: Number of channels C.
        length: Length of the longest branch in positions: the reference length.
        kernel: See `MRConv2d`.
        min_length: See `branch_lengths`.
        max_branches: See `branch_lengths`.
        bidirectional: Whether branches reach to positions ahead as well; else the layer is causal.
        branch_norm: See `MRConv2d`, as for the arguments below.
        sync_norm: Whether "parseval" takes its statistics over all processes.
        modes: Fourier modes a kernel.
        taps: Dilated or sparse taps a kernel.
        alpha_init: Start of ``alpha``.
        seed: Seed of the sparse lags.
        inference_mode: Whether the layer is deployed from the start.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If an argument is unknown or outside its range.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        kernel: str = "fourier",
        min_length: Optional[int] = None,
        max_branches: int = 5,
        bidirectional: bool = False,
        branch_norm: str = "parseval",
        sync_norm: bool = False,
        modes: int = 16,
        taps: int = 16,
        alpha_init: Optional[float] = None,
        seed: Optional[int] = None,
        inference_mode: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be an integer of at least 1, got {length!r}")
        super().__init__(
            channels,
            (length, 1),
            kernel_size=0,
            kernel=kernel,
            min_length=min_length,
            max_branches=max_branches,
            bidirectional=bidirectional,
            branch_norm=branch_norm,
            sync_norm=sync_norm,
            modes=modes,
            taps=taps,
            alpha_init=alpha_init,
            seed=seed,
            inference_mode=inference_mode,
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
