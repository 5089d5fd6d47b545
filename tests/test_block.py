"""ConvNeXt's block a few images at a time, against the block as timm runs it."""

import copy

import pytest
import timm
import torch
from helpers import SMALL, assert_agree, randomize
from torch import nn

import mrconvnext
from mrconvnext.engines import block
from mrconvnext.engines.block import use_piece_blocks


def convnexts(name: str = "convnext_atto", **options) -> tuple[nn.Module, nn.Module]:
    """Returns timm's ConvNeXt, and the same one with our blocks."""
    options = {name: value for name, value in {**SMALL, **options}.items() if name != "img_size"}
    plain = randomize(timm.create_model(name, **options)).eval()
    return plain, use_piece_blocks(copy.deepcopy(plain))


@pytest.mark.parametrize(
    "options",
    [{}, {"conv_mlp": False}, {"ls_init_value": None}, {"name": "convnextv2_atto"}, {"drop_path_rate": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("batch", [0, 1, 5])
@torch.no_grad()
def test_computes_what_timms_block_computes(options: dict, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "PIECE_BYTES", 2 * 64 * 16 * 16 * 4)  # two images a piece in the first stage
    plain, ours = convnexts(**options)
    for size in ((64, 64), (97, 45)):
        x = torch.randn(batch, 3, *size)
        assert ours(x).shape == plain(x).shape
        if batch:
            assert_agree(ours(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == plain(x).dtype


def test_trains_as_timms_block_does() -> None:
    plain, ours = convnexts(drop_path_rate=0.5)
    for model in (plain, ours):
        torch.manual_seed(0)  # of DropPath
        model.train()(torch.ones(4, 3, 64, 64)).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.equal(a.grad, b.grad)


@torch.no_grad()
def test_hooks_see_the_whole_batch_and_replaced_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "PIECE_BYTES", 1)  # an image a piece
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
    monkeypatch.setattr(block, "PIECE_BYTES", 1)
    plain, ours = convnexts(norm_layer="batchnorm2d", conv_mlp=True)
    for model in (plain, ours):
        for module in model.modules():
            module.train(isinstance(module, nn.BatchNorm2d))
    x = torch.randn(3, 3, 64, 64)
    assert_agree(ours(x), plain(x))
    for (name, a), b in zip(ours.named_buffers(), plain.buffers()):
        assert torch.allclose(a, b, rtol=1e-5), name


@torch.no_grad()
def test_the_plain_engine_has_whole_batches() -> None:
    plain, ours = convnexts()
    x = torch.randn(3, 3, 64, 64)
    with mrconvnext.engine("plain"):
        assert torch.equal(ours(x), plain(x))
