"""SGConv's and MultiresConv's kernels, against the numbers that the authors' code gives, and in layers and models."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from helpers import assert_agree, randomize, small_model
from safetensors import safe_open

import mrconvnext
from mrconvnext import MRConv1d, MRConv2d, from_convnext
from mrconvnext.kernels import KERNELS, MultiresKernel, SGConvKernel, create_kernels
from mrconvnext.state import ENTRIES

# Parameters with the two-sided kernels that the published code of SGConv and MultiresConv makes of them, the skip term
# included: its outputs for an impulse at the first and at the last of L positions.
PUBLISHED = Path(__file__).with_name("data") / "published_kernels.safetensors"
SINGLE = [name for name, kind in KERNELS.items() if kind.is_single]


def published() -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    with safe_open(PUBLISHED, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return {
        name: (case, {key.rpartition("/")[2]: x for key, x in tensors.items() if key.startswith(f"{name}/")})
        for name, case in cases.items()
    }


@pytest.mark.parametrize("name", published())
def test_kernels_are_those_of_the_published_code(name: str) -> None:
    case, tensors = published()[name]
    expected = tensors.pop("expected")
    kernels = create_kernels(case.pop("kind"), len(expected), [case.pop("length")], case.pop("directions"), **case)
    kernels.load_state_dict(tensors)
    assert_agree(kernels()[0], expected, 1e-6)


def test_published_cases_cover_every_mode() -> None:
    args = [case["kernel_args"] for case, _ in published().values()]
    for name, value in (
        *(("merge", "sum"), ("interpolation", "nearest"), ("start", "cos"), ("decay", "learnable")),
        *(("decay", "fixed"), ("init_scale", 1), ("decay_max", 3), ("tree", "uniform"), ("wavelet", "db4")),
    ):
        assert any(case.get(name) == value for case in args), (name, value)


# How they start


@pytest.mark.parametrize("directions", [1, 2])
def test_sgconv_starts_with_a_norm_of_1_that_then_stays_what_it_was(directions: int) -> None:
    kernels = SGConvKernel(5, length=64, directions=directions, taps=8)  # of 8, 8, 16 and 32 lags
    torch.nn.init.zeros_(kernels.skip)
    lags = kernels()[0]
    assert_agree(lags[:, 63:].norm(dim=1), torch.ones(5), 1e-6)
    with torch.no_grad():
        kernels.values.mul_(3)
    assert_agree(kernels()[0], 3 * lags, 1e-6)


def test_sgconv_decays_by_a_half_from_scale_to_scale() -> None:
    kernels = SGConvKernel(4000, length=64, directions=1, taps=8, interpolation="nearest")
    torch.nn.init.zeros_(kernels.skip)
    size = (kernels().detach()[0, :, 63:] * kernels.initial_norm[:, 0]).square().mean(0).sqrt()
    pieces = [size[start:end].mean() for start, end in ((0, 8), (8, 16), (16, 32), (32, 64))]
    assert [a / b for a, b in zip(pieces, pieces[1:])] == pytest.approx([2, 2, 2], rel=0.02)


def test_sgconv_cosines_have_as_many_turns_as_their_channel_is_late() -> None:
    values = SGConvKernel(6, length=64, directions=2, taps=32, start="cos").values.detach()
    turns = torch.arange(6)[:, None] * torch.linspace(0, 1, 32)
    for own in values:
        assert torch.equal(own[:, 0], own[:, 1])
        assert torch.allclose(own[:, 0].sum(1).sort()[0], (2 * math.pi * turns).cos().sum(1).sort()[0], atol=1e-4)


def test_learned_exponents_start_in_their_range() -> None:
    learned, fixed = (
        SGConvKernel(500, 64, 1, taps=8, decay=decay, decay_min=1, decay_max=3) for decay in ("learnable", "fixed")
    )
    assert learned.exponent.requires_grad and not fixed.exponent.requires_grad
    assert 1 <= learned.exponent.min() < 1.1 and 2.9 < learned.exponent.max() <= 3


def test_multires_starts_as_published() -> None:
    kernels = MultiresKernel(4000, length=50, directions=1, taps=4)
    assert kernels.low.detach().abs().max() == pytest.approx(0.5, rel=0.01)
    assert kernels.mixing.detach().abs().max() == pytest.approx((1 / (kernels.depth + 2)) ** 0.5, rel=0.01)
    assert kernels.mixing.shape[-1] == kernels.depth + 2 and kernels.depth == 5
    alone = MultiresKernel(4000, length=50, directions=1, taps=4, independent_skip=True)
    assert alone.mixing.detach()[..., -1].abs().max() == pytest.approx(1, rel=0.01)
    haar = MultiresKernel(2, length=50, directions=1, wavelet="haar")
    assert_agree(haar.low[0, 0, 0].detach(), torch.full((2,), 0.5**0.5), 1e-6)


def test_both_directions_of_multires_are_the_same_kernel_mirrored() -> None:
    kernels = MultiresKernel(3, length=20, directions=2)
    with torch.no_grad():
        for parameter in kernels.parameters():
            parameter[:, :, 1] = parameter[:, :, 0]
    assert_agree(kernels(), kernels().flip(-1), 1e-6)


# In layers


@pytest.mark.parametrize("kernel", SINGLE)
def test_a_layer_is_one_kernel_without_norm(kernel: str) -> None:
    layer = MRConv1d(4, 100, kernel=kernel)
    x = torch.randn(2, 4, 100)
    assert layer.branch_lengths == [100] and (layer.alpha == 1).all() and layer.options.norm == "none"
    assert_agree(layer(x), mrconvnext.long_conv(x, layer.branch_kernels()[0]), 1e-6)


@pytest.mark.parametrize("kernel", SINGLE)
def test_no_weight_is_without_a_gradient(kernel: str) -> None:
    layer = MRConv2d(3, 9, kernel=kernel)
    layer(torch.randn(2, 3, 9, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel", SINGLE)
def test_kernels_are_computed_in_full_precision_under_autocast(kernel: str, dtype: torch.dtype) -> None:
    kernels = create_kernels(kernel, 3, [100], 2, dtype=dtype)
    plain = kernels()
    assert plain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels(), plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kernel="sgconv", min_length=4), "min_length is for kernels of several branches"),
        (dict(kernel="multires", concat_decay=2.0), "concat_decay is for kernels of several branches"),
        (dict(kernel="fourier", concat_decay=0.5), "concat_decay must be a finite number of at least 1"),
        (dict(kernel="sgconv", taps=0), "taps must be an integer of at least 1"),
        (dict(kernel="multires", taps=1), "taps must be at least 2"),
        (dict(kernel="sgconv", kernel_args={"merge": "add"}), "merge must be one of cat, sum, got 'add'"),
        (dict(kernel="sgconv", kernel_args={"decay": 2}), "decay must be one of scales, learnable, fixed, got 2"),
        (dict(kernel="sgconv", kernel_args={"decay_min": 3}), "decay_min must not be above decay_max, got 3 and 2.0"),
        (dict(kernel="sgconv", kernel_args={"decay_min": "a"}), "must be numbers above 0, got 'a'"),
        (dict(kernel="sgconv", kernel_args={"init_scale": 20}), "init_scale must be an integer from 0 to 1, .* got 20"),
        (dict(kernel="sgconv", kernel_args="merge"), "kernel_args must be names with their values, got 'merge'"),
        (dict(kernel=["sgconv"]), "kernel must be one of"),
        (dict(kernel="multires", kernel_args={"wavelet": 5}), "wavelet must be the name of a discrete one .* got 5"),
        (dict(kernel="sgconv", kernel_args={"init_scale": -1}), "init_scale must be an integer from 0"),
        (dict(kernel="multires", kernel_args={"tree": "oak"}), "tree must be one of fading, uniform, got 'oak'"),
        (dict(kernel="multires", kernel_args={"tree": "uniform"}), "memory_size must be an integer of at least 2"),
        (dict(kernel="multires", kernel_args={"memory_size": 5}), "memory_size is for tree='uniform'"),
        (dict(kernel="multires", kernel_args={"wavelet": "oak"}), "oak"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MRConv1d(4, 100, **options)


@pytest.mark.parametrize(("kernel", "allowed"), [("sgconv", "merge, "), ("fourier", "none")])
def test_unknown_arguments_of_kernels_are_named(kernel: str, allowed: str) -> None:
    with pytest.raises(TypeError, match=f"'tree' is not an argument of kernel='{kernel}', which has {allowed}"):
        MRConv1d(4, 100, kernel=kernel, kernel_args={"tree": "fading"})


@pytest.mark.parametrize(
    ("options", "others"),
    [
        (dict(kernel="sgconv", taps=4), dict(kernel_args={"decay_max": 3})),
        (dict(kernel="sgconv", taps=4), dict(kernel_args={"merge": "sum"})),
        (dict(kernel="fourier", concat_decay=2.0), dict(concat_decay=4.0)),
        (dict(kernel="multires"), dict(kernel_args={"tree": "uniform", "memory_size": 7})),
    ],
)
def test_weights_of_other_options_are_refused(options: dict, others: dict) -> None:
    one, other = MRConv1d(4, 64, **options), MRConv1d(4, 64, **{**options, **others})
    for source, target in ((one, other), (other, one)):
        with pytest.raises(RuntimeError, match="another kernel_args or concat_decay than the layer's"):
            target.load_state_dict(source.state_dict())
    MRConv1d(4, 64, **{**options, **others}).load_state_dict(other.state_dict())
    other.reparameterize()
    one.load_state_dict(other.state_dict())  # which has no such options any more


# In models


@pytest.mark.parametrize("kernel", SINGLE)
def test_models_deploy_and_travel(kernel: str, tmp_path: Path) -> None:
    model = small_model(kernel=kernel)
    x = torch.randn(2, 3, 64, 96)
    expected = model(x)
    mrconvnext.save(model, tmp_path / "trained")
    mrconvnext.save(model, tmp_path / "fused", fused=True)
    for form in ("trained", "fused"):
        loaded = timm.create_model(f"local-dir:{tmp_path / form}", pretrained=True).eval()
        assert_agree(loaded(x), expected, 1e-5)
    assert_agree(model.reparameterize()(x), expected, 1e-5)


@pytest.mark.parametrize("kernel", SINGLE)
def test_any_convnext_is_a_start(kernel: str) -> None:
    convnext = randomize(timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48))).eval()
    model = from_convnext(convnext, img_size=64, kernel=kernel).eval()
    x = torch.randn(2, 3, 64, 64)
    assert_agree(model(x), convnext(x), 1e-5)


@pytest.mark.parametrize("kernel", SINGLE)
def test_moved_to_twice_the_size_they_make_of_a_smooth_image_what_they_made(kernel: str) -> None:
    layer = randomize(MRConv2d(3, 9, kernel=kernel, kernel_size=3)).double()
    torch.nn.init.zeros_(layer.weight)
    x = torch.zeros(1, 3, 18, 18, dtype=torch.float64)
    x[..., ::2, ::2] = torch.randn(1, 3, 9, 9)  # of the smaller grid's pixels alone
    expected = layer(x[..., ::2, ::2].contiguous())
    layer.set_grid(18)
    assert_agree(layer(x)[..., ::2, ::2], expected, 1e-12)


@pytest.mark.parametrize("kernel", SINGLE)
def test_models_are_scripted_traced_and_exported(kernel: str) -> None:
    model = small_model(kernel=kernel)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert_agree(torch.jit.script(model)(x), expected, 1e-5)
    assert_agree(torch.fx.symbolic_trace(model)(x), expected, 1e-5)
    deployed = small_model(kernel=kernel, exportable=True)
    deployed.load_state_dict(model.state_dict())
    exported = torch.export.export(deployed.reparameterize(), (x,))
    assert_agree(exported.module()(x), expected, 1e-5)


# One after another


@pytest.mark.parametrize("kernel", [name for name, kind in KERNELS.items() if not kind.is_single])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_concatenated_branches_follow_each_other(kernel: str, bidirectional: bool) -> None:
    layer = MRConv1d(3, 100, kernel=kernel, concat_decay=2.0, min_length=8, bidirectional=bidirectional, taps=4)
    assert layer.branch_lengths == [8, 8, 16, 68]
    lag = torch.arange(100)
    for own, start, length in zip(layer.kernels(), (0, 8, 16, 32), layer.branch_lengths):
        ahead, behind = own[:, 99:].abs().sum(0), own[:, :100].flip(-1).abs().sum(0)
        inside = (lag >= start) & (lag < start + length)
        assert ahead[~inside].sum() == 0 < ahead[inside].sum()
        assert behind[~inside].sum() == 0
        if bidirectional:
            assert behind[inside].sum() > 0
    if kernel in ("sparse", "fourier_sparse"):
        assert (layer.kernels.lags.amax((1, 2, 3)) < torch.tensor(layer.branch_lengths)).all()


def test_concatenated_branches_are_those_from_lag_0_moved() -> None:
    layer = MRConv1d(3, 64, kernel="fourier", concat_decay=1.0, min_length=8)
    alone = create_kernels("fourier", 3, layer.branch_lengths, 1)
    alone.coefficients = layer.kernels.coefficients
    for own, other, start in zip(layer.kernels(), alone(), (0, 8, 16, 32)):
        length = other.shape[-1] // 2 + 1
        assert_agree(own[:, 63 + start :][:, :length], other[:, length - 1 :][:, : 64 - start], 1e-6)


@pytest.mark.parametrize("branch_norm", ["kernel", "parseval", "batch", "none"])
def test_decay_of_concatenated_branches_is_fixed(branch_norm: str) -> None:
    torch.manual_seed(0)
    weak, strong = (
        MRConv1d(3, 100, kernel="sparse", concat_decay=decay, min_length=8, branch_norm=branch_norm, seed=1).double()
        for decay in (2.0, 1.0)
    )
    strong.load_state_dict({name: x for name, x in weak.state_dict().items() if name not in ENTRIES})
    with torch.no_grad():
        strong.alpha.mul_(2.0 ** -torch.arange(len(weak.alpha))[:, None])
    x = torch.randn(4, 3, 100, dtype=torch.float64)
    for _ in range(2):
        assert_agree(weak.eval()(x), strong.eval()(x), 1e-12)
        weak.train()(x), strong.train()(x)
    expected = weak.eval()(x)
    weak.reparameterize()
    assert_agree(weak(x), expected, 1e-12)
