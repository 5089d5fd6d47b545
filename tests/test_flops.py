import logging
import math
import subprocess
import sys

import pytest
import timm
import torch
from helpers import SMALL, layers_of, small_model
from timm.utils import reparameterize_model
from torch import nn

import mrconvnext
from mrconvnext.flops import Flops, count_flops
from mrconvnext.longconv import fft_length

SIDE, CHANNELS, GUARD = 10, 6, 3


def fft(length: int) -> float:
    """By hand: half of a complex FFT's 5·n·log2(n) operations, two of them a multiply-add."""
    return 5 * length * math.log2(length) / 2 / 2


def product(length: int) -> float:
    """By hand: the spectrum of n real numbers has n // 2 + 1 of them, a product 4 multiplications and 2 additions."""
    return (length // 2 + 1) * 6 / 2


def layer_count(layer: mrconvnext.MRConv2d, height: int, width: int) -> Flops:
    """Returns the multiply-adds of a layer with Fourier and sparse kernels in both directions, by hand."""
    n = fft_length(2 * height * (width + layer.guard) - 1)
    convolution = fft(n) + product(n) + fft(n)
    if layer.kernel is not None:
        return Flops(layer.channels * convolution, layer.channels * fft(n))
    branches = len(layer.branch_lengths)
    # The taps and every branch are kernels that are transformed; a branch is made of two kernels, each from its modes.
    kernels = (branches + 1) * fft(n) + sum(2 * fft(length) for length in layer.branch_lengths)
    if layer.norm is not None:
        # One convolution with the merged kernel, which is transformed instead of the branches.
        return Flops(layer.channels * convolution, layer.channels * (kernels - branches * fft(n)))
    outputs = (branches + 1) * (product(n) + fft(n)) + branches * 2 * height * width  # a BatchNorm counts 2 a value
    return Flops(layer.channels * (fft(n) + outputs), layer.channels * kernels)


def assert_same(actual: Flops, expected: Flops) -> None:
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("branch_norm", ["batch", "parseval"])
def test_layer_counts_what_a_hand_counts(branch_norm: str) -> None:
    layer = mrconvnext.MRConv2d(CHANNELS, SIDE, branch_norm=branch_norm)
    for _ in range(2):
        assert_same(count_flops(layer, (CHANNELS, SIDE, SIDE)), layer_count(layer, SIDE, SIDE))
        layer.reparameterize()


def test_deployed_layer_in_numbers() -> None:
    """10 rows of 13 make 130 positions, two-sided kernels 259 lags, the FFT's length 280 or more: 288 = 2^5·3^2."""
    layer = mrconvnext.MRConv2d(1, SIDE, inference_mode=True)
    transform = 1.25 * 288 * math.log2(288)
    assert_same(count_flops(layer, (1, SIDE, SIDE)), Flops(2 * transform + 145 * 3, transform))


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("branch_norm", ["batch", "parseval"])
def test_model_is_fvcores_convnext_with_the_depthwise_convolutions_replaced(branch_norm: str, deployed: bool) -> None:
    size = 64
    model = small_model(branch_norm=branch_norm)
    if deployed:
        model.reparameterize()
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
    from fvcore.nn import FlopCountAnalysis

    convnext = timm.create_model("convnext_atto", **{k: v for k, v in SMALL.items() if k != "img_size"}).eval()
    analysis = FlopCountAnalysis(convnext, torch.zeros(1, 3, size, size))
    counts = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_module()
    return counts[""] - sum(count for name, count in counts.items() if name.endswith("conv_dw"))


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
        for form in (model, reparameterize_model(model), small_model(branch_norm="parseval")):
            count_flops(form, (3, 64, 64))
    assert not caplog.messages
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_operators_without_a_count_are_named(caplog: pytest.LogCaptureFixture) -> None:
    count_flops(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus()), (3, 8, 8))
    assert [message for message in caplog.messages if "aten::softplus" in message]
    assert len(caplog.messages) == 1


def test_package_imports_without_fvcore() -> None:
    code = "import sys, mrconvnext; sys.exit('fvcore' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0
