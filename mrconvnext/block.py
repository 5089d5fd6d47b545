"""ConvNeXt's block, run faster on a CPU."""

from types import FunctionType

import torch
import torch.nn.functional as F
from timm.layers import GELU, LayerNorm, LayerNorm2d, Mlp
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .derived import DropsDerived, define_operation, derived, is_compiled_for_inference, is_eager, is_ordinary

# Of a piece's hidden features, the largest that the pointwise layers make: they should stay in the cache.
PIECE_BYTES = 6 * 2**20

HAS_ONEDNN = torch.backends.mkldnn.is_available()


class FastBlock(DropsDerived, ConvNeXtBlock):
    """A block of timm's ConvNeXt, made of the modules of another one.

    In float32 on a CPU with oneDNN it computes the same with fewer passes over memory: its batch goes through the
    pointwise layers a few images at a time. With gradients it keeps less for the backward pass, see `Pointwise`. In
    eval mode without gradients the affine part of the LayerNorm and the layer scale are folded into the linear
    layers, and GELU and the residual are part of these; the folded weights, as large as the block's own, are kept
    until its parameters change. Autocast, tracing, forward hooks inside the block and layers of other types than
    ConvNeXt's turn that off; so does compilation, but for the folded form.

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
        self.training = block.training

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, C, H, W) for images of that size."""
        if not torch.jit.is_scripting():
            if self._is_fast(x):
                return self._fast_forward(x.contiguous(memory_format=torch.channels_last))
        return self.plain_forward(x)

    def _fast_forward(self, x: Tensor) -> Tensor:
        eps, parameters = self.norm.eps, self._folding()
        if torch.is_grad_enabled():
            return self.drop_path(Pointwise.apply(self.conv_dw(x), eps, *parameters)) + x
        if is_compiled_for_inference():
            return torch.ops.mrconvnext.pointwise(self.conv_dw(x), x, eps, parameters)
        return pointwise(self.conv_dw(x), x, eps, parameters)

    def _is_fast(self, x: Tensor) -> bool:
        """Returns whether `_fast_forward` computes what the modules do, and faster."""
        if not (is_compiled_for_inference() or is_eager(x)):
            return False
        if not HAS_ONEDNN or x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not self._is_convnexts():
            return False
        if not torch.is_grad_enabled() and (self.training or is_random(self.drop_path)):
            return False
        parameters = self._folding()
        return (is_compiled_for_inference() or is_ordinary(x, parameters)) and all(
            tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in (x, *parameters)
        )

    def _is_convnexts(self) -> bool:
        """Returns whether the modules are those of ConvNeXt, and nobody looks into them or has changed them."""
        norm, mlp = self.norm, self.mlp
        return (
            type(norm) in (LayerNorm, LayerNorm2d)
            and type(mlp) is Mlp
            and type(mlp.fc1) in (nn.Linear, nn.Conv2d)
            and type(mlp.fc2) in (nn.Linear, nn.Conv2d)
            and type(mlp.norm) is nn.Identity
            and type(mlp.act) in (GELU, nn.GELU)
            and getattr(mlp.act, "approximate", "none") == "none"
            and isinstance(self.shortcut, nn.Identity)
            and not is_random(mlp.drop1)
            and not is_random(mlp.drop2)
            and all(tensor is not None for tensor in (norm.weight, norm.bias, mlp.fc1.bias, mlp.fc2.bias))
            and not _has_any_global_hook()
            and not any(is_watched(module) for module in (norm, mlp, *mlp.children()))
        )

    def _folding(self) -> list[Tensor]:
        """Returns the parameters that are folded."""
        mlp = self.mlp
        gamma = [] if self.gamma is None else [self.gamma]
        return [self.norm.weight, self.norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, *gamma]


def use_fast_blocks(model: ConvNeXt) -> ConvNeXt:
    """Gives a ConvNeXt fast blocks, in place, and returns it."""
    for stage in model.stages:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = FastBlock(block)
    return model


def is_random(module: nn.Module) -> bool:
    """Returns whether a dropout or drop path is more than an identity."""
    return type(module) is not nn.Identity and module.training and getattr(module, "p", 1) != 0


