"""Pictures of what models cost.

A benchmark's rows are dictionaries with the keys ``model``, ``form``, ``batch_size``, ``img_size`` (height and width in
pixels), ``ms`` (of a pass) and ``images_per_s``.
"""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


def plot_throughput(rows: Rows) -> Figure:
    """Returns a picture of the images per second of every row, a panel for each batch and image size."""
    lines = max(sum(1 + label(row).count("\n") for row in group) for group in groups(rows, "batch_size", "img_size"))
    figure, panels = make_panels(rows, "batch_size", "img_size", height=0.9 + 0.28 * lines)
    for ax, group in panels:
        bars = ax.barh(range(len(group)), [row["images_per_s"] for row in group], color=[colour(row) for row in group])
        ax.bar_label(bars, fmt="{:,.1f}", padding=3, fontsize="x-small")
        ax.set_yticks(range(len(group)), labels=[label(row) for row in group], fontsize="small")
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_xlabel("images/s", fontsize="small")
    return figure


def plot_time_per_pixel(rows: Rows) -> Figure:
    """Returns a picture of the time per pixel over the image size, in ns, a panel for each batch size."""
    figure, panels = make_panels(rows, "batch_size", height=4.2)
    for ax, group in panels:
        for line in groups(group, "model", "form"):
            sizes = [row["img_size"] for row in line]
            times = [1e6 * row["ms"] / (row["batch_size"] * row["img_size"] ** 2) for row in line]
            ax.plot(sizes, times, "-" if is_ours(line[0]) else "--", marker="o", markersize=4, label=label(line[0]))
        ax.set_xscale("log")
        sizes = sorted({row["img_size"] for row in group})
        ax.set_xticks(sizes, labels=[str(size) for size in sizes])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_xlabel("image size in pixels", fontsize="small")
        ax.set_ylabel("ns per pixel", fontsize="small")
        ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_accuracy(rows: Rows) -> Figure:
    """Returns a picture of the rows' ``top1``, in %, over images per second, a panel for each batch and image size."""
    figure, panels = make_panels(rows, "batch_size", "img_size", height=4.2)
    for ax, group in panels:
        for row in group:
            place = (row["images_per_s"], row["top1"])
            ax.plot(*place, "o", color=colour(row))
            ax.annotate(label(row), place, xytext=(0, 6), textcoords="offset points", ha="center", fontsize="x-small")
        ax.margins(0.25)
        ax.set_xlabel("images/s", fontsize="small")
        ax.set_ylabel("top-1 in %", fontsize="small")
    return figure


def groups(rows: Rows, *keys: str) -> list[Rows]:
    """Returns the rows in groups that agree in ``keys``, in the order of each one's first row."""
    found: dict[tuple, Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def make_panels(rows: Rows, *keys: str, height: float) -> tuple[Figure, list[tuple[Axes, Rows]]]:
    """Returns a figure with a panel, ``height`` inches high, for each group of rows, and the panels with their rows."""
    own = groups(rows, *keys)
    figure = Figure(figsize=(9, height * len(own)), layout="constrained")
    axes = figure.subplots(nrows=len(own), squeeze=False)[:, 0]
    names = {"batch_size": "batch {}", "img_size": "{} px"}
    for ax, group in zip(axes, own):
        ax.set_title(", ".join(names[key].format(group[0][key]) for key in keys), fontsize="small")
        ax.tick_params(labelsize="x-small")
    return figure, list(zip(axes, own))


def label(row: dict[str, Any]) -> str:
    """Returns a row's name, in several lines where a model has many options: they would leave no room for the rest."""
    return textwrap.fill(f"{row['model'].replace(':', ': ')} ({row['form']})", width=50)


def is_ours(row: dict[str, Any]) -> bool:
    return row["model"].startswith("mrconvnext")


def colour(row: dict[str, Any]) -> str:
    return "C0" if is_ours(row) else "0.6"
