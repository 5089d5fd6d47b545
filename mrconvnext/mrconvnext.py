"""MRConvNeXt: timm's ConvNeXt with every depthwise convolution replaced by an `MRConv2d`, in timm's registry."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.layers import is_exportable, to_2tuple, to_ntuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_model_args,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from .compat import note_input_size
from .convert import cfgs_of_convnext, checkpoint_filter_fn, with_branches
from .engines.block import use_fused_blocks
from .global_kernels import holding_taps, reparameterize, why_not
from .layer import kernel_names, undecayed_names
from .mrconv import MRConv2d, check_input
from .options import BranchOptions
from .state import check_numbers

__all__ = ["MRConvNeXt"]

# Options of the layers. The model has one for each stage in the place of min_length.
OPTIONS = tuple(field.name for field in dataclasses.fields(BranchOptions) if field.name != "min_length")

# Arguments that belong to a model's training or that may change after it was made.
NOT_SAVED = (
    *("num_classes", "in_chans", "global_pool", "inference_mode"),
    *("drop_rate", "drop_path_rate", "sync_norm", "alpha_init"),
)

torch.fx.wrap("check_input")


@torch.fx.wrap
def check_image_size(x: Tensor, smallest: int) -> None:
    """Raises if images (B, C, H, W) are less than ``smallest`` pixels high or wide."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():  # whose sizes are the example's
            return
    if min(x.shape[2], x.shape[3]) < smallest:
        raise ValueError(f"x must be at least {smallest} pixels high and wide, got {x.shape[2]}×{x.shape[3]}")


