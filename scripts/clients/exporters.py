"""Compilers, counters of operations and exporters."""

import copy
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .case import FORMS, agree, case, error_of, images, messages, new_convnext, origin_of, quiet, said_by, trained

# Image sizes to compile for, and the seconds that one may take: of the process, and until it is given up.
COMPILED_SIZES = (64, 96, 128)
COMPILE_SECONDS, COMPILE_WALL_SECONDS = 60, 240


@case()
def profiler_flops() -> str:
    """Counters of operations see the model: no less than ConvNeXt without its depthwise convolutions."""
    from fvcore.nn import FlopCountAnalysis
    from torch.utils.flop_counter import FlopCounterMode

    def by_profiler(model: nn.Module) -> float:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
            model(x)
        return sum(event.flops for event in profile.key_averages())

    def by_flop_counter(model: nn.Module) -> float:
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    def by_fvcore(model: nn.Module) -> float:
        return 2 * FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()

    x = images(1, 96)
    convnext = new_convnext()
    pointwise = copy.deepcopy(convnext)
    for stage in pointwise.stages:
        for block in stage.blocks:
            block.conv_dw = nn.Identity()
    found = []
    for form in FORMS:
        model = trained(form)
        for count in (by_profiler, by_flop_counter, by_fvcore):
            with torch.no_grad():
                model(x)  # what it keeps is there
                own, least, theirs = (count(each) / 1e9 for each in (model, pointwise, convnext))
            name = count.__name__.removeprefix("by_").replace("_", " ")
            what = f"ConvNeXt {theirs:.3f}, {least:.3f} without depthwise convolutions"
            assert own >= 0.99 * least, f"{form} form, {name}: {own:.3f} GFLOP; {what}"
            found.append(f"{name} {own:.3f}")
    return f"{', '.join(found)} GFLOP; ConvNeXt {theirs:.3f}"


@case()
def compile_second_size() -> str:
    """``torch.compile`` of the training form in eval mode, at a second and a third image size, in decent time."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compile_at_sizes, args=(sender,))
    process.start()
    sender.close()
    figures: list[str] = []
    try:
        for size in COMPILED_SIZES:
            before = f"{size} pixels, after {', '.join(figures) or 'none'}"
            assert receiver.poll(timeout=COMPILE_WALL_SECONDS), f"{before}: not finished in {COMPILE_WALL_SECONDS} s"
            found = receiver.recv()
            assert not isinstance(found, str), f"{before}: {found}"
            seconds, own_seconds, error = found
            assert own_seconds <= COMPILE_SECONDS, f"{before}: {own_seconds:.0f} s of the process"
            assert error <= 1e-4, f"{before}: off by {error:.1e}"
            figures.append(f"{size} px {seconds:.0f} s")
    finally:
        process.kill()
        process.join()
    return f"{', '.join(figures)}, error {error:.0e}"


def _compile_at_sizes(sender: Any) -> None:
    """Sends the seconds of a compiled model's first pass at each image size, those of the process alone, and its error.

    The process's own do not depend on what else the machine does; a compiler that it starts is not among them.
    """
    with quiet(), tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing is taken from runs before
        try:
            model = trained(depths=(1, 1, 1, 1))
            compiled = torch.compile(model=model)
            for size in COMPILED_SIZES:
                x = images(2, size)
                with torch.no_grad():
                    start, own_start = time.perf_counter(), time.process_time()
                    output = compiled(x)
                    seconds = time.perf_counter() - start, time.process_time() - own_start
                    sender.send((*seconds, error_of(output, model(x))))
        except Exception as error:
            sender.send(said_by(error))


@case("openvino")
def openvino() -> str:
    """OpenVINO's conversion of an exported and of a traced model, without complex numbers."""
    import openvino as ov

    errors = []
    x = images()
    model = trained("deployed", exportable=True)
    with torch.no_grad():
        expected = model(x)
    sources: dict[str, Callable[[], ov.Model]] = {
        "torch.export": lambda: ov.convert_model(input_model=torch.export.export(mod=model, args=(x,))),
        "example_input": lambda: ov.convert_model(input_model=model, example_input=x),
    }
    for name, convert in sources.items():
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                converted = convert()
            kinds = {operation.get_type_name() for operation in converted.get_ops()}
            assert not any("DFT" in kind for kind in kinds), f"{name}: it holds {', '.join(sorted(kinds))}"
            precise = {"INFERENCE_PRECISION_HINT": "f32"}
            compiled = ov.compile_model(model=converted, device_name="CPU", config=precise)
            output = torch.from_numpy(compiled({0: x.numpy()})[0].copy())
            errors.append(agree(output, expected, f"{name}, gradients {grad}", limit=1e-4))
    return f"error {max(errors):.0e}"


@case("onnx", "onnxruntime", "onnxscript")
def onnx() -> str:
    """Plain ``torch.onnx.export`` of the deployed form, by both exporters: no DFT, the same function."""
    import onnx as onnx_library
    import onnxruntime

    errors = []
    x = images()
    model = trained("deployed", exportable=True)
    with torch.no_grad():
        expected = model(x)
    variants: list[dict[str, Any]] = [{}, {"dynamo": True}, {"dynamo": False}]
    for options in variants:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder, "model.onnx"))
            torch.onnx.export(model=model, args=(x,), f=file, **options)
            kinds = {node.op_type for node in onnx_library.load(file).graph.node}
            assert not kinds & {"DFT", "STFT"}, f"{options}: it holds {', '.join(sorted(kinds))}"
            session = onnxruntime.InferenceSession(path_or_bytes=file, providers=["CPUExecutionProvider"])
            (output,) = session.run(output_names=None, input_feed={session.get_inputs()[0].name: x.numpy()})
            errors.append(agree(torch.from_numpy(output), expected, f"{options}", limit=1e-4))
    return f"error {max(errors):.0e}"


@case("onnx", "onnxscript")
def onnx_training_form() -> str:
    """Both ONNX exporters refuse the training form, and say to reparameterize."""
    model = trained(exportable=True)
    for dynamo in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            try:
                torch.onnx.export(model=model, args=(images(),), f=str(Path(folder, "model.onnx")), dynamo=dynamo)
            except RuntimeError as error:
                assert "reparameterize" in messages(error), f"dynamo={dynamo}: {said_by(origin_of(error))}"
            else:
                raise AssertionError(f"dynamo={dynamo}: exported")
    return "both say reparameterize"
