"""What this package takes from PyTorch that is not public there. Without it the package computes the same."""

import torch
from torch import nn


def is_in_backward_pass() -> bool:
    """Returns whether autograd runs this call, as it does where gradient checkpointing computes a block again.

    False where PyTorch can't tell: running statistics then count a checkpointed batch twice, as BatchNorm's do.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def has_forward_hooks(module: nn.Module) -> bool:
    """Returns whether something is called before or after a module's forward. True where PyTorch can't tell."""
    return bool(getattr(module, "_forward_hooks", True)) or bool(getattr(module, "_forward_pre_hooks", True))
