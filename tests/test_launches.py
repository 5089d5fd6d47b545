"""What a GPU would be asked to do, against ConvNeXt: the bounds that docs/gpu.md states."""

from types import ModuleType

import pytest

from mrconvnext.engines import cuda, plain
from scripts.launches import forward_pass, training_step


@pytest.mark.parametrize(("engine", "launches", "gigabytes"), [(plain, 3.5, 1.9), (cuda, 2.5, 1.3)])
def test_a_training_step(engine: ModuleType, launches: float, gigabytes: float) -> None:
    convnext = training_step("convnext_tiny", 128, plain)
    ours = training_step("mrconvnext_tiny", 128, engine)
    assert ours.launches <= launches * convnext.launches
    assert ours.gigabytes <= gigabytes * convnext.gigabytes
    single, convnext_single = (training_step(name, 1, engine) for name in ("mrconvnext_tiny", "convnext_tiny"))
    assert single.launches - convnext_single.launches == ours.launches - convnext.launches  # whatever the batch


@pytest.mark.parametrize(("engine", "launches", "gigabytes"), [(plain, 2.0, 1.8), (cuda, 1.14, 1.01)])
def test_a_deployed_forward_pass(engine: ModuleType, launches: float, gigabytes: float) -> None:
    convnext = forward_pass("convnext_tiny", 128, plain)
    ours = forward_pass("mrconvnext_tiny", 128, engine, inference_mode=True)
    assert ours.launches <= launches * convnext.launches
    assert ours.gigabytes <= gigabytes * convnext.gigabytes
    assert forward_pass("mrconvnext_tiny", 1, engine, inference_mode=True).launches == ours.launches
