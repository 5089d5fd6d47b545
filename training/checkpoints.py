"""Checkpoints of a training run: one safetensors file each, with JSON in its header; complete, or not there at all."""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


def write(
    file: Path, tensors: dict[str, Tensor], state: Optional[dict[str, Any]] = None, keep: Optional[Path] = None
) -> None:
    """Writes a file under a temporary name, then renames it: a file with a checkpoint's name is complete.

    Args:
        file: Where to write.
        tensors: Tensors by name.
        state: What JSON can hold.
        keep: Where the file that ``file`` replaces is kept.

    Raises:
        OSError: If it can't be written, because the disk is full for example. Nothing is left behind.
    """
    temporary = file.with_name(f".{file.name}.writing")
    try:
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(own, temporary, metadata={"state": json.dumps(state or {})})
        temporary.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes its files private
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        if keep is not None and file.is_file():
            os.replace(file, keep)
        os.replace(temporary, file)
    except SafetensorError as error:
        raise OSError(f"{file} can't be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the state of a file that `write` wrote.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is truncated, damaged or another kind of file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            return tensors, json.loads((opened.metadata() or {})["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not a complete checkpoint ({error!r})") from error


def write_last(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the newest checkpoint of a run and keeps the one before it.

    Raises:
        OSError: If it can't be written.
    """
    write(folder / LAST, tensors, state, keep=folder / PREVIOUS)


def read_newest(folder: Path) -> Optional[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Returns the newest checkpoint of a run that is complete, None if there is none at all.

    Raises:
        ValueError: If there are checkpoints and none of them is complete.
    """
    files = [file for name in (LAST, PREVIOUS) if (file := folder / name).is_file()]
    for file in files:
        try:
            return read(file)
        except ValueError as error:
            _logger.warning(f"skipped: {error}")
    if files:
        raise ValueError(f"none of the checkpoints in {folder} is complete: {', '.join(file.name for file in files)}")
    return None


def describe_last_good(folder: Path, step: int) -> str:
    """Returns which checkpoint of a run is the newest one from before a step that failed, if there is one."""
    for name in (LAST, PREVIOUS):
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = read(folder / name)[1]["step"]
            if found < step:
                return f"the last good checkpoint is {folder / name}, of step {found}"
    return f"there is no good checkpoint in {folder}"


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns an optimizer's tensors by name, and the rest of its state for JSON."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, own in state["state"].items():
        for name, value in own.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                rest[f"{index}.{name}"] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Gives an optimizer the state that `flatten_optimizer` took from one."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**rest["state"], **tensors}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
