"""Hyperparameters of the sequence tasks, by task and method, and where they come from.

MRConv's own stand in its paper as pictures alone (Cunningham et al. 2024, tables 5, 6). Those of S4 (Gu et al. 2022),
SGConv (Li et al. 2022) and, for sequential CIFAR, MultiresConv (Shi et al. 2023), whose tasks it shares, take their
place; so do they where SGConv and MultiresConv have none for a task. What is missing in S4's, weight decay and the
norm's place of some tasks, is SGConv's. Warm-up is a twentieth of a run, which none of them states for all.
"""

from typing import Any

from mrconvnext.kernels import KERNELS

METHODS = (*KERNELS, "lstm")

# Learning rate of the kernels, S4's and SGConv's.
KERNEL_LR = 1e-3

# Part of a run's epochs in which the learning rate rises.
WARM_UP = 0.05

S4, SGCONV, MULTIRES, OURS = "S4", "SGConv", "MultiresConv", "ours: small, for a few minutes on a CPU"


def _row(
    depth: int, dim: int, norm: str, before: bool, dropout: float, batch: int, lr: float, decay: float, epochs: int
) -> dict[str, Any]:
    return {
        "depth": depth,
        "dim": dim,
        "norm": norm,
        "prenorm": before,
        "dropout": dropout,
        "global_batch": batch,
        "lr": lr,
        "weight_decay": decay,
        "epochs": epochs,
    }


# Of MRConv's kernels, and of an LSTM: depth, channels, norm, whether it stands before, dropout, batch, learning rate,
# weight decay, epochs.
GENERAL = {
    "listops": (S4, _row(6, 256, "batch", False, 0.0, 32, 0.01, 0.05, 40)),
    "text": (SGCONV, _row(6, 256, "batch", True, 0.0, 16, 0.01, 0.05, 32)),
    "retrieval": (SGCONV, _row(6, 256, "batch", True, 0.0, 64, 0.01, 0.05, 20)),
    "image": (S4, _row(6, 512, "batch", False, 0.1, 50, 0.01, 0.05, 200)),
    "scifar": (MULTIRES, _row(10, 256, "layer", False, 0.25, 50, 0.0045, 0.01, 250)),
    "pathfinder": (S4, _row(6, 256, "batch", True, 0.0, 64, 0.004, 0.03, 200)),
    "pathx": (SGCONV, _row(6, 256, "batch", True, 0.0, 64, 0.004, 0.03, 50)),
    "speech": (S4, _row(6, 128, "batch", True, 0.0, 16, 0.01, 0.05, 40)),
    "tones": (OURS, _row(2, 64, "batch", False, 0.0, 50, 0.01, 0.05, 5)),
    "smnist": (OURS, _row(4, 64, "batch", False, 0.0, 50, 0.01, 0.05, 5)),
    "fashion": (OURS, _row(4, 64, "batch", False, 0.0, 50, 0.01, 0.05, 5)),
}

# Of SGConv, beside the parameters of its kernel.
SGCONV_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "listops": (_row(8, 128, "batch", False, 0.0, 50, 0.01, 0.05, 40), {"taps": 1}),
    "text": (_row(6, 256, "batch", True, 0.0, 16, 0.01, 0.05, 32), {"taps": 2}),
    "retrieval": (_row(6, 256, "batch", True, 0.0, 64, 0.01, 0.05, 20), {"taps": 1}),
    "image": (
        _row(6, 512, "layer", False, 0.2, 50, 0.01, 0.05, 200),
        {"taps": 32, "kernel_args": {"decay": "fixed", "decay_min": 1, "decay_max": 1}},
    ),
    "pathfinder": (_row(6, 256, "batch", True, 0.2, 64, 0.004, 0.03, 200), {"taps": 32}),
    "pathx": (
        _row(6, 256, "batch", True, 0.0, 64, 0.004, 0.03, 50),
        {"taps": 64, "kernel_args": {"init_scale": 1, "start": "cos", "decay_min": 1, "decay_max": 3}},
    ),
}

# Of MultiresConv, which is causal.
MULTIRES_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "listops": (_row(10, 128, "batch", False, 0.1, 50, 0.003, 0.03, 100), {"taps": 4}),
    "scifar": (_row(10, 256, "layer", False, 0.25, 50, 0.0045, 0.01, 250), {"taps": 2}),
}

# Shortest branch of MRConv's kernels, in positions: of the range that the paper sweeps, small for ListOps and larger
# for images, as it says.
MIN_LENGTHS = {"listops": 1, "text": 4, "retrieval": 4}
MIN_LENGTH = 16

# Path-X was learned only with concatenated kernels of a fixed decay, which is SGConv's.
PATHX = {"concat_decay": 2.0}


def preset(task: str, method: str) -> tuple[str, dict[str, Any]]:
    """Returns where the hyperparameters of a task and method come from, and these by the names of the arguments."""
    options: dict[str, Any]
    if method == "sgconv" and task in SGCONV_ROWS:
        source, (row, options) = SGCONV, SGCONV_ROWS[task]
    elif method == "multires" and task in MULTIRES_ROWS:
        source, (row, options) = MULTIRES, MULTIRES_ROWS[task]
    else:
        source, row = GENERAL[task]
        options = {}
        if method in KERNELS and not KERNELS[method].is_single:
            options = {"min_length": MIN_LENGTHS.get(task, MIN_LENGTH), "max_branches": 32}
            options |= PATHX if task == "pathx" else {}
    scale = 1.0 if method in ("multires", "lstm") else KERNEL_LR / row["lr"]
    own = {"kernel_lr_scale": scale, "warmup_epochs": WARM_UP * row["epochs"], "causal": method == "multires"}
    return source, {**row, **own, "options": options}
