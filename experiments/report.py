"""Writes the tables of docs/results.md from the CSVs of the experiments, and the pictures beside it.

    python -m experiments.report --results docs/results --document docs/results.md
    python -m experiments.report --results results --document docs/results.md --pictures docs/results

The second form also makes the pictures, for which it needs the runs' weights. Tables stand between lines such as
``<!-- main -->`` and ``<!-- end -->``; whatever is there is replaced.
"""

import argparse
import csv
import re
import statistics
from collections import defaultdict
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from experiments.rows import Row, all_rows
from mrconvnext.plots import plot_alpha_norms, plot_kernels, plot_receptive_fields

# What the rows of a table are compared to, seed by seed: a group and a name.
BASELINES = {"changes": ("main", "local taps, parseval"), "equal time": ("main", "ConvNeXt")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, required=True, help="folder with results.csv, and with runs/ for pictures")
    add("--document", type=Path, required=True, help="Markdown file whose tables are written")
    add("--pictures", type=Path, help="folder for pictures (default: none are made)")
    args = parser.parse_args()
    with open(args.results / "results.csv", newline="") as file:
        results = list(csv.DictReader(file))
    args.document.write_text(with_tables(args.document.read_text(), results))
    if args.pictures:
        write_pictures(args.results, args.pictures)


# Tables


def with_tables(text: str, results: list[dict[str, str]]) -> str:
    """Returns a document with its tables made anew."""
    for group in re.findall(r"<!-- (?!end)(.+?) -->", text):
        block = f"<!-- {group} -->\n{table(group, results)}\n<!-- end -->"
        text = re.sub(rf"<!-- {re.escape(group)} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.S)
    return text


def table(group: str, results: list[dict[str, str]]) -> str:
    """Returns a group's table in Markdown: accuracies, and differences to the baseline at the same seed."""
    accuracies: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for line in results:
        if line["status"] == "done":
            accuracies[line["group"], line["name"]][line["seed"]] = float(line["top1"])
    baseline = BASELINES.get(group, (group, "ConvNeXt"))
    lines = [
        f"| model | seeds | top-1, % | less {baseline[1]} | held-out loss | parameters | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    order = [row.identifier for row in all_rows()]
    own_lines = [line for line in results if line["group"] == group]
    own_lines.sort(key=lambda line: order.index(line["identifier"]) if line["identifier"] in order else len(order))
    for name in dict.fromkeys(line["name"] for line in own_lines):
        done = [line for line in own_lines if (line["name"], line["status"]) == (name, "done")]
        own, other = accuracies[group, name], accuracies[baseline]
        differences = [own[seed] - other[seed] for seed in own if seed in other]
        is_baseline = (group, name) == baseline
        losses = [float(line["loss"]) for line in done]
        failed = sum((line["name"], line["status"]) == (name, "failed") for line in own_lines)
        cells = [
            name,
            f"{len(done)}" + (f" ({failed} failed)" if failed else ""),
            spread(list(own.values()), ".2f"),
            "" if is_baseline else spread(differences, "+.2f"),
            spread(losses, ".3f"),
            f"{int(done[0]['parameters']):,}" if done else "",
            done[0]["steps"] if done else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Returns mean ± standard deviation of a sample."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.replace('+', ''))}"


# Pictures


def write_pictures(results: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for group, size in (("main", 16), ("pathfinder 64", 64)):
        rows = {row.name: row for row in all_rows() if row.group == group and row.seed == 0}
        models = {
            name: load(row, results) for name, row in rows.items() if (results / "runs" / row.identifier).is_dir()
        }
        if not models:
            continue
        name = group.replace(" ", "-")
        plot_receptive_fields(models, held_out(results / "data" / rows["ConvNeXt"].data, size)).savefig(
            folder / f"{name}-receptive-fields.png", dpi=110
        )
        if (model := models.get("local taps, parseval")) is not None:
            plot_alpha_norms(model).savefig(folder / f"{name}-alpha.png", dpi=110)
            plot_kernels(model).savefig(folder / f"{name}-kernels.png", dpi=90)


def load(row: Row, results: Path) -> nn.Module:
    """Returns the best model of a row in eval mode."""
    folder = results / "runs" / row.identifier
    if (folder / "trained").is_dir():
        return timm.create_model(f"local-dir:{folder / 'trained'}", pretrained=True).eval()
    options = dict(depths=(1, 1, 2, 1), dims=(24, 48, 72, 96), num_classes=len(held_out_classes(results, row)))
    if "patch_size=1" in row.options:
        options["patch_size"] = 1
    return timm.create_model("convnext_atto", checkpoint_path=str(folder / "best.safetensors"), **options).eval()


def held_out_classes(results: Path, row: Row) -> list[str]:
    return ImageFolder(str(results / "data" / row.data / "validation")).classes


def held_out(folder: Path, size: int, count: int = 64) -> torch.Tensor:
    """Returns held-out images (B, 3, size, size), normalized as the models take them."""
    images = ImageFolder(str(folder / "validation"))
    own = [images[i][0].resize((size, size)) for i in range(0, len(images), max(1, len(images) // count))]
    mean = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN)[:, None, None]
    std = torch.tensor(timm.data.IMAGENET_DEFAULT_STD)[:, None, None]
    return (torch.stack([to_tensor(image) for image in own]) - mean) / std


if __name__ == "__main__":
    main()
