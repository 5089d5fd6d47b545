"""How many multiply-adds a model's forward pass takes, its FFTs included. Counts are those of fvcore.

fvcore counts one multiply-add, two arithmetic operations, as one. By the same rule here:

- A complex FFT of length n takes 5·n·log2(n) operations, the customary figure; one of real numbers half of that:
  1.25·n·log2(n) multiply-adds, in either direction.
- A product of two complex numbers takes six operations: 3 multiply-adds.
- A long convolution takes what the plain engine does: a transform of the images, of the kernel and back, and a product.
- Attention takes what its two matrix products take.

Elementwise operations on real numbers (activations, sums, layer scales), copies and paddings are not counted.
"""

import copy
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

with warnings.catch_warnings():
    # fvcore scripts a function of its own as it is imported.
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape

from .engines.plain import fft_length
from .grid import move_kernel

COMPLEX_PRODUCT = 3

# What fvcore has no count for and would warn about: elementwise or without arithmetic.
UNCOUNTED = (
    "add",
    "add_",
    "addcmul",
    "ceil",
    "div",
    "gather",
    "gelu",
    "index_add",
    "linalg_vector_norm",
    "mean",
    "mul",
    "neg",
    "pad",
    "reciprocal",
    "rsqrt",
    "rsub",
    "scatter_add",
    "softmax",
    "sub",
    "sum",
    "unflatten",
)


class Flops(NamedTuple):
    """Multiply-adds of a forward pass: ``per_pass + batch size · per_image``.

    ``per_pass`` is what depends on the weights alone, such as kernels and their transforms.
    """

    per_image: float
    per_pass: float


def count_flops(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> Flops:
    """Returns the multiply-adds of a forward pass in eval mode.

    The model is run on zeros, one image and then two: what the second adds is the price of an image.

    Args:
        model: Any model of images (B, C, H, W), not compiled. It is left as it is.
        input_size: Size (C, H, W) of an image.
    """
    model = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    one, two = (_count(model, torch.zeros(batch, *input_size, device=device)) for batch in (1, 2))
    return Flops(per_image=two - one, per_pass=2 * one - two)


def fft_flops(length: int) -> float:
    """Returns the multiply-adds of one FFT of ``length`` real numbers, or of its inverse."""
    return 1.25 * length * math.log2(length)


def _count(model: nn.Module, x: torch.Tensor) -> float:
    analysis = FlopCountAnalysis(model, x)
    analysis.set_op_handle(**{f"aten::{name}": None for name in UNCOUNTED})
    analysis.set_op_handle(
        **{
            "mrconvnext::convolve": _convolution,
            "aten::scaled_dot_product_attention": _attention,
        }
    )
    analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.unsupported_ops_warnings(len(x) == 1)  # once is enough
    return analysis.total()


def _convolution(inputs: list[Any], outputs: list[Any]) -> float:
    batch, channels, height, width = get_shape(inputs[0])
    kernels, lags = get_shape(inputs[1])
    row_stride, guard = inputs[3].toIValue(), inputs[4].toIValue()
    length = height * (width + guard)
    placed = move_kernel(torch.empty((1, lags), device="meta"), row_stride, width + guard, length - 1)
    n = fft_length(length + placed.shape[-1] // 2)
    transforms = batch * channels + kernels + batch * kernels
    return transforms * fft_flops(n) + COMPLEX_PRODUCT * batch * kernels * (n // 2 + 1)


def _attention(inputs: list[Any], outputs: list[Any]) -> float:
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
