"""Tries the situations that other libraries put our models in, each with the library itself.

    pip install torch_ema ema-pytorch torchao peft grad-cam accelerate transformers openvino   # any of them
    python scripts/clients.py                    # all cases
    python scripts/clients.py torch_ema fsdp2    # some of them

Prints a line for each case: ok, FAILED or not installed, seconds, and a figure or what is wrong. The exit status is 1
if any failed. What is right is what a new model with the same weights computes, or what ConvNeXt does.
"""

import argparse
import contextlib
import copy
import importlib.util
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import mrconvnext.convert
from mrconvnext import MRConvNeXt

NAME = "mrconvnext_atto"
CONVNEXT = "convnext_atto"
CLASSES = 10
SIZE = 64  # pixels
FORMS = ("training", "deployed")

# Layer scales of order 1: with ConvNeXt's start, 1e-6, no error of a block can be seen in the logits.
SCALES: dict[str, Any] = {"num_classes": CLASSES, "ls_init_value": 1.0}
OPTIONS: dict[str, Any] = {"img_size": SIZE, **SCALES}

# Largest error of a result in float32, of its largest value.
LIMIT = 1e-5

# Image sizes to compile for, and the seconds that one may take: of the process, and until it is given up.
COMPILED_SIZES = (64, 96, 128)
COMPILE_SECONDS, COMPILE_WALL_SECONDS = 60, 240


class Case(NamedTuple):
    """A situation: what it is, the libraries that it takes, and the function that tries it."""

    libraries: tuple[str, ...]
    run: Callable[[], str]


CASES: dict[str, Case] = {}


