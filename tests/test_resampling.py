"""Kernels that follow the image to another grid."""

import copy
import math
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import SMALL, randomize, small_model
from torch import Tensor

import mrconvnext
from mrconvnext import MRConv1d, MRConv2d, resample
from mrconvnext.kernels import KERNELS
from mrconvnext.norms import NORMS
from mrconvnext.resampling import from_distances, resample_kernel, say_that_moves_add_up, to_distances


def layer_of(**options: Any) -> MRConv2d:
    return randomize(MRConv2d(3, **{"grid": (10, 12), "kernel_size": 3, **options})).eval()


def noise(cycles: int, height: int, width: int) -> Tensor:
    """Returns images (2, 3, H, W) of the same smooth noise, of at most so many cycles a side, whatever the size."""
    generator = torch.Generator().manual_seed(7)
    waves = 2 * cycles + 1
    spectrum = torch.randn(2, 3, waves, waves, dtype=torch.complex128, generator=generator)
    cycle = torch.arange(-cycles, cycles + 1)
    rows, columns = (torch.exp(2j * math.pi * torch.arange(n)[:, None] * cycle / n) for n in (height, width))
    return (rows.to(spectrum.dtype) @ spectrum @ columns.to(spectrum.dtype).t()).real.float()


def difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# Layers


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("branch_norm", NORMS)
def test_the_same_size_changes_nothing(kernel: str, branch_norm: str, deployed: bool) -> None:
    layer = layer_of(kernel=kernel, branch_norm=branch_norm)
    if deployed:
        layer.reparameterize()
    x = torch.randn(2, 3, 10, 12)
    expected, weights = layer(x), copy.deepcopy(layer.state_dict())
    layer.set_grid((10, 12))
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(value, weights[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_there_and_back(kernel: str, branch_norm: str, bidirectional: bool) -> None:
    layer = layer_of(kernel=kernel, branch_norm=branch_norm, bidirectional=bidirectional)
    x = torch.randn(2, 3, 10, 12)
    expected = layer(x)
    layer.set_grid((21, 17))
    assert difference(layer(x), expected) > 0.01
    layer.set_grid((10, 12))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("grid", [(20, 24), (15, 12), (5, 6), (7, 31)])
def test_a_kernel_keeps_its_sum_and_every_weight_a_place(grid: tuple[int, int]) -> None:
    for bidirectional in (True, False):
        kernel = torch.rand(3, 2 * 10 * 13 - 1, dtype=torch.float64)
        if not bidirectional:
            kernel[:, : 10 * 13 - 1] = 0
        maps = to_distances(kernel, (10, 12), guard=1)
        new = (*grid, grid[1] - 1)
        moved = to_distances(resample_kernel(kernel, (10, 12, 1), new, bidirectional), grid, new[2])
        assert moved.shape == (3, 2 * grid[0] - 1, 2 * grid[1] - 1) and (moved >= 0).all()
        torch.testing.assert_close(moved.sum((1, 2)), maps.sum((1, 2)), rtol=1e-9, atol=0)


def test_a_causal_kernel_stays_causal() -> None:
    layer = layer_of(bidirectional=False, kernel_size=0)
    layer.set_grid((15, 31))
    kernel, _ = layer.merged_kernel()
    assert (kernel[:, : kernel.shape[1] // 2] == 0).all() and kernel.abs().sum() > 0


def test_the_map_of_distances_holds_every_lag() -> None:
    height, width, guard = 5, 4, 2
    kernel = torch.randn(3, 2 * height * (width + guard) - 1)
    maps = to_distances(kernel, (height, width), guard)
    for dr, dc in ((0, 0), (-4, 3), (4, -3), (1, -3), (2, 2)):
        lag = dr * (width + guard) + dc
        assert torch.equal(maps[:, dr + height - 1, dc + width - 1], kernel[:, kernel.shape[1] // 2 + lag])
    alone = torch.zeros(2 * height - 1, 2 * width - 1)
    alone[height, width + 1] = 1  # dr = 1, dc = 2
    for guard in (2, 3):
        assert from_distances(alone, guard).nonzero().item() - (height * (width + guard) - 1) == width + guard + 2
    assert torch.equal(to_distances(from_distances(maps, 3), (height, width), 3), maps)


@pytest.mark.parametrize("branch_norm", NORMS)
def test_local_taps_stay_as_they_are(branch_norm: str) -> None:
    layer = layer_of(branch_norm=branch_norm)
    torch.nn.init.zeros_(layer.alpha)
    x = torch.randn(2, 3, 20, 24)
    expected = layer(x)
    layer.set_grid((20, 24))
    torch.testing.assert_close(layer(x), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("branch_norm", NORMS)
def test_moved_layers_deploy_and_train(branch_norm: str) -> None:
    layer = layer_of(branch_norm=branch_norm)
    layer.set_grid((16, 18))
    x = torch.randn(2, 3, 16, 18)
    expected = layer(x)
    deployed = copy.deepcopy(layer)
    deployed.reparameterize()
    torch.testing.assert_close(deployed(x), expected, atol=1e-5, rtol=1e-5)
    layer.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.kernels.parameters())


def test_gradients_of_a_moved_kernel() -> None:
    for both in (True, False):
        kernel = torch.randn(2, 2 * 4 * 6 - 1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda k, b=both: resample_kernel(k, (4, 5, 1), (5, 3, 2), b), (kernel,))


# Sequences


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("size", "step", "limit"), [((60, 72), (1, 2), 1e-5), ((45, 54), (2, 3), 0.01)])
@pytest.mark.parametrize("branch_norm", NORMS)
def test_a_smooth_image_at_another_size(
    kernel: str, branch_norm: str, size: tuple[int, int], step: tuple[int, int], limit: float
) -> None:
    layer = layer_of(kernel=kernel, branch_norm=branch_norm, kernel_size=0, grid=(30, 36))
    expected = layer(noise(1, 30, 36))[:, :, :: step[0], :: step[0]]
    layer.set_grid(size)
    actual = layer(noise(1, *size))[:, :, :: step[1], :: step[1]]
    assert difference(actual, expected) < limit


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sequence_at_twice_the_rate(kernel: str) -> None:
    layer = randomize(MRConv1d(3, 64, kernel=kernel, max_branches=2)).eval()
    u = noise(3, 1, 64)[:, :, 0]
    expected = layer(u)
    layer.resample(2)
    assert layer.reference_grid == (128, 1)
    assert difference(layer(noise(3, 1, 128)[:, :, 0])[..., ::2], expected) < 1e-5
    with pytest.raises(ValueError, match="factor must be .* got 0"):
        layer.resample(0)


# Models


def test_a_model_follows_its_images(tmp_path: Path) -> None:
    model = small_model()
    x = torch.randn(1, 3, 96, 128)
    kept = model(x)
    bigger = resample(model, (96, 128))
    assert torch.equal(model(x), kept) and difference(bigger(x), kept) > 1e-3
    assert bigger.model_args["img_size"] == (96, 128) and bigger.model_args["kernel_img_size"] == (64, 64)
    for fused in (False, True):
        folder = tmp_path / f"{fused}"
        mrconvnext.save(bigger, folder, fused=fused)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(again(x), bigger(x), atol=2e-6, rtol=1e-5)
    back = resample(bigger, 64)
    assert torch.equal(back(x), kept) and "kernel_img_size" not in back.model_args


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_another_size_follow_the_model(
    fused: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model()
    mrconvnext.save(model, tmp_path / "saved", fused=fused)
    if fused:
        model.reparameterize()
    x = torch.randn(1, 3, 96, 96)
    with caplog.at_level("INFO"):
        made = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, img_size=96).eval()
    torch.testing.assert_close(made(x), resample(model, 96)(x), atol=2e-6, rtol=1e-5)
    assert "16×16 to 24×24" in caplog.text
    mrconvnext.save(made, tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    torch.testing.assert_close(again(x), made(x), atol=2e-6, rtol=1e-5)


def test_strict_loading_names_the_switch() -> None:
    other = timm.create_model("mrconvnext_atto", **{**SMALL, "img_size": 96})
    with pytest.raises(RuntimeError, match="set_input_size"):
        other.load_state_dict(small_model().state_dict())
    moved = resample(small_model(), 96)
    with pytest.raises(RuntimeError, match="kernel_img_size"):
        other.load_state_dict(moved.state_dict())
    with pytest.raises(RuntimeError, match="kernel_img_size"):
        moved.load_state_dict(other.state_dict())


def test_sizes_that_can_not_be() -> None:
    model = small_model()
    for size in (16, (64,), "64", 0):
        with pytest.raises(ValueError, match="img_size"):
            model.set_input_size(size)
    with pytest.raises(ValueError, match="at least 2"):
        layer_of().set_grid((1, 30))
    for size in (10**6, (64, 10**7)):
        with pytest.raises(ValueError, match="at most 4194304 positions"):
            model.set_input_size(size)
    assert model.stages[0].blocks[0].conv_dw.reference_grid == (16, 16)
    with pytest.raises(ValueError, match="at most 4194304 positions"):
        MRConv1d(1, 10**9)
    with pytest.raises(ValueError, match="no MRConv2d"):
        resample(timm.create_model("convnext_atto"), 64)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("dilation", [1, 2])
def test_deployed_kernels_move_as_branches_do(kernel: str, bidirectional: bool, dilation: int) -> None:
    layer = layer_of(kernel=kernel, bidirectional=bidirectional, dilation=dilation)
    deployed = copy.deepcopy(layer)
    deployed.reparameterize()
    fused = deployed(x := torch.randn(2, 3, 10, 12))
    for grid in ((20, 24), (15, 31), (7, 5)):
        layer.set_grid(grid)
        deployed.set_grid(grid)
        images = torch.randn(2, 3, *grid)
        torch.testing.assert_close(deployed(images), layer(images), atol=1e-5, rtol=1e-5)
        layer.set_grid((10, 12))
        deployed = copy.deepcopy(layer)
        deployed.reparameterize()
    deployed.set_grid((20, 24))
    deployed.set_grid((10, 12))
    torch.testing.assert_close(deployed(x), fused, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_many_sizes_in_one_process(training: bool) -> None:
    """Multi-scale training: what is kept of sizes is bounded, and so is the time of a size, whether new or not."""
    model = small_model().train(training)

    def take(sizes: range) -> tuple[float, float]:
        seconds = []
        for i in sizes:
            x = torch.randn(2, 3, 32 + i, 32 + i * 7 % 300)
            start = time.perf_counter()
            model(x).square().sum().backward()
            seconds.append((time.perf_counter() - start) / x[0, 0].numel())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, statistics.median(seconds)

    take(range(0, 300, 15))  # what the largest need, and what is made once
    memory, pace = take(range(40))
    later_memory, later_pace = take(range(40, 300))
    assert later_memory < memory + 150
    assert later_pace < 2 * pace


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_moved_models_are_scripted_and_traced(bidirectional: bool) -> None:
    model = resample(small_model(bidirectional=bidirectional), 96)
    x = torch.randn(1, 3, 96, 96)
    for own in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(own(x), model(x), atol=1e-5, rtol=1e-5)


def test_models_without_memory_move() -> None:
    with torch.device("meta"):
        model = timm.create_model("mrconvnext_atto", inference_mode=True, **SMALL)
    assert resample(model, 96).stages[0].blocks[0].conv_dw.reference_grid == (24, 24)


def test_a_model_in_a_wrapper_moves_and_can_be_saved(tmp_path: Path) -> None:
    moved: Any = resample(torch.nn.Sequential(small_model()), 128)
    mrconvnext.save(moved[0], tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(again(x), moved(x), atol=2e-6, rtol=1e-5)


def test_a_kernel_that_reaches_ahead_is_no_causal_layers(tmp_path: Path) -> None:
    mrconvnext.save(small_model(), tmp_path, fused=True)
    with pytest.raises(RuntimeError, match="reaches ahead"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=96, bidirectional=False)


def test_deployed_kernels_that_move_again_say_that_they_lose(caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of()
    layer.reparameterize()
    say_that_moves_add_up.cache_clear()  # it is said once
    layer.set_grid((15, 18))
    assert not caplog.records
    layer.set_grid((10, 12))
    assert "moved again" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, True])
def test_compiled_models_take_many_sizes_with_two_graphs(moved: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = resample(small_model(), 96).train() if moved else small_model().train()
    compiled = torch.compile(model, backend="aot_eager")
    for height, width in ((64, 64), (96, 96), (80, 112), (128, 96), (72, 200), (224, 96)):
        compiled(torch.randn(2, 3, height, width)).square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("kernel_size", [0, 3])
def test_a_move_that_is_refused_leaves_the_layer_as_it_was(kernel_size: int) -> None:
    two_sided, causal = (layer_of(kernel_size=kernel_size, bidirectional=both) for both in (True, False))
    two_sided.reparameterize()
    causal.load_state_dict(two_sided.state_dict())
    x = torch.randn(1, 3, 10, 12)
    expected = causal(x)
    with pytest.raises(RuntimeError, match="reaches ahead"):
        causal.set_grid((20, 24))
    assert torch.equal(causal(x), expected) and causal.reference_grid == (10, 12)
