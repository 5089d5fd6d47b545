"""The command line of ``train_imagenet.py``."""

import argparse
import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

import torch
import yaml
from timm.utils import ParseKwargs

# Of kernels made for larger images none of their layers would fit into memory.
LARGEST_SIDE = 4096

# What resuming a run does not take over, which is how it was called, and what evaluating its weights does not: where
# these came from as well.
OF_CALL = ("output", "resume", "evaluate", "device", "workers")
OF_STARTING = (*OF_CALL, "pretrained", "finetune")


def positive(text: str) -> int:
    """Reads an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def natural(text: str) -> int:
    """Reads an integer of at least 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def fraction(text: str) -> float:
    """Reads a number between 0 and 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def amount(text: str) -> float:
    """Reads a finite number of at least 0."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def above_zero(text: str) -> float:
    """Reads a finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def number(text: str) -> float:
    """Reads a finite number."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def part(text: str) -> float:
    """Reads a number above 0, up to 1."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0, and at most 1, got {text}")
    return value


def side(text: str) -> int:
    """Reads the side of an image in pixels."""
    if not 1 <= (value := int(text)) <= LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"must be from 1 to {LARGEST_SIDE} pixels, got {text}")
    return value


def seed(text: str) -> int:
    """Reads an integer that PyTorch takes for a seed."""
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^63 - 1, got {text}")
    return value


def folder(text: str) -> Path:
    """Reads the name of a folder, which is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a folder, got nothing")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and name options that are close to one that there is not."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 after saying why."""
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Returns the arguments, as ``ArgumentParser`` does."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = re.findall(r"--[\w-]+", self.format_usage())
            close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=2, cutoff=0.6)
            hint = f" (close are {', '.join(close)})" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found


class KeyValue(ParseKwargs):
    """Reads NAME=VALUE and rejects anything else."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Optional[str] = None,
    ) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} must be NAME=VALUE, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def parse_args(argv: Optional[list[str]] = None, description: Optional[str] = None) -> argparse.Namespace:
    """Returns the arguments of a run.

    Args:
        argv: Words of the command line, those of this program if None.
        description: What ``--help`` begins with.

    Raises:
        SystemExit: If the command line is invalid, after printing why.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_recipe_arguments(parser)
    add_optimization_arguments(parser)
    add_augmentation_arguments(parser)
    add_run_arguments(parser)
    args, of_run = with_those_of_run(parser, argv)
    if (args.resume or args.evaluate) and not (of_run or args.data_dir or args.dataset):
        parser.error(f"--output {args.output} does not hold a run")
    if args.dataset == "digits" and args.img_size is None:
        args.img_size = 32
    if args.scale[0] > args.scale[1]:
        parser.error(f"--scale must be a range, got {args.scale[0]} {args.scale[1]}")
    if args.evaluate and not args.pretrained and args.finetune is None:
        args.finetune = args.output / "best.safetensors"
    return args


def with_those_of_run(
    parser: argparse.ArgumentParser, argv: Optional[list[str]]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the arguments of a command line, and those of the run that is resumed or evaluated.

    Of the former, those that it does not give are the run's; ``given`` are the names of those that either gave.
    """
    args = parser.parse_args(argv)
    of_run = (
        arguments_of(args.output, OF_STARTING if args.evaluate else OF_CALL) if args.evaluate or args.resume else {}
    )
    parser.set_defaults(**of_run)
    args = parser.parse_args(argv)
    args.given = given(parser, argv) | set(of_run)
    return args, of_run


def given(parser: argparse.ArgumentParser, argv: Optional[list[str]]) -> set[str]:
    """Returns the names of the arguments that a command line has, whose values no recipe may change."""
    missing = object()
    names = vars(parser.parse_args(argv))
    parser.set_defaults(**dict.fromkeys(names, missing))
    return {name for name, value in vars(parser.parse_args(argv)).items() if value is not missing}


