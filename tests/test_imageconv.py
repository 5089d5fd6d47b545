"""Both ways of convolving images without gradients, by FFTs and by matrices, against the definition."""

import pytest
import torch
from helpers import assert_agree

from mrconvnext.derived import derived_count
from mrconvnext.grid import place_kernel, to_image, to_sequence
from mrconvnext.imageconv import convolve_deployed
from mrconvnext.longconv import long_conv_reference


@pytest.fixture(params=["FFTs", "matrices"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("mrconvnext.matrixconv.LARGEST", 0 if request.param == "FFTs" else 10**6)
    return request.param


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guard", [0, 3])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (1, 9), (8, 1), (6, 11), (17, 4), (30, 31)])
@torch.no_grad()
def test_equals_the_definition(
    size: tuple[int, int],
    guard: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mrconvnext.imageconv.PIECE_BYTES", 2**14)  # pieces of an image, or of all of them
    stride = 11 + guard
    kernel, bias = torch.randn(3, 2 * 9 * stride - 1, dtype=dtype), torch.randn(3, dtype=dtype)
    x = torch.randn(5, 3, *size, dtype=dtype).contiguous(memory_format=memory_format)
    placed = place_kernel(kernel.double(), stride, x, guard)
    expected = to_image(long_conv_reference(to_sequence(x.double(), guard), placed), size[0], guard)
    y = convolve_deployed(x, kernel, bias, stride, guard)
    assert y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    assert_agree(y.double(), expected + bias.double()[:, None, None], 1e-6 if dtype == torch.float32 else 1e-13)


@torch.no_grad()
def test_autocast_changes_nothing() -> None:
    kernel, bias, x = torch.randn(3, 2 * 9 * 14 - 1), torch.randn(3), torch.randn(2, 3, 9, 11)
    expected = convolve_deployed(x, kernel, bias, 14, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(convolve_deployed(x, kernel, bias, 14, 3), expected)


@torch.no_grad()
def test_no_images() -> None:
    kernel, bias = torch.randn(3, 2 * 9 * 14 - 1), torch.randn(3)
    assert convolve_deployed(torch.randn(0, 3, 9, 11), kernel, bias, 14, 3).shape == (0, 3, 9, 11)


@torch.no_grad()
def test_what_is_derived_from_a_kernel_is_kept_for_each_type() -> None:
    kernel, bias, x = torch.randn(3, 2 * 9 * 14 - 1), torch.randn(3), torch.randn(2, 3, 9, 11)
    single, double = (convolve_deployed(x.to(dtype), kernel, bias, 14, 3) for dtype in (torch.float32, torch.float64))
    assert derived_count(kernel) == 2
    assert double.dtype == torch.float64
    assert_agree(single.double(), double, 1e-6)
