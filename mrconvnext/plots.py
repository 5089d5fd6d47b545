"""Pictures of what the layers of a model hold and see. Needs matplotlib: ``pip install "mrconvnext[plots]"``."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .grid import lag_map
from .mrconv import MRConv2d
from .mrconvnext import MRConvNeXt


def plot_kernels(model: MRConvNeXt) -> Figure:
    """Returns a picture of the first layer of each stage: its merged kernel and, in training form, its branches.

    A row a stage, for the channel whose branches weigh most, or whose kernel is largest. On the left the kernels as
    sequences, over the lag; then as images, over the distance in rows and columns: the merged kernel, local taps
    included, that the layer equals in eval mode, its colours those of what lies beyond the local taps; and every branch
    as parameterized, before norm and α.
    """
    layers = [stage.blocks[0].conv_dw for stage in model.stages]
    columns = max(len(layer.alpha) for layer in layers) + 1
    figure = Figure(figsize=(7 + 1.9 * columns, 3.2 * len(layers)), layout="constrained")
    for stage, (layer, row) in enumerate(zip(layers, figure.subfigures(len(layers), 1, squeeze=False)[:, 0])):
        channel = _strongest_channel(layer)
        height, width = layer.reference_grid
        row.suptitle(f"stage {stage + 1}, grid {height}×{width}, channel {channel}", fontsize="medium")
        _plot_layer(layer, channel, row, columns)
    return figure


@torch.no_grad()
def _strongest_channel(layer: MRConv2d) -> int:
    size = layer.alpha.abs().sum(0) if layer.kernel is None else layer.merged_kernel()[0].abs().sum(1)
    return int(size.argmax())


@torch.no_grad()
def _plot_layer(layer: MRConv2d, channel: int, figure: Any, columns: int) -> None:
    merged = layer.merged_kernel()[0].float()
    kernels: list[Tensor] = []
    if layer.kernel is None:
        kernels = [kernel[channel].float() for kernel in layer.branch_kernels()]
    sequences = 2 if kernels else 1
    # The layers with fewer branches keep the panels' size: what they have not is left blank at the right.
    widths = [2.4] * sequences + [1.2] * columns
    axes = list(figure.subplots(1, len(widths), width_ratios=widths))
    for ax in axes[sequences + 1 + len(kernels) :]:
        ax.remove()
    if kernels:
        # The longest first, so that it does not hide the short ones.
        for kernel, length in reversed(list(zip(kernels, layer.branch_lengths))):
            _plot_sequence(axes[0], kernel, label=f"{length}")
        axes[0].legend(title="length", fontsize="x-small", title_fontsize="x-small", loc="upper right")
        axes[0].set_title("branches, before norm and α", fontsize="small")
    _plot_sequence(axes[sequences - 1], merged[channel], color="black")
    axes[sequences - 1].set_title("merged kernel", fontsize="small")
    _plot_image(
        axes[sequences],
        merged[channel],
        layer,
        "merged, colours of what\nlies beyond the taps",
        beyond=layer.local_reach,
    )
    for ax, kernel, length, alpha in zip(axes[sequences + 1 :], kernels, layer.branch_lengths, layer.alpha[:, channel]):
        _plot_image(ax, kernel, layer, f"length {length}\nα = {alpha:.2f}")


def _plot_sequence(ax: Axes, kernel: Tensor, **style: Any) -> None:
    reach = len(kernel) // 2
    ax.plot(range(-reach, reach + 1), kernel.numpy(), linewidth=0.8, **style)
    ax.set_xlabel("lag", fontsize="small")
    ax.tick_params(labelsize="x-small")


def _plot_image(ax: Axes, kernel: Tensor, layer: MRConv2d, title: str, beyond: int = -1) -> None:
    """Draws a kernel over the distance of two pixels, in colours for what lies ``beyond`` so many pixels."""
    image = lag_map(kernel, layer.row_stride)
    rows, columns = image.shape
    left, bottom = -(columns // 2) - 0.5, rows // 2 + 0.5
    outside = image.clone()
    outside[max(rows // 2 - beyond, 0) : rows // 2 + beyond + 1, columns // 2 - beyond : columns // 2 + beyond + 1] = 0
    limit = outside.abs().max().clamp(min=1e-12).item()
    extent = (left, left + columns, bottom, -bottom)
    style: Any = {"vmin": -limit, "vmax": limit, "aspect": "equal", "interpolation": "nearest"}
    picture = ax.imshow(image.numpy(), cmap="RdBu", extent=extent, **style)
    clipped = "both" if image.abs().max() > limit else "neither"
    bar = ax.figure.colorbar(picture, ax=ax, ticks=[-limit, 0, limit], format="%.2g", shrink=0.8, extend=clipped)
    bar.ax.tick_params(labelsize="xx-small")
    ax.set_title(title, fontsize="small")
    ax.set_xlabel("columns", fontsize="small")
    ax.set_ylabel("rows", fontsize="small")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.tick_params(labelsize="x-small")


@torch.no_grad()
def plot_alpha_norms(model: MRConvNeXt) -> Figure:
    """Returns a picture of the weight of every branch over the depth (after Cunningham et al. 2024, figure 3b).

    The weight of a branch is the root mean square of its α over the channels; 1 / branches is where α starts.

    Raises:
        RuntimeError: If the model is deployed, its branches gone.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MRConv2d)]
    if any(layer.kernel is not None for layer in layers):
        raise RuntimeError("the branches of a deployed model are gone: give its training form")
    branches = max(len(layer.branch_lengths) for layer in layers)
    weights = torch.full((branches, len(layers)), float("nan"))
    for depth, layer in enumerate(layers):
        weights[: len(layer.alpha), depth] = layer.alpha.float().square().mean(dim=1).sqrt()
    figure = Figure(figsize=(1.5 + 0.8 * len(layers), 1.2 + 0.5 * branches), layout="constrained")
    ax = figure.subplots()
    picture = ax.imshow(weights.numpy(), cmap="Blues", vmin=0, aspect="auto")
    for depth, layer in enumerate(layers):
        for branch, length in enumerate(layer.branch_lengths):
            bright = weights[branch, depth] < 0.6 * weights.nan_to_num().max()
            text = f"{weights[branch, depth]:.2f}\n{length} lags"
            ax.text(
                depth,
                branch,
                text,
                color="black" if bright else "white",
                ha="center",
                va="center",
                fontsize="xx-small",
            )
    ax.set(xlabel="layer", ylabel="branch, shortest first", xticks=range(len(layers)), yticks=range(branches))
    ax.set_title("root mean square of α over the channels", fontsize="small")
    figure.colorbar(picture)
    return figure


