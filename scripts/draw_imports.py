"""Draws which module of the package imports which, from the code itself.

    python scripts/draw_imports.py --output docs/architecture.png

Each module stands one row below the lowest of those that it imports. What the scripts are made of is left out.
"""

import argparse
import ast
from pathlib import Path

from matplotlib.figure import Figure

PACKAGE = Path(__file__).resolve().parent.parent / "mrconvnext"

OF_SCRIPTS = ("training/", "benchmarking/", "tasks/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the picture, a PNG file")
    args = parser.parse_args()
    draw(imports_of(PACKAGE)).savefig(args.output, dpi=110)


def imports_of(package: Path) -> dict[str, set[str]]:
    """Returns for each module of a package, by its path such as ``engines/cpu``, the modules of it that it imports."""
    files = {str(file.relative_to(package).with_suffix("")): file for file in package.rglob("*.py")}
    files = {name: file for name, file in files.items() if not name.startswith(OF_SCRIPTS)}
    found = {}
    for name, file in files.items():
        if name != "__init__":
            folder = file.parent
            nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
            own = {target for node in nodes if node.level for target in targets(node, folder, package)}
            found[name.removesuffix("/__init__")] = (own & {key.removesuffix("/__init__") for key in files}) - {name}
    return found


def targets(node: ast.ImportFrom, folder: Path, package: Path) -> list[str]:
    """Returns the modules, by their paths, that a relative import may name."""
    for _ in range(node.level - 1):
        folder = folder.parent
    base = folder.joinpath(*node.module.split(".")) if node.module else folder
    named = [base / alias.name for alias in node.names]
    return [str(path.relative_to(package)) for path in ([base, *named] if node.module else named)]


def row_of(name: str, imports: dict[str, set[str]]) -> int:
    return 1 + max((row_of(other, imports) for other in imports[name]), default=-1)


def draw(imports: dict[str, set[str]]) -> Figure:
    """Returns a picture of modules, in rows, and arrows to what they import."""
    rows: dict[int, list[str]] = {}
    for name in sorted(imports):
        rows.setdefault(row_of(name, imports), []).append(name)
    figure = Figure(figsize=(10, 0.75 * len(rows)), layout="constrained")
    ax = figure.subplots()
    places = {
        name: ((i + 1) / (len(names) + 1), -row) for row, names in sorted(rows.items()) for i, name in enumerate(names)
    }
    for name, others in imports.items():
        for other in others:
            ax.annotate(
                "",
                xy=places[other],
                xytext=places[name],
                arrowprops={"arrowstyle": "->", "color": "0.7", "shrinkA": 12, "shrinkB": 12},
            )
    for name, (x, y) in places.items():
        colour = "#dceaf7" if name.startswith("engines") else "#f4f0e6"
        ax.text(x, y, name, ha="center", va="center", fontsize=10, bbox={"boxstyle": "round", "facecolor": colour})
    ax.set(xlim=(0, 1), ylim=(-len(rows) + 0.5, 0.5))
    ax.axis("off")
    return figure


if __name__ == "__main__":
    main()
