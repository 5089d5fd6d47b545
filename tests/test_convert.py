"""An MRConvNeXt that starts from a ConvNeXt's weights, wherever these come from, computes what the ConvNeXt does."""

import logging
import re
from pathlib import Path

import pytest
import timm
import torch
from helpers import SMALL, assert_agree, layers_of, randomize, relative_error
from hub_server import Hub
from safetensors.torch import save, save_file
from timm.models import load_state_dict
from timm.models.convnext import default_cfgs
from torch import Tensor, nn

import mrconvnext
from mrconvnext.convert import options_of_file

CONVNEXT = {name: value for name, value in SMALL.items() if name != "img_size"}
SIZES = [(64, 64), (97, 45), (160, 224)]
TAGS = timm.list_models("mrconvnext*", pretrained=True)
LARGE = re.compile(r"_(small|base|large|huge)\.")


def distinct_tags() -> list:
    """Returns one of the tags whose checkpoints have the same names and shapes."""
    kinds = {}
    for name in TAGS:
        cfg = timm.get_pretrained_cfg(name)
        kinds.setdefault((cfg.architecture, cfg.num_classes, name.endswith("fcmae")), name)
    return [pytest.param(name, marks=pytest.mark.slow if LARGE.search(name) else ()) for name in kinds.values()]


def source_of(name: str) -> str:
    """Returns the name of timm's model and tag that a tag of ours stands for."""
    return timm.get_pretrained_cfg(name).hf_hub_id.removeprefix("timm/")


def convnext(name: str = "convnext_atto", **options) -> nn.Module:
    """Returns a ConvNeXt in eval mode whose blocks matter: layer scales and norms of order 1."""
    model = randomize(timm.create_model(name, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_dw" in name or "grn" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


@torch.no_grad()
def assert_same_function(ours: nn.Module, theirs: nn.Module, sizes: list[tuple[int, int]] = SIZES) -> None:
    """Compares logits in train mode, eval mode and deployed, and then sees that the comparison can fail."""
    channels = theirs.stem[0].in_channels
    inputs = [torch.randn(2, channels, *size) for size in sizes]
    expected = [theirs.eval()(x) for x in inputs]
    for prepare in (ours.train, ours.eval, ours.reparameterize):
        prepare()
        for x, y in zip(inputs, expected):
            assert_agree(ours(x), y)
    layers_of(ours)[2].kernel.normal_()
    assert relative_error(ours(inputs[0]), expected[0]) > 1e-3


# timm's checkpoints


def test_tags_are_those_of_timm() -> None:
    theirs = [
        name
        for name in timm.list_models("convnext*", pretrained=True)
        if re.fullmatch(r"convnext(v2)?_(atto|femto|pico|nano|tiny|small|base|large|huge)", name.partition(".")[0])
    ]
    assert sorted(source_of(name) for name in TAGS) == sorted(theirs)
    assert "mrconvnext_tiny.convnext_in12k_ft_in1k" in TAGS and "mrconvnextv2_atto.convnextv2_fcmae" in TAGS
    for name in TAGS:
        ours, source = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(source_of(name))
        for field in ("license", "mean", "std", "input_size", "crop_pct", "num_classes", "interpolation"):
            assert getattr(ours, field) == getattr(source, field), (name, field)
    for name, cfgs in default_cfgs.items():
        if cfgs.default.has_weights and f"mr{name}" in timm.list_models("mrconvnext*"):
            assert source_of(f"mr{name}") == f"{name}.{cfgs.tags[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", distinct_tags())
def test_every_tag_fits(name: str) -> None:
    weights = timm.create_model(source_of(name), device="meta").state_dict()
    if name.endswith("fcmae"):  # there the masked autoencoder's file has no head
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), device="meta")


def facebooks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict in the layout of ConvNeXt's original repository."""

    def renamed(name: str) -> str:
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        return name.replace("head.norm.", "norm.").replace("head.fc.", "head.")

    def reshaped(name: str, value: Tensor) -> Tensor:
        if ".grn." in name:
            return value.reshape(1, 1, 1, -1)
        return value.flatten(1) if ".mlp.fc" in name and value.dim() == 4 else value

    return {"model": {renamed(name): reshaped(name, value) for name, value in weights.items()}}