def case(*libraries: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Makes a function a case. It returns a figure, or raises an AssertionError that says what is wrong."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        CASES[function.__name__] = Case(libraries, function)
        return function

    return register


# Models and comparisons


def new_model(**options: Any) -> MRConvNeXt:
    """Returns a small model in training form, in eval mode."""
    model: Any = timm.create_model(NAME, **{**OPTIONS, **options})
    return model.eval()


def new_convnext() -> Any:
    """Returns the ConvNeXt that the small model is one of, in eval mode."""
    return timm.create_model(CONVNEXT, **SCALES).eval()


def trained(form: str = "training", **options: Any) -> MRConvNeXt:
    """Returns a small model in eval mode that a few steps have trained: its statistics and α are not fresh ones."""
    model = new_model(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(3):
        train_step(model, optimizer)
    return in_form(model.eval(), form)


def in_form(model: MRConvNeXt, form: str) -> MRConvNeXt:
    """Returns the model, reparameterized if ``form`` says so."""
    return model.reparameterize() if form == "deployed" else model


def train_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Takes one step on random images."""
    model.train()
    optimizer.zero_grad()
    model(images(4)).square().mean().backward()
    optimizer.step()


def images(batch: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size)


@torch.no_grad()
def fresh_output(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    """Returns what a new model in eval mode computes with the weights of ``model``: it keeps nothing from before."""
    again = new_model(**options)
    again.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    return again(x.clone())


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a fraction of the largest value; NaN if there is one."""
    difference = (actual - expected).abs().max()
    return 0.0 if difference == 0 else (difference / expected.abs().max()).item()  # both may be zero


def agree(actual: Tensor, expected: Tensor, what: str, limit: float = LIMIT) -> float:
    """Returns the error of a result; raises if it is above ``limit``, or not a number."""
    error = error_of(actual, expected)
    assert error <= limit, f"{what}: off by {error:.1e} of the largest value"
    return error


def differ(actual: Tensor, other: Tensor, what: str) -> None:
    """Raises if two results agree that must not: the case would show nothing."""
    assert error_of(actual, other) > 1e-3, f"{what} changed nothing: the case shows nothing"


def messages(error: BaseException) -> str:
    """Returns what an error says, and those that it comes from."""
    before = error.__cause__ or error.__context__
    return str(error) if before is None else f"{error} {messages(before)}"


def origin_of(error: BaseException) -> BaseException:
    """Returns the error that an error comes from, in the end."""
    before = error.__cause__ or error.__context__
    return error if before is None else origin_of(before)


# Averages of weights


@case()
def averaged_model() -> str:
    """PyTorch's AveragedModel with buffers: an average of equal weights is these weights."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

    for form in FORMS:
        for kernel in ("fourier_sparse", "sparse", "dilated"):
            model = trained(form, kernel=kernel)
            for multi_avg_fn in (
                get_ema_multi_avg_fn(decay=0.9999),
                get_ema_multi_avg_fn(decay=0.3),
                get_swa_multi_avg_fn(),
            ):
                average = AveragedModel(model=model, multi_avg_fn=multi_avg_fn, use_buffers=True)
                for _ in range(20):
                    average.update_parameters(model)
                unmoved(average.module, model, f"{form} form, {kernel}")
    return "nothing moved"


@case()
def timm_ema() -> str:
    """timm's three averages, which average buffers as well."""
    from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

    for form in FORMS:
        model = trained(form)
        for kind in (ModelEma, ModelEmaV2, ModelEmaV3):
            average: Any = kind(model=model, decay=0.9999)
            for _ in range(20):
                average.update(model)
            unmoved(average.ema if kind is ModelEma else average.module, model, f"{form} form, {kind.__name__}")
    return "nothing moved"


@case("ema_pytorch")
def ema_pytorch() -> str:
    """The package ema-pytorch, which averages buffers of floating point and copies others."""
    from ema_pytorch import EMA

    for form in FORMS:
        model = trained(form)
        average = EMA(model=model, beta=0.9999, update_after_step=0, update_every=1)
        for _ in range(20):
            average.update()
        unmoved(average.ema_model, model, f"{form} form")
    return "nothing moved"


def unmoved(average: nn.Module, model: nn.Module, what: str) -> None:
    """Raises if an average of equal weights is not these weights."""
    own = average.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(own[name], value, rtol=LIMIT, atol=LIMIT)
        elif not name.endswith("num_batches_tracked"):  # which BatchNorm's is as well
            moved = (own[name] != value).sum().item()
            assert moved == 0, f"{what}: {moved} of {value.numel()} values of {name} moved"
    x = images()
    with torch.no_grad():
        agree(average.eval()(x), model.eval()(x), f"{what}, logits")


@case("torch_ema")
def torch_ema() -> str:
    """torch_ema's documented pattern: validate, then validate with averaged weights, which it writes into ``.data``."""
    from torch_ema import ExponentialMovingAverage

    errors = []
    for form in FORMS:
        model = trained(form)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        average = ExponentialMovingAverage(parameters=model.parameters(), decay=0.9)
        for _ in range(4):
            train_step(model, optimizer)
            average.update()
        model.eval()
        x = images()
        with torch.no_grad():
            before = model(x)
            with average.average_parameters():
                within = model(x)
                errors.append(agree(within, fresh_output(model, x), f"{form} form, averaged weights"))
            errors.append(agree(model(x), before, f"{form} form, weights put back"))
        differ(within, before, "the average")
    return f"error {max(errors):.0e}"


@case()
def writes_through_data() -> str:
    """Other writes that move no version: ``.data``, ``detach()``, NumPy, a vector, a fused optimizer."""
    errors = []
    for form in FORMS:
        model, x = trained(form), images()
        for write in (scale_data, replace_data, scale_detached, scale_by_numpy, write_vector, step_fused):
            with torch.no_grad():
                before = model(x)
            write(model)
            with torch.no_grad():
                expected = fresh_output(model, x)
                differ(expected, before, write.__name__)
                errors.append(agree(model(x), expected, f"{form} form, {write.__name__}"))
    return f"error {max(errors):.0e}"


def scale_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9


def scale_detached(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().mul_(1.1)


def scale_by_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        values = parameter.detach().numpy()
        values *= 0.9


def write_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vec=1.1 * vector, parameters=model.parameters())


def step_fused(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


@case()
def swap_params() -> str:
    """Parameters that are swapped, not replaced, by ``load_state_dict`` and ``to``: no weak reference may hold them."""
    errors = []
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for form in FORMS:
            model, other, x = trained(form), trained(form), images()
            with torch.no_grad():
                differ(model(x), other(x), "other weights")
                model.load_state_dict(other.state_dict())
                errors.append(agree(model(x), other(x), f"{form} form, load_state_dict"))
                errors.append(agree(model.double()(x.double()).float(), other(x), f"{form} form, double()"))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return f"error {max(errors):.0e}"


# Distributed and offloaded weights


@case()
def fsdp2() -> str:
    """``fully_shard`` of the deployed form over two processes, the weights changed in place and by a state dict."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_shard, args=(rank, f"file://{folder}/store", results)) for rank in (0, 1)]
        for process in processes:
            process.start()
        try:
            found = [results.get(timeout=300) for _ in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    for errors in found:
        assert not isinstance(errors, str), errors
    errors = [error for errors in found for error in errors]
    wrong = sum(not error <= LIMIT for error in errors)
    assert wrong == 0, f"{wrong} of {len(errors)} passes used other weights, off by up to {max(errors):.0e}"
    return f"{len(errors)} passes, error {max(errors):.0e}"


def _shard(rank: int, store: str, results: Any) -> None:
    """Puts into ``results`` the errors that one of two processes finds, or what went wrong."""
    import torch.distributed as dist

    with quiet():
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        try:
            dist.init_process_group(backend="gloo", init_method=store, rank=rank, world_size=2)
            results.put(_fsdp2_errors(repetitions=10))
            dist.barrier()
            dist.destroy_process_group()
        except Exception as error:
            results.put(said_by(error))


@torch.no_grad()
def _fsdp2_errors(repetitions: int) -> list[float]:
    """Returns the errors of a sharded model against one that is not, after every change of the weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    errors = []
    mesh = init_device_mesh(device_type="cpu", mesh_shape=(2,))
    for seed in range(repetitions):
        torch.manual_seed(seed)
        plain = new_model().reparameterize()
        sharded: Any = copy.deepcopy(plain)
        for stage in sharded.stages:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        # By default the root's parameters stay whole after a pass, and in-place changes of these are lost.
        fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
        x = images()
        errors.append(error_of(sharded(x), plain(x)))
        for model in (plain, sharded):
            for parameter in model.parameters():
                parameter.mul_(0.9)
        errors.append(error_of(sharded(x), plain(x)))
        weights = new_model().reparameterize().state_dict()
        plain.load_state_dict(weights)
        set_model_state_dict(
            model=sharded, model_state_dict=weights, options=StateDictOptions(full_state_dict=True, strict=True)
        )
        errors.append(error_of(sharded(x), plain(x)))
    return errors


@case("accelerate")
def accelerate_offload() -> str:
    """accelerate's offload to memory and to disk: a tensor is there only while its own module's ``forward`` runs."""
    from accelerate import cpu_offload, disk_offload

    errors = []
    for form in FORMS:
        model, x = trained(form), images()
        with torch.no_grad():
            expected = model(x)
        for offload_buffers in (False, True):
            for where in ("cpu", "disk"):
                with tempfile.TemporaryDirectory() as folder:
                    if where == "cpu":
                        offloaded = cpu_offload(model=copy.deepcopy(model), offload_buffers=offload_buffers)
                    else:
                        offloaded = disk_offload(
                            model=copy.deepcopy(model), offload_dir=folder, offload_buffers=offload_buffers
                        )
                    assert next(offloaded.parameters()).is_meta, "nothing was offloaded: the case shows nothing"
                    for grad in (False, True):
                        with torch.set_grad_enabled(grad):
                            what = f"{form} form, {where}, offload_buffers={offload_buffers}, gradients {grad}"
                            errors.append(agree(offloaded(x), expected, what))
    return f"error {max(errors):.0e}"


# Training


@case()
def frozen_teacher() -> str:
    """A deployed teacher, evaluated while a student trains, computes nothing of its weights again."""
    teacher, student = trained("deployed"), trained().train()
    optimizer, x = torch.optim.AdamW(student.parameters(), lr=1e-3), images(1)
    student(x).sum().backward()

    def operations() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            teacher(x)
        return len(profile.events())

    def seconds() -> float:
        start = time.process_time()
        teacher(x)
        return time.process_time() - start

    def least(measure: Callable[[], float]) -> tuple[float, float]:
        """Returns the least of ten passes alone, and of ten right after a step of the student's optimizer."""
        alone, after = [], []
        for _ in range(10):
            alone.append(measure())
            optimizer.step()
            after.append(measure())
        return min(alone), min(after)

    with torch.no_grad():
        for _ in range(3):
            teacher(x)
        count, count_after = least(operations)
        time_alone, time_after = least(seconds)
    ratio = time_after / time_alone
    assert count_after <= count, f"{count_after} operations in a pass after a student's step, {count} without"
    assert ratio < 1.4, f"a pass takes {ratio:.2f} times as long after a student's step"
    return f"{count} operations either way, {ratio:.2f} of the time"


@case()
def frozen_timm() -> str:
    """``timm.utils.freeze`` freezes the statistics of the branches' norms, as it does a ResNet's."""
    from timm.utils import freeze, unfreeze

    frozen = ["stem", "stages"]
    for branch_norm in ("parseval", "batch"):
        model, x, what = trained(branch_norm=branch_norm), images(4), f'branch_norm="{branch_norm}"'
        freeze(root_module=model, submodules=frozen)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.train()
        features = [model.forward_features(x) for _ in range(3)][-1]
        moved = moved_buffers(model, before)
        assert not moved, f"{what}: {len(moved)} buffers moved, {moved[0]} for one"
        trainable = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head")]
        assert not trainable, f"{what}: {trainable[0]} is not frozen"
        agree(features, model.eval().forward_features(x), f"{what}, features in train()")
        unfreeze(root_module=model, submodules=frozen)
        model.train()(x)
        assert moved_buffers(model, before), f"{what}: nothing moves after unfreeze"
    return "no buffer moved"


def moved_buffers(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Returns the names of the buffers that are not what they were; timm's frozen BatchNorm has fewer."""
    return [name for name, buffer in model.named_buffers() if name in before and not torch.equal(buffer, before[name])]


@case()
def convnext_into_training_form() -> str:
    """``load_state_dict`` of a ConvNeXt's weights: the ConvNeXt's function, or an error that says what to do."""
    convnext, x = new_convnext(), images()
    models = {"new": new_model(), **{form: trained(form) for form in FORMS}}
    found = []
    for what, model in models.items():
        try:
            model.load_state_dict(convnext.state_dict(), strict=False)
        except RuntimeError as error:
            words = ("ConvNeXt", "from_convnext", "reparameterize", "training form")
            assert any(word in str(error) for word in words), f"{what}: an error that does not help: {error}"
            found.append(f"{what}: refused")
        else:
            with torch.no_grad():
                found.append(f"{what}: error {agree(model(x), convnext(x), what):.0e}")
    return ", ".join(found)


@case()
def finetune_other_patch_size() -> str:
    """A file of ours with another stride of the stem, read as ``train_imagenet.py --finetune`` reads it."""
    errors = []
    for patch_size, img_size in ((1, 32), (2, 64), (8, 128)):
        model, x = trained(patch_size=patch_size, img_size=img_size), images(2, img_size)
        with tempfile.TemporaryDirectory() as folder:
            mrconvnext.save(model, folder)
            file = Path(folder, "model.safetensors")
            found = mrconvnext.convert.options_of_file(file)
            overlay = {"file": str(file), "num_classes": found.pop("num_classes")}
            given = {**found, "patch_size": patch_size, "ls_init_value": 1.0, "num_classes": CLASSES}
            try:
                again = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **given)
            except RuntimeError as error:
                raise AssertionError(f"patch_size={patch_size}: refused: {error}") from error
        with torch.no_grad():
            errors.append(agree(again.eval()(x), model(x), f"patch_size={patch_size}"))
    return f"error {max(errors):.0e}"


@case()
def save_after_head_change() -> str:
    """``mrconvnext.save`` after the head was replaced by hand: an error that names ``reset_classifier``."""

    def other_classes(model: Any) -> None:
        model.head.fc = nn.Linear(in_features=model.head.fc.in_features, out_features=7)

    def no_head(model: Any) -> None:
        model.head = nn.Identity()

    def sequence(model: Any) -> None:
        model.head.fc = nn.Sequential(nn.Dropout(), nn.Linear(in_features=model.head.fc.in_features, out_features=7))

    for change in (other_classes, no_head, sequence):
        for fused in (False, True):
            model = trained()
            change(model)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    mrconvnext.save(model, folder, fused=fused)
                except (ValueError, TypeError) as error:
                    assert "reset_classifier" in str(error), f"{change.__name__}: {type(error).__name__}: {error}"
                else:
                    raise AssertionError(f"{change.__name__}: saved, though timm can't make it again")
                assert not list(Path(folder).iterdir()), f"{change.__name__}: something was left behind"
    errors = []
    for num_classes in (7, 0):
        model, x = trained(), images()
        model.reset_classifier(num_classes=num_classes)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            mrconvnext.save(model, folder)
            again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            errors.append(agree(again(x), model(x), f"reset_classifier({num_classes})"))
    return f"says reset_classifier, which works: error {max(errors):.0e}"


# Libraries that change modules or their weights


@case("transformers")
def transformers_training() -> str:
    """The training form through transformers' ``save_pretrained`` and ``from_pretrained``, which builds it on meta."""
    return f"error {_through_transformers('training', {}):.0e}"


@case("transformers")
def transformers_fused() -> str:
    """A model fused inside transformers: right where its config says so; else right as well, or refused in words."""
    found = [f"as its config says: error {_through_transformers('deployed', {'inference_mode': True}):.0e}"]
    for form, model_args in (("deployed", {}), ("training", {"inference_mode": True})):
        try:
            found.append(f"{form} form, {model_args}: error {_through_transformers(form, model_args):.0e}")
        except (RuntimeError, ValueError) as error:
            words = ("deployed", "reparameterize", "inference_mode", "fused", "training form")
            assert any(word in messages(error) for word in words), f"an error that does not help: {error}"
            found.append(f"{form} form, {model_args}: refused")
    return "; ".join(found)


def _through_transformers(form: str, model_args: dict[str, Any]) -> float:
    """Returns the error of a model that transformers has saved and loaded.

    Raises:
        RuntimeError: What transformers or the model says against loading it.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    options = {name: value for name, value in OPTIONS.items() if name != "num_classes"}
    config = TimmWrapperConfig(architecture=NAME, num_labels=CLASSES, model_args=options)
    wrapper: Any = TimmWrapperForImageClassification(config=config).eval()
    x = images()
    wrapper.timm_model.load_state_dict(trained().state_dict())
    in_form(wrapper.timm_model, form)
    wrapper.config.model_args = {**options, **model_args}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wrapper.save_pretrained(save_directory=folder)
        again: Any = TimmWrapperForImageClassification.from_pretrained(pretrained_model_name_or_path=folder)
        try:
            logits = again.eval()(pixel_values=x).logits
        except Exception as error:
            raise AssertionError(f"from_pretrained returned a model that can't run: {said_by(error)}") from error
        return agree(logits, wrapper(pixel_values=x).logits, f"{form} form, from_pretrained(…)")


@case("torchao")
def torchao() -> str:
    """torchao's ``quantize_`` to 8-bit weights: what the same weights rounded so give."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    errors = []
    for form in FORMS:
        model, x = trained(form, conv_mlp=False), images()
        rounded = copy.deepcopy(model)
        with torch.no_grad():
            before = model(x)
            quantize_(model=model, config=Int8WeightOnlyConfig())
            count = 0
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear):
                    weight: Any = module.weight
                    count += type(weight) is not nn.Parameter
                    rounded.get_parameter(f"{name}.weight").copy_(weight.dequantize())
            assert count > 20, f"{count} layers were quantized: the case shows nothing"
            expected = fresh_output(rounded, x, conv_mlp=False)
            assert error_of(expected, before) > 1e-4, "rounding changed nothing: the case shows nothing"
            errors.append(agree(model(x), expected, f"{form} form", limit=1e-4))
        agree(model(x).detach(), expected, f"{form} form, with gradients", limit=1e-4)
    return f"error {max(errors):.0e}"


@case("peft")
def peft() -> str:
    """PEFT's LoRA on the stem, the pointwise layers and the classifier: trains, and merges into the same function."""
    from peft import LoraConfig, get_peft_model

    errors = []
    for form in FORMS:
        for conv_mlp in (True, False):
            for targets in (["stem.0"], ["stem.0", "fc1", "fc2", "head.fc"]):
                what = f"{form} form, conv_mlp={conv_mlp}, {', '.join(targets)}"
                model, x = trained(form, conv_mlp=conv_mlp), images()
                with torch.no_grad():
                    before = model(x)
                adapted = get_peft_model(model=model, peft_config=LoraConfig(r=4, target_modules=targets)).eval()
                with torch.no_grad():
                    errors.append(agree(adapted(x), before, f"{what}, new adapters"))
                optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-1)
                train_step(adapted, optimizer)
                train_step(adapted, optimizer)
                with torch.no_grad():
                    after = adapted.eval()(x)
                    differ(after, before, "training the adapters")
                    merged = adapted.merge_and_unload()
                    errors.append(agree(merged(x), after, f"{what}, merged", limit=1e-4))
                    expected = fresh_output(merged, x, conv_mlp=conv_mlp)
                    errors.append(agree(merged(x), expected, f"{what}, a new model"))
    return f"error {max(errors):.0e}"


@case("pytorch_grad_cam")
def ablation_cam() -> str:
    """pytorch-grad-cam's AblationCAM, which walks all children and replaces one: ConvNeXt's map where α is zero."""
    from pytorch_grad_cam import AblationCAM, GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    errors = []
    convnext, x = new_convnext(), images(1)

    def map_of(model: nn.Module, kind: type, layer: str) -> Tensor:
        with kind(model=model, target_layers=[model.get_submodule(layer)]) as cam:
            return torch.from_numpy(cam(input_tensor=x, targets=[ClassifierOutputTarget(category=1)]))

    models = {form: in_form(mrconvnext.from_convnext(convnext, img_size=SIZE).eval(), form) for form in FORMS}
    for kind in (AblationCAM, GradCAM):
        for layer in ("stages.3.blocks.1", "stages.2.blocks.0.norm", "stages.1.blocks.0.conv_dw"):
            expected = map_of(convnext, kind, layer)
            for form, model in models.items():
                own = map_of(model, kind, layer)
                errors.append(agree(own, expected, f"{form} form, {kind.__name__} of {layer}", limit=1e-2))
    return f"error {max(errors):.0e}"


# Compilers, counters and exporters


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


# Running them


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what libraries print, warn and log, those in C++ as well."""
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        sys.stdout.flush()
        sys.stderr.flush()
        kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        try:
            for descriptor in kept:
                os.dup2(nowhere.fileno(), descriptor)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, own in kept.items():
                os.dup2(own, descriptor)
                os.close(own)
            logging.disable(logging.NOTSET)


def said_by(error: BaseException) -> str:
    """Returns what an error says in a line, with its type unless a case of ours raised it."""
    kind = "" if isinstance(error, AssertionError) and str(error) else f"{type(error).__name__}: "
    line = kind + re.sub(r"\x1b\[\d*m|\s+", " ", str(error)).strip()
    return line if len(line) <= 300 else f"{line[:300]}…"


def tried(name: str) -> tuple[str, str]:
    """Returns how a case ends, ok, FAILED or not installed, and its figure or what is wrong."""
    missing = [library for library in CASES[name].libraries if importlib.util.find_spec(library) is None]
    if missing:
        return "not installed", ", ".join(missing)
    torch.manual_seed(0)
    try:
        with quiet():
            return "ok", CASES[name].run()
    except Exception as error:
        return "FAILED", said_by(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases (default: all): {', '.join(CASES)}")
    names = parser.parse_args().names or list(CASES)
    for name in names:
        if name not in CASES:
            parser.error(f"there is no case {name!r}, but {', '.join(CASES)}")
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads", flush=True)
    failed = 0
    for name in names:
        start = time.perf_counter()
        result, figure = tried(name)
        failed += result == "FAILED"
        print(f"{name:28} {result:14} {time.perf_counter() - start:6.1f} s  {figure}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
