"""What a run does unless it is told: by the weights that it starts from and the number of its images."""

import argparse
import copy
import logging
import math
import statistics
from typing import Any

from timm.models import is_model_in_modules

from .datasets import Data, SizedDataset
from .errors import UserError
from .model import learning_rate
from .samples import Samples

_logger = logging.getLogger(__name__)

# From so many images on a run from scratch takes ConvNeXt's recipe for ImageNet.
MANY = 100_000

# Side of images, in pixels, from which on a model's own size counts.
LARGE = 224

# Steps that a run takes in all, about: from scratch, and from weights.
STEPS = {"small": 2000, "finetune": 1000}

# Epochs, at least and at most.
EPOCHS = {"small": (10, 300), "finetune": (5, 30)}

# What does not follow the number of images. Few of them, in few steps, are learned without much in their way.
FIXED: dict[str, dict[str, Any]] = {
    "small": {"lr": 2e-3, "ls_init": 0.1, "drop_path": 0.0, "scale": (0.5, 1.0), "aa": ""},
    "finetune": {"lr": 2e-4, "layer_decay": 0.8, "scale": (0.35, 1.0), "aa": "rand-m5-mstd0.5-inc1"},
}
COMMON = {"no_lr_scaling": True, "mixup": 0.0, "cutmix": 0.0, "reprob": 0.0}


def settle(args: argparse.Namespace, data: Data) -> None:
    """Gives the arguments that nobody gave the values of their recipe, and logs these.

    Args:
        args: The run's arguments, which are changed.
        data: Its images.

    Raises:
        UserError: If there are fewer images than a step takes.
        OSError: If hardly any can be read.
    """
    images = len(data.train)
    started = args.pretrained or args.finetune is not None
    args.recipe = args.recipe or ("finetune" if started else "small" if images < MANY else "imagenet")
    given = {name: getattr(args, name) for name in args.given}
    chosen = {name: own for name, own in choices(args.recipe, data, given).items() if name not in given}
    if not has_layer_scales(args.model):
        chosen.pop("ls_init", None)
    vars(args).update(chosen)
    words = ", ".join(f"--{name.replace('_', '-')} {_as_words(own)}".strip() for name, own in sorted(chosen.items()))
    _logger.info(f"recipe {args.recipe} for {images} images{': ' if words else ''}{words}")
    if args.global_batch > images:
        raise UserError(
            f"--global-batch {args.global_batch} is more than the {images} training images: give a smaller one, or "
            "--recipe small or finetune, whose batches follow the number of images"
        )
    for line in doubts(args, images):
        _logger.warning(line)


def has_layer_scales(name: str) -> bool:
    """Returns whether a model has layer scales that ``--ls-init`` sets; ConvNeXt V2 has none."""
    return is_model_in_modules(name, ["convnext", "mrconvnext"]) and "convnextv2" not in name


def choices(recipe: str, data: Data, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that a recipe chooses for images, beside given ones that it may have to do with.

    "imagenet" is what the command line has without one.
    """
    if recipe == "imagenet":
        return {}
    images = len(data.train)
    batch = 2 ** min(max(round(math.log2(max(images, 1) / 40)), 2), 7 if recipe == "finetune" else 8)
    batch = given.get("global_batch", batch)
    steps = max(images // batch, 1)  # of an epoch
    least, most = EPOCHS[recipe]
    epochs = given.get("epochs", min(max(round(STEPS[recipe] / steps), least), most))
    own = {"global_batch": batch, "epochs": epochs, "warmup_epochs": epochs / 20}
    # The averaged weights forget after the last twentieth of the run.
    own["model_ema_decay"] = round(1 - 1 / max(epochs * steps / 20, 2), 4)
    if "img_size" not in given and hasattr(data.train, "__getitem__"):
        side = side_for(data.train)
        if recipe == "small":
            own["img_size"] = side
        elif 2 * side < LARGE:  # weights know larger things; enlarged more than twice, images only cost more
            own["img_size"] = 2 * side
    return {**own, **COMMON, **FIXED[recipe]}


def side_for(images: SizedDataset) -> int:
    """Returns the side that images have, about, in steps of 32 pixels, from 64 to `LARGE`: more would cost more."""
    # Of a copy: an opened tar file can't be shared with the processes that read it later.
    samples = Samples(copy.deepcopy(images), transform=lambda image: image.size, seed=0, train=True)
    sides = [min(samples[0, i].image) for i in range(0, len(images), max(1, len(images) // 50))]
    return min(max(32 * math.ceil(statistics.median(sides) / 32), 64), LARGE)


def doubts(args: argparse.Namespace, images: int) -> list[str]:
    """Returns why a schedule may not train anything."""
    found = []
    steps = args.epochs * (images // args.global_batch)
    if args.warmup_epochs >= args.epochs:
        found.append(
            f"--warmup-epochs {args.warmup_epochs:g} is not less than --epochs {args.epochs}: the learning rate never "
            "gets to where it should be"
        )
    started = args.pretrained or args.finetune is not None
    if not started and args.ls_init is None and steps < 5000 and has_layer_scales(args.model):
        found.append(f"{steps} steps hardly open layer scales that start at 1e-6: give --ls-init 0.1")
    rate = learning_rate(args)
    if not started and rate * steps < 0.02:
        found.append(f"{steps} steps at a learning rate of {rate:.1e} hardly move weights that are random")
    return found


def _as_words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{own:g}" for own in value)
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else "" if value is True else str(value)
