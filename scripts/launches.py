"""Counts what a GPU would be asked to do: operations launched, and bytes read and written, on the ``meta`` device.

    python scripts/launches.py

Each row is one training step (forward and backward) or one deployed forward pass, with ratios to timm's ConvNeXt of the
same size. "plain" counts every operation of the plain engine, "triton" what the engine for GPUs launches: each program
reads its arguments and writes its results once. Views are not counted, nor what is kept whatever the weights are.
"""

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mrconvnext  # noqa: F401  registers the models
from mrconvnext.engines import cuda, plain

# Allocations and others that do nothing on a device.
FREE = {"detach", "empty", "new_empty", "new_empty_strided", "_unsafe_view"}


class Cost(NamedTuple):
    """What a device is asked to do: the number of launches, and gigabytes read and written."""

    launches: int
    gigabytes: float


class Counter(TorchDispatchMode):
    """Counts the operations that run under it.

    Args:
        engine: What computes the package's operations.
    """

    def __init__(self, engine: ModuleType) -> None:
        super().__init__()
        self.engine = engine
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if namespace == "mrconvnext":
            with self, mock.patch.object(cuda, "launch", self.launch):
                return getattr(self.engine, name)(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, Tensor)]
        # What has contents, the sparse lags, a model on the meta device keeps elsewhere; on a GPU it lies there.
        if not func.is_view and name not in FREE and all(x.is_meta for x in tensors):
            self._count(tensors)
        return output

    def launch(self, name: str, programs: int, plan: cuda.Plan, *args: Any, **options: Any) -> None:
        """Takes the place of `cuda.launch`."""
        self._count([x for x in args if isinstance(x, Tensor)])

    def _count(self, tensors: list[Tensor]) -> None:
        self.launches += 1
        self.bytes += sum(x.nbytes for x in tensors)


def count(run: Callable[[], Any], engine: ModuleType) -> Cost:
    """Returns the cost of what a function does."""
    run()  # what depends on sizes alone is made in the first run
    with Counter(engine) as counter:
        run()
    return Cost(counter.launches, counter.bytes / 1e9)


def training_step(name: str, batch: int, engine: ModuleType, **options: Any) -> Cost:
    """Returns the cost of a forward and backward pass of a model on images of 224 px."""
    model = timm.create_model(name, device="meta", **options).train()
    images = torch.empty(batch, 3, 224, 224, device="meta")

    def step() -> None:
        model.zero_grad()
        model(images).sum().backward()

    return count(step, engine)


@torch.no_grad()
def forward_pass(name: str, batch: int, engine: ModuleType, **options: Any) -> Cost:
    """Returns the cost of a forward pass of a model on images of 224 px."""
    model: nn.Module = timm.create_model(name, device="meta", **options).eval()
    images = torch.empty(batch, 3, 224, 224, device="meta")
    return count(lambda: model(images), engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="size of the models (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images (default: %(default)s)")
    args = parser.parse_args()
    ours, batch = f"mrconvnext_{args.size}", args.batch_size
    print("| | engine | launches | ratio | GB | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for label, measure, variants in (
        ("training step", training_step, [{}, *({"branch_norm": norm} for norm in mrconvnext.norms.NORMS)]),
        ("deployed", forward_pass, [{"inference_mode": True}]),
    ):
        reference = measure(f"convnext_{args.size}", batch, plain)
        print(f"| {label}, ConvNeXt | | {reference.launches} | 1 | {reference.gigabytes:.1f} | 1 |")
        for options in variants:
            words = " ".join([label, *(f"{key}={value}" for key, value in options.items() if key == "branch_norm")])
            for engine in (plain, cuda):
                cost = measure(ours, batch, engine, **options)
                ratios = cost.launches / reference.launches, cost.gigabytes / reference.gigabytes
                print(
                    f"| {words} | {'plain' if engine is plain else 'triton'} | {cost.launches} | {ratios[0]:.2f} "
                    f"| {cost.gigabytes:.1f} | {ratios[1]:.2f} |"
                )


if __name__ == "__main__":
    main()
