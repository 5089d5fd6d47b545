"""How many multiply-adds a model's forward pass takes, its FFTs included. Counts are those of fvcore.

fvcore counts one multiply-add, two arithmetic operations, as one. By the same rule here:

- A complex FFT of length n takes 5·n·log2(n) operations, the customary figure; one of real numbers half of that:
  1.25·n·log2(n) multiply-adds, in either direction.
- A product of two complex numbers takes six operations: 3 multiply-adds.
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

COMPLEX_PRODUCT = 3

# What fvcore has no count for and would warn about: elementwise or without arithmetic.
UNCOUNTED = (
    "add",
    "add_",
    "ceil",
    "div",
    "flip",
    "gelu",
    "mean",
    "neg",
    "pad",
    "reshape_as",
    "rsqrt",
    "rsub",
    "scatter",
    "softmax",
    "sub",
    "sum",
    "unflatten",
    "view_as_complex",
)


class Flops(NamedTuple):
    """Multiply-adds of a forward pass: ``per_pass + batch size · per_image``.

    ``per_pass`` is what depends on the weights alone, such as kernels and their transforms. A deployed layer pays it
    once and keeps the result while gradients are off.
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
    # Without parameters that require gradients no autograd function stands between the tracer and the FFTs.
    model = copy.deepcopy(model).eval().requires_grad_(False)
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
            "aten::fft_rfft": _rfft,
            "aten::fft_irfft": _irfft,
            "aten::mul": _product,
            "aten::mul_": _product,
            "aten::scaled_dot_product_attention": _attention,
        }
    )
    # A layer calls functions of its parts, not the parts: fvcore would take these for unused.
    analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.unsupported_ops_warnings(len(x) == 1)  # once is enough
    return analysis.total()


def _rfft(inputs: list[Any], outputs: list[Any]) -> float:
    *rows, bins = get_shape(outputs[0])
    # The trace does not tell the length. It is even, as those of all our convolutions are, or one more than this.
    return math.prod(rows) * fft_flops(2 * (bins - 1))


def _irfft(inputs: list[Any], outputs: list[Any]) -> float:
    *rows, length = get_shape(outputs[0])
    return math.prod(rows) * fft_flops(length)


def _product(inputs: list[Any], outputs: list[Any]) -> float:
    if not all(_is_complex(value) for value in inputs):
        return 0
    return COMPLEX_PRODUCT * math.prod(get_shape(outputs[0]))


def _is_complex(value: Any) -> bool:
    return get_shape(value) is not None and value.type().dtype().is_complex


def _attention(inputs: list[Any], outputs: list[Any]) -> float:
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
