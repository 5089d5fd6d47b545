"""ONNX files of the deployed form in ONNX Runtime, by the exporter that traces, timm's default, and the newer one."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import SMALL, assert_agree, layers_of, small_model
from timm.utils.onnx import onnx_export
from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript"),
]

# What a file may have beside ConvNeXt's operators: real arithmetic of every runtime, and what moves numbers about.
OPERATORS = {
    *{"MatMul", "Mul", "Add"},
    *{"Constant", "Shape", "Gather", "Slice", "Concat", "Reshape", "Transpose", "Unsqueeze", "Cast"},
}


def deployed_model(**options) -> nn.Module:
    return small_model(exportable=True, **options).reparameterize()


def operators(file: Path) -> set[str]:
    return {node.op_type for node in onnx.load(file).graph.node}


def run(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(file))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("size", [(224, 224), (97, 64)])
@pytest.mark.parametrize("name", ["mrconvnext_atto", "mrconvnextv2_tiny"])
@torch.no_grad()
def test_timms_default_export(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    model = deployed_model(name=name, img_size=224, kernel_sizes=(7, 5, 3, 0))
    file = tmp_path / "model.onnx"
    onnx_export(model, str(file), batch_size=2, input_size=(3, *size))
    onnx.checker.check_model(str(file), full_check=True)
    theirs = tmp_path / "convnext.onnx"
    options = {option: value for option, value in SMALL.items() if option != "img_size"}
    onnx_export(timm.create_model(name[2:], **options), str(theirs), batch_size=2, input_size=(3, *size))
    assert operators(file) - operators(theirs) <= OPERATORS
    for batch in (1, 5):
        x = torch.randn(batch, 3, *size)
        expected = model(x)
        assert_agree(run(file, x), expected)
    layers_of(model)[1].kernel.normal_()
    with pytest.raises(AssertionError, match="relative error"):
        assert_agree(run(file, x), model(x))


@torch.no_grad()
def test_another_size_than_the_exports_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx_export(deployed_model(), str(file), batch_size=2, input_size=(3, 64, 64))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="dimensions"):
        run(file, torch.randn(1, 3, 96, 64))


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch 2.9 writes a file that ONNX Runtime refuses")
@torch.no_grad()
def test_the_newer_exporter_writes_dft(tmp_path: Path) -> None:
    model = deployed_model()
    file = tmp_path / "model.onnx"
    onnx_export(model, str(file), batch_size=2, input_size=(3, 64, 64), use_dynamo=True)
    assert "DFT" in operators(file)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 64, 64)
        np.testing.assert_allclose(run(file, x), model(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("branch_norm", ["batch", "parseval"])
def test_the_training_form_is_refused(branch_norm: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="reparameterize"):
        onnx_export(small_model(branch_norm=branch_norm), str(tmp_path / "model.onnx"), input_size=(3, 64, 64))
