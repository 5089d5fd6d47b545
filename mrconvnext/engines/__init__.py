"""Which engine computes the operations of `longconv` on which tensor.

An engine is a module with ``convolve``, ``convolve_backward`` and ``autocorrelation``. `plain` is the definition, for
any device; the others equal it, and are faster on some.
"""

from types import ModuleType, TracebackType
from typing import Optional

from torch import Tensor

from . import cpu, plain

NAMES = ("auto", "plain")

_chosen = "auto"


class engine:
    """Chooses the engine of all layers, from now on or, in a ``with`` statement, until its end.

    Args:
        name: "auto", the fastest for each tensor; or "plain", PyTorch's FFTs alone.

    Raises:
        ValueError: If there is no such engine.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in NAMES:
            raise ValueError(f"engine must be one of {', '.join(NAMES)}, got {name!r}")
        self._before, _chosen = _chosen, name

    def __enter__(self) -> "engine":
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        global _chosen
        _chosen = self._before


def chosen() -> str:
    """Returns the name of the engine that is in use, one of `NAMES`."""
    return _chosen


def serving(x: Tensor) -> ModuleType:
    """Returns the engine that computes on tensors like ``x``."""
    return cpu if _chosen == "auto" and x.device.type == "cpu" else plain
