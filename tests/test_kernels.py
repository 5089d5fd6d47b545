import pytest
import torch
from helpers import assert_agree

from mrconvnext.kernels import KERNELS, TwoSidedKernel, create_kernel

LENGTHS = (1, 2, 7, 49, 129, 1134)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_with_gradients(kind: str, length: int) -> None:
    kernel = create_kernel(kind, channels=5, length=length)
    values = kernel()
    assert values.shape == (5, length) and values.dtype == torch.float32
    values.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in kernel.parameters())


@pytest.mark.parametrize("kind", KERNELS)
def test_parameters_do_not_grow_with_length(kind: str) -> None:
    counts = {sum(p.numel() for p in create_kernel(kind, 5, length).parameters()) for length in (49, 129, 1134)}
    assert len(counts) == 1


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("length", LENGTHS)
def test_starts_at_the_same_scale_whatever_the_length(kind: str, length: int) -> None:
    torch.manual_seed(0)
    energy = create_kernel(kind, channels=2000, length=length)().square().sum(1).mean().item()
    assert energy == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_computes_in_float32_or_float64(kind: str, dtype: torch.dtype) -> None:
    kernel = create_kernel(kind, 5, 49, dtype=dtype)
    assert kernel().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_fourier_is_the_inverse_transform_of_its_modes() -> None:
    kernel = create_kernel("fourier", 3, 49, modes=4, dtype=torch.float64)
    lag = torch.arange(49, dtype=torch.float64)
    real, imaginary = kernel.coefficients.detach().unbind(-1)
    expected = real[:, :1].expand(3, 49).clone()
    for f in range(1, 4):
        angle = 2 * torch.pi * f * lag / 49
        expected += 2 * (real[:, f : f + 1] * angle.cos() - imaginary[:, f : f + 1] * angle.sin())
    assert_agree(kernel(), expected / 7, 1e-12)


def test_dilated_spacing_grows_with_length() -> None:
    short, long = (create_kernel("dilated", 3, length, taps=8)() for length in (32, 64))
    assert short.nonzero()[:, 1].unique().tolist() == list(range(0, 32, 4))
    assert long.nonzero()[:, 1].unique().tolist() == list(range(0, 64, 8))


def test_sparse_lags_have_a_seed_of_their_own() -> None:
    def sparse(global_seed: int, own_seed: int):
        torch.manual_seed(global_seed)
        return create_kernel("sparse", 3, 1134, generator=torch.Generator().manual_seed(own_seed))

    a, b, c = sparse(0, 1), sparse(7, 1), sparse(0, 2)
    assert torch.equal(a.lags, b.lags) and not torch.equal(a.values, b.values)
    assert torch.equal(a.values, c.values) and not torch.equal(a.lags, c.lags)
    assert "lags" in a.state_dict()
    assert not torch.equal(a.lags[0].sort()[0], a.lags[1].sort()[0])
    assert ((a() != 0).sum(1) == 16).all()


def test_sparse_takes_as_many_taps_as_there_are_lags() -> None:
    assert (create_kernel("sparse", 3, 7, taps=16)() != 0).sum(1).tolist() == [7, 7, 7]


def test_two_directions_add_at_lag_zero() -> None:
    causal, anticausal = create_kernel("fourier", 3, 7), create_kernel("fourier", 3, 7)
    kernel = TwoSidedKernel(causal, anticausal)()
    assert torch.equal(kernel[:, 7:], causal()[:, 1:])
    assert torch.equal(kernel[:, :6], anticausal()[:, 1:].flip(1))
    assert torch.equal(kernel[:, 6], causal()[:, 0] + anticausal()[:, 0])
    assert (TwoSidedKernel(causal)()[:, :6] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(kind="gaussian", length=7), ["kernel", "gaussian", "fourier_sparse"]),
        (dict(kind="fourier", length=0), ["length", "0"]),
        (dict(kind="fourier", length=7, modes=0), ["modes", "0"]),
        (dict(kind="sparse", length=7, taps=-1), ["taps", "-1"]),
    ],
)
def test_bad_arguments_are_named(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        create_kernel(channels=3, **arguments)
    assert all(word in str(error.value) for word in words)
