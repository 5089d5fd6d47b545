"""MRConvNeXt: timm's ConvNeXt with every depthwise convolution replaced by an `MRConv2d`, in timm's registry."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.layers import to_2tuple, to_ntuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from .block import use_fast_blocks
from .convert import cfgs_of_convnext, checkpoint_filter_fn, with_branches
from .mrconv import MRConv2d, check_input

__all__ = ["MRConvNeXt"]

# Arguments that belong to a model's training or that may change after it was made.
NOT_SAVED = (
    *("num_classes", "in_chans", "global_pool", "inference_mode"),
    *("drop_rate", "drop_path_rate", "sync_norm", "alpha_init"),
)

# Options of the branches, which a ConvNeXt does not have.
CONVERSION_OPTIONS = (
    *("kernel", "branch_norm", "sync_norm", "bidirectional"),
    *("min_lengths", "max_branches", "modes", "taps", "img_size"),
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
    """The stem's first convolution, which refuses what is no image for this model, however the model is run."""

    smallest: torch.jit.Final[int]

    def __init__(self, smallest: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.smallest = smallest

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_channels, 4)
        check_image_size(x, self.smallest)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class MRConvNeXt(ConvNeXt):
    """ConvNeXt with a global multi-resolution convolution in every block (MRConv, Cunningham et al. 2024, section 5.4).

    Takes images of any height and width from its largest stride up (32 pixels by default), whatever ``img_size`` its
    kernels were made for.

    Args:
        kernel: Parameterization of the branches: "fourier_sparse", "fourier", "dilated" or "sparse".
        branch_norm: "parseval", one convolution in all, or "batch", one convolution and BatchNorm for each branch.
        sync_norm: Whether "parseval" takes its statistics over all processes.
        bidirectional: Whether the branches reach to pixels ahead as well as behind.
        min_lengths: Length of the shortest branch, in positions, in all stages or each of the four. Default: by the
            length of the sequence, see `mrconv.branch_lengths`.
        max_branches: Largest number of branches of a layer.
        modes: Fourier modes of a kernel.
        taps: Dilated or sparse taps of a kernel.
        alpha_init: Start of the branches' weights. Default: 1 / number of branches. 0 starts as the ConvNeXt that
            the local taps make.
        img_size: Height and width of the images that the kernels are made for, in pixels. Other sizes run as
            well.
        kernel_sizes: Size of the local taps, odd, for all stages or each; 0 for none.
        inference_mode: Whether every layer is deployed from the start.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of timm's ``ConvNeXt``.

    Raises:
        TypeError: If an argument is not known.
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        *,
        kernel: str = "fourier_sparse",
        branch_norm: str = "parseval",
        sync_norm: bool = False,
        bidirectional: bool = True,
        min_lengths: Optional[Union[int, Sequence[int]]] = None,
        max_branches: int = 5,
        modes: int = 16,
        taps: int = 16,
        alpha_init: Optional[float] = None,
        img_size: Union[int, tuple[int, int]] = 224,
        kernel_sizes: Union[int, Sequence[int]] = 7,
        inference_mode: bool = False,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        kernel_sizes = to_ntuple(4)(kernel_sizes)
        if len(kernel_sizes) != 4:
            raise ValueError(f"kernel_sizes must be one size or 4, one for each stage, got {kernel_sizes}")
        # Where there are no local taps ConvNeXt still builds a convolution, which is replaced.
        super().__init__(kernel_sizes=tuple(max(1, k) for k in kernel_sizes), device=device, dtype=dtype, **kwargs)
        self._replace_convolutions(
            kernel_sizes,
            img_size,
            min_lengths,
            kernel=kernel,
            branch_norm=branch_norm,
            sync_norm=sync_norm,
            bidirectional=bidirectional,
            max_branches=max_branches,
            modes=modes,
            taps=taps,
            alpha_init=alpha_init,
            inference_mode=inference_mode,
        )
        self.model_args.update({name: value for name, value in kwargs.items() if name not in NOT_SAVED})

    def _replace_convolutions(
        self,
        kernel_sizes: Sequence[int],
        img_size: Union[int, tuple[int, int]],
        min_lengths: Optional[Union[int, Sequence[int]]],
        **options: Any,
    ) -> None:
        """Makes a ConvNeXt an MRConvNeXt. The arguments are those of the constructor."""
        img_size, smallest_image = to_2tuple(img_size), self.feature_info[-1]["reduction"]
        if len(img_size) != 2 or not all(isinstance(side, int) and side >= smallest_image for side in img_size):
            raise ValueError(f"img_size must be one or two integers of at least {smallest_image}, got {img_size}")
        min_lengths = to_ntuple(4)(min_lengths)
        if len(min_lengths) != 4:
            raise ValueError(f"min_lengths must be one length or 4, one for each stage, got {min_lengths}")
        # What `hub` writes: where the weights came from on the Hub, and what makes the model again.
        self.started_from: Optional[str] = None
        self.model_args = {"img_size": img_size, "kernel_sizes": kernel_sizes, "min_lengths": min_lengths}
        self.model_args.update({name: value for name, value in options.items() if name not in NOT_SAVED})

        self._check_images(smallest_image)
        seed = 0
        for stage, info, kernel_size, min_length in zip(self.stages, self.feature_info, kernel_sizes, min_lengths):
            for block in stage.blocks:
                conv = block.conv_dw
                smallest = conv.dilation[0] * (kernel_size // 2) + 1
                block.conv_dw = MRConv2d(
                    conv.in_channels,
                    grid=tuple(max(side // info["reduction"], smallest) for side in img_size),
                    kernel_size=kernel_size,
                    dilation=conv.dilation[0],
                    bias=conv.bias is not None,
                    min_length=min_length,
                    seed=seed,
                    device=conv.weight.device,
                    dtype=conv.weight.dtype,
                    **options,
                )
                seed += 1
        use_fast_blocks(self)

    def _check_images(self, smallest: int) -> None:
        """Makes the stem refuse what is no image for this model: not every way to run it calls ``forward``."""
        conv = self.stem[0]
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        stem = StemConv2d(smallest, *sizes, device="meta")
        stem.weight, stem.bias = conv.weight, conv.bias
        self.stem[0] = stem

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of the kernels' parameters, α and the branches' norms; local taps decay as in ConvNeXt."""
        names = set()
        for prefix, layer in self.named_modules():
            if isinstance(layer, MRConv2d):
                own = (name for name, _ in layer.named_parameters() if name not in ("weight", "bias"))
                names.update(f"{prefix}.{name}" for name in own)
        return names

    @torch.jit.ignore
    def reparameterize(self) -> "MRConvNeXt":
        """Folds every layer into one kernel and one bias, in place, and returns the model.

        The same as ``timm.utils.reparameterize_model(model, inplace=True)``. Optimizers made before hold parameters
        that the model no longer has.
        """
        for layer in self.modules():
            if isinstance(layer, MRConv2d):
                layer.reparameterize()
        return self


