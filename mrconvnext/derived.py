"""Values that are computed from parameters and kept until these change: kernel spectra, folded weights.

And when they may be: in eager mode, or as operations of their own, without gradients.
"""

import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

# By the first of the parameters: values live no longer than it does, and no module has to carry, copy or save them.
_kept = WeakTensorKeyDictionary()

# Some optimizers' steps, the fused ones', move no version.
register_optimizer_step_post_hook(lambda *_: _kept.clear())


class _Entry(NamedTuple):
    state: list[tuple]
    identity: list[weakref.ref]
    data: list[Tensor]  # held so that its address can't come back
    value: Any


def derived(parameters: list[Tensor], key: Hashable, keys: int, compute: Callable[[], Any]) -> Any:
    """Returns ``compute()``, or what it returned for this key if the parameters are still the same.

    An in-place update moves a parameter's version, a replaced parameter its identity, replaced data the address. All
    values are dropped when an optimizer takes a step.

    Args:
        parameters: What the value is computed from.
        key: What else it depends on.
        keys: Number of keys that values are kept for.
        compute: Computes the value.
    """
    # They have no version. And what is made in inference mode could not be used outside of it later on.
    if any(p.is_inference() for p in parameters):
        return compute()
    entries = _kept.setdefault(parameters[0], {})
    state = [(p._version, p.data_ptr(), p.device, p.dtype) for p in parameters]
    entry = entries.pop(key, None)
    if entry is None or entry.state != state or any(a() is not b for a, b in zip(entry.identity, parameters)):
        with torch.inference_mode(False), torch.no_grad():
            identity, data = [weakref.ref(p) for p in parameters], [p.detach() for p in parameters]
            entry = _Entry(state, identity, data, compute())
    entries[key] = entry
    while len(entries) > keys:
        entries.pop(list(entries)[0], None)  # threads may do so at the same time
    return entry.value


def derived_count(parameter: Tensor) -> int:
    """Returns the number of values kept that were derived from ``parameter``, the first of their parameters."""
    return len(_kept.get(parameter, ()))


class DropsDerived(nn.Module):
    """A module whose ``train()``, ``eval()`` and ``to()`` drop what was derived from its parameters."""

    def _drop_derived(self) -> None:
        for parameter in self.parameters():
            _kept.pop(parameter, None)

    def train(self, mode: bool = True) -> "DropsDerived":
        self._drop_derived()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> "DropsDerived":
        self._drop_derived()
        return super()._apply(fn, recurse)


def is_eager(x: Tensor) -> bool:
    """Returns whether ``x`` is computed with right now: neither traced, compiled nor transformed as by torch.func."""
    # FX passes proxies, some other tools tensors of their own kind.
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # Transforms of functions, and tangents of forward-mode differentiation.
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def is_compiled_for_inference() -> bool:
    """Returns whether ``torch.compile`` traces this call for a run without gradients, which operations have none of."""
    # A strict export is Dynamo's too, which under torch 2.9 and 2.10 can't be asked; the default export is not.
    return torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()


def is_traced_for_onnx() -> bool:
    """Returns whether the ONNX exporter that traces, not the one of torch.export, runs this call."""
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def outside_of_trace(compute: Callable[[], Any]) -> Any:
    """Returns ``compute()``, computed without gradients and unseen by a trace: each thread has a trace of its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.no_grad()(compute)).result()


def define_operation(name: str, schema: str, function: Callable, output: Callable) -> None:
    """Makes a function one operation for ``torch.compile``: it uses derived values, and code that has to stay eager.

    A definition by schema has the least cost in a call.

    Args:
        name: Name of the operation in ``torch.ops.mrconvnext``.
        schema: Its arguments.
        function: What it does. Without gradients.
        output: Returns an empty tensor like the function's result.
    """
    name = f"mrconvnext::{name}"
    torch.library.define(name, schema)
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, output)


def is_ordinary(x: Tensor, parameters: list[Tensor]) -> bool:
    """Returns whether ``x`` and ``parameters`` are plain tensors and parameters, in eager mode."""
    # Functional calls put tensors of other kinds in the place of parameters; what is derived from those made in
    # inference mode can't be kept.
    return (
        type(x) is Tensor
        and is_eager(x)
        and all(isinstance(p, nn.Parameter) and not p.is_inference() for p in parameters)
    )
