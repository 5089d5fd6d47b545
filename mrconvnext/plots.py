"""Pictures of what the layers of a model hold and see. Needs matplotlib: ``pip install "mrconvnext[plots]"``."""

from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

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
        channel = strongest_channel(layer)
        height, width = layer.reference_grid
        row.suptitle(f"stage {stage + 1}, grid {height}×{width}, channel {channel}", fontsize="medium")
        _plot_layer(layer, channel, row, columns)
    return figure


@torch.no_grad()
def strongest_channel(layer: MRConv2d) -> int:
    """Returns the channel whose branches weigh most or, of a deployed layer, whose kernel is largest."""
    size = layer.alpha.abs().sum(0) if layer.kernel is None else layer.merged_kernel()[0].abs().sum(1)
    return int(size.argmax())


@torch.no_grad()
def _plot_layer(layer: MRConv2d, channel: int, figure: Any, columns: int) -> None:
    merged = layer.merged_kernel()[0].float()
    kernels = _branches(layer, channel)
    sequences = 2 if kernels else 1
    # The layers with fewer branches keep the panels' size: what they have not is left blank at the right.
    widths = [2.4] * sequences + [1.2] * columns
    axes = list(figure.subplots(1, len(widths), width_ratios=widths))
    for ax in axes[sequences + 1 + len(kernels) :]:
        ax.remove()
    if kernels:
        _plot_branches(axes[0], kernels, layer.branch_lengths)
        axes[0].set_title("branches, before norm and α", fontsize="small")
    _plot_sequence(axes[sequences - 1], merged[channel], color="black")
    axes[sequences - 1].set_title("merged kernel", fontsize="small")
    _plot_image(
        axes[sequences],
        lag_map(merged[channel], layer.row_stride),
        "merged, colours of what\nlies beyond the taps",
        beyond=layer.local_reach,
    )
    for ax, kernel, length, alpha in zip(axes[sequences + 1 :], kernels, layer.branch_lengths, layer.alpha[:, channel]):
        _plot_image(ax, lag_map(kernel, layer.row_stride), f"length {length}\nα = {alpha:.2f}")


@torch.no_grad()
def plot_layer(layer: MRConv2d, plain: nn.Conv2d) -> dict[str, Figure]:
    """Returns the pictures of a layer that `plot_kernels` has, each by itself, by a sentence that says what it shows.

    Args:
        layer: The layer, in either form.
        plain: The convolution of the ConvNeXt beside it, of as many channels: its kernel is drawn at the same scale.
    """
    channel = strongest_channel(layer)
    merged = layer.merged_kernel()[0][channel].float()
    kernels = _branches(layer, channel)
    taps = ", local taps included," if layer.kernel_size else ""
    scaled = " The colours are scaled to what lies beyond the taps." if layer.kernel_size else ""
    images = {
        f"The merged kernel{taps} over the distance in rows and columns.{scaled}": (
            lag_map(merged, layer.row_stride),
            layer.local_reach,
        ),
        "The plain ConvNeXt's kernel at the same scale.": (_on_map(plain, channel, layer), -1),
    }
    for kernel, length, alpha in zip(kernels, layer.branch_lengths, layer.alpha[:, channel]):
        text = f"The branch of {length} lags, before norm and α, which is {alpha:.2f}.".replace("-", "−")
        images[text] = (lag_map(kernel, layer.row_stride), -1)
    panels = {}
    for text, (image, beyond) in images.items():
        panels[text], ax = _panel()
        _plot_image(ax, image, beyond=beyond)
    text = "The merged kernel as a sequence, over the lag."
    panels[text], ax = _panel()
    _plot_sequence(ax, merged, color="black")
    if kernels:
        text = "All branches as sequences, before norm and α."
        panels[text], ax = _panel()
        _plot_branches(ax, kernels, layer.branch_lengths)
    return panels


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(2.6, 2.1), layout="constrained")
    return figure, figure.subplots()


def _branches(layer: MRConv2d, channel: int) -> list[Tensor]:
    """Returns the kernels of a channel's branches (2·l_i − 1); none if the layer is deployed."""
    return [] if layer.kernel is not None else [kernel[channel].float() for kernel in layer.branch_kernels()]


