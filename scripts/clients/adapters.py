"""Libraries that change modules or their weights, or save them their own way."""

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import mrconvnext

from .case import (
    CLASSES,
    FORMS,
    NAME,
    OPTIONS,
    SIZE,
    agree,
    case,
    differ,
    error_of,
    fresh_output,
    images,
    in_form,
    messages,
    new_convnext,
    said_by,
    train_step,
    trained,
)


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