def from_convnext(model: ConvNeXt, **options: Any) -> MRConvNeXt:
    """Returns an MRConvNeXt that computes what a ConvNeXt of timm computes, made of copies of its parts.

    The branches of its kernels are new; their α is zero, with gradients.

    Args:
        model: A ConvNeXt or ConvNeXt V2, as trained. It stays as it is.
        **options: Options of the branches, `MRConvNeXt`'s: ``kernel``, ``branch_norm``, ``sync_norm``,
            ``bidirectional``, ``min_lengths``, ``max_branches``, ``modes``, ``taps``, ``img_size``.

    Raises:
        TypeError: If ``model`` is anything else, or an option unknown.
        ValueError: If an option is outside its range.
    """
    if type(model) is not ConvNeXt:
        raise TypeError(f"model must be timm's ConvNeXt itself, no wrapper, features_only or else, got {type(model)}")
    for stage in model.stages:
        convolutions = [block.conv_dw for block in stage.blocks]
        if not all(_is_replaceable(conv, convolutions[0].kernel_size) for conv in convolutions):
            raise TypeError(
                "model must be a ConvNeXt with zero-padded k×k depthwise convolutions, k odd and the same in a stage, "
                f"got {convolutions}"
            )
    defaults = MRConvNeXt.__init__.__kwdefaults__
    own = {name: defaults[name] for name in CONVERSION_OPTIONS}
    if unknown := [name for name in options if name not in own]:
        raise TypeError(f"options must be among {', '.join(own)}, got {', '.join(unknown)}")

    converted = copy.deepcopy(model)
    converted.__class__ = MRConvNeXt
    kernel_sizes = tuple(stage.blocks[0].conv_dw.kernel_size[0] for stage in model.stages)
    converted._replace_convolutions(kernel_sizes, **{**own, **options})
    converted.load_state_dict(with_branches(model.state_dict(), converted))
    for name, layer in converted.named_modules():
        if isinstance(layer, MRConv2d):
            conv = model.get_submodule(name)
            layer.train(conv.training).requires_grad_(conv.weight.requires_grad)

    given = getattr(model, "_model_args", {})  # of create_model, if that made it
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


