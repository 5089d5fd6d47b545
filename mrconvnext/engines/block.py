"""ConvNeXt's block on a CPU: what follows its convolution some pixels at a time, with fewer passes over memory."""

import ctypes
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp
from timm.layers.activations import GELU
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from ..compat import has_forward_hooks
from ..constants import is_wrapped
from . import cpu, serving

# Pixels whose hidden features, the largest of a block, are computed at a time: few enough for a cache to hold them.
PIECE = 1024


# What a block of timm's is made of.
KINDS = (
    *(DropPath, GELU, GlobalResponseNorm, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp),
    *(nn.Conv2d, nn.Dropout, nn.Identity, nn.Linear),
)


class Features(ctypes.Structure):
    """The struct of that name in native/cpu.cpp, which says what its fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "gamma", "shortcut", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "threads", "vector_bytes")),
    ]


def _call(name: str, x: Tensor, **tensors: Tensor) -> None:
    """Calls a function of the library for features ``x``, (rows, columns)."""
    found = cpu.library()
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    sizes = {"rows": x.shape[0], "columns": x.shape[1], "threads": found.threads, "vector_bytes": found.vector_bytes}
    getattr(found.functions, name)(ctypes.byref(Features(x=x.data_ptr(), **pointers, **sizes)))


def _bias_gelu(x: Tensor, bias: Tensor) -> None:
    _call("bias_gelu", x, bias=bias)


def _residual(x: Tensor, bias: Tensor, gamma: Tensor, shortcut: Tensor, y: Tensor) -> None:
    _call("residual", x, bias=bias, gamma=gamma, shortcut=shortcut, y=y)


# Operations of PyTorch, so that its dispatcher, and all that listens there, knows of them.
torch.library.define("mrconvnext::bias_gelu", "(Tensor(a!) x, Tensor bias) -> ()")
torch.library.impl("mrconvnext::bias_gelu", "CPU", _bias_gelu)
torch.library.define(
    "mrconvnext::residual", "(Tensor x, Tensor bias, Tensor gamma, Tensor shortcut, Tensor(a!) y) -> ()"
)
torch.library.impl("mrconvnext::residual", "CPU", _residual)


class Weights(NamedTuple):
    """A block's weights behind its convolution."""

    norm: Tensor
    norm_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    gamma: Tensor


class FusedBlock(ConvNeXtBlock):
    """A block of timm's ConvNeXt that computes the same, in evaluation on a CPU by the compiled engine.

    It is timm's where that engine does not serve, or something hangs on a module or stands in the place of one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, C, H, W) for images of that size."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(x)
        weights = self._weights(x)
        if weights is None:
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        y = self.conv_dw(x)
        out = torch.empty_like(x)
        size = PIECE
        if type(self.mlp) is GlobalResponseNormMlp:  # which takes all pixels of an image
            pixels = y.shape[2] * y.shape[3]
            size = max(1, PIECE // pixels) * pixels
        for piece in zip(*(rows.permute(0, 2, 3, 1).reshape(-1, rows.shape[1]).split(size) for rows in (y, x, out))):
            self._after_convolution(weights, y.shape, *piece)
        return out

    def _after_convolution(
        self, weights: Weights, images: torch.Size, y: Tensor, shortcut: Tensor, out: Tensor
    ) -> None:
        """Writes to ``out`` what the block makes of its convolution's output ``y`` and of its input, (rows, C)."""
        hidden, product = _matrices(len(y), len(weights.first), y.shape[1])
        y = F.layer_norm(y, y.shape[1:], weight=weights.norm, bias=weights.norm_bias, eps=self.norm.eps)
        torch.mm(y, weights.first.t(), out=hidden)
        torch.ops.mrconvnext.bias_gelu(hidden, weights.first_bias)
        if type(self.mlp) is GlobalResponseNormMlp:
            hidden = self._normalise_responses(hidden.view(-1, *images[2:], len(weights.first))).view(hidden.shape)
        torch.mm(hidden, weights.second.t(), out=product)
        torch.ops.mrconvnext.residual(product, weights.second_bias, weights.gamma, shortcut, out)

    def _normalise_responses(self, hidden: Tensor) -> Tensor:
        """Returns what the response norm makes of hidden features (B, H, W, 4 · C)."""
        grn: Any = self.mlp.grn
        return grn(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.use_conv_mlp else grn(hidden)

    def _weights(self, x: Tensor) -> Optional[Weights]:
        """Returns the weights if the compiled engine can compute this on ``x``, modules being as timm made them."""
        if type(x) is not Tensor or len(x) == 0 or is_wrapped(x) or torch.is_autocast_enabled("cpu"):
            return None
        modules = [self.norm, self.mlp, *self.mlp.children(), self.drop_path, self.shortcut]
        if not all(type(m) in KINDS and not m.training and not has_forward_hooks(m) for m in modules):
            return None
        found: list[Any] = [own for part in (self.norm, self.mlp.fc1, self.mlp.fc2) for own in (part.weight, part.bias)]
        if any(own is None for own in found):
            return None
        found.append(torch.ones_like(found[1]) if self.gamma is None else self.gamma)
        if serving(x, *found) is not cpu or any(own.dtype != torch.float32 for own in (x, *found)):
            return None
        return Weights(*(own.flatten(1) if own.dim() == 4 else own.contiguous() for own in found))  # 4: of one pixel

    def __prepare_scriptable__(self) -> ConvNeXtBlock:
        """Returns timm's block with these modules: the one that TorchScript compiles."""
        block = ConvNeXtBlock.__new__(ConvNeXtBlock)
        block.__dict__.update(self.__dict__)
        return block


def _matrices(rows: int, *columns: int) -> list[Tensor]:
    """Returns matrices (rows, columns) of float32 in scratch memory, one for each number of columns."""
    sizes = [rows * own for own in columns]
    memory = cpu.scratch(4 * sum(sizes))[: 4 * sum(sizes)].view(torch.float32)
    return [own.view(rows, -1) for own in memory.split(sizes)]


def use_fused_blocks(model: ConvNeXt) -> ConvNeXt:
    """Gives a ConvNeXt these blocks, in place, and returns it."""
    stages: Any = model.stages
    for stage in stages:
        for block in stage.blocks:
            block.__class__ = FusedBlock
    return model
