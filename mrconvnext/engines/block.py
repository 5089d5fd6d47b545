"""ConvNeXt's block on a CPU: its pointwise layers a few images at a time, so that their features stay in the cache."""

from typing import Any, Optional

import torch
from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp
from timm.layers.activations import GELU
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from ..compat import has_forward_hooks
from . import chosen

# Of a piece's hidden features, the largest that the pointwise layers make.
PIECE_BYTES = 6 * 2**20

# What a block of timm's is made of. Each computes for every image what it computes for that image alone.
BY_IMAGE = (
    *(DropPath, GELU, GlobalResponseNorm, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp),
    *(nn.Conv2d, nn.Dropout, nn.GELU, nn.Identity, nn.Linear, nn.ReLU, nn.SiLU),
)


class PieceBlock(ConvNeXtBlock):
    """A block of timm's ConvNeXt that computes the same, in evaluation on a CPU with fewer passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, C, H, W) for images of that size."""
        if self.training or torch.is_grad_enabled() or type(x) is not Tensor or x.device.type != "cpu":
            return super().forward(x)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or len(x) == 0 or not self._may_split():
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        y = self.conv_dw(x)
        size = max(1, PIECE_BYTES // (4 * x[0].numel() * x.element_size()))  # ConvNeXt's hidden features: 4 · C
        out = torch.empty_like(x)
        for piece in zip(y.split(size), x.split(size), out.split(size)):
            self._after_convolution(*piece)
        return out

    def _may_split(self) -> bool:
        """Returns whether nobody sees, or is wrong by, what follows the convolution being given a few images."""
        parts = [self.norm, *self.mlp.modules(), self.drop_path, self.shortcut]
        return chosen() == "auto" and all(type(part) in BY_IMAGE and not has_forward_hooks(part) for part in parts)

    def _after_convolution(self, y: Tensor, shortcut: Tensor, out: Tensor) -> None:
        """Writes to ``out`` what the block makes of its convolution's output and of its input."""
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y))
        else:
            y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        y, shortcut = self.drop_path(y), self.shortcut(shortcut)
        gamma: Optional[Tensor] = self.gamma
        if gamma is None:
            torch.add(shortcut, y, out=out)
        else:
            torch.addcmul(shortcut, y, gamma[:, None, None], out=out)

    def __prepare_scriptable__(self) -> ConvNeXtBlock:
        """Returns timm's block with these modules: the one that TorchScript compiles."""
        block = ConvNeXtBlock.__new__(ConvNeXtBlock)
        block.__dict__.update(self.__dict__)
        return block


def use_piece_blocks(model: ConvNeXt) -> ConvNeXt:
    """Gives a ConvNeXt these blocks, in place, and returns it."""
    stages: Any = model.stages
    for stage in stages:
        for block in stage.blocks:
            block.__class__ = PieceBlock
    return model
