"""How branches are normalised, weighted and added.

- "kernel": each branch is divided by the L2 norm of its kernel: by the deviation that white noise of variance 1 would
  have after it. No statistics: the layer is linear in its input, and the same in training and evaluation.
- "parseval": each branch is normalised by the mean and the variance that it has on the batch. Both are known before any
  branch is convolved, by the batch's autocorrelation, so that the branches merge in training too.
- "batch": the paper's. Each branch is convolved, then normalised by an ``nn.BatchNorm2d``.
- "none": they are not. So SGConv and MultiresConv have it.

Statistics are functions of their arguments alone; the modules hold parameters and running statistics.
"""

from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .compat import is_in_backward_pass
from .constants import constant
from .grid import pair_weights, place_kernel, responses_to_ones
from .longconv import autocorrelation, branch_energies
from .precision import at_least_float32, product

torch.fx.wrap("place_kernel")

NORMS = ("kernel", "parseval", "batch", "none")

_pair_weights = constant(lambda *args: pair_weights(*args[:4]).to(args[4]))


@torch.fx.wrap
def normalised_sum(kernels: Tensor, alpha: Tensor) -> Tensor:
    """Returns the sum (C, 2·M − 1) of kernels (N, C, 2·M − 1), each over its L2 norm and times its alpha (N, C)."""
    if not torch.jit.is_scripting():
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return _NormalisedSum.apply(kernels, alpha)[0]
    return _normalised_sum(kernels, alpha)


def _normalised_sum(kernels: Tensor, alpha: Tensor) -> Tensor:
    # A kernel of zeros has a norm too, for its alpha to be divided by.
    return merge_kernels(kernels, alpha / (torch.linalg.vector_norm(kernels, dim=-1) + 1e-5))


class _NormalisedSum(torch.autograd.Function):
    """`_normalised_sum`, whose gradient takes half as many operations as those of its parts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kernels: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norms = torch.linalg.vector_norm(kernels, dim=-1)  # (N, C)
        divisors = norms + 1e-5
        return merge_kernels(kernels, alpha / divisors), norms, divisors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.save_for_forward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor], *_: None) -> tuple[Optional[Tensor], Optional[Tensor]]:
        kernels, alpha, norms, divisors = ctx.saved_tensors
        if grad is None:
            return None, None
        if torch.is_grad_enabled():  # of the gradient too
            return torch.func.vjp(_normalised_sum, kernels, alpha)[1](grad)
        along = product(kernels.transpose(0, 1), grad.unsqueeze(-1)).squeeze(-1).t() / divisors  # (N, C)
        weights = alpha / divisors
        pull = along * weights / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return torch.addcmul(weights.unsqueeze(-1) * grad, pull.unsqueeze(-1), kernels, value=-1), along

    @staticmethod
    def jvp(ctx: Any, on_kernels: Optional[Tensor], on_alpha: Optional[Tensor]) -> tuple[Tensor, None, None]:
        kernels, alpha, norms, divisors = ctx.saved_tensors
        on_kernels = torch.zeros_like(kernels) if on_kernels is None else on_kernels
        on_alpha = torch.zeros_like(alpha) if on_alpha is None else on_alpha
        weights = alpha / divisors
        on_norms = (kernels * on_kernels).sum(-1) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        on_weights = (on_alpha - weights * on_norms) / divisors
        return merge_kernels(on_kernels, weights) + merge_kernels(kernels, on_weights), None, None


class KernelNorm(nn.Module):
    """Normalises each branch by the L2 norm of its own kernel, as weight normalisation does; α is the gain that is
    learned (Salimans and Kingma 2016)."""

    def forward(
        self, x: Tensor, kernels: Tensor, alpha: Tensor, row_stride: int, guard: int
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Returns the merged kernel (C, 2·L − 1), and no shift; see `ParsevalNorm`."""
        return normalised_sum(kernels, alpha), None


