"""What else timm's users do with a model: script, trace, export, compile, copy, average, checkpoint, halve.

timm's own model tests run beside these: ``scripts/timm_tests.py``.
"""

import copy
import io
import pickle

import pytest
import timm
import torch
from helpers import assert_agree, layers_of, small_model
from timm.models._features import FeatureGetterNet
from timm.utils import ModelEmaV3, reparameterize_model
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mrconvnext.derived import derived_count
from mrconvnext.mrconv import BRANCH_NORMS

FORMS = [("batch", False), ("parseval", False), ("batch", True)]
# torchvision says so of every model whose graph differs in training.
train_graph_differs = pytest.mark.filterwarnings("ignore:The nodes obtained by tracing the model in train mode")
each_form = pytest.mark.parametrize(("branch_norm", "deployed"), FORMS)


def model_in(branch_norm: str, deployed: bool, **options) -> nn.Module:
    model = small_model(branch_norm=branch_norm, **options)
    return model.reparameterize() if deployed else model


def images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@each_form
@pytest.mark.parametrize("forward_first", [False, True])
@torch.no_grad()
def test_script(branch_norm: str, deployed: bool, forward_first: bool) -> None:
    model = model_in(branch_norm, deployed)
    if forward_first:
        model(images())
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for x in (images(), images(33, 47)):
        assert_agree(scripted(x), model(x))
        assert_agree(loaded(x), model(x))


@each_form
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a traced model keeps the size that it was traced at
@torch.no_grad()
def test_trace(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    model(images())
    traced = torch.jit.trace(model, images())
    assert_agree(traced(images() + 1), model(images() + 1))
    if deployed:
        for layer in layers_of(model):
            assert derived_count(layer.kernel) == 1
            layer.kernel.mul_(1.5)
        assert_agree(traced(images()), model(images()))


@each_form
@train_graph_differs
def test_fx(branch_norm: str, deployed: bool) -> None:
    """With FX's own tracer and with torchvision's, for sizes that were not there when it traced."""
    model = model_in(branch_norm, deployed)
    symbolic = torch.fx.symbolic_trace(model)
    extractor = create_feature_extractor(model, {"stages.1": "feature", "head": "logits"})
    for x in (images(), images(33, 47)):
        assert_agree(symbolic(x), model(x))
        assert_agree(extractor(x)["logits"], model(x))
        assert_agree(extractor(x)["feature"], model.forward_intermediates(x)[1][1])


@train_graph_differs
@pytest.mark.parametrize("branch_norm", BRANCH_NORMS)
def test_fx_trains(branch_norm: str) -> None:
    """A traced model tracks statistics as the model itself does."""
    model = small_model(branch_norm=branch_norm).train()
    reference = copy.deepcopy(model)
    extractor = create_feature_extractor(model, {"head": "logits"}).train()
    for network in (lambda x: extractor(x)["logits"], reference):
        network(images()).square().sum().backward()
    for (name, a), b in zip(reference.named_buffers(), model.buffers()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
    for (name, a), b in zip(reference.named_parameters(), model.parameters()):
        # A traced graph computes the same by other operations.
        assert (a.grad - b.grad).abs().max() <= 1e-5 * a.grad.abs().max(), name


@each_form
@torch.no_grad()
def test_export_with_dynamic_batch(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},), strict=False).module()
    for x in (images(), torch.cat([images()] * 3), images()[:1]):
        assert_agree(exported(x), model(x))


@each_form
@torch.no_grad()
def test_compile_in_one_graph(branch_norm: str, deployed: bool) -> None:
    torch.compiler.reset()
    model = model_in(branch_norm, deployed)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if deployed else "aot_eager")
    output = compiled(images())
    if deployed:
        assert all(derived_count(layer.kernel) == 1 for layer in layers_of(model))
    assert_agree(output, model(images()))
    if deployed:
        for layer in layers_of(model):
            layer.kernel.mul_(1.5)
        assert_agree(compiled(images()), model(images()))


@pytest.mark.parametrize("branch_norm", BRANCH_NORMS)
def test_compile_a_training_step_in_one_graph(branch_norm: str) -> None:
    torch.compiler.reset()
    model = small_model(branch_norm=branch_norm).train()
    reference = copy.deepcopy(model)
    for network in (torch.compile(model, fullgraph=True, backend="aot_eager"), reference):
        network(images()).square().sum().backward()
    for a, b in zip(model.parameters(), reference.parameters()):
        assert_agree(a.grad, b.grad, 1e-4)
    for (name, a), b in zip(model.named_buffers(), reference.buffers()):
        torch.testing.assert_close(a, b, msg=name)


@each_form
def test_low_precision(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert_agree(model(images()), expected, 0.1)
    half = model.bfloat16()(images().bfloat16())
    assert half.dtype == torch.bfloat16
    assert_agree(half, expected, 0.1)


@each_form
def test_channels_last(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    expected = model(images())
    x = images().contiguous(memory_format=torch.channels_last)
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
def test_averaging_follows_the_model(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        before = ema(images())
        assert torch.equal(before, model(images()))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        ema.update(model)
        for parameter in model.parameters():
            parameter.div_(1.1).mul_(1.05)
        assert not torch.equal(ema(images()), before)
        assert_agree(ema(images()), model(images()), 1e-4)


@pytest.mark.parametrize("branch_norm", BRANCH_NORMS)
def test_gradient_checkpointing(branch_norm: str) -> None:
    plain = small_model(branch_norm=branch_norm).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        model(images()).square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        assert_agree(b.grad, a.grad, 1e-4)
    if branch_norm == "parseval":
        for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers()):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("branch_norm", BRANCH_NORMS)
def test_timms_idea_of_a_reparameterization(branch_norm: str) -> None:
    """What timm asks of its mobile models in ``test_mobile_model_fusion_features``."""
    model = small_model(branch_norm=branch_norm)
    for norm, indices in ((False, [0, 1]), (True, [0, -1])):
        expected = model.forward_intermediates(images(), indices=indices, norm=norm, intermediates_only=True)
        getter = FeatureGetterNet(copy.deepcopy(model), out_indices=indices, norm=norm).eval()
        torch.testing.assert_close(getter(images()), expected)
        fused = reparameterize_model(getter)
        torch.testing.assert_close(fused(images()), expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(torch.jit.script(fused)(images()), fused(images()))
        getter.train()
        sum(feature.square().mean() for feature in getter(images())).backward()
        # Older versions of timm keep a norm behind the last feature that is taken.
        assert all(p.grad is not None for p in getter.model.stages.parameters())


def test_features_reparameterize() -> None:
    features = timm.create_model("mrconvnext_atto", features_only=True, img_size=64, ls_init_value=1.0).eval()
    for expected, actual in zip(features(images()), reparameterize_model(features)(images())):
        assert_agree(actual, expected)


def test_meta_device_then_weights() -> None:
    source = small_model()
    model = timm.create_model("mrconvnext_atto", device="meta", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), img_size=64)
    model.reset_classifier(10)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model.eval()(images()), source(images()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_form
@torch.no_grad()
def test_cuda_equals_cpu(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    expected = model(images())
    model.cuda()
    assert_agree(model(images().cuda()).cpu(), expected, 1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            assert_agree(model(images().cuda()).cpu(), expected, 0.1)
