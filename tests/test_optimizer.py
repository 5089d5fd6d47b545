"""The groups of the optimizer: which parameters decay, and at which rate each learns."""

import pytest
import timm
from helpers import SMALL, small_model
from torch import nn

from mrconvnext.training.arguments import parse_args
from mrconvnext.training.model import make_optimizer

CONVNEXT = {name: value for name, value in SMALL.items() if name != "img_size"}


def groups_of(model: nn.Module, *arguments: str) -> dict[str, dict]:
    """Returns the group of every parameter of a model, by the parameter's name."""
    args = parse_args(["--output", "x", *arguments])
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, args)
    return {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}


def decayed(model: nn.Module, *arguments: str) -> set[str]:
    """Returns the names of the parameters that decay, after checking that every parameter has one of two decays."""
    groups = groups_of(model, *arguments)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {group["weight_decay"] for group in groups.values()} == {0, 0.05}
    return {name for name, group in groups.items() if group["weight_decay"] > 0}


def matrices(model: nn.Module) -> set[str]:
    """Returns the names of the weights of a model's convolutions and linear layers."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    return {f"{name}.weight" for name in layers}


@pytest.mark.parametrize("arguments", [(), ("--layer-decay", "0.8")], ids=["default", "layer decay"])
@pytest.mark.parametrize(
    ("name", "options"), [("convnext_atto", CONVNEXT), ("resnet10t", {}), ("vit_tiny_patch16_224", {"depth": 2})]
)
def test_norms_biases_and_scales_of_a_model_of_timm_do_not_decay(name: str, options: dict, arguments) -> None:
    model = timm.create_model(name, **options)
    assert decayed(model, *arguments) == matrices(model)


@pytest.mark.parametrize("arguments", [(), ("--layer-decay", "0.8")], ids=["default", "layer decay"])
@pytest.mark.parametrize("norm", ["batch", "parseval"])
def test_an_mrconvnext_decays_what_a_convnext_does(norm: str, arguments: tuple[str, ...]) -> None:
    """Local taps included; kernels, α and the branches' norms as little as norms, biases and layer scales."""
    convnext = timm.create_model("convnext_atto", **CONVNEXT)
    assert decayed(small_model(branch_norm=norm), *arguments) == decayed(convnext, *arguments)


def test_kernels_learn_at_a_rate_of_their_own() -> None:
    """They are what a ConvNeXt does not have."""
    convnext = dict(timm.create_model("convnext_atto", **CONVNEXT).named_parameters())
    for name, group in groups_of(small_model(), "--kernel-lr-scale", "0.5").items():
        assert group["lr_scale"] == (1 if name in convnext else 0.5), name


def test_layer_decay_lowers_the_rate_towards_the_stem_and_keeps_the_scale_of_kernels() -> None:
    groups = groups_of(small_model(), "--layer-decay", "0.8", "--kernel-lr-scale", "0.5")
    scales = {name: group["lr_scale"] for name, group in groups.items()}
    block = "stages.{}.blocks.0.{}".format
    depths = ["stem.0.weight", *(block(stage, "mlp.fc1.weight") for stage in range(4)), "head.fc.weight"]
    assert sorted(depths, key=scales.__getitem__) == depths and len({scales[name] for name in depths}) == len(depths)
    assert scales["head.fc.weight"] == 1
    for stage in range(4):
        alpha, weight = scales[block(stage, "conv_dw.alpha")], scales[block(stage, "mlp.fc1.weight")]
        assert alpha == pytest.approx(0.5 * weight)


def test_frozen_parameters_are_in_no_group() -> None:
    model = timm.create_model("resnet10t")
    timm.utils.freeze(model, ["layer1"], include_bn_running_stats=False)
    frozen = {name for name in dict(model.named_parameters()) if name.startswith("layer1.")}
    assert groups_of(model).keys() == dict(model.named_parameters()).keys() - frozen
