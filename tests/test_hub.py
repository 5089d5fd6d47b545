"""Models saved and published, and made again by timm alone, against a Hub on loopback."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from conftest import HOME
from helpers import SMALL, assert_agree, layers_of, randomize, small_model
from hub_server import Hub
from safetensors.torch import load_file, save
from torch import Tensor, nn

import mrconvnext
from mrconvnext.hub import is_deployed, parity

REPO = "someone/small"
FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a logged-in user has."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub.token


def assert_same(ours: nn.Module, expected: nn.Module) -> None:
    """Bit-equal tensors and outputs."""
    own, given = ours.state_dict(), expected.state_dict()
    assert own.keys() == given.keys() and all(torch.equal(own[name], given[name]) for name in own)
    x = torch.randn(2, expected.stem[0].in_channels, 64, 97)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), expected.eval()(x))


def snippet(card: str) -> nn.Module:
    """Runs the code that a model's card shows."""
    scope: dict = {}
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    return scope["model"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branch_norm": "parseval", "kernel": "dilated", "bidirectional": False, "img_size": (64, 96)},
        {"branch_norm": "batch", "kernel": "sparse", "patch_size": 2, "img_size": 32},
        {"in_chans": 1, "min_lengths": (28, 16, 8, 2), "max_branches": 3, "modes": 4, "taps": 5},
        {"kernel_sizes": (3, 5, 7, 0), "output_stride": 16, "global_pool": "max", "num_classes": 0},
        {"name": "mrconvnextv2_tiny", "head_norm_first": True, "act_layer": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_round_trip_through_a_folder(options: dict, fused: bool, tmp_path: Path) -> None:
    model = small_model(**options).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = mrconvnext.save(model, tmp_path / "saved", fused=fused)
    assert (found.logits == 0) != fused and max(found.logits, found.layer) < 1e-5
    assert {file.name for file in (tmp_path / "saved").iterdir()} == FILES
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = timm.create_model(f"local-dir:{tmp_path}/saved", pretrained=True)
    assert is_deployed(again) == fused
    assert_same(again, model.reparameterize() if fused else model)


def test_a_new_models_images_are_those_it_was_made_for(tmp_path: Path) -> None:
    """Unless its configuration says other ones."""
    model = small_model(img_size=(64, 96))
    mrconvnext.save(model, tmp_path / "made")
    assert timm.create_model(f"local-dir:{tmp_path}/made").pretrained_cfg["input_size"] == (3, 64, 96)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 128, 128)}
    mrconvnext.save(model, tmp_path / "said")
    assert timm.create_model(f"local-dir:{tmp_path}/said").pretrained_cfg["input_size"] == (3, 128, 128)


