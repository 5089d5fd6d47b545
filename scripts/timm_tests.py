"""Runs timm's own model tests over our models.

The tests are those of the installed timm's source distribution, unchanged: what timm asks of its own model families.

    python scripts/timm_tests.py atto tiny
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
V2_SIZES = tuple(f"v2_{size}" for size in (*SIZES, "huge"))

# Three of timm's tests choose their models by module: ours count as ConvNeXt's. timm itself stays as it is.
PLUGIN = """
import mrconvnext
import timm.models._registry as registry

registry._module_to_models["convnext"].update(registry._module_to_models["mrconvnext"])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=SIZES, help="atto, …, v2_atto, … (default: all of the first kind)")
    args = parser.parse_args()
    for size in args.sizes:
        if size not in SIZES + V2_SIZES:
            parser.error(f"size must be one of {', '.join(SIZES + V2_SIZES)}, got {size!r}")
    names = [f"mrconvnext{size}" if size in V2_SIZES else f"mrconvnext_{size}" for size in args.sizes]

    with tempfile.TemporaryDirectory() as folder:
        tests = download_timm_tests(Path(folder))
        (tests / "mrconvnext_plugin.py").write_text(PLUGIN)
        # A folder that holds only the tests: Python must not find timm's sources beside them.
        command = [sys.executable, "-P", "-m", "pytest", "-p", "mrconvnext_plugin", "-p", "no:cacheprovider"]
        # Two tests download every published checkpoint.
        command += ["tests/test_models.py", "-k", f"({' or '.join(names)}) and not pretrained"]
        command += ["-rs", "--durations=5", "-W", "ignore"]
        environment = {**os.environ, "PYTHONPATH": str(tests)}
        return subprocess.run(command, cwd=tests, env=environment, check=False).returncode


def download_timm_tests(folder: Path) -> Path:
    """Returns a folder that holds the installed timm's ``tests/`` and nothing else."""
    version = importlib.metadata.version("timm")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-binary", ":all:", "--dest", folder, f"timm=={version}"], check=True)
    (source,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(source) as archive:
        members = [member for member in archive.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        archive.extractall(folder, members=members, filter="data")
    return folder / source.name.removesuffix(".tar.gz")


if __name__ == "__main__":
    sys.exit(main())
