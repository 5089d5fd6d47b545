"""The engine for GPUs: in Triton's interpreter where there is none, and compiled for some."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mrconvnext
from mrconvnext.engines import cuda, plain

if importlib.util.find_spec("triton") is not None:
    from scripts.triton_errors import DEVICE, MAPS, Case, multiplying_by, relative_error
else:
    MAPS = []

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), MAPS)
def test_maps(height: int, width: int) -> None:
    assert max(Case(height, width).errors()) < 1e-6


@pytest.mark.parametrize(("precision", "limit"), [("tf32x3", 2e-6), ("tf32", 2e-3)])
@pytest.mark.parametrize("size", [14, 28])
def test_faster_products(size: int, precision: str, limit: float) -> None:
    with multiplying_by(precision):
        error = max(Case(size, size).errors())
    assert error < limit and (precision != "tf32" or error > 1e-5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize(("height", "width", "guard", "channels", "images"), [(5, 7, 3, 3, 2), (9, 4, 0, 13, 3)])
def test_layouts(height: int, width: int, guard: int, channels: int, images: int, branches: int, last: bool) -> None:
    assert max(Case(height, width, guard, branches, channels, images).errors(last=last)) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_loses_what_a_rounded_output_loses(dtype: torch.dtype, limit: float) -> None:
    # Triton's interpreter cuts off what does not fit into bfloat16, where a GPU rounds.
    y, grad_x, *others = Case(14, 14).errors(dtype)
    assert max(y, grad_x) < limit and max(others) < 1e-3


def test_kernels_of_another_size_and_images_without_number() -> None:
    case = Case(6, 5, guard=1)
    case.kernel, case.row_stride = torch.randn(2, 2 * 9 * 8 - 1, dtype=torch.float64), 8
    assert max(case.errors()) < 1e-6
    empty = torch.empty(0, 2, 6, 5, device=DEVICE)
    kernel = torch.randn(2, 59, device=DEVICE)
    assert cuda.convolve(empty, kernel, None, 6, 1).shape == empty.shape
    assert not cuda.convolve_backward(empty, empty, kernel, 6, 1)[1].any()


def test_what_is_too_large_is_left_to_the_plain_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "launch", None)
    case = Case(70, 130)
    assert max(case.errors()) < 1e-5  # with PyTorch's FFTs in float32


def test_images_far_above_and_below_one() -> None:
    case = Case(7, 7)
    for scale in (1e-18, 1e18):
        x = case.x.float().to(DEVICE) * scale
        mean = torch.zeros(2, device=DEVICE)
        found = cuda.autocorrelation(x, mean, 3)
        assert (
            torch.isfinite(found).all()
            and relative_error(found, plain.autocorrelation(x.cpu().double(), mean.cpu().double(), 3)) < 1e-5
        )


def test_who_serves() -> None:
    assert not cuda.can_serve(torch.randn(2, 2, 4, 4)) and not cuda.can_serve(torch.randn(2, 2, 4, 4, device="meta"))
    assert "on GPUs Triton" in str(mrconvnext.engine())


@pytest.mark.slow
def test_programs_compile_and_fit_into_the_memory_that_is_listed_for_them() -> None:
    """For cards that are not here, and in a process of its own, whose Triton compiles."""
    command = [sys.executable, Path(__file__).parents[1] / "scripts" / "triton_sizes.py", "--positions", "1024", "4096"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.stdout.splitlines()[2:]]
    assert len(rows) == 2 * 2 * 8
    for card, name, n, _, shared, *_ in rows:
        listed = cuda.LONGEST_POWER if name == "power" else cuda.LONGEST
        assert int(shared) <= (listed[int(n)] if card == "sm_90" else 65536)
