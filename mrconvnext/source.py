"""What the command's SOURCE stands for: a model, of a folder, the Hub, one of timm's names or a checkpoint file."""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
from timm.models.convnext import ConvNeXt

from .convert import options_of_file
from .hub import check_name, read_config
from .mrconvnext import MRConvNeXt, from_convnext

SOURCE = """
SOURCE is a folder that mrconvnext.save wrote, hf-hub:ORGANISATION/NAME, one of timm's names with or without tag
(mrconvnext_tiny.convnext_fb_in1k, convnext_tiny.fb_in1k), or a checkpoint file with --model. A ConvNeXt is taken as an
MRConvNeXt whose branches have α = 0.
"""

# What an error says that SOURCE may be.
ALLOWED = "a folder that mrconvnext.save wrote, hf-hub:ORGANISATION/NAME or one of timm's names of a ConvNeXt"

# Files that stand for their folder.
WRITTEN = ("config.json", "model.safetensors", "pytorch_model.bin")


def load(args: argparse.Namespace) -> MRConvNeXt:
    """Returns the MRConvNeXt that a command's SOURCE stands for, in eval mode."""
    path = Path(args.source)
    name, options = own_name(args.source), dict(args.model_kwargs)
    if path.is_file() and args.model is None and path.name in WRITTEN and path.with_name("config.json").is_file():
        path = path.parent
    if path.is_file():
        if args.model is None:
            raise ValueError(
                f"{path} is a file: if it is a checkpoint, say with --model what it is of, such as --model "
                f"mrconvnext_tiny, else give {ALLOWED}"
            )
        name = args.model
        check_name(name)
        found = options_of_file(path)
        overlay = {"file": str(path), "num_classes": found["num_classes"]}
        options = {**found, **options, "pretrained_cfg_overlay": overlay}
    elif args.model is not None:
        raise ValueError(f"--model {args.model} is for a checkpoint file, and {args.source} is not a file")
    elif path.is_dir():
        check_folder(path)
        name = f"local-dir:{path}"
    elif args.source.startswith("local-dir:"):
        check_folder(Path(args.source.removeprefix("local-dir:")))
    elif not args.source.startswith("hf-hub:"):
        check_source(args.source)
    try:
        model: Any = timm.create_model(name, pretrained=True, **options)
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:  # timm trusts a config.json
        raise ValueError(f"{args.source}: timm can't make the model: {type(error).__name__}: {error}") from error
    if type(model) is ConvNeXt:
        cfg: Any = model.pretrained_cfg
        started_from = cfg.get("hf_hub_id")
        model = from_convnext(model, img_size=cfg["input_size"][1:])
        model.started_from = started_from
    if not isinstance(model, MRConvNeXt):
        raise TypeError(f"{args.source} must be an MRConvNeXt or a ConvNeXt, got {type(model).__name__}")
    return model.eval()


def own_name(name: str) -> str:
    """Returns the name of the MRConvNeXt that starts from the weights of a ConvNeXt of timm's, any other as it is."""
    base, _, tag = name.partition(".")
    own = f"mr{base}.{base.partition('_')[0]}_{tag}" if tag else f"mr{base}"
    return own if own in {*timm.list_models("mrconvnext*"), *timm.list_pretrained("mrconvnext*")} else name


def check_source(name: str) -> None:
    """Raises an error if a name is not one of timm's, or of another of its networks, before anything is downloaded."""
    try:
        check_name(name, also="a file or folder, nor ")
    except ValueError as error:
        raise ValueError(f"{error}; give {ALLOWED}") from error
    module = timm.models.model_entrypoint(name.partition(".")[0]).__module__
    if module.startswith("timm.models.") and module != "timm.models.convnext":
        raise TypeError(f"{name} is not an MRConvNeXt or a ConvNeXt: give {ALLOWED}")


def check_folder(folder: Path) -> None:
    """Raises a ValueError if a folder does not hold a model of images, which says more than timm's errors."""
    if is_of_sequences(folder) or is_of_sequences(folder / "trained"):
        raise ValueError(f"{folder} holds an MRConvSequence, a model of sequences: give {ALLOWED}")
    if (folder / "args.yaml").is_file():
        if (folder / "trained").is_dir():
            raise ValueError(
                f"{folder} is the folder of a training run: give {folder / 'fused'} or {folder / 'trained'}"
            )
        raise ValueError(f"{folder} is the folder of a training run: give {folder / 'best.safetensors'} and --model")
    if not read_config(folder):
        raise ValueError(f"{folder} holds no config.json: give {ALLOWED}")


def is_of_sequences(folder: Path) -> bool:
    """Returns whether a folder is one that MRConvSequence.save_pretrained wrote."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" not in config and {"vocabulary", "pooling"} <= config.keys()
