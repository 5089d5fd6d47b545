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
import contextlib
import copy
import logging
import sys
import threading
from pathlib import Path
from typing import Any, Optional

import mrconvnext
from mrconvnext import MRConvNeXt
from mrconvnext.training import checkpoints
from mrconvnext.training.arguments import parse_args
from mrconvnext.training.datasets import open_data
from mrconvnext.training.errors import UserError
from mrconvnext.training.evaluation import evaluate as evaluated
from mrconvnext.training.files import locked, whole_folder
from mrconvnext.training.loaders import validation_loader
from mrconvnext.training.model import data_config, make_model
from mrconvnext.training.output import write_arguments
from mrconvnext.training.precision import Precision
from mrconvnext.training.processes import INTERRUPTED, Processes, ending_workers, process_group, signals_call
from mrconvnext.training.run import Run
from mrconvnext.training.samples import UnreadableFiles

_logger = logging.getLogger("train_imagenet")

PUBLISHED = ("README.md", "config.json", "model.safetensors")


def main(argv: Optional[list[str]] = None) -> int:
    """Trains or evaluates as the command line says, and returns the exit status."""
    args = parse_args(argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("timm").setLevel(logging.WARNING)  # which says of one file three times that it is loaded
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which says of each try that it failed
    try:
        with process_group(args.device) as processes, ending_workers():
            if processes.rank != 0:
                logging.disable(logging.INFO)
            return (evaluate if args.evaluate else train)(args, processes)
    except (UserError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]  # the error of a worker comes with its traceback
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
        return 2


def train(args: argparse.Namespace, processes: Processes) -> int:
    """Trains a model from the beginning or from a checkpoint, publishes the best weights, returns the exit status."""
    stop = threading.Event()
    with signals_call(stop.set):
        run = Run(args, processes, stop)
        if args.resume and run.restore():
            done = " where all epochs are done" if len(run.progress.rows) == args.epochs else ""
            _logger.info(f"resuming at step {run.progress.step}{done}")
        with locked(args.output) if processes.rank == 0 else contextlib.nullcontext():
            return train_and_publish(run)


def train_and_publish(run: Run) -> int:
    """Trains a model to the end or until a signal, publishes the best weights, returns the exit status."""
    args, processes = run.args, run.processes
    if processes.rank == 0:
        write_arguments(args)
    _logger.info(run.describe())
    run.train()
    if run.stopped:
        _logger.info(f"stopped by a signal at step {run.progress.step}; resume with --resume auto")
        return INTERRUPTED
    if processes.rank == 0:
        if isinstance(run.model, MRConvNeXt):
            publish(run)
        _logger.info(result_of(run))
    return 0


def result_of(run: Run) -> str:
    """Returns how a run ended, where it all lies and how to use it."""
    output, rows = run.args.output, run.progress.rows
    best = best_epoch(rows)
    lines = [
        f"the best of {len(rows)} epochs is epoch {best}, counted from 0, with {run.progress.best:.2f} % right of the "
        f"{run.images[1]} images held out"
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


def publish(run: Run) -> None:
    """Writes a run's best weights in both forms with their model cards, ready for the Hub."""
    try:
        weights, _ = checkpoints.read(run.args.output / checkpoints.BEST)
    except ValueError as error:
        raise UserError(str(error)) from error
    model: Any = copy.deepcopy(run.model)
    model.load_state_dict(weights)
    of_others = dict.fromkeys(("tag", "license", "test_input_size", "test_crop_pct"))
    model.pretrained_cfg = {**model.pretrained_cfg, **of_others, **run.data_config, "label_names": run.class_names}
    images = f"{run.images[1]} {run.args.val_split} images of {run.args.dataset or run.args.data_dir.name}"
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
