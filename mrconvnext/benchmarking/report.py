"""What comes out of the rows: columns, files, a table and pictures."""

import argparse
import csv
import datetime
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any, Optional

import torch

import mrconvnext

from .environment import processor, versions
from .rows import Row, reference_of

# The columns on the screen; the files have more.
SHOWN = (
    *("model", "form", "batch_size", "img_size", "images_per_s", "ms", "ratio", "first_ms"),
    *("parameters", "gflops", "memory_mib", "memory_ratio", "error", "note"),
)


def describe_environment(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the numbers depend on, for every file that holds them."""
    script, *options = args.command
    return {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "threads": args.threads,
        "mode": "training step" if args.train else "forward pass",
        "dtype": f"{args.amp_dtype} autocast" if args.amp_dtype else "float32",
        "channels_last": args.channels_last,
        "compile": args.compile,
        "rounds": args.rounds,
        "mrconvnext": mrconvnext.__version__,
        **versions(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", Path(script).name, *options]),
    }


# Columns


def summary(rows: list[Row], reference: Optional[str]) -> list[dict[str, Any]]:
    """Returns the columns of every row; None is what does not apply or was not measured.

    Args:
        rows: The rows.
        reference: The model that ratios are to. Default: the ConvNeXt of each one's size.
    """
    references: dict[tuple, Row] = {}
    for row in rows:
        references.setdefault((row.model, row.batch_size, row.img_size), row)  # the first form of a model
    keys = [(reference_of(row.model, reference), row.batch_size, row.img_size) for row in rows]
    return [columns(row, references.get(key)) for row, key in zip(rows, keys)]


def columns(row: Row, reference: Optional[Row]) -> dict[str, Any]:
    """Returns a row's columns; its ratios are taken round by round to the reference."""
    line = {name: getattr(row, name) for name in ("model", "form", "batch_size", "img_size")}
    line["images_per_s"] = 1000 * row.batch_size / statistics.median(row.ms) if row.ms else None
    times, memories = (reference.ms, reference.memory_mib) if reference else ([], [])
    line |= spread("ms", row.ms)
    line |= spread("ratio", [theirs / ours for ours, theirs in zip(row.ms, times)])
    line |= spread("memory_mib", row.memory_mib)
    line |= spread("memory_ratio", [ours / theirs for ours, theirs in zip(row.memory_mib, memories) if theirs > 0])
    rest = ("first_ms", "parameters", "gflops", "gflops_per_pass", "error", "note")
    return line | {name: getattr(row, name) for name in rest}


def spread(name: str, values: list[float]) -> dict[str, Optional[float]]:
    """Returns the median of the rounds or processes, the least and the largest value as columns."""
    if not values:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


# Files


def save(rows: list[Row], environment: dict[str, Any], args: argparse.Namespace) -> None:
    """Writes all there is so far to benchmark.csv and benchmark.json; the latter has the times of every round."""
    table = summary(rows, args.reference)
    with open(args.output / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*table[0], *environment])
        writer.writeheader()
        writer.writerows({**line, **environment} for line in table)
    full = [{**line, "rounds_ms": row.ms, "processes_mib": row.memory_mib} for line, row in zip(table, rows)]
    (args.output / "benchmark.json").write_text(json.dumps({"environment": environment, "rows": full}, indent=1))


def save_plots(table: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Draws the rows that were measured."""
    lines = [line for line in table if line["ms"] is not None]
    if not lines:
        return
    from .plots import plot_accuracy, plot_throughput, plot_time_per_pixel  # matplotlib is not needed for the rest

    plot_throughput(lines).savefig(args.output / "throughput.png", dpi=120)
    if len(args.img_sizes) > 1:
        plot_time_per_pixel(lines).savefig(args.output / "time_per_pixel.png", dpi=120)
    known = [{**line, "top1": args.accuracies[line["model"]]} for line in lines if line["model"] in args.accuracies]
    if known:
        plot_accuracy(known).savefig(args.output / "accuracy.png", dpi=120)


# Text


def as_text(table: list[dict[str, Any]]) -> str:
    """Returns the rows as text, each median with its spread; a blank is what does not apply or was not measured."""
    cells = [list(SHOWN), *([cell(line, name) for name in SHOWN] for line in table)]
    widths = [max(len(text) for text in column) for column in zip(*cells)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells)


def cell(line: dict[str, Any], name: str) -> str:
    """Returns a column of a row as text, with its spread in brackets if it has one."""
    text, *ends = (written(line[key]) for key in (name, f"{name}_min", f"{name}_max") if key in line)
    return f"{text} ({' … '.join(ends)})" if len(set(ends)) > 1 else text


def written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def with_table(text: str, name: str, table: str) -> str:
    """Returns a document in which what stands between ``<!-- name -->`` and ``<!-- end -->`` is a table.

    Raises:
        ValueError: If there is no such place in it.
    """
    place = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- end -->", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"the document has no place for a table: <!-- {name} --> … <!-- end -->")
    return place.sub(lambda _: f"<!-- {name} -->\n{table}\n<!-- end -->", text)
