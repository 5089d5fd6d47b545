"""What a step of a causal layer costs beside other ways to the next output, and how exact 10,000 of them are.

    python -m scripts.streaming docs/sequences.md

Writes the tables between the lines ``<!-- steps -->`` or ``<!-- drift -->`` and ``<!-- end -->`` of the document, and
streaming.csv in the folder results beside it. Takes two minutes, on a machine that does nothing else.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.run import commit, environment, now
from mrconvnext import MRConv1d
from mrconvnext.benchmarking.report import with_table

DIM, HEADS = 256, 8
LENGTHS = (1024, 4096, 16384)
ROUNDS, STEPS = 7, 128
LAYERS = {"Fourier": ("fourier", False), "dilated": ("dilated", False), "Fourier + sparse": ("fourier_sparse", False)}
LAYERS |= {"deployed": ("fourier", True)}


class CachedAttention(nn.Module):
    """A transformer's attention over the last ``length`` positions, the keys and values of which are kept."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.projections, self.output = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.cache = torch.randn(2, 1, HEADS, length, DIM // HEADS)
        self.position = 0

    def forward(self, x: Tensor) -> Tensor:
        """Returns the next position (1, DIM) of the output."""
        query, key, value = self.projections(x).view(3, 1, HEADS, 1, DIM // HEADS)
        self.cache[:, :, :, self.position] = torch.stack([key, value])[:, :, :, 0]
        self.position = (self.position + 1) % self.cache.shape[3]
        return self.output(F.scaled_dot_product_attention(query, *self.cache).view(1, DIM))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="Markdown file")
    document = parser.parse_args().document
    torch.manual_seed(0)
    lines = [line for length in LENGTHS for line in costs(length)]
    with open(document.parent / "results" / "streaming.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    text = with_table(document.read_text(), "steps", steps_table(lines))
    document.write_text(with_table(text, "drift", drift_table()))


def costs(length: int) -> list[dict[str, Any]]:
    """Returns the time of a step of each way, all of which take turns, as lines of the file."""
    ways: dict[str, Callable[[Tensor], object]] = {}
    for name, (kernel, deployed) in LAYERS.items():
        layer = layer_of(kernel, length, deployed)
        ways[name] = layer.start(1).step
    prefix, layer = torch.randn(1, DIM, length), layer_of("fourier", length, True)
    ways["FFT over all positions"] = lambda x: layer(prefix)
    ways["attention with a cache"] = CachedAttention(length)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            count = STEPS // 8 if name.startswith("FFT") else STEPS * max(1, length // 4096)
            found[name].append(seconds(way, count))
    common = {**environment(), "threads": torch.get_num_threads(), "commit": commit(), "date": now()}
    return [
        {"length": length, "way": name, "us": round(1e6 * statistics.median(own), 1)}
        | {"us_least": round(1e6 * min(own), 1), "us_largest": round(1e6 * max(own), 1), **common}
        for name, own in found.items()
    ]


def layer_of(kernel: str, length: int, deployed: bool) -> MRConv1d:
    layer = MRConv1d(DIM, length, kernel=kernel).eval()
    if deployed:
        layer.reparameterize()
    return layer


def seconds(way: Callable[[Tensor], object], count: int) -> float:
    """Returns the time of a step, over so many."""
    inputs = torch.randn(count, 1, DIM)
    start = time.perf_counter()
    for x in inputs:
        way(x)
    return (time.perf_counter() - start) / count


def steps_table(lines: list[dict[str, Any]]) -> str:
    """Returns the times as a table, a row a way and a column a length."""
    rows = ["| µs a step | " + " | ".join(f"{length:,} positions" for length in LENGTHS) + " |"]
    rows.append("| --- " * (1 + len(LENGTHS)) + "|")
    for name in dict.fromkeys(line["way"] for line in lines):
        cells = [
            f"{line['us']:,} ({line['us_least']:,} … {line['us_largest']:,})" for line in lines if line["way"] == name
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def drift_table() -> str:
    """Returns the largest difference of steps and convolution, over the largest value, early and late, in float32."""
    rows = ["| kernel | steps 0 … 999 | steps 9,000 … 9,999 |", "| --- | --- | --- |"]
    x = 3 + torch.randn(1, 16, 10_000)  # sums of a mean that is not 0 are where errors add up
    for name, (kernel, deployed) in LAYERS.items():
        layer = MRConv1d(16, 1000, kernel=kernel).eval()
        if deployed:
            layer.reparameterize()
        expected, state, outputs = layer(x), layer.start(1), []
        for position in x.unbind(-1):
            y, state = layer.step(position, state)
            outputs.append(y)
        errors = (torch.stack(outputs, -1) - expected).abs() / expected.abs().max()
        rows.append(f"| {name} | {errors[..., :1000].max():.1e} | {errors[..., 9000:].max():.1e} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
