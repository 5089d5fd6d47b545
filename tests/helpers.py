"""What the tests share: models that hide nothing, and the check that two outputs agree."""

import pytest
import timm
import torch
from torch import Tensor, nn

import mrconvnext
import mrconvnext.engines
from mrconvnext.norms import ParsevalNorm

SMALL = dict(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), num_classes=10, img_size=64)


def small_model(name: str = "mrconvnext_atto", **options) -> mrconvnext.MRConvNeXt:
    """Returns a small model in eval mode with the parameters and statistics of `randomize`."""
    return randomize(timm.create_model(name, **{**SMALL, **options})).eval()


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives norms the statistics and affine parameters of a trained model, and scales of order 1 to what is added.

    A fresh ConvNeXt hides every error: its layer scales are 1e-6 and its statistics those of no data.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform_(x: Tensor | None, low: float, high: float) -> None:
        if x is not None:
            x.copy_(torch.rand(x.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.modules.batchnorm._BatchNorm, ParsevalNorm)):
                uniform_(layer.running_mean, -0.5, 0.5)
                uniform_(layer.running_var, 0.3, 2.0)
            if isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, ParsevalNorm)):
                uniform_(layer.weight, 0.5, 1.5)
                uniform_(layer.bias, -0.5, 0.5)
            if isinstance(layer, mrconvnext.MRConv2d):
                uniform_(layer.alpha, -1, 1)
                uniform_(layer.weight, -0.3, 0.3)
                uniform_(layer.bias, -0.5, 0.5)
            if isinstance(getattr(layer, "gamma", None), nn.Parameter):
                uniform_(layer.gamma, 0.5, 1.5)
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a fraction of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


def layers_of(model: nn.Module) -> list[mrconvnext.MRConv2d]:
    return [layer for layer in model.modules() if isinstance(layer, mrconvnext.MRConv2d)]


FORMS = [("kernel", False), ("parseval", False), ("batch", False), ("batch", True)]
# In a hurry the default's two forms stand for the others.
each_form = pytest.mark.parametrize(
    ("branch_norm", "deployed"),
    [pytest.param(*form, marks=() if form in (FORMS[0], FORMS[-1]) else pytest.mark.slow) for form in FORMS],
    ids=[f"{norm}-{'deployed' if deployed else 'training'}" for norm, deployed in FORMS],
)
each_engine = pytest.mark.parametrize("engine", mrconvnext.engines.NAMES)


def model_in(branch_norm: str, deployed: bool = False, **options) -> mrconvnext.MRConvNeXt:
    """Returns a model of `small_model` in one of its forms."""
    model = small_model(branch_norm=branch_norm, **options)
    return model.reparameterize() if deployed else model


def images(height: int = 64, width: int = 96, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