class StemConv2d(nn.Conv2d):
    """The stem's first convolution, which refuses what is not an image for this model, however the model is run."""

    smallest: int = 1  # side of an image in pixels

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features of images (B, C, H, W)."""
        check_input(x, self.in_channels, 4)
        check_image_size(x, self.smallest)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class MRConvNeXt(ConvNeXt):
    """ConvNeXt with a global multi-resolution convolution in every block (MRConv, Cunningham et al. 2024, section 5.4).

    Takes images of any height and width from its largest stride up (32 pixels by default), whatever ``img_size`` its
    kernels were made for.

    Args:
        img_size: Height and width of the images that the kernels are made for, in pixels. Other sizes run as
            well.
        kernel_img_size: Height and width of other images, for which the kernels are parameterized, to be moved to
            ``img_size``; see `set_input_size`. Default: ``img_size``.
        kernel_sizes: Size of the local taps, odd, for all stages or each; 0 for none.
        min_lengths: Length of the shortest branch, in positions, in all stages or each of the four. Default: by the
            length of the sequence, see `options.branch_lengths`.
        inference_mode: Whether every layer is deployed from the start.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Options of the branches, `options.BranchOptions`, and arguments of timm's ``ConvNeXt``.

    Raises:
        TypeError: If an argument is not known.
        ValueError: If an argument is outside its range.
    """

    if TYPE_CHECKING:  # else an attribute of a module is a tensor or a module
        stem: Any
        stages: Any
        head: Any
        pretrained_cfg: Any
        default_cfg: Any

    def __init__(
        self,
        *,
        img_size: Union[int, tuple[int, int]] = 224,
        kernel_img_size: Optional[Union[int, tuple[int, int]]] = None,
        kernel_sizes: Union[int, Sequence[int]] = 7,
        min_lengths: Optional[Union[int, Sequence[int]]] = None,
        inference_mode: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        kernel_sizes = for_each_stage("kernel_sizes", kernel_sizes)
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        # Where there are no local taps ConvNeXt still builds a convolution, which is replaced.
        super().__init__(kernel_sizes=tuple(max(1, k) for k in kernel_sizes), device=device, dtype=dtype, **kwargs)
        self._replace_convolutions(img_size, kernel_img_size, kernel_sizes, min_lengths, inference_mode, options)
        self.model_args.update({name: value for name, value in kwargs.items() if name not in NOT_SAVED})

    def _replace_convolutions(
        self,
        img_size: Union[int, tuple[int, int]],
        kernel_img_size: Optional[Union[int, tuple[int, int]]],
        kernel_sizes: tuple[int, ...],
        min_lengths: Optional[Union[int, Sequence[int]]],
        inference_mode: bool,
        options: dict[str, Any],
    ) -> None:
        """Makes a ConvNeXt an MRConvNeXt. The arguments are those of the constructor."""
        feature_info: Any = self.feature_info
        smallest_image = feature_info[-1]["reduction"]
        sides = self._sides("img_size", img_size)
        kernel_sides = sides if kernel_img_size is None else self._sides("kernel_img_size", kernel_img_size)
        min_lengths = for_each_stage("min_lengths", min_lengths)
        # What `hub` writes: where the weights came from, and what makes the model again.
        self.started_from: Optional[str] = None
        self.model_args = {"img_size": sides, "kernel_sizes": kernel_sizes, "min_lengths": min_lengths}
        self.model_args.update({name: value for name, value in options.items() if name not in NOT_SAVED})

        self.stem[0].__class__, self.stem[0].smallest = StemConv2d, smallest_image
        seed = 0
        for stage, info, kernel_size, min_length in zip(self.stages, feature_info, kernel_sizes, min_lengths):
            for block in stage.blocks:
                conv = block.conv_dw
                grid, made_for = (
                    holding_taps(reduced(own, info["reduction"]), kernel_size, conv.dilation[0])
                    for own in (sides, kernel_sides)
                )
                block.conv_dw = MRConv2d(
                    conv.in_channels,
                    grid=grid,
                    made_for=made_for,
                    kernel_size=kernel_size,
                    dilation=conv.dilation[0],
                    bias=conv.bias is not None,
                    min_length=min_length,
                    seed=seed,
                    inference_mode=inference_mode,
                    exportable=is_exportable(),
                    device=conv.weight.device,
                    dtype=conv.weight.dtype,
                    **options,
                )
                seed += 1
        self.note_kernels()
        use_fused_blocks(self)
        self.register_load_state_dict_pre_hook(check_numbers)

    def _sides(self, name: str, img_size: Any) -> tuple[int, int]:
        """Returns height and width of an image that is as large as the model's largest stride at least."""
        feature_info: Any = self.feature_info
        sides, smallest = to_2tuple(img_size), feature_info[-1]["reduction"]
        if len(sides) != 2 or not all(isinstance(side, int) and side >= smallest for side in sides):
            raise ValueError(f"{name} must be one or two integers of at least {smallest}, got {img_size}")
        return tuple(sides)

    @torch.jit.ignore
    def note_kernels(self) -> None:
        """Has the arguments that make the model again say what its kernels are made and parameterized for."""
        feature_info: Any = self.feature_info
        layer, reduction = self.stages[0].blocks[0].conv_dw, feature_info[0]["reduction"]
        self.model_args.pop("kernel_img_size", None)
        sides = self.model_args["img_size"]
        if holding_taps(reduced(sides, reduction), layer.kernel_size, layer.dilation) != layer.reference_grid:
            self.model_args["img_size"] = (reduction * layer.reference_grid[0], reduction * layer.reference_grid[1])
            note_input_size(self, self.model_args["img_size"])
        if layer.made_for != layer.reference_grid:
            self.model_args["kernel_img_size"] = (reduction * layer.made_for[0], reduction * layer.made_for[1])

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, tuple[int, int]]) -> None:
        """Moves all kernels to images of another size, of which they span the same share then, in place.

        Without that the model takes images of any size too, and its kernels reach as many pixels as ever. No parameter
        of the training form changes; see `MRConv2d.set_grid` for the deployed one.

        Args:
            img_size: Height and width of the images, in pixels.

        Raises:
            ValueError: If it is less than the largest stride.
        """
        sides = self._sides("img_size", img_size)
        feature_info: Any = self.feature_info
        for stage, info in zip(self.stages, feature_info):
            for block in stage.blocks:
                layer = block.conv_dw
                size = reduced(sides, info["reduction"])
                layer.set_grid(holding_taps(size, layer.kernel_size, layer.dilation))
        self.model_args["img_size"] = sides
        self.note_kernels()
        note_input_size(self, sides)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of the kernels, α and the branches' norms; local taps decay as in ConvNeXt.

        The parameters of SGConv's and MultiresConv's kernels decay as published.
        """
        return undecayed_names(self)

    @torch.jit.ignore
    def kernel_parameters(self) -> set[str]:
        """Returns the names of the parameters of long kernels, which take a smaller learning rate than the others."""
        return kernel_names(self)

    @torch.jit.ignore
    def reparameterize(self) -> "MRConvNeXt":
        """Folds every layer into one kernel and one bias, in place, and returns the model.

        The same as ``timm.utils.reparameterize_model(model, inplace=True)``. Optimizers made before hold parameters
        that the model no longer has.
        """
        reparameterize(self)
        return self


def reduced(sides: tuple[int, int], reduction: int) -> tuple[int, int]:
    """Returns height and width of a stage's feature maps."""
    return sides[0] // reduction, sides[1] // reduction


def for_each_stage(name: str, value: Any) -> tuple:
    """Returns an argument that is one value for all stages or one for each of the four as the latter."""
    values = to_ntuple(4)(value)
    if len(values) != 4:
        raise ValueError(f"{name} must be one value or 4, one for each stage, got {value}")
    return tuple(values)


