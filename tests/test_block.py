"""ConvNeXt's block with everything folded, against the block as timm runs it."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import SMALL, assert_agree, randomize, small_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from mrconvnext.block import FastBlock, use_fast_blocks
from mrconvnext.derived import derived_count


def fast_convnext(**options) -> tuple[nn.Module, nn.Module]:
    """Returns timm's ConvNeXt, and the same one with fast blocks."""
    options = {name: value for name, value in {**SMALL, **options}.items() if name != "img_size"}
    plain = randomize(timm.create_model("convnext_atto", **options)).eval()
    return plain, use_fast_blocks(copy.deepcopy(plain))


def is_folded(model: nn.Module) -> bool:
    return all(derived_count(block.norm.weight) for block in model.modules() if isinstance(block, FastBlock))


@pytest.mark.parametrize("options", [{}, {"conv_mlp": False}, {"ls_init_value": None}], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_computes_what_timms_block_computes(options: dict, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrconvnext.block.PIECE_BYTES", 2 * 64 * 16 * 16 * 4)  # two images a piece in the first stage
    plain, fast = fast_convnext(**options)
    for size in ((64, 64), (97, 45)):
        x = torch.randn(batch, 3, *size)
        assert_agree(fast(x), plain(x))
    assert is_folded(fast)


@torch.no_grad()
def test_sees_every_change_of_its_parameters() -> None:
    plain, fast = fast_convnext()
    x = torch.randn(2, 3, 64, 64)
    fast(x)
    for parameter, twin in zip(fast.parameters(), plain.parameters()):
        noise = 0.1 * torch.randn_like(parameter)
        parameter += noise
        twin += noise
        assert_agree(fast(x), plain(x))
    fast.load_state_dict(randomize(plain, seed=1).state_dict())
    assert_agree(fast(x), plain(x))


@pytest.mark.parametrize(
    "options", [{}, {"conv_mlp": True}, {"ls_init_value": None}, {"drop_path_rate": 0.5}, {"drop_rate": 0.5}], ids=str
)
def test_gradients_are_those_of_timms_block(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrconvnext.block.PIECE_BYTES", 2 * 64 * 16 * 16 * 4)
    plain, fast = fast_convnext(**options)
    exact, dtype = plain.double(), torch.float64
    x = torch.randn(5, 3, 64, 64, requires_grad=True)
    for model, inputs in ((exact, x.detach().to(dtype).requires_grad_()), (fast, x)):
        torch.manual_seed(0)  # of DropPath
        model.train()(inputs).square().sum().backward()
        model.gradients = [inputs.grad, *(parameter.grad for parameter in model.parameters())]
    for a, b in zip(fast.gradients, exact.gradients):
        assert a.dtype == torch.float32
        assert_agree(a.to(dtype), b, 2e-5)


def test_differentiable_twice() -> None:
    plain, fast = fast_convnext()
    penalties = []
    for model, dtype in ((plain.double(), torch.float64), (fast, torch.float32)):
        x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        penalties.append([parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None])
    for a, b in zip(*penalties, strict=True):
        assert_agree(b, a, 1e-4)


def test_training_keeps_less_than_timms_block() -> None:
    def saved_bytes(model: nn.Module) -> int:
        sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = model(torch.randn(4, 3, 64, 64))
        assert kept.requires_grad
        return sum(sizes.values())

    plain, fast = fast_convnext(dims=(64, 64, 64, 64))
    assert saved_bytes(fast) < 0.75 * saved_bytes(plain)


def test_leaves_the_fast_path_where_it_would_change_what_a_user_sees() -> None:
    plain, fast = fast_convnext()
    x = torch.randn(2, 3, 64, 64)
    fast(x).sum().backward()
    with torch.no_grad():
        assert fast(x[:0]).shape == (0, 10)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), plain(x))
        assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))
        fast.float().train()
        fast(x)
        assert not is_folded(fast)
        fast.eval()
        seen = []
        for block in (m for m in fast.modules() if isinstance(m, FastBlock)):
            block.mlp.act.register_forward_hook(lambda *_: seen.append(1))
        fast(x)
    assert len(seen) == 5


def lora(linear: nn.Module) -> nn.Module:
    class LowRank(type(linear)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    linear.__class__ = LowRank
    return linear


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.mlp, "fc1", lora(block.mlp.fc1)),
        lambda block: setattr(block.mlp, "act", nn.GELU(approximate="tanh")),
        lambda block: setattr(block.mlp, "norm", nn.Sigmoid()),
        lambda block: setattr(block.mlp.fc2, "forward", lambda x: x[:, :16]),
        lambda block: setattr(block.mlp, "drop1", nn.Identity()),
    ],
    ids=["subclass", "tanh", "norm", "forward", "identity"],
)
def test_modules_that_a_user_changed_are_run(change) -> None:
    plain, fast = fast_convnext(conv_mlp=True, dims=(16, 16, 16, 16))
    for model in (plain, fast):
        for block in (b for stage in model.stages for b in stage.blocks):
            change(block)
    x = torch.randn(2, 3, 64, 64)
    assert_agree(fast(x), plain(x), 1e-6)
    with torch.no_grad():
        assert_agree(fast(x), plain(x), 1e-6)


def test_optimizer_steps_that_move_no_version() -> None:
    model = small_model(inference_mode=True)
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model(x).square().sum().backward()
    with torch.no_grad():
        model(x)
    optimizer.step()
    expected = model(x).detach()
    with torch.no_grad():
        assert_agree(model(x), expected)


def test_global_hooks_see_every_module() -> None:
    _, fast = fast_convnext()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    with handle, torch.no_grad():
        fast(torch.randn(1, 3, 64, 64))
    assert all(module in seen for module in fast.modules() if isinstance(module, (nn.GELU, nn.LayerNorm)))


@pytest.mark.parametrize("form", ["batch", "parseval", "deployed"])
def test_transforms_of_functions(form: str) -> None:
    """Those of torch.func, and forward-mode differentiation, against one backward pass for each image."""
    model = small_model(branch_norm="parseval" if form == "parseval" else "batch")
    if form == "deployed":
        model.reparameterize()
    x, tangent = torch.randn(2, 2, 3, 64, 64)
    parameters = {name: p for name, p in model.named_parameters() if "conv_dw" in name}

    def loss(parameters: dict, image: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    slopes = vmap(grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for slope, own in zip(slopes.values(), expected):
            assert_agree(slope[i], own, 1e-4)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    with torch.no_grad():
        _, moved = jvp(lambda images: model(images).sum(), (x.detach(),), (tangent,))
    assert_agree(moved, (gradient * tangent).sum(), 1e-4)


def test_gradients_of_a_block_used_twice() -> None:
    plain, fast = fast_convnext()
    found = []
    for model in (plain, fast):
        block = model.stages[0].blocks[0]
        x = torch.linspace(-1, 1, 16 * 8 * 8).view(1, 16, 8, 8)
        loss = block(block(x)).square().sum()
        found.append(torch.autograd.grad(loss, list(block.parameters()), create_graph=True))
    for a, b in zip(*found):
        assert_agree(b.detach(), a.detach(), 1e-4)


@torch.no_grad()
def test_copies_and_pickles_carry_no_folded_weights() -> None:
    _, fast = fast_convnext()
    x = torch.randn(2, 3, 64, 64)
    expected = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not is_folded(twin)
        assert torch.equal(twin(x), expected)
    assert is_folded(fast) and not is_folded(fast.train())