def plot_receptive_fields(models: dict[str, Any], images: Tensor) -> Figure:
    """Returns a picture of what each stage of each model sees: a row a model, a column a stage.

    The effective receptive field (after Luo et al. 2016) of the position in the middle of a feature map: the size of
    the gradient of the sum of its features' absolute values with respect to the pixels, over all images; logarithmic.

    Args:
        models: Models of timm with ``forward_intermediates``, by the names of their rows; in eval mode.
        images: Images (B, C, H, W) as the models take them.
    """
    columns = max(len(model.feature_info) for model in models.values())
    figure = Figure(figsize=(2.2 * columns + 0.8, 2.3 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), columns, squeeze=False)
    for row, (name, model) in zip(axes, models.items()):
        for stage, ax in enumerate(row):
            field = _receptive_field(model, images, stage).log10()
            picture = ax.imshow(field.numpy(), cmap="magma", vmin=-4, vmax=0)
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, stage {stage + 1}", fontsize="x-small")
    bar = figure.colorbar(picture, ax=axes, ticks=[-4, -2, 0], format=lambda power, _: f"$10^{{{power:.0f}}}$")
    bar.set_label("size of the gradient, over the largest", fontsize="x-small")
    return figure


def _receptive_field(model: Any, images: Tensor, stage: int) -> Tensor:
    """Returns the effective receptive field (H, W) of the middle of a stage's feature map, its largest value 1."""
    images = images.clone().requires_grad_()
    (features,) = model.forward_intermediates(images, indices=[stage], intermediates_only=True)
    height, width = features.shape[2:]
    (gradient,) = torch.autograd.grad(features[:, :, height // 2, width // 2].abs().sum(), images)
    field = gradient.abs().sum((0, 1))
    return (field / field.max()).clamp(min=1e-12)
