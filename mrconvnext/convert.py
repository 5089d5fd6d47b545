"""ConvNeXt's weights as MRConvNeXt's: which checkpoints timm has of it, and how one becomes ours.

An MRConvNeXt whose α is zero computes what the ConvNeXt computes that its local taps come from, at every image size.
"""

import copy
import dataclasses
import logging
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Optional

import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, convnext, load_state_dict
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from .grid import add_local_taps
from .mrconv import MRConv2d
from .resampling import resample_deployed
from .state import check_reference

_logger = logging.getLogger(__name__)

# The classifier's weight in the layouts that timm reads.
CLASSIFIERS = ("head.fc.weight", "head.weight", "visual.head.proj.weight")

# Names that a ConvNeXt's weights don't have.
_OWN_NAME = re.compile(r"\bconv_dw\.(?!weight$|bias$)")


def cfgs_of_convnext(name: str, source: str) -> dict[str, PretrainedCfg]:
    """Returns a configuration for every checkpoint that timm has of a ConvNeXt, its default one first.

    Args:
        name: Name of our model, such as ``mrconvnext_tiny``.
        source: Name of timm's model, such as ``convnext_tiny``, whose tag ``fb_in1k`` becomes our ``convnext_fb_in1k``.
    """
    cfgs = convnext.default_cfgs[source]
    family = source.partition("_")[0]
    own = {}
    for tag in cfgs.tags:
        cfg = cfgs.cfgs[tag]
        if cfg.hf_hub_id == "timm/":  # which timm completes with the model's name, another one here
            cfg = dataclasses.replace(cfg, hf_hub_id=f"timm/{source}.{tag}")
        own[f"{name}.{family}_{tag}" if cfg.has_weights else f"{name}.{tag}"] = cfg
    return own


def options_of_file(file: Path, classifier: Optional[str] = None) -> dict[str, Any]:
    """Returns what a checkpoint file says of the model that it is of, as arguments of ``timm.create_model``.

    They are ``num_classes`` and, if it is ours, ``img_size`` and a ``patch_size`` other than 4.

    Args:
        file: A checkpoint.
        classifier: Name of the classifier of a model that is not a ConvNeXt.

    Raises:
        ValueError: If it is missing or damaged, holds more than tensors, or is no checkpoint.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder: give a file of weights, such as {file / 'model.safetensors'}")
    if not file.is_file():
        raise ValueError(f"{file} is not a file")
    try:
        weights = load_state_dict(str(file))
        classifiers = [name for name in (f"{classifier}.weight", *CLASSIFIERS) if name in weights]
        options: dict[str, Any] = {"num_classes": len(weights[classifiers[0]]) if classifiers else 0}
    except (AttributeError, EOFError, KeyError, RuntimeError, SafetensorError, TypeError, UnpicklingError) as error:
        raise ValueError(f"{file} is damaged, or not a checkpoint that may be read ({error})") from error
    if any(name.startswith("optimizer.") for name in weights):
        raise ValueError(f"{file} is what a run needs to resume: take {file.with_name('best.safetensors')}")
    grid = weights.get("stages.0.blocks.0.conv_dw.grid")
    if grid is not None:
        stem = [x for name, x in weights.items() if name.startswith("stem.") and x.dim() == 4]
        stride = 4 if len(stem) == 2 else stem[0].shape[-1]
        if stride != 4:
            options["patch_size"] = stride
        # timm's first stage halves what a stem of stride 2 gives.
        options["img_size"] = tuple((4 if stride == 2 else stride) * side for side in grid.tolist()[:2])
    return options


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict for an MRConvNeXt, of one like it or of a ConvNeXt in any layout that timm reads.

    Kernels that were made for images of another size are moved to the model's, as ``set_input_size`` does.

    Args:
        state_dict: Weights as they come out of a file.
        model: The MRConvNeXt that they are for, in either form.

    Raises:
        RuntimeError: If they do not fit ``model``. Its classifier may be missing or another one.
    """
    if not any(_OWN_NAME.search(name) for name in state_dict):
        try:
            state_dict = convnext.checkpoint_filter_fn(state_dict, model)
        except (AttributeError, KeyError, RuntimeError) as error:
            raise RuntimeError(f"these are not the weights of a ConvNeXt like this model ({error})") from error
        state_dict = with_branches(state_dict, model)
    state_dict = on_grids_of(model, state_dict)
    _check_fit(state_dict, model)
    head, cfg = state_dict.get("head.fc.weight"), getattr(model, "pretrained_cfg", {})
    if head is not None and len(head) == model.num_classes != cfg.get("num_classes"):
        _logger.warning(
            f"timm drops the classifier of these weights, which has the model's {len(head)} classes: their "
            f"configuration says num_classes={cfg.get('num_classes')}. Give pretrained_cfg_overlay=dict(…, "
            f"num_classes={len(head)}) to keep it."
        )
    return state_dict


