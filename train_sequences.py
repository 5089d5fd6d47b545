"""Trains an encoder of sequences on a task of the Long Range Arena, or on images and speech as sequences.

    python -m mrconvnext.tasks listops data/listops                                       makes the data of ListOps
    python train_sequences.py --task listops --data-dir data/listops --method fourier --output run
    torchrun --nproc-per-node 8 train_sequences.py --task listops --data-dir data/listops --output run
    python train_sequences.py --output run --resume auto                                  resume
    python train_sequences.py --output run --evaluate                                     its best weights, on the test
    python train_sequences.py --task listops --method sgconv --help                       the defaults of that preset

The folder --output holds one run: args.yaml, summary.csv, curves.png, checkpoints (last.safetensors,
previous.safetensors), the weights of the best epoch on the validation data (best.safetensors) and, at the end, what
these reach on the test (test.json), and them in both forms (trained/, fused/) for MRConvSequence.from_pretrained.
SIGTERM and SIGINT finish the step, save, and exit with status 75.
"""

import argparse
import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any, Optional

from torch import nn

from mrconvnext.sequence import MRConvSequence
from mrconvnext.training import checkpoints
from mrconvnext.training.errors import UserError
from mrconvnext.training.evaluation import evaluate as evaluated
from mrconvnext.training.files import whole, whole_folder
from mrconvnext.training.precision import Precision
from mrconvnext.training.processes import Processes
from mrconvnext.training.program import carry_out, launch
from mrconvnext.training.samples import UnreadableFiles
from mrconvnext.training.sequences import SequenceRun, evaluation_loader, make_model, open_splits, parse_args

_logger = logging.getLogger("train_sequences")

PUBLISHED = ("README.md", "config.json", "model.safetensors")


def main(argv: Optional[list[str]] = None) -> int:
    """Trains or evaluates as the command line says, and returns the exit status."""
    return launch(parse_args(argv, description=__doc__), train, evaluate)


def train(args: argparse.Namespace, processes: Processes) -> int:
    """Trains a model from the beginning or from a checkpoint, tests the best weights, returns the exit status."""
    return carry_out(lambda stop: SequenceRun(args, processes, stop), finish)


def finish(run: SequenceRun) -> None:
    """Tests the best weights of a run that came to its end, and writes them in both forms."""
    args, progress = run.args, run.progress
    model = with_best_weights(run.model, args.output)
    alone = Processes(rank=0, count=1, device=run.processes.device)
    found = test(model, args, alone, run.precision)
    _logger.info(f"best of {len(progress.rows)} epochs: {progress.best:.2f} % right of the {run.counts[1]} held out")
    with whole(args.output / "test.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    if isinstance(model, MRConvSequence):
        for form in (model, copy.deepcopy(model).reparameterize()):
            name = "trained" if form is model else "fused"
            with whole_folder(args.output / name, PUBLISHED) as folder:
                form.save_pretrained(folder)
            _logger.info(f"{args.output / name} is for mrconvnext.MRConvSequence.from_pretrained")


def evaluate(args: argparse.Namespace, processes: Processes) -> int:
    """Tests a run's best weights, and returns the exit status."""
    precision = Precision.of(args, processes.device)
    model = with_best_weights(precision.model(make_model(args)), args.output)
    test(model, args, processes, precision)
    return 0


def with_best_weights(model: nn.Module, output: Path) -> nn.Module:
    """Returns a copy of a model with the best weights of a run.

    Raises:
        UserError: If there are none, or they are damaged or of another model.
    """
    try:
        weights, _ = checkpoints.read(output / checkpoints.BEST)
        model = copy.deepcopy(model)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--output {output}: {' '.join(str(error).split())}") from error
    return model


def test(
    model: nn.Module, args: argparse.Namespace, processes: Processes, precision: Precision
) -> dict[str, dict[str, float]]:
    """Returns loss and accuracy of a model on the test, as trained and deployed, at ``--test-rate`` if there is one.

    Its kernels follow the rate, unless they are to be kept.
    """
    rate = args.test_rate or args.rate
    forms: dict[str, Any] = {"as trained": copy.deepcopy(model)}
    if isinstance(model, MRConvSequence):
        if rate != args.rate and not args.keep_kernels:
            forms["as trained"].resample(args.rate / rate)
        forms["deployed"] = copy.deepcopy(forms["as trained"]).reparameterize()
    loader = evaluation_loader(open_splits(args, rate)[2], args, processes)
    found = {name: evaluated(own, loader, precision, processes, UnreadableFiles(0)) for name, own in forms.items()}
    for name, own in found.items():
        _logger.info(f"test, {name}: " + ", ".join(f"{key} {value:.6g}" for key, value in own.items()))
    return found


if __name__ == "__main__":
    sys.exit(main())
