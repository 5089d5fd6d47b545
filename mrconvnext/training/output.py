"""The folder of a run: its arguments, a line for each epoch, and pictures of them."""

import argparse
import csv
import importlib.util
import logging
from pathlib import Path
from typing import Any, Optional

import yaml

from .arguments import to_plain
from .checkpoints import LAST, PREVIOUS
from .errors import UserError
from .files import whole

_logger = logging.getLogger(__name__)

ARGUMENTS = "args.yaml"

# Arguments that may change when a run is resumed.
CHANGEABLE = {
    "resume",
    "output",
    "epochs",
    "workers",
    "device",
    "log_interval",
    "checkpoint_interval",
    "evaluate",
    "license",
}


def check_output(args: argparse.Namespace) -> None:
    """Checks that the folder of a run does not hold another run.

    Raises:
        UserError: If it does.
    """
    names = (ARGUMENTS, LAST, PREVIOUS)
    if not args.resume and any((args.output / name).exists() for name in names):
        raise UserError(f"--output {args.output} holds a run already: give --resume auto, or another folder")
    file = args.output / ARGUMENTS
    if file.is_file():
        try:
            earlier = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            earlier = error
        if isinstance(earlier, dict):
            check_same(args, earlier)
        else:
            _logger.warning(f"{file} is damaged: the arguments in the checkpoint count")


def check_same(args: argparse.Namespace, earlier: dict[str, Any]) -> None:
    """Checks that a run is resumed with the arguments that it was started with, but for those that may change.

    Raises:
        UserError: If it is not.
    """
    own = to_plain(args)
    different = [name for name in own if name not in CHANGEABLE and earlier.get(name) != own[name]]
    if different:
        changes = ", ".join(f"--{name.replace('_', '-')} {earlier.get(name)}" for name in different)
        raise UserError(f"--output {args.output} holds another run, one with {changes}")


def write_arguments(args: argparse.Namespace) -> None:
    """Writes args.yaml."""
    with whole(args.output / ARGUMENTS) as temporary:
        temporary.write_text(yaml.safe_dump(to_plain(args)))


class Summary:
    """summary.csv; curves.png and TensorBoard's files, where matplotlib and TensorBoard are installed.

    Args:
        folder: Folder of the run.
        epoch: First epoch that is to be written.
    """

    def __init__(self, folder: Path, epoch: int) -> None:
        self.folder = folder
        self.writer: Optional[Any] = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=epoch)

    def write(self, rows: list[dict[str, float]]) -> None:
        """Writes all epochs so far, the last of them new."""
        self.write_table(rows)
        if importlib.util.find_spec("matplotlib") is not None:
            from .plots import plot_training

            with whole(self.folder / "curves.png") as temporary:
                plot_training(rows).savefig(temporary, dpi=100)
        if self.writer is not None:
            for name, value in rows[-1].items():
                self.writer.add_scalar(name, value, global_step=len(rows) - 1)
            self.writer.flush()

    def write_table(self, rows: list[dict[str, float]]) -> None:
        """Writes summary.csv."""
        with whole(self.folder / "summary.csv") as temporary, open(temporary, "w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=rows[0].keys())
            table.writeheader()
            table.writerows(rows)