def with_branches(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns a ConvNeXt's state dict with what an MRConvNeXt has beside it: branches as ``model`` has them, α zero.

    Args:
        state_dict: A ConvNeXt's state dict, in timm's layout.
        model: The MRConvNeXt that it is for, in either form.

    Raises:
        RuntimeError: If the convolutions have other sizes than the model's local taps.
    """
    converted = dict(state_dict)
    for name, layer in model.named_modules():
        if isinstance(layer, MRConv2d) and f"{name}.weight" in state_dict:
            own = taps_alone(layer, name, converted.pop(f"{name}.weight"), converted.pop(f"{name}.bias", None))
            converted.update({f"{name}.{key}": value for key, value in own.items()})
    # Masked autoencoders have no head.
    headless = {name: x for name, x in model.state_dict().items() if "head.norm." in name and name not in converted}
    _logger.info(
        f"Took all {len(state_dict)} tensors of a ConvNeXt; kernels of branches are new and have α = 0"
        + (f"; new as well: {', '.join(headless)}" if headless else "")
    )
    return {**converted, **headless}


def on_grids_of(model: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict whose kernels are those of other grids, moved to the grids of an MRConvNeXt's layers.

    Those of a training form stay what they are, and the model's are made for their grid.

    Args:
        model: The MRConvNeXt, in either form.
        state_dict: A state dict of one with other grids, or the same ones.
    """
    moved = dict(state_dict)
    grids = {}
    for name, layer in model.named_modules():
        found = state_dict.get(f"{name}.grid") if isinstance(layer, MRConv2d) else None
        if found is None or found.is_meta or found.shape != (3,):
            continue  # of a convolution, or damaged, which the layer refuses
        height, width, guard = found.tolist()
        taps = state_dict.get(f"{name}.local_taps", state_dict.get(f"{name}.weight"))
        if layer.kernel_size != (0 if taps is None else taps.shape[-1]) or guard not in (layer.local_reach, width - 1):
            continue  # of other taps, which the layer refuses
        made_for = tuple(state_dict.get(f"{name}.kernel_grid", found[:2]).tolist())
        if made_for != layer.made_for:
            layer.make_for(made_for)
        moved.pop(f"{name}.kernel_grid", None)
        if layer.is_resampled:
            moved[f"{name}.kernel_grid"] = torch.tensor(made_for)
        own = (*layer.reference_grid, layer.guard)
        if own == (height, width, guard):
            continue
        moved[f"{name}.grid"] = torch.tensor(own)
        grids[f"{height}×{width}"] = f"{own[0]}×{own[1]}"
        kernel = state_dict.get(f"{name}.kernel")
        if kernel is not None and kernel.shape == (layer.channels, 2 * height * (width + guard) - 1):
            of_taps = (taps, layer.dilation)
            grids_of = ((height, width, guard), own)
            moved[f"{name}.kernel"] = resample_deployed(kernel, *of_taps, *grids_of, layer.bidirectional)
    if grids:
        moves = ", ".join(f"{old} to {new}" for old, new in grids.items())
        _logger.info(f"Kernels were made for other grids, and now span the same share of the image: {moves}")
    model.note_kernels()
    return moved


def taps_alone(layer: MRConv2d, name: str, weight: Tensor, bias: Optional[Tensor]) -> dict[str, Tensor]:
    """Returns the state dict, in ``layer``'s form, of a layer that computes a depthwise ``Conv2d``: its α is zero.

    Args:
        layer: Layer whose branches, norms and grid are kept.
        name: The layer's name, for the error.
        weight: The convolution's weight (C, 1, k, k).
        bias: Its bias (C), if it has one.

    Raises:
        RuntimeError: If the weight is not that of the layer's local taps.
    """
    if weight.shape != (layer.channels, 1, layer.kernel_size, layer.kernel_size):
        raise RuntimeError(
            f"{name}.weight is {tuple(weight.shape)} in the ConvNeXt's weights, the model's layer has "
            f"{layer.channels} channels and kernel_size={layer.kernel_size}: create the MRConvNeXt of their size, "
            "with their kernel_sizes"
        )
    own = layer.state_dict()
    if layer.kernel is None:
        own |= {"weight": weight, "alpha": torch.zeros_like(layer.alpha)}
    else:
        zeros = torch.zeros_like(layer.kernel)
        taps = add_local_taps(zeros, weight.to(zeros), layer.dilation, layer.row_stride)
        own |= {"kernel": taps, "bias": torch.zeros_like(layer.bias), "local_taps": weight.to(zeros)}
    return own if bias is None else {**own, "bias": bias}


def without_branches(model: nn.Module) -> ConvNeXt:
    """Returns the plain ConvNeXt in an MRConvNeXt: a copy of it whose convolutions are the local taps alone.

    In training form that is what the model computes where α is zero. Deployed layers keep their local taps, but the
    norms "parseval" and "batch" leave what they shift the branches by in the bias. Where there are no local taps, see
    `local_taps_of`, those of the copy are 7×7 and random, the same every time.

    Args:
        model: The MRConvNeXt, in either form; it stays as it is.
    """
    plain: Any = copy.deepcopy(model)
    for stage in plain.stages:
        for block in stage.blocks:
            block.conv_dw = _local_convolution(block.conv_dw)
    plain.__class__ = ConvNeXt
    return plain


def local_taps_of(layer: MRConv2d) -> Optional[Tensor]:
    """Returns a layer's local taps (C, 1, k, k) in either form; None if it has none."""
    taps = layer.weight if layer.kernel is None else layer.local_taps
    return None if taps is None else taps.detach().clone()


def _local_convolution(layer: MRConv2d) -> nn.Conv2d:
    taps = local_taps_of(layer)
    if taps is None:
        taps = torch.randn(layer.channels, 1, 7, 7, generator=torch.Generator().manual_seed(layer.seed))
        taps = (0.02 * taps).to(layer.alpha)  # as ConvNeXt's start
    conv = nn.Conv2d(
        in_channels=layer.channels,
        out_channels=layer.channels,
        kernel_size=taps.shape[-1],
        padding=layer.dilation * (taps.shape[-1] // 2),
        dilation=layer.dilation,
        groups=layer.channels,
    )
    bias = layer.alpha.new_zeros(layer.channels) if layer.bias is None else layer.bias.detach().clone()
    conv.weight, conv.bias = nn.Parameter(taps), nn.Parameter(bias)
    return conv.train(layer.training)


def _check_fit(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Raises if names or shapes differ from the model's, but for the classifier and the images' channels."""
    own = model.state_dict()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MRConv2d)}
    # The layers look after their shapes, and after what is missing where their form changes.
    for name, layer in layers.items():
        check_reference(layer, state_dict, f"{name}.")
    changing = [name for name, layer in layers.items() if (layer.kernel is None) == (f"{name}.kernel" in state_dict)]
    free = ("head.fc.", *(f"{name}." for name in changing))
    missing, unexpected = (
        [name for name in a if name not in b and not name.startswith(free)]
        for a, b in ((own, state_dict), (state_dict, own))
    )
    of_any_shape = ("head.fc.", "stem.0.weight", *(f"{name}." for name in layers))
    reshaped = [
        f"{name} {tuple(given.shape)} instead of {tuple(own[name].shape)}"
        for name, given in state_dict.items()
        if name in own and not name.startswith(of_any_shape) and given.shape != own[name].shape
    ]
    problems = {"missing": missing, "not in the model": unexpected, "of another shape": reshaped}
    found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
    if found:
        raise RuntimeError(
            f"the weights do not fit the model; {found}. Create the MRConvNeXt of the size and family that they are of "
            "(mrconvnext_* for ConvNeXt, mrconvnextv2_* for ConvNeXt V2), with the options that they were trained with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
