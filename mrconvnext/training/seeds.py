"""Random numbers that depend on named quantities alone, so that a run can be resumed at any step."""

import random

import numpy as np
import torch


def derived_seed(*numbers: int) -> int:
    """Returns a seed below 2**63 that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def seed_all(seed: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (timm draws from it)
    # Not `torch.manual_seed`: for every kind of device that is not there it records a stack trace, which takes longer
    # than reading a small image.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
