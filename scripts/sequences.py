"""What a step of a causal layer costs beside other ways to the next output, how exact 10,000 of them are, and how long
the methods of the experiments on sequences take to train.

    python -m scripts.sequences docs/sequences.md

Writes the tables between the lines ``<!-- steps -->``, ``<!-- drift -->`` or ``<!-- training -->`` and ``<!-- end -->``
of the document, and their files, streaming.csv, drift.csv and training-steps.csv, in the folder results beside it.
Takes three minutes, on a machine that does nothing else.
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
from experiments.sequences import FASHION, METHODS
from mrconvnext import MRConv1d
from mrconvnext.benchmarking.report import with_table
from mrconvnext.training.sequences import make_model, parse_args

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="Markdown file")
    document = parser.parse_args().document
    torch.manual_seed(0)
    text = document.read_text()
    for name, file, measure, table in TABLES:
        lines = [{key: str(value) for key, value in line.items()} for line in measure()]
        with open(document.parent / "results" / file, "w", newline="") as opened:
            writer = csv.DictWriter(opened, lines[0])
            writer.writeheader()
            writer.writerows(lines)
        text = with_table(text, name, table(lines))
    document.write_text(text)


def conditions() -> dict[str, Any]:
    """Returns what the numbers depend on."""
    return {**environment(), "threads": torch.get_num_threads(), "commit": commit(), "date": now()}


# A step of a stream


@torch.no_grad()
def step_costs() -> list[dict[str, Any]]:
    """Returns the time of a step of each way, for each length, as lines of a file."""
    return [line for length in LENGTHS for line in costs(length)]


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
    return [{"length": length, "way": name, **in_us(own), **conditions()} for name, own in found.items()]


def in_us(seconds: list[float]) -> dict[str, float]:
    """Returns median, least and largest of times, in microseconds."""
    found = {"us": statistics.median(seconds), "us_least": min(seconds), "us_largest": max(seconds)}
    return {name: round(1e6 * value, 1) for name, value in found.items()}


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


def steps_table(lines: list[dict[str, str]]) -> str:
    """Returns the times as a table, a row a way and a column a length."""
    rows = ["| µs a step | " + " | ".join(f"{length:,} positions" for length in LENGTHS) + " |"]
    rows.append("| --- " * (1 + len(LENGTHS)) + "|")
    for name in dict.fromkeys(line["way"] for line in lines):
        own = [line for line in lines if line["way"] == name]
        rows.append(f"| {name} | {' | '.join(spread_of(line) for line in own)} |")
    return "\n".join(rows)


def spread_of(line: dict[str, str], scale: float = 1) -> str:
    """Returns a time with the least and the largest, in so many microseconds."""
    median, least, largest = (f"{float(line[name]) / scale:,.0f}" for name in ("us", "us_least", "us_largest"))
    return f"{median} ({least} … {largest})"


# Many steps


@torch.no_grad()
def drift() -> list[dict[str, Any]]:
    """Returns the largest difference of steps and convolution, over the largest value, early and late, in float32."""
    lines = []
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
        early, late = (f"{own.max():.1e}" for own in (errors[..., :1000], errors[..., 9000:]))
        lines.append({"kernel": name, "early": early, "late": late, **conditions()})
    return lines


def drift_table(lines: list[dict[str, str]]) -> str:
    """Returns these differences as a table."""
    rows = ["| kernel | steps 0 … 999 | steps 9,000 … 9,999 |", "| --- | --- | --- |"]
    return "\n".join([*rows, *(f"| {line['kernel']} | {line['early']} | {line['late']} |" for line in lines)])


# Training


def training_steps() -> list[dict[str, Any]]:
    """Returns the time of a forward and backward pass of each method's model for Fashion-MNIST, all in turns."""
    steps = {name: training_step(options) for name, options in METHODS.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds(step, 2)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            found[name].append(seconds(step, 2))
    return [{"method": name, **in_us(own), **conditions()} for name, own in found.items()]


def training_step(options: tuple[str, ...]) -> Callable[[Tensor], object]:
    """Returns a training step of a row of the experiments, on random images; it takes an argument for nothing."""
    args = parse_args(["--task", "fashion", *options, *FASHION, "--data-dir", "none", "--output", "none"])
    model, x = make_model(args), torch.randn(args.global_batch, 784, 1)
    targets = torch.randint(0, 10, (args.global_batch,))
    return lambda _: F.cross_entropy(model(x), targets).backward()


def training_table(lines: list[dict[str, str]]) -> str:
    """Returns these times as a table."""
    rows = ["| method | ms a step |", "| --- | --- |"]
    return "\n".join([*rows, *(f"| {line['method']} | {spread_of(line, scale=1000)} |" for line in lines)])


# Name in the document, file, what measures, what makes a table of it.
TABLES: tuple[tuple[str, str, Callable[[], list[dict[str, Any]]], Callable[[list[dict[str, str]]], str]], ...] = (
    ("steps", "streaming.csv", step_costs, steps_table),
    ("drift", "drift.csv", drift, drift_table),
    ("training", "training-steps.csv", training_steps, training_table),
)


if __name__ == "__main__":
    main()
