"""Runs the experiments on sequences, one call of train_sequences.py a row, and writes their tables.

    python -m experiments.sequences --output results-sequences --groups fashion --fashion-mnist fashion-mnist
    python -m experiments.sequences --output results-sequences --document docs/sequences.md --publish docs/results

The first command adds a line for each row to OUTPUT/sequences.csv; interrupted, the same command goes on. ListOps,
Pathfinder and the tones are made by ``python -m mrconvnext.tasks`` where they are not there. The second one copies the
file and writes the tables between lines such as ``<!-- fashion -->`` and ``<!-- end -->``.
"""

import argparse
import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from safetensors import safe_open

from experiments.report import read_lines, spread
from experiments.run import append, commit, environment, now, times
from mrconvnext.benchmarking.report import with_table
from mrconvnext.training.arguments import positive

ROOT = Path(__file__).parent.parent
SEEDS = range(3)

# A line of the script's log: the form, and its accuracy on the test.
TEST = re.compile(r"^test, (.+?): .*top1 ([\d.]+)", re.MULTILINE)

COLUMNS = (
    *("group", "name", "seed", "status", "test_top1", "deployed_top1", "validation_top1", "train_loss", "parameters"),
    *("steps", "step_ms", "train_s", "hardware", "threads", "jobs", "torch", "timm", "python", "commit", "date"),
    "command",
)

# One recipe for all, small enough for minutes: 800 steps of 50 images of 784 positions, both directions.
FASHION = "--samples 8000 --epochs 5 --no-causal --log-interval 20".split()
METHODS = {
    "MRConv, Fourier": ("--method", "fourier"),
    "MRConv, dilated": ("--method", "dilated"),
    "MRConv, Fourier + sparse": ("--method", "fourier_sparse"),
    "SGConv": ("--method", "sgconv"),
    "MultiresConv": ("--method", "multires"),
    "LSTM, one layer": ("--method", "lstm", "--depth", "1", "--dim", "128"),
}


# Small models, for 20 minutes; the papers' are wider and take many times the steps.
LISTOPS = "--method fourier --dim 32 --depth 4 --samples 64000 --epochs 1 --log-interval 100".split()
PATHFINDER = "--dim 32 --depth 4 --global-batch 32 --samples 100000 --epochs 1 --log-interval 200".split()

# Tests of weights beside that of their own run.
HALF_THE_RATE = {"kept": ("--test-rate", "2", "--keep-kernels"), "resampled": ("--test-rate", "2")}


@dataclass(frozen=True)
class Row:
    """A training run.

    Args:
        group: Table that it belongs to.
        name: Its name there.
        seed: Seed of weights and order.
        task: What it is trained on.
        options: Arguments of the script beside these.
        tests: More tests of its weights, arguments by their names.
    """

    group: str
    name: str
    seed: int
    task: str
    options: tuple[str, ...]
    tests: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def identifier(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in f"{self.group} {self.name} {self.seed}")


def all_rows() -> list[Row]:
    """Returns every row."""
    rows = [
        Row("fashion", name, seed, "fashion", (*method, *FASHION)) for seed in SEEDS for name, method in METHODS.items()
    ]
    tones = (*METHODS["MRConv, Fourier"], "--no-causal")
    rows += [Row("rate", "MRConv, Fourier", seed, "tones", tones, HALF_THE_RATE) for seed in SEEDS]
    options = (*METHODS["MRConv, Fourier + sparse"], *PATHFINDER)
    long = [Row("listops", "MRConv, Fourier", 0, "listops", tuple(LISTOPS))]
    long.append(Row("pathfinder", "MRConv, Fourier + sparse", 0, "pathfinder", options))
    return [*long, *rows]


def main() -> int:
    args = parse_args()
    if args.document:
        write_tables(args.output, args.document, args.publish)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [row for row in all_rows() if not args.groups or row.group in args.groups]
    done = {(line["group"], line["name"], line["seed"]) for line in results(args.output)}
    left = [row for row in rows if (row.group, row.name, str(row.seed)) not in done]
    for row in left:
        data_of(row, args)  # before several rows want the same
    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(lambda row: run(row, args), left):
            for result in found:
                append(args.output / "sequences.csv", result)
                print(f"{result['group']}, {result['name']}, {result['seed']}: {result['test_top1']}", flush=True)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the results, the runs and the data that are made")
    groups = tuple(dict.fromkeys(row.group for row in all_rows()))
    add("--groups", nargs="+", choices=groups, help="tables to run (default: all)")
    fashion = Path("/usr/share/datasets/fashion-mnist")
    add("--fashion-mnist", type=Path, default=fashion, help="folder of its four files (default: %(default)s)")
    add("--jobs", type=positive, default=os.cpu_count() or 1, help="rows at once, each on one thread (default: cores)")
    add("--document", type=Path, help="write the tables of this Markdown file, and run nothing")
    add("--publish", type=Path, help="folder that the results are copied to")
    return parser.parse_args()


def results(folder: Path) -> list[dict[str, str]]:
    """Returns the lines of the results so far."""
    file = folder / "sequences.csv"
    return read_lines(file) if file.is_file() else []


