"""Averages of weights, and weights written past PyTorch's counting."""

from typing import Any

import torch
from torch import nn

from .case import FORMS, LIMIT, agree, case, differ, fresh_output, images, train_step, trained


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
