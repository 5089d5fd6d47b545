"""ConvNeXt's block, run faster on a CPU where no gradients are wanted."""

from types import FunctionType

import torch
import torch.nn.functional as F
from timm.layers import GELU, LayerNorm, LayerNorm2d, Mlp
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from .derived import DropsDerived, define_operation, derived, is_compiled_for_inference, may_keep

# Of a piece's hidden features, the largest that the pointwise layers make: they should stay in the cache.
PIECE_BYTES = 6 * 2**20

HAS_ONEDNN = torch.backends.mkldnn.is_available()


class FastBlock(DropsDerived, ConvNeXtBlock):
    """A block of timm's ConvNeXt, made of the modules of another one.

    In eval mode without gradients, in float32 on a CPU with oneDNN, it computes the same with fewer passes over
    memory: the affine part of the LayerNorm and the layer scale are folded into the linear layers, GELU and the
    residual are part of these, and the batch goes through a few images at a time. The folded weights, as large as
    the block's own, are kept until its parameters change. Autocast, tracing, compilation, forward hooks inside the
    block and layers of other types than ConvNeXt's turn that off.

    Args:
        block: Block whose modules and parameters this one takes.
    """

    # Under a name of its own, by which TorchScript tells it from the forward below.
    plain_forward = FunctionType(ConvNeXtBlock.forward.__code__, ConvNeXtBlock.forward.__globals__, "plain_forward")
    plain_forward.__annotations__ = ConvNeXtBlock.forward.__annotations__

    def __init__(self, block: ConvNeXtBlock) -> None:
        nn.Module.__init__(self)
        self.use_conv_mlp = block.use_conv_mlp
        self.conv_dw = block.conv_dw
        self.norm = block.norm
        self.mlp = block.mlp
        self.gamma = block.gamma
        self.shortcut = block.shortcut
        self.drop_path = block.drop_path
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, C, H, W) for images of that size."""
        if not torch.jit.is_scripting():
            if self._may_fold(x):
                x = x.contiguous(memory_format=torch.channels_last)
                folding = self._folding()
                if is_compiled_for_inference():
                    return torch.ops.mrconvnext.pointwise(self.conv_dw(x), x, self.norm.eps, folding)
                return pointwise(self.conv_dw(x), x, self.norm.eps, folding)
        return self.plain_forward(x)

    def _may_fold(self, x: Tensor) -> bool:
        if self.training or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return False
        mlp = self.mlp
        inside = (*self.children(), *mlp.children())
        return (
            HAS_ONEDNN
            and not torch.is_autocast_enabled("cpu")
            and type(self.norm) in (LayerNorm, LayerNorm2d)
            and type(mlp) is Mlp
            and type(mlp.act) in (GELU, nn.GELU)
            and isinstance(self.shortcut, nn.Identity)
            and (is_compiled_for_inference() or may_keep(x, self._folding()))
            and all(parameter.dtype == x.dtype for parameter in self._folding())
            and not any(module._forward_hooks or module._forward_pre_hooks for module in inside)
        )

    def _folding(self) -> list[Tensor]:
        """Returns the parameters that are folded."""
        mlp = self.mlp
        gamma = [] if self.gamma is None else [self.gamma]
        return [self.norm.weight, self.norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, *gamma]


def fold(parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Returns weight and bias of both linear layers, with the norm's affine part and the layer scale in them.

    Args:
        parameters: Weight and bias of the norm and of both layers, then the layer scale if there is one.
    """
    norm_weight, norm_bias, weight1, bias1, weight2, bias2, *gamma = (p.double() for p in parameters)
    weight1, weight2 = weight1.flatten(1), weight2.flatten(1)
    bias1 = bias1 + weight1 @ norm_bias
    weight1 = weight1 * norm_weight
    for scale in gamma:
        weight2, bias2 = scale[:, None] * weight2, scale * bias2
    pack = torch.ops.mkldnn._reorder_linear_weight
    return pack(weight1.float()), bias1.float(), pack(weight2.float()), bias2.float()


def pointwise(x: Tensor, shortcut: Tensor, eps: float, parameters: list[Tensor]) -> Tensor:
    """Returns what a block makes of its convolution's output: norm, both linear layers, layer scale and residual.

    Args:
        x: Output of the convolution (B, C, H, W).
        shortcut: Input of the block (B, C, H, W), in channels-last order.
        eps: Added to the variance by the norm.
        parameters: See `fold`.
    """
    weight1, bias1, weight2, bias2 = derived(parameters, "folded", 1, lambda: fold(parameters))
    size = max(1, PIECE_BYTES // (bias1.numel() * x.shape[2] * x.shape[3] * x.element_size()))
    pieces = []
    for piece, residual in zip(x.permute(0, 2, 3, 1).split(size), shortcut.permute(0, 2, 3, 1).split(size)):
        piece = F.layer_norm(piece, piece.shape[-1:], eps=eps)
        piece = torch.ops.mkldnn._linear_pointwise(piece, weight1, bias1, "gelu", [], "none")
        pieces.append(torch.ops.mkldnn._linear_pointwise.binary(piece, residual, weight2, bias2, "add"))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).permute(0, 3, 1, 2)


define_operation(
    "pointwise",
    "(Tensor x, Tensor shortcut, float eps, Tensor[] parameters) -> Tensor",
    pointwise,
    lambda x, shortcut, eps, parameters: torch.empty_like(shortcut),
)
