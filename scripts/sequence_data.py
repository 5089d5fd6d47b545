"""Generates samples of ListOps and Pathfinder, measures them and writes what comes out beside the published parameters.

    python scripts/sequence_data.py

It writes docs/sequence-data.md and the contact sheet docs/pathfinder.png.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mrconvnext.tasks import listops
from mrconvnext.tasks.paddles import DISTRACTOR_PADDLES, PARAMETERS, TARGET_PADDLES
from mrconvnext.tasks.pathfinder import Pictures, pictures

HEAD = """# The generated data

ListOps and Pathfinder are generated here, with the parameters of Long Range Arena
([Tay et al., 2021](https://arxiv.org/abs/2011.04006)). Measured on samples, seed {seed}; written by

```
{command}
```

"""

PATHFINDER_TEXT = """
## Pathfinder

![Pictures of sides 32, 64 and 128: on the left both markers are on one snake, on the right on two](pathfinder.png)

Sides 32, 64 and 128 from the top; on the left both markers are on one snake, on the right on two. Where two numbers
stand, the first is published, the second measured.

"""

PATHFINDER_NOTES = """
A distractor that finds no place in five trials is left out, as in the published generator. Where ours differs: two
target snakes never cross, and distractors keep away from the last paddles of both, which the published one takes for
free. At side 32 targets are drawn three quarters as bright as distractors, as published.
"""

# Of the contact sheet: pictures in a row of one class, and rows of a side.
COLUMNS, ROWS = 4, 2
SCALES = {32: 4, 64: 2, 128: 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--expressions", type=int, default=20_000, help="of ListOps (default: %(default)s)")
    add("--pictures", type=int, default=5_000, help="of Pathfinder, for each side (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    add("--processes", type=int, default=2, help="that generate ListOps (default: %(default)s)")
    add("--output", type=Path, default=Path("docs"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    command = f"python scripts/sequence_data.py --expressions {args.expressions} --pictures {args.pictures}"
    samples = {side: draw(side, args.seed, args.pictures) for side in PARAMETERS}
    text = HEAD.format(seed=args.seed, command=command)
    text += listops_section(generate_listops(args.expressions, args.seed, args.processes))
    text += PATHFINDER_TEXT + pathfinder_table(samples) + PATHFINDER_NOTES
    (args.output / "sequence-data.md").write_text(text, encoding="utf-8")
    contact_sheet(samples).save(args.output / "pathfinder.png", optimize=True)
    print(f"{args.output / 'sequence-data.md'} and {args.output / 'pathfinder.png'} written")


def generate_listops(count: int, seed: int, processes: int) -> list[tuple[list[str], int]]:
    """Returns the tokens, without round brackets, and the values of a training set that was written and read."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"train": count, "validation": 1, "test": 1}
        listops.generate(Path(folder), sizes, seed=seed, processes=processes)
        lines = (Path(folder) / listops.FILES["train"]).read_text(encoding="ascii").splitlines()[1:]
    pairs = (line.split("\t") for line in lines)
    return [([token for token in text.split() if token not in "()"], int(value)) for text, value in pairs]


def listops_section(examples: list[tuple[list[str], int]]) -> str:
    """Returns what is to be said of ListOps."""
    lengths = np.array([len(tokens) for tokens, _ in examples])
    operators: Counter[str] = Counter()
    arguments: Counter[int] = Counter()
    depths: Counter[int] = Counter()
    for tokens, _ in examples:
        count_nodes(tokens, operators, arguments, depths)
    values = Counter(value for _, value in examples)
    quantiles = " / ".join(f"{q:.0f}" for q in np.quantile(lengths, [0.05, 0.25, 0.5, 0.75, 0.95]))
    rows = [
        ("length", "500 < n < 2000", f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.0f}"),
        ("its 5, 25, 50, 75, 95 % quantiles", "", quantiles),
        ("depth of the expression", "at most 10", shares(depths)),
        ("operators", "1 / 4 each", shares({name: operators[name] for name in listops.OPERATORS})),
        ("arguments", "2 to 10, 1 / 9 each where drawn", shares(arguments)),
        ("values", "", shares(values)),
    ]
    text = "## ListOps\n\n" + table(("", "published", f"{len(examples):,} generated"), rows)
    return (
        text + "\nOnly long expressions are kept, so those with more arguments are more frequent than they are drawn.\n"
    )


def count_nodes(tokens: list[str], operators: Counter[str], arguments: Counter[int], depths: Counter[int]) -> None:
    """Counts an expression's operators, their arguments, and the expression by its depth, a digit being a level."""
    counts: list[int] = []
    deepest = 0
    for token in tokens:
        if token == "]":
            arguments[counts.pop()] += 1
            continue
        if counts:
            counts[-1] += 1
        deepest = max(deepest, len(counts) + 1)
        if token.startswith("["):
            operators[token[1:]] += 1
            counts.append(0)
    depths[deepest] += 1


def shares(counts: dict) -> str:
    """Returns each key with its share in percent."""
    total = sum(counts.values())
    keys = counts if any(isinstance(key, str) for key in counts) else sorted(counts)
    return ", ".join(f"{key}: {100 * counts[key] / total:.1f} %" for key in keys)


def draw(side: int, seed: int, count: int) -> list[Pictures]:
    """Returns so many blocks of pictures that there are `count`, or a few more."""
    blocks: list[Pictures] = []
    while sum(len(own.labels) for own in blocks) < count:
        blocks.append(pictures(side, seed, len(blocks)))
    return blocks


def pathfinder_table(samples: dict[int, list[Pictures]]) -> str:
    """Returns the parameters and measures of all sides."""
    columns = [pathfinder_column(side, blocks) for side, blocks in samples.items()]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return table(("", *(f"side {side}" for side in samples)), rows)


def pathfinder_column(side: int, blocks: list[Pictures]) -> dict[str, str]:
    """Returns the parameters and measures of one side, by name."""
    own = PARAMETERS[side]

    def joined(name: str) -> NDArray:
        return np.concatenate([getattr(block, name) for block in blocks])

    def spread(values: NDArray) -> str:
        return f"{values.mean():.2f} ± {values.std():.2f}"

    starts, markers, images, margins = joined("starts"), joined("markers"), joined("images"), joined("margins")
    seeds = np.linalg.norm(starts[:, 0] - starts[:, 1], axis=-1)
    apart = np.linalg.norm(markers[:, 0] - markers[:, 1], axis=-1)
    labels, tips = joined("labels"), joined("tips")
    steps = np.linalg.norm(np.diff(tips, axis=2), axis=-1)[:, :, 1:]
    bright = (images > 64).mean(axis=(1, 2))
    return {
        "pictures": f"{len(labels):,}",
        "seed distance": f"{own.seed_distance}; {spread(seeds)}",
        "paddles of a target snake": f"{TARGET_PADDLES}; {tips.shape[2]}",
        "from a tip to the next: length + 2 · margin": f"{own.paddle_length + 2 * margins.mean():.1f}; {spread(steps)}",
        "margin": ", ".join(f"{margin}: {100 * np.mean(margins == margin):.1f} %" for margin in own.margins),
        "distractors": f"{own.distractors}; {spread(joined('distractors'))}",
        "paddles of a distractor": str(DISTRACTOR_PADDLES),
        "class 1": f"50 %; {100 * labels.mean():.1f} %",
        "between markers, class 1": spread(apart[labels == 1]),
        "between markers, class 0": spread(apart[labels == 0]),
        "pixels brighter than a quarter": f"{100 * bright.mean():.1f} % ± {100 * bright.std():.1f}",
    }


def table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Returns a markdown table."""
    lines = [tuple(head), ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def contact_sheet(samples: dict[int, list[Pictures]]) -> Image.Image:
    """Returns pictures of all sides, those of class 1 on the left."""
    return Image.fromarray(np.concatenate([sheet(blocks[0], SCALES[side]) for side, blocks in samples.items()]))


def sheet(own: Pictures, scale: int) -> NDArray[np.uint8]:
    """Returns rows of pictures of one side."""
    halves = []
    for label in (1, 0):
        images = own.images[own.labels == label][: ROWS * COLUMNS]
        framed = [np.pad(np.kron(image, np.ones((scale, scale), np.uint8)), 2, constant_values=90) for image in images]
        rows = [np.concatenate(framed[i : i + COLUMNS], axis=1) for i in range(0, ROWS * COLUMNS, COLUMNS)]
        halves.append(np.concatenate(rows))
    gap = np.full((len(halves[0]), 12), 255, dtype=np.uint8)
    return np.concatenate([halves[0], gap, halves[1]], axis=1)


if __name__ == "__main__":
    main()
