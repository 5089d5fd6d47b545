"""The norm that takes its statistics from the Fourier domain, against the definition: every branch convolved."""

import copy
import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_agree, each_engine, randomize
from torch import Tensor

import mrconvnext
from mrconvnext import MRConv2d, long_conv_reference
from mrconvnext.engines import plain
from mrconvnext.grid import to_image, to_sequence
from mrconvnext.norms import branch_statistics

GRID = (9, 11)


def parseval_layer(**options) -> MRConv2d:
    torch.manual_seed(0)
    layer = MRConv2d(3, GRID, **{"kernel_size": 3, "min_length": 28, "branch_norm": "parseval", "seed": 1, **options})
    return randomize(layer).train()


def explicit(layer: MRConv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the layer's output, branch means and branch variances in training, with every branch convolved."""
    mean = x.mean((0, 2, 3))
    v = to_sequence(x - mean[:, None, None], layer.guard)
    ones = to_sequence(torch.ones_like(x[:1]), layer.guard)
    y = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=3)
    means, variances = [], []
    for i, kernel in enumerate(layer.branch_kernels()):
        to_ones = to_image(long_conv_reference(ones, kernel), GRID[0], layer.guard)[0]
        to_deviations = full_response(v, kernel * pair_share(GRID, layer.guard, kernel.shape[1]).sqrt())
        variances.append(
            to_deviations.square().sum((0, 2)) / (x.numel() / 3) + mean**2 * to_ones.var((1, 2), unbiased=False)
        )
        means.append(mean * to_ones.mean((1, 2)))
        gain = layer.norm.weight[i] * (variances[i] + layer.norm.eps).rsqrt()
        c = to_image(long_conv_reference(to_sequence(x, layer.guard), kernel), GRID[0], layer.guard)
        c = gain[:, None, None] * (c - means[i][:, None, None]) + layer.norm.bias[i][:, None, None]
        y = y + layer.alpha[i][:, None, None] * c
    return y, torch.stack(means), torch.stack(variances)


def pair_share(size: tuple[int, int], guard: int, taps: int) -> Tensor:
    """Returns the share of the pixels that have a pixel at each of ``taps`` lags, counted one by one."""
    (height, width), reach = size, taps // 2
    places = {row * (width + guard) + column for row in range(height) for column in range(width)}
    shares = [sum(place + lag in places for place in places) for lag in range(-reach, reach + 1)]
    return torch.tensor(shares, dtype=torch.float64) / len(places)


def full_response(v: Tensor, kernel: Tensor) -> Tensor:
    """Returns the convolution of sequences with a kernel, beyond their ends too."""
    n = v.shape[2] + kernel.shape[1] - 1
    return torch.fft.irfft(torch.fft.rfft(v, n) * torch.fft.rfft(kernel, n), n)