def clips(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict in the layout of CLIP's image tower, with a part of the text tower."""
    names = {name: f"visual.trunk.{name}" for name in weights if not name.startswith("head.fc")}
    return {
        **{new: weights[old] for old, new in names.items()},
        "visual.head.proj.weight": weights["head.fc.weight"],
        "text_projection": torch.zeros(3, 3),
    }


@pytest.mark.parametrize("layout", [facebooks, clips, dict])
@pytest.mark.parametrize("name", ["convnext_atto", "convnext_tiny", "convnextv2_atto", "convnextv2_tiny"])
def test_a_file_in_any_layout(name: str, layout, tmp_path: Path) -> None:
    theirs = convnext(name, **CONVNEXT)
    if layout is clips:
        nn.init.zeros_(theirs.head.fc.bias)
    torch.save(layout(theirs.state_dict()), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=10)
    ours = timm.create_model(f"mr{name}", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert_same_function(ours, theirs)


def test_weights_of_a_masked_autoencoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = convnext("convnextv2_atto", **{**CONVNEXT, "num_classes": 0})
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("head.")}
    save_file(weights, tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"))
    with caplog.at_level(logging.INFO, logger="mrconvnext"):
        ours = timm.create_model(
            "mrconvnextv2_atto.convnextv2_fcmae",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            **{**SMALL, "num_classes": 0},
        )
    (message,) = [record.message for record in caplog.records if record.name == "mrconvnext.convert"]
    assert f"all {len(weights)} tensors" in message and "head.norm.weight" in message and "α = 0" in message
    x = torch.randn(1, 3, 64, 64)
    assert_agree(ours.eval().forward_features(x), theirs.forward_features(x))


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 10, "img_size": 96},
        {"num_classes": 10, "inference_mode": True},
        {"num_classes": 10, "kernel": "dilated", "branch_norm": "parseval"},
        {"num_classes": 10, "output_stride": 8},
        {"num_classes": 10, "in_chans": 1},
    ],
    ids=str,
)
def test_options_beside_pretrained(options: dict) -> None:
    theirs = convnext(**CONVNEXT)
    weights = dict(theirs.state_dict())
    if "in_chans" in options:
        theirs = timm.create_model("convnext_atto", **{**CONVNEXT, "in_chans": 1})
        theirs.load_state_dict({**weights, "stem.0.weight": weights["stem.0.weight"].sum(1, keepdim=True)})
    if "output_stride" in options:
        theirs = timm.create_model("convnext_atto", **CONVNEXT, output_stride=8)
        theirs.load_state_dict(weights)
    overlay = dict(state_dict=weights, num_classes=10)
    ours = timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, **options})
    assert options.get("inference_mode", False) == (layers_of(ours)[0].kernel is not None)
    assert_same_function(ours, theirs)


