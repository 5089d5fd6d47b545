"""What the benchmark's rows don't show, for one size of model at batch 1 and 224 px: how fast ConvNeXt is without its
depthwise convolutions, which no layer in their place can beat, and what ONNX files take.

    python scripts/costs.py

Times of models that take turns are ratios, medians over the rounds with the least and the largest in brackets.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from timm.utils.onnx import onnx_export
from torch import Tensor, nn

import mrconvnext  # noqa: F401  registers the models
from mrconvnext.engines.block import use_fused_blocks


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", default="tiny", help="model size, of both families (default: %(default)s)")
    add("--rounds", type=int, default=20, help="rounds that models take turns in (default: %(default)s)")
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, timm {timm.__version__}, ONNX Runtime {onnxruntime.__version__}"
    print(f"{torch.get_num_threads()} threads, float32, {versions}")
    compare_blocks(f"convnext_{args.size}", args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        compare_onnx(args.size, Path(folder), args.rounds)


def compare_blocks(name: str, rounds: int) -> None:
    """Prints how fast a ConvNeXt is with the blocks that MRConvNeXt has on a CPU, then without convolutions as well."""
    default, fused, without = (create_model(name) for _ in range(3))
    for model in (fused, without):
        use_fused_blocks(model)
    for stage in without.stages:
        for block in stage.blocks:
            block.conv_dw = nn.Identity()
    times, *others = in_turns([default, fused, without], torch.randn((1, 3, 224, 224)), rounds)
    for label, own in zip(("fused blocks", "fused blocks and no depthwise convolutions"), others):
        print(f"{name} with {label}, times as fast as by default: {spread([a / b for a, b in zip(times, own)])}")


def compare_onnx(size: str, folder: Path, rounds: int) -> None:
    """Prints the sizes of ONNX files, their errors and their times in ONNX Runtime against PyTorch's."""
    images = torch.randn((1, 3, 224, 224))
    model = create_model(f"mrconvnext_{size}").reparameterize()
    runs: dict[str, Callable[[Tensor], Tensor]] = {"PyTorch": model}
    for label, source, newer in (
        ("ONNX", model, False),
        ("ONNX, newer exporter", model, True),
        ("ONNX, ConvNeXt", create_model(f"convnext_{size}"), False),
    ):
        file = folder / f"{label}.onnx"
        onnx_export(source, str(file), batch_size=2, input_size=(3, 224, 224), use_dynamo=newer)
        runs[label] = session(file)
        error = (runs[label](images) - source(images)).abs().max() / source(images).abs().max()
        print(f"{label}: {file.stat().st_size / 2**20:.0f} MiB, error {error:.0e}")
    print(f"weights: {sum(parameter.nbytes for parameter in model.parameters()) / 2**20:.0f} MiB")
    times = dict(zip(runs, in_turns(list(runs.values()), images, rounds)))
    for label, own in times.items():
        ratio = spread([a / b for a, b in zip(times["PyTorch"], own)])
        print(f"{label}: {1000 * statistics.median(own):.0f} ms, times as fast as PyTorch: {ratio}")


def create_model(name: str) -> Any:
    """Returns a model in eval mode whose layer scales, unlike new ones, hide no errors."""
    return timm.create_model(name, ls_init_value=1.0).eval()


def session(file: Path) -> Callable[[Tensor], Tensor]:
    """Returns a function that runs an ONNX file as PyTorch would, its threads asleep between calls."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    own = onnxruntime.InferenceSession(str(file), sess_options=options)
    name = own.get_inputs()[0].name
    return lambda images: torch.from_numpy(own.run(None, {name: images.numpy()})[0])


def in_turns(models: list[Callable[[Tensor], Tensor]], images: Tensor, rounds: int) -> list[tuple[float, ...]]:
    """Returns each model's seconds for a pass in every round, after two rounds that don't count."""
    return list(zip(*[[timed(model, images) for model in models] for _ in range(rounds + 2)][2:]))


def timed(model: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
