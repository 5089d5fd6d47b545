"""Pictures of what the layers of a model hold and see. Needs matplotlib: ``pip install "mrconvnext[plots]"``."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .grid import lag_map
from .mrconv import MRConv2d
from .mrconvnext import MRConvNeXt


def plot_kernels(model: MRConvNeXt) -> Figure:
    """Returns a picture of the first layer of each stage: its branches and its merged kernel, in training form.

    A row a stage, for the channel whose branches weigh most. On the left the kernels as sequences, over the lag; then
    as images, over the distance in rows and columns: every branch as parameterized, before norm and α, and the merged
    kernel, local taps included, that the layer equals in eval mode.

    Raises:
        RuntimeError: If the model is deployed, its branches gone.
    """
    layers = [stage.blocks[0].conv_dw for stage in model.stages]
    columns = max(len(layer.branch_lengths) for layer in layers)
    figure = Figure(figsize=(7 + 1.7 * (columns + 1), 2.4 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), columns + 3, squeeze=False, width_ratios=[2.4, 2.4] + [1] * (columns + 1))
    for stage, (layer, row) in enumerate(zip(layers, axes)):
        _plot_layer(layer, row, f"stage {stage + 1}, grid {layer.reference_grid[0]}×{layer.reference_grid[1]}")
    return figure


@torch.no_grad()
def _plot_layer(layer: MRConv2d, axes: list[Axes], title: str) -> None:
    kernels = layer.branch_kernels()
    channel = int(layer.alpha.abs().sum(0).argmax())
    branches = [kernel[channel].float() for kernel in kernels]
    merged = layer.merged_kernel()[0][channel].float()
    *images, merged_image = axes[2:]

    # The longest first, so that it does not hide the short ones.
    for kernel, length in reversed(list(zip(branches, layer.branch_lengths))):
        _plot_sequence(axes[0], kernel, label=f"{length}")
    axes[0].legend(title="length", fontsize="x-small", title_fontsize="x-small", loc="upper right")
    axes[0].set_title(f"{title}: branches", fontsize="small")
    _plot_sequence(axes[1], merged, color="black")
    axes[1].set_title(f"merged kernel, channel {channel}", fontsize="small")
    for ax, kernel, length, alpha in zip(images, branches, layer.branch_lengths, layer.alpha[:, channel]):
        _plot_image(ax, kernel, layer, f"length {length}\nα = {alpha:.2f}")
    for ax in images[len(branches) :]:
        ax.axis("off")
    _plot_image(merged_image, merged, layer, "merged")


def _plot_sequence(ax: Axes, kernel: Tensor, **style: Any) -> None:
    reach = len(kernel) // 2
    ax.plot(range(-reach, reach + 1), kernel.numpy(), linewidth=0.8, **style)
    ax.set_xlabel("lag", fontsize="small")
    ax.tick_params(labelsize="x-small")


def _plot_image(ax: Axes, kernel: Tensor, layer: MRConv2d, title: str) -> None:
    """Draws a kernel over the distance of two pixels, on the scale of the whole reference grid."""
    image = lag_map(kernel, layer.row_stride)
    rows, columns = image.shape
    left, bottom = -(columns // 2) - 0.5, rows // 2 + 0.5
    limit = kernel.abs().max().clamp(min=1e-12).item()
    extent = (left, left + columns, bottom, -bottom)
    ax.imshow(image.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", extent=extent)
    height = layer.reference_grid[0]
    ax.set_ylim(height + 0.5, -height - 0.5)
    ax.set_facecolor("0.9")
    ax.set_title(title, fontsize="small")
    ax.set_xlabel("columns", fontsize="small")
    ax.set_ylabel("rows", fontsize="small")
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
            ax.imshow(field.numpy(), cmap="magma", vmin=-4, vmax=0)
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, stage {stage + 1}", fontsize="x-small")
    return figure


def _receptive_field(model: Any, images: Tensor, stage: int) -> Tensor:
    """Returns the effective receptive field (H, W) of the middle of a stage's feature map, its largest value 1."""
    images = images.clone().requires_grad_()
    (features,) = model.forward_intermediates(images, indices=[stage], intermediates_only=True)
    height, width = features.shape[2:]
    (gradient,) = torch.autograd.grad(features[:, :, height // 2, width // 2].abs().sum(), images)
    field = gradient.abs().sum((0, 1))
    return (field / field.max()).clamp(min=1e-12)
