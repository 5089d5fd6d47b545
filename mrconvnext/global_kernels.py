"""Any network with global kernels: its depthwise convolutions become `MRConv2d` layers that compute the same."""

import copy
import logging
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from timm.layers import Conv2dSame, to_2tuple
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from .compat import has_hooks
from .convert import taps_alone
from .layer import LongConvolution
from .mrconv import MRConv2d
from .options import check_positive

_logger = logging.getLogger(__name__)

# Methods of blocks that fold convolutions of theirs into one, whose parts they know.
FOLDING = ("fuse", "reparameterize", "switch_to_deploy")


def with_global_kernels(
    model: nn.Module,
    img_size: Union[int, tuple[int, int]] = 224,
    filter_fn: Optional[Callable[[str], bool]] = None,
    **options: Any,
) -> nn.Module:
    """Returns a copy of a network in which depthwise convolutions are `MRConv2d` layers with their weights and α = 0.

    The copy computes what the network computes, at every image size; training opens the kernels: α moves in the first
    step, the kernels from the second on. `reparameterize` deploys it.

    Taken are depthwise convolutions k×k, k odd and at least 3, of stride 1, whose output has the size of their input by
    zero padding. Which are taken, and which are not and why, is logged. Weights that were saved of such a copy load
    into one that is made in the same way; see `MRConv2d` for the two forms.

    Args:
        model: Any network. It stays as it is.
        img_size: Height and width of the images that the kernels are made for, in pixels. Maps are as large as one pass
            of such an image makes them; other sizes run as well.
        filter_fn: Says of the name of a convolution in ``model`` whether it may be taken. Default: all may.
        **options: What the branches are like; see `options.BranchOptions`.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option is outside its range, or no convolution can be taken.
    """
    copied = copy.deepcopy(model)
    reasons = depthwise_layers(copied, filter_fn)
    free = [name for name, reason in reasons.items() if not reason]
    maps = _map_sizes(copied, free, img_size) if free else {}
    converted = sum(isinstance(module, MRConv2d) for module in copied.modules())  # whose seeds come first
    taken: list[str] = []
    for name, reason in reasons.items():
        if not reason and name not in maps:
            reasons[name] = "no image passes it in evaluation"
        elif not reason:
            conv: Any = copied.get_submodule(name)
            grid = holding_taps(maps[name], conv.kernel_size[0], conv.dilation[0])
            _replace(copied, conv, layer_like(conv, grid, seed=converted + len(taken), **options))
            taken.append(name)
    left = {name: reason for name, reason in reasons.items() if reason}
    if not taken:
        found = _in_words(left) or (f"{converted} are MRConv2d already" if converted else "none at all")
        raise ValueError(f"model has no depthwise convolution that can be taken: {found}")
    _logger.info(f"took {len(taken)} depthwise convolutions: {', '.join(taken)}")
    if left:
        _logger.info(f"left {len(left)}: {_in_words(left)}")
    return copied


def resample(model: nn.Module, img_size: Union[int, tuple[int, int]]) -> nn.Module:
    """Returns a copy of a network with `MRConv2d` layers whose kernels span the same share of images of another size.

    See `MRConv2d.set_grid`. Of an `MRConvNeXt` it is ``set_input_size`` on a copy; in any other network maps are
    as large as one pass of an image of that size makes them.

    Args:
        model: The network, in either form. It stays as it is.
        img_size: Height and width of the images, in pixels.

    Raises:
        ValueError: If the network has no such layers, or can't take images of this size.
    """
    copied: Any = copy.deepcopy(model)
    layers = {name: layer for name, layer in copied.named_modules() if isinstance(layer, MRConv2d)}
    if not layers:
        raise ValueError("model has no MRConv2d layers whose kernels could be moved")
    if hasattr(copied, "note_kernels"):
        copied.set_input_size(img_size)
        return copied
    for name, size in _map_sizes(copied, list(layers), img_size).items():
        layer = layers[name]
        layer.set_grid(holding_taps(size, layer.kernel_size, layer.dilation))
    for module in copied.modules():
        if hasattr(module, "note_kernels"):  # an MRConvNeXt in it
            module.note_kernels()
    return copied


def reparameterize(model: nn.Module) -> nn.Module:
    """Folds every layer of any network into one kernel and one bias, in place, and returns the network. Idempotent.

    ``timm.utils.reparameterize_model`` does so on a copy, and folds what blocks of timm's fold themselves as well.
    """
    for layer in list(model.modules()):
        if isinstance(layer, LongConvolution):
            layer.reparameterize()
    return model


