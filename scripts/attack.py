"""Attacks runs of train_imagenet.py: kills them at random moments, and damages the folders of finished ones.

    python -m scripts.attack --kills 100 --damages 200

A run that was killed, however often, must end as one that never was: the same checkpoints, summary and published
files, and no other file. A run whose folder was damaged must do the same when it is resumed, or say in one line why it
can't. Prints each finding and the counts; the exit status is 1 if there are findings.
"""

import argparse
import contextlib
import io
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from runs import MODEL, Process, contents, main, write_images  # noqa: E402  of the tests

from training import checkpoints  # noqa: E402

RECIPE = "--global-batch 24 --batch-size 12 --model-ema-decay 0.9 --checkpoint-interval 2 --epochs 2".split()

DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda content, choose: b"",
    "cut": lambda content, choose: content[: choose.randrange(len(content))] if content else b"",
    "a bit changed": lambda content, choose: changed(content, choose),
    "zeros at the end": lambda content, choose: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "of another kind": lambda content, choose: choose.choice([b"{}", b"[]", b"null", b"\xff\xfe\x00", b"a: [", b"1\n"]),
    "longer": lambda content, choose: content + b"\x00garbage",
}


def main_of_attack() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--damages", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    choose = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images")
        options = ["--data-dir", folder / "images", *MODEL, *RECIPE]
        start = time.monotonic()
        Process(folder / "log", *options, "--output", folder / "whole").finish()
        seconds = time.monotonic() - start
        findings = kill(options, folder, seconds, args.kills, choose)
        findings += damage(options, folder, args.damages, choose)
    print("\n".join(findings))
    return min(len(findings), 1)


def kill(options: list, folder: Path, seconds: float, kills: int, choose: random.Random) -> list[str]:
    """Kills runs so often in all, each again and again until it ends; returns what differs from one that never was."""
    findings, done, runs = [], 0, 0
    while done < kills:
        runs += 1
        run = folder / f"killed-{runs}"
        arguments = [*options, "--output", run, "--resume", "auto"]
        while done < kills:
            process = Process(folder / "log", *arguments)
            process.process.join(choose.uniform(0.2, 1.1) * seconds)
            if not process.process.is_alive():
                break
            process.process.kill()
            process.process.join()
            done += 1
        Process(folder / "log", *arguments).finish()
        if found := difference(folder / "whole", run):
            findings.append(f"killed run {runs}: {found}")
        shutil.rmtree(run)
    print(f"{done} kills in {runs} runs, {len(findings)} findings", flush=True)
    return findings


def damage(options: list, folder: Path, damages: int, choose: random.Random) -> list[str]:
    """Damages so many folders and resumes their runs; returns what ends otherwise than it may."""
    findings, outcomes = [], Counter[str]()
    for _ in range(damages):
        run = folder / "damaged"
        shutil.copytree(folder / "whole", run)
        file = choose.choice(sorted(path for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name))
        kind = choose.choice(sorted(DAMAGES))
        file.write_bytes(DAMAGES[kind](file.read_bytes(), choose))
        outcome = resumed([*options, "--output", run, "--resume", "auto"])
        if outcome == "ended" and (found := difference(folder / "whole", run)):
            outcome = f"ended with a difference: {found}"
        outcomes[outcome.partition(":")[0]] += 1
        if outcome not in ("ended", "refused in one line"):
            findings.append(f"{file.relative_to(run)} {kind}: {outcome}")
        shutil.rmtree(run)
    print(f"{damages} damaged folders: {dict(outcomes)}", flush=True)
    return findings


def resumed(arguments: list) -> str:
    """Returns how a run ends that is resumed."""
    out, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = main(*arguments)
    except (Exception, SystemExit) as found:
        return f"a traceback: {type(found).__name__}: {found}"
    finally:
        logging.getLogger().handlers.clear()
    if status == 0:
        return "ended"
    lines = error.getvalue().splitlines()
    return "refused in one line" if len(lines) == 1 else f"refused in {len(lines)} lines: {lines[:1]}"


def difference(whole: Path, run: Path) -> str:
    """Returns what of a run differs from one that never was attacked, nothing if nothing does."""
    (own, own_state), (other, other_state) = (checkpoints.read(folder / checkpoints.LAST) for folder in (whole, run))
    if own_state["step"] != other_state["step"] or any(not torch.equal(own[name], other[name]) for name in own):
        return "another last checkpoint"
    expected, found = contents(whole), contents(run)
    names = [{name for name in files if "tfevents" not in name} for files in (expected, found)]
    if names[0] != names[1]:
        return f"other files: {sorted(names[0] ^ names[1])}"
    same = ("summary.csv", "trained/model.safetensors", "fused/model.safetensors", "trained/config.json")
    return ", ".join(name for name in same if expected[name] != found[name])


def changed(content: bytes, choose: random.Random) -> bytes:
    if not content:
        return content
    own = bytearray(content)
    own[choose.randrange(len(own))] ^= 1 << choose.randrange(8)
    return bytes(own)


if __name__ == "__main__":
    sys.exit(main_of_attack())
