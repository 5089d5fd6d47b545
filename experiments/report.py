"""Writes the tables of docs/results.md and README.md from the CSVs of the experiments, and the pictures beside them.

    python -m experiments.report --results docs/results
    python -m experiments.report --results results --publish docs

The second form also copies the CSVs and makes the pictures, for which it needs the runs' weights. Tables stand between
lines such as ``<!-- main -->`` and ``<!-- end -->``; whatever is there is replaced.
"""

import argparse
import csv
import re
import shlex
import shutil
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from scipy import stats
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid

from experiments.overview import plot_overview
from experiments.rows import Row, all_rows
from experiments.run import in_waves
from mrconvnext.plots import plot_alpha_norms, plot_kernels, plot_receptive_fields

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")

# What the rows of a table are compared to, seed by seed, if not to the local kernels in it: a group and a name.
BASELINES = {
    "changes": ("main", "local taps, kernel"),
    "equal time": ("two passes", "ConvNeXt"),
}

# What is compared in short: what was trained, and the group of the network with global kernels.
COMPARED = (
    ("Fashion-MNIST at 16 px, one pass, equal steps", "main"),
    ("Fashion-MNIST at 16 px, two passes, equal steps", "two passes"),
    ("the same, about equal training time", "equal time"),
    ("fine-tuning on other classes of Fashion-MNIST", "fine-tuning"),
    ("are two discs joined by a curve? drawings of 32 px", "drawings 32"),
    ("the same models going on at 64 px", "drawings 64, 2 passes"),
    ("EfficientNet-Lite0 from ImageNet on solar cells, 300 px, equal steps", "solar"),
    ("the same, about equal training time", "solar, equal time"),
    ("EfficientNet-Lite0 from ImageNet on emoji, 64 px, equal steps", "emoji"),
    ("the same, about equal training time", "emoji, equal time"),
)

# Those that README shows, all of five seeds: what can be run in an evening.
IN_README = ("two passes", "equal time", "fine-tuning", "drawings 32")

# The names of the networks with local kernels alone, and of those with global ones.
LOCAL = ("ConvNeXt", "EfficientNet-Lite0")
GLOBAL = ("local taps, kernel", "global kernels")

NORM = re.compile(r"(\w+) less (\w+)")

# Forms that training steps are measured in, and how their seconds are written.
FORMS = {"default": "{:.0f}", "training form": "{:.0f}", "fused blocks": "({:.0f} with our blocks)"}

BEST = "best.safetensors"  # weights of a run

HEADER = (
    *("model", "seeds", "test, %", "less {baseline}", "training, s", "at each seed", "validation, %", "parameters"),
    "steps",
)
CONFIDENCE = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, required=True, help="folder with results.csv, speed/, and with runs/ for pictures")
    add("--publish", type=Path, help="folder for the pictures, and for copies of the CSVs in results/ (default: none)")
    args = parser.parse_args()
    file = args.results / "results.csv"
    if not file.is_file():
        parser.error(f"--results: {file} is missing")
    results, speeds = read_lines(file), read_speeds(args.results / "speed")
    texts = {document: document.read_text() for document in DOCUMENTS}
    if missing := {name for text in texts.values() for name in tables_of(text)} - {line["group"] for line in results}:
        parser.error(f"--results: {file} has no rows of the documents' tables {', '.join(sorted(missing))}")
    for document, text in texts.items():
        document.write_text(with_tables(text, results, speeds))
    if args.publish:
        for path in (file, *(args.results / "speed").rglob("*.csv")):
            copy = args.publish / "results" / path.relative_to(args.results)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        write_pictures(args.results, args.publish)


# Tables


Speeds = dict[tuple[str, str, int, int], float]
Lines = list[dict[str, str]]  # of a CSV


