"""ConvNeXt's block by the compiled engine, some pixels at a time, against the block as timm runs it."""

import copy

import pytest
import timm
import torch
from helpers import SMALL, assert_agree, randomize
from torch import nn

import mrconvnext
from mrconvnext.engines import block, cpu, library
from mrconvnext.engines.block import use_fused_blocks


def convnexts(name: str = "convnext_atto", **options) -> tuple[nn.Module, nn.Module]:
    """Returns timm's ConvNeXt, and the same one with our blocks."""
    options = {name: value for name, value in {**SMALL, **options}.items() if name != "img_size"}
    plain = randomize(timm.create_model(name, **options)).eval()
    return plain, use_fused_blocks(copy.deepcopy(plain))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_mlp": False},
        {"ls_init_value": None},
        {"name": "convnextv2_atto"},
        {"name": "convnextv2_atto", "conv_mlp": False},
        {"drop_path_rate": 0.5},
        {"act_layer": "gelu_tanh"},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [0, 1, 5])
@torch.no_grad()
def test_computes_what_timms_block_computes(options: dict, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "PIECE", 100)  # pixels: less than an image in the first stage, more in the last
    plain, ours = convnexts(**options)
    for size in ((64, 64), (97, 45)):
        x = torch.randn(batch, 3, *size)
        assert ours(x).shape == plain(x).shape
        if batch:
            assert_agree(ours(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == plain(x).dtype


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)  # of DropPath
    wanted = [x, *(own for own in model.parameters() if own.requires_grad)]
    return list(torch.autograd.grad(model(x).square().mean(), wanted))


@pytest.mark.parametrize(
    "options",
    [
        {"drop_path_rate": 0.5},
        {"conv_mlp": False},
        {"ls_init_value": None},
        {"name": "convnextv2_atto"},
        {"drop_rate": 0.5},
    ],
    ids=str,
)
def test_trains_as_timms_block_does(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "PIECE", 100)
    plain, ours = convnexts(**options)
    x = torch.randn(4, 3, 64, 45, requires_grad=True)
    exact = gradients(copy.deepcopy(plain).double().train(), x.double())
    for a, b in zip(gradients(ours.train(), x), exact):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_frozen_weights_have_no_gradients() -> None:
    plain, ours = convnexts()
    for model in (plain, ours):
        model.stages[1].requires_grad_(False)
        model.stages[2].blocks[0].mlp.fc1.weight.requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    for a, b in zip(gradients(ours.train(), x), gradients(plain.train(), x)):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_gradients_have_gradients() -> None:
    """As a penalty on gradients needs them. Rounding grows on the way: it may be twice that of PyTorch's operations."""
    plain, ours = convnexts()
    x = torch.randn(2, 16, 9, 7)

    def penalty_gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        own, x = model.stages[0].blocks[0], x.clone().requires_grad_()
        wanted = [x, *own.parameters()]
        first = torch.autograd.grad(own(x).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)

    exact = penalty_gradients(copy.deepcopy(plain).double(), x.double())
    for a, b, c in zip(penalty_gradients(ours, x), penalty_gradients(plain, x), exact):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-6 * c.norm()


def test_derivatives_along_a_direction() -> None:
    found = []
    for model in convnexts():
        own = model.stages[0].blocks[0]
        torch.manual_seed(0)
        x, direction = torch.randn(2, 2, 16, 9, 7)
        found.append(torch.func.jvp(own, (x,), (direction,))[1])
        with torch.autograd.forward_ad.dual_level():
            y = own(torch.autograd.forward_ad.make_dual(x, direction))
            assert_agree(torch.autograd.forward_ad.unpack_dual(y).tangent, found[-1])
    assert_agree(*found)


@pytest.mark.skipif(cpu.library().functions is None, reason=cpu.library().description)
def test_training_keeps_half() -> None:
    kept = []
    for model in convnexts(drop_path_rate=0.5):
        own, seen = model.train().stages[0].blocks[0], {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, seen=seen: seen.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
        ):
            y = own(torch.randn(2, 16, 40, 40).to(memory_format=torch.channels_last))
        kept.append(sum(x.untyped_storage().nbytes() for x in seen.values()))
        assert y.requires_grad
    assert kept[1] < 0.62 * kept[0]


@torch.no_grad()
def test_hooks_see_the_whole_batch_and_replaced_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "PIECE", 1)
    plain, ours = convnexts()
    seen = []
    for model in (plain, ours):
        model.stages[0].blocks[0].norm.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        own = model.stages[1].blocks[0].mlp
        own.fc1 = nn.Sequential(own.fc1, nn.Tanh())
        own.act.register_forward_hook(lambda module, args, output: seen.append(len(output)) or 2 * output)
    x = torch.randn(3, 3, 64, 64)
    assert_agree(ours(x), plain(x))
    assert seen == 4 * [3]


