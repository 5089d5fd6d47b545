"""The runner of the experiments on sequences, with short rows in place of its own; published tables."""

import sys
from pathlib import Path

import pytest

from experiments import sequences
from experiments.report import read_lines
from mrconvnext.tasks import listops, tones
from scripts.sequences import TABLES

DOCS = Path(__file__).parents[1] / "docs"
SHORT = tuple("--method fourier --dim 8 --depth 1 --global-batch 8 --epochs 1 --device cpu --log-interval 1".split())


@pytest.mark.slow
def test_rows_are_run_once_and_make_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sizes = {"train": 16, "validation": 8, "test": 8}
    tones.generate(tmp_path / "data" / "tones", sizes)
    listops.generate(tmp_path / "data" / "listops", sizes)
    rows = [
        sequences.Row("rate", "short", 0, "tones", SHORT, sequences.HALF_THE_RATE),
        sequences.Row("listops", "short", 0, "listops", SHORT),
    ]
    monkeypatch.setattr(sequences, "all_rows", lambda: rows)
    monkeypatch.setattr(sys, "argv", ["sequences", "--output", str(tmp_path), "--jobs", "2"])
    assert sequences.main() == 0
    lines = sequences.results(tmp_path)
    assert [line["name"] for line in lines] == [
        *("short", "short, kept", "short, resampled", "short", "most frequent answer")
    ]
    assert all(0 <= float(line["test_top1"]) <= 100 for line in lines)
    assert lines[0]["steps"] == "2" and int(lines[0]["parameters"]) > 100
    assert str(tmp_path) not in (tmp_path / "sequences.csv").read_text()

    before = (tmp_path / "sequences.csv").read_bytes()
    assert sequences.main() == 0
    assert (tmp_path / "sequences.csv").read_bytes() == before

    document = tmp_path / "document.md"
    document.write_text("<!-- rate -->\nold\n<!-- end -->\n\n<!-- listops -->\n<!-- end -->\n")
    (tmp_path / "published").mkdir()
    words = ["--document", str(document), "--publish", str(tmp_path / "published")]
    monkeypatch.setattr(sys, "argv", ["sequences", "--output", str(tmp_path), *words])
    assert sequences.main() == 0
    text = document.read_text()
    assert "old" not in text and f"| short, kept | 1 | {float(lines[1]['test_top1']):.2f} |" in text
    assert (tmp_path / "published" / "sequences.csv").read_bytes() == before


def test_published_tables_are_those_of_their_files() -> None:
    document = (DOCS / "sequences.md").read_text()
    lines = read_lines(DOCS / "results" / "sequences.csv")
    for group in dict.fromkeys(row.group for row in sequences.all_rows()):
        assert "\n".join(sequences.table(group, lines)) in document
    for name, file, _, table in TABLES:
        assert f"<!-- {name} -->\n{table(read_lines(DOCS / 'results' / file))}\n<!-- end -->" in document
