"""A newcomer's day with a folder of pictures: the commands of docs/own-images.md, as they stand, each timed.

    python scripts/day.py photos day                     # class folders, and a folder that does not exist yet
    python scripts/day.py photos day -- --epochs 3       # what follows -- goes to the training commands as well

The first training command is stopped by Ctrl+C once there is a checkpoint, or after 20 seconds, whichever is later.
Prints how long each command took and the last line that it wrote; the exit status is 1 if one failed.
"""

import argparse
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from PIL import Image

GUIDE = Path(__file__).parents[1] / "docs" / "own-images.md"


@dataclass
class Done:
    """A command that has ended."""

    words: list[str]
    status: int
    output: str
    error: str
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder with a folder of pictures for each class")
    parser.add_argument("folder", type=Path, help="folder to make and to work in")
    parser.add_argument("more", nargs="*", help="further arguments of the training commands")
    args = parser.parse_args()
    failed = False
    for done in live(args.photos, args.folder, args.more, patience=20):
        ending = (done.output if done.status == 0 else done.error).strip().splitlines()[-1:]
        print(f"{done.seconds:6.1f} s  {shlex.join(done.words)}", *ending, sep="\n          ", flush=True)
        failed |= done.status not in (0, 75)
    return int(failed)


def live(photos: Path, folder: Path, more: Sequence[str] = (), patience: float = 0) -> list[Done]:
    """Runs the guide's commands in a new folder, and returns how each ended.

    Args:
        photos: Class folders.
        folder: Where to work; must not exist.
        more: Further arguments of the training commands.
        patience: Seconds before the first command may be stopped.
    """
    folder.mkdir(parents=True)
    (folder / "photos").symlink_to(photos.resolve(), target_is_directory=True)
    picture = next(file for file in sorted(photos.rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    Image.open(picture).convert("RGB").save(folder / "photo.jpg")
    first, *others = commands()
    ended = [_run([*first, *more], folder, stop_after=patience)]
    for words in others:
        ended.append(_run([*words, *more] if "--model" in words else words, folder))
    return ended


def commands() -> list[list[str]]:
    """Returns the words of the guide's commands, without those that install."""
    block = re.search(r"<!-- day -->\n```\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    if block is None:
        raise ValueError(f"{GUIDE} has no commands after a line <!-- day -->")
    lines = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    return [words for words in lines if words[0] != "pip"]


def _run(words: list[str], folder: Path, stop_after: Optional[float] = None) -> Done:
    started = time.monotonic()
    program = Path(sys.executable).with_name(words[0])
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([program, *words[1:]], cwd=folder, **pipes)
    if stop_after is not None:
        checkpoint = folder / "run" / "last.safetensors"
        while process.poll() is None and (time.monotonic() - started < stop_after or not checkpoint.exists()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    output, error = process.communicate()
    return Done(words, process.returncode, output, error, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
