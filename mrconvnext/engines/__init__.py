"""Which engine computes the operations of `longconv` on which tensor.

An engine is a module with ``convolve``, ``convolve_backward`` and ``autocorrelation``. `plain` is the definition, for
any device; the others equal it, and are faster on some.
"""

from types import ModuleType, TracebackType
from typing import Optional

from torch import Tensor

from . import cpu, cuda, plain

NAMES = ("auto", "plain")

_chosen = "auto"


class engine:
    """Chooses the engine of all layers, from now on or, in a ``with`` statement, until its end; says which is in use.

    Args:
        name: "auto", the fastest for each tensor; "plain", PyTorch's FFTs alone; or none, what is in use already.
            ``str(engine())`` says what that is and why.

    Raises:
        ValueError: If there is no such engine.
    """

    def __init__(self, name: Optional[str] = None) -> None:
        global _chosen
        if name is not None and name not in NAMES:
            raise ValueError(f"engine must be one of {', '.join(NAMES)}, got {name!r}")
        self._before, _chosen = _chosen, name or _chosen

    def __enter__(self) -> "engine":
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        global _chosen
        _chosen = self._before

    def __repr__(self) -> str:
        if _chosen == "plain":
            return "plain: PyTorch's FFTs"
        return f"auto: on CPUs {cpu.library().description}; on GPUs {cuda.description()}; elsewhere plain"


def chosen() -> str:
    """Returns the name of the engine that is in use, one of `NAMES`."""
    return _chosen


def serving(*tensors: Optional[Tensor]) -> ModuleType:
    """Returns the engine that computes on such tensors."""
    if _chosen == "auto":
        for module in (cpu, cuda):
            if module.can_serve(*tensors):
                return module
    return plain
