"""Models that leave Python: torch.export and ONNX, and torch.compile."""

import copy
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import SMALL, assert_agree, each_form, images, layers_of, model_in, relative_error, small_model
from timm.utils.onnx import onnx_export
from torch import Tensor, nn

from mrconvnext.norms import NORMS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Constant folding - Only steps=1:UserWarning"),  # of any padding
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript"),
]

each_norm = pytest.mark.parametrize("branch_norm", NORMS)


# What compilers take their time for is the number of blocks.
TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


def exportable_model(**options) -> nn.Module:
    return small_model(exportable=True, **options).reparameterize()


# torch.export


def operators_of(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function"}


def values_of(module: torch.fx.GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in module.graph.nodes if isinstance(node.meta.get("val"), Tensor)]


@pytest.mark.slow
@each_form
@torch.no_grad()
def test_export_with_dynamic_batch(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed, **TINY)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(mod=model, args=(images(),), dynamic_shapes=shapes, strict=False).module()
    for x in (images(), torch.cat([images()] * 3), images()[:1]):
        assert_agree(exported(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_an_exportable_model_has_real_numbers_alone(strict: bool) -> None:
    model, x = exportable_model(**TINY), images()
    program = torch.export.export(mod=model, args=(x,), strict=strict)
    for stage in (program, program.run_decompositions()):
        assert not any(word in name for name in operators_of(stage.graph_module) for word in ("fft", "mrconvnext"))
        assert not any(value.is_complex() for value in values_of(stage.graph_module))
    assert_agree(program.module()(x), model(x))


@torch.no_grad()
def test_a_trace_of_an_exportable_model_has_real_numbers_alone() -> None:
    model, x = exportable_model(), images()
    traced = torch.jit.trace(func=model, example_inputs=x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any(word in kind for kind in kinds for word in ("fft", "complex", "mrconvnext::"))
    assert_agree(traced(torch.cat([x, x])), model(torch.cat([x, x])))
    with pytest.raises(RuntimeError, match="invalid for input of size"):  # its matrices are for one size
        traced(images(64, 64))


@torch.no_grad()
def test_exportable_changes_nothing_but_how() -> None:
    exportable, plain = exportable_model(), model_in("kernel", deployed=True)
    assert exportable.state_dict().keys() == plain.state_dict().keys()
    exportable.load_state_dict(plain.state_dict())
    for x in (images(), images(33, 47), images(160, 224, batch=1)):
        assert_agree(exportable(x), plain(x))


# ONNX

# What a file may have beside ConvNeXt's operators: real arithmetic of every runtime, and what moves numbers about.
OPERATORS = {
    *{"MatMul", "Mul", "Add", "Sub", "Div", "Mod"},
    *{"Constant", "ConstantOfShape", "Identity", "Shape", "Gather", "Slice", "Split", "Concat", "Pad"},
    *{"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Cast"},
}


def kinds_of(file: Path) -> set[str]:
    return {node.op_type for node in onnx.load(f=str(file)).graph.node}


def run(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path_or_bytes=str(file), providers=["CPUExecutionProvider"])
    (output,) = session.run(output_names=None, input_feed={session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (97, 64)])
@pytest.mark.parametrize("name", ["mrconvnext_atto", "mrconvnextv2_tiny"])
@torch.no_grad()
def test_timms_default_export(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    model = exportable_model(name=name, img_size=224, kernel_sizes=(7, 5, 3, 0))
    file = tmp_path / "model.onnx"
    onnx_export(model=model, output_file=str(file), batch_size=1, input_size=(3, *size))
    onnx.checker.check_model(model=str(file), full_check=True)
    theirs = tmp_path / "convnext.onnx"
    convnext = timm.create_model(name[2:], **{option: value for option, value in SMALL.items() if option != "img_size"})
    onnx_export(model=convnext, output_file=str(theirs), batch_size=1, input_size=(3, *size))
    assert kinds_of(file) - kinds_of(theirs) <= OPERATORS
    for batch in (1, 5):
        x = torch.randn(batch, 3, *size)
        assert_agree(run(file, x), model(x))
    nn.init.normal_(layers_of(model)[1].kernel)
    with pytest.raises(AssertionError, match="relative error"):
        assert_agree(run(file, x), model(x))


@torch.no_grad()
def test_another_size_than_the_exports_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx_export(model=exportable_model(), output_file=str(file), batch_size=2, input_size=(3, 64, 64))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="dimensions"):
        run(file, torch.randn(1, 3, 96, 64))


def export(model: nn.Module, file: Path, dynamo: bool) -> None:
    torch.onnx.export(model=model, args=(images(64, 64),), f=str(file), dynamo=dynamo, verbose=False)


@pytest.mark.parametrize("exportable", [False, True])
@torch.no_grad()
def test_pytorchs_older_export(exportable: bool, tmp_path: Path) -> None:
    model, x = small_model(exportable=exportable).reparameterize(), images(64, 64)
    export(model, tmp_path / "model.onnx", dynamo=False)
    assert not kinds_of(tmp_path / "model.onnx") & {"DFT", "STFT"}
    assert_agree(run(tmp_path / "model.onnx", x), model(x))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch 2.9 writes a file that ONNX Runtime refuses")
@pytest.mark.parametrize("exportable", [False, True])
@torch.no_grad()
def test_pytorchs_newer_export(exportable: bool, tmp_path: Path) -> None:
    model, x = small_model(exportable=exportable, **TINY).reparameterize(), images(64, 64)
    export(model, tmp_path / "model.onnx", dynamo=True)
    assert not kinds_of(tmp_path / "model.onnx") & {"DFT", "STFT"}
    assert_agree(run(tmp_path / "model.onnx", x), model(x))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch 2.9 writes a file that ONNX Runtime refuses")
@torch.no_grad()
def test_timms_newer_export_has_a_dynamic_batch(tmp_path: Path) -> None:
    model, file = exportable_model(**TINY), tmp_path / "model.onnx"
    onnx_export(model=model, output_file=str(file), batch_size=2, input_size=(3, 64, 64), use_dynamo=True)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 64, 64)
        assert_agree(run(file, x), model(x))


def messages(error: BaseException | None) -> str:
    """Returns what an error says, and those that it comes from."""
    return "" if error is None else f"{error} {messages(error.__cause__ or error.__context__)}"


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@each_norm
def test_the_training_form_is_refused(branch_norm: str, dynamo: bool, tmp_path: Path) -> None:
    model = model_in(branch_norm, exportable=True, **TINY)
    with pytest.raises(RuntimeError) as error:
        export(model, tmp_path / "model.onnx", dynamo)
    assert "reparameterize the model" in messages(error.value)
    assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(RuntimeError, match="reparameterize the model"):
        onnx_export(model=model, output_file=str(tmp_path / "model.onnx"), input_size=(3, 64, 64))


# torch.compile


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def first_block(branch_norm: str, deployed: bool = False) -> nn.Module:
    """Returns stem and first stage of a model: each block more takes a compiler as long again."""
    model = model_in(branch_norm, deployed, **TINY)
    return nn.Sequential(model.stem, model.stages[0])


@each_form
@torch.no_grad()
def test_compile_for_all_sizes_in_one_graph(branch_norm: str, deployed: bool) -> None:
    """The second size makes the graph one of any size; others need no more, nor do other weights."""
    model = first_block(branch_norm, deployed)
    compiled = torch.compile(model=model, fullgraph=True, backend="aot_eager")
    for x in (images(64, 64), images(96, 96)):
        assert_agree(compiled(x), model(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in (images(128, 128), images(160, 160)):
            before = compiled(x)
            assert_agree(before, model(x))
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        assert_agree(compiled(x), model(x))
        assert relative_error(compiled(x), before) > 1e-3


def assert_trains_as(compiled: nn.Module, model: nn.Module, reference: nn.Module, x: Tensor) -> None:
    for network in (compiled, reference):
        network(x).square().sum().backward()
    for a, b in zip(model.parameters(), reference.parameters()):
        assert_agree(a.grad, b.grad, 1e-4)
    for (name, a), b in zip(model.named_buffers(), reference.buffers()):
        torch.testing.assert_close(a, b, msg=name)


@each_form
def test_compile_a_training_step_in_one_graph(branch_norm: str, deployed: bool) -> None:
    model = first_block(branch_norm, deployed).train()
    reference = copy.deepcopy(model)
    assert_trains_as(torch.compile(model=model, fullgraph=True, backend="aot_eager"), model, reference, images())


@pytest.mark.slow
@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_compile_a_whole_model(deployed: bool) -> None:
    model = model_in("kernel", deployed)
    compiled = torch.compile(model=model, fullgraph=True, backend="aot_eager")
    assert_agree(compiled(images()), model(images()))


@pytest.mark.slow
@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_inductor_in_evaluation(deployed: bool) -> None:
    """At a second and a third size of images."""
    model = first_block("kernel", deployed)
    compiled = torch.compile(model=model, fullgraph=True)
    for x in (images(64, 64), images(96, 96), images(128, 128)):
        assert_agree(compiled(x), model(x))


@pytest.mark.slow
def test_inductor_trains() -> None:
    model = first_block("kernel").train()
    reference = copy.deepcopy(model)
    assert_trains_as(torch.compile(model=model, fullgraph=True), model, reference, images())