def read_lines(path: Path) -> Lines:
    """Returns the lines of a CSV."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_speeds(folder: Path) -> Speeds:
    """Returns images/s in training by model, form, side of the images and batch, as experiments.speed measured them."""
    lines = [line for path in folder.rglob("benchmark.csv") for line in read_lines(path)]
    return {
        (line["model"], line["form"], int(line["img_size"]), int(line["batch_size"])): float(line["images_per_s"])
        for line in lines
        if line["images_per_s"] and line["form"] in FORMS
    }


def tables_of(text: str) -> set[str]:
    """Returns the groups of rows that a document has tables of."""
    return {row.group for row in all_rows()} & set(re.findall(r"<!-- (.+?) -->", text))


def with_tables(text: str, results: Lines, speeds: Speeds) -> str:
    """Returns a document with its tables of results made anew."""
    groups = tables_of(text)

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name == "compared":
            own = compared_table([group for _, group in COMPARED], results)
        elif name == "compared in README":
            own = f"{compared_table(IN_README, results)}\n\n{command(IN_README, results)}"
        elif two := NORM.fullmatch(name):
            own = norm_table(two[1], two[2], results)
        elif name in groups:
            own = table(name, results, speeds)
        else:
            return match[0]  # another program's
        return f"<!-- {name} -->\n{own}\n<!-- end -->"

    return re.sub(r"<!-- (?!end -->)(.+?) -->(?s:.*?)<!-- end -->", made, text)


def compared_table(groups: Sequence[str], results: Lines) -> str:
    """Returns the table of what global kernels give, a line for each group that has both kinds of networks at two seeds
    or more."""
    lines = ["| | seeds | local kernels | global kernels | difference |", "| --- | --- | --- | --- | --- |"]
    accuracies = accuracies_of(results)
    for words, group in COMPARED:
        name = next(own for own in GLOBAL if (group, own) in first_rows())
        own, others = accuracies[group, name], accuracies[baseline_of(group)]
        both = own.keys() & others.keys()
        if group in groups and len(both) >= 2:
            means = (statistics.mean(values[seed] for seed in both) for values in (others, own))
            cells = [words, str(len(both)), *(f"{mean:.2f}" for mean in means), interval(paired(own, others))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def command(groups: Sequence[str], results: Lines) -> str:
    """Returns the command that runs groups, and the hours that they and the rows that they start from have taken."""
    needed = {row.identifier for row in sum(in_waves([row for row in all_rows() if row.group in groups]), [])}
    taken = [float(line["wall_s"]) / int(line["jobs"]) for line in results if line["identifier"] in needed]
    return (
        f"```\npython -m experiments.run --output results --groups {shlex.join(groups)} \\\n"
        f"    --fashion-mnist FOLDER    # {sum(taken) / 3600:.1f} hours on two cores\n```"
    )


def norm_table(norm: str, baseline: str, results: Lines) -> str:
    """Returns the table of what two norms of the branches differ by on validation images, on which one is chosen."""
    lines = [f"| table | seeds | {norm} less {baseline} | at each seed |", "| --- | --- | --- | --- |"]
    accuracies = accuracies_of(results, column="top1")
    for group in dict.fromkeys(group for group, _ in first_rows()):
        differences = paired(*(accuracies[group, f"local taps, {own}"] for own in (norm, baseline)))
        if differences:
            lines.append(f"| {group} | {len(differences)} | {interval(differences)} | {each(differences)} |")
    return "\n".join(lines)


def accuracies_of(results: Lines, column: str = "test_top1") -> dict[tuple[str, str], dict[str, float]]:
    """Returns the accuracies of a column by group and name, then by seed."""
    accuracies: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for line in results:
        if line["status"] == "done":
            accuracies[line["group"], line["name"]][line["seed"]] = float(line[column])
    return accuracies


def paired(own: dict[str, float], others: dict[str, float]) -> list[float]:
    """Returns the differences of accuracies at the seeds that both have, in order."""
    return [own[seed] - others[seed] for seed in sorted(own, key=int) if seed in others]


def table(group: str, results: Lines, speeds: Speeds) -> str:
    """Returns a group's table in Markdown: accuracies, and differences to the baseline, its first line, seed by seed.

    Columns of which nothing is known are left out.
    """
    accuracies = accuracies_of(results)
    baseline = baseline_of(group)
    shown = {key: row for key, row in first_rows().items() if key[0] == group or key == baseline}
    lines = []
    for key, row in sorted(shown.items(), key=lambda item: item[0] != baseline):
        own_lines = [line for line in results if (line["group"], line["name"]) == key]
        done = [line for line in own_lines if line["status"] == "done"]
        if not own_lines:
            continue
        differences = [] if key == baseline else paired(accuracies[key], accuracies[baseline])
        failed = len(own_lines) - len(done)
        cells = [
            key[1],
            f"{len(done)}" + (f" ({failed} failed)" if failed else ""),
            spread(list(accuracies[key].values()), ".2f"),
            interval(differences),
            seconds(row, int(done[0]["steps"]), speeds) if done else "",
            each(differences),
            spread([float(line["top1"]) for line in done], ".2f"),
            f"{int(done[0]['parameters']):,}" if done else "",
            done[0]["steps"] if done else "",
        ]
        lines.append(cells)
    columns = [i for i, name in enumerate(HEADER) if i == 0 or any(cells[i] for cells in lines)]
    lines = [[name.format(baseline=baseline[1]) for name in HEADER], ["---"] * len(HEADER), *lines]
    return "\n".join(f"| {' | '.join(cells[i] for i in columns)} |" for cells in lines)


def baseline_of(group: str) -> tuple[str, str]:
    """Returns the group and the name that a group's rows are compared to."""
    own = group.removesuffix(", equal time")
    return BASELINES.get(group) or next((own, name) for name in LOCAL if (own, name) in first_rows())