@torch.no_grad()
def test_features_and_other_classes_keep_the_backbone() -> None:
    theirs = convnext(**CONVNEXT)
    x = torch.randn(2, 3, 97, 64)
    overlay = dict(state_dict=theirs.state_dict())
    ours = timm.create_model(
        "mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "num_classes": 7}
    ).eval()
    assert ours(x).shape == (2, 7)
    assert_agree(ours.forward_features(x), theirs.forward_features(x))
    features = timm.create_model(
        "mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **SMALL
    ).eval()
    for own, expected in zip(features(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True):
        assert_agree(own, expected)


# From the Hub


@pytest.fixture
def atto(hub: Hub) -> nn.Module:
    """A ConvNeXt of real size whose weights lie on the Hub as timm's do."""
    model = convnext("convnext_atto")
    hub.add("timm/convnext_atto.d2_in1k", {"model.safetensors": save(model.state_dict()), "config.json": b"{}"})
    return model


@pytest.mark.slow
def test_pretrained_from_the_hub(atto: nn.Module) -> None:
    ours = timm.create_model("mrconvnext_atto", pretrained=True)
    assert_same_function(ours, atto, [(224, 224), (64, 97), (160, 288)])


@pytest.mark.slow
@torch.no_grad()
def test_pretrained_from_the_hub_deployed_and_for_other_classes(atto: nn.Module) -> None:
    x = torch.randn(1, 3, 128, 160)
    for options in ({"num_classes": 7}, {"num_classes": 7, "inference_mode": True}):
        ours = timm.create_model("mrconvnext_atto.convnext_d2_in1k", pretrained=True, **options).eval()
        assert ours(x).shape == (1, 7)
        assert_agree(ours.forward_features(x), atto.forward_features(x))


@pytest.mark.slow
def test_two_steps_open_the_branches(atto: nn.Module) -> None:
    model = timm.create_model("mrconvnext_atto", pretrained=True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def moved(word: str) -> list[bool]:
        names = [name for name in before if f".conv_dw.{word}" in name]
        return [not torch.equal(model.get_parameter(name), before[name]) for name in names]

    for expected in (False, True):
        model(torch.randn(4, 3, 64, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(moved("alpha"))
        assert set(moved("kernels.")) == {expected}


# A model in memory


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"branch_norm": "parseval", "img_size": 64, "kernel": "fourier"}, marks=pytest.mark.slow),
        pytest.param({"branch_norm": "batch", "max_branches": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "model_options",
    [{}, {"kernel_sizes": (3, 5, 7, 9)}, {"conv_bias": False, "act_layer": "relu", "norm_eps": 1e-3}, {"in_chans": 1}],
    ids=str,
)
def test_from_convnext(options: dict, model_options: dict) -> None:
    theirs = convnext("convnextv2_atto", **{**CONVNEXT, **model_options})
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = mrconvnext.from_convnext(theirs, **options)
    assert isinstance(ours, mrconvnext.MRConvNeXt) and ours.pretrained_cfg["architecture"] == "mrconvnextv2_atto"
    assert not ours.training and all(parameter.requires_grad for parameter in ours.parameters())
    assert_same_function(ours, theirs)
    assert all(torch.equal(value, weights[name]) for name, value in theirs.state_dict().items())


def test_from_convnext_keeps_what_is_frozen_and_double_precision() -> None:
    theirs = convnext(**CONVNEXT).double().train()
    theirs.stages[0].requires_grad_(False).eval()
    ours = mrconvnext.from_convnext(theirs)
    assert ours.training and not ours.stages[0].blocks[0].conv_dw.training
    assert all(p.dtype == torch.float64 for p in ours.parameters())
    assert not any(p.requires_grad for p in ours.stages[0].parameters())
    assert all(p.requires_grad for p in ours.stages[1].parameters())


def with_other_convolution(**options) -> nn.Module:
    model = timm.create_model("convnext_atto", **CONVNEXT)
    block = model.stages[2].blocks[1]
    block.conv_dw = nn.Conv2d(32, 32, **{"kernel_size": 7, "padding": 3, "groups": 32, **options})
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(1, 1),
        lambda: "text",
        lambda: timm.create_model("convnext_atto", features_only=True, **CONVNEXT),
        lambda: timm.create_model("mrconvnext_atto", **SMALL),
        lambda: timm.create_model("convnext_atto", **{**CONVNEXT, "kernel_sizes": 4}),
        lambda: with_other_convolution(padding_mode="circular"),
        lambda: with_other_convolution(kernel_size=5, padding=2),
        lambda: with_other_convolution(groups=8),
    ],
    ids=["linear", "text", "features", "ours", "even", "circular", "mixed", "grouped"],
)
def test_from_anything_else_is_a_type_error(make) -> None:
    with pytest.raises(TypeError, match="ConvNeXt"):
        mrconvnext.from_convnext(make())


def test_from_convnext_names_bad_options() -> None:
    model = convnext(**CONVNEXT)
    with pytest.raises(TypeError, match="num_classes"):
        mrconvnext.from_convnext(model, num_classes=3)
    with pytest.raises(ValueError, match="gaussian"):
        mrconvnext.from_convnext(model, kernel="gaussian")


# Weights that do not fit


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda: timm.create_model("resnet18", num_classes=10).state_dict(), ["ConvNeXt"]),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10).state_dict(), ["ConvNeXt"]),
        (lambda: convnext(**{**CONVNEXT, "dims": (8, 24, 32, 48)}).state_dict(), ["stages.0", "(8, 1, 7, 7)"]),
        (lambda: convnext(**{**CONVNEXT, "depths": (1, 1, 3, 1)}).state_dict(), ["stages.2.blocks.2", "size"]),
        (lambda: convnext(**{**CONVNEXT, "depths": (1, 1, 1, 1)}).state_dict(), ["stages.2.blocks.1", "missing"]),
        (lambda: convnext("convnextv2_atto", **CONVNEXT).state_dict(), ["grn", "mrconvnextv2"]),
        (lambda: convnext(**CONVNEXT, kernel_sizes=5).state_dict(), ["kernel_size", "5"]),
        (lambda: {"weights": 3}, ["ConvNeXt"]),
    ],
    ids=["resnet", "vit", "width", "deeper", "shallower", "v2", "kernel", "nothing"],
)
@pytest.mark.parametrize("num_classes", [10, 7])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_weights_of_another_model(weights, words: list[str], num_classes: int, inference_mode: bool) -> None:
    overlay = dict(state_dict=weights(), num_classes=10)
    options = {**SMALL, "num_classes": num_classes, "inference_mode": inference_mode}
    with pytest.raises(RuntimeError) as error:
        timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 8])
