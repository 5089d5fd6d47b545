"""The two operations, by every engine, against the direct sum in float64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agree
from torch import Tensor

import mrconvnext
from mrconvnext.engines import NAMES, cpu, plain
from mrconvnext.grid import place_kernel, to_image, to_sequence
from mrconvnext.longconv import (
    autocorrelation,
    branch_energies,
    convolve,
    convolve_real,
    long_conv,
    long_conv_reference,
)

LENGTHS = (1, 2, 7, 49, 129, 1134)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = [(7, 7), (1, 1), (1, 9), (8, 1), (6, 11), (17, 4), (30, 31)]


@pytest.fixture(params=NAMES, autouse=True)
def chosen_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with mrconvnext.engine(request.param):
        yield request.param


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over two images at a time, which then are added."""
    monkeypatch.setattr(cpu, "CHUNK", 2)


def signals(length: int, reach: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length + reach)
    u = torch.randn(2, 3, length, generator=generator, dtype=torch.float64).to(dtype)
    kernel = torch.randn(3, 2 * reach + 1, generator=generator, dtype=torch.float64).to(dtype)
    return u, kernel


def direct(x: Tensor, kernel: Tensor, guard: int) -> Tensor:
    """Returns images convolved with N kernels a channel by the direct sum."""
    kernels = kernel.unflatten(0, (-1, x.shape[1]))
    each = [to_image(long_conv_reference(to_sequence(x, guard), own), x.shape[2], guard) for own in kernels]
    return torch.cat(each, 1)


# Sequences


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel_length", LENGTHS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_direct_sum(length: int, kernel_length: int, dtype: torch.dtype) -> None:
    u, kernel = signals(length, kernel_length - 1, dtype)
    actual = long_conv(u, kernel)
    assert actual.dtype == dtype
    assert_agree(actual, long_conv_reference(u.double(), kernel.double()), TOLERANCE[dtype])


