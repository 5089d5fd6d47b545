import pytest
import torch
from helpers import assert_agree

from mrconvnext.longconv import autocorrelation, branch_energies, fft_length, long_conv, long_conv_reference, spectrum

LENGTHS = (1, 2, 7, 49, 129, 1134)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def signals(length: int, reach: int, dtype: torch.dtype, two_sided: bool = True):
    generator = torch.Generator().manual_seed(length + reach)
    u = torch.randn(2, 3, length, generator=generator, dtype=torch.float64).to(dtype)
    kernel = torch.randn(3, 2 * reach + 1, generator=generator, dtype=torch.float64).to(dtype)
    if not two_sided:
        kernel[:, :reach] = 0
    return u, kernel


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("kernel_length", LENGTHS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_direct_sum(length: int, kernel_length: int, two_sided: bool, dtype: torch.dtype) -> None:
    u, kernel = signals(length, kernel_length - 1, dtype, two_sided)
    actual = long_conv(u, kernel)
    assert actual.dtype == dtype
    assert_agree(actual, long_conv_reference(u.double(), kernel.double()), TOLERANCE[dtype])


def test_reference_is_the_definition() -> None:
    u, kernel = signals(7, 3, torch.float64)
    expected = torch.zeros_like(u)
    for t in range(7):
        for s in range(7):
            if abs(t - s) <= 3:
                expected[..., t] += kernel[:, 3 + t - s] * u[..., s]
    assert_agree(long_conv_reference(u, kernel), expected, 1e-14)


@pytest.mark.parametrize(("length", "kernel_length"), [(1, 1), (7, 2), (7, 7), (7, 12)])
def test_gradients(length: int, kernel_length: int) -> None:
    u, kernel = (x.requires_grad_() for x in signals(length, kernel_length - 1, torch.float64))
    assert torch.autograd.gradcheck(long_conv, (u, kernel))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 11, 16])
def test_gradients_of_the_spectrum(n: int) -> None:
    x = torch.randn(2, min(n, 7), dtype=torch.float64, requires_grad=True)
    assert torch.equal(spectrum(x, n), torch.fft.rfft(x, n))
    assert torch.autograd.gradcheck(spectrum, (x, n))
    assert torch.autograd.gradgradcheck(spectrum, (x, n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    u, kernel = signals(129, 128, torch.float32)
    u, kernel = u.to(dtype), kernel.to(dtype)
    expected = long_conv(u.float(), kernel.float()).to(dtype)
    assert torch.equal(long_conv(u, kernel), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(long_conv(u, kernel), expected)


@pytest.mark.parametrize("function", [long_conv, long_conv_reference])
def test_bad_arguments_are_named(function) -> None:
    u, kernel = torch.randn(1, 3, 7), torch.randn(3, 5)
    with pytest.raises(ValueError, match="kernel must have an odd number of lags.*got 4"):
        function(u, kernel[:, :4])
    with pytest.raises(ValueError, match="kernel must have the channels of u, 3, got 2"):
        function(u, kernel[:2])
    with pytest.raises(ValueError, match=r"u must have at least 1 position, got \[1, 3, 0\]"):
        function(u[..., :0], kernel)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=f"floating-point tensors, got {dtype}"):
            function(u.to(dtype), kernel)


def test_fft_length_is_good() -> None:
    for length in (*range(1, 400), 6607, 26400):
        n = fft_length(length)
        assert n >= length and n % 16 == 0
        for prime in (2, 3, 5, 7):
            while n % prime == 0:
                n //= prime
        assert n == 1


@pytest.mark.parametrize("kernel_length", [1, 2, 7, 12, 30])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_energy_is_that_of_the_full_convolution(length: int, kernel_length: int) -> None:
    u, kernel = (x.requires_grad_() for x in signals(length, kernel_length - 1, torch.float64))

    weights = torch.rand(kernel.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def energy(u: torch.Tensor, kernel: torch.Tensor, n: int) -> torch.Tensor:
        return branch_energies(autocorrelation(spectrum(u, n), n, length), [kernel], weights)[0]

    margin = kernel.shape[-1]
    explicit = long_conv_reference(torch.nn.functional.pad(u, (margin, margin)), kernel * weights).square().sum((0, 2))
    for n in (2 * length - 1, 2 * length, 64, 97):
        assert_agree(energy(u, kernel, n), explicit, 1e-12)
        assert torch.autograd.gradcheck(energy, (u, kernel, n))
