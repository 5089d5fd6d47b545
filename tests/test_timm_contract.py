"""What else timm's users do with a model: script, trace, copy, halve, freeze, checkpoint, reparameterize.

timm's own model tests run beside these: ``scripts/timm_tests.py``.
"""

import copy
import io
import pickle

import pytest
import timm
import torch
from helpers import FORMS, assert_agree, each_engine, each_form, images, model_in, randomize
from timm.models._features import FeatureGetterNet
from timm.utils import freeze, reparameterize_model, unfreeze
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import mrconvnext
from mrconvnext.norms import NORMS

# torchvision says so of every model whose graph differs in training.
train_graph_differs = pytest.mark.filterwarnings("ignore:.*[Tt]he nodes obtained by tracing the model")
each_norm = pytest.mark.parametrize(
    "branch_norm", [pytest.param(norm, marks=() if norm == "kernel" else pytest.mark.slow) for norm in NORMS]
)


def saved(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Returns a TorchScript module, written to a file and read back."""
    file = io.BytesIO()
    torch.jit.save(m=module, f=file)
    file.seek(0)
    return torch.jit.load(f=file)


@pytest.mark.parametrize(
    ("branch_norm", "deployed", "exportable"),
    [
        pytest.param(*form, marks=() if form[1] else pytest.mark.slow)
        for form in [*((*form, False) for form in FORMS), ("kernel", True, True)]
    ],
)
@torch.no_grad()
def test_script(branch_norm: str, deployed: bool, exportable: bool) -> None:
    model = model_in(branch_norm, deployed, exportable=exportable)
    model(images())
    scripted = torch.jit.script(obj=model)
    loaded = saved(scripted)
    for x in (images(), images(33, 47)):
        assert_agree(scripted(x), model(x))
        assert_agree(loaded(x), model(x))


@pytest.mark.slow
@each_form
@pytest.mark.parametrize("gradients", [False, True])
def test_trace(branch_norm: str, deployed: bool, gradients: bool) -> None:
    """A traced model runs at other sizes than its own, as a ConvNeXt's does."""
    model = model_in(branch_norm, deployed)
    with torch.set_grad_enabled(gradients):
        traced = saved(torch.jit.trace(func=model, example_inputs=images()))
    with torch.no_grad():
        for x in (images() + 1, images(33, 47), images(160, 64, batch=1)):
            assert_agree(traced(x), model(x))


@each_form
@train_graph_differs
def test_fx(branch_norm: str, deployed: bool) -> None:
    """With FX's own tracer and with torchvision's, for sizes that were not there when it traced."""
    model = model_in(branch_norm, deployed)
    symbolic = torch.fx.symbolic_trace(root=model)
    extractor = create_feature_extractor(model=model, return_nodes={"stages.1": "feature", "head": "logits"})
    for x in (images(), images(33, 47)):
        assert_agree(symbolic(x), model(x))
        assert_agree(extractor(x)["logits"], model(x))
        assert_agree(extractor(x)["feature"], model.forward_intermediates(x)[1][1])


@train_graph_differs
@each_norm
def test_fx_trains(branch_norm: str) -> None:
    """A traced model tracks statistics as the model itself does."""
    model = model_in(branch_norm).train()
    reference = copy.deepcopy(model)
    extractor = create_feature_extractor(model=model, return_nodes={"head": "logits"}).train()
    for network in (lambda x: extractor(x)["logits"], reference):
        network(images()).square().sum().backward()
    for (name, a), b in zip(reference.named_buffers(), model.buffers()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
    for (name, a), b in zip(reference.named_parameters(), model.parameters()):
        # A traced graph computes the same by other operations.
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


@each_form
@each_engine
def test_low_precision(branch_norm: str, deployed: bool, engine: str) -> None:
    model = model_in(branch_norm, deployed)
    with mrconvnext.engine(engine):
        expected = model(images())
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            assert_agree(model(images()), expected, 0.1)
        half = model.bfloat16()(images().bfloat16())
        assert half.dtype == torch.bfloat16
        assert_agree(half, expected, 0.1)


@each_form
@each_engine
def test_channels_last(branch_norm: str, deployed: bool, engine: str) -> None:
    model = model_in(branch_norm, deployed)
    x = images().contiguous(memory_format=torch.channels_last)
    with mrconvnext.engine(engine):
        expected = model(images())
        assert_agree(model.to(memory_format=torch.channels_last)(x), expected)


@each_form
def test_copies(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    untouched = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = model(images())
        assert all(torch.equal(copied(images()), expected) for copied in untouched)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(images()), expected)
            copied.stages[0].blocks[0].conv_dw.bias.add_(1)
            assert not torch.equal(copied(images()), expected)
            assert torch.equal(model(images()), expected)
    model.train()(images()).sum().backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(images()), model(images()))


@each_form
def test_gradient_checkpointing(branch_norm: str, deployed: bool) -> None:
    plain = model_in(branch_norm, deployed).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        model(images()).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        assert_agree(b.grad, a.grad, 1e-4)
    if branch_norm == "parseval":  # BatchNorm counts a checkpointed batch twice
        for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers()):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


