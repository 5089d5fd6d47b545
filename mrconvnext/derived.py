"""Values that are computed from parameters and kept until these change: kernel spectra, folded weights."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn


class Derived:
    """The last few values derived from parameters. Copies and pickles of it are empty.

    Args:
        size: Number of values kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: dict[Hashable, tuple] = {}

    def get(self, key: Hashable, parameters: list[Tensor], compute: Callable[[], Any]) -> Any:
        """Returns ``compute()``, or what it returned for this key if the parameters are still the same.

        An in-place update moves a parameter's version, a replaced parameter its identity, replaced data the address,
        which can't come back while the entry holds the old data.
        """
        state = [(p._version, p.data_ptr(), p.device, p.dtype) for p in parameters]
        entry = self.entries.pop(key, None)
        if entry is None or entry[0] != state or any(a is not b for a, b in zip(entry[1], parameters)):
            # An inference tensor could not be used outside inference mode later on.
            with torch.inference_mode(False), torch.no_grad():
                entry = (state, parameters, [p.detach() for p in parameters], compute())
        self.entries[key] = entry
        if len(self.entries) > self.size:
            del self.entries[next(iter(self.entries))]
        return entry[-1]

    def __reduce__(self) -> tuple:
        return Derived, (self.size,)


class KeepsDerived(nn.Module):
    """A module with values ``_derived`` from its parameters, which ``train()``, ``eval()`` and ``to()`` drop."""

    # TorchScript would take it for an attribute of one fixed type.
    __jit_ignored_attributes__ = ["_derived"]

    def train(self, mode: bool = True) -> "KeepsDerived":
        self._derived.entries.clear()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> "KeepsDerived":
        self._derived.entries.clear()
        return super()._apply(fn, recurse)


def is_eager(x: Tensor) -> bool:
    """Returns whether ``x`` is computed with right now, neither traced nor compiled."""
    # FX passes proxies, some other tools tensors of their own kind.
    return isinstance(x, Tensor) and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def may_keep(x: Tensor, parameters: list[Tensor]) -> bool:
    """Returns whether values derived from ``parameters`` may be kept for calls like this one with ``x``."""
    if torch.is_grad_enabled() or type(x) is not Tensor or not is_eager(x):
        return False
    # Functional calls put plain tensors in the place of parameters; inference tensors have no version.
    return all(isinstance(p, nn.Parameter) and not p.is_inference() for p in parameters)
