"""What docs/resolution.md says of moved kernels and of networks with global kernels, measured.

    python -m scripts.resolution docs
    python -m scripts.tables docs/resolution.md

The first writes the tables outputs/moved.md and outputs/families.md and the picture resolution.png in that folder, in a
minute.
"""

import argparse
import math
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from timm.utils import reparameterize_model
from torch import Tensor

from mrconvnext import MRConv2d, with_global_kernels
from mrconvnext.global_kernels import depthwise_layers
from mrconvnext.kernels import KERNELS
from mrconvnext.resampling import to_distances

# Sides of the grid that a layer is made for and of the other, and how far apart the pixels are that both have.
GRIDS = ((32, 64, 1, 2), (32, 48, 2, 3), (56, 84, 2, 3), (56, 96, 7, 12), (48, 32, 3, 2))

FAMILIES = (
    *("convnext_atto", "convnextv2_atto", "convformer_s18", "edgenext_xx_small", "efficientnet_b0", "fastvit_t8"),
    *("ghostnet_050", "hgnetv2_b0", "inception_next_atto", "mambaout_femto", "mnasnet_small", "mobilenetv2_035"),
    *("mobilenetv3_small_050", "mobilenetv4_conv_small_035", "repvit_m0_9", "tf_efficientnet_lite0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    (folder / "outputs").mkdir(parents=True, exist_ok=True)
    (folder / "outputs" / "moved.md").write_text(f"{moved_table()}\n")
    (folder / "outputs" / "families.md").write_text(f"{families_table()}\n")
    picture().savefig(folder / "resolution.png", dpi=110)


# Moved kernels


@torch.no_grad()
def moved_table() -> str:
    """Returns how far the output of a moved layer is from the layer's own, for smooth images at two sizes."""
    rows = [["kernel", *(f"{old}² → {new}²" for old, new, *_ in GRIDS)], ["---"] * (1 + len(GRIDS))]
    for kernel in KERNELS:
        cells = []
        for old, new, step, new_step in GRIDS:
            layer = MRConv2d(8, old, kernel=kernel, kernel_size=0, seed=0).eval()
            expected = layer(smooth_noise(2, old))[:, :, ::step, ::step]
            layer.set_grid(new)
            actual = layer(smooth_noise(2, new))[:, :, ::new_step, ::new_step]
            cells.append(f"{(actual - expected).norm() / expected.norm():.1e}")
        rows.append([kernel, *cells])
    return in_markdown(rows)


def smooth_noise(cycles: int, side: int) -> Tensor:
    """Returns images (2, 8, side, side) of the same noise, of at most so many cycles a side, whatever the size."""
    generator = torch.Generator().manual_seed(1)
    waves = 2 * cycles + 1
    spectrum = torch.randn(2, 8, waves, waves, dtype=torch.complex128, generator=generator)
    cycle = torch.arange(-cycles, cycles + 1)
    basis = torch.exp(2j * math.pi * torch.arange(side)[:, None] * cycle / side).to(spectrum.dtype)
    return (basis @ spectrum @ basis.t()).real.float()


@torch.no_grad()
def picture() -> Figure:
    """Returns a picture of the branches of a layer over the distance of two pixels, on its own grid and on another."""
    layer = MRConv2d(1, 28, kernel="fourier", kernel_size=0, seed=0)
    lengths = layer.branch_lengths
    figure = Figure(figsize=(2.6 * len(lengths) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(lengths))
    for row, side in zip(axes, (28, 56)):
        layer.set_grid(side)
        for ax, kernel, length in zip(row, layer.branch_kernels(), lengths):
            own = to_distances(kernel, (side, side), layer.guard)[0]
            limit = own.abs().max().item()
            extent = (0.5 - side, side - 0.5, side - 0.5, 0.5 - side)
            ax.imshow(own.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, extent=extent, interpolation="nearest")
            ax.set_title(f"{side}×{side}, branch of {length} lags", fontsize="small")
            ax.set_xlabel("columns", fontsize="small")
            ax.set_ylabel("rows", fontsize="small")
            ax.tick_params(labelsize="x-small")
    return figure


# Any network


def families_table() -> str:
    """Returns what of the depthwise convolutions of networks is taken, and why others are left."""
    rows = [["network", "taken", "left"], ["---"] * 3]
    for name in FAMILIES:
        model = reparameterize_model(timm.create_model(name, num_classes=10).eval())
        reasons = depthwise_layers(model)
        counts: dict[str, int] = {}
        for reason in reasons.values():
            if reason:
                counts[reason] = counts.get(reason, 0) + 1
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        taken = [layer for layer in with_global_kernels(model).modules() if isinstance(layer, MRConv2d)]
        rows.append([f"`{name}`", str(len(taken)), left])
    return in_markdown(rows)


def in_markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
