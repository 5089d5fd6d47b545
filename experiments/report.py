"""Writes the tables of docs/results.md from the CSVs of the experiments, and the pictures beside it.

    python -m experiments.report --results docs/results --document docs/results.md
    python -m experiments.report --results results --document docs/results.md --publish docs/results

The second form also copies the CSVs and makes the pictures, for which it needs the runs' weights. Tables stand between
lines such as ``<!-- main -->`` and ``<!-- end -->``; whatever is there is replaced.
"""

import argparse
import csv
import re
import shutil
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid

from experiments.rows import Row, all_rows
from mrconvnext.plots import plot_alpha_norms, plot_kernels, plot_receptive_fields

# What the rows of a table are compared to, seed by seed: a group and a name.
BASELINES = {
    "changes": ("main", "local taps, parseval"),
    "equal time": ("main", "ConvNeXt"),
    "pathfinder 32, 6 passes": ("pathfinder 32", "local taps, parseval"),
    "pathfinder 48, 2 passes": ("pathfinder 48, from 32", "local taps, parseval"),
}

# Tables of other kinds.
NORMS = re.compile(r"(\w+) less (\w+)")
STATISTICS = "statistics of parseval"

BEST = "best.safetensors"  # weights of a run

HEADER = (
    *("model", "seeds", "top-1, %", "less {baseline}", "held-out loss", "parameters", "steps", "s / epoch"),
    "deployed, images/s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--results",
        type=Path,
        required=True,
        help="folder with results.csv, norms.csv, speed/, and with runs/ for pictures",
    )
    add("--document", type=Path, required=True, help="Markdown file whose tables are written")
    add("--publish", type=Path, help="folder for pictures and copies of the CSVs (default: neither)")
    args = parser.parse_args()
    files = [args.results / "results.csv", args.results / "norms.csv"]
    for name, path in (("--results", files[0]), ("--results", files[1]), ("--document", args.document)):
        if not path.is_file():
            parser.error(f"{name}: {path} is missing")
    results, norms = map(read_lines, files)
    text = with_tables(args.document.read_text(), results, read_speeds(args.results / "speed"), norms)
    args.document.write_text(text)
    if args.publish:
        for path in (*files, *(args.results / "speed").rglob("*.csv")):
            copy = args.publish / path.relative_to(args.results)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        write_pictures(args.results, args.publish)


# Tables


FORM_OF_MODE = {"training": "training form", "running": "deployed"}  # of an MRConvNeXt, in benchmark_throughput.py
Speeds = dict[tuple[str, int, int, str], float]
Lines = list[dict[str, str]]  # of a CSV


def read_lines(path: Path) -> Lines:
    """Returns the lines of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_speeds(folder: Path) -> Speeds:
    """Returns images/s by model, side of the images, batch and mode, as experiments.speed measured them."""
    speeds = {}
    for path in folder.rglob("*.csv"):
        for line in read_lines(path):
            mode = "training" if line["mode"] == "training step" else "running"
            if line["images_per_s"] and line["form"] in ("default", FORM_OF_MODE[mode]):
                key = (line["model"], int(line["img_size"]), int(line["batch_size"]), mode)
                speeds[key] = float(line["images_per_s"])
    return speeds


def with_tables(text: str, results: Lines, speeds: Speeds, norms: Lines) -> str:
    """Returns a document with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if two := NORMS.fullmatch(name):
            own = norm_table(two[1], two[2], results)
        elif name == STATISTICS:
            own = statistics_table(norms)
        else:
            own = table(name, results, speeds)
        return f"<!-- {name} -->\n{own}\n<!-- end -->"

    return re.sub(r"<!-- (?!end -->)(.+?) -->(?s:.*?)<!-- end -->", made, text)


def norm_table(norm: str, baseline: str, results: Lines) -> str:
    """Returns the table of what two norms of the branches differ by, for groups that train both on the same images."""
    lines = [f"| table | seeds | {norm} less {baseline} | at each seed |", "| --- | --- | --- | --- |"]
    accuracies, rows = accuracies_of(results), first_rows()
    for (group, name), row in rows.items():
        other = rows.get((group, f"local taps, {baseline}"))
        if name == f"local taps, {norm}" and other and other.data == row.data and not group.startswith("before"):
            own, others = accuracies[group, name], accuracies[group, other.name]
            if differences := [own[seed] - others[seed] for seed in sorted(own, key=int) if seed in others]:
                each = ", ".join(format(value, "+.2f") for value in differences)
                lines.append(f"| {group} | {len(differences)} | {spread(differences, '+.2f')} | {each} |")
    return "\n".join(lines)


