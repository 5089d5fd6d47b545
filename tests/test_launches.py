"""What a GPU would be asked to do, against ConvNeXt: the bounds that docs/architecture.md states."""

import pytest

from scripts.launches import forward_pass, training_step


@pytest.mark.parametrize(("fused", "launches", "gigabytes"), [(False, 4.0, 1.9), (True, 2.5, 1.3)])
def test_a_training_step(fused: bool, launches: float, gigabytes: float) -> None:
    convnext = training_step("convnext_tiny", batch=128, fused=False)
    ours = training_step("mrconvnext_tiny", batch=128, fused=fused)
    assert ours.launches <= launches * convnext.launches
    assert ours.gigabytes <= gigabytes * convnext.gigabytes
    single, convnext_single = (
        training_step(name, batch=1, fused=fused) for name in ("mrconvnext_tiny", "convnext_tiny")
    )
    assert single.launches - convnext_single.launches == ours.launches - convnext.launches  # whatever the batch


@pytest.mark.parametrize(("fused", "launches", "gigabytes"), [(False, 2.0, 1.8), (True, 1.0, 1.01)])
def test_a_deployed_forward_pass(fused: bool, launches: float, gigabytes: float) -> None:
    convnext = forward_pass("convnext_tiny", batch=128, fused=False)
    ours = forward_pass("mrconvnext_tiny", batch=128, fused=fused, inference_mode=True)
    assert ours.launches <= launches * convnext.launches
    assert ours.gigabytes <= gigabytes * convnext.gigabytes
    assert forward_pass("mrconvnext_tiny", batch=1, fused=fused, inference_mode=True).launches == ours.launches
