import copy

import pytest
import torch
from helpers import assert_agree

from mrconvnext.kernels import KERNELS, create_kernels

LENGTHS = (1, 2, 7, 49, 129, 1134)
BRANCHED = [name for name, kind in KERNELS.items() if not kind.is_single]


def kernels(kind: str, lengths=(49,), directions: int = 1, channels: int = 3, **options) -> torch.nn.Module:
    return create_kernels(kind, channels, lengths, directions, **options)


def causal(module: torch.nn.Module) -> torch.Tensor:
    """Returns the kernels (N, C, L) at the lags from 0 on."""
    two_sided = module().detach()
    return two_sided[..., two_sided.shape[-1] // 2 :]


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [(kind, (n,)) for kind in KERNELS for n in LENGTHS]
    + [(kind, lengths) for kind in BRANCHED for lengths in ((7, 14, 49), (1, 2))],
)
@pytest.mark.parametrize("directions", [1, 2])
def test_any_length_with_gradients(kind: str, lengths: tuple[int, ...], directions: int) -> None:
    module = kernels(kind, lengths, directions)
    values, longest = module(), lengths[-1]
    assert values.shape == (len(lengths), 3, 2 * longest - 1) and values.dtype == torch.float32
    lag = torch.arange(1 - longest, longest)
    for own, length in zip(values, lengths):
        assert (own[:, lag.abs() >= length] == 0).all()
    if directions == 1:
        assert (values[..., : longest - 1] == 0).all()
    values.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("kind", BRANCHED)
def test_parameters_do_not_grow_with_length(kind: str) -> None:
    counts = {sum(p.numel() for p in kernels(kind, (length,)).parameters()) for length in (49, 129, 1134)}
    assert len(counts) == 1


