"""What other libraries do to a model, each by its mechanism; with the libraries: ``python -m scripts.clients``."""

import copy
from typing import Any

import pytest
import timm
import torch
from helpers import SMALL, assert_agree, each_form, images, model_in, relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mrconvnext.norms import NORMS

# Offloading, as accelerate's: a module's own tensors are there only while its forward runs


class Offload:
    """Keeps the tensors of each module elsewhere, but for the time that its ``forward`` takes.

    Args:
        model: The model.
        buffers: Whether buffers are moved as well as parameters.
    """

    def __init__(self, model: nn.Module, buffers: bool) -> None:
        self.buffers = buffers
        self.kept: dict[nn.Module, dict[str, Tensor]] = {}
        for module in model.modules():
            self.kept[module] = self._own(module)
            self._put(module, meta=True)
            module.register_forward_pre_hook(lambda module, args: self._put(module, meta=False))
            module.register_forward_hook(lambda module, args, output: self._put(module, meta=True))

    def _own(self, module: nn.Module) -> dict[str, Tensor]:
        buffers = module.named_buffers(recurse=False) if self.buffers else ()
        return dict([*module.named_parameters(recurse=False), *buffers])

    def _put(self, module: nn.Module, meta: bool) -> None:
        for name, own in self.kept[module].items():
            value = own.detach().to("meta") if meta else own.detach().clone()
            setattr(module, name, nn.Parameter(value) if isinstance(own, nn.Parameter) else value)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
@each_form
def test_offloaded_weights(branch_norm: str, deployed: bool, buffers: bool, gradients: bool) -> None:
    model = model_in(branch_norm, deployed)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: None)  # blocks with hooks have whole batches
    with torch.set_grad_enabled(gradients):
        expected = model(images())
        Offload(model, buffers)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(images()), expected)


# Quantization, as torchao's: a parameter holds a tensor of another kind


class Rounded(torch.Tensor):
    """A float32 tensor that is stored as 8-bit integers times a scale, and multiplied as what it stands for."""

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> "Rounded":
        return torch.Tensor._make_wrapper_subclass(cls, size=integers.shape, dtype=scale.dtype)

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    def dequantize(self) -> Tensor:
        return self.integers * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Rounded(args[0].integers, args[0].scale)
        args = torch.utils._pytree.tree_map(lambda x: x.dequantize() if isinstance(x, Rounded) else x, args)
        return function(*args, **(kwargs or {}))


def round_linear(model: nn.Module) -> nn.Module:
    """Rounds the weights of all linear layers, in place, and returns a copy with the same numbers in plain tensors."""
    plain = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            scale = weight.abs().amax(1, keepdim=True) / 127
            rounded = Rounded((weight / scale).round().to(torch.int8), scale)
            module.weight = nn.Parameter(rounded, requires_grad=False)
            plain.get_submodule(name).weight = nn.Parameter(rounded.dequantize())
    return plain


@pytest.mark.parametrize("gradients", [False, True])
@each_form
def test_weights_that_are_tensors_of_another_kind(branch_norm: str, deployed: bool, gradients: bool) -> None:
    model = model_in(branch_norm, deployed, conv_mlp=False)
    with torch.set_grad_enabled(gradients):
        before = model(images())
        plain = round_linear(model)
        assert (
            sum(isinstance(module.weight.data, Rounded) for module in model.modules() if isinstance(module, nn.Linear))
            == 11
        )
        assert_agree(model(images()), plain(images()))
        assert relative_error(model(images()), before) > 1e-4


# Adapters, as PEFT's: a module is replaced by one that wraps it, with layers of its kind


class LowRank(nn.Module):
    """LoRA of a convolution: its output plus that of a convolution of the same kind to few channels, and from these."""

    def __init__(self, base: nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.base = base
        kind = type(base)
        self.down = kind(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = kind(rank, base.out_channels, (1, 1), (1, 1), bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        self.base.weight += torch.einsum("or,rihw->oihw", self.up.weight[..., 0, 0], self.down.weight)
        return self.base


@each_form
def test_an_adapter_of_the_stem(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    before = model(images())
    model.stem[0] = LowRank(model.stem[0], rank=2)
    assert torch.equal(model(images()), before)
    optimizer = torch.optim.AdamW(params=[model.stem[0].up.weight], lr=1e-1)
    model(images()).square().sum().backward()
    optimizer.step()
    after = model(images())
    assert relative_error(after, before) > 1e-3
    model.stem[0] = model.stem[0].merged()
    assert_agree(model(images()), after)


def test_the_stem_is_made_as_a_conv2d() -> None:
    stem = model_in("kernel").stem[0]
    own = type(stem)(
        in_channels=3,
        out_channels=8,
        kernel_size=3,
        stride=2,
        padding=1,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device="cpu",
        dtype=torch.float64,
    )
    conv, x = nn.Conv2d(3, 8, 3, stride=2, padding=1, dtype=torch.float64), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    own.load_state_dict(conv.state_dict())
    assert isinstance(stem, nn.Conv2d) and torch.equal(own(x), conv(x))


# Walks through the children, as pytorch-grad-cam's


@each_form
def test_no_child_is_missing(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    assert all(child is not None for module in model.modules() for child in module._modules.values())


# Counts of operations


def profiled(model: nn.Module, x: Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        model(x)
    return sum(event.flops for event in profile.key_averages())


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def pointwise() -> nn.Module:
    """The ConvNeXt of the same size without its depthwise convolutions."""
    model = timm.create_model("convnext_atto", **{name: value for name, value in SMALL.items() if name != "img_size"})
    for stage in model.stages:
        for block in stage.blocks:
            block.conv_dw = nn.Identity()
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler")
@pytest.mark.parametrize("count", [profiled, counted])
@each_form
@torch.no_grad()
def test_counters_see_all_but_the_long_convolutions(
    branch_norm: str, deployed: bool, count, pointwise: nn.Module
) -> None:
    x = images(64, 64, batch=8)
    # The profiler counts elementwise products and sums as well, but not one that does both.
    assert count(model_in(branch_norm, deployed), x) >= 0.99 * count(pointwise, x) > 0


# Weights of another model


@pytest.mark.parametrize("branch_norm", NORMS)
@torch.no_grad()
def test_a_convnexts_state_dict(branch_norm: str) -> None:
    """Read as README says, into the training form: the ConvNeXt's function, whatever the branches were."""
    options = {name: value for name, value in SMALL.items() if name != "img_size"}
    convnext = timm.create_model("convnext_atto", ls_init_value=1.0, **options).eval()
    for model in (model_in(branch_norm), timm.create_model("mrconvnext_atto", branch_norm=branch_norm, **SMALL).eval()):
        assert relative_error(model(images()), convnext(images())) > 1e-3
        found = model.load_state_dict(state_dict=convnext.state_dict(), strict=False)
        assert not found.unexpected_keys
        for x in (images(), images(33, 47)):
            assert_agree(model(x), convnext(x))
        assert_agree(copy.deepcopy(model).reparameterize()(images()), convnext(images()))
