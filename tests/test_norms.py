"""How branches are normalised, weighted and added, against the plain formulas."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from mrconvnext import precision
from mrconvnext.mrconv import MRConv2d
from mrconvnext.norms import _normalised_sum, normalised_sum


def arguments(zeros: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    kernels, alpha = torch.randn(3, 2, 9, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    if zeros:
        kernels[1, 0] = 0
    return kernels.requires_grad_(), alpha.requires_grad_()


def test_gradients_of_the_normalised_sum() -> None:
    assert gradcheck(normalised_sum, arguments())
    assert gradgradcheck(normalised_sum, arguments())


@pytest.mark.parametrize("zeros", [False, True])
def test_the_normalised_sum_is_the_sum_of_its_parts(zeros: bool) -> None:
    given = arguments(zeros)
    weights = torch.randn(2, 9, dtype=torch.float64)
    found, expected = ((function(*given) * weights).sum() for function in (normalised_sum, _normalised_sum))
    torch.testing.assert_close(found, expected)
    for own, other in zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given)):
        torch.testing.assert_close(own, other)


def test_tangents_and_maps_of_the_normalised_sum() -> None:
    given, moved = (tuple(tensor.detach() for tensor in arguments()) for _ in range(2))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(given, moved)]
        tangents = [forward_ad.unpack_dual(function(*duals)).tangent for function in (normalised_sum, _normalised_sum)]
    torch.testing.assert_close(*tangents)
    stacked = [torch.stack(pair) for pair in zip(given, moved)]
    expected = torch.stack([normalised_sum(*given), normalised_sum(*moved)])
    torch.testing.assert_close(torch.vmap(normalised_sum)(*stacked), expected)


@pytest.mark.parametrize("branch_norm", ["kernel", "parseval", "batch"])
def test_under_autocast_on_a_gpu_images_have_its_type(branch_norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = MRConv2d(3, (6, 6), branch_norm=branch_norm).eval(), torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32
        monkeypatch.setattr(precision, "HALVED", ("cpu",))  # there is no GPU here
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), atol=0.05, rtol=0.05)
