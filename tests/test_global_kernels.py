"""Networks whose depthwise convolutions become global: the same function, opened by training."""

import copy
import logging
from typing import Any

import pytest
import timm
import torch
from helpers import layers_of, randomize, relative_error
from timm.utils import reparameterize_model
from torch import nn

import mrconvnext
from mrconvnext import MRConv2d, resample, with_global_kernels

# A small member of each family, deployed below if it folds its blocks, and how many convolutions are taken of it.
FAMILIES = {
    "mobilenetv2_035": 13,
    "mobilenetv3_small_050": 7,
    "mobilenetv4_conv_small_035": 13,
    "tf_efficientnet_lite0": 12,
    "efficientnet_b0": 12,
    "mnasnet_small": 11,
    "ghostnet_050": 33,
    "convnext_atto": 12,
    "convnextv2_atto": 12,
    "inception_next_atto": 12,
    "edgenext_xx_small": 15,
    "convformer_s18": 18,
    "mambaout_femto": 18,
    "fastvit_t8": 20,
    "repvit_m0_9": 23,
    "hgnetv2_b0": 9,
}


def network(name: str) -> nn.Module:
    """Returns a network of timm whose weights and statistics hide nothing, deployed if it folds its blocks."""
    torch.manual_seed(0)
    return reparameterize_model(randomize(timm.create_model(name, num_classes=5)).eval())


def logits(model: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    torch.manual_seed(2)  # of dropout and stochastic depth
    return copy.deepcopy(model).to(x.dtype).train(training)(x).detach()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_computes_what_it_did(name: str) -> None:
    model = network(name)
    copied = with_global_kernels(model, img_size=96)
    assert len(layers_of(copied)) == FAMILIES[name] and not layers_of(model)
    for training in (False, True):
        for height, width in ((96, 96), (64, 128)):
            x = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(1))
            exact = logits(model, x.double(), training)
            assert relative_error(logits(copied, x.double(), training), exact) < 1e-12
            expected = logits(model, x, training)
            rounding = relative_error(expected, exact)  # of the network itself, with statistics of few pixels
            assert relative_error(logits(copied, x, training), expected) < 1e-5 + (rounding if training else 0)
    opened_by_two_steps(copied)
    copied.eval()
    x = torch.randn(2, 3, 96, 96)
    expected = copied(x)
    assert relative_error(mrconvnext.reparameterize(copied)(x), expected) < 1e-5


def opened_by_two_steps(model: nn.Module) -> None:
    """Takes two steps of training and checks that α has moved after the first one, and kernels after the second."""
    layers = layers_of(model)
    before = [[parameter.detach().clone() for parameter in layer.kernels.parameters()] for layer in layers]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        assert all(layer.alpha.abs().sum() > 0 for layer in layers)
        moved = [
            any(not torch.equal(own, old) for own, old in zip(layer.kernels.parameters(), olds))
            for layer, olds in zip(layers, before)
        ]
        assert all(moved) if step == 1 else not any(moved)


class Plain(nn.Module):
    """A network that is not timm's, with convolutions of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.taken = nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8, bias=False)
        self.same = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.shared = self.same
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.banded = nn.Conv2d(8, 8, (1, 7), padding=(0, 3), groups=8)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular")
        self.unpadded = nn.Conv2d(8, 8, 3, groups=8)
        self.scaled = nn.Conv2d(8, 8, 1, groups=8)
        self.dense = nn.Conv2d(8, 8, 3, padding=1)
        self.unused = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.same(self.taken(self.stem(x))))
        return self.dense(self.scaled(self.unpadded(self.circular(self.banded(self.strided(x))))))


def test_what_is_taken_and_what_is_left_and_why(caplog: pytest.LogCaptureFixture) -> None:
    model = Plain().eval()
    model.taken.requires_grad_(False)
    with caplog.at_level(logging.INFO):
        copied: Any = with_global_kernels(model, img_size=(64, 96), branch_norm="parseval", kernel="dilated")
    assert copied.same is copied.shared and {type(copied.taken), type(copied.same)} == {MRConv2d}
    assert copied.taken.reference_grid == (16, 24) and copied.taken.dilation == 2 and copied.taken.bias is None
    assert copied.taken.options.branch_norm == "parseval" and not copied.taken.alpha.requires_grad
    assert copied.same.alpha.requires_grad and not copied.same.training
    said = caplog.text
    for words in ("took 2 depthwise convolutions: taken, same", "strided (stride 2)", "banded (kernel 1×7)"):
        assert words in said
    for words in ("circular (padding", "unpadded (padding", "scaled (kernel 1×1)", "unused (no image passes it"):
        assert words in said
    assert "dense" not in said
    x = torch.randn(2, 3, 40, 56)
    assert relative_error(copied(x), model(x)) < 1e-5


def test_a_filter_chooses_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        copied: Any = with_global_kernels(Plain(), img_size=64, filter_fn=lambda name: name == "same")
    assert type(copied.taken) is nn.Conv2d and type(copied.same) is MRConv2d
    assert "taken, unused (filter_fn)" in caplog.text


def test_blocks_that_fold_are_left_until_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("repvit_m0_9", num_classes=5)
    with pytest.raises(ValueError, match="reparameterize_model"):
        with_global_kernels(model, img_size=64)


def test_convnext_is_a_case_of_it() -> None:
    convnext = randomize(timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16))).eval()
    x = torch.randn(1, 3, 64, 64)
    a, b = with_global_kernels(convnext, img_size=64), mrconvnext.from_convnext(convnext, img_size=64)
    assert [layer.reference_grid for layer in layers_of(a)] == [layer.reference_grid for layer in layers_of(b)]
    torch.testing.assert_close(a(x), b(x), atol=1e-5, rtol=1e-5)


def test_weights_of_a_copy_load_into_another_in_either_form() -> None:
    model = with_global_kernels(Plain().eval(), img_size=64)
    for layer in layers_of(model):
        nn.init.normal_(layer.alpha)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    for own in (model, reparameterize_model(model)):
        again = with_global_kernels(Plain().eval(), img_size=64)
        again.load_state_dict(own.state_dict())
        torch.testing.assert_close(again(x), expected, atol=1e-4, rtol=1e-4)


def test_any_network_follows_its_images() -> None:
    model: Any = with_global_kernels(Plain().eval(), img_size=64)
    for layer in layers_of(model):
        nn.init.normal_(layer.alpha)
    moved: Any = resample(model, (128, 96))
    assert moved.taken.reference_grid == (32, 24) and moved.taken.made_for == (16, 16)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(resample(moved, 64)(x), model(x))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(model=nn.Sequential(nn.Conv2d(3, 3, 3))), ValueError, "none at all"),
        (dict(model=nn.Conv2d(8, 8, 3, padding=1, groups=8)), ValueError, "none at all"),
        (dict(model=nn.Sequential(MRConv2d(3, 8))), ValueError, "1 are MRConv2d already"),
        (dict(filter_fn=lambda name: False), ValueError, "filter_fn"),
        (dict(img_size=0), ValueError, "img_size"),
        (dict(img_size=2), ValueError, "img_size=2"),
        (dict(branch_norm="layer"), ValueError, "branch_norm"),
        (dict(colour=1), TypeError, "colour"),
    ],
)
def test_what_can_not_be(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        with_global_kernels(**{"model": Plain(), "img_size": 64, **change})
