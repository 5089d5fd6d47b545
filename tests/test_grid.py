import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agree

from mrconvnext.grid import add_local_taps, pair_counts, place_kernel, responses_to_ones, to_image, to_sequence
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


def images(height: int, width: int) -> torch.Tensor:
    return torch.empty(1, 1, height, width)


def taps(weight: torch.Tensor, dilation: int, side: int, guard: int) -> torch.Tensor:
    """Returns the kernel of local taps on a square grid."""
    zeros = weight.new_zeros((len(weight), 2 * side * (side + guard) - 1))
    return add_local_taps(zeros, weight, dilation, side + guard)


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("size", SIZES)
def test_local_taps_equal_conv2d_on_any_grid(size: tuple[int, int], kernel_size: int, dilation: int) -> None:
    """Laid out on a reference grid, even or odd or the smallest that holds them, and moved from there."""
    guard = dilation * (kernel_size // 2)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(3, 1, kernel_size, kernel_size, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=guard, dilation=dilation, groups=3)
    sides = (max(14, guard + 1), max(15, guard + 1), guard + 1)
    for kernel in [place_kernel(taps(weight, dilation, side, guard), side + guard, x, guard) for side in sides]:
        assert_agree(to_image(long_conv_reference(to_sequence(x, guard), kernel), size[0], guard), expected, 1e-13)


@pytest.mark.parametrize("old", [10, 11])
@pytest.mark.parametrize("new", [8, 10, 11, 17])
def test_a_moved_kernel_keeps_every_tap_that_fits(old: int, new: int) -> None:
    """The lag dr·old + dc becomes dr·new + dc, for dc within half a row of either."""
    kernel = torch.randn(1, 2 * 5 * old - 1, dtype=torch.float64)
    moved = place_kernel(kernel, old, images(5, new), 0)
    half = (min(old, new) - 1) // 2
    for dr in range(-4, 5):
        for dc in range(-half, half + 1):
            expected = kernel[0, kernel.shape[1] // 2 + dr * old + dc]
            assert moved[0, moved.shape[1] // 2 + dr * new + dc] == expected


def test_moving_a_kernel_is_differentiable() -> None:
    kernel = torch.randn(2, 59, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: place_kernel(k, 10, images(4, 7), 0), kernel)
    assert torch.autograd.gradcheck(lambda k: place_kernel(k, 10, images(4, 13), 0), kernel)


@pytest.mark.parametrize("guard", [0, 3])
@pytest.mark.parametrize("size", SIZES[:8])
def test_what_pixels_make_of_a_kernel(size: tuple[int, int], guard: int) -> None:
    """Pairs of pixels counted one by one; the response to an image of ones by the direct sum."""
    (height, width), length = size, size[0] * (size[1] + guard)
    places = {row * (width + guard) + column for row in range(height) for column in range(width)}
    counted = [sum(place + lag in places for place in places) for lag in range(length)]
    assert pair_counts(height, width, guard, torch.device("cpu")).tolist() == counted
    for reach in (0, length // 2, length - 1):
        kernels = torch.randn(2, 3, 2 * reach + 1, dtype=torch.float64)
        ones = to_sequence(torch.ones(1, 3, *size, dtype=torch.float64), guard)
        variance, mean = responses_to_ones(kernels, height, width, guard)
        for i, own in enumerate(kernels):
            response = to_image(long_conv_reference(ones, own), height, guard)[0]
            assert_agree(mean[i], response.mean((1, 2)), 1e-12)
            torch.testing.assert_close(variance[i], response.var((1, 2), correction=0))