@torch.no_grad()
def test_what_a_file_of_ours_says_of_its_model(patch_size: int, tmp_path: Path) -> None:
    """With stems of every stride: the model that the file's own options make takes its weights."""
    options = {**SMALL, "img_size": (16 * patch_size, 24 * patch_size), "patch_size": patch_size}
    theirs = randomize(timm.create_model("mrconvnext_atto", **options)).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    found = options_of_file(file=tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"), num_classes=found["num_classes"])
    given = {"depths": SMALL["depths"], "dims": SMALL["dims"], **found}
    ours = timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **given).eval()
    x = torch.randn(2, 3, *options["img_size"])
    assert torch.equal(ours(x), theirs(x))


def test_what_a_file_with_a_stem_of_two_convolutions_says(tmp_path: Path) -> None:
    model = timm.create_model("mrconvnext_atto", **SMALL, stem_type="overlap")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert options_of_file(file=tmp_path / "weights.pth") == {"num_classes": 10, "img_size": (64, 64)}


@pytest.mark.parametrize("deployed", [False, True])
def test_lags_that_are_no_lags_are_refused_from_a_file(deployed: bool, tmp_path: Path) -> None:
    weights = timm.create_model("mrconvnext_atto", **SMALL).state_dict()
    weights["stages.1.blocks.0.conv_dw.kernels.lags"][0] = 10**6
    save_file(weights, tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"), num_classes=10)
    with pytest.raises(RuntimeError, match=r"stages\.1\.blocks\.0\.conv_dw\.kernels\.lags must be different"):
        timm.create_model(
            "mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, inference_mode=deployed, **SMALL
        )


@pytest.mark.parametrize("missing", ["conv_dw.alpha", "conv_dw.grid", "all that is not a parameter"])
@pytest.mark.parametrize("branch_norm", ["kernel", "parseval"])
def test_part_of_our_own_weights_is_refused(missing: str, branch_norm: str) -> None:
    """And not taken for a ConvNeXt, to which branches are added that have α = 0."""
    model = timm.create_model("mrconvnext_atto", branch_norm=branch_norm, **SMALL)
    weights = {name: x for name, x in model.state_dict().items() if not name.endswith(missing)}
    if missing.startswith("all"):
        weights = dict(model.named_parameters())
    overlay = dict(state_dict=weights, num_classes=10)
    with pytest.raises(RuntimeError, match=r"missing: stages\.0\.blocks\.0\.conv_dw\."):
        timm.create_model(
            "mrconvnext_atto",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            branch_norm=branch_norm,
            **{**SMALL, "num_classes": 7},
        )


def test_a_classifier_that_timm_drops_is_named(caplog: pytest.LogCaptureFixture) -> None:
    overlay = dict(state_dict=convnext(**CONVNEXT).state_dict())
    timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert any("classifier" in record.message and "num_classes=10" in record.message for record in caplog.records)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=dict(file="nowhere.pth"))


def test_load_state_dict_reads_what_training_writes(tmp_path: Path) -> None:
    """timm's train.py writes more than weights into a checkpoint."""
    theirs = convnext(**CONVNEXT)
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    assert set(load_state_dict(str(tmp_path / "last.pth.tar"))) == set(theirs.state_dict())
    overlay = dict(file=str(tmp_path / "last.pth.tar"), num_classes=10)
    ours = timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert_same_function(ours, theirs)