def test_reference_is_the_definition() -> None:
    u, kernel = signals(7, 3)
    expected = torch.zeros_like(u)
    for t in range(7):
        for s in range(7):
            if abs(t - s) <= 3:
                expected[..., t] += kernel[:, 3 + t - s] * u[..., s]
    assert_agree(long_conv_reference(u, kernel), expected, 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    u, kernel = signals(129, 128, dtype)
    expected = long_conv(u.float(), kernel.float()).to(dtype)
    assert torch.equal(long_conv(u, kernel), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(long_conv(u, kernel), expected)


@pytest.mark.parametrize("function", [long_conv, long_conv_reference])
def test_bad_arguments_are_named(function) -> None:
    u, kernel = torch.randn(1, 3, 7), torch.randn(3, 5)
    with pytest.raises(ValueError, match="kernel must have an odd number of lags.*got 4"):
        function(u, kernel[:, :4])
    with pytest.raises(ValueError, match=r"with the channels of u, got \[1, 3, 7\] and \[2, 5\]"):
        function(u, kernel[:2])
    with pytest.raises(ValueError, match=r"u must have at least 1 position, got \[1, 3, 0\]"):
        function(u[..., :0], kernel)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=f"floating-point tensors, got {dtype}"):
            function(u.to(dtype), kernel)


# Images


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("guard", [0, 3])
@pytest.mark.parametrize("size", [*SIZES[:-1], pytest.param(SIZES[-1], marks=pytest.mark.slow)])
@pytest.mark.usefixtures("small_chunks")
def test_images(
    size: tuple[int, int], guard: int, branches: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Output and all gradients; the latter must not depend on the order of the images in memory either."""
    generator = torch.Generator().manual_seed(0)
    length = size[0] * (size[1] + guard)
    x = torch.randn(5, 3, *size, generator=generator, dtype=dtype).contiguous(memory_format=memory_format)
    kernel = torch.randn(branches * 3, 2 * length - 1, generator=generator, dtype=dtype)
    bias = torch.randn(branches * 3, generator=generator, dtype=dtype)
    weights = torch.randn(5, branches * 3, *size, generator=generator, dtype=torch.float64)

    own = [tensor.clone().requires_grad_() for tensor in (x, kernel, bias)]
    y = convolve(*own, size[1] + guard, guard)
    assert y.dtype == dtype
    if branches == 1:
        assert y.stride() == torch.empty_like(x).stride()
    exact = [tensor.double().requires_grad_() for tensor in (x, kernel, bias)]
    expected = direct(exact[0], exact[1], guard) + exact[2][:, None, None]
    assert_agree(y, expected, TOLERANCE[dtype])
    for actual, wanted in zip(
        torch.autograd.grad((y * weights).sum(), own), torch.autograd.grad((expected * weights).sum(), exact)
    ):
        assert actual.dtype == dtype
        assert_agree(actual, wanted, TOLERANCE[dtype])
    if branches == 1:
        assert_agree(convolve_real(x, kernel, bias, size[1] + guard, guard), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("row_stride", [5, 4, 8])
@pytest.mark.parametrize("reach", [0, 3, 20])
def test_any_number_of_gradients(reach: int, row_stride: int) -> None:
    x, kernel = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(4, 2 * reach + 1, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, kernel, torch.randn(4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *own: convolve(*own, row_stride, 1), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *own: convolve(*own, row_stride, 1), inputs, fast_mode=True)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("guard", [0, 3])
@pytest.mark.parametrize("size", SIZES)
def test_autocorrelation(size: tuple[int, int], guard: int) -> None:
    x, mean = torch.randn(5, 3, *size, dtype=torch.float64) + 1, torch.randn(3, dtype=torch.float64)
    v = to_sequence(x - mean[:, None, None], guard)
    expected = [(v[..., lag:] * v[..., : v.shape[2] - lag]).sum((0, 2)) for lag in range(v.shape[2])]
    assert_agree(autocorrelation(x, mean, guard), torch.stack(expected, 1), 1e-12)
    assert autocorrelation(x.float(), mean.float(), guard).dtype == torch.float64


def test_gradients_of_the_autocorrelation() -> None:
    inputs = [torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *own: autocorrelation(*own, 1), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *own: autocorrelation(*own, 1), inputs, fast_mode=True)


@pytest.mark.parametrize("row_stride", [10, 14, 15, 40])
@pytest.mark.parametrize("rows", [3, 9, 20])
def test_kernels_of_another_grid_are_moved(rows: int, row_stride: int) -> None:
    """Output and gradients are those of the kernel that was moved before."""
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    kernel = torch.randn(3, 2 * rows * row_stride - 1, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    expected = direct(x, place_kernel(kernel, row_stride, x, 3), 3)
    actual = convolve(x, kernel, None, row_stride, 3)
    assert_agree(actual, expected, 1e-12)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), kernel)
    assert_agree(torch.autograd.grad((actual * weights).sum(), kernel)[0], wanted, 1e-12)
    assert_agree(convolve_real(x, kernel, None, row_stride, 3), expected, 1e-12)


def test_no_images() -> None:
    x = torch.randn(0, 3, 9, 11, requires_grad=True)
    kernel = torch.randn(3, 2 * 9 * 14 - 1, requires_grad=True)
    y = convolve(x, kernel, torch.randn(3), 14, 3)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape and (kernel.grad == 0).all()
    assert (autocorrelation(x, torch.zeros(3), 3) == 0).all()


@pytest.mark.parametrize("kernel_length", [1, 2, 7, 12, 30])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_energy_is_that_of_the_full_convolution(length: int, kernel_length: int) -> None:
    u, kernel = (x.requires_grad_() for x in signals(length, kernel_length - 1))

    def energy(u: Tensor, kernel: Tensor) -> Tensor:
        return branch_energies(kernel.unsqueeze(0), autocorrelation(u.unsqueeze(-1), torch.zeros_like(u[0, :, 0]), 0))[
            0
        ]

    margin = kernel.shape[-1]
    explicit = long_conv_reference(F.pad(u, (margin, margin)), kernel).square().sum((0, 2))
    assert_agree(energy(u, kernel), explicit, 1e-12)
    assert torch.autograd.gradcheck(energy, (u, kernel), fast_mode=True)


def test_fft_length_is_good() -> None:
    for length in (*range(1, 400), 6607, 26400):
        n = plain.fft_length(length)
        assert n >= length and n % 16 == 0
        for prime in (2, 3, 5, 7):
            while n % prime == 0:
                n //= prime
        assert n == 1


# Engines


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("convolve", lambda x, kernel: (x, kernel, torch.randn(6), 7, 2)),
        ("convolve", lambda x, kernel: (x, kernel, None, 9, 2)),
        ("convolve_backward", lambda x, kernel: (torch.randn(2, 6, 4, 5), x, kernel, 7, 2)),
        ("autocorrelation", lambda x, kernel: (x, torch.randn(3), 2)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own tensors
def test_pytorch_finds_the_operations_in_order(operation: str, arguments, channels_last: bool) -> None:
    """Schema, fake implementation, autograd and dynamic shapes, as torch.library checks them."""
    x = torch.randn(2, 3, 4, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    given = [
        own.requires_grad_() if isinstance(own, Tensor) else own for own in arguments(x, torch.randn(6, 2 * 28 - 1))
    ]
    torch.library.opcheck(getattr(torch.ops.mrconvnext, operation).default, given)


def test_an_engine_can_be_chosen_for_a_while() -> None:
    from mrconvnext.engines import serving

    x = torch.zeros(1)
    with mrconvnext.engine("auto"):
        fastest = cpu if cpu.library().functions else plain
        assert serving(x) is fastest and str(mrconvnext.engine()).startswith("auto: on CPUs ")
        with mrconvnext.engine("plain"):
            assert serving(x) is plain and str(mrconvnext.engine()).startswith("plain")
        assert serving(x) is fastest
    with pytest.raises(ValueError, match="engine must be one of auto, plain, got 'fast'"):
        mrconvnext.engine("fast")
