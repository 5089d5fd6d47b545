"""Checkpoints of a training run: one safetensors file each, with JSON in its header; complete, or not there at all."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import whole

_logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


def write(
    file: Path, tensors: dict[str, Tensor], state: Optional[dict[str, Any]] = None, keep: Optional[Path] = None
) -> None:
    """Writes a file: complete, or not there at all.

    Args:
        file: Where to write.
        tensors: Tensors by name.
        state: What JSON can hold.
        keep: Where the file that ``file`` replaces is kept.

    Raises:
        OSError: If it can't be written, because the disk is full for example. Nothing is left behind.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state or {})
    try:
        with whole(file) as temporary:
            save_file(own, temporary, metadata={"state": text, "digest": digest(own, text)})
            if keep is not None and file.is_file():
                os.replace(file, keep)
    except SafetensorError as error:
        raise OSError(f"{file} can't be written: {error}") from error


def digest(tensors: dict[str, Tensor], state: str) -> str:
    """Returns a number that changes with any bit of a checkpoint."""
    total = hashlib.blake2b(state.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the state of a file that `write` wrote.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is truncated, changed, damaged or another kind of file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            found = opened.metadata() or {}
            if digest(tensors, found["state"]) != found["digest"]:
                raise ValueError("its contents were changed after it was written")
            return tensors, json.loads(found["state"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is not a complete checkpoint ({error!r})") from error


def write_last(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the newest checkpoint of a run and keeps the newest one of an earlier step.

    Raises:
        OSError: If it can't be written.
    """
    before = _step_of(folder / LAST)
    is_earlier = before is not None and before < state["step"]
    write(folder / LAST, tensors, state, keep=folder / PREVIOUS if is_earlier else None)


def _step_of(file: Path) -> Optional[int]:
    """Returns the step that a checkpoint says it is of, None if there is none or it can't be read."""
    try:
        with safe_open(file, "pt") as opened:
            return json.loads((opened.metadata() or {})["state"])["step"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


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


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Returns an optimizer's tensors by name, and the rest of its state for JSON.

    Raises:
        TypeError: If there is something in it that can't be written.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(optimizer.state_dict(), "", tensors)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: Any) -> None:
    """Gives an optimizer the state that `flatten_optimizer` took from one."""
    optimizer.load_state_dict(_unpack(rest, tensors))


def check_resumable(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """Checks on a layer of a few weights that an optimizer goes on after a checkpoint as if there had been none.

    Args:
        make: Makes the optimizer of a module.

    Raises:
        ValueError: If it does not, or can't train at all.
    """
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    try:
        first = make(one)
        for _ in range(2):
            _step_of_a_trial(one, first)
        tensors, rest = flatten_optimizer(first)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        other.load_state_dict(one.state_dict())
        second = make(other)
        restore_optimizer(second, tensors, json.loads(json.dumps(rest)))
        for module, optimizer in ((one, first), (other, second)):
            _step_of_a_trial(module, optimizer)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"it can't be trained with here, or not be resumed: {error}") from error
    if not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters())):
        raise ValueError("a run that is resumed would not be the one that never stopped")


def _step_of_a_trial(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as JSON can hold it, its tensors, which go to ``tensors``, by their names: [kind, content]."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, dict):  # whose keys may be numbers, which JSON has not
        return ["dict", [[key, _pack(own, f"{name}.{key}", tensors)] for key, own in value.items()]]
    if isinstance(value, (list, tuple)):
        content = [_pack(own, f"{name}.{i}", tensors) for i, own in enumerate(value)]
        return ["tuple" if isinstance(value, tuple) else "list", content]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["value", value]
    raise TypeError(f"{name.removeprefix('.')} is a {type(value).__name__}, which can't be written to a checkpoint")


def _unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns what `_pack` was given."""
    kind, content = packed
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(own, tensors) for key, own in content}
    if kind in ("list", "tuple"):
        values = [_unpack(own, tensors) for own in content]
        return values if kind == "list" else tuple(values)
    return getattr(torch, content) if kind == "dtype" else content
