"""Files of a run: whole or not there at all, and on the disk; and the lock that keeps other runs away."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

WRITING = ".writing"
LOCK = ".lock"


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives a path to write to. What stands there at the end of the block takes the file's place, all of it.

    The path lies in a folder of its own beside the file, which goes with all that a killed process left there:
    libraries write under names of their own.

    Raises:
        OSError: If it can't be written, because the disk is full for example. The file is as it was.
    """
    room = file.parent / WRITING
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    try:
        yield room / file.name
        (room / file.name).chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes its files private
        synchronise(room / file.name)
        os.replace(room / file.name, file)
        synchronise(file.parent)
    except OSError as error:
        raise OSError(f"{file} can't be written: {error}") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Gives a path for a new folder, which at the end of the block takes the place of one with such files alone.

    Raises:
        UserError: If something else is there, which nobody here wrote.
    """
    if folder.exists() or folder.is_symlink():
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
        foreign = [name for name in found if name not in names and not name.startswith(".")]
        if foreign or folder.is_symlink() or not folder.is_dir():
            raise UserError(f"{folder} is in the way: it holds {(foreign or [folder.name])[0]}, which no run wrote")
    room = folder.parent / WRITING
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    try:
        yield room / folder.name
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(room / folder.name, folder)
        synchronise(folder.parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def synchronise(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made, until the block or this process ends, however it ends.

    Raises:
        UserError: If another run is in it.
    """
    import fcntl  # of POSIX

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--output {folder} is the folder of a run that is still going on") from error
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
