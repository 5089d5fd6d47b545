"""Trains an MRConvNeXt, or any model of timm, on images: ImageNet with ConvNeXt's recipe by default.

    python train_imagenet.py --data-dir imagenet --model mrconvnext_tiny --output run          one process
    torchrun --nproc-per-node 8 train_imagenet.py --data-dir imagenet --output run             eight
    python train_imagenet.py --data-dir imagenet --output run --resume auto                    resume
    python train_imagenet.py --output run --evaluate                                           its best weights

The folder --output holds one run: args.yaml, summary.csv, curves.png, checkpoints (last.safetensors,
previous.safetensors), the best weights (best.safetensors) and, at the end, these ready for the Hub in both forms
(trained/, fused/). SIGTERM and SIGINT finish the step, save, and exit with status 75.
"""

import argparse
import copy
import logging
import sys
from typing import Any, Optional

import mrconvnext
from mrconvnext import MRConvNeXt
from mrconvnext.training import checkpoints
from mrconvnext.training.arguments import parse_args
from mrconvnext.training.datasets import open_data
from mrconvnext.training.errors import UserError
from mrconvnext.training.evaluation import evaluate as evaluated
from mrconvnext.training.files import whole_folder
from mrconvnext.training.images import ImageRun
from mrconvnext.training.loaders import validation_loader
from mrconvnext.training.model import data_config, make_model
from mrconvnext.training.precision import Precision
from mrconvnext.training.processes import Processes
from mrconvnext.training.program import carry_out, launch
from mrconvnext.training.samples import UnreadableFiles

_logger = logging.getLogger("train_imagenet")

PUBLISHED = ("README.md", "config.json", "model.safetensors")


def main(argv: Optional[list[str]] = None) -> int:
    """Trains or evaluates as the command line says, and returns the exit status."""
    return launch(parse_args(argv, description=__doc__), train, evaluate)


def train(args: argparse.Namespace, processes: Processes) -> int:
    """Trains a model from the beginning or from a checkpoint, publishes the best weights, returns the exit status."""
    return carry_out(lambda stop: ImageRun(args, processes, stop), finish)


def finish(run: ImageRun) -> None:
    """Publishes the best weights of a run that came to its end, and says how it ended."""
    if isinstance(run.model, MRConvNeXt):
        publish(run)
    _logger.info(result_of(run))


def result_of(run: ImageRun) -> str:
    """Returns how a run ended, where it all lies and how to use it."""
    output, rows = run.args.output, run.progress.rows
    best = best_epoch(rows)
    lines = [
        f"the best of {len(rows)} epochs is epoch {best}, counted from 0, with {run.progress.best:.2f} % right of the "
        f"{run.counts[1]} images held out"
    ]
    if isinstance(run.model, MRConvNeXt):
        lines += [
            f"{output} holds it, ready to use, as trained/ and deployed as fused/:",
            "    import timm, mrconvnext",
            f'    model = timm.create_model("local-dir:{output / "fused"}", pretrained=True).eval()',
            "    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
        ]
    else:
        lines.append(f"{output / checkpoints.BEST} holds its weights")
    return "\n".join(lines)


def best_epoch(rows: list[dict[str, float]]) -> int:
    """Returns the number of the epoch with the highest accuracy, counted from 0."""
    top1 = [max(row[name] for name in ("top1", "ema_top1") if name in row) for row in rows]
    return max(range(len(rows)), key=top1.__getitem__)


def publish(run: ImageRun) -> None:
    """Writes a run's best weights in both forms with their model cards, ready for the Hub."""
    try:
        weights, _ = checkpoints.read(run.args.output / checkpoints.BEST)
    except ValueError as error:
        raise UserError(str(error)) from error
    model: Any = copy.deepcopy(run.model)
    model.load_state_dict(weights)
    of_others = dict.fromkeys(("tag", "license", "test_input_size", "test_crop_pct"))
    model.pretrained_cfg = {**model.pretrained_cfg, **of_others, **run.data_config, "label_names": run.class_names}
    images = f"{run.counts[1]} {run.args.val_split} images of {run.args.dataset or run.args.data_dir.name}"
    model.started_from = model.started_from or "random weights"
    best, epochs = best_epoch(run.progress.rows), len(run.progress.rows)
    metrics = {
        f"Top-1 (%), {images}": round(run.progress.best, 2),
        "Epochs": f"{epochs}, these weights after {best + 1}",
    }
    for form, fused in (("trained", False), ("fused", True)):
        folder = run.args.output / form
        with whole_folder(folder, PUBLISHED) as own:
            saved = mrconvnext.save(
                model, own, fused=fused, metrics=metrics, license=run.args.license, name=f"local-dir:{folder}"
            )
        _logger.info(f"{folder}: {saved}")


def evaluate(args: argparse.Namespace, processes: Processes) -> int:
    """Evaluates a model as it is and, of an MRConvNeXt, in its deployed form; returns the exit status."""
    data, precision = open_data(args), Precision.of(args, processes.device)
    model: Any = precision.model(make_model(args, data.classes))
    loader = validation_loader(data, args, data_config(model, args), processes)
    forms = {"as trained": model}
    if isinstance(model, MRConvNeXt):
        forms["deployed"] = copy.deepcopy(model).reparameterize()
    for name, own in forms.items():
        found = evaluated(own, loader, precision, processes, UnreadableFiles(args.max_unreadable))
        _logger.info(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
