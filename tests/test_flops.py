import logging
import math
import subprocess
import sys

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from helpers import SMALL, each_engine, each_form, layers_of, model_in, small_model
from timm.utils import reparameterize_model
from torch import nn

import mrconvnext
from mrconvnext.engines.plain import fft_length
from mrconvnext.flops import Flops, count_flops

SIDE, CHANNELS = 10, 6


def fft(length: int) -> float:
    """By hand: half of a complex FFT's 5·n·log2(n) operations, two of them a multiply-add."""
    return 5 * length * math.log2(length) / 2 / 2


def product(length: int) -> float:
    """By hand: the spectrum of n real numbers has n // 2 + 1 of them, a product 4 multiplications and 2 additions."""
    return (length // 2 + 1) * 6 / 2


def layer_count(layer: mrconvnext.MRConv2d, height: int, width: int, reach: int | None = None) -> Flops:
    """Returns the multiply-adds of a layer with Fourier and sparse kernels in both directions, by hand.

    Args:
        layer: The layer.
        height: Height of the images.
        width: Width of the images.
        reach: Largest lag of the kernel for them. Default: that of their two most distant pixels.
    """
    length = height * (width + layer.guard)
    n = fft_length(length + (length - 1 if reach is None else reach))
    image, pixels = fft(n) + product(n) + fft(n), height * width
    if layer.kernel is not None:
        return Flops(layer.channels * image, layer.channels * fft(n))
    branches, lags = len(layer.branch_lengths), 2 * layer.branch_lengths[-1] - 1
    # Each lag of a branch is a sum over the real and imaginary parts of 16 modes for both directions.
    kernels = branches * 2 * 16 * 2 * lags
    if layer.options.branch_norm == "batch":
        taps = layer.kernel_size**2 * pixels
        outputs = branches * (product(n) + fft(n) + 2 * pixels)  # fvcore counts 2 a value for a BatchNorm
        return Flops(layer.channels * (fft(n) + outputs + taps), layer.channels * (kernels + branches * fft(n)))
    # The branches are added, each lag times a weight, and the sum is transformed.
    return Flops(layer.channels * image, layer.channels * (kernels + branches * lags + fft(n)))


def assert_same(actual: Flops, expected: Flops) -> None:
    assert actual == pytest.approx(expected, rel=1e-9)


@each_engine
@pytest.mark.parametrize("branch_norm", ["kernel", "parseval", "batch"])
def test_layer_counts_what_a_hand_counts(branch_norm: str, engine: str) -> None:
    layer = mrconvnext.MRConv2d(CHANNELS, SIDE, branch_norm=branch_norm)
    with mrconvnext.engine(engine):
        for _ in range(2):
            assert_same(count_flops(layer, (CHANNELS, SIDE, SIDE)), layer_count(layer, SIDE, SIDE))
            # The kernels are made for rows of 13 positions, 10 up and down. 20 columns are 23, 5 are 8.
            for height, width, reach in ((7, 20, 7 * 23 - 1), (20, 5, 10 * 8 + 4)):
                found = count_flops(layer, (CHANNELS, height, width)).per_image
                assert found == pytest.approx(layer_count(layer, height, width, reach).per_image, rel=1e-9)
            layer.reparameterize()


def test_deployed_layer_in_numbers() -> None:
    """10 rows of 13 make 130 positions, two-sided kernels 259 lags, the FFT's length 280 or more: 288 = 2^5·3^2."""
    layer = mrconvnext.MRConv2d(1, SIDE, inference_mode=True)
    transform = 1.25 * 288 * math.log2(288)
    assert_same(count_flops(layer, (1, SIDE, SIDE)), Flops(2 * transform + 145 * 3, transform))


@each_form
def test_model_is_fvcores_convnext_with_the_depthwise_convolutions_replaced(branch_norm: str, deployed: bool) -> None:
    size = 64
    model = model_in(branch_norm, deployed)
    layers = [
        layer_count(layer, size // info["reduction"], size // info["reduction"])
        for stage, info in zip(model.stages, model.feature_info)
        for layer in layers_of(stage)
    ]
    ours = Flops(*(sum(counts) for counts in zip(*layers)))
    rest = fvcore_count_without_depthwise(size)
    assert rest > 0 and ours.per_image > 0
    assert_same(count_flops(model, (3, size, size)), Flops(rest + ours.per_image, ours.per_pass))


def fvcore_count_without_depthwise(size: int) -> float:
    """Returns what fvcore, with nothing added, counts for the ConvNeXt of the same shape but for its conv_dw."""
    convnext = timm.create_model("convnext_atto", **{k: v for k, v in SMALL.items() if k != "img_size"}).eval()
    analysis = FlopCountAnalysis(convnext, torch.zeros(1, 3, size, size))
    counts = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
    return counts[""] - sum(count for name, count in counts.items() if name.endswith("conv_dw"))


@pytest.mark.slow
def test_convnext_has_fvcores_count() -> None:
    """The figure of the paper for ConvNeXt-T, 4.5 GFLOPs, is the same count."""
    flops = count_flops(timm.create_model("convnext_tiny"))
    assert flops.per_pass == 0
    assert flops.per_image == pytest.approx(4.5e9, rel=0.02)


def test_attention_is_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3 * 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = self.linear(x).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(query, key, value)

    products = 2 * 7 * 7 * 5
    assert count_flops(Attention(), (2, 7, 5)) == Flops(2 * (7 * 5 * 15 + products), 0)


def test_counting_says_nothing_and_leaves_the_model_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        for form in (model, reparameterize_model(model), model_in("parseval"), model_in("batch")):
            count_flops(form, (3, 64, 64))
    assert not caplog.messages
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_operators_without_a_count_are_named(caplog: pytest.LogCaptureFixture) -> None:
    count_flops(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus()), (3, 8, 8))
    assert [message for message in caplog.messages if "aten::softplus" in message]
    assert len(caplog.messages) == 1


@pytest.mark.slow
def test_package_imports_without_fvcore() -> None:
    code = "import sys, mrconvnext; sys.exit('fvcore' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0
