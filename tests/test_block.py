"""ConvNeXt's block with everything folded, against the block as timm runs it."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import SMALL, assert_agree, randomize
from torch import nn

from mrconvnext.block import FastBlock
from mrconvnext.derived import derived_count


def fast_convnext(**options) -> tuple[nn.Module, nn.Module]:
    """Returns timm's ConvNeXt, and the same one with fast blocks."""
    options = {name: value for name, value in {**SMALL, **options}.items() if name != "img_size"}
    plain = randomize(timm.create_model("convnext_atto", **options)).eval()
    fast = copy.deepcopy(plain)
    for stage in fast.stages:
        for i, block in enumerate(stage.blocks):
            stage.blocks[i] = FastBlock(block)
    return plain, fast


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


def test_leaves_the_fast_path_where_it_would_change_what_a_user_sees() -> None:
    plain, fast = fast_convnext()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(fast(x), plain(x))  # with gradients
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


@torch.no_grad()
def test_copies_and_pickles_carry_no_folded_weights() -> None:
    _, fast = fast_convnext()
    x = torch.randn(2, 3, 64, 64)
    expected = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not is_folded(twin)
        assert torch.equal(twin(x), expected)
    assert is_folded(fast) and not is_folded(fast.train())
