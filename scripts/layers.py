"""How long the deployed convolutions of MRConvNeXt-T take at 224 px beside ConvNeXt-T's 7×7 depthwise ones.

    python scripts/layers.py --batch-sizes 1 8

Alone, a layer is called again and again, everything in the caches that fits there. In its model it comes after other
layers, which have filled them. Milliseconds, medians over the rounds that both take turns in; the last line of a batch
size is the sum over the 18 layers of a model. "At least" is what the arithmetic alone takes at the speed of PyTorch's
matrix products: the passes of the compiled library's transforms of images and kernels, or 49 multiply-adds a pixel.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

import mrconvnext
from mrconvnext.engines import cpu
from mrconvnext.engines.block import use_fused_blocks

NAMES = ("ours", "depthwise")

# Channels and side of the maps of each stage, and columns between their rows.
STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
GUARD = 3

KINDS = ("alone: ours", "in the model: ours", "at least: ours")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 8), help="images (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=12, help="(default: %(default)s)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {mrconvnext.engine()}\n")
    ours: Any = timm.create_model("mrconvnext_tiny").eval()
    convnext: Any = timm.create_model("convnext_tiny").eval()
    models = {"ours": ours.reparameterize(), "depthwise": use_fused_blocks(convnext)}
    rate = multiply_adds_per_millisecond(args.rounds)
    print(f"matrix products: {2e-6 * rate:.0f} GFLOP/s")
    for batch in args.batch_sizes:
        print_table(batch, alone(models, batch, args.rounds), in_model(models, batch, args.rounds), floor(batch, rate))


def layers_of(model: Any) -> list[tuple[int, Any]]:
    """Returns the convolutions of a model, each with its stage."""
    return [(i, block.conv_dw) for i, stage in enumerate(model.stages) for block in stage.blocks]


def alone(models: dict[str, Any], batch: int, rounds: int) -> list[dict[str, float]]:
    """Returns for each stage the milliseconds of one layer of each model."""
    found = []
    for stage, (channels, side) in enumerate(STAGES):
        x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        layers = {name: model.stages[stage].blocks[0].conv_dw for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(rounds + 2):
            for name, layer in layers.items():
                times[name].append(milliseconds(layer, x))
        found.append({name: statistics.median(own[2:]) for name, own in times.items()})
    return found


def in_model(models: dict[str, Any], batch: int, rounds: int) -> list[dict[str, float]]:
    """Returns for each stage the milliseconds of a layer of each model, of those that the model calls."""
    times: dict[tuple[int, str], list[float]] = {}
    for name, model in models.items():
        for stage, layer in layers_of(model):
            layer.forward = timed(layer.forward, times.setdefault((stage, name), []))
    x = torch.randn(batch, 3, 224, 224)
    for i in range(rounds + 2):
        if i == 2:
            for own in times.values():
                own.clear()
        for model in models.values():
            model(x)
    for model in models.values():
        for _, layer in layers_of(model):
            del layer.forward
    return [{name: statistics.median(times[stage, name]) for name in NAMES} for stage in range(4)]


def floor(batch: int, rate: float) -> list[dict[str, float]]:
    """Returns for each stage the milliseconds that a layer's arithmetic takes at a rate of multiply-adds."""
    found = []
    for channels, side in STAGES:
        plan = cpu.plan_for(side, side, GUARD, side * (side + GUARD) - 1, torch.float32)
        transform = plan.n * sum(cpu.RADIX_COST[radix] - cpu.COST_OF_MEMORY for radix in plan.radices)
        ours = channels * ((2 * batch + 1) * transform + 4 * batch * plan.n)  # with a product of complex numbers
        found.append({"ours": ours / rate, "depthwise": batch * channels * side**2 * 49 / rate})
    return found


def multiply_adds_per_millisecond(rounds: int) -> float:
    a, b = torch.randn(2, 1024, 1024)
    return 1024**3 / statistics.median(milliseconds(lambda x: x @ b, a) for _ in range(rounds))


def timed(function: Callable, times: list[float]) -> Callable:
    def call(x: Tensor) -> Tensor:
        start = time.perf_counter()
        y = function(x)
        times.append(1e3 * (time.perf_counter() - start))
        return y

    return call


def milliseconds(function: Callable, x: Tensor) -> float:
    times: list[float] = []
    timed(function, times)(x)
    return times[0]


def print_table(batch: int, *tables: list[dict[str, float]]) -> None:
    print(f"\n| batch | stage | {' | depthwise | ratio | '.join(KINDS)} | depthwise | ratio |")
    print(f"| --- | --- {3 * len(tables) * '| --- '}|")
    sums = [{name: sum(n * row[name] for n, row in zip((3, 3, 9, 3), table)) for name in NAMES} for table in tables]
    for stage, rows in [*enumerate(zip(*tables), start=1), ("all 18", sums)]:
        cells = [f"{row['ours']:.3f} | {row['depthwise']:.3f} | {row['ours'] / row['depthwise']:.2f}" for row in rows]
        print(f"| {batch} | {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
