"""What a case is, and the models, images and comparisons that all of them use."""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from mrconvnext import MRConvNeXt

NAME = "mrconvnext_atto"
CONVNEXT = "convnext_atto"
CLASSES = 10
SIZE = 64  # pixels
FORMS = ("training", "deployed")

# Layer scales of order 1: with ConvNeXt's start, 1e-6, no error of a block can be seen in the logits.
SCALES: dict[str, Any] = {"num_classes": CLASSES, "ls_init_value": 1.0}
OPTIONS: dict[str, Any] = {"img_size": SIZE, **SCALES}

# Largest error of a result in float32, of its largest value.
LIMIT = 1e-5


class Case(NamedTuple):
    """A situation: what it is, the libraries that it takes, and the function that tries it."""

    libraries: tuple[str, ...]
    run: Callable[[], str]


CASES: dict[str, Case] = {}


def case(*libraries: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Makes a function a case. It returns a figure, or raises an AssertionError that says what is wrong."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        CASES[function.__name__] = Case(libraries, function)
        return function

    return register


def new_model(**options: Any) -> MRConvNeXt:
    """Returns a small model in training form, in eval mode."""
    model: Any = timm.create_model(NAME, **{**OPTIONS, **options})
    return model.eval()


def new_convnext() -> Any:
    """Returns the ConvNeXt that the small model is one of, in eval mode."""
    return timm.create_model(CONVNEXT, **SCALES).eval()


def trained(form: str = "training", **options: Any) -> MRConvNeXt:
    """Returns a small model in eval mode that a few steps have trained: its statistics and α are not fresh ones."""
    model = new_model(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(3):
        train_step(model, optimizer)
    return in_form(model.eval(), form)


def in_form(model: MRConvNeXt, form: str) -> MRConvNeXt:
    """Returns the model, reparameterized if ``form`` says so."""
    return model.reparameterize() if form == "deployed" else model


def train_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Takes one step on random images."""
    model.train()
    optimizer.zero_grad()
    model(images(4)).square().mean().backward()
    optimizer.step()


def images(batch: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size)


@torch.no_grad()
def fresh_output(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Returns what a new model in eval mode computes with the weights of ``model``: it keeps nothing from before."""
    again = new_model(**options)
    again.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    return again(x.clone())


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a fraction of the largest value; NaN if there is one."""
    difference = (actual - expected).abs().max()
    return 0.0 if difference == 0 else (difference / expected.abs().max()).item()  # both may be zero


def agree(actual: Tensor, expected: Tensor, what: str, limit: float = LIMIT) -> float:
    """Returns the error of a result; raises if it is above ``limit``, or not a number."""
    error = error_of(actual, expected)
    assert error <= limit, f"{what}: off by {error:.1e} of the largest value"
    return error


def differ(actual: Tensor, other: Tensor, what: str) -> None:
    """Raises if two results agree that must not: the case would show nothing."""
    assert error_of(actual, other) > 1e-3, f"{what} changed nothing: the case shows nothing"


def messages(error: BaseException) -> str:
    """Returns what an error says, and those that it comes from."""
    before = error.__cause__ or error.__context__
    return str(error) if before is None else f"{error} {messages(before)}"


def origin_of(error: BaseException) -> BaseException:
    """Returns the error that an error comes from, in the end."""
    before = error.__cause__ or error.__context__
    return error if before is None else origin_of(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what libraries print, warn and log, those in C++ as well."""
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        sys.stdout.flush()
        sys.stderr.flush()
        kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        try:
            for descriptor in kept:
                os.dup2(nowhere.fileno(), descriptor)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, own in kept.items():
                os.dup2(own, descriptor)
                os.close(own)
            logging.disable(logging.NOTSET)


def said_by(error: BaseException) -> str:
    """Returns what an error says in a line, with its type unless a case of ours raised it."""
    kind = "" if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: "
    line = kind + re.sub(r"\x1b\[\d*m|\s+", " ", str(error)).strip()
    return line if len(line) <= 300 else f"{line[:300]}…"