# Freezing


def buffers_that_move(model: nn.Module, x: Tensor) -> list[str]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(x)
    return [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]


@each_norm
def test_timm_freezes_and_unfreezes(branch_norm: str) -> None:
    model = model_in(branch_norm)
    x, frozen = images(), ["stem", "stages"]
    expected = model.forward_features(x)
    freeze(root_module=model, submodules=frozen)
    model.train()
    assert_agree(model.forward_features(x), expected)
    assert buffers_that_move(model, x) == []
    assert [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")] == []
    fused = copy.deepcopy(model).eval().reparameterize()
    assert_agree(fused.forward_features(x), expected)
    assert not fused.stages[0].blocks[0].conv_dw.kernel.requires_grad

    unfreeze(root_module=model, submodules=frozen)
    model.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    moving = buffers_that_move(model, x)
    assert (moving == []) == (branch_norm in ("kernel", "none"))
    assert_agree(model.eval().forward_features(x), copy.deepcopy(model).reparameterize().forward_features(x))


@each_norm
def test_a_part_is_frozen(branch_norm: str) -> None:
    """The first two stages by ``freeze``: what is behind them goes on learning."""
    model = model_in(branch_norm).train()
    freeze(root_module=model, submodules=["stem", "stages.0", "stages.1"])
    moving = buffers_that_move(model, images())
    assert all(name.startswith(("stages.2", "stages.3")) for name in moving)
    assert (moving == []) == (branch_norm in ("kernel", "none"))
    model(images()).sum().backward()
    assert all(
        (p.grad is None) == name.startswith(("stem", "stages.0", "stages.1")) for name, p in model.named_parameters()
    )


# Reparameterization and features


@each_norm
def test_timms_idea_of_a_reparameterization(branch_norm: str) -> None:
    """What timm asks of its mobile models in ``test_mobile_model_fusion_features``."""
    model = model_in(branch_norm)
    for norm, indices in ((False, [0, 1]), (True, [0, -1])):
        expected = model.forward_intermediates(images(), indices=indices, norm=norm, intermediates_only=True)
        getter = FeatureGetterNet(copy.deepcopy(model), out_indices=indices, norm=norm).eval()
        torch.testing.assert_close(getter(images()), expected)
        fused = reparameterize_model(getter)
        torch.testing.assert_close(fused(images()), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(torch.jit.script(fused)(images()), fused(images()))
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())
        getter.train()
        sum(feature.square().mean() for feature in getter(images())).backward()
        # Older versions of timm keep a norm behind the last feature that is taken.
        assert all(p.grad is not None for p in getter.model.stages.parameters())


@each_norm
def test_features_reparameterize(branch_norm: str) -> None:
    options = dict(features_only=True, img_size=64, ls_init_value=1.0, branch_norm=branch_norm)
    features = randomize(timm.create_model("mrconvnext_atto", **options)).eval()
    for expected, actual in zip(features(images()), reparameterize_model(features)(images())):
        assert_agree(actual, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_form
@torch.no_grad()
def test_cuda_equals_cpu(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    expected = model(images())
    model.cuda()
    assert_agree(model(images().cuda()).cpu(), expected, 1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device_type="cuda", dtype=dtype):
            assert_agree(model(images().cuda()).cpu(), expected, 0.1)