def from_convnext(
    model: ConvNeXt,
    img_size: Union[int, tuple[int, int]] = 224,
    min_lengths: Optional[Union[int, Sequence[int]]] = None,
    **options: Any,
) -> MRConvNeXt:
    """Returns an MRConvNeXt that computes what a ConvNeXt of timm computes, made of copies of its parts.

    The branches of its kernels are new; their α is zero, with gradients.

    Args:
        model: A ConvNeXt or ConvNeXt V2, as trained. It stays as it is.
        img_size: See `MRConvNeXt`.
        min_lengths: See `MRConvNeXt`.
        **options: Options of the branches; see `options.BranchOptions`.

    Raises:
        TypeError: If ``model`` is anything else, or an option unknown.
        ValueError: If an option is outside its range.
    """
    if type(model) is not ConvNeXt:
        raise TypeError(f"model must be timm's ConvNeXt itself, no wrapper, features_only or else, got {type(model)}")
    stages: Any = model.stages
    for stage in stages:
        convolutions = [block.conv_dw for block in stage.blocks]
        if any(why_not(conv) or conv.kernel_size != convolutions[0].kernel_size for conv in convolutions):
            raise TypeError(
                "model must be a ConvNeXt with zero-padded k×k depthwise convolutions, k odd and the same in a stage, "
                f"got {convolutions}"
            )
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(f"options must be among {', '.join(OPTIONS)}, got {', '.join(unknown)}")

    converted: Any = copy.deepcopy(model)
    converted.__class__ = MRConvNeXt
    kernel_sizes = tuple(stage.blocks[0].conv_dw.kernel_size[0] for stage in stages)
    converted._replace_convolutions(img_size, None, kernel_sizes, min_lengths, inference_mode=False, options=options)
    converted.load_state_dict(with_branches(model.state_dict(), converted))
    for name, layer in converted.named_modules():
        if isinstance(layer, MRConv2d):
            conv: Any = model.get_submodule(name)
            layer.train(conv.training).requires_grad_(conv.weight.requires_grad)

    given = get_model_args(model)
    converted.model_args.update({name: value for name, value in given.items() if name not in NOT_SAVED})
    cfg = getattr(model, "pretrained_cfg", None) or _cfg_of_unknown(model)
    name = f"mr{cfg.get('architecture')}"
    converted.pretrained_cfg = {**cfg, "architecture": name if name in default_cfgs else "mrconvnext_tiny"}
    converted.default_cfg = converted.pretrained_cfg
    return converted


def _cfg_of_unknown(model: ConvNeXt) -> dict[str, Any]:
    """Returns a configuration for a ConvNeXt that does not come from timm's registry: one of no weights."""
    cfg = default_cfgs["mrconvnextv2_small"].cfgs["untrained"].to_dict()  # timm's defaults
    return {**cfg, "num_classes": model.num_classes, "input_size": (model.stem[0].in_channels, 224, 224)}


SIZES = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
NAMES = [
    f"{family}_{size}"
    for family in ("convnext", "convnextv2")
    for size in SIZES
    if (family, size) != ("convnext", "huge")
]

default_cfgs = generate_default_cfgs(
    {tag: cfg for name in NAMES for tag, cfg in cfgs_of_convnext(f"mr{name}", name).items()}
)


def _create_mrconvnext(
    variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]
) -> MRConvNeXt:
    cfg = resolve_pretrained_cfg(
        variant,
        pretrained_cfg=kwargs.get("pretrained_cfg"),
        pretrained_cfg_overlay=kwargs.get("pretrained_cfg_overlay"),
    )
    if pretrained and cfg.file and not Path(cfg.file).exists():
        raise FileNotFoundError(f"there are no weights at {cfg.file}")
    try:
        model = build_model_with_cfg(
            MRConvNeXt,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
            **{"img_size": tuple(cfg.input_size[1:]), **model_args, **kwargs},  # a tag has its own
        )
    except SafetensorError as error:
        raise RuntimeError(
            f"the safetensors file of {cfg.file or cfg.hf_hub_id} is damaged ({error}): write it again, or remove it "
            "from the cache and download it again"
        ) from error
    if pretrained and cfg.file:
        file = Path(cfg.file)
        model.started_from = file.parent.name if file.name == "model.safetensors" else file.name
        if cfg.hf_hub_id:  # the file took the place of published weights, of which this is said
            model.pretrained_cfg = {**model.pretrained_cfg, "tag": None, "license": None}
    elif pretrained and not cfg.state_dict:
        model.started_from = cfg.hf_hub_id
    return model


def _register(name: str) -> None:
    """Registers the MRConvNeXt with widths and depths of a ConvNeXt of timm, and V2's global response norms."""
    family, size = name.split("_")
    depths, dims = SIZES[size]
    model_args: dict[str, Any] = dict(depths=depths, dims=dims)
    if size in ("atto", "femto", "pico", "nano"):  # as timm has them
        model_args["conv_mlp"] = True
    if family == "convnextv2":
        model_args.update(use_grn=True, ls_init_value=None)

    def create(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
        return _create_mrconvnext(f"mr{name}", pretrained, model_args, kwargs)

    create.__name__ = create.__qualname__ = f"mr{name}"
    create.__doc__ = f"MRConvNeXt with the widths and depths of timm's ``{name}``."
    globals()[create.__name__] = register_model(create)


for _name in NAMES:
    _register(_name)