@pytest.mark.parametrize("kind", BRANCHED)
@pytest.mark.parametrize("length", LENGTHS)
def test_starts_at_the_same_scale_whatever_the_length(kind: str, length: int) -> None:
    torch.manual_seed(0)
    energy = causal(kernels(kind, (length,), channels=2000)).square().sum(-1).mean().item()
    assert energy == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_computes_in_float32_or_float64(kind: str, dtype: torch.dtype) -> None:
    module = kernels(kind, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        values = module()
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(values, module())


@pytest.mark.parametrize("length", [1, 2, 7, 16, 31, 49])
@pytest.mark.parametrize("modes", [4, 16])
def test_fourier_is_the_unitary_inverse_transform(length: int, modes: int) -> None:
    module = kernels("fourier", (length, 64), directions=2, modes=modes, dtype=torch.float64)
    spectrum = torch.view_as_complex(module.coefficients.detach().unflatten(-1, (-1, 2)))  # (N, C, D, modes)
    expected = torch.fft.irfft(spectrum[0], n=length, norm="ortho")  # (C, D, length)
    actual = module()[0]
    middle = actual.shape[-1] // 2
    assert_agree(actual[:, middle], expected[:, 0, 0] + expected[:, 1, 0], 1e-12)
    if length > 1:
        assert_agree(actual[:, middle + 1 : middle + length], expected[:, 0, 1:], 1e-12)
        assert_agree(actual[:, middle - length + 1 : middle].flip(-1), expected[:, 1, 1:], 1e-12)


def test_fourier_basis_is_exact_at_long_lengths() -> None:
    """Angles of hundreds of turns lose digits in float32 unless whole turns are taken off before."""
    module = kernels("fourier", (100_000,))
    spectrum = torch.view_as_complex(module.coefficients.detach().double().unflatten(-1, (-1, 2)))
    expected = torch.fft.irfft(spectrum[0, :, 0], n=100_000, norm="ortho")
    assert_agree(causal(module)[0], expected, 1e-6)


def test_dilated_spacing_grows_with_length() -> None:
    short, long = causal(kernels("dilated", (32, 64), taps=8))
    assert short.nonzero()[:, 1].unique().tolist() == list(range(0, 32, 4))
    assert long.nonzero()[:, 1].unique().tolist() == list(range(0, 64, 8))


def test_sum_of_both_kinds_is_rescaled() -> None:
    both = kernels("fourier_sparse", (28, 49), directions=2, seed=3)
    smooth, sparse = (kernels(kind, (28, 49), directions=2, seed=3) for kind in ("fourier", "sparse"))
    with torch.no_grad():
        both.fourier_scale.uniform_(-1, 1)
        both.sparse_scale.uniform_(-1, 1)
        smooth.coefficients.copy_(both.coefficients * both.fourier_scale[..., None])
        sparse.values.copy_(both.values * both.sparse_scale[..., None])
    assert torch.equal(both.lags, sparse.lags)
    assert_agree(both(), smooth() + sparse(), 1e-6)


# Sparse lags


def test_sparse_lags_have_a_seed_of_their_own() -> None:
    def sparse(global_seed: int, own_seed: int) -> torch.nn.Module:
        torch.manual_seed(global_seed)
        module = kernels("sparse", (1134,), directions=2, seed=own_seed)
        module.drawn_after = torch.rand(3)
        return module

    a, b, c = sparse(0, 1), sparse(7, 1), sparse(0, 2)
    assert torch.equal(a.lags, b.lags) and not torch.equal(a.values, b.values)
    assert torch.equal(a.values, c.values) and not torch.equal(a.lags, c.lags)
    assert torch.equal(a.drawn_after, c.drawn_after)
    assert not torch.equal(a.lags[0, 0, 0].sort()[0], a.lags[0, 1, 0].sort()[0])
    assert not torch.equal(a.lags[0, 0, 0].sort()[0], a.lags[0, 0, 1].sort()[0])
    assert ((causal(kernels("sparse", (1134,))) != 0).sum(-1) == 16).all()


def test_sparse_takes_no_more_taps_than_the_shortest_length() -> None:
    assert (causal(kernels("sparse", (7, 14), taps=16)) != 0).sum(-1).tolist() == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.parametrize("kind", ["sparse", "fourier_sparse"])
def test_lags_travel_with_the_weights(kind: str) -> None:
    source, target = (kernels(kind, (28, 49), directions=2, seed=seed) for seed in (1, 2))
    state = source.state_dict()
    assert state["lags"].shape == (2, 3, 2, 16) and not torch.equal(state["lags"], target.state_dict()["lags"])
    target.load_state_dict(state)
    assert torch.equal(target(), source())
    assert torch.equal(copy.deepcopy(target)(), source())
    assert not any("lags" in name or "positions" in name for name, _ in target.named_buffers())


@pytest.mark.parametrize("kind", ["sparse", "fourier_sparse"])
def test_lags_survive_casts_and_empty_memory(kind: str) -> None:
    module = kernels(kind, (28, 1134), directions=2)
    lags = module.lags.clone()
    for move in (module.bfloat16, module.float, module.half, module.double, lambda: module.to("meta")):
        move()
        assert torch.equal(module.lags, lags)
    module.to_empty(device="cpu")
    assert torch.equal(module.lags, lags)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lags: lags + 28, "lie in 0 … length"),
        (lambda lags: lags - 60, "lie in 0 … length"),
        (lambda lags: torch.zeros_like(lags), "different from each other"),
        (lambda lags: lags.float(), "must be integers"),
        (lambda lags: lags[..., :5], "must be integers"),
    ],
)
def test_bad_lags_are_refused(change, words: str) -> None:
    module = kernels("fourier_sparse", (28, 49), directions=2)
    state = module.state_dict()
    before = module().detach()
    state["lags"] = change(state["lags"])
    with pytest.raises(RuntimeError, match=words):
        module.load_state_dict(state)
    assert torch.equal(module(), before)
    del state["lags"]
    with pytest.raises(RuntimeError, match="lags is missing"):
        module.load_state_dict(state, strict=False)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="kernel must be one of .*fourier_sparse.*'gaussian'"):
        kernels("gaussian")