def run(row: Row, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs a row, which goes on where it was interrupted, and returns its result and those of its further tests."""
    folder = (args.output / "runs" / row.identifier).resolve()
    folder.parent.mkdir(exist_ok=True)
    data = str(data_of(row, args))
    options = ["--task", row.task, *row.options, "--seed", str(row.seed)]
    script(args, *options, "--data-dir", data, "--output", str(folder), "--resume", "auto")
    result = {**dict.fromkeys(COLUMNS, ""), "group": row.group, "name": row.name, "seed": row.seed, "status": "done"}
    result |= {**environment(), "threads": threads(args), "jobs": args.jobs, "commit": commit(), "date": now()}
    result |= measured(folder) | {"command": shlex.join(["python", "train_sequences.py", *options])}
    found = [result]
    if row.task == "listops":
        found.append({**result, **majority(Path(data)), "name": "most frequent answer"})
    for name, more in row.tests.items():
        log = script(args, "--data-dir", data, "--output", str(folder), "--evaluate", *more)
        own = {f"{form}_top1": round(float(top1), 2) for form, top1 in TEST.findall(log)}
        tested = {"test_top1": own["as trained_top1"], "deployed_top1": own["deployed_top1"], "validation_top1": ""}
        command = f"{result['command']} && " + shlex.join(["python", "train_sequences.py", "--evaluate", *more])
        found.append({**result, **tested, "name": f"{row.name}, {name}", "command": command})
    return found


def majority(data: Path) -> dict[str, Any]:
    """Returns what is measured by always giving ListOps' most frequent answer in training."""
    train, _, test = (
        Counter(line.split("\t")[1] for line in (data / f"basic_{split}.tsv").read_text().splitlines()[1:])
        for split in ("train", "val", "test")
    )
    right = test[train.most_common(1)[0][0]] / sum(test.values())
    nothing = dict.fromkeys(("deployed_top1", "validation_top1", "train_loss", "step_ms"), "")
    return {**nothing, "test_top1": round(100 * right, 2), "parameters": 0, "steps": 0, "train_s": 0}


def script(args: argparse.Namespace, *words: str) -> str:
    """Returns what a run of the script printed, to a log beside its folder."""
    log = Path(words[words.index("--output") + 1] + ".log")
    log.touch()
    before = log.stat().st_size
    with open(log, "a") as file:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads(args))}
        subprocess.run([sys.executable, "train_sequences.py", *words], cwd=ROOT, env=env, stdout=file, check=True)
    return log.read_text()[before:]


def threads(args: argparse.Namespace) -> int:
    return max(1, (os.cpu_count() or 1) // args.jobs)


def data_of(row: Row, args: argparse.Namespace) -> Path:
    """Returns the folder of a row's data, made if they are not there and can be."""
    if row.task == "fashion":
        return args.fashion_mnist.resolve()
    own = (args.output / "data" / row.task).resolve()
    if not own.is_dir():
        subprocess.run([sys.executable, "-m", "mrconvnext.tasks", row.task, str(own)], cwd=ROOT, check=True)
    return own


def measured(folder: Path) -> dict[str, Any]:
    """Returns what a run that came to its end measured: the test of its best epoch, and the time of its steps."""
    test = json.loads((folder / "test.json").read_text())
    with open(folder / "summary.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    with safe_open(folder / "best.safetensors", "pt") as opened:
        best = json.loads(opened.metadata()["state"])
    with safe_open(folder / "last.safetensors", "pt") as opened:
        shapes = [opened.get_slice(name).get_shape() for name in opened.keys() if name.endswith(".exp_avg")]
    step_ms, steps = times(Path(f"{folder}.log").read_text())
    return {
        "test_top1": round(test["as trained"]["top1"], 2),
        "deployed_top1": round(test["deployed"]["top1"], 2) if "deployed" in test else "",
        "validation_top1": round(best["top1"], 2),
        "train_loss": round(float(epochs[-1]["train_loss"]), 4),
        "parameters": sum(math.prod(shape) for shape in shapes),
        "steps": steps * len(epochs),
        "step_ms": round(step_ms, 1),
        "train_s": round(step_ms * steps * len(epochs) / 1000, 1),
    }


# Tables


def write_tables(folder: Path, document: Path, publish: Optional[Path]) -> None:
    """Writes the tables of a document from the results in a folder, and copies these."""
    lines, text = results(folder), document.read_text()
    for group in dict.fromkeys(row.group for row in all_rows()):
        text = with_table(text, group, "\n".join(table(group, lines)))
    document.write_text(text)
    if publish:
        shutil.copy(folder / "sequences.csv", publish / "sequences.csv")


def table(group: str, lines: list[dict[str, str]]) -> Iterator[str]:
    """Yields the lines of a group's table."""
    yield "| model | seeds | test, % | at each seed | deployed, % | parameters | steps | minutes |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    own = [line for line in lines if line["group"] == group]
    for name in dict.fromkeys(line["name"] for line in own):
        rows = [line for line in own if line["name"] == name]
        deployed = [float(line["deployed_top1"]) for line in rows if line["deployed_top1"]]
        tests = [float(line["test_top1"]) for line in sorted(rows, key=lambda line: int(line["seed"]))]
        cells = [name, str(len(rows)), spread(tests, ".2f"), ", ".join(f"{top1:.1f}" for top1 in tests)]
        cells += [spread(deployed, ".2f"), f"{int(rows[0]['parameters']):,}", rows[0]["steps"]]
        cells += [spread([float(line["train_s"]) / 60 for line in rows], ".1f")]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
