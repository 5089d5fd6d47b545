"""The convolution of images and sequences with a kernel as long as they are, and what else takes all their positions.

A kernel is two-sided: (…, 2·M − 1) holds the lags −(M − 1) … M − 1, lag 0 in the middle, and
y[t] = Σ_s kernel[t − s] · u[s]. Its reach is M − 1, its largest lag. Images are sequences row by row, with ``guard``
zeros after each row; see `grid`.

`convolve` and `autocorrelation` carry all the cost of a layer. Each is one operation of `torch.library`: compilers,
transforms of functions and sharded training treat it as any other operation of PyTorch, and `engines` computes it.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import engines
from .checks import check_gradient, check_images, check_mean, check_sequences
from .engines import plain, real


@torch.compiler.assume_constant_result
def is_in_onnx_export() -> bool:
    """Returns whether an ONNX exporter runs this call; under Dynamo, which one of them uses, PyTorch's is False."""
    return torch.onnx.is_in_onnx_export()


@torch.fx.wrap
def check_not_onnx() -> None:
    """Raises if an ONNX exporter runs this call, of the training form."""
    if not torch.jit.is_scripting():
        if is_in_onnx_export():
            raise RuntimeError("the training form can't be exported to ONNX: reparameterize the model before")


@torch.fx.wrap
def convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    """Returns images convolved with a long kernel: y[t] = Σ_s kernel[t − s] · u[s] + bias over all pixels t and s.

    Computed in float32 (float64 if the images are), whatever autocast says. Differentiable, any number of times.

    Args:
        x: Images (B, C, H, W).
        kernel: Two-sided kernel (C, 2·M − 1), or N kernels a channel, (N · C, 2·M − 1), all of the first one first.
        bias: Bias (N · C).
        row_stride: Positions of a row, guard columns included, that the kernel was made for. For rows of another length
            the tap (dr, dc) stays what it is; lags that two pixels of such an image can't have are left out.
        guard: Columns of zeros between rows.

    Returns:
        Images (B, N · C, H, W) of ``x``'s dtype.
    """
    if torch.jit.is_scripting():
        return plain.convolve(x, kernel, bias, row_stride, guard)
    if is_in_onnx_export():  # whose files have no FFT, or a slow one
        return real.convolve(x, kernel, bias, row_stride, guard)
    return _apply(_Convolve, x, kernel, bias, row_stride, guard)


