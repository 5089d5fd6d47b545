"""ConvNeXt's block on a CPU: what follows its convolution some pixels at a time, with fewer passes over memory."""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from timm.layers import DropPath, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp
from timm.layers.activations import GELU
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from ..compat import has_hooks
from ..constants import is_wrapped
from . import cpu, serving

# Pixels whose hidden features, the largest of a block, are computed at a time: few enough for a cache to hold them.
PIECE = 2048


# What a block of timm's is made of.
KINDS = (
    *(DropPath, GELU, GlobalResponseNorm, GlobalResponseNormMlp, LayerNorm, LayerNorm2d, Mlp),
    *(nn.Conv2d, nn.Dropout, nn.Identity, nn.Linear),
)


class Features(ctypes.Structure):
    """The struct of that name in native/cpu.cpp, which says what its fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y", "grad", "shortcut", "gamma", "scale")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "threads", "vector_bytes")),
    ]


def _call(name: str, x: Tensor, **tensors: Optional[Tensor]) -> None:
    """Calls a function of the library for features ``x``, (rows, columns)."""
    found = cpu.library()
    pointers = {key: tensor.data_ptr() for key, tensor in tensors.items() if tensor is not None}
    sizes = {"rows": x.shape[0], "columns": x.shape[1], "threads": found.threads, "vector_bytes": found.vector_bytes}
    getattr(found.functions, name)(ctypes.byref(Features(x=x.data_ptr(), **pointers, **sizes)))


def _bias_gelu(x: Tensor, bias: Tensor, y: Tensor) -> None:
    _call("bias_gelu", x, bias=bias, y=y)


def _bias_gelu_backward(x: Tensor, bias: Tensor, grad: Tensor, y: Tensor) -> None:
    _call("bias_gelu_backward", x, bias=bias, grad=grad, y=y)


def _residual(x: Tensor, bias: Tensor, gamma: Tensor, scale: Optional[Tensor], shortcut: Tensor, y: Tensor) -> None:
    _call("residual", x, bias=bias, gamma=gamma, scale=scale, shortcut=shortcut, y=y)


def _define(schema: str, compute: Any) -> None:
    """Makes a function an operation of PyTorch, so that its dispatcher, and all that listens there, knows of it."""
    torch.library.define(f"mrconvnext::{schema.partition('(')[0]}", schema[schema.index("(") :])
    torch.library.impl(f"mrconvnext::{schema.partition('(')[0]}", "CPU", compute)


_define("bias_gelu(Tensor x, Tensor bias, Tensor(a!) y) -> ()", _bias_gelu)
_define("bias_gelu_backward(Tensor x, Tensor bias, Tensor(a!) grad, Tensor(b!) y) -> ()", _bias_gelu_backward)
_define("residual(Tensor x, Tensor bias, Tensor gamma, Tensor? scale, Tensor shortcut, Tensor(a!) y) -> ()", _residual)


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
    """A block of timm's ConvNeXt that computes the same, on a CPU by the compiled engine.

    It is timm's where that engine does not serve, or something hangs on a module or stands in the place of one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, C, H, W) for images of that size."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(x)
        weights = self._weights(x)
        if weights is None:
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        y = self.conv_dw(x)
        scale = _scale_of_pixels(self.drop_path, x)
        if torch.is_grad_enabled():
            return _AfterConvolution.apply(y, x, scale, self.norm.eps, *weights)
        responses = self._normalise_responses if type(self.mlp) is GlobalResponseNormMlp else None
        return _after_convolution(weights, self.norm.eps, y, x, scale, responses=responses)

    def _normalise_responses(self, hidden: Tensor) -> Tensor:
        """Returns what the response norm makes of hidden features (B, H, W, 4 · C)."""
        grn: Any = self.mlp.grn
        return grn(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.use_conv_mlp else grn(hidden)

    def _weights(self, x: Tensor) -> Optional[Weights]:
        """Returns the weights if the compiled engine can compute this on ``x``, modules being as timm made them."""
        if type(x) is not Tensor or len(x) == 0 or is_wrapped(x) or torch.is_autocast_enabled("cpu"):
            return None
        modules = [self.norm, self.mlp, *self.mlp.children(), self.drop_path, self.shortcut]
        if not all(type(m) in KINDS and not has_hooks(m) and not _drops_features(m) for m in modules):
            return None
        if torch.is_grad_enabled() and type(self.mlp) is GlobalResponseNormMlp:
            return None
        found: list[Any] = [own for part in (self.norm, self.mlp.fc1, self.mlp.fc2) for own in (part.weight, part.bias)]
        if any(own is None for own in found):
            return None
        found.append(torch.ones_like(found[1]) if self.gamma is None else self.gamma)
        if serving(x, *found) is not cpu or any(own.dtype != torch.float32 or is_wrapped(own) for own in (x, *found)):
            return None
        if torch.is_grad_enabled() and any(forward_ad.unpack_dual(own).tangent is not None for own in (x, *found)):
            return None
        return Weights(*(own.flatten(1) if own.dim() == 4 else own.contiguous() for own in found))  # 4: of one pixel

    def __prepare_scriptable__(self) -> ConvNeXtBlock:
        """Returns timm's block with these modules: the one that TorchScript compiles."""
        block = ConvNeXtBlock.__new__(ConvNeXtBlock)
        block.__dict__.update(self.__dict__)
        return block


def _drops_features(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and module.training and module.p > 0


def _scale_of_pixels(drop_path: nn.Module, x: Tensor) -> Optional[Tensor]:
    """Returns what DropPath multiplies each pixel of images (B, C, H, W) by, (B · H · W), drawn as it draws it."""
    if type(drop_path) is not DropPath or not drop_path.training or drop_path.drop_prob == 0:
        return None
    return drop_path(x.new_ones((len(x), 1, 1, 1))).expand(-1, -1, *x.shape[2:]).flatten()


# What follows the convolution


def _after_convolution(
    weights: Weights,
    eps: float,
    y: Tensor,
    shortcut: Tensor,
    scale: Optional[Tensor],
    hidden: Optional[Tensor] = None,
    responses: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """Returns what a block makes of its convolution's output and of its input, all in channels-last order.

    Args:
        weights: The block's weights.
        eps: What its norm adds to variances.
        y: The convolution's output (B, C, H, W).
        shortcut: The block's input (B, C, H, W).
        scale: Factor of every pixel before the shortcut is added (B · H · W), or none.
        hidden: Where to leave the first product (B · H · W, 4 · C), if it is wanted.
        responses: What is applied to the hidden features of whole images, if anything.
    """
    out = torch.empty_like(shortcut)
    wide, channels = len(weights.first), y.shape[1]
    size = PIECE
    if responses is not None:  # which takes all pixels of an image
        pixels = y.shape[2] * y.shape[3]
        size = max(1, PIECE // pixels) * pixels
    for piece in _pieces(size, rows_of(y), rows_of(shortcut), rows_of(out), scale, hidden):
        own, own_shortcut, own_out, own_scale, own_hidden = piece
        features, product = _matrices(len(own), wide, channels)
        own_hidden = features if own_hidden is None else own_hidden
        normalised = F.layer_norm(own, (channels,), weight=weights.norm, bias=weights.norm_bias, eps=eps)
        torch.mm(normalised, weights.first.t(), out=own_hidden)
        torch.ops.mrconvnext.bias_gelu(own_hidden, weights.first_bias, features)
        if responses is not None:
            features = responses(features.view(-1, *y.shape[2:], wide)).view(features.shape)
        torch.mm(features, weights.second.t(), out=product)
        torch.ops.mrconvnext.residual(product, weights.second_bias, weights.gamma, own_scale, own_shortcut, own_out)
    return out


def _by_pytorch(weights: Weights, eps: float, y: Tensor, scale: Optional[Tensor]) -> Tensor:
    """Returns what `_after_convolution` adds to its shortcut, by operations whose gradients have gradients."""
    rows = F.layer_norm(rows_of(y), (y.shape[1],), weight=weights.norm, bias=weights.norm_bias, eps=eps)
    hidden = F.gelu(F.linear(rows, weights.first, bias=weights.first_bias))
    rows = F.linear(hidden, weights.second, bias=weights.second_bias)
    rows = rows * weights.gamma if scale is None else rows * weights.gamma * scale.unsqueeze(1)
    return rows.view(y.shape[0], *y.shape[2:], y.shape[1]).permute(0, 3, 1, 2)


class _AfterConvolution(torch.autograd.Function):
    """`_after_convolution`, keeping for its gradients half of what PyTorch's operations keep: the first product."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shortcut: Tensor, scale: Optional[Tensor], eps: float, *own: Tensor) -> Tensor:
        weights = Weights(*own)
        hidden = y.new_empty((y.numel() // y.shape[1], len(weights.first)))
        ctx.save_for_backward(y, scale, hidden, *own)
        ctx.eps = eps
        return _after_convolution(weights, eps, y, shortcut, scale, hidden=hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        y, scale, hidden, *own = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients that have gradients
            found = torch.func.vjp(lambda y, *own: _by_pytorch(Weights(*own), ctx.eps, y, scale), y, *own)[1](grad)
            return found[0], grad, None, None, *found[1:]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_y, found = _gradients(Weights(*own), ctx.eps, y, scale, hidden, grad, any(ctx.needs_input_grad[4:]))
        return grad_y, grad, None, None, *(found or [None] * len(own))


def _gradients(
    weights: Weights,
    eps: float,
    y: Tensor,
    scale: Optional[Tensor],
    hidden: Tensor,
    grad: Tensor,
    with_weights: bool,
) -> tuple[Tensor, Optional[Weights]]:
    """Returns the gradients for the convolution's output and, if they are wanted, for the weights.

    Args:
        weights: The block's weights.
        eps: What its norm adds to variances.
        y: The convolution's output (B, C, H, W).
        scale: As for `_after_convolution`.
        hidden: The first product (B · H · W, 4 · C).
        grad: Gradient of the block's output (B, C, H, W).
        with_weights: Whether the weights need theirs.
    """
    wide, channels = weights.first.shape
    grad_y = torch.empty_like(grad)
    second = weights.second * weights.gamma.unsqueeze(1)
    sums = Weights(*(torch.zeros_like(own) for own in weights))
    for own, own_grad, own_grad_y, own_scale, own_hidden in _pieces(
        PIECE, rows_of(y), rows_of(grad), rows_of(grad_y), scale, hidden
    ):
        features, grad_hidden, product = _matrices(len(own), wide, wide, channels)
        if own_scale is not None:
            own_grad = own_grad * own_scale.unsqueeze(1)
        normalised, mean, inverse = torch.native_layer_norm(
            input=own, normalized_shape=(channels,), weight=weights.norm, bias=weights.norm_bias, eps=eps
        )
        torch.mm(own_grad, second, out=grad_hidden)
        torch.ops.mrconvnext.bias_gelu_backward(own_hidden, weights.first_bias, grad_hidden, features)
        torch.mm(grad_hidden, weights.first, out=product)
        found, norm, norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad_out=product,
            input=own,
            normalized_shape=(channels,),
            mean=mean,
            rstd=inverse,
            weight=weights.norm,
            bias=weights.norm_bias,
            output_mask=(True, with_weights, with_weights),
        )
        own_grad_y.copy_(found)
        if with_weights:
            sums.norm.add_(norm)
            sums.norm_bias.add_(norm_bias)
            sums.first.addmm_(grad_hidden.t(), normalised)
            sums.first_bias.add_(grad_hidden.sum(0))
            sums.second.addmm_(own_grad.t(), features)  # still to be multiplied by gamma
            sums.second_bias.add_(own_grad.sum(0))
    if not with_weights:
        return grad_y, None
    # The features times the second weight are gamma's gradient: their product with the output's is there already.
    gamma = (sums.second * weights.second).sum(1) + sums.second_bias * weights.second_bias
    gradients = sums._replace(
        second=sums.second * weights.gamma.unsqueeze(1), second_bias=sums.second_bias * weights.gamma, gamma=gamma
    )
    return grad_y, gradients


def rows_of(x: Tensor) -> Tensor:
    """Returns the pixels of images (B, C, H, W) as rows (B · H · W, C): a view, in channels-last order."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _pieces(size: int, *tensors: Optional[Tensor]) -> Iterator[tuple]:
    """Yields ``size`` rows of each tensor in turn, or none where there is no tensor."""
    parts = [itertools.repeat(None) if tensor is None else tensor.split(size) for tensor in tensors]
    return zip(*parts)


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