@pytest.mark.parametrize("fused", [False, True])
def test_round_trip_through_the_hub(fused: bool, hub: Hub, token: str) -> None:
    model = small_model("mrconvnextv2_tiny")
    url = mrconvnext.push_to_hub(model, REPO, fused=fused, metrics={"Top-1 (%)": 81.25}, license="cc-by-nc-4.0")
    assert url.startswith(f"{hub.address}/{REPO}/commit/")
    assert set(huggingface_hub.list_repo_files(REPO)) == FILES == set(hub.repositories[REPO].files("main"))
    card = hub.repositories[REPO].files("main")["README.md"].decode()
    assert (
        "# Model card for small\n" in card
        and "81.25" in card
        and "license: cc-by-nc-4.0" in card
        and ("deployed" in card) == fused
    )

    expected = model.reparameterize() if fused else model
    name = f"hf-hub:{REPO}"
    for again in (timm.create_model(name, pretrained=True), snippet(card)):
        assert is_deployed(again) == fused
        assert_same(again, expected)

    x = torch.randn(1, 3, 64, 64)
    other = timm.create_model(name, pretrained=True, num_classes=7).eval()
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    with torch.no_grad():
        assert other(x).shape == (1, 7) and is_deployed(other) == fused
        assert torch.equal(other.forward_features(x), expected.forward_features(x))
        for a, b in zip(features(x), expected.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(a, b)
        deployed = timm.create_model(name, pretrained=True, inference_mode=True).eval()
        assert is_deployed(deployed)
        assert_agree(deployed(x), expected(x))


@pytest.mark.slow
def test_converted_models_say_where_they_come_from(hub: Hub, tmp_path: Path) -> None:
    theirs = randomize(timm.create_model("convnext_atto"))
    hub.add("timm/convnext_atto.d2_in1k", {"model.safetensors": save(theirs.state_dict())})
    mrconvnext.save(timm.create_model("mrconvnext_atto", pretrained=True), tmp_path / "a")
    assert "Started from:** timm/convnext_atto.d2_in1k" in (tmp_path / "a" / "README.md").read_text()
    mrconvnext.save(timm.create_model("mrconvnext_atto", **SMALL), tmp_path / "b")
    assert "Started from:** not recorded" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.slow
def test_a_converted_model_of_ones_own(tmp_path: Path) -> None:
    options = {name: value for name, value in SMALL.items() if name != "img_size"}
    theirs = timm.models.convnext.ConvNeXt(**options, act_layer="relu", use_grn=True, ls_init_value=None)
    ours = randomize(mrconvnext.from_convnext(randomize(theirs)))
    with pytest.raises(ValueError, match="model_args"):
        mrconvnext.save(ours, tmp_path)
    with pytest.raises(ValueError, match=r"differs.*act_layer|differs.*model_args"):
        mrconvnext.save(ours, tmp_path, model_args={**options, "use_grn": True, "ls_init_value": None})
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_ones_own_is_no_published_weights(tmp_path: Path) -> None:
    options = {name: value for name, value in SMALL.items() if name != "img_size"}
    torch.save(timm.create_model("convnext_atto", **options).state_dict(), tmp_path / "own.pth")
    overlay = dict(file=str(tmp_path / "own.pth"), num_classes=10)
    model = timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    mrconvnext.save(model, tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "Started from:** own.pth" in card and "**Licence:** not stated" in card


def test_models_in_channels_last_order(tmp_path: Path) -> None:
    model = small_model().to(memory_format=torch.channels_last)
    assert mrconvnext.save(model, tmp_path).logits < 1e-5
    assert_same(
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model.to(memory_format=torch.contiguous_format)
    )


def test_what_is_not_known_of_weights_is_not_said(tmp_path: Path) -> None:
    model = small_model()
    assert model.pretrained_cfg["license"] == "apache-2.0"  # of the weights that timm has of this name
    mrconvnext.save(model, tmp_path / "a")
    card, config = ((tmp_path / "a" / name).read_text() for name in ("README.md", "config.json"))
    assert "license:" not in card and "**Licence:** not stated" in card
    assert "tag" not in (cfg := json.loads(config)["pretrained_cfg"]) and "license" not in cfg
    mrconvnext.save(model, tmp_path / "b", license="mit")
    fused = timm.create_model(f"local-dir:{tmp_path}/b", pretrained=True)
    mrconvnext.save(fused, tmp_path / "c", fused=True)
    card = (tmp_path / "c" / "README.md").read_text()
    assert "license: mit" in card and "**Started from:** b" in card


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("dear diary")
    with pytest.raises(ValueError, match=f"{name} is in the way"):
        mrconvnext.save(small_model(), tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "dear diary")]


def test_saving_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    model, state = small_model(), torch.get_rng_state()
    mrconvnext.save(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_outputs_are_zero_is_compared_all_the_same(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        nn.init.zeros_(model.head.fc.weight)
        nn.init.zeros_(model.head.fc.bias)
        layers_of(model)[1].alpha.zero_()
        layers_of(model)[1].weight.zero_()
        layers_of(model)[1].bias.zero_()
        mrconvnext.save(model, tmp_path / "zeros", fused=True)
        other = copy.deepcopy(model).reparameterize()
        layers_of(other)[3].kernel.mul_(1.01)
    assert not parity(model, other, torch.randn(2, 3, 64, 64)).within(1e-4)
    nn.init.constant_(model.head.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="finite"):
        mrconvnext.save(model, tmp_path / "new" / "nan")
    assert not (tmp_path / "new").exists()


def test_a_fused_model_of_low_precision_is_written_in_float32(tmp_path: Path) -> None:
    model = small_model().bfloat16()
    assert mrconvnext.save(model, tmp_path / "fused", fused=True).logits < 1e-5
    mrconvnext.save(model, tmp_path / "trained")
    assert load_file(tmp_path / "fused" / "model.safetensors")["head.fc.weight"].dtype == torch.float32
    assert load_file(tmp_path / "trained" / "model.safetensors")["head.fc.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_revisions_and_private_repositories(hub: Hub, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small_model()
    mrconvnext.push_to_hub(first, REPO, private=True)
    pinned = hub.repositories[REPO].branches["main"]
    mrconvnext.push_to_hub(randomize(small_model(), seed=1), REPO)
    assert hub.repositories[REPO].private
    mrconvnext.push_to_hub(first, REPO, revision="branch")
    assert_same(timm.create_model(f"hf-hub:{REPO}@branch", pretrained=True), first)
    assert_same(timm.create_model(f"hf-hub:{REPO}@{pinned}", pretrained=True), first)
    with pytest.raises(AssertionError):
        assert_same(timm.create_model(f"hf-hub:{REPO}", pretrained=True), first)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError, match="authenticated"):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True, cache_dir=Path(HOME.name, "elsewhere"))


@pytest.mark.slow
def test_cache_dir_and_offline(hub: Hub, tmp_path: Path) -> None:
    model = small_model()
    mrconvnext.save(model, tmp_path / "saved")
    hub.add(REPO, {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()})
    assert_same(timm.create_model(f"hf-hub:{REPO}", pretrained=True, cache_dir=tmp_path / "cache"), model)
    assert (tmp_path / "cache" / "models--someone--small").is_dir()

    def offline(cache: Path) -> subprocess.CompletedProcess:
        code = f"import timm, mrconvnext; timm.create_model('hf-hub:{REPO}', pretrained=True)"
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert offline(tmp_path / "cache").returncode == 0
    refused = offline(tmp_path / "empty")
    assert refused.returncode != 0 and "HF_HUB_OFFLINE" in refused.stderr


# Bad input


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    mrconvnext.save(small_model(), tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    hub.add(REPO, files)
    hub.add("someone/gated", files, gated=True)
    hub.add("someone/empty", {"config.json": files["config.json"]})
    for name, error, words in [
        ("hf-hub:someone/nothing", huggingface_hub.errors.RepositoryNotFoundError, "Repository Not Found"),
        ("hf-hub:someone/gated", huggingface_hub.errors.GatedRepoError, "gated repo"),
        ("hf-hub:someone/empty", huggingface_hub.errors.EntryNotFoundError, "model"),
        (f"hf-hub:{REPO}@nowhere", huggingface_hub.errors.RevisionNotFoundError, "nowhere"),
    ]:
        with pytest.raises(error, match=words):
            timm.create_model(name, pretrained=True)
    timm.create_model(f"hf-hub:{REPO}", pretrained=True)


def test_pushing_without_a_token(hub: Hub) -> None:
    with pytest.raises((huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalTokenNotFoundError)):
        mrconvnext.push_to_hub(small_model(), REPO)
    with pytest.raises(ValueError, match="organisation/name"):
        mrconvnext.push_to_hub(small_model(), "small")
    assert not hub.repositories


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"\xff" * 8 + b[8:], lambda b: b""])
def test_damaged_safetensors(damage, hub: Hub, tmp_path: Path) -> None:
    model = small_model()
    mrconvnext.save(model, tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    hub.add(REPO, {**files, "model.safetensors": damage(files["model.safetensors"])})
    with pytest.raises(RuntimeError, match=f"{REPO} is damaged.*again"):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    hub.repositories[REPO].commit(files)
    assert_same(timm.create_model(f"hf-hub:{REPO}", pretrained=True), model)
    (tmp_path / "model.safetensors").write_bytes(damage(files["model.safetensors"]))
    with pytest.raises(RuntimeError, match="damaged"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_server_gone_in_the_middle_of_a_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    mrconvnext.save(model, tmp_path)
    hub.add(REPO, {file.name: file.read_bytes() for file in tmp_path.iterdir()})
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut = 5000
    with pytest.raises(Exception, match="(?i)incomplete|peer closed|consistency|connection"):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    hub.cut = None
    assert_same(timm.create_model(f"hf-hub:{REPO}", pretrained=True), model)


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("made-by-the-file",)


def test_files_with_code_are_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mrconvnext.save(small_model(), tmp_path / "saved")
    buffer = io.BytesIO()
    torch.save({"head.fc.weight": Code()}, buffer, pickle_module=pickle)
    config = (tmp_path / "saved" / "config.json").read_bytes()
    hub.add(REPO, {"config.json": config, "pytorch_model.bin": buffer.getvalue()})
    (tmp_path / "weights.bin").write_bytes(buffer.getvalue())
    overlay = dict(file="weights.bin")
    for name, options in ((f"hf-hub:{REPO}", {}), ("mrconvnext_atto", {"pretrained_cfg_overlay": overlay})):
        with pytest.raises(RuntimeError, match="weights_only"):
            timm.create_model(name, pretrained=True, **options)
    assert not Path("made-by-the-file").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_sizes": 5}, ["grid", "kernel_sizes"]),
        ({"dims": (16, 24, 32, 40)}, ["40"]),
    ],
    ids=str,
)
def test_fused_weights_into_a_model_with_other_options(options: dict, words: list[str], tmp_path: Path) -> None:
    mrconvnext.save(small_model(), tmp_path, fused=True)
    with pytest.raises(RuntimeError) as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options)
    assert all(word in str(error.value) for word in words)


