"""Compares the statistics of "parseval" with BatchNorm's, on held-out images, in the layers of trained models.

    python -m experiments.norms --output results

Of the first seed of "local taps, parseval" in each group whose weights OUTPUT/runs has. OUTPUT/norms.csv gets a line
for each layer and branch: over its channels, the variance by "parseval" in those of the branch's own output, and the
distance of the means in its standard deviations.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.report import BEST, first_rows, held_out, load
from experiments.run import commit, environment, now
from mrconvnext import MRConv2d, long_conv
from mrconvnext.grid import place_kernel, to_image, to_sequence
from mrconvnext.norms import branch_statistics

GROUPS = ("main", "fine-tuning", "pathfinder 32", "pathfinder 48, from 32", "pathfinder 32, batch 32")
MEASURED = ("layer", "branch", "variance_10", "variance_50", "variance_90", "mean_50", "mean_90")
COLUMNS = ("group", *MEASURED, "hardware", "torch", "timm", "python", "commit", "date", "command")


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    output = parser.parse_args().output
    rows = [first_rows()[group, "local taps, parseval"] for group in GROUPS]
    paths = {row: output / "runs" / row.identifier / BEST for row in rows}
    rows = [row for row, path in paths.items() if path.is_file()]
    if not rows:
        print(f"experiments.norms: no weights, such as {paths.popitem()[1]}: run experiments.run", file=sys.stderr)
        return 2
    command = f"python -m experiments.norms --output {output.name}"
    origin = {**environment(), "commit": commit(), "date": now(), "command": command}
    with open(output / "norms.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            images = held_out(output / "data" / row.data, row.arguments.img_size)
            for line in compare(load(row, output), images):
                writer.writerow({"group": row.group, **line, **origin})
    return 0


def compare(model: nn.Module, images: Tensor) -> list[dict[str, str]]:
    """Returns a line for each layer and branch of a model that sees images (B, 3, H, W) as it does in training."""
    inputs: dict[MRConv2d, Tensor] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MRConv2d)}
    hooks = [
        layer.register_forward_pre_hook(lambda own, args: inputs.update({own: args[0]})) for layer in layers.values()
    ]
    model.train()(images)
    for hook in hooks:
        hook.remove()
    return [line for name, layer in layers.items() for line in compare_branches(name, layer, inputs[layer])]


def compare_branches(name: str, layer: MRConv2d, x: Tensor) -> list[dict[str, str]]:
    """Returns the lines of a layer of that name whose input is ``x``."""
    kernels = place_kernel(layer.kernels(), layer.row_stride, x, layer.guard)
    count = torch.tensor(len(x) * x.shape[2] * x.shape[3])
    means, variances = branch_statistics(x, kernels, centre=x.mean((0, 2, 3)), count=count, guard=layer.guard)
    lines = []
    for i, (kernel, mean, variance) in enumerate(zip(kernels, means, variances)):
        y = to_image(long_conv(to_sequence(x, layer.guard), kernel), x.shape[2], layer.guard)
        own, own_mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        shares = percentiles(variance / own, 0.1, 0.5, 0.9)
        shifts = percentiles((mean - own_mean).abs() / own.sqrt(), 0.5, 0.9)
        lines.append(dict(zip(MEASURED, (name, str(i + 1), *shares, *shifts))))
    return lines


def percentiles(values: Tensor, *shares: float) -> list[str]:
    return [f"{value:.3f}" for value in values.quantile(torch.tensor(shares)).tolist()]


if __name__ == "__main__":
    sys.exit(main())