def smooth_images(spread_over_mean: float) -> Tensor:
    noise = torch.randn(4, 3, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = F.avg_pool2d(noise, 4, stride=1)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return x + spread_over_mean * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kernel", ["fourier_sparse", "dilated"])
@pytest.mark.parametrize(("mean", "tolerance"), [(0, 1e-5), (10, 1e-5), (300, 1e-4)])
def test_float32_equals_explicit_float64(mean: float, tolerance: float, kernel: str, bidirectional: bool) -> None:
    """Variance, output, and the gradients of both for the input and every parameter."""
    layer = parseval_layer(kernel=kernel, bidirectional=bidirectional)
    layer.norm.momentum = 1.0
    exact = copy.deepcopy(layer).double()
    x = smooth_images(mean).float()
    x64 = x.double().requires_grad_()
    x.requires_grad_()
    weights = torch.randn(4, 3, *GRID)

    y, means, variances = explicit(exact, x64)
    (y * weights).sum().backward()
    (layer(x) * weights).sum().backward()

    pixels = x.numel() // 3
    assert_agree(layer.norm.running_var, variances * pixels / (pixels - 1), tolerance)
    assert ((layer.norm.running_mean - means).abs() / variances.sqrt()).max() < tolerance
    assert_agree(x.grad, x64.grad, tolerance)
    for (name, actual), expected in zip(layer.named_parameters(), exact.parameters()):
        error = (actual.grad - expected.grad).abs().max() / expected.grad.abs().max()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("mean", [0, 3])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.slow
@pytest.mark.parametrize("size", [(4, 4), (9, 5), (32, 32), (1, 1), (2, 2)])
def test_statistics_are_those_of_batch_norm(size: tuple[int, int], smooth: bool, mean: float) -> None:
    """But for chance, on images that are alike all over: zeros around them and guard columns included."""
    channels = 4096 if size == (2, 2) else 48  # there the median of a few kernels is left to chance
    grid = (max(4, size[0]), max(4, size[1]))
    layers = {norm: MRConv2d(channels, grid, branch_norm=norm, seed=1, min_length=28) for norm in ("parseval", "batch")}
    layers["batch"].kernels.load_state_dict(layers["parseval"].kernels.state_dict())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(256, channels, size[0] + 2, size[1] + 2, generator=generator)
    x = (3 * F.avg_pool2d(noise, 3, 1) if smooth else noise[..., 1:-1, 1:-1]) + mean
    with torch.no_grad():
        for layer in layers.values():
            layer.norm.momentum = 1.0
            layer.train()(x)
    own, norm = layers["parseval"].norm, layers["batch"].norm
    shape = own.running_var.shape
    for i, (mean, variance) in enumerate(zip(norm.running_mean.view(shape), norm.running_var.view(shape))):
        ratio = own.running_var[i] / variance
        assert ratio.median() == pytest.approx(1, abs=0.03) and (ratio - 1).abs().quantile(0.9) < 0.3
        assert ((own.running_mean[i] - mean).abs() < 0.1 * variance.sqrt())[:48].all()


@pytest.mark.parametrize("noise", [0.1, 0.01])
def test_variance_of_a_kernel_that_passes_almost_nothing(noise: float) -> None:
    """Smooth kernels on images that alternate from pixel to pixel: sums over lags all but cancel."""
    torch.manual_seed(0)
    layer = MRConv2d(3, (28, 28), kernel_size=0, kernel="fourier", branch_norm="parseval", seed=1)
    layer.norm.momentum = 1.0
    generator = torch.Generator().manual_seed(0)
    stripes = (torch.arange(28) % 2 * 2 - 1).expand(4, 3, 28, 28)
    x = stripes + noise * torch.randn(4, 3, 28, 28, generator=generator)
    x -= x.mean((0, 2, 3), keepdim=True)
    with torch.no_grad():
        layer(x)
        layer.double()
        v = (x.double() - x.double().mean((0, 2, 3), keepdim=True)).flatten(2)
        pixels = 4 * 28 * 28
        for variance, kernel in zip(layer.norm.running_var, layer.branch_kernels()):
            response = full_response(v, kernel * pair_share((28, 28), 0, kernel.shape[1]).sqrt())
            assert_agree(variance, response.square().sum((0, 2)) / (pixels - 1))
            assert variance.max() < 0.2  # the images' own is 1


def test_variance_alone_has_the_explicit_gradients() -> None:
    layer = parseval_layer(dtype=torch.float64)
    x = smooth_images(10).requires_grad_()
    centre, count = x.mean((0, 2, 3)), torch.tensor(x.numel() / 3)
    actual = branch_statistics(x, layer.kernels(), centre, count, layer.guard)[1]
    expected = explicit(layer, x)[2]
    assert_agree(actual, expected, 1e-12)
    inputs = [x, *layer.kernels.parameters()]
    for one, other in zip(
        torch.autograd.grad(actual.log().sum(), inputs), torch.autograd.grad(expected.log().sum(), inputs)
    ):
        assert_agree(one, other, 1e-10)


@pytest.mark.parametrize("n_extra", [2, 16, 62])
def test_does_not_depend_on_the_fft_length(n_extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = parseval_layer(dtype=torch.float64)
    x = smooth_images(1)
    expected = layer(x)
    statistics = layer.norm.running_var.clone()
    layer = parseval_layer(dtype=torch.float64)
    fft_length = plain.fft_length
    monkeypatch.setattr(plain, "fft_length", lambda length: fft_length(length) + n_extra)
    assert_agree(layer(x), expected, 1e-12)
    assert_agree(layer.norm.running_var, statistics, 1e-12)


def test_training_output_is_the_folded_layer_with_the_batchs_statistics() -> None:
    layer = parseval_layer(dtype=torch.float64)
    layer.norm.momentum = 1.0
    x = smooth_images(2)
    y = layer(x)
    with torch.no_grad():
        pixels = x.numel() // 3
        layer.norm.running_var.mul_((pixels - 1) / pixels)
    layer.eval()
    assert_agree(layer(x), y, 1e-12)
    layer.reparameterize()
    assert_agree(layer(x), y, 1e-12)


def test_running_statistics_follow_batch_norm() -> None:
    """A kernel of one tap makes a branch the input itself, for which nn.BatchNorm1d is the definition."""
    options = dict(kernel="dilated", taps=1, bidirectional=False, max_branches=1, branch_norm="parseval")
    layer = MRConv2d(3, (4, 5), kernel_size=0, **options)
    torch.nn.init.ones_(layer.kernels.values)
    batch_norm = torch.nn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 5) * 3 + 2
        assert_agree(layer.train()(x), batch_norm(x.flatten(2)).view_as(x))
    assert_agree(layer.norm.running_mean[0], batch_norm.running_mean)
    assert_agree(layer.norm.running_var[0], batch_norm.running_var)


@each_engine
@pytest.mark.parametrize("scale", [1e18, 1e-18])
def test_inputs_of_any_scale(engine: str, scale: float) -> None:
    """As far as float32 has their variance, which BatchNorm needs as well."""
    layer = parseval_layer(kernel_size=0)
    x = torch.randn(8, 3, 9, 11)
    with mrconvnext.engine(engine):
        y = layer(scale * x)
        y.square().sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
        assert all(b.isfinite().all() for b in layer.buffers())
        if scale > 1:
            assert_agree(y, layer(1e6 * x), 1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (9, 11), (14, 5)])
