"""MRConvNeXt: timm's ConvNeXt with every depthwise convolution replaced by an `MRConv2d`, in timm's registry."""

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple, to_ntuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from .block import FastBlock
from .mrconv import MRConv2d, check_input

__all__ = ["MRConvNeXt"]

# Four stages halve a patch of 4 pixels three times.
MIN_IMAGE_SIZE = 32

torch.fx.wrap("check_input")


@torch.fx.wrap
def check_image_size(x: Tensor, smallest: int) -> None:
    """Raises if images (B, C, H, W) are less than ``smallest`` pixels high or wide."""
    if min(x.shape[2], x.shape[3]) < smallest:
        raise ValueError(f"x must be at least {smallest} pixels high and wide, got {x.shape[2]}×{x.shape[3]}")


class StemConv2d(nn.Conv2d):
    """The stem's first convolution, which refuses what is no image for this model, however the model is run."""

    smallest: torch.jit.Final[int] = MIN_IMAGE_SIZE

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.in_channels, 4)
        check_image_size(x, self.smallest)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class MRConvNeXt(ConvNeXt):
    """ConvNeXt with a global multi-resolution convolution in every block (MRConv, Cunningham et al. 2024, section 5.4).

    Takes images of any height and width from 32 pixels up, whatever ``img_size`` its kernels were made for.

    Args:
        kernel: Parameterization of the branches: "fourier_sparse", "fourier", "dilated" or "sparse".
        branch_norm: "batch", one convolution and BatchNorm for each branch, or "parseval", one convolution in all.
        sync_norm: Whether "parseval" takes its statistics over all processes.
        bidirectional: Whether the branches reach to pixels ahead as well as behind.
        min_lengths: Length of the shortest branch, in positions, in all stages or each of the four. Default: by the
            length of the sequence, see `mrconv.branch_lengths`.
        max_branches: Largest number of branches of a layer.
        modes: Fourier modes of a kernel.
        taps: Dilated or sparse taps of a kernel.
        alpha_init: Start of the branches' weights. Default: 1 / number of branches. 0 starts as the ConvNeXt that
            the local taps make.
        img_size: Height and width of the images that the kernels are made for, in pixels; at least 32. Other sizes
            run as well.
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
        branch_norm: str = "batch",
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
        img_size = to_2tuple(img_size)
        if len(img_size) != 2 or not all(isinstance(side, int) and side >= MIN_IMAGE_SIZE for side in img_size):
            raise ValueError(f"img_size must be one or two integers of at least {MIN_IMAGE_SIZE}, got {img_size}")
        min_lengths = to_ntuple(4)(min_lengths)
        if len(min_lengths) != 4:
            raise ValueError(f"min_lengths must be one length or 4, one for each stage, got {min_lengths}")

        self._check_images()
        seed = 0
        for stage, info, kernel_size, min_length in zip(self.stages, self.feature_info, kernel_sizes, min_lengths):
            for i, block in enumerate(stage.blocks):
                dilation = block.conv_dw.dilation[0]
                smallest = dilation * (kernel_size // 2) + 1
                block.conv_dw = MRConv2d(
                    block.conv_dw.in_channels,
                    grid=tuple(max(side // info["reduction"], smallest) for side in img_size),
                    kernel_size=kernel_size,
                    dilation=dilation,
                    bias=block.conv_dw.bias is not None,
                    kernel=kernel,
                    min_length=min_length,
                    max_branches=max_branches,
                    bidirectional=bidirectional,
                    branch_norm=branch_norm,
                    sync_norm=sync_norm,
                    modes=modes,
                    taps=taps,
                    alpha_init=alpha_init,
                    seed=seed,
                    inference_mode=inference_mode,
                    device=device,
                    dtype=dtype,
                )
                stage.blocks[i] = FastBlock(block)
                seed += 1

    def _check_images(self) -> None:
        """Makes the stem refuse what is no image for this model: not every way to run it calls ``forward``."""
        conv = self.stem[0]
        stem = StemConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, device="meta"
        )
        stem.weight, stem.bias = conv.weight, conv.bias
        self.stem[0] = stem

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of the kernels' parameters, α and the branches' norms; local taps decay as in ConvNeXt."""
        names = set()
        for prefix, layer in self.named_modules():
            if isinstance(layer, MRConv2d):
                names.update(f"{prefix}.{name}" for name, _ in layer.named_parameters() if name != "weight")
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


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        f"mrconvnext_{size}.untrained": _cfg()
        for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
    }
)


def _create_mrconvnext(
    variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]
) -> MRConvNeXt:
    return build_model_with_cfg(
        MRConvNeXt,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **dict(model_args, **kwargs),
    )


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