def is_watched(module: nn.Module) -> bool:
    """Returns whether somebody has hooked into a module or replaced its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(own) > 0 for own in hooks) or "forward" in module.__dict__


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


def piece_size(x: Tensor, weight1: Tensor) -> int:
    """Returns the number of images like ``x`` (B, C, H, W) that go through the linear layers at once."""
    return max(1, PIECE_BYTES // (weight1.shape[0] * x.shape[2] * x.shape[3] * x.element_size()))


class Pointwise(torch.autograd.Function):
    """What a block makes of its convolution's output, without the residual, with gradients.

    Saved for the backward pass are the input, which its convolution does not need, and the hidden features before GELU,
    the norm's mean and deviation. timm's block saves the hidden features after GELU and the outputs of the norm and of
    the second layer as well: here they are computed again, or not needed. The batch goes through in pieces that stay
    in the cache.

    Called with ``x, eps, *parameters``; see `fold`.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x: Tensor, eps: float, *parameters: Tensor) -> Tensor:
        norm_weight, norm_bias, weight1, bias1, weight2, bias2, *gamma = parameters
        weight1, weight2 = weight1.flatten(1), weight2.flatten(1)
        for scale in gamma:
            weight2, bias2 = scale[:, None] * weight2, scale * bias2
        ctx.size, ctx.eps = piece_size(x, weight1), eps
        saved, outputs = [], []
        for piece in x.permute(0, 2, 3, 1).split(ctx.size):
            piece, mean, deviation = torch.native_layer_norm(piece, piece.shape[-1:], norm_weight, norm_bias, eps)
            hidden = torch.ops.mkldnn._linear_pointwise(piece, weight1, bias1, "none", [], "none")
            outputs.append(torch.ops.mkldnn._linear_pointwise(F.gelu(hidden), weight2, bias2, "none", [], "none"))
            saved += hidden, mean, deviation
        ctx.save_for_backward(x, *parameters, *saved)
        return torch.cat(outputs).permute(0, 3, 1, 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple:
        x, *saved = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 2
        parameters, saved = saved[:count], saved[count:]
        if torch.is_grad_enabled():  # for another backward pass
            return differentiable_gradients(x, ctx.eps, parameters, grad)
        norm_weight, norm_bias, weight1, bias1, weight2, bias2, *gamma = parameters
        shape1, shape2 = weight1.shape, weight2.shape
        weight1, weight2 = weight1.flatten(1), weight2.flatten(1)
        scaled2 = gamma[0][:, None] * weight2 if gamma else weight2
        grads = [torch.zeros_like(p) for p in (norm_weight, norm_bias, weight1, bias1, weight2, bias2)]
        grad_norm_weight, grad_norm_bias, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = grads
        outputs = []
        images, grads_out = (tensor.permute(0, 2, 3, 1).split(ctx.size) for tensor in (x, grad))
        for i, (piece, grad_out) in enumerate(zip(images, grads_out)):
            hidden, mean, deviation = saved[3 * i : 3 * i + 3]
            rows = grad_out.reshape(-1, grad_out.shape[-1])
            grad_bias2 += rows.sum(0)
            grad_weight2.addmm_(rows.t(), F.gelu(hidden).flatten(0, 2))
            grad_hidden = torch.ops.aten.gelu_backward(torch.mm(rows, scaled2).view_as(hidden), hidden).flatten(0, 2)
            grad_bias1 += grad_hidden.sum(0)
            normed = torch.native_layer_norm(piece, piece.shape[-1:], norm_weight, norm_bias, ctx.eps)
            grad_weight1.addmm_(grad_hidden.t(), normed[0].flatten(0, 2))
            grad_piece, *grad_norm = torch.ops.aten.native_layer_norm_backward(
                torch.mm(grad_hidden, weight1).view_as(piece),
                piece,
                piece.shape[-1:],
                mean,
                deviation,
                norm_weight,
                norm_bias,
                [True, True, True],
            )
            grad_norm_weight += grad_norm[0]
            grad_norm_bias += grad_norm[1]
            outputs.append(grad_piece)
        grad_gamma = []
        for scale in gamma:
            # Of the output's gradient G and the layer's output z: Σ G·z = Σ G·(W h + b), without z.
            grad_gamma.append((grad_weight2 * weight2).sum(1) + grad_bias2 * bias2)
            grad_weight2 *= scale[:, None]
            grad_bias2 *= scale
        grads[2], grads[4] = grad_weight1.view(shape1), grad_weight2.view(shape2)
        return torch.cat(outputs).permute(0, 3, 1, 2), None, *grads, *grad_gamma


def differentiable_gradients(x: Tensor, eps: float, parameters: list[Tensor], grad: Tensor) -> tuple:
    """Returns the gradients for the arguments of `Pointwise`, as functions of these and of the output's gradient."""
    # Views: the gradients are for these arguments alone, not for what they in turn come from.
    x, *parameters = (tensor.view_as(tensor) for tensor in (x, *parameters))
    norm_weight, norm_bias, weight1, bias1, weight2, bias2, *gamma = parameters
    y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], norm_weight, norm_bias, eps)
    y = F.linear(F.gelu(F.linear(y, weight1.flatten(1), bias1)), weight2.flatten(1), bias2)
    for scale in gamma:
        y = y * scale
    wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad.permute(0, 2, 3, 1), create_graph=True))
    grad_x, *grads = (next(found) if tensor.requires_grad else None for tensor in (x, *parameters))
    return grad_x, None, *grads


def pointwise(x: Tensor, shortcut: Tensor, eps: float, parameters: list[Tensor]) -> Tensor:
    """Returns what a block makes of its convolution's output: norm, both linear layers, layer scale and residual.

    Args:
        x: Output of the convolution (B, C, H, W).
        shortcut: Input of the block (B, C, H, W), in channels-last order.
        eps: Added to the variance by the norm.
        parameters: See `fold`.
    """
    weight1, bias1, weight2, bias2 = derived(parameters, "folded", 1, lambda: fold(parameters))
    size, pieces = piece_size(x, bias1), []
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
