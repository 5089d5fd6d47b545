"""Weights and configurations that are damaged or hostile, by every way in."""

import contextlib
import importlib.util
import io
import json
import logging
import logging.handlers
import pickle
import random
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import timm
import torch
from helpers import SMALL, images, relative_error, small_model
from hub_server import Hub
from runs import main as train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mrconvnext
from mrconvnext.cli import main as command

from .folders import DAMAGES

NAME = "mrconvnext_atto"

# What may stand in the place of any value of a configuration.
HOSTILE: list[Any] = [
    None,
    -1,
    0,
    10**18,
    1e308,
    float("nan"),
    "",
    "false",
    "é" * 5000,
    "../../etc/passwd",
    [],
    {},
    True,
]
HOSTILE += [[[[]]], {"a": {}}, [1, "x", None], -(2**63), "__import__('os').system('true')"]

SECONDS = 60


class TooLong(BaseException):
    """Something took longer than it may."""


# What is done to a folder that a model was saved to


def change_config(folder: Path, choose: random.Random) -> str:
    """Replaces a value of the configuration, or takes a name out of it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    places = list(_places(config))
    where, key = choose.choice(places)
    value = choose.choice(HOSTILE)
    if choose.random() < 0.2:
        del where[key]
        what = f"config.json without {key}"
    else:
        where[key] = value
        what = f"config.json with {key}: {value!r:.40}"
    file.write_text(json.dumps(config))
    return what


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, own in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(own, (dict, list)):
            yield from _places(own)


def change_weights(folder: Path, choose: random.Random) -> str:
    """Changes one tensor of the weights, or takes it out, or adds one."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = choose.choice(sorted(tensors))
    kind = choose.choice(sorted(TENSORS))
    TENSORS[kind](tensors, name)
    save_file(
        {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
    return f"{name} {kind}"


def _replaced(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], str], None]:
    def own(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = change(tensors[name])

    return own


TENSORS: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "added under another name": lambda tensors, name: tensors.update({f"{name}.more": tensors[name]}),
    "renamed": lambda tensors, name: tensors.update({f"module.{name}": tensors.pop(name)}),
    "with one value more": _replaced(lambda x: torch.cat([x.flatten(), x.flatten()[:1]])),
    "flattened": _replaced(lambda x: x.flatten()[None]),
    "empty": _replaced(lambda x: x.flatten()[:0]),
    "boolean": _replaced(lambda x: x > 0),
    "of whole numbers": _replaced(lambda x: (100 * x.float()).to(torch.int16)),
    "of numbers past the range": _replaced(lambda x: x if x.is_floating_point() else x + 2**20),
    "negative": _replaced(lambda x: x if x.is_floating_point() else -x - 1),
    "of fractions": _replaced(lambda x: x if x.is_floating_point() else x + 0.5),
}


def damage(folder: Path, choose: random.Random) -> str:
    """Damages the bytes of a file, of the weights those of their header: in the rest any bytes are weights."""
    file = folder / choose.choice(["config.json", "model.safetensors"])
    content = file.read_bytes()
    kind = choose.choice(sorted(DAMAGES))
    size = len(content) if file.suffix == ".json" else 8 + struct.unpack("<Q", content[:8])[0]
    rest = b"" if kind in ("cut", "emptied", "zeros at the end") else content[size:]
    file.write_bytes(DAMAGES[kind](content[:size], choose) + rest)
    return f"{file.name} {kind}"


def put_code(folder: Path, choose: random.Random) -> str:
    """Puts a pickle that makes a file when it is loaded in the place of the weights, or beside a folder without."""
    name = choose.choice(["model.safetensors", "pytorch_model.bin"])
    (folder / "model.safetensors").unlink()
    payload = pickle.dumps(_Code(folder / "code-was-run"), protocol=2)  # of others PyTorch warns
    if choose.random() < 0.5:
        with open(folder / name, "wb") as file:
            torch.save({"weight": _Code(folder / "code-was-run")}, file)
    else:
        (folder / name).write_bytes(payload)
    return f"code in {name}"


class Finding(Exception):
    """What is wrong with what a program did."""


