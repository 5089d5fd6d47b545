"""Values that are computed from parameters and kept until these change: kernel spectra, folded weights.

And when they may be: in eager mode, or as operations of their own, without gradients.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# By the first of the parameters: values live no longer than it does, and no module has to carry, copy or save them.
_kept = WeakTensorKeyDictionary()


def derived(parameters: list[Tensor], key: Hashable, size: int, compute: Callable[[], Any]) -> Any:
    """Returns ``compute()``, or what it returned for this key if the parameters are still the same.

    An in-place update moves a parameter's version, a replaced parameter its identity, replaced data the address,
    which can't come back while the entry holds the old data.

    Args:
        parameters: What the value is computed from.
        key: What else it depends on.
        size: Number of keys that values are kept for.
        compute: Computes the value.
    """
    # They have no version. And what is made in inference mode could not be used outside of it later on.
    if any(p.is_inference() for p in parameters):
        return compute()
    entries = _kept.setdefault(parameters[0], {})
    state = [(p._version, p.data_ptr(), p.device, p.dtype) for p in parameters]
    entry = entries.pop(key, None)
    if entry is None or entry[0] != state or any(a() is not b for a, b in zip(entry[1], parameters)):
        with torch.inference_mode(False), torch.no_grad():
            entry = state, [weakref.ref(p) for p in parameters], [p.detach() for p in parameters], compute()
    entries[key] = entry
    while len(entries) > size:
        entries.pop(list(entries)[0], None)  # threads may do so at the same time
    return entry[-1]


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
    """Returns whether ``x`` is computed with right now, neither traced nor compiled."""
    # FX passes proxies, some other tools tensors of their own kind.
    return isinstance(x, Tensor) and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def is_compiled_for_inference() -> bool:
    """Returns whether ``torch.compile`` traces this call for a run without gradients, which operations have none of."""
    # A strict export is Dynamo's too, which under torch 2.9 and 2.10 can't be asked; the default export is not.
    return torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()


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
