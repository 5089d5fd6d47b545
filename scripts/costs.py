"""What the benchmark's rows don't show, for one size of model at batch 1 and 224 px: the first pass at an image size,
ConvNeXt without its depthwise convolutions, and ONNX files.

    python scripts/costs.py

Times of models that take turns are ratios, medians over the rounds with the least and the largest in brackets.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import timm
import torch
from timm.utils.onnx import onnx_export
from torch import Tensor, nn

import mrconvnext  # noqa: F401  registers the models
from mrconvnext.block import use_fast_blocks

NEW_SIZES = (256, 288, 320, 352, 384, 416)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", help="model size, of both families (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds that models take turns in (default: %(default)s)"
    )
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, timm {timm.__version__}, ONNX Runtime {onnxruntime.__version__}"
    print(f"{torch.get_num_threads()} threads, float32, {versions}")

    options = {"ls_init_value": 1.0, "exportable": True}  # new layer scales would hide errors
    model = timm.create_model(f"mrconvnext_{args.size}", **options).eval().reparameterize()
    print("first pass at a new image size, in later passes:", end=" ")
    print(spread([passes_in_the_first(model, size) for size in NEW_SIZES]))

    name = f"convnext_{args.size}"
    models = [timm.create_model(name).eval() for _ in range(3)]
    for fast in models[1:]:
        use_fast_blocks(fast)
    for block in (block for stage in models[2].stages for block in stage.blocks):
        block.conv_dw = nn.Identity()
    default, fast, without = in_turns(models, torch.randn(1, 3, 224, 224), args.rounds)
    for label, times in (("with fast blocks", fast), ("with fast blocks and no depthwise convolutions", without)):
        print(f"{name} {label}, times as fast as by default: {spread([a / b for a, b in zip(default, times)])}")

    with tempfile.TemporaryDirectory() as folder:
        compare_onnx(model, timm.create_model(name, **options).eval(), Path(folder), args.rounds)


def compare_onnx(model: nn.Module, convnext: nn.Module, folder: Path, rounds: int) -> None:
    """Prints the sizes of ONNX files, their errors and their times in ONNX Runtime against PyTorch's."""
    images = torch.randn(1, 3, 224, 224)
    runs = {"PyTorch": model}
    for label, source, options in (
        ("ONNX, matrices", model, {}),
        ("ONNX, DFT", model, {"use_dynamo": True}),
        ("ONNX, ConvNeXt", convnext, {}),
    ):
        file = folder / "model.onnx"
        onnx_export(source, str(file), batch_size=2, input_size=(3, 224, 224), **options)
        runs[label] = session(file)
        error = (runs[label](images) - source(images)).abs().max() / source(images).abs().max()
        print(f"{label}: {file.stat().st_size / 2**20:.0f} MiB, error {error:.0e}")
    print(f"weights: {sum(parameter.nbytes for parameter in model.parameters()) / 2**20:.0f} MiB")
    times = dict(zip(runs, in_turns(list(runs.values()), images, rounds)))
    for label, own in times.items():
        ratio = spread([a / b for a, b in zip(times["PyTorch"], own)])
        print(f"{label}: {1000 * statistics.median(own):.0f} ms, times as fast as PyTorch: {ratio}")


def session(file: Path) -> Callable[[Tensor], Tensor]:
    """Returns a function that runs an ONNX file as PyTorch would, its threads asleep between calls."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    own = onnxruntime.InferenceSession(str(file), options)
    name = own.get_inputs()[0].name
    return lambda images: torch.from_numpy(own.run(None, {name: images.numpy()})[0])


def passes_in_the_first(model: nn.Module, size: int) -> float:
    """Returns how long the first pass at an image size takes, after passes at 224 px, in later passes."""
    timed(model, torch.randn(1, 3, 224, 224))
    images = torch.randn(1, 3, size, size)
    first, *later = (timed(model, images) for _ in range(8))
    return first / statistics.median(later)


def in_turns(models: list[Callable], images: Tensor, rounds: int) -> list[list[float]]:
    """Returns each model's seconds for a pass in every round, after two rounds that don't count."""
    return list(zip(*[[timed(model, images) for model in models] for _ in range(rounds + 2)][2:]))


def timed(model: Callable, images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
