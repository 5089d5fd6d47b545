"""Writes the tables of documents from the benchmark's CSVs, and what other scripts printed from their files.

    python -m scripts.tables README.md docs/*.md

A table stands between lines such as ``<!-- benchmark/benchmark.csv: model form ms ratio -->``, a path from the
document's folder and columns of that file, and ``<!-- end -->``. Above it stand the command that the file is from, the
hardware and the versions. Cells are as the benchmark prints them. ``<!-- speed -->`` is README's short table.
``<!-- outputs/launches.md -->`` is a file that holds what a script printed; one that ends in .txt becomes a block of
code.
"""

import argparse
import csv
import re
import textwrap
from pathlib import Path
from typing import Any

from mrconvnext.benchmarking.report import cell, with_table

DOCS = Path(__file__).parents[1] / "docs"

TABLE = re.compile(r"<!-- (\S+\.csv): (.+?) -->\n.*?<!-- end -->", re.DOTALL)
OUTPUT = re.compile(r"<!-- (\S+\.(?:md|txt)) -->\n.*?<!-- end -->", re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]\d+)?")

SPEED = "speed"
# Its lines: words, file, batch and form.
SPEEDS = (
    ("deployed, batch 1", "benchmark.csv", "1", "deployed"),
    ("deployed, batch 8", "benchmark.csv", "8", "deployed"),
    ("training form, batch 1", "benchmark.csv", "1", "training form"),
    ("a training step, batch 16", "benchmark-training.csv", "16", "training form"),
)
MODEL = "mrconvnext_tiny"

HEADERS = {"batch_size": "batch", "img_size": "px", "gflops": "GFLOPs"}
HEADERS |= {"memory_mib": "peak MiB", "memory_ratio": "peak, ratio"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+", help="Markdown files")
    for document in parser.parse_args().documents:
        document.write_text(with_tables(document))


def with_tables(document: Path) -> str:
    """Returns the text of a document with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        path, columns = match.groups()
        return f"<!-- {path}: {columns} -->\n{block(document.parent, path, columns.split())}\n<!-- end -->"

    def printed(match: re.Match[str]) -> str:
        path = document.parent / match[1]
        fence = "```\n" if path.suffix == ".txt" else ""
        return f"<!-- {match[1]} -->\n{fence}{path.read_text().strip()}\n{fence}<!-- end -->"

    text = OUTPUT.sub(printed, TABLE.sub(made, document.read_text()))
    if f"<!-- {SPEED} -->" in text:
        text = with_table(text, SPEED, speed_table(DOCS / "benchmark"))
    return text


def speed_table(folder: Path) -> str:
    """Returns how fast the tiny model is, over timm's ConvNeXt and over the one with this package's blocks."""
    lines = [f"| {MODEL}, 224 px | of timm's ConvNeXt | of ConvNeXt with these blocks, by the medians |"]
    lines.append("| --- | --- | --- |")
    for words, file, batch, form in SPEEDS:
        rows = [numbers(line) for line in read(folder / file) if line["batch_size"] == batch]
        own = next(row for row in rows if (row["model"], row["form"]) == (MODEL, form))
        blocks = next(row for row in rows if row["form"] == "fused blocks")
        lines.append(f"| {words} | {cell(own, 'ratio')} | {blocks['ms'] / own['ms']:.3g} |")
    first = read(folder / SPEEDS[0][1])[0]
    commands = dict.fromkeys(read(folder / file)[0]["command"] for _, file, *_ in SPEEDS)
    return "\n".join([*lines, "", f"{origin(first)}.", "", code(*commands)])


def read(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def block(folder: Path, path: str, columns: list[str]) -> str:
    """Returns the command of a file, what it was run with, and its table."""
    lines = read(folder / path)
    first = lines[0]
    cells = [[HEADERS.get(name, name) for name in columns], ["---"] * len(columns)]
    cells += [[cell(numbers(line), name) for name in columns] for line in lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return f"{code(first['command'])}\n\n{origin(first)};\n[all columns]({path})\n\n{table}"


def code(*commands: str) -> str:
    """Returns commands as a block of code, their lines broken where they are long."""
    wrapped = (textwrap.wrap(own, 116, subsequent_indent="    ", break_on_hyphens=False) for own in commands)
    return "\n".join(["```", *(" \\\n".join(own) for own in wrapped), "```"])


def origin(line: dict[str, str]) -> str:
    """Returns what a line of a file was measured on."""
    threads = "1 thread" if line["threads"] == "1" else f"{line['threads']} threads"
    machine = f"{line['hardware']}, {threads}, {line['dtype']}"
    return f"{machine}, torch {line['torch']}, timm {line['timm']}, {line['date'][:10]}"


def numbers(line: dict[str, str]) -> dict[str, Any]:
    """Returns a line with the numbers of its columns that hold such."""
    return {name: float(text) if NUMBER.fullmatch(text) else text for name, text in line.items()}


if __name__ == "__main__":
    main()