def first_rows() -> dict[tuple[str, str], Row]:
    """Returns the row of the first seed, by group and name, in their order."""
    found: dict[tuple[str, str], Row] = {}
    for row in all_rows():
        found.setdefault((row.group, row.name), row)
    return found


def seconds(row: Row, steps: int, speeds: Speeds) -> str:
    """Returns the seconds of a row's training steps, where their speed has been measured; a ConvNeXt's also with the
    blocks of this package."""
    args = row.arguments
    images = steps * args.global_batch
    found = {form: speeds.get((row.spec, form, args.img_size, args.global_batch)) for form in FORMS}
    return " ".join(FORMS[form].format(images / speed) for form, speed in found.items() if speed)


def spread(values: list[float], form: str) -> str:
    """Returns mean ± standard deviation of a sample."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.replace('+', ''))}"


def interval(values: list[float]) -> str:
    """Returns a mean with the confidence interval that Student's t gives it, the mean alone of a single value."""
    if len(values) < 2:
        return "".join(format(value, "+.2f") for value in values)
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half = error * stats.t.ppf((1 + CONFIDENCE) / 2, df=len(values) - 1)
    return f"{mean:+.2f} ({mean - half:+.2f} … {mean + half:+.2f})"


def each(values: list[float]) -> str:
    return ", ".join(format(value, "+.2f") for value in values)


# Pictures


def write_pictures(results: Path, folder: Path) -> None:
    """Draws what models of the first seed have learned and see, and the picture of README."""
    for group in ("main", "drawings 32"):
        rows = {name: row for (own, name), row in first_rows().items() if own == group}
        models = {
            name: load(row, results)
            for name, row in rows.items()
            if (results / "runs" / row.identifier / BEST).is_file()
        }
        if len(models) < len(rows):
            continue
        name, first = group.replace(" ", "-"), rows["ConvNeXt"]
        images = held_out(results / "data" / first.data, first.arguments.img_size)
        own = folder / "results"
        plot_receptive_fields(models, images).savefig(own / f"{name}-receptive-fields.png", dpi=110)
        if group != "main":
            examples(results / "data" / first.data).save(own / f"{name}-examples.png")
        model = models["local taps, kernel"]
        plot_alpha_norms(model).savefig(own / f"{name}-alpha.png", dpi=110)
        plot_kernels(model).savefig(own / f"{name}-kernels.png", dpi=90)
        if group == "main":
            plot_overview(model, models["ConvNeXt"], images).savefig(folder / "overview.png", dpi=110)


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