def layer_like(conv: nn.Conv2d, grid: tuple[int, int], **options: Any) -> MRConv2d:
    """Returns an `MRConv2d` that computes what a depthwise convolution computes: its α is zero.

    Args:
        conv: A convolution of which `why_not` says nothing.
        grid: See `MRConv2d`.
        **options: Other arguments of `MRConv2d`.
    """
    layer = MRConv2d(
        conv.in_channels,
        grid=grid,
        kernel_size=conv.kernel_size[0],
        dilation=conv.dilation[0],
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **options,
    )
    layer.load_state_dict(taps_alone(layer, "conv", conv.weight, conv.bias))
    return layer.train(conv.training).requires_grad_(conv.weight.requires_grad)


def holding_taps(size: tuple[int, int], kernel_size: int, dilation: int) -> tuple[int, int]:
    """Returns a map's size, or what k×k taps need where that is more."""
    least = dilation * (kernel_size // 2) + 1
    return max(size[0], least), max(size[1], least)


def why_not(conv: nn.Conv2d) -> str:
    """Returns why a convolution can't be the local taps of an `MRConv2d`; nothing if it can."""
    height, width = conv.kernel_size
    if not _is_depthwise(conv):
        return f"groups {conv.groups} of {conv.in_channels} channels"
    if type(conv) not in (nn.Conv2d, Conv2dSame):
        return f"is a {type(conv).__name__}"
    if parametrize.is_parametrized(conv) or prune.is_pruned(conv) or has_hooks(conv):
        return "is parametrized, pruned or hooked"
    if conv.stride != (1, 1):
        return f"stride {conv.stride[0]}"
    if height != width or height % 2 == 0:
        return f"kernel {height}×{width}"
    if conv.dilation[0] != conv.dilation[1] or conv.padding_mode != "zeros" or not _keeps_size(conv):
        return f"padding {conv.padding} by {conv.padding_mode}, dilation {conv.dilation}"
    return ""


def _folds_itself(module: nn.Module) -> bool:
    """Returns whether a block would fold its convolutions and norms into one: whether it can, and has norms left."""
    if isinstance(module, LongConvolution) or not any(hasattr(module, method) for method in FOLDING):
        return False
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels


def _keeps_size(conv: nn.Conv2d) -> bool:
    same = tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size))
    return type(conv) is Conv2dSame or conv.padding in ("same", same)


def depthwise_layers(model: nn.Module, filter_fn: Optional[Callable[[str], bool]] = None) -> dict[str, str]:
    """Returns the names of a model's depthwise convolutions, with why they are left; nothing for those to take."""
    reasons = {}
    folding: list[str] = []
    for name, module in model.named_modules():
        if name and _folds_itself(module):
            folding.append(f"{name}.")
        if name and isinstance(module, nn.Conv2d) and module.groups > 1 and _is_depthwise(module):
            reason = "kernel 1×1" if module.kernel_size == (1, 1) else why_not(module)
            if not reason and name.startswith(tuple(folding)):
                reason = "part of a block that folds it: give timm.utils.reparameterize_model(model)"
            if not reason and filter_fn is not None and not filter_fn(name):
                reason = "filter_fn"
            reasons[name] = reason
    return reasons


@torch.no_grad()
def _map_sizes(model: nn.Module, names: list[str], img_size: Union[int, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Returns the largest map, height and width, that comes to each convolution of an image."""
    sizes: dict[str, tuple[int, int]] = {}
    sides = to_2tuple(img_size)
    for side in sides:
        check_positive("img_size", side)
    twin = copy.deepcopy(model).eval()

    def keep(name: str, x: Tensor) -> None:
        sizes[name] = max(sizes.get(name, (0, 0)), (x.shape[-2], x.shape[-1]))

    for name in names:
        conv = twin.get_submodule(name)
        conv.register_forward_pre_hook(lambda module, args, name=name: keep(name, args[0]))
    first = next((module for module in twin.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError("model has no Conv2d whose channels an image must have: move its layers by their set_grid")
    try:
        twin(first.weight.new_zeros(1, first.in_channels, *sides))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"model can't take an image of img_size={img_size}: {error}") from error
    return sizes


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another one, wherever a model has it."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is old]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def _in_words(reasons: dict[str, str]) -> str:
    """Returns names by their reasons."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(own)} ({reason})" for reason, own in names.items())
