"""What this package takes from PyTorch and timm that is not public, or not in all of their versions.

Without it the package computes the same.
"""

from typing import Any

import torch
from torch import nn

update_model_input_size: Any
try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm then goes on with the size that a model was made for
    update_model_input_size = None


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


def note_input_size(model: nn.Module, img_size: tuple[int, int]) -> None:
    """Tells timm that a model's images have another size now."""
    if update_model_input_size is not None:
        update_model_input_size(model, img_size)
