"""The models of the rows and what does not depend on time: parameters, operations and errors."""

import argparse
import ast
import dataclasses
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from torch import Tensor, nn

from mrconvnext.engines.block import use_fused_blocks
from mrconvnext.flops import count_flops

from .rows import DERIVED, Row

# Ranges of what trained models have, by the parameter's or statistic's name.
TRAINED = {"running_mean": (-0.5, 0.5), "running_var": (0.3, 2.0), "alpha": (-1.0, 1.0), "gamma": (0.5, 1.5)}


def create_model(row: Row, args: argparse.Namespace) -> nn.Module:
    """Returns a row's model in eval mode; forms of one model have the same weights."""
    name, *given = row.model.split(":")
    options = {key: literal(value) for key, _, value in (option.partition("=") for option in given)}
    has_size = timm.get_pretrained_cfg_value(name, cfg_key="fixed_input_size")
    if has_size or is_model_in_modules(name, module_names=["mrconvnext"]):
        options.setdefault("img_size", row.img_size)
    if row.form == "conv_mlp":
        options["conv_mlp"] = True
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **options).eval()
    make_as_if_trained(model)
    model.to(device=args.device, memory_format=args.memory_format)
    if row.form == "deployed":
        model.reparameterize()
    if row.form == "fused blocks":
        use_fused_blocks(model)
    return model


def literal(text: str) -> Any:
    """Returns the Python value that a text stands for, or the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@torch.no_grad()
def make_as_if_trained(model: nn.Module) -> None:
    """Draws statistics, α and layer scales from `TRAINED`: a new ConvNeXt's logits hardly depend on its blocks."""
    for name, value in model.state_dict().items():
        if (last := name.rpartition(".")[2]) in TRAINED:
            value.uniform_(*TRAINED[last])


def make_images(row: Row, args: argparse.Namespace) -> Tensor:
    """Returns a batch of a row's images, the same every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((row.batch_size, 3, row.img_size, row.img_size), generator=generator)
    return images.to(device=args.device, memory_format=args.memory_format)


def count(row: Row, args: argparse.Namespace) -> None:
    """Adds to a row what does not depend on time: parameters, operations and the error."""
    model = create_model(row, args)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = count_flops(model, input_size=(3, row.img_size, row.img_size))
    row.gflops, row.gflops_per_pass = flops.per_image / 1e9, flops.per_pass / 1e9
    if row.form in DERIVED:
        images = make_images(dataclasses.replace(row, batch_size=1), args)
        original = create_model(dataclasses.replace(row, form=DERIVED[row.form]), args)
        row.error = largest_error(model, original, images)


@torch.no_grad()
def largest_error(model: nn.Module, original: nn.Module, images: Tensor) -> float:
    """Returns the largest difference of two models' logits, in float32, as a fraction of the largest logit."""
    logits, expected = model(images), original(images)
    return ((logits - expected).abs().max() / expected.abs().max()).item()
