"""The block of the papers' sequence models, S4's, with an `MRConv1d` in the place of the state-space layer.

Source: MRConv (Cunningham et al. 2024), section 5, after S4 (Gu et al. 2022).
"""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .mrconv import MRConv1d
from .streaming import Stream

NORMS = ("batch", "layer")


def is_a_graph() -> bool:
    """Returns whether a graph is made of this call, by compilers, exporters or traces."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class SequenceNorm(nn.Module):
    """BatchNorm or LayerNorm over the channels of sequences (B, L, C), of whose positions padding does not count.

    Args:
        kind: One of `NORMS`.
        dim: Number of channels C.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, kind: str, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        make: Any = nn.BatchNorm1d if kind == "batch" else nn.LayerNorm
        self.norm = make(dim, device=device, dtype=dtype)
        self.takes_statistics = kind == "batch"

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns sequences (B, L, C), normalised at the positions where the mask (B, L) is True, zero elsewhere."""
        if mask is None:
            return self.norm(x.flatten(0, 1)).view(x.shape)
        if not (self.training and self.takes_statistics):
            return self.norm(x.flatten(0, 1)).view(x.shape).masked_fill(~mask.unsqueeze(-1), 0.0)
        return self._of_real(x, mask)

    @torch.compiler.disable  # how many positions are real is not known in a graph
    def _of_real(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), self.norm(x[mask]))


class SequenceBlock(nn.Module):
    """MRConv → GELU → dropout → pointwise → GLU → dropout → residual, with a norm before or after it.

    Dropout is of whole channels. The published accounts of MRConv's block differ in where it stands; S4 and
    MultiresConv have it in both places.

    Args:
        conv: The long convolution of the channels.
        norm: Kind of norm, one of `NORMS`.
        prenorm: Whether the norm stands before.
        dropout: Rate of the dropout.
    """

    def __init__(self, conv: MRConv1d, norm: str, prenorm: bool, dropout: float, device: Any, dtype: Any) -> None:
        super().__init__()
        dim = conv.channels
        self.prenorm = prenorm
        self.norm = SequenceNorm(norm, dim, device=device, dtype=dtype)
        self.conv = conv
        self.pointwise = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns sequences (B, L, C); of padding, where the mask (B, L) is False, nothing depends on what is there."""
        y = self.norm(x, mask) if self.prenorm else x
        y = self.mix_channels(self.conv(y.transpose(1, 2), mask).transpose(1, 2))
        return x + y if self.prenorm else self.norm(x + y, mask)

    def mix_channels(self, y: Tensor) -> Tensor:
        """Returns what the block makes, position by position, of the convolution's output (B, L, C)."""
        y = self.dropout(nn.functional.gelu(y).transpose(1, 2)).transpose(1, 2)
        return self.dropout(nn.functional.glu(self.pointwise(y), dim=-1).transpose(1, 2)).transpose(1, 2)

    def step(self, x: Tensor, stream: Stream) -> Tensor:
        """Returns the next position (B, C) of the output for the next one of the input, in evaluation."""
        y = self.norm(x.unsqueeze(1)).squeeze(1) if self.prenorm else x
        y = self.mix_channels(self.conv.step(y, stream)[0].unsqueeze(1)).squeeze(1)
        return x + y if self.prenorm else self.norm((x + y).unsqueeze(1)).squeeze(1)
