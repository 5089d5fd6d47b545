"""Tensors that depend on sizes alone, such as bases and indices: made once for a device and dtype, then kept."""

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# Of each function. A model has four sizes of layers; a run may have several sizes of images.
KEPT = 32


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function that makes a tensor of hashable arguments, and keeps it for the next call with the same.

    Nothing is kept of what is no more than a stand-in for a tensor: of graphs that are compiled or exported, or of
    shapes alone. What is kept must not be written to.

    Args:
        make: Makes the tensor. It must not depend on anything else, least of all on weights.
    """
    kept: OrderedDict[tuple, Tensor] = OrderedDict()

    @functools.wraps(make)
    def get(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return make(*args)
        is_traced = torch.jit.is_tracing()
        if is_traced:
            args = tuple(_as_number(arg) if isinstance(arg, Tensor) else arg for arg in args)
        found = kept.pop(args, None)
        if found is None:
            found = None if is_traced else _make(make, args)
            if found is None or is_wrapped(found):
                # Traces, and transforms of functions, are those of a thread.
                with ThreadPoolExecutor(1) as thread:
                    found = thread.submit(_make, make, args).result()
        if type(found) is Tensor:
            kept[args] = found
            if len(kept) > KEPT:
                kept.popitem(last=False)
        return found

    return get


def _make(make: Callable[..., Tensor], args: tuple) -> Tensor:
    # Made outside of inference mode and autocast, whose tensors could not be used elsewhere.
    with torch.inference_mode(False), torch.no_grad():
        return make(*args)


def is_wrapped(x: Tensor) -> bool:
    """Returns whether a tensor is what a transform of torch.func makes of one."""
    try:
        x.untyped_storage()
    except NotImplementedError:
        return True
    return False


def shape_of(x: Tensor) -> list[int]:
    """Returns the sizes of a tensor as numbers. In a trace they are tensors, and what is computed of them is traced."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            return [_as_number(size) for size in x.shape]
    return list(x.shape)


def _as_number(size: Any) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(size)
