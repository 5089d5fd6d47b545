"""Prints how far the programs for GPUs are from the plain engine in float64, in Triton's interpreter, on the CPU.

    python scripts/triton_errors.py

For the feature maps of 224, 256, 288 and 97×161 px, in each precision that a GPU multiplies matrices in: "ieee" is
float32; "tf32" keeps 10 bits of the factors, as is imitated here; "tf32x3" makes up for that by two products more.
Errors are relative to the largest value, of the output, the gradients for images, kernel and bias, and the
autocorrelation.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from mrconvnext.engines import cuda, plain  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Feature maps of the four stages at 224, 256, 288 and 97×161 px.
MAPS = [(n // 2**i, n // 2**i) for n in (56, 64, 72) for i in range(4)] + [(24, 40), (12, 20), (6, 10), (3, 5)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.cpu().double() - expected).abs().max() / expected.abs().max()).item()


class Case:
    """Random images, kernels and gradients, and what the plain engine makes of them in float64."""

    def __init__(
        self, height: int, width: int, guard: int = 3, branches: int = 1, channels: int = 2, images: int = 2
    ) -> None:
        self.guard, self.row_stride = guard, width + guard
        self.x = torch.randn(images, channels, height, width, dtype=torch.float64)
        lags = 2 * height * (width + guard) - 1
        self.kernel = torch.randn(branches * channels, lags, dtype=torch.float64) / lags**0.5
        self.bias = torch.randn(branches * channels, dtype=torch.float64)
        self.grad = torch.randn(images, branches * channels, height, width, dtype=torch.float64)

    def outputs(self, engine: Any, convert: Callable[[Tensor], Tensor], kernel_dtype: torch.dtype) -> list[Tensor]:
        x, grad = convert(self.x), convert(self.grad)
        kernel, bias = (tensor.to(x.device, kernel_dtype) for tensor in (self.kernel, self.bias))
        layout = (self.row_stride, self.guard)
        mean = self.x.mean((0, 2, 3)).to(x.device, kernel_dtype)
        return [
            engine.convolve(x, kernel, bias, *layout),
            *engine.convolve_backward(grad, x, kernel, *layout),
            engine.autocorrelation(x, mean, self.guard),
        ]

    def errors(self, dtype: torch.dtype = torch.float32, last: bool = True) -> list[float]:
        order = torch.channels_last if last else torch.contiguous_format
        found = self.outputs(cuda, lambda x: x.to(DEVICE, dtype, memory_format=order), torch.float32)
        # What the images lose by their type is not the engine's.
        expected = self.outputs(plain, lambda x: x.to(dtype).double(), torch.float64)
        assert found[0].dtype == found[1].dtype == dtype
        if last and min(self.x.shape[1:]) > 1:
            assert found[0].is_contiguous(memory_format=order) and found[1].is_contiguous(memory_format=order)
        return [relative_error(*pair) for pair in zip(found, expected)]


@contextlib.contextmanager
def multiplying_by(precision: str) -> Iterator[None]:
    """Has Triton's interpreter multiply matrices as a GPU would."""
    exact = InterpreterBuilder.create_dot

    def rounded(builder: Any, a: Any, b: Any, start: Any, *args: Any) -> Any:
        factors = a.data, b.data
        (high_a, low_a), (high_b, low_b) = (_split(factor) for factor in factors)
        pairs = [(high_a, high_b), (high_a, low_b), (low_a, high_b)]
        for pair in pairs[: 3 if precision == "tf32x3" else 1]:
            a.data, b.data = pair
            start = exact(builder, a, b, start, *args)
        a.data, b.data = factors
        return start

    with (
        contextlib.nullcontext()
        if precision == "ieee"
        else mock.patch.object(InterpreterBuilder, "create_dot", rounded)
    ):
        yield


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers rounded to 10 bits and what is left of them, rounded likewise."""
    high = _rounded(x)
    return high, _rounded(x - high)


def _rounded(x: np.ndarray) -> np.ndarray:
    return ((x.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def main() -> None:
    torch.manual_seed(0)
    print("| map | precision | output | for images | for kernel | for bias | autocorrelation |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for height, width in MAPS:
        case = Case(height, width)
        for precision in ("ieee", "tf32x3", "tf32"):
            with multiplying_by(precision):
                errors = " | ".join(f"{error:.1e}" for error in case.errors())
            print(f"| {height}×{width} | {precision} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
