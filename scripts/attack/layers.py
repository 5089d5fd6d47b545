"""Random layers and models against the definition: a sum over the lags of a kernel, in float64."""

import copy
import random
from pathlib import Path
from typing import Any, Union

import timm
import torch
from helpers import randomize, relative_error
from torch import Tensor, nn

import mrconvnext
from mrconvnext import MRConv1d, MRConv2d
from mrconvnext.engines import NAMES
from mrconvnext.kernels import KERNELS
from mrconvnext.norms import NORMS

# Of the largest value: what float32 and float64 may lose.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}

Layer = Union[MRConv1d, MRConv2d]


def random_layers(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Compares so many random layers with the direct sum; returns those that differ."""
    findings, largest = [], 0.0
    for i in range(count):
        torch.manual_seed(choose.randrange(2**31))
        layer, options = random_layer(choose)
        x = random_input(layer, choose)
        with torch.no_grad(), mrconvnext.engine(engine := choose.choice(NAMES)):
            expected = by_direct_sum(copy.deepcopy(layer), x)
            deployed = copy.deepcopy(layer)
            deployed.reparameterize()
            for form, own in (("training form", layer), ("deployed", deployed)):
                # Where branches cancel each other, what is left of them is as uncertain as they were.
                scale = max(expected.abs().max(), x.abs().max())
                error = ((own(x).double() - expected).abs().max() / scale).item()
                largest = max(largest, error / LIMITS[x.dtype])
                if not error <= LIMITS[x.dtype]:
                    findings.append(
                        f"layer {i}, {options}, {form}, {engine}, {list(x.shape)} {x.stride()}: {error:.1e}"
                    )
    print(f"{count} layers: at most {largest:.2f} of the limits {LIMITS}, {len(findings)} findings", flush=True)
    return findings


def random_models(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Compares so many random models with ones whose layers compute the direct sum; returns those that differ."""
    findings, largest = [], 0.0
    for i in range(count):
        torch.manual_seed(choose.randrange(2**31))
        options = random_options(choose)
        size = choose.choice([32, 33, 48, (40, 64)])
        shape: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": tuple(choose.randrange(8, 24) for _ in range(4))}
        kernel_sizes = tuple(choose.choice([0, 1, 3, 5, 7]) for _ in range(4))
        name = choose.choice(["mrconvnext_atto", "mrconvnextv2_atto", "mrconvnext_tiny"])
        options.update(img_size=size, num_classes=3, kernel_sizes=kernel_sizes, patch_size=choose.choice([1, 2, 4]))
        model = randomize(timm.create_model(name, **shape, **options)).eval()
        x = torch.randn(2, 3, choose.randrange(32, 70), choose.randrange(32, 70))
        with torch.no_grad():
            expected = of_direct_sums(model)(x.double())
            for form, own in (("training form", model), ("deployed", copy.deepcopy(model).reparameterize())):
                error = relative_error(own(x), expected)
                largest = max(largest, error)
                if not error <= LIMITS[torch.float32]:
                    findings.append(f"model {i}, {name}, {shape}, {options}, {form}, {list(x.shape)}: {error:.1e}")
    print(f"{count} models: errors of at most {largest:.1e}, {len(findings)} findings", flush=True)
    return findings


def random_options(choose: random.Random) -> dict[str, Any]:
    """Returns options of branches."""
    kernel = choose.choice(list(KERNELS))
    return {
        "kernel": kernel,
        "concat_decay": None if KERNELS[kernel].is_single else choose.choice([None, 1.0, 2.0]),
        "branch_norm": choose.choice(NORMS),
        "bidirectional": choose.random() < 0.7,
        "max_branches": choose.randrange(1, 6),
        "modes": choose.randrange(1, 20),
        "taps": choose.randrange(2, 20),
    }


def random_layer(choose: random.Random) -> tuple[Layer, dict[str, Any]]:
    """Returns a layer in eval mode and what it was made with."""
    options = {**random_options(choose), "dtype": choose.choice([torch.float32, torch.float64])}
    options["channels"] = choose.choice([1, 2, 3, 7, 15, 16, 17, 33])
    if choose.random() < 0.2:
        options["length"] = length = choose.randrange(1, 200)
        if not KERNELS[options["kernel"]].is_single:
            options["min_length"] = choose.choice([None, choose.randrange(1, length + 1)])
        return randomize(MRConv1d(**options)).eval(), options
    options["kernel_size"], options["dilation"] = choose.choice([0, 1, 3, 5, 7]), choose.randrange(1, 3)
    least = options["dilation"] * (options["kernel_size"] // 2) + 1
    options["grid"] = (choose.randrange(least, least + 10), choose.randrange(least, least + 10))
    return randomize(MRConv2d(**options)).eval(), options


def random_input(layer: Layer, choose: random.Random) -> Tensor:
    """Returns images or sequences of any size and order in memory."""
    dtype = layer.alpha.dtype
    batch, height, width = choose.randrange(1, 4), choose.randrange(1, 14), choose.randrange(1, 14)
    if isinstance(layer, MRConv1d):
        return torch.randn(batch, layer.channels, choose.randrange(1, 250), dtype=dtype)
    kind = choose.choice(["contiguous", "channels last", "every second", "transposed", "expanded"])
    if kind == "every second":
        return torch.randn(batch, 2 * layer.channels, height, 2 * width, dtype=dtype)[:, ::2, :, ::2]
    if kind == "transposed":
        return torch.randn(batch, layer.channels, width, height, dtype=dtype).transpose(2, 3)
    if kind == "expanded":
        return torch.randn(1, layer.channels, height, 1, dtype=dtype).expand(batch, -1, -1, width)
    x = torch.randn(batch, layer.channels, height, width, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if kind == "channels last" else x


# The definition


def by_direct_sum(layer: Layer, x: Tensor) -> Tensor:
    """Returns what a layer in training form and eval mode computes by its definition, in float64."""
    layer, x = layer.double(), x.double()
    images = x.unsqueeze(-1) if isinstance(layer, MRConv1d) else x
    y = torch.zeros_like(images)
    for i, kernel in enumerate(layer.branch_kernels()):
        branch = convolved(images, kernel, layer.row_stride, layer.guard)
        weight = layer.alpha[i] / (layer.options.concat_decay or 1) ** i
        y += weight.view(-1, 1, 1) * normalised(layer, i, kernel, branch)
    if layer.weight is not None:
        padding = layer.dilation * (layer.kernel_size // 2)
        y += nn.functional.conv2d(
            images, layer.weight, layer.bias, padding=padding, dilation=layer.dilation, groups=layer.channels
        )
    return y.squeeze(-1) if isinstance(layer, MRConv1d) else y


def convolved(x: Tensor, kernel: Tensor, row_stride: int, guard: int) -> Tensor:
    """Returns images (B, C, H, W) convolved with a two-sided kernel (C, 2·M − 1) lag by lag, as `grid` has them."""
    height, width = x.shape[2:]
    stride = width + guard
    u = nn.functional.pad(x, (0, guard)).flatten(2)  # (B, C, L)
    y = torch.zeros_like(u)
    reach, length = kernel.shape[1] // 2, u.shape[2]
    for lag in range(-reach, reach + 1):
        row, column = divmod(lag + row_stride // 2, row_stride)
        column -= row_stride // 2
        if stride != row_stride and not -(stride // 2) <= column < stride - stride // 2:
            continue  # rows of another length have no such column
        moved = row * stride + column
        if abs(moved) >= length:
            continue
        weight = kernel[:, reach + lag].unsqueeze(-1)
        if moved >= 0:
            y[..., moved:] += weight * u[..., : length - moved]
        else:
            y[..., :moved] += weight * u[..., -moved:]
    return y.unflatten(2, (height, stride))[..., :width]


def normalised(layer: Layer, branch: int, kernel: Tensor, y: Tensor) -> Tensor:
    """Returns a branch's output as the layer's norm normalises it in evaluation."""
    if layer.options.norm == "none":
        return y
    if layer.options.norm == "kernel":
        return y / (kernel.square().sum(1).sqrt() + 1e-5).view(-1, 1, 1)
    norm: Any = layer.norm
    own = [
        value.unflatten(0, (len(layer.branch_lengths), -1))[branch] if value.dim() == 1 else value[branch]
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    ]
    mean, variance, weight, bias = (value.view(-1, 1, 1) for value in own)
    return (y - mean) / (variance + norm.eps).sqrt() * weight + bias


class DirectSum(nn.Module):
    """Stands in the place of a layer, and computes the same by the definition."""

    def __init__(self, layer: MRConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return by_direct_sum(self.layer, x)


def of_direct_sums(model: nn.Module) -> nn.Module:
    """Returns a copy of a model in float64 whose layers compute the direct sum."""
    own: Any = copy.deepcopy(model).double()
    for stage in own.stages:
        for block in stage.blocks:
            block.conv_dw = DirectSum(block.conv_dw)
    return own
