"""README and the documentation: examples run, tables say what the code says, and the site builds without a warning."""

import dataclasses
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch

import mrconvnext
from mrconvnext.options import BranchOptions

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"(<!-- not run: .+? -->\n)?```python\n(.+?)```", re.DOTALL)
PAGES = ("README.md", "docs/index.md", "docs/use.md", "docs/weights.md", "docs/deployment.md")


def examples(page: str) -> list[str]:
    """Returns the Python of a page but for what it says is not run."""
    return [code for marked, code in EXAMPLE.findall((ROOT / page).read_text()) if not marked]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each with what those before it made."""
    monkeypatch.chdir(tmp_path)
    own = examples(page)
    assert own
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        for code in own:
            exec(compile(code, page, "exec"), names)
    if "found" in names:
        torch.testing.assert_close(actual=names["found"], expected=names["logits"], rtol=1e-4, atol=1e-5)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 800


def test_links_lead_somewhere() -> None:
    """Of README; those of the site are checked when it is built."""
    links = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_every_option_is_listed() -> None:
    """In the table of docs/use.md: those of the model's own arguments and of the branches."""
    table = (ROOT / "docs" / "use.md").read_text().partition("## Options")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line[:2] == "| ")))
    known = set(inspect.signature(mrconvnext.MRConvNeXt.__init__).parameters) - {"self", "kwargs"}
    of_convnext = set(inspect.signature(timm.models.ConvNeXt.__init__).parameters)
    known |= {field.name for field in dataclasses.fields(BranchOptions)}
    # timm's own are `kernel_sizes`, which ours reads otherwise, and `exportable`; `min_lengths` is of all stages.
    assert listed - {"exportable", "kernel_sizes"} == known - of_convnext - {"min_length"}


def test_lengths_of_the_method_are_the_models() -> None:
    """The table of docs/method.md."""
    model = timm.create_model("mrconvnext_tiny")
    text = (ROOT / "docs" / "method.md").read_text()
    for i, stage in enumerate(model.stages):
        layer = stage.blocks[0].conv_dw
        grid = "×".join(map(str, layer.reference_grid))
        assert f"| {i + 1} | {grid} | {', '.join(map(str, layer.branch_lengths))} |" in text


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference" / "layers.html").read_text()
    assert "branch_kernels" in reference and "Raises" in reference
