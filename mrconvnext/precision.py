"""The precision that kernels and FFTs are computed in: float32, or float64 for float64, whatever autocast says."""

import contextlib
from typing import Any, Optional

import torch
from torch import Tensor


@torch.fx.wrap
def at_least_float32(x: Tensor) -> Tensor:
    """Returns ``x`` in float32, or unchanged if it is float64: the precision that kernels and FFTs are computed in."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


# Devices on which convolutions take images in the type of autocast.
HALVED = ("cuda",)


@torch.fx.wrap
def as_autocast(x: Tensor) -> Tensor:
    """Returns images on a GPU in the type that autocast gives those of PyTorch's convolutions."""
    if not torch.jit.is_scripting():
        kind = x.device.type
        if kind in HALVED and torch.is_autocast_enabled(kind) and x.dtype == torch.float32:
            return x.to(torch.get_autocast_dtype(kind))
    return x


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Returns a context in which products of tensors like ``x`` are taken in their own precision."""
    kind = x.device.type
    # Dynamo of torch 2.9 can't ask which devices have an autocast; all that it compiles for do.
    if torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class _Product(torch.autograd.Function):
    """``torch.bmm`` in the precision of its arguments, in the backward pass as well, whatever autocast says there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        a, b = ctx.saved_tensors
        for_a, for_b = ctx.needs_input_grad
        return product(grad, b.mT) if for_a else None, product(a.mT, grad) if for_b else None


class _ForwardProduct(_Product):
    """The same, with tangents, which Dynamo knows of no function that has its own."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, on_a: Optional[Tensor], on_b: Optional[Tensor]) -> Tensor:
        a, b = ctx.saved_tensors
        by_a = product(torch.zeros_like(a) if on_a is None else on_a, b)
        return by_a if on_b is None else by_a + product(a, on_b)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns the products of matrices (n, i, j) and (n, j, k), computed in their own precision under autocast too."""
    if torch.jit.is_scripting():
        return torch.bmm(a, b)
    if torch.jit.is_tracing():  # which can't be saved with a function of Python's
        with without_autocast(a):
            return torch.bmm(a, b)
    else:
        return (_Product if torch.compiler.is_compiling() else _ForwardProduct).apply(a, b)
