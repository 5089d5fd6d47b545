"""What is published: numbers that stand in two places, what is in the wheel, and that it runs without the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mrconvnext

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", re.MULTILINE)
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

# What runs after the example of README, and tells of itself.
REPORT = """
import importlib.metadata, json, train_imagenet

commands = importlib.metadata.distribution("mrconvnext").entry_points
for command in commands:
    command.load()
report = {
    "files": [mrconvnext.__file__, train_imagenet.__file__],
    "version": importlib.metadata.version("mrconvnext"),
    "engine": str(mrconvnext.engine()),
    "commands": {command.name: command.value for command in commands},
}
print(json.dumps(report))
"""


def test_the_floor_is_the_lower_bounds() -> None:
    required = map(Requirement, PROJECT["dependencies"])
    bounds = {one.name: [Version(each.version) for each in one.specifier if each.operator == ">="] for one in required}
    lines = (ROOT / ".github" / "floor.txt").read_text().splitlines()
    floor = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: [Version(version)] for name, version in floor.items()} == bounds


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """As where Python starts beside the clone, which is called mrconvnext."""
    (tmp_path / "mrconvnext").mkdir()
    code = "import timm, mrconvnext; timm.create_model('mrconvnext_atto', depths=(1, 1, 1, 1))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_version_and_date_are_the_changelogs() -> None:
    version, date = RELEASE.findall((ROOT / "CHANGELOG.md").read_text())[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert version == citation["version"] == mrconvnext.__version__
    assert date == citation["date-released"]


def files() -> list[Path]:
    """Returns the files of the checkout that git tracks, or would."""
    command = "git ls-files -z --cached --others --exclude-standard".split()
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("package")
    source, built = folder / "source", folder / "built"
    for name in files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source], check=True)
    (path,) = built.iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_programs_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(name) for name in files() if name.suffix == ".py" and name.parts[0] == "mrconvnext"}
    programs = {"benchmark_throughput.py", "train_imagenet.py", "train_sequences.py"}
    assert names - {"mrconvnext/engines/_native.so"} == modules | programs | {"mrconvnext/py.typed"}


@pytest.mark.slow
def test_the_wheel_runs_what_readme_shows(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    subprocess.run([*PIP, "install", "--no-deps", "--target", installed, wheel], check=True)
    example = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "example.py").write_text(example + REPORT)
    # Before what the environment has installed, which is the checkout; all else is the environment's.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(installed) for file in report["files"])
    assert report["version"] == mrconvnext.__version__
    assert report["engine"] == str(mrconvnext.engine())
    assert report["commands"] == PROJECT["scripts"]
    assert {path.name for path in (installed / "bin").iterdir()} == PROJECT["scripts"].keys()