def _is_replaceable(conv: nn.Module, kernel_size: tuple[int, int]) -> bool:
    """Returns whether local taps of this size can stand for a convolution."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == kernel_size
        and conv.padding_mode == "zeros"
        and conv.stride == (1, 1)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.padding == tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size))
    )


SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")

default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for family, sizes in (("convnext", SIZES), ("convnextv2", (*SIZES, "huge")))
        for size in sizes
        for name, cfg in cfgs_of_convnext(f"mr{family}_{size}", f"{family}_{size}").items()
    }
)


def _create_mrconvnext(
    variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]
) -> MRConvNeXt:
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and cfg.file and not Path(cfg.file).exists():
        raise FileNotFoundError(f"there are no weights at {cfg.file}")
    try:
        model = build_model_with_cfg(
            MRConvNeXt,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
            **dict(model_args, **kwargs),
        )
    except SafetensorError as error:
        raise RuntimeError(
            f"the safetensors file of {cfg.file or cfg.hf_hub_id} is damaged ({error}): write it again, or remove it "
            "from the cache and download it again"
        ) from error
    if pretrained and not (cfg.file or cfg.state_dict):
        model.started_from = cfg.hf_hub_id
    return model


@register_model
def mrconvnext_atto(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_atto``."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True)
    return _create_mrconvnext("mrconvnext_atto", pretrained, model_args, kwargs)


@register_model
def mrconvnext_femto(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_femto``."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384), conv_mlp=True)
    return _create_mrconvnext("mrconvnext_femto", pretrained, model_args, kwargs)


@register_model
def mrconvnext_pico(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_pico``."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512), conv_mlp=True)
    return _create_mrconvnext("mrconvnext_pico", pretrained, model_args, kwargs)


@register_model
def mrconvnext_nano(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_nano``."""
    model_args = dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640), conv_mlp=True)
    return _create_mrconvnext("mrconvnext_nano", pretrained, model_args, kwargs)


@register_model
def mrconvnext_tiny(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_tiny``; MRConvNeXt-T of the paper."""
    model_args = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
    return _create_mrconvnext("mrconvnext_tiny", pretrained, model_args, kwargs)


@register_model
def mrconvnext_small(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_small``; MRConvNeXt-S of the paper."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
    return _create_mrconvnext("mrconvnext_small", pretrained, model_args, kwargs)


@register_model
def mrconvnext_base(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_base``; MRConvNeXt-B of the paper."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
    return _create_mrconvnext("mrconvnext_base", pretrained, model_args, kwargs)


@register_model
def mrconvnext_large(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths and depths of timm's ``convnext_large``."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))
    return _create_mrconvnext("mrconvnext_large", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_atto(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_atto``."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), use_grn=True, ls_init_value=None, conv_mlp=True)
    return _create_mrconvnext("mrconvnextv2_atto", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_femto(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_femto``."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384), use_grn=True, ls_init_value=None, conv_mlp=True)
    return _create_mrconvnext("mrconvnextv2_femto", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_pico(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_pico``."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512), use_grn=True, ls_init_value=None, conv_mlp=True)
    return _create_mrconvnext("mrconvnextv2_pico", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_nano(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_nano``."""
    model_args = dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640), use_grn=True, ls_init_value=None, conv_mlp=True)
    return _create_mrconvnext("mrconvnextv2_nano", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_tiny(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_tiny``."""
    model_args = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), use_grn=True, ls_init_value=None)
    return _create_mrconvnext("mrconvnextv2_tiny", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_small(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_small``."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768), use_grn=True, ls_init_value=None)
    return _create_mrconvnext("mrconvnextv2_small", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_base(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_base``."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024), use_grn=True, ls_init_value=None)
    return _create_mrconvnext("mrconvnextv2_base", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_large(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_large``."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536), use_grn=True, ls_init_value=None)
    return _create_mrconvnext("mrconvnextv2_large", pretrained, model_args, kwargs)


@register_model
def mrconvnextv2_huge(pretrained: bool = False, **kwargs: Any) -> MRConvNeXt:
    """MRConvNeXt with the widths, depths and global response norms of timm's ``convnextv2_huge``."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816), use_grn=True, ls_init_value=None)
    return _create_mrconvnext("mrconvnextv2_huge", pretrained, model_args, kwargs)
