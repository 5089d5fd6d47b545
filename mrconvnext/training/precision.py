"""The device and number formats that a model computes in."""

import argparse
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn


class Precision(NamedTuple):
    """Where and in which formats a model computes.

    Attributes:
        device: Device of weights and inputs.
        dtype: Format of weights and of inputs that are no whole numbers.
        amp_dtype: Format that autocast computes in, None for no autocast.
        memory_format: Order of images and weights in memory.
    """

    device: torch.device
    dtype: torch.dtype
    amp_dtype: Optional[torch.dtype]
    memory_format: torch.memory_format

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device) -> "Precision":
        """Returns what the arguments of a run ask for."""
        amp_dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
        order = torch.channels_last if args.channels_last else torch.contiguous_format
        return cls(device, getattr(torch, args.model_dtype), amp_dtype, order)

    def model(self, model: nn.Module) -> nn.Module:
        """Moves a model there and returns it."""
        return model.to(device=self.device, dtype=self.dtype).to(memory_format=self.memory_format)

    def inputs(self, batch: Any) -> tuple[Optional[Tensor], ...]:
        """Returns a batch of images, or of sequences and their mask, as the arguments that the model takes."""
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        return tuple(None if part is None else self._moved(part) for part in parts)

    def _moved(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(device=self.device, non_blocking=True)
        order = self.memory_format if x.dim() == 4 else torch.preserve_format
        return x.to(device=self.device, dtype=self.dtype, non_blocking=True, memory_format=order)

    def autocast(self) -> torch.autocast:
        """Returns a context in which the model runs."""
        enabled = self.amp_dtype is not None
        return torch.autocast(self.device.type, dtype=self.amp_dtype or torch.bfloat16, enabled=enabled)

    def scaler(self) -> torch.amp.GradScaler:
        """Returns what keeps gradients in the range of float16, where that is the format."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