def _on_map(conv: nn.Conv2d, channel: int, layer: MRConv2d) -> Tensor:
    """Returns the taps of a channel of a depthwise convolution where a layer's lag map has them."""
    rows, columns = lag_map(torch.zeros(2 * layer.reference_grid[0] * layer.row_stride - 1), layer.row_stride).shape
    taps, dilation = conv.weight[channel, 0].float(), conv.dilation[0]
    reach = dilation * (len(taps) // 2)
    spread = taps.new_zeros(2 * reach + 1, 2 * reach + 1)
    spread[::dilation, ::dilation] = taps
    # Where the map is smaller than the taps this crops them.
    left, top = columns // 2 - reach, rows // 2 - reach
    return F.pad(spread, (left, columns - 1 - columns // 2 - reach, top, top))


def _plot_branches(ax: Axes, kernels: list[Tensor], lengths: list[int]) -> None:
    # The longest first, so that it does not hide the short ones.
    for kernel, length in reversed(list(zip(kernels, lengths))):
        _plot_sequence(ax, kernel, label=f"{length}")
    ax.legend(title="length", fontsize="x-small", title_fontsize="x-small", loc="upper right")


def _plot_sequence(ax: Axes, kernel: Tensor, **style: Any) -> None:
    reach = len(kernel) // 2
    ax.plot(range(-reach, reach + 1), kernel.numpy(), linewidth=0.8, **style)
    ax.set_xlabel("lag", fontsize="small")
    ax.tick_params(labelsize="x-small")


def _plot_image(ax: Axes, image: Tensor, title: str = "", beyond: int = -1) -> None:
    """Draws a lag map over the distance of two pixels, in colours for what lies ``beyond`` so many pixels."""
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
    ax.set_xticks(range(len(layers)), labels=[str(i + 1) for i in range(len(layers))])
    ax.set_yticks(range(branches), labels=[str(i + 1) for i in range(branches)])
    ax.set(xlabel="layer", ylabel="branch, shortest first")
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
    return draw_receptive_fields({name: receptive_fields(model, images) for name, model in models.items()})


def receptive_fields(model: Any, images: Tensor) -> list[Tensor]:
    """Returns the receptive field (H, W) of each stage as `plot_receptive_fields` has it, its largest value 1.

    Args:
        model: See `plot_receptive_fields`.
        images: See `plot_receptive_fields`.
    """
    return [_receptive_field(model, images, stage) for stage in range(len(model.feature_info))]


def draw_receptive_fields(fields: dict[str, list[Tensor]]) -> Figure:
    """Returns the picture of `plot_receptive_fields`.

    Args:
        fields: What `receptive_fields` returns, by the names of the rows.
    """
    columns = max(len(own) for own in fields.values())
    figure = Figure(figsize=(2.2 * columns + 0.8, 2.3 * len(fields)), layout="constrained")
    axes = figure.subplots(len(fields), columns, squeeze=False)
    for row, (name, own) in zip(axes, fields.items()):
        for stage, (ax, field) in enumerate(zip(row, own)):
            picture = draw_field(ax, field)
            ax.set_title(f"{name}, stage {stage + 1}", fontsize="x-small")
    bar = figure.colorbar(picture, ax=axes, ticks=[-4, -2, 0], format=_power)
    bar.set_label("size of the gradient, over the largest", fontsize="x-small")
    return figure


def plot_field(field: Tensor) -> Figure:
    """Returns a picture of one receptive field (H, W) in the colours of `plot_field_colours`, without a frame."""
    height, width = field.shape
    figure = Figure(figsize=(2.2, 2.2 * height / width))
    draw_field(figure.add_axes((0, 0, 1, 1)), field)
    return figure


def plot_field_colours() -> Figure:
    """Returns what the colours of a receptive field stand for: the size of the gradient over the largest one."""
    figure = Figure(figsize=(3.2, 0.5), layout="constrained")
    picture = ScalarMappable(Normalize(-4, 0), cmap="magma")
    bar = figure.colorbar(picture, cax=figure.subplots(), orientation="horizontal", ticks=range(-4, 1), format=_power)
    bar.ax.tick_params(labelsize="small")
    return figure


def _power(power: float, _: Any) -> str:
    return f"$10^{{{power:.0f}}}$"


def draw_field(ax: Axes, field: Tensor) -> Any:
    """Draws one receptive field (H, W) in the colours of `plot_field_colours`, and returns matplotlib's image."""
    ax.set(xticks=[], yticks=[])
    return ax.imshow(field.log10().numpy(), cmap="magma", vmin=-4, vmax=0)


def _receptive_field(model: Any, images: Tensor, stage: int) -> Tensor:
    """Returns the effective receptive field (H, W) of the middle of a stage's feature map, its largest value 1.

    Raises:
        ValueError: If the gradient is zero everywhere or not finite.
    """
    images = images.clone().requires_grad_()
    (features,) = model.forward_intermediates(images, indices=[stage], intermediates_only=True)
    height, width = features.shape[2:]
    (gradient,) = torch.autograd.grad(features[:, :, height // 2, width // 2].abs().sum(), images)
    field = gradient.abs().sum((0, 1))
    if not 0 < field.max() < float("inf"):
        raise ValueError(f"model sees nothing in stage {stage + 1}: the gradient is zero everywhere or not finite")
    return (field / field.max()).clamp(min=1e-12)