def statistics_table(norms: Lines) -> str:
    """Returns the table of what experiments.norms found, over all layers and branches of a group."""
    lines = [
        "| table | layers and branches | variance, median channel | variance, 10th to 90th percentile | mean, up to |"
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for group in dict.fromkeys(line["group"] for line in norms):
        own = [line for line in norms if line["group"] == group]
        least, *medians, largest = (
            extreme(float(line[f"variance_{share}"]) for line in own)
            for extreme, share in ((min, 10), (min, 50), (max, 50), (max, 90))
        )
        shift = max(float(line["mean_90"]) for line in own)
        centre = " … ".join(format(value, ".2f") for value in medians)
        lines.append(f"| {group} | {len(own)} | {centre} | {least:.2f} … {largest:.2f} | {shift:.2f} |")
    return "\n".join(lines)


def accuracies_of(results: Lines) -> dict[tuple[str, str], dict[str, float]]:
    """Returns the accuracies by group and name, then by seed."""
    accuracies: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for line in results:
        if line["status"] == "done":
            accuracies[line["group"], line["name"]][line["seed"]] = float(line["top1"])
    return accuracies


def table(group: str, results: Lines, speeds: Speeds) -> str:
    """Returns a group's table in Markdown: accuracies, and differences to the baseline, its first line, seed by seed.

    Columns of which nothing is known are left out.
    """
    accuracies = accuracies_of(results)
    baseline = BASELINES.get(group, (group, "ConvNeXt"))
    shown = {key: row for key, row in first_rows().items() if key[0] == group or key == baseline}
    lines = []
    for key, row in sorted(shown.items(), key=lambda item: item[0] != baseline):
        own_lines = [line for line in results if (line["group"], line["name"]) == key]
        done = [line for line in own_lines if line["status"] == "done"]
        if not own_lines:
            continue
        own, other = accuracies[key], accuracies[baseline]
        differences = [own[seed] - other[seed] for seed in own if seed in other]
        failed = len(own_lines) - len(done)
        cells = [
            key[1],
            f"{len(done)}" + (f" ({failed} failed)" if failed else ""),
            spread(list(own.values()), ".2f"),
            "" if key == baseline else spread(differences, "+.2f"),
            spread([float(line["loss"]) for line in done], ".3f"),
            f"{int(done[0]['parameters']):,}" if done else "",
            done[0]["steps"] if done else "",
            *(times(row, int(done[0]["steps"]), speeds) if done else ("", "")),
        ]
        lines.append(cells)
    columns = [i for i, name in enumerate(HEADER) if i == 0 or any(cells[i] for cells in lines)]
    lines = [[name.format(baseline=baseline[1]) for name in HEADER], ["---"] * len(HEADER), *lines]
    return "\n".join(f"| {' | '.join(cells[i] for i in columns)} |" for cells in lines)


def first_rows() -> dict[tuple[str, str], Row]:
    """Returns the row of the first seed, by group and name, in their order."""
    found: dict[tuple[str, str], Row] = {}
    for row in all_rows():
        found.setdefault((row.group, row.name), row)
    return found


def times(row: Row, steps: int, speeds: Speeds) -> tuple[str, str]:
    """Returns the seconds of an epoch and the images/s of the deployed form, where they have been measured."""
    args = row.arguments
    training, running = (
        speeds.get((row.spec, args.img_size, args.global_batch, form)) for form in ("training", "running")
    )
    images = steps / args.epochs * args.global_batch
    return f"{images / training:.0f}" if training else "", f"{running:.0f}" if running else ""


def spread(values: list[float], form: str) -> str:
    """Returns mean ± standard deviation of a sample."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.replace('+', ''))}"


# Pictures


def write_pictures(results: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for group in ("main", "pathfinder 32", "pathfinder 48, from 32"):
        rows = {name: row for (own, name), row in first_rows().items() if own == group}
        there = {name for name, row in rows.items() if (results / "runs" / row.identifier / BEST).is_file()}
        models = {name: load(row, results) for name, row in rows.items() if name in there}
        if not models:
            continue
        name, first = group.replace(",", "").replace(" ", "-"), rows["ConvNeXt"]
        images = held_out(results / "data" / first.data, first.arguments.img_size)
        plot_receptive_fields(models, images).savefig(folder / f"{name}-receptive-fields.png", dpi=110)
        if group != "main":
            examples(results / "data" / first.data).save(folder / f"{name}-examples.png")
        if (model := models.get("local taps, parseval")) is not None:
            plot_alpha_norms(model).savefig(folder / f"{name}-alpha.png", dpi=110)
            plot_kernels(model).savefig(folder / f"{name}-kernels.png", dpi=90)


def load(row: Row, results: Path) -> Any:
    """Returns the best model of a row in eval mode."""
    folder, args = results / "runs" / row.identifier, row.arguments
    if (folder / "trained").is_dir():
        return timm.create_model(f"local-dir:{folder / 'trained'}", pretrained=True).eval()
    classes = len(ImageFolder(str(results / "data" / row.data / "validation")).classes)
    options = {**args.model_kwargs, "num_classes": classes, "checkpoint_path": str(folder / BEST)}
    return timm.create_model(args.model, **options).eval()


def examples(folder: Path, count: int = 10, scale: int = 2) -> Image.Image:
    """Returns held-out images of each class, a line each."""
    files = [file for own in sorted((folder / "validation").iterdir()) for file in sorted(own.iterdir())[:count]]
    grid = to_pil_image(make_grid([to_tensor(Image.open(file)) for file in files], nrow=count, pad_value=0.5))
    return grid.resize((scale * grid.width, scale * grid.height), Image.Resampling.NEAREST)


def held_out(folder: Path, size: int, count: int = 64) -> torch.Tensor:
    """Returns held-out images (B, 3, size, size), normalized as the models take them."""
    images = ImageFolder(str(folder / "validation"))
    own = [images[i * len(images) // count][0].resize((size, size)) for i in range(count)]
    mean = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN)[:, None, None]
    std = torch.tensor(timm.data.IMAGENET_DEFAULT_STD)[:, None, None]
    return (torch.stack([to_tensor(image) for image in own]) - mean) / std


if __name__ == "__main__":
    main()
