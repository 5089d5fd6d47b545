"""The picture of README: kernels of one layer, the one that they fold into, and what the first stage sees."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mrconvnext import MRConvNeXt
from mrconvnext.grid import lag_map
from mrconvnext.plots import draw_field, receptive_fields, strongest_channel

WIDTHS = (2.4, 0.3, 1.0, 0.15, 1.6, 1.6)


@torch.no_grad()
def weighted_branches(layer: Any) -> tuple[list[Tensor], int]:
    """Returns the branches (2·l_i − 1) of a layer's strongest channel, normalised and weighted, and that channel."""
    gains, _ = layer.branch_gains()  # (N, C)
    channel = strongest_channel(layer)
    kernels = [kernel[channel] for kernel in layer.branch_kernels()]
    return [gain * kernel for gain, kernel in zip(gains[:, channel], kernels)], channel


def plot_overview(model: MRConvNeXt, convnext: Any, images: Tensor) -> Figure:
    """Returns the picture.

    Args:
        model: A trained model, in training form.
        convnext: The ConvNeXt beside it.
        images: Images (B, C, H, W) that receptive fields are taken on.
    """
    layer: Any = model.stages[0].blocks[0].conv_dw
    branches, channel = weighted_branches(layer)
    figure = Figure(figsize=(10, 2.7), layout="constrained")
    first, arrow, merged, gap, *fields = figure.subplots(1, len(WIDTHS), width_ratios=WIDTHS)
    for i, (kernel, length) in enumerate(zip(branches, layer.branch_lengths)):
        reach = len(kernel) // 2
        curve = 0.45 * kernel / kernel.abs().max() - i
        first.plot(range(-reach, reach + 1), curve.numpy(), linewidth=0.9)
        first.text(1.02, -i, f"{length}", fontsize="small", va="center", transform=first.get_yaxis_transform())
    first.set(yticks=[], title="kernels of doubling length, by lag …")
    for ax, sign in ((arrow, "→"), (gap, "")):
        ax.axis("off")
        ax.text(0.5, 0.5, sign, fontsize=24, ha="center", va="center")
    kernel = lag_map(layer.merged_kernel()[0][channel].detach().float(), layer.row_stride)
    limit = kernel.abs().flatten().quantile(0.98).item()
    merged.imshow(kernel.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    merged.set(xticks=[], yticks=[], title="… fold into one")
    for ax, (name, own) in zip(fields, (("ConvNeXt", convnext), ("MRConvNeXt", model))):
        draw_field(ax, receptive_fields(own, images)[0])
        ax.set_title(f"stage 1 of {name} sees")
    for ax in (first, merged, *fields):
        ax.title.set_fontsize("small")
    return figure
