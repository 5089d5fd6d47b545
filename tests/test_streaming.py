"""Causal layers, position by position, against the convolution of the whole sequence."""

import copy

import pytest
import torch
from helpers import assert_agree, randomize
from torch import Tensor

from mrconvnext import MRConv1d
from mrconvnext.kernels import KERNELS

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
# What a stream has to keep depends on these, and on nothing else of a layer.
LAYERS = [
    pytest.param(dict(kernel=kernel, deployed=deployed, **options), id=f"{kernel}{'-deployed' * deployed}{suffix}")
    for kernel in KERNELS
    for deployed in (False, True)
    for options, suffix in (({}, ""), ({"concat_decay": 1.5}, "-concatenated"))
    if not (options and KERNELS[kernel].is_single)
]


def layer_of(length: int = 100, deployed: bool = False, **options) -> MRConv1d:
    layer = randomize(MRConv1d(3, length, **options)).eval()
    with torch.no_grad():
        layer.alpha.uniform_(-1, 1)
    if deployed:
        layer.reparameterize()
    return layer


def streamed(layer: MRConv1d, x: Tensor) -> Tensor:
    """Returns what a layer makes of sequences (B, C, L) position by position."""
    state, outputs = layer.start(len(x)), []
    for position in x.unbind(-1):
        y, state = layer.step(position, state)
        outputs.append(y)
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", LAYERS)
def test_a_stream_equals_the_convolution(options: dict, dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype, **options)
    x = torch.randn(2, 3, 350, dtype=dtype)  # longer than every kernel
    assert_agree(streamed(layer, x), layer(x), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("deployed", [False, True])
def test_of_any_length(length: int, deployed: bool) -> None:
    layer = layer_of(length, deployed)
    x = torch.randn(2, 3, 50)
    assert_agree(streamed(layer, x), layer(x), 2e-6)


@pytest.mark.parametrize("branch_norm", ["kernel", "parseval", "batch", "none"])
def test_with_every_norm_as_in_evaluation(branch_norm: str) -> None:
    layer = layer_of(branch_norm=branch_norm)
    x = torch.randn(2, 3, 200)
    assert_agree(streamed(layer, x), layer(x), 2e-6)


def test_of_kernels_moved_to_another_rate() -> None:
    layer = layer_of(64)
    layer.resample(2)
    x = torch.randn(2, 3, 200)
    assert_agree(streamed(layer, x), layer(x), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("deployed", [False, True])
def test_ten_thousand_steps_do_not_drift(kernel: str, deployed: bool) -> None:
    layer = layer_of(1000, deployed, kernel=kernel)
    x = 3 + torch.randn(1, 3, 10_000)  # sums of a mean that is not 0 are where errors add up
    y, expected = streamed(layer, x), layer(x)
    for part in (slice(0, 1000), slice(4500, 5500), slice(9000, 10_000)):
        assert_agree(y[..., part], expected[..., part], 1e-5)


def test_a_state_can_be_copied_and_gone_on_with_twice() -> None:
    layer = layer_of()
    x = torch.randn(2, 3, 40)
    expected, state = layer(x), layer.start(2)
    for t in range(20):
        _, state = layer.step(x[..., t], state)
    other = copy.deepcopy(state)
    for own in (state, other):
        for t in range(20, 40):
            y, own = layer.step(x[..., t], own)
        assert_agree(y, expected[..., -1], 2e-6)


@pytest.mark.parametrize("deployed", [False, True])
def test_half_precision_inputs_are_computed_in_float32(deployed: bool) -> None:
    layer = layer_of(deployed=deployed)
    x = torch.randn(2, 3, 150).bfloat16()
    y = streamed(layer, x)
    assert y.dtype == torch.bfloat16
    assert_agree(y.float(), layer(x.float()), 1e-2)


def test_a_bidirectional_layer_is_refused() -> None:
    for deployed in (False, True):
        with pytest.raises(RuntimeError, match="bidirectional=True can't be run position by position"):
            layer_of(bidirectional=True, deployed=deployed).start(1)


def test_statistics_of_training_are_refused() -> None:
    for branch_norm in ("parseval", "batch"):
        with pytest.raises(RuntimeError, match=rf'branch_norm="{branch_norm}" takes statistics .* call eval'):
            layer_of(branch_norm=branch_norm).train().start(1)
    layer_of(branch_norm="kernel").train().start(1)


def test_bad_inputs_are_named() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, got 0"):
        layer.start(0)
    for shape in ((2, 4), (3, 3), (2, 3, 1)):
        for deployed in (False, True):
            own = layer_of(deployed=deployed)
            with pytest.raises(ValueError, match=r"x must be \[2, 3\]"):
                own.step(torch.randn(shape), own.start(2))
