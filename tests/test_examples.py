"""The examples run, on a few pictures."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segment", "detect"])
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    example = importlib.import_module(name)
    monkeypatch.setattr(example, "PICTURES", 16)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(0 <= float(line.split()[-1]) <= 1 for line in lines)
    assert [line.split(":")[0].partition(", ")[2] for line in lines] == ["", "kernels as they are", "kernels moved"]
