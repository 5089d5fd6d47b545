"""Freezing, teaching, starting from a checkpoint, another head."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mrconvnext.convert

from .case import CLASSES, FORMS, NAME, agree, case, images, new_convnext, new_model, trained


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
