"""The script for a machine with a GPU, on the CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.sh"


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "DEVICE": "cpu", "PARTS": "profile training-bf16 deployed-fp32", "PATH": path}
    ended = subprocess.run([SCRIPT, tmp_path / "gpu"], capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stdout
    assert [line.split(":")[0] for line in ended.stdout.splitlines() if "exit status 0" in line] == env["PARTS"].split()
    profile = list(csv.DictReader((tmp_path / "gpu" / "profile" / "profile.csv").read_text().splitlines()))
    assert any("mrconvnext::convolve_backward" in row["kernel"] for row in profile)
    for part in ("training-bf16", "deployed-fp32"):
        rows = list(csv.DictReader((tmp_path / "gpu" / part / "benchmark.csv").read_text().splitlines()))
        assert {row["model"].split(":")[0] for row in rows} == {"mrconvnext_atto", "convnext_atto"}
        assert all(float(row["ratio"]) > 0 for row in rows)
