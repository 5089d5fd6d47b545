"""Pictures of what the layers hold. Needs matplotlib: ``pip install "mrconvnext[plots]"``."""

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
    channel = layer.alpha.abs().sum(0).argmax().item()
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


def _plot_sequence(ax: Axes, kernel: Tensor, **style) -> None:
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