class NoNorm(nn.Module):
    """Leaves branches as they are."""

    def forward(
        self, x: Tensor, kernels: Tensor, alpha: Tensor, row_stride: int, guard: int
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Returns the merged kernel (C, 2·L − 1), and no shift; see `ParsevalNorm`."""
        return merge_kernels(kernels, alpha), None


class ParsevalNorm(nn.Module):
    """Normalises the branches of a layer by statistics that are known before any branch is convolved.

    See `branch_statistics`. Parameters, running statistics and momentum are those of ``nn.BatchNorm2d``, for all
    branches at once. In evaluation, and where ``weight`` requires no gradients, as after ``timm.utils.freeze``, the
    running statistics are used and stay as they are.

    Args:
        branches: Number of branches N.
        channels: Number of channels C.
        sync: Whether the statistics are taken over all processes.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        branches: int,
        channels: int,
        sync: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.sync = sync
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(branches, channels, **dd))
        self.bias = nn.Parameter(torch.zeros(branches, channels, **dd))
        self.register_buffer("running_mean", torch.zeros(branches, channels, **dd))
        self.register_buffer("running_var", torch.ones(branches, channels, **dd))

    def forward(
        self, x: Tensor, kernels: Tensor, alpha: Tensor, row_stride: int, guard: int
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Returns the sum (C, 2·L − 1) of the kernels, normalised and weighted, and what each norm adds (N, C).

        In training it tracks the statistics.

        Args:
            x: Images (B, C, H, W).
            kernels: The branches' kernels (N, C, 2·L − 1).
            alpha: The branches' weights (N, C).
            row_stride: Positions of a row, guard columns included, that they were made for.
            guard: Columns of zeros between rows.
        """
        if self.training:
            mean, variance = batch_statistics(
                x,
                place_kernel(kernels, row_stride, x, guard),
                guard,
                self.sync,
                self.running_mean,
                self.running_var,
                self.momentum,
                self.weight,
            )
        else:
            mean, variance = self.running_mean, self.running_var
        gain, shift = norm_affine(mean, variance, self.weight, self.bias, self.eps)
        return merge_kernels(kernels, alpha * gain), shift


@torch.fx.wrap
def norm_affine(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns a normalisation with given statistics as (gain, shift): norm(c) = gain · c + shift."""
    gain = at_least_float32(weight) * (at_least_float32(variance) + eps).rsqrt()
    return gain, torch.addcmul(at_least_float32(bias), gain, at_least_float32(mean), value=-1)


def eval_affine(norm: Any, kernels: Tensor) -> tuple[Tensor, Optional[Tensor]]:
    """Returns what a layer's norm makes of its branches in evaluation, (gain, shift): norm(c) = gain · c + shift.

    Args:
        norm: What `create_norm` made.
        kernels: The branches' kernels (N, C, 2·L − 1).

    Returns:
        The gains (N, C), and the shifts (N, C) if there are any.
    """
    if isinstance(norm, NoNorm):
        return torch.ones_like(kernels[..., 0]), None
    if isinstance(norm, KernelNorm):
        return 1 / (torch.linalg.vector_norm(kernels, dim=-1) + 1e-5), None
    gain, shift = norm_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return gain.view(kernels.shape[:2]), shift.view(kernels.shape[:2])


@torch.fx.wrap
def batch_statistics(
    x: Tensor,
    kernels: Tensor,
    guard: int,
    sync: bool,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the statistics that training normalises by, and tracks them; the running ones of a frozen norm.

    The update is in here, not a call of its own, since FX drops calls whose result nobody uses.
    """
    if is_frozen(weight):
        return running_mean, running_var
    x = at_least_float32(x)
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    total = sum_over_processes(torch.cat([x.sum((0, 2, 3)), x.new_full((1,), pixels)]), sync)
    count = total[-1].clamp(min=1)
    # The mean of a feature map may lie far above its spread: it is taken out before anything is squared.
    centre = total[:-1] / count
    mean, variance = branch_statistics(x, kernels, centre, count, guard, sync)
    if pixels > 0 or sync:  # no image says nothing of them
        track_statistics(running_mean, running_var, mean, variance, count, momentum)
    return mean, variance


def is_frozen(weight: Tensor) -> bool:
    """Returns whether a parameter requires no gradients. Tensors in the place of one, as torch.func has, are free."""
    if not torch.jit.is_scripting():
        if not isinstance(weight, nn.Parameter):
            return False
    return not weight.requires_grad


def branch_statistics(
    x: Tensor, kernels: Tensor, centre: Tensor, count: Tensor, guard: int, sync: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns mean and variance (N, C) of every branch's output over the pixels of a batch, without convolving it.

    A branch's input is the mean of its channel on all pixels, zero beyond, and what deviates from it. What the kernel
    makes of the former has a mean and a variance over the pixels that are known exactly. For the latter the variance is
    estimated from the batch's autocovariance, as if the signal were stationary, each lag of the kernel weighted by the
    share of pixels that have a pixel there: by Parseval's theorem a product of spectra, summed. For white noise that is
    exact.

    Args:
        x: Images (B, C, H, W).
        kernels: Two-sided kernels (N, C, 2·M − 1), placed for images like ``x``.
        centre: Mean of every channel (C).
        count: Number of pixels (0-dimensional) that the mean was taken over.
        guard: Columns of zeros between rows.
        sync: Whether to sum over all processes.
    """
    height, width = x.shape[2], x.shape[3]
    if torch.jit.is_scripting():
        weights = pair_weights(height, width, guard, kernels.device).to(kernels.dtype)
    else:
        weights = _pair_weights(height, width, guard, kernels.device, kernels.dtype)
    missing = (weights.shape[0] - kernels.shape[-1]) // 2
    weights = weights[missing : missing + kernels.shape[-1]]
    covariance = autocorrelation(x, centre, guard) / count
    variance, response = responses_to_ones(kernels, height, width, guard)
    variance = sum_over_processes(branch_energies(kernels * weights, covariance), sync) + centre.square() * variance
    return centre * response, variance


def track_statistics(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, count: Tensor, momentum: float
) -> None:
    """Moves the running statistics towards the batch's as ``nn.BatchNorm2d`` does."""
    if not torch.jit.is_scripting():
        # Gradient checkpointing recomputes the forward pass inside the backward pass: the batch was counted already.
        # A compiled graph has its own way of recomputing, which leaves buffers alone.
        if not torch.compiler.is_compiling() and is_in_backward_pass():
            return
    with torch.no_grad():
        unbiased = variance * (count / (count - 1).clamp(min=1))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad.contiguous())


def sum_over_processes(x: Tensor, sync: bool) -> Tensor:
    """Returns the sum of ``x`` over all processes if ``sync`` is set and there are several, else ``x``."""
    if not torch.jit.is_scripting():
        if sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return _AllReduce.apply(x)
    return x


# Weighted and added


@torch.fx.wrap
def decayed(alpha: Tensor, decay: float) -> Tensor:
    """Returns the branches' weights (N, C), each ``decay`` times weaker than the one before beside what it is."""
    alpha = at_least_float32(alpha)
    if decay == 1.0:
        return alpha
    power = -torch.arange(alpha.shape[0], device=alpha.device, dtype=alpha.dtype)
    return alpha * (decay**power).unsqueeze(1)


@torch.fx.wrap
def merge_kernels(kernels: Tensor, gain: Tensor) -> Tensor:
    """Returns the sum (C, 2·M − 1) of kernels (N, C, 2·M − 1), each times its gain (N, C)."""
    return product(gain.t().unsqueeze(1), kernels.transpose(0, 1)).squeeze(1)


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


def create_norm(
    kind: str, branches: int, channels: int, sync: bool = False, device: Any = None, dtype: Any = None
) -> nn.Module:
    """Returns the module that normalises a layer's branches.

    Args:
        kind: One of `NORMS`.
        branches: Number of branches N.
        channels: Number of channels C.
        sync: Whether "parseval" takes its statistics over all processes.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """
    if kind == "batch":
        return nn.BatchNorm2d(branches * channels, device=device, dtype=dtype)
    if kind == "parseval":
        return ParsevalNorm(branches, channels, sync, device=device, dtype=dtype)
    return KernelNorm() if kind == "kernel" else NoNorm()