@torch.fx.wrap
def convolve_real(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    """Returns what `convolve` returns, by operations on real numbers alone, which every exporter has.

    For images up to a few thousand pixels: the arithmetic for a pixel grows with their sides.
    """
    return real.convolve(x, kernel, bias, row_stride, guard)


@torch.fx.wrap
def autocorrelation(x: Tensor, mean: Tensor, guard: int) -> Tensor:
    """Returns r[lag] = Σ_b Σ_t v[b, t] · v[b, t − lag] of images less their mean, for all lags from 0.

    Args:
        x: Images (B, C, H, W).
        mean: What is taken off each channel's pixels (C).
        guard: Columns of zeros between rows.

    Returns:
        The lags 0 … H·(W + guard) − 1, (C, H·(W + guard)), in float64.
    """
    if torch.jit.is_scripting():
        return plain.autocorrelation(x, mean, guard)
    return _apply(_Autocorrelation, x, mean, guard)


def long_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Returns y[t] = Σ_s kernel[t − s] · u[s] for every position t of sequences ``u``.

    Computed in float32 (float64 if ``u`` is), whatever autocast says.

    Args:
        u: Sequences (B, C, L).
        kernel: Two-sided kernel (C, 2·M − 1), lag 0 in the middle. M and L are independent.

    Returns:
        Sequences (B, C, L) of ``u``'s dtype.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If ``u`` is empty, the channels differ, or the kernel's length is even, so that it has no middle.
    """
    check_sequences(u, kernel)
    return convolve(u.unsqueeze(-1), kernel, None, row_stride=1, guard=0).squeeze(-1)


def long_conv_reference(u: Tensor, kernel: Tensor) -> Tensor:
    """Returns what `long_conv` returns, by the direct sum: the definition, in O(L·M) time and memory.

    Args:
        u: Sequences (B, C, L).
        kernel: Two-sided kernel (C, 2·M − 1), lag 0 in the middle.

    Returns:
        Sequences (B, C, L).

    Raises:
        TypeError: As `long_conv`.
        ValueError: As `long_conv`.
    """
    check_sequences(u, kernel)
    reach = kernel.shape[-1] // 2
    windows = F.pad(u, (reach, reach)).unfold(-1, kernel.shape[-1], 1)  # (B, C, L, 2M − 1): u[t − reach … t + reach]
    return (windows * kernel.flip(-1).unsqueeze(-2)).sum(-1)


@torch.fx.wrap
def branch_energies(kernels: Tensor, correlation: Tensor) -> Tensor:
    """Returns Σ_b Σ_t (kernel * v[b])[t]² over the full convolution with every kernel, without convolving.

    By Parseval's theorem the energy is Σ_f |K(f)|² P(f) at any FFT length that the full convolution fits into, K the
    kernel's spectrum and P the sequences' power spectrum.

    Args:
        kernels: Two-sided kernels (N, C, 2·M − 1).
        correlation: Autocorrelation of the sequences, lags 0 … L − 1, (C, L), in float64; see `autocorrelation`.

    Returns:
        The energies (N, C).
    """
    taps, length = kernels.shape[-1], correlation.shape[-1]
    n = plain.fft_length(taps + length - 1)
    spectrum = torch.view_as_real(plain.rfft(F.pad(kernels, (0, n - taps))))  # (N, C, n // 2 + 1, 2)
    power = 2 * plain.rfft(F.pad(correlation, (0, n - length))).real - correlation[:, :1]
    # Every frequency stands for its conjugate as well, but for the first and, as n is even, the last.
    share = torch.full((n // 2 + 1,), 2.0 / n, dtype=torch.float64, device=kernels.device)
    share[0] = share[-1] = 1.0 / n
    power = (power.clamp(min=0) * share).to(kernels.dtype)
    return (spectrum.square().sum(-1) * power).sum(-1)


# The operations


def _convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    check_images(x, kernel, bias, row_stride, guard)
    return engines.serving(x, kernel, bias).convolve(x, kernel, bias, row_stride, guard)


def _convolve_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, row_stride: int, guard: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients for the images, the kernel and the bias, by the output's gradient (B, N · C, H, W)."""
    check_images(x, kernel, None, row_stride, guard)
    check_gradient(grad, x, kernel)
    return engines.serving(grad, x, kernel).convolve_backward(grad, x, kernel, row_stride, guard)


def _autocorrelation(x: Tensor, mean: Tensor, guard: int) -> Tensor:
    check_mean(x, mean, guard)
    return engines.serving(x, mean).autocorrelation(x, mean, guard)


def _like_convolve(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
    return plain.empty_output(x, kernel.shape[0])


def _like_convolve_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, row_stride: int, guard: int
) -> tuple[Tensor, Tensor, Tensor]:
    inside = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel = kernel.new_empty(kernel.shape, dtype=inside)
    return plain.empty_output(x, x.shape[1]), kernel, kernel.new_empty(kernel.shape[:1])


def _like_autocorrelation(x: Tensor, mean: Tensor, guard: int) -> Tensor:
    return x.new_empty((x.shape[1], x.shape[2] * (x.shape[3] + guard)), dtype=torch.float64)


# Their gradients, and what torch.func makes of them


def _apply(operation: type[torch.autograd.Function], *args: Any) -> Any:
    """Calls an operation so that torch.func can transform it, but in graphs: there it is a node by its own name."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return operation.forward(*args)
    return operation.apply(*args)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> Tensor:
        return torch.ops.mrconvnext.convolve(x, kernel, bias, row_stride, guard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, kernel, bias, *ctx.layout = inputs
        ctx.save_for_backward(x, kernel)
        ctx.save_for_forward(x, kernel)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, kernel = ctx.saved_tensors
        grad_x, grad_kernel, grad_bias = _apply(_ConvolveBackward, grad, x, kernel, *ctx.layout)
        bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_kernel.to(kernel.dtype), bias, None, None

    @staticmethod
    def jvp(
        ctx: Any, on_x: Optional[Tensor], on_kernel: Optional[Tensor], on_bias: Optional[Tensor], *_: None
    ) -> Tensor:
        x, kernel = ctx.saved_tensors
        y = convolve(torch.zeros_like(x) if on_x is None else on_x, kernel, on_bias, *ctx.layout)
        return y if on_kernel is None else y + convolve(x, on_kernel, None, *ctx.layout)

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, kernel: Tensor, bias: Optional[Tensor], *layout: int) -> tuple:
        if dims[1] is None and dims[2] is None:
            x = x.movedim(dims[0], 0)
            return convolve(x.flatten(0, 1), kernel, bias, *layout).unflatten(0, x.shape[:2]), 0
        branches = _branches(dims, x, kernel)
        x = _into_channels(x, dims[0], info.batch_size, 1)
        kernel = _into_channels(kernel, dims[1], info.batch_size, 0, branches)
        bias = None if bias is None else _into_channels(bias, dims[2], info.batch_size, 0, branches)
        return _out_of_channels(convolve(x, kernel, bias, *layout), info.batch_size, 1, branches), 0


class _ConvolveBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, kernel: Tensor, row_stride: int, guard: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mrconvnext.convolve_backward(grad, x, kernel, row_stride, guard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        tensors, ctx.layout = inputs[:3], inputs[3:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, on_x: Tensor, on_kernel: Tensor, on_bias: Tensor) -> tuple:
        """Of ⟨on_x, grad_x⟩ + ⟨on_kernel, grad_kernel⟩ + ⟨on_bias, grad_bias⟩: each is a convolution or a gradient."""
        grad, x, kernel = ctx.saved_tensors
        on_x, on_kernel, on_bias = on_x.to(x.dtype), on_kernel.to(kernel.dtype), on_bias.to(kernel.dtype)
        for_grad = convolve(on_x, kernel, on_bias, *ctx.layout) + convolve(x, on_kernel, None, *ctx.layout)
        for_x = _apply(_ConvolveBackward, grad, x, on_kernel, *ctx.layout)[0]
        for_kernel = _apply(_ConvolveBackward, grad, on_x, kernel, *ctx.layout)[1]
        return for_grad, for_x, for_kernel.to(kernel.dtype), None, None

    @staticmethod
    def jvp(
        ctx: Any, on_grad: Optional[Tensor], on_x: Optional[Tensor], on_kernel: Optional[Tensor], *_: None
    ) -> tuple:
        grad, x, kernel = ctx.saved_tensors
        on_grad = torch.zeros_like(grad) if on_grad is None else on_grad
        grad_x, grad_kernel, grad_bias = _apply(_ConvolveBackward, on_grad, x, kernel, *ctx.layout)
        if on_kernel is not None:
            grad_x = grad_x + _apply(_ConvolveBackward, grad, x, on_kernel, *ctx.layout)[0]
        if on_x is not None:
            grad_kernel = grad_kernel + _apply(_ConvolveBackward, grad, on_x, kernel, *ctx.layout)[1]
        return grad_x, grad_kernel, grad_bias

    @staticmethod
    def vmap(info: Any, dims: tuple, grad: Tensor, x: Tensor, kernel: Tensor, *layout: int) -> tuple:
        branches = _branches(dims[1:], x, kernel)
        grad = _into_channels(grad, dims[0], info.batch_size, 1, branches)
        x = _into_channels(x, dims[1], info.batch_size, 1)
        kernel = _into_channels(kernel, dims[2], info.batch_size, 0, branches)
        grad_x, grad_kernel, grad_bias = _apply(_ConvolveBackward, grad, x, kernel, *layout)
        grad_x = _out_of_channels(grad_x, info.batch_size, 1)
        grad_kernel = _out_of_channels(grad_kernel, info.batch_size, 0, branches)
        return (grad_x, grad_kernel, _out_of_channels(grad_bias, info.batch_size, 0, branches)), (0, 0, 0)


class _Autocorrelation(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mean: Tensor, guard: int) -> Tensor:
        return torch.ops.mrconvnext.autocorrelation(x, mean, guard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mean, ctx.guard = inputs
        ctx.save_for_backward(x, mean)
        ctx.save_for_forward(x, mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """The autocorrelation is quadratic in the images: its gradient is their convolution with what comes back."""
        x, mean = ctx.saved_tensors
        grad = grad.to(plain.at_least_float32(x).dtype)
        kernel = torch.cat([grad.flip(-1), grad[:, 1:]], -1)
        kernel = kernel + F.pad(grad[:, :1], (grad.shape[1] - 1, grad.shape[1] - 1))
        deviation = plain.at_least_float32(x) - mean.unsqueeze(-1).unsqueeze(-1)
        grad_x = convolve(deviation, kernel, None, x.shape[3] + ctx.guard, ctx.guard)
        return grad_x.to(x.dtype), -grad_x.sum((0, 2, 3)).to(mean.dtype), None

    @staticmethod
    def jvp(ctx: Any, on_x: Optional[Tensor], on_mean: Optional[Tensor], _: None) -> Tensor:
        x, mean = ctx.saved_tensors
        deviation = plain.at_least_float32(x) - mean.unsqueeze(-1).unsqueeze(-1)
        change = torch.zeros_like(deviation) if on_x is None else on_x.to(deviation.dtype)
        if on_mean is not None:
            change = change - on_mean.unsqueeze(-1).unsqueeze(-1)
        length = x.shape[2] * (x.shape[3] + ctx.guard)
        lags = deviation.new_zeros((x.shape[1], 2 * length - 1))
        layout = x.shape[3] + ctx.guard, ctx.guard
        both = _apply(_ConvolveBackward, change, deviation, lags, *layout)[1]  # the correlation of one with the other
        return (both + both.flip(-1))[:, length - 1 :].to(torch.float64)

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, mean: Tensor, guard: int) -> tuple:
        x = _into_channels(x, dims[0], info.batch_size, 1)
        mean = _into_channels(mean, dims[1], info.batch_size, 0)
        return _out_of_channels(autocorrelation(x, mean, guard), info.batch_size, 0), 0


def _branches(dims: tuple, x: Tensor, kernel: Tensor) -> int:
    """Returns how many kernels a channel has, of images and kernels with a mapped dimension or none."""
    channels = x.shape[1] if dims[0] is None else x.movedim(dims[0], 0).shape[2]
    kernels = kernel.shape[0] if dims[1] is None else kernel.movedim(dims[1], 0).shape[1]
    return kernels // channels


def _into_channels(x: Tensor, dim: Optional[int], size: int, at: int, branches: int = 1) -> Tensor:
    """Returns a tensor whose mapped dimension, if any, has become the slower part of its channels: those of ``at``."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.unflatten(at + 1, (branches, -1)).movedim(0, at + 1).flatten(at, at + 2)


def _out_of_channels(x: Tensor, size: int, at: int, branches: int = 1) -> Tensor:
    """Undoes `_into_channels`: the mapped dimension is the first one."""
    return x.unflatten(at, (branches, size, -1)).movedim(at + 1, 0).flatten(at + 1, at + 2)


def _define(schema: str, compute: Any, like: Any, operation: type[torch.autograd.Function]) -> None:
    """Makes a function an operation ``torch.ops.mrconvnext.NAME`` of that schema; ``like`` gives its output's shape."""
    name = f"mrconvnext::{schema.partition('(')[0]}"
    torch.library.define(name, schema.removeprefix(schema.partition("(")[0]))
    torch.library.impl(name, "default", compute)
    torch.library.register_fake(name, like)
    torch.library.register_autograd(name, operation.backward, setup_context=operation.setup_context)
    torch.library.register_vmap(name, operation.vmap)


_define(
    "convolve(Tensor x, Tensor kernel, Tensor? bias, SymInt row_stride, int guard) -> Tensor",
    _convolve,
    _like_convolve,
    _Convolve,
)
_define(
    "convolve_backward(Tensor grad, Tensor x, Tensor kernel, SymInt row_stride, int guard) -> (Tensor, Tensor, Tensor)",
    _convolve_backward,
    _like_convolve_backward,
    _ConvolveBackward,
)
_define(
    "autocorrelation(Tensor x, Tensor mean, int guard) -> Tensor",
    _autocorrelation,
    _like_autocorrelation,
    _Autocorrelation,
)
