"""The model of a run, what data it takes, and the optimizer of its parameters."""

import argparse
from typing import Any, Optional

import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import freeze
from torch import nn

from mrconvnext.convert import options_of_file
from mrconvnext.hub import HTTP_ERROR, check_name

from .errors import UserError

# ConvNeXt's rates of stochastic depth on ImageNet-1k; small sizes, of which the paper has none, as timm's recipes.
DROP_PATH = {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5, "huge": 0.5}


def check_model(args: argparse.Namespace) -> None:
    """Raises a UserError if timm knows no model of the name that the arguments of a run give."""
    try:
        check_name(args.model)
    except ValueError as error:
        raise UserError(f"--model {error}") from error


def make_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """Returns the model that the arguments of a run describe, its frozen modules frozen.

    Raises:
        UserError: If there is no such model, or it can't have these options, weights or frozen modules, or its
            weights can't be had.
    """
    check_model(args)
    options = {
        "num_classes": classes,
        "drop_path_rate": drop_path_rate(args),
        "ls_init_value": args.ls_init,
        **args.model_kwargs,
    }
    if options.get("in_chans", 3) != 3:
        raise UserError(f"--model-kwargs in_chans={options['in_chans']}: images are read in colour, of 3 channels")
    if args.sync_norm and options.get("branch_norm", "parseval") != "parseval":
        raise UserError(
            f"--sync-norm takes branch_norm=parseval, got --model-kwargs branch_norm={options['branch_norm']}"
        )
    if args.sync_norm:
        options |= {"branch_norm": "parseval", "sync_norm": True}
    is_ours = timm.models.is_model_in_modules(args.model, ["mrconvnext"])
    asked = f"--model {args.model}" + (f" --finetune {args.finetune}" if args.finetune else "")
    sizes = [args.img_size]
    try:
        if args.finetune:
            found = options_of_file(args.finetune, timm.get_pretrained_cfg_value(args.model, "classifier"))
            file_classes, file_size = found.pop("num_classes"), found.pop("img_size", None)
            options["pretrained_cfg_overlay"] = {"file": str(args.finetune), "num_classes": file_classes}
            options = {**found, **options}
            sizes.insert(0 if args.keep_kernels else 1, file_size)
            if not is_ours:  # of which timm takes any file whose classes are others, whether or not it fits
                options["num_classes"] = file_classes
        if is_ours and any(sizes):
            options.setdefault("img_size", next(filter(None, sizes)))
        model: Any = timm.create_model(args.model, pretrained=args.pretrained or args.finetune is not None, **options)
        if model.num_classes != classes:
            model.reset_classifier(num_classes=classes)
        model.set_grad_checkpointing(enable=args.grad_checkpointing)
    except (HTTP_ERROR, LocalEntryNotFoundError) as error:
        source = timm.get_pretrained_cfg_value(args.model, "hf_hub_id")
        reason = " ".join(str(error).split())
        raise UserError(
            f"--pretrained: the weights of {args.model} can't be had from {source} on the Hub ({reason:.200}): give a "
            "file that holds them as --finetune FILE, or leave --pretrained out to start from random ones"
        ) from error
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise UserError(" ".join(f"{asked}: {error}".split())) from error
    modules = dict(model.named_modules())
    for name in args.freeze:
        if name not in modules:
            children = ", ".join(dict(model.named_children()))
            raise UserError(f"--freeze {name}: {args.model} has no such module, but {children}")
        # Its statistics stay as they are because it stays in eval mode.
        freeze(model, submodules=name, include_bn_running_stats=False)
    return model


def drop_path_rate(args: argparse.Namespace) -> Optional[float]:
    """Returns the rate of stochastic depth, None to leave a model that is not a ConvNeXt as it is."""
    if args.drop_path is not None or not timm.models.is_model_in_modules(args.model, ["convnext", "mrconvnext"]):
        return args.drop_path
    return next((DROP_PATH[word] for word in args.model.partition(".")[0].split("_") if word in DROP_PATH), 0.1)


def data_config(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Returns size, normalization and crop of the images for a model: the arguments' where given, or its own."""
    side = args.img_size
    given = {"crop_pct": args.crop_pct, "input_size": (3, side, side) if side else None}
    return resolve_data_config({key: value for key, value in given.items() if value}, model=model)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Returns an optimizer with timm's groups, in each of which the kernels are a group of their own.

    Raises:
        UserError: If timm has no such optimizer, or it can't have these options.
    """
    no_decay: set[str] = getattr(model, "no_weight_decay", set)()
    decay = {"weight_decay": args.weight_decay, "no_weight_decay_list": no_decay}
    if args.layer_decay is None:
        groups = param_groups_weight_decay(model, **decay)
    else:
        groups = param_groups_layer_decay(model, **decay, layer_decay=args.layer_decay)
    names: set[str] = getattr(model, "kernel_parameters", set)()
    kernels = {id(model.get_parameter(name)) for name in names}
    split = []
    for group in groups:
        for is_kernel, scale in ((False, 1.0), (True, args.kernel_lr_scale)):
            own = [parameter for parameter in group["params"] if (id(parameter) in kernels) == is_kernel]
            if own:
                split.append({**group, "params": own, "lr_scale": scale * group.get("lr_scale", 1.0)})
    options: dict[str, Any] = {"lr": learning_rate(args), "weight_decay": args.weight_decay}
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    if args.opt == "adamw":
        options["fused"] = True  # all parameters of a group in one launch
    try:
        return create_optimizer_v2(split, opt=args.opt, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"--opt {args.opt}: {error}") from error


def learning_rate(args: argparse.Namespace) -> float:
    """Returns the highest learning rate of the schedule."""
    return args.lr if args.no_lr_scaling else args.lr * args.global_batch / 4096
