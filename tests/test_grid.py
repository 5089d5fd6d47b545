import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agree

from mrconvnext.grid import local_kernel, restride, to_image, to_sequence
from mrconvnext.longconv import long_conv_reference

SIZES = [(7, 7), (9, 23), (31, 5), (40, 40), (1, 1), (1, 9), (2, 3), (6, 4), (14, 14), (14, 15)]


@pytest.mark.parametrize("guard", [0, 1, 3])
def test_image_to_sequence_and_back(guard: int) -> None:
    x = torch.randn(2, 3, 5, 7)
    u = to_sequence(x, guard)
    assert u.shape == (2, 3, 5 * (7 + guard))
    assert torch.equal(u[0, 0, 7 + guard : 14 + guard], x[0, 0, 1])
    assert u.unflatten(2, (5, -1))[..., 7:].abs().sum() == 0
    assert torch.equal(to_image(u, 5, guard), x)


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("size", SIZES)
def test_local_taps_equal_conv2d_on_any_grid(size: tuple[int, int], kernel_size: int, dilation: int) -> None:
    """Laid out on the image's own grid, or on a reference grid, even or odd, and moved from there."""
    guard = dilation * (kernel_size // 2)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(3, 1, kernel_size, kernel_size, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=guard, dilation=dilation, groups=3)
    stride = size[1] + guard
    own = local_kernel(weight, dilation, stride)
    for kernel in (
        own,
        restride(local_kernel(weight, dilation, 14 + guard), 14 + guard, stride),
        restride(local_kernel(weight, dilation, 15 + guard), 15 + guard, stride),
        restride(local_kernel(weight, dilation, 2 * guard + 1), 2 * guard + 1, stride),
    ):
        assert_agree(to_image(long_conv_reference(to_sequence(x, guard), kernel), size[0], guard), expected, 1e-13)


@pytest.mark.parametrize("old", [10, 11])
@pytest.mark.parametrize("new", [8, 10, 11, 17])
def test_restride_keeps_every_tap_that_fits(old: int, new: int) -> None:
    """The lag dr·old + dc becomes dr·new + dc, for dc within half a row of either."""
    kernel = torch.randn(1, 2 * 5 * old - 1, dtype=torch.float64)
    moved = restride(kernel, old, new)
    half = (min(old, new) - 1) // 2
    for dr in range(-4, 5):
        for dc in range(-half, half + 1):
            expected = kernel[0, kernel.shape[1] // 2 + dr * old + dc]
            assert moved[0, moved.shape[1] // 2 + dr * new + dc] == expected


def test_restride_is_differentiable() -> None:
    kernel = torch.randn(2, 59, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: restride(k, 10, 7), kernel)
    assert torch.autograd.gradcheck(lambda k: restride(k, 10, 13), kernel)