def arguments_of(run: Path, but_for: tuple[str, ...]) -> dict[str, Any]:
    """Returns the arguments of a run but for some; none without a run, or of one whose arguments are damaged."""
    file = run / "args.yaml"
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if name not in but_for}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="", help='"digits", or a name of timm: torch/…, hfds/…, wds/… (default: class folders)')
    add("--data-dir", type=Path, help="folder with a folder, or a tar file, for each split")
    add("--train-split", default="train", help="(default: %(default)s)")
    add("--val-split", default="validation", help="(default: %(default)s)")
    add("--dataset-download", action="store_true", help="let the dataset download itself (default: no)")
    add("--num-classes", type=positive, help="number of classes (default: that of the data)")
    add("--img-size", type=side, help="side of the images, pixels (default: the model's, 32 for digits)")
    add("--crop-pct", type=part, help="part of an image's side that is evaluated, 0 to 1 (default: the model's)")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", "-j", type=natural, default=workers, help="processes that read images (default: 4, or the cores)")
    add("--max-unreadable", type=natural, default=100, help="files that may be skipped in an epoch (default: 100)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="mrconvnext_tiny", help="name of a model of timm (default: %(default)s)")
    add("--model-kwargs", nargs="*", default={}, action=KeyValue, metavar="NAME=VALUE", help="its arguments")
    add("--pretrained", action="store_true", help="start from published weights (default: from random ones)")
    add(
        "--finetune",
        type=Path,
        metavar="FILE",
        help="start from a file's weights: the model's, or for ours a ConvNeXt's",
    )
    keep = "leave a file's kernels as many pixels long as they are, whatever the size of the images (default: as long "
    keep += "as before relative to them)"
    add("--keep-kernels", action="store_true", help=keep)
    add("--freeze", nargs="*", default=[], metavar="MODULE", help="modules that are not trained: stem, stages.0, …")
    add("--drop-path", type=fraction, help="rate of stochastic depth (default: 0.1, small 0.4, base and large 0.5)")
    add("--ls-init", type=number, help="initial value of the layer scales (default: 1e-6)")
    add("--sync-norm", action="store_true", help="branch statistics over all processes (default: each its own)")
    add("--channels-last", action="store_true", help="images in channels-last order")
    add("--license", help="licence of the weights, for the model cards (default: none is stated)")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass to save memory")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("recipe").add_argument
    recipe = "where the defaults of optimization and augmentation come from: ConvNeXt's for ImageNet, which are "
    recipe += "written below, or ones that follow the number of images (default: finetune with weights to start from, "
    recipe += "small below 100,000 images)"
    add("--recipe", choices=("imagenet", "finetune", "small"), help=recipe)
    add("--no-lr-scaling", action="store_true", help="take --lr as it is, not as one for a global batch of 4096")


def add_optimization_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=300, help="(default: %(default)s)")
    images = "images of a step, over all processes (default: %(default)s)"
    add("--global-batch", type=positive, default=4096, help=images)
    images = "images at once in a process (default: at most 128 that divide its share)"
    add("--batch-size", "-b", type=positive, help=images)
    add("--opt", default="adamw", help="optimizer, by timm's name (default: %(default)s)")
    add("--opt-betas", type=fraction, nargs=2, help="its betas (default: its own)")
    add("--lr", type=above_zero, default=4e-3, help="highest learning rate (default: %(default)s)")
    add("--kernel-lr-scale", type=amount, default=0.25, help="factor of the kernels' rate (default: %(default)s)")
    add(
        "--weight-decay",
        type=amount,
        default=0.05,
        help="of all but norms, biases, MRConv's kernels (default: %(default)s)",
    )
    add("--layer-decay", type=part, help="factor of the learning rate from layer to layer (default: none)")
    add("--clip-grad", type=above_zero, help="largest norm of the gradient (default: none)")
    add("--warmup-epochs", type=amount, default=20, help="(default: %(default)s)")
    add("--warmup-lr", type=amount, default=0.0, help="learning rate at the start (default: %(default)s)")
    add("--min-lr", type=amount, default=1e-6, help="learning rate at the end (default: %(default)s)")
    ema = "of the averaged weights, 0 for none (default: %(default)s)"
    add("--model-ema-decay", type=fraction, default=0.9999, help=ema)


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action="store_true", help="only resize: no flips, mixup, cutmix or smoothing")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment, as timm writes it (default: %(default)s)")
    crop = "part of an image that is cropped (default: 0.08 1)"
    add("--scale", type=part, nargs=2, default=(0.08, 1.0), help=crop)
    add("--hflip", type=fraction, default=0.5, help="probability of a flip (default: %(default)s)")
    add("--reprob", type=fraction, default=0.25, help="probability of random erasing (default: %(default)s)")
    add("--mixup", type=amount, default=0.8, help="alpha of mixup (default: %(default)s)")
    add("--cutmix", type=amount, default=1.0, help="alpha of cutmix (default: %(default)s)")
    add("--smoothing", type=fraction, default=0.1, help="label smoothing (default: %(default)s)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--output", type=folder, required=True, help="folder of the run")
    resume = '"auto": resume from the newest complete checkpoint, if there is one'
    add("--resume", default="", choices=("", "auto"), help=resume)
    evaluate = "evaluate the run's best weights, or those given, as they are and deployed"
    add("--evaluate", action="store_true", help=evaluate)
    add("--seed", type=seed, default=42, help="(default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cuda", "cpu"), default=device, help="(default: %(default)s)")
    add("--model-dtype", default="float32", choices=("float32", "float64"), help="(default: %(default)s)")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="autocast to this type (default: none)")
    add("--torchcompile", action="store_true", help="compile the model")
    modes = ("reduce-overhead", "max-autotune")
    add("--torchcompile-mode", choices=modes, help="of torch.compile; reduce-overhead: by CUDA graphs")
    add("--log-interval", type=positive, default=50, help="steps between two lines (default: %(default)s)")
    add("--checkpoint-interval", type=positive, default=500, help="steps between checkpoints (default: %(default)s)")


def to_plain(args: argparse.Namespace) -> dict[str, Union[str, float, bool, list, dict, None]]:
    """Returns arguments as JSON and YAML can hold them, but for `given`: what they are counts, not who chose it."""
    return json.loads(json.dumps({name: own for name, own in vars(args).items() if name != "given"}, default=str))
