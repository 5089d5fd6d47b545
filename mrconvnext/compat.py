"""What this package takes from PyTorch that is not public there. Without it the package computes the same."""

import torch
from torch import nn


def is_in_backward_pass() -> bool:
    """Returns whether autograd runs this call, as it does where gradient checkpointing computes a block again.

    False where PyTorch can't tell: running statistics then count a checkpointed batch twice, as BatchNorm's do.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def has_hooks(module: nn.Module) -> bool:
    """Returns whether something is called before or after a module's forward or backward. True where one can't tell."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(bool(getattr(module, kind, True)) for kind in kinds)