def test_what_can_not_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        mrconvnext.save(nn.Linear(1, 1), tmp_path)
    with pytest.raises(TypeError, match="FeatureListNet"):
        mrconvnext.save(timm.create_model("mrconvnext_atto", features_only=True, **SMALL), tmp_path)
    with pytest.raises(ValueError, match="act_layer.*name"):
        mrconvnext.save(timm.create_model("mrconvnext_atto", act_layer=nn.SiLU, **SMALL), tmp_path)
    with pytest.raises(ValueError, match="limit=1e-12"):
        mrconvnext.save(small_model(), tmp_path, fused=True, limit=1e-12)
    assert list(tmp_path.iterdir()) == []


def other_classes(model: nn.Module) -> None:
    model.head.fc = nn.Linear(in_features=model.head.fc.in_features, out_features=7)


def no_classes(model: nn.Module) -> None:
    model.head.fc = nn.Identity()


def several_layers(model: nn.Module) -> None:
    model.head.fc = nn.Sequential(nn.Dropout(), nn.Linear(in_features=model.head.fc.in_features, out_features=10))


def no_head(model: nn.Module) -> None:
    model.head = nn.Identity()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", [other_classes, no_classes, several_layers, no_head])
def test_a_head_that_was_replaced(change, fused: bool, tmp_path: Path, hub: Hub) -> None:
    """timm can't make it again: the error says what can be done instead, and that works."""
    model = small_model()
    change(model)
    for write in (mrconvnext.save, mrconvnext.push_to_hub):
        with pytest.raises(ValueError, match=r"(?s)head was replaced.*model\.reset_classifier\(num_classes\)"):
            write(model, "someone/else" if write is mrconvnext.push_to_hub else tmp_path / "saved", fused=fused)
    assert not (tmp_path / "saved").exists() and not hub.repositories


