"""What a program that trains does from its command line to its exit status."""

import argparse
import contextlib
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..tasks.errors import DataError
from .errors import UserError
from .files import locked
from .output import write_arguments
from .processes import INTERRUPTED, Processes, ending_workers, process_group, signals_call
from .run import Run

_logger = logging.getLogger(__name__)


def launch(
    args: argparse.Namespace,
    train: Callable[[argparse.Namespace, Processes], int],
    evaluate: Callable[[argparse.Namespace, Processes], int],
) -> int:
    """Trains or evaluates in all processes, as the arguments say, and returns the exit status: 2 after an error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("timm").setLevel(logging.WARNING)  # which says of one file three times that it is loaded
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which says of each try that it failed
    try:
        with process_group(args.device) as processes, ending_workers():
            if processes.rank != 0:
                logging.disable(logging.INFO)
            return (evaluate if args.evaluate else train)(args, processes)
    except (DataError, UserError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]  # the error of a worker comes with its traceback
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {reason}\n")
        return 2


def carry_out(make_run: Callable[[threading.Event], Any], finish: Callable[[Any], None]) -> int:
    """Trains a run from the beginning or from a checkpoint, to the end or until a signal, returns the exit status.

    Args:
        make_run: Makes the `Run`, which an event stops.
        finish: Does what is to be done in the first process once it has come to its end.
    """
    stop = threading.Event()
    with signals_call(stop.set):
        run: Run = make_run(stop)
        if run.args.resume and run.restore():
            done = " where all epochs are done" if len(run.progress.rows) == run.args.epochs else ""
            _logger.info(f"resuming at step {run.progress.step}{done}")
        is_first = run.processes.rank == 0
        with locked(run.args.output) if is_first else contextlib.nullcontext():
            if is_first:
                write_arguments(run.args)
            _logger.info(run.describe())
            run.train()
            if run.stopped:
                _logger.info(f"stopped by a signal at step {run.progress.step}; resume with --resume auto")
                return INTERRUPTED
            if is_first:
                finish(run)
            return 0