class _Code:
    """What runs code when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple:
        return Path.touch, (self.made,)


CHANGES = [change_config, change_weights, damage, put_code]


# The ways in. Each returns the model, or raises what it raises.


def by_local_dir(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def by_checkpoint_path(folder: Path) -> nn.Module:
    return timm.create_model(NAME, **SMALL, checkpoint_path=str(_weights(folder)))


def by_hub(folder: Path) -> nn.Module:
    hub = conftest.SERVER.hub = Hub(conftest.SERVER.address)
    hub.add("someone/attacked", {file.name: file.read_bytes() for file in folder.iterdir()})
    shutil.rmtree(Path(conftest.HOME.name, "hub"), ignore_errors=True)
    return timm.create_model("hf-hub:someone/attacked", pretrained=True)


def by_command(folder: Path) -> nn.Module:
    _in_one_line(lambda: command(["convert", str(folder), str(folder / "converted")]))
    return by_local_dir(folder / "converted")


def by_script(folder: Path) -> nn.Module:
    options = [f"{name}={value}" for name, value in SMALL.items() if name not in ("num_classes", "img_size")]
    words = f"--dataset digits --img-size 64 --model {NAME}".split()
    run = folder / "run"
    arguments = [*words, "--model-kwargs", *options, "--finetune", _weights(folder), "--output", run, "--evaluate"]
    _in_one_line(lambda: train(*arguments))
    return by_checkpoint_path(folder)


def by_transformers(folder: Path) -> nn.Module:
    from transformers import TimmWrapperForImageClassification

    return TimmWrapperForImageClassification.from_pretrained(str(folder)).timm_model


WAYS = [by_local_dir, by_checkpoint_path, by_hub, by_command, by_script]
if importlib.util.find_spec("transformers") is not None:
    WAYS.append(by_transformers)


def _weights(folder: Path) -> Path:
    return next(file for file in (folder / "model.safetensors", folder / "pytorch_model.bin") if file.exists())


def _in_one_line(program: Callable[[], int]) -> None:
    """Raises a ValueError if a program refuses in one line, a `Finding` if in another way."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            status = program()
        except (Exception, SystemExit) as found:
            raise Finding(f"a traceback: {type(found).__name__}: {found}") from found
        finally:
            logging.getLogger().handlers.clear()
    if status != 0:
        lines = error.getvalue().splitlines()
        if len(lines) != 1:
            raise Finding(f"refused in {len(lines)} lines: {lines[:2]}")
        raise ValueError(lines[0])


# The attack


def hostile(folder: Path, choose: random.Random, count: int) -> list[str]:
    """Changes so many folders of saved models, which go in by every way; returns what is wrong with what comes out."""
    model = small_model()
    for form, fused in (("trained", False), ("fused", True)):
        mrconvnext.save(model, folder / form, fused=fused)
    with torch.no_grad():
        expected = model(images())
    findings, outcomes = [], Counter[str]()
    signal.signal(signal.SIGALRM, _raise_too_long)
    for i in range(count):
        form = ("trained", "fused")[i % 2]
        changed = folder / f"changed-{i}"
        shutil.copytree(folder / form, changed)
        what = choose.choice(CHANGES)(changed, choose)
        for way in WAYS:
            outcome = outcome_of(way, changed, expected)
            if (changed / "code-was-run").exists():
                outcome = "code was run"
                (changed / "code-was-run").unlink()
            outcomes[outcome.partition(":")[0]] += 1
            if outcome not in ("the same model", "another model with a warning", "refused"):
                findings.append(f"{form}, {what}, {way.__name__}: {outcome}")
        shutil.rmtree(changed)
    print(f"{count} changed folders by {len(WAYS)} ways: {dict(outcomes)}", flush=True)
    return findings


def _raise_too_long(*args: Any) -> None:
    raise TooLong


def outcome_of(way: Callable[[Path], nn.Module], folder: Path, expected: Tensor) -> str:
    """Returns what comes of a folder that goes in by a way."""
    signal.alarm(SECONDS)
    warnings = logging.handlers.BufferingHandler(capacity=1000)
    warnings.setLevel(logging.WARNING)
    logging.getLogger("mrconvnext").addHandler(warnings)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            found = way(folder).eval()(images())
    except Finding as error:
        return str(error)
    except TooLong:
        return f"more than {SECONDS} s"
    except MemoryError:
        return "out of memory"
    except Exception as error:
        # timm asserts without a message.
        is_said = str(error).strip() or isinstance(error, AssertionError)
        return "refused" if is_said else f"an empty message: {type(error).__name__}"
    finally:
        signal.alarm(0)
        logging.getLogger("mrconvnext").removeHandler(warnings)
    if found.shape == expected.shape and relative_error(found, expected) <= 1e-4:
        return "the same model"
    if warnings.buffer:
        return "another model with a warning"
    return "another model in silence"
