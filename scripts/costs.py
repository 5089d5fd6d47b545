"""What the benchmark's rows don't show: the first pass at an image size, and ConvNeXt without its convolutions.

python scripts/costs.py
"""

import argparse
import statistics
import time

import timm
import torch
from torch import Tensor, nn

import mrconvnext  # noqa: F401  registers the models
from mrconvnext.block import FastBlock

NEW_SIZES = (256, 288, 320, 352, 384, 416)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="model size, of both families (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds that models take turns in (default: %(default)s)"
    )
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}, timm {timm.__version__}, batch 1")

    model = timm.create_model(f"mrconvnext_{args.size}").eval().reparameterize()
    print("first pass at a new image size, in later passes:", end=" ")
    print(spread([passes_in_the_first(model, size) for size in NEW_SIZES]))

    name = f"convnext_{args.size}"
    models = [timm.create_model(name).eval(), with_fast_blocks(name), with_fast_blocks(name)]
    for block in fast_blocks(models[2]):
        block.conv_dw = nn.Identity()
    default, fast, without = in_turns(models, torch.randn(1, 3, 224, 224), args.rounds)
    for label, times in (("with fast blocks", fast), ("with fast blocks and no depthwise convolutions", without)):
        print(f"{name} {label}, times as fast as by default: {spread([a / b for a, b in zip(default, times)])}")


def passes_in_the_first(model: nn.Module, size: int) -> float:
    """Returns how long the first pass at an image size takes, after passes at 224 px, in later passes."""
    timed(model, torch.randn(1, 3, 224, 224))
    images = torch.randn(1, 3, size, size)
    first, *later = (timed(model, images) for _ in range(8))
    return first / statistics.median(later)


def with_fast_blocks(name: str) -> nn.Module:
    model = timm.create_model(name).eval()
    for stage in model.stages:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = FastBlock(block)
    return model


def fast_blocks(model: nn.Module) -> list[FastBlock]:
    return [block for stage in model.stages for block in stage.blocks]


def in_turns(models: list[nn.Module], images: Tensor, rounds: int) -> list[list[float]]:
    """Returns each model's seconds for a pass in every round, after two rounds that don't count."""
    return list(zip(*[[timed(model, images) for model in models] for _ in range(rounds + 2)][2:]))


def timed(model: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
