"""Runs that are killed or stopped, and runs that get in each other's way."""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from runs import MODEL, Process, contents, write_images

from mrconvnext.training import checkpoints
from mrconvnext.training.processes import INTERRUPTED

RECIPE = "--global-batch 24 --batch-size 12 --model-ema-decay 0.9 --checkpoint-interval 2 --epochs 2".split()

# Operations on files, by the names of their audit events.
OPERATIONS = {"open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}


class Setting(NamedTuple):
    """A small run that was never attacked, and a folder for others like it."""

    folder: Path
    options: list
    seconds: float

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def arguments(self, run: Path) -> list:
        return [*self.options, "--output", run, "--resume", "auto"]

    def start(self, run: Path, **options: Any) -> Process:
        return Process(self.folder / "log", *self.arguments(run), **options)

    def ended(self, run: Path) -> str:
        """Lets a run go on to its end and removes it; returns what differs then, nothing if nothing does."""
        self.start(run).finish()
        found = difference(self.whole, run)
        shutil.rmtree(run)
        return found


def prepare(folder: Path) -> Setting:
    """Runs what is attacked later."""
    write_images(folder / "images")
    setting = Setting(folder, ["--data-dir", folder / "images", *MODEL, *RECIPE], 0.0)
    setting.start(folder / "first").finish()  # which starts the server of processes
    start = time.monotonic()
    setting.start(setting.whole).finish()
    return setting._replace(seconds=time.monotonic() - start)


def difference(whole: Path, run: Path) -> str:
    """Returns what of a run differs from one that was never attacked, nothing if nothing does."""
    (own, own_state), (other, other_state) = (checkpoints.read(folder / checkpoints.LAST) for folder in (whole, run))
    if own_state["step"] != other_state["step"] or any(not torch.equal(own[name], other[name]) for name in own):
        return "another last checkpoint"
    expected, found = contents(whole), contents(run)
    names = [{name for name in files if "tfevents" not in name} for files in (expected, found)]
    if names[0] != names[1]:
        return f"other files: {sorted(names[0] ^ names[1])}"
    same = ("summary.csv", "trained/model.safetensors", "fused/model.safetensors", "trained/config.json")
    return ", ".join(name for name in same if expected[name] != found[name])


def at_random_moments(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Kills runs so often in all, each again and again until it ends; returns what is wrong with them then."""
    setting = prepare(folder)
    findings, done, runs = [], 0, 0
    while done < count:
        runs += 1
        run = folder / f"killed-{runs}"
        while done < count:
            process = setting.start(run).process
            process.join(choose.uniform(0.2, 1.1) * setting.seconds)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            done += 1
        if found := setting.ended(run):
            findings.append(f"killed run {runs}: {found}")
    print(f"{done} kills at random moments in {runs} runs, {len(findings)} findings", flush=True)
    return findings


def before_each_operation(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Kills a run before its first operation on a file of its folder, another before its second, and so on."""
    setting = prepare(folder)
    findings, run, at = [], folder / "killed", 0
    while at < count:
        process = setting.start(run, before=partial(kill_before, str(run), at + 1)).process
        process.join()
        if process.exitcode == 0:  # it has no more
            break
        at += 1
        if process.exitcode != -signal.SIGKILL:
            findings.append(f"operation {at}: exit status {process.exitcode}")
        if found := setting.ended(run):
            findings.append(f"killed before operation {at}: {found}")
    print(f"killed before each of {at} operations on files, {len(findings)} findings", flush=True)
    return findings


def kill_before(folder: str, at: int) -> None:
    """Has this process kill itself before its ``at``-th operation on what lies in a folder."""
    done = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal done
        if event in OPERATIONS and _is_within(folder, args):
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _is_within(folder: str, args: tuple) -> bool:
    # What is removed with its folder is named relative to that, which is open: the last argument.
    is_relative = isinstance(args[-1], int) and args[-1] >= 0 and len(args) == 2
    return is_relative or any(isinstance(arg, (str, os.PathLike)) and str(arg).startswith(folder) for arg in args[:2])


def by_signals(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Sends runs SIGTERM or SIGINT in turn, at moments spread over their time: loading, training, publishing."""
    setting = prepare(folder)
    findings, statuses = [], []
    for i in range(count):
        run, number = folder / f"stopped-{i}", (signal.SIGTERM, signal.SIGINT)[i % 2]
        process = setting.start(run)
        process.process.join((i + 0.5) / count * setting.seconds)
        was_there = run.exists()
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            process.signal(number)
        process.process.join()
        status = process.process.exitcode
        statuses.append(status)
        # Before a run has a folder it has nothing to save: the signal may end it as it ends any program.
        if status not in ((0, INTERRUPTED) if was_there else (0, INTERRUPTED, 130, -number)):
            findings.append(f"signal {number} at {i + 1} of {count}: exit status {status}")
        if found := setting.ended(run):
            findings.append(f"signal {number} at {i + 1} of {count}: {found}")
    print(f"{count} signals, exit statuses {statuses}, {len(findings)} findings", flush=True)
    return findings


def in_crowds(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Starts two runs at once in one folder, then three, and so on: one must run, the others must be refused."""
    setting = prepare(folder)
    findings = []
    for size in range(2, 2 + count):
        run = folder / f"crowd-{size}"
        logs = [folder / f"log-{i}" for i in range(size)]
        processes = [Process(log, *setting.arguments(run)) for log in logs]
        for process in processes:
            process.process.join()
        statuses = sorted(process.process.exitcode for process in processes)
        refusals = [text for log in logs if "still going on" in (text := log.read_text())]
        if statuses != [0] + [2] * (size - 1) or len(refusals) != size - 1:
            findings.append(f"{size} at once: exit statuses {statuses}, {len(refusals)} refusals")
        if found := setting.ended(run):
            findings.append(f"{size} at once: {found}")
    print(f"crowds of 2 to {count + 1} runs, {len(findings)} findings", flush=True)
    return findings
