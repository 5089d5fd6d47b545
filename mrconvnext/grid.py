"""How an image becomes a sequence and back, how a kernel moves to an image of another size, and their convolution.

Rows are laid out one after the other, each followed by ``guard`` columns of zeros, so that a row takes
``stride = width + guard`` positions and the tap (dr, dc) of a 2D kernel is the lag dr·stride + dc. A tap with
|dc| ≤ guard then never reaches from one row into another. Seen this way a two-sided kernel is a map of lags
(rows, stride), its rows ``stride`` lags long and centred on column 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .derived import is_eager
from .kernels import at_least_float32
from .longconv import autocorrelation, convolve_spectrum, crop_lags, fft_length, long_conv, spectrum


def to_sequence(x: Tensor, guard: int) -> Tensor:
    """Returns images (B, C, H, W) as sequences (B, C, H·(W + guard)), zeros in the guard columns."""
    return F.pad(x, (0, guard)).flatten(2)


def to_image(u: Tensor, height: int, guard: int) -> Tensor:
    """Returns sequences (B, C, height·(W + guard)) as images (B, C, height, W): `to_sequence` undone."""
    rows = u.unflatten(2, (height, u.shape[2] // height))
    return rows[..., : rows.shape[3] - guard]


def lag_map(kernel: Tensor, stride: int) -> Tensor:
    """Returns a two-sided kernel (…, 2·M − 1) as rows of ``stride`` lags, (…, 2·R + 1, stride).

    Row R holds the lags −(stride // 2) … stride − stride // 2 − 1; lags beyond the kernel's are zero.
    """
    reach = kernel.shape[-1] // 2
    rows = (reach + stride // 2) // stride
    before = rows * stride + stride // 2 - reach
    after = (2 * rows + 1) * stride - kernel.shape[-1] - before
    return F.pad(kernel, (before, after)).unflatten(-1, (2 * rows + 1, stride))


def from_lag_map(lags: Tensor, stride: int) -> Tensor:
    """Returns the two-sided kernel of a lag map (…, 2·R + 1, columns), its columns padded or cropped to ``stride``.

    Column ``columns // 2`` of the map is dc = 0. No interpolation: the tap (dr, dc) becomes the lag dr·stride + dc.
    """
    columns = lags.shape[-1]
    before = stride // 2 - columns // 2
    kernel = F.pad(lags, (before, stride - columns - before)).flatten(-2)
    # An even stride has one more column before the centre than behind it.
    return F.pad(kernel, (0, 1 - stride % 2))


def restride(kernel: Tensor, old: int, new: int) -> Tensor:
    """Returns a two-sided kernel for images with row stride ``old`` as one for row stride ``new``.

    Args:
        kernel: Two-sided kernel (…, 2·M − 1).
        old: Row stride that the kernel was made for.
        new: Row stride of the image that it is to be used on.

    Returns:
        Two-sided kernel; its length is as the rows need.
    """
    if old == new:
        return kernel
    return from_lag_map(lag_map(kernel, old), new)


def local_kernel(weight: Tensor, dilation: int, stride: int) -> Tensor:
    """Returns the two-sided kernel (C, …) that acts as a zero-padded depthwise 2D convolution does.

    Args:
        weight: Weight (C, 1, k, k) of a depthwise ``Conv2d``, k odd.
        dilation: Distance of its taps in pixels.
        stride: Row stride, with a guard of at least ``dilation · (k // 2)`` columns.
    """
    taps = weight.squeeze(1).flip(1, 2)  # conv2d correlates, long_conv convolves
    size = dilation * (weight.shape[-1] - 1) + 1
    lags = taps.new_zeros((taps.shape[0], size, size))
    lags[:, ::dilation, ::dilation] = taps
    return from_lag_map(lags, stride)


def place_kernel(kernel: Tensor, row_stride: int, x: Tensor, guard: int) -> Tensor:
    """Returns a kernel made for row stride ``row_stride`` for images like ``x``, cut to the lags between two pixels."""
    stride = x.shape[3] + guard
    return crop_lags(restride(kernel, row_stride, stride), x.shape[2] * stride)


def place_taps(weight: Tensor, dilation: int, x: Tensor, guard: int) -> Tensor:
    """Returns the kernel of k×k taps (C, 1, k, k) for images like ``x``."""
    stride = x.shape[3] + guard
    return crop_lags(local_kernel(at_least_float32(weight), dilation, stride), x.shape[2] * stride)


def pair_weights(x: Tensor, guard: int) -> Tensor:
    """Returns for every lag the root of the share of pixels that have a pixel there, (2·L − 1), in float64.

    With white noise on the pixels a kernel times these weights has the energy in its full convolution that the kernel
    has on the pixels: the square at a lag counts once for each pair of pixels that far apart.
    """
    image = torch.ones((1, 1, x.shape[2], x.shape[3]), dtype=torch.float64, device=x.device)
    n, length = image_fft_length(x, guard), x.shape[2] * (x.shape[3] + guard)
    pairs = autocorrelation(spectrum(to_sequence(image, guard), n), n, length)[0].round()
    return (torch.cat([pairs[1:].flip(0), pairs]) / pairs[0]).sqrt()


def responses_to_ones(kernels: list[Tensor], x: Tensor, guard: int) -> tuple[Tensor, Tensor]:
    """Returns variance and mean over the pixels, (kernels, C), of what kernels make of an image of ones.

    Args:
        kernels: Two-sided kernels (C, 2·M − 1), placed for images like ``x``.
        x: Images (B, C, H, W).
        guard: Columns of zeros between rows.
    """
    variances: list[Tensor] = []
    means: list[Tensor] = []
    for kernel in kernels:
        variance, mean = _response_to_ones(kernel, x.shape[2], x.shape[3], guard)
        variances.append(variance)
        means.append(mean)
    return torch.stack(variances), torch.stack(means)


def _response_to_ones(kernel: Tensor, height: int, width: int, guard: int) -> tuple[Tensor, Tensor]:
    if not torch.jit.is_scripting():
        if is_eager(kernel):
            return _ResponseToOnes.apply(kernel, height, width, guard)
    return _moments_of_response(kernel, height, width, guard)


def _moments_of_response(kernel: Tensor, height: int, width: int, guard: int) -> tuple[Tensor, Tensor]:
    """Sums W lags, and H rows of those. Rows from which a short kernel reaches no edge are alike: one is computed."""
    stride = width + guard
    rows = min(height, 2 * ((kernel.shape[-1] // 2 + width - 1) // stride) + 1)
    kernel = crop_lags(kernel, rows * stride - guard)
    missing = rows * stride - guard - 1 - kernel.shape[-1] // 2
    sums = _moving_sum(kernel, width, missing, missing + guard).unflatten(-1, (2 * rows - 1, stride))
    response = _moving_sum(sums[..., :width].transpose(1, 2), rows)  # (C, W, rows)
    counts = torch.ones(rows, dtype=kernel.dtype, device=kernel.device)
    counts[rows // 2] += height - rows
    mean = (response.sum(1) * counts).sum(-1) / (height * width)
    squares = (response - mean[:, None, None]).square()
    return (squares.sum(1) * counts).sum(-1) / (height * width), mean


class _ResponseToOnes(torch.autograd.Function):
    """`_moments_of_response`, computed again for the backward pass: responses take as much as images do."""

    @staticmethod
    def forward(ctx, kernel: Tensor, height: int, width: int, guard: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kernel)
        ctx.size = height, width, guard
        return _moments_of_response(kernel, height, width, guard)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        kernel = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            moments = _moments_of_response(kernel, *ctx.size)
        return *torch.autograd.grad(moments, kernel, grads), None, None, None


def _moving_sum(x: Tensor, count: int, before: int = 0, after: int = 0) -> Tensor:
    """Returns the sums of every ``count`` neighbours in the last dimension, with zeros ``before`` and ``after`` it."""
    sums = F.pad(x, (before + 1, after)).cumsum(-1)
    return sums[..., count:] - sums[..., :-count]


def image_fft_length(x: Tensor, guard: int) -> int:
    """Returns an FFT length for images like ``x`` and kernels of any reach."""
    return fft_length(2 * x.shape[2] * (x.shape[3] + guard) - 1)


def convolve_image(u_spectrum: Tensor, kernel: Tensor, n: int, x: Tensor, guard: int) -> Tensor:
    """Returns the image, of ``x``'s size, that a kernel makes of the sequence with spectrum ``u_spectrum``."""
    length = x.shape[2] * (x.shape[3] + guard)
    return to_image(convolve_spectrum(u_spectrum, kernel, n, length), x.shape[2], guard)


def long_conv_image(x: Tensor, kernel: Tensor, guard: int) -> Tensor:
    """Returns images ``x`` convolved with a kernel that was placed for their size."""
    return to_image(long_conv(to_sequence(x, guard), kernel), x.shape[2], guard)
