import copy
import itertools

import pytest
import timm
import torch
from helpers import SMALL, assert_agree, layers_of, randomize, relative_error, small_model
from timm.utils import reparameterize_model
from torch import Tensor, nn

import mrconvnext
from mrconvnext.kernels import KERNELS
from mrconvnext.norms import NORMS

SIZES = ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
SLOW = pytest.mark.slow
NAMES = [f"mrconvnext_{size}" for size in SIZES] + [f"mrconvnextv2_{size}" for size in (*SIZES, "huge")]


# The registry


def test_every_size_is_registered() -> None:
    assert set(timm.list_models("mrconvnext*")) == set(NAMES)
    for name in NAMES:
        assert timm.get_pretrained_cfg(name).classifier == "head.fc"


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=SLOW) for name in NAMES[1:])])
def test_is_timms_convnext_of_that_name_but_for_the_layers(name: str) -> None:
    ours = timm.create_model(name, device="meta")
    theirs = timm.create_model(name.removeprefix("mr"), device="meta")
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert shapes.pop(name) == parameter.shape
    assert all(".conv_dw." in name for name in shapes)
    assert type(ours.stages[0].blocks[0].norm) is type(theirs.stages[0].blocks[0].norm)


def test_pretrained_says_where_there_are_no_weights() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for mrconvnextv2_small"):
        timm.create_model("mrconvnextv2_small", pretrained=True)


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not_an_option"):
        timm.create_model("mrconvnext_atto", not_an_option=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kernel="gaussian"), ["kernel", "gaussian", "fourier_sparse"]),
        (dict(branch_norm="layer"), ["branch_norm", "layer", "parseval"]),
        (dict(img_size=31), ["img_size", "31", "32"]),
        (dict(img_size=(64, 16)), ["img_size", "(64, 16)", "32"]),
        (dict(img_size=(64,)), ["img_size", "(64,)"]),
        (dict(img_size=64.5), ["img_size", "64.5"]),
        (dict(img_size="64"), ["img_size", "64"]),
        (dict(min_lengths=(28, 28)), ["min_lengths", "(28, 28)", "4"]),
        (dict(min_lengths=100), ["min_length", "100"]),
        (dict(branch_norm="batch", sync_norm=True), ["sync_norm", "parseval"]),
        (dict(min_lengths=(28, 28, 28, 9999)), ["min_length", "9999"]),
        (dict(kernel_sizes=(7, 7, 7)), ["kernel_sizes", "(7, 7, 7)", "4"]),
        (dict(kernel_sizes=6), ["kernel_size", "6", "odd"]),
    ],
)
def test_bad_options_are_named(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        timm.create_model("mrconvnext_atto", **{**SMALL, **options})
    assert all(word in str(error.value) for word in words)


def test_options_reach_the_layers() -> None:
    options = dict(kernel="dilated", taps=5, bidirectional=False, branch_norm="parseval", sync_norm=True)
    options |= dict(min_lengths=(30, 20, 10, 5), max_branches=2, alpha_init=0.25, kernel_sizes=(0, 3, 5, 7))
    model = timm.create_model("mrconvnext_atto", img_size=96, **options)
    for stage, min_length, kernel_size, side in zip(model.stages, (30, 20, 10, 5), (0, 3, 5, 7), (24, 12, 6, 4)):
        layer = stage.blocks[0].conv_dw
        assert layer.branch_lengths == [min_length, side * (side + kernel_size // 2)]
        assert layer.kernels.values.shape[2:] == (1, 5)
        assert (layer.alpha == 0.25).all() and layer.norm.sync
        assert (layer.weight is None) if kernel_size == 0 else (layer.weight.shape[-1] == kernel_size)


def test_the_papers_layer_has_its_lengths_and_no_local_taps() -> None:
    model = timm.create_model("mrconvnext_tiny", kernel_sizes=0, bidirectional=False, device="meta")
    lengths = [stage.blocks[0].conv_dw.branch_lengths for stage in model.stages]
    assert lengths == [[196, 392, 784, 1568, 3136], [49, 98, 196, 392, 784], [28, 56, 112, 196], [28, 49]]
    names = {name.split("conv_dw.")[1] for name, _ in model.named_parameters() if ".conv_dw." in name}
    assert not names & {"weight", "bias"}


def test_no_two_layers_have_the_same_lags() -> None:
    model = timm.create_model("mrconvnext_atto", depths=(2, 2, 2, 2), dims=(16, 16, 16, 16), img_size=32)
    layers = [*layers_of(model), mrconvnext.MRConv2d(16, (8, 8)), mrconvnext.MRConv2d(16, (8, 8))]
    lags = [layer.kernels.lags[0, :, 0] for layer in layers]
    assert {tuple(own.shape) for own in lags} == {(16, 16)}
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(lags, 2))


def test_models_are_reproducible() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(timm.create_model("mrconvnext_atto", **SMALL).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_deployed_model_refuses_a_convnext_checkpoint() -> None:
    """Its kernels would stay random: a ConvNeXt's weights go into the training form."""
    convnext = timm.create_model("convnext_atto", **{k: v for k, v in SMALL.items() if k != "img_size"})
    model = timm.create_model("mrconvnext_atto", inference_mode=True, **SMALL)
    with pytest.raises(RuntimeError, match="load it into a model in training form"):
        model.load_state_dict(convnext.state_dict(), strict=False)


@pytest.mark.parametrize("branch_norm", NORMS)
def test_weight_decay_spares_kernels_and_alpha(branch_norm: str) -> None:
    from timm.optim import param_groups_weight_decay

    model = small_model(branch_norm=branch_norm)
    for _ in range(2):
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        for name, parameter in model.named_parameters():
            spared = parameter.ndim <= 1 or (".conv_dw." in name and not name.endswith(".conv_dw.weight"))
            assert (id(parameter) in decayed) is not spared, name
        model.reparameterize()


# Deployed


def layer_outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the model's output, and the inputs and outputs of its layers."""
    inputs, outputs = [], []

    def record(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    hooks = [layer.register_forward_hook(record) for layer in layers_of(model)]
    y = model(x)
    for hook in hooks:
        hook.remove()
    return y, inputs, outputs


@pytest.mark.parametrize("output_stride", [pytest.param(8, marks=SLOW), pytest.param(16, marks=SLOW), 32])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_deployed_equals_trained(kernel: str, branch_norm: str, bidirectional: bool, output_stride: int) -> None:
    options = dict(kernel=kernel, branch_norm=branch_norm, bidirectional=bidirectional, output_stride=output_stride)
    model = small_model(**options)
    model.train()
    for _ in range(2):
        model(torch.randn(4, 3, 64, 64))
    model.eval()
    deployed = reparameterize_model(model)
    for size in ((64, 64), (96, 41)):
        x = torch.randn(2, 3, *size)
        logits, inputs, outputs = layer_outputs(model, x)
        assert_agree(deployed(x), logits)
        for layer, u, y in zip(layers_of(deployed), inputs, outputs):
            assert_agree(layer(u), y)

    with torch.no_grad():
        layers_of(deployed)[1].kernel.normal_()
    assert relative_error(deployed(x), logits) > 1e-3


@pytest.mark.parametrize("branch_norm", NORMS)
def test_our_method_and_timms_function_give_the_same(branch_norm: str) -> None:
    model = small_model(branch_norm=branch_norm)
    x = torch.randn(2, 3, 64, 64)
    theirs = reparameterize_model(model)
    assert layers_of(model)[0].kernel is None
    assert model.reparameterize() is model
    for a, b in zip(model.state_dict().values(), theirs.state_dict().values()):
        assert torch.equal(a, b)
    assert torch.equal(model(x), theirs(x))
    again = copy.deepcopy(model).reparameterize()
    assert torch.equal(reparameterize_model(again)(x), model(x))
    assert not any(list(layer.children()) for layer in layers_of(model))


def test_deployed_checkpoint_is_convnexts_keys_and_one_kernel_a_layer() -> None:
    deployed = set(small_model().reparameterize().state_dict())
    convnext = timm.create_model("convnext_atto", **{k: v for k, v in SMALL.items() if k != "img_size"}).state_dict()
    layers = {name.removesuffix("weight") for name in convnext if name.endswith("conv_dw.weight")}
    expected = {name for name in convnext if not name.endswith("conv_dw.weight")}
    expected |= {layer + name for layer in layers for name in ("kernel", "alpha", "local_taps", "grid", "format")}
    assert deployed == expected


@pytest.mark.parametrize("branch_norm", NORMS)
def test_checkpoints_load_in_all_four_directions(branch_norm: str) -> None:
    trained = small_model(branch_norm=branch_norm)
    deployed = reparameterize_model(trained)
    x = torch.randn(2, 3, 64, 64)
    for source in (trained, deployed):
        for target in (small_model(branch_norm=branch_norm, alpha_init=0.5), deployed):
            target = copy.deepcopy(target)
            randomize(target, seed=9)
            target.load_state_dict(source.state_dict())
            assert target.state_dict().keys() == source.state_dict().keys()
            assert torch.equal(target(x), source(x))
        always = timm.create_model("mrconvnext_atto", branch_norm=branch_norm, inference_mode=True, **SMALL).eval()
        assert always.state_dict().keys() == deployed.state_dict().keys()
        always.load_state_dict(source.state_dict())
        assert always.state_dict().keys() == deployed.state_dict().keys()
        assert_agree(always(x), trained(x))


def test_checkpoint_of_another_image_size_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"grid is \[16, 16, 3\].*\[24, 24, 3\]"):
        small_model(img_size=96).load_state_dict(small_model().state_dict())


def test_synchronised_batch_norm_folds_too() -> None:
    model = small_model(branch_norm="batch")
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) > 0
    assert_agree(model(x), expected)
    assert_agree(model.reparameterize()(x), expected)


# A superset of ConvNeXt


def convnext_with_large_kernels(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("convnext_tiny", ls_init_value=1.0, **options)
    for block in (block for stage in model.stages for block in stage.blocks):
        nn.init.normal_(block.conv_dw.weight, std=0.2)
        nn.init.normal_(block.conv_dw.bias, std=0.2)
        nn.init.uniform_(block.gamma, 0.5, 1.5)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("img_size", [224, 32, 64, 96])
@pytest.mark.parametrize("branch_norm", NORMS)
@torch.no_grad()
def test_equals_convnext_with_alpha_zero(branch_norm: str, img_size: int) -> None:
    convnext = convnext_with_large_kernels().eval()
    model = timm.create_model("mrconvnext_tiny", branch_norm=branch_norm, img_size=img_size, ls_init_value=1.0)
    model = randomize(model)
    missing, unexpected = model.load_state_dict(convnext.state_dict(), strict=False)
    assert not unexpected and all(".conv_dw." in name for name in missing)
    assert all((layer.alpha == 0).all() for layer in layers_of(model))
    sizes = [(224, 224), (97, 161), (320, 256), (64, 512)]
    inputs = [torch.randn(2, 3, *size) for size in sizes]
    expected = [convnext(x) for x in inputs]
    for mode in (True, False):
        model.train(mode)
        for x, y in zip(inputs, expected):
            assert_agree(model(x), y)
    model.reparameterize()
    for x, y in zip(inputs, expected):
        assert_agree(model(x), y)

    layers_of(model)[9].kernel.normal_()
    assert relative_error(model(inputs[1]), expected[1]) > 1e-3


# Any size


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 64), (40, 300), (225, 95), (160, 32)])
@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("img_size", [64, pytest.param((96, 160), marks=SLOW)])
def test_any_size(img_size, branch_norm: str, size: tuple[int, int]) -> None:
    model = small_model(branch_norm=branch_norm, img_size=img_size).train()
    # A BatchNorm needs two values a channel, which the last stage of a 32-pixel image has at batch 2.
    x = torch.randn(2 if branch_norm == "batch" else 1, 3, *size, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    model.eval()
    with torch.no_grad():
        expected = model(x)
        features = timm.create_model("mrconvnext_atto", features_only=True, img_size=img_size, depths=SMALL["depths"])
        strides = features.feature_info.reduction()
        assert strides == [4, 8, 16, 32]
        for stride, feature in zip(strides, features.eval()(x)):
            assert feature.shape[2:] == (size[0] // stride, size[1] // stride)
        assert_agree(model.reparameterize()(x), expected)


@pytest.mark.parametrize("options", [dict(in_chans=1), dict(in_chans=6, num_classes=0)])
def test_channels_and_classes(options: dict) -> None:
    model = small_model(**options)
    y = model(torch.randn(2, options["in_chans"], 64, 64))
    assert y.shape == (2, options.get("num_classes", 10) or 48)


# Bad images


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("deployed", [False, True])
def test_bad_images_are_named(features_only: bool, deployed: bool) -> None:
    model = timm.create_model("mrconvnext_atto", features_only=features_only, img_size=64, inference_mode=deployed)
    for size in ((31, 64), (64, 31), (8, 8)):
        with pytest.raises(ValueError, match=f"at least 32 pixels high and wide, got {size[0]}×{size[1]}"):
            model(torch.randn(1, 3, *size))
    with pytest.raises(ValueError, match=r"3 channels.*\[1, 1, 64, 64\]"):
        model(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"4 dimensions.*\[3, 64, 64\]"):
        model(torch.randn(3, 64, 64))
    with pytest.raises(TypeError, match="floating-point.*uint8"):
        model(torch.ones(1, 3, 64, 64, dtype=torch.uint8))


def test_small_images_fit_small_strides() -> None:
    model = small_model(patch_size=1, img_size=16)
    assert layers_of(model)[0].reference_grid == (16, 16)
    x = torch.randn(2, 3, 8, 11)
    expected = model(x)
    assert_agree(model.reparameterize()(x), expected)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        model(torch.randn(1, 3, 7, 16))
    with pytest.raises(ValueError, match="img_size.*at least 8"):
        small_model(patch_size=1, img_size=7)