@torch.no_grad()
def test_statistics_of_a_batch_are_those_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where BatchNorms are set to train() in a model in eval mode, to adapt them."""
    monkeypatch.setattr(block, "PIECE", 1)
    plain, ours = convnexts(norm_layer="batchnorm2d", conv_mlp=True)
    for model in (plain, ours):
        for module in model.modules():
            module.train(isinstance(module, nn.BatchNorm2d))
    x = torch.randn(3, 3, 64, 64)
    assert_agree(ours(x), plain(x))
    for (name, a), b in zip(ours.named_buffers(), plain.buffers()):
        assert torch.allclose(a, b, rtol=1e-5), name


@torch.no_grad()
def test_weights_of_any_order_in_memory() -> None:
    plain, ours = convnexts()
    for model in (plain, ours):
        own = model.stages[0].blocks[0]
        own.gamma = nn.Parameter(own.gamma[:1].clone().expand(16))
        own.mlp.fc1.bias = nn.Parameter(torch.stack([own.mlp.fc1.bias, -own.mlp.fc1.bias], dim=1)[:, 0])
    x = torch.randn(2, 3, 64, 64)
    assert_agree(ours(x), plain(x))


@torch.no_grad()
def test_the_plain_engine_has_whole_batches() -> None:
    plain, ours = convnexts()
    x = torch.randn(3, 3, 64, 64)
    with mrconvnext.engine("plain"):
        assert torch.equal(ours(x), plain(x))


@pytest.mark.skipif(cpu.library().functions is None, reason=cpu.library().description)
@torch.no_grad()
def test_where_it_is_timms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody would see a difference, or what is not PyTorch's own stands in the place of a weight."""
    calls = []
    compute = block._after_convolution
    monkeypatch.setattr(
        block, "_after_convolution", lambda *args, **kwargs: calls.append(args) or compute(*args, **kwargs)
    )
    x = torch.randn(2, 16, 16, 16)

    def is_fused(change=lambda own: None, x=x) -> bool:
        own = convnexts()[1].stages[0].blocks[0]
        change(own)
        calls.clear()
        own(x)
        return bool(calls)

    assert is_fused() and is_fused(lambda own: own.conv_dw.register_forward_hook(lambda *args: None))
    assert not is_fused(lambda own: own.mlp.fc2.register_forward_pre_hook(lambda *args: None))
    assert not is_fused(lambda own: own.norm.register_full_backward_hook(lambda *args: None))
    assert is_fused(lambda own: own.mlp.drop1.train())
    assert not is_fused(lambda own: setattr(own.mlp.drop1.train(), "p", 0.5))
    assert not is_fused(lambda own: own.double(), x.double())
    assert not is_fused(lambda own: setattr(own.mlp, "act", nn.ReLU()))
    assert not is_fused(lambda own: setattr(own.mlp, "fc1", nn.Sequential(own.mlp.fc1)))
    assert torch.func.vmap(convnexts()[1].stages[0].blocks[0])(x.unsqueeze(1)).shape == (2, 1, 16, 16, 16)
    assert not calls


@pytest.mark.skipif(cpu.library().functions is None, reason=cpu.library().description)
@pytest.mark.parametrize("vector_bytes", [size for size in library.VECTORS if size <= cpu.library().vector_bytes])
@pytest.mark.parametrize("columns", [1, 15, 16, 40])
def test_gelu_and_residual(vector_bytes: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cpu.library()._replace(vector_bytes=vector_bytes)
    monkeypatch.setattr(cpu, "library", lambda: found)
    x = torch.cat([torch.linspace(-9, 9, 40 * columns), torch.tensor([1e30, -1e30, 5.6, -5.6] * columns)])
    x, bias, gamma = x.view(-1, columns).contiguous(), torch.randn(columns) / 9, torch.randn(columns)
    y, shortcut, out = x.clone(), torch.randn_like(x), torch.empty_like(x)
    torch.ops.mrconvnext.bias_gelu(y, bias, y)
    at = (x + bias).double().requires_grad_()
    expected = nn.functional.gelu(at)
    assert ((y - expected).abs() <= 3e-7 * at.abs() + 1e-30).all()
    grad = torch.ones_like(x)
    torch.ops.mrconvnext.bias_gelu_backward(x, bias, grad, out)
    assert torch.equal(out, y)
    assert ((grad - torch.autograd.grad(expected.sum(), at)[0]).abs() <= 5e-7).all()
    scale = torch.rand(len(x))
    for own, factor in ((None, 1.0), (scale, scale.unsqueeze(1))):
        torch.ops.mrconvnext.residual(x, bias, gamma, own, shortcut, out)
        assert torch.allclose(out, shortcut + factor * gamma * (x + bias), rtol=1e-5)
    y = torch.full((1, columns), float("nan"))
    torch.ops.mrconvnext.bias_gelu(y, bias, y)
    assert y.isnan().all()