@pytest.mark.parametrize("num_classes", [7, 0])
def test_a_classifier_that_was_reset(num_classes: int, tmp_path: Path) -> None:
    model = small_model()
    model.reset_classifier(num_classes=num_classes)
    mrconvnext.save(model, tmp_path)
    assert_same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    mrconvnext.save(small_model(), tmp_path, fused=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="limit"):
        mrconvnext.save(randomize(small_model(), seed=1), tmp_path, fused=True, limit=0)
    with pytest.raises(ValueError, match="deployed form.*own folder"):
        mrconvnext.save(small_model(), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@torch.no_grad()
def test_parity_sees_one_bad_layer() -> None:
    model = small_model()
    other = copy.deepcopy(model).reparameterize()
    images: Tensor = torch.randn(2, 3, 64, 64)
    assert max(parity(model, other, images)[:2]) < 1e-5
    layers_of(other)[3].kernel.mul_(1.01)
    found = parity(model, other, images)
    assert 0.003 < found.layer < 0.02 and found.name == "stages.2.blocks.1.conv_dw" and found.logits > 1e-4
    layers_of(other)[1].kernel.fill_(float("nan"))
    assert parity(model, other, images).name == "stages.1.blocks.0.conv_dw"


def test_config_says_what_makes_the_model(tmp_path: Path) -> None:
    mrconvnext.save(small_model(branch_norm="parseval"), tmp_path, fused=True)
    modes = {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert len(modes) == 1, modes
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "mrconvnext_atto" and config["num_classes"] == 10
    assert config["model_args"]["inference_mode"] is True and config["model_args"]["branch_norm"] == "parseval"