def test_works_at_batch_one(size: tuple[int, int]) -> None:
    layer = parseval_layer()
    y = layer(torch.randn(1, 3, *size))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert all(b.isfinite().all() for b in layer.buffers())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_statistics_are_tracked_without_gradients_too(mode) -> None:
    layer, twin = parseval_layer(), parseval_layer()
    x = smooth_images(1).float()
    with mode():
        y = layer(x)
    assert_agree(y, twin(x))
    assert_agree(layer.norm.running_var, twin.norm.running_var)


def test_backward_twice_and_through_frozen_parameters() -> None:
    layer = parseval_layer()
    x = smooth_images(1).float().requires_grad_()
    y = layer(x).square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x)[0], first)
    for parameter in (*layer.kernels.parameters(), layer.weight, layer.norm.bias):
        parameter.requires_grad_(False)
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, first) and layer.alpha.grad.abs().min() > 0
    assert layer.weight.grad is None and layer.norm.bias.grad is None


def test_differentiable_twice() -> None:
    layer = parseval_layer(dtype=torch.float64)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, alpha: Tensor) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(layer), {"alpha": alpha}, (x,))

    assert torch.autograd.gradgradcheck(function, (x, layer.alpha), fast_mode=True)


def test_hooks_of_parameters_run_once() -> None:
    layer, twin = parseval_layer(), parseval_layer()
    for parameter in twin.parameters():
        parameter.register_hook(lambda grad: 3 * grad)
    for own in (layer, twin):
        own(smooth_images(1).float()).square().sum().backward()
    for a, b in zip(layer.parameters(), twin.parameters()):
        assert_agree(b.grad, 3 * a.grad)


def test_backward_inside_autocast() -> None:
    layer, twin = parseval_layer(), parseval_layer()
    x = smooth_images(1).float()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    for a, b in zip(layer.parameters(), twin.parameters()):
        assert_agree(a.grad, b.grad)


def test_an_empty_batch_leaves_the_statistics_alone() -> None:
    layer = parseval_layer()
    before = [buffer.clone() for buffer in layer.buffers()]
    x = torch.randn(0, 3, *GRID, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 3, *GRID)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_a_batch_once(use_reentrant: bool) -> None:
    plain, checkpointed = parseval_layer(), parseval_layer()
    x = torch.randn(2, 3, *GRID, requires_grad=True)
    for _ in range(2):
        plain(x).square().sum().backward()
        y = torch.utils.checkpoint.checkpoint(checkpointed, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
    for (name, a), b in zip(plain.state_dict().items(), checkpointed.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        assert_agree(b.grad, a.grad, 1e-6)


def test_frozen_norm_keeps_its_statistics() -> None:
    layer = parseval_layer()
    x = torch.randn(2, 3, *GRID)
    expected = copy.deepcopy(layer).eval()(x)
    before = layer.norm.running_var.clone()
    layer.norm.eval()
    assert_agree(layer(x), expected)
    layer.norm.train().requires_grad_(False)  # as timm.utils.freeze leaves it
    assert_agree(layer(x), expected)
    assert torch.equal(layer.norm.running_var, before)


def train(layer: torch.nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for x in batches:
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): value for name, value in layer.state_dict().items()}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([1.0, 1.0, 3.0, 4.0], dtype=torch.float64).view(4, 1, 1, 1)
    return [torch.randn(4, 3, *GRID, generator=generator, dtype=torch.float64) * scales + scales for _ in range(20)]


def train_on_half_of_each_batch(rank: int, folder: str, sync_norm: bool) -> None:
    store = f"file://{folder}/store-{sync_norm}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    layer = parseval_layer(dtype=torch.float64, sync_norm=sync_norm)
    halves = [x[2 * rank : 2 * rank + 2] for x in batches()]
    state = train(torch.nn.parallel.DistributedDataParallel(layer), halves)
    if rank == 0:
        torch.save(state, f"{folder}/state-{sync_norm}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_synchronised_processes_equal_one(tmp_path: Path) -> None:
    """With the whole batch in one process, or half of it in each of two. Without synchronisation they must differ."""
    expected = train(parseval_layer(dtype=torch.float64), batches())
    assert all(value.isfinite().all() for value in expected.values())

    def errors(sync_norm: bool) -> list[float]:
        torch.multiprocessing.spawn(train_on_half_of_each_batch, (str(tmp_path), sync_norm), nprocs=2)
        state = torch.load(tmp_path / f"state-{sync_norm}.pt", weights_only=True)
        assert state.keys() == expected.keys()
        return [(state[name] - value).abs().max().item() for name, value in expected.items()]

    assert max(errors(sync_norm=True)) < 1e-10
    assert max(errors(sync_norm=False)) > 1e-4
