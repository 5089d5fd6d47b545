"""Weights that are written, averaged, copied and loaded in every way that other libraries have."""

import copy
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from helpers import (
    SMALL,
    assert_agree,
    each_engine,
    each_form,
    images,
    layers_of,
    model_in,
    randomize,
    relative_error,
    small_model,
)
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import mrconvnext
from mrconvnext import MRConv2d
from mrconvnext.kernels import KERNELS

# Averages of weights


def averaged(kind: str, model: nn.Module) -> nn.Module:
    """Returns the average of a model with itself, 20 times."""
    if kind == "ema":
        average = AveragedModel(model=model, multi_avg_fn=get_ema_multi_avg_fn(decay=0.9999), use_buffers=True)
        update = average.update_parameters
    elif kind == "swa":
        average = AveragedModel(model=model, multi_avg_fn=get_swa_multi_avg_fn(), use_buffers=True)
        update = average.update_parameters
    else:
        average = {"v2": ModelEmaV2, "v3": ModelEmaV3}[kind](model=model, decay=0.9999)
        update = average.update
    for _ in range(20):
        update(model)
    return average.module


@pytest.mark.parametrize("kind", ["ema", "swa", "v2", "v3"])
@each_form
def test_an_average_of_equal_weights_is_these_weights(branch_norm: str, deployed: bool, kind: str) -> None:
    """In double precision, as some averages round at every update."""
    if kind == "swa" and branch_norm == "batch" and not deployed:
        pytest.skip("PyTorch's SWA divides no whole numbers, such as num_batches_tracked of any BatchNorm")
    model = model_in(branch_norm, deployed).double()
    average = averaged(kind, model)
    own, theirs = model.state_dict(), average.state_dict()
    for name in own:
        if name.endswith((".lags", ".grid", ".lengths", ".format")):
            assert torch.equal(theirs[name], own[name]), name
    with torch.no_grad():
        assert_agree(average.eval()(images().double()), model(images().double()), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_moves_in_an_average(kernel: str) -> None:
    model = model_in("kernel", kernel=kernel)
    average = averaged("ema", model)
    for own, theirs in zip(layers_of(model), layers_of(average)):
        for a, b in zip(own.branch_kernels(), theirs.branch_kernels()):
            assert_agree(b, a, 1e-6)


@each_form
def test_an_average_follows_the_model(branch_norm: str, deployed: bool) -> None:
    model = model_in(branch_norm, deployed)
    average = ModelEmaV3(model=model, decay=0.5)
    with torch.no_grad():
        before = average(images())
        assert torch.equal(before, model(images()))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        average.update(model)
        for parameter in model.parameters():
            parameter.div_(1.1).mul_(1.05)
        assert not torch.equal(average(images()), before)
        assert_agree(average(images()), model(images()), 1e-4)


@each_form
def test_validation_with_averaged_weights(branch_norm: str, deployed: bool) -> None:
    """The pattern that torch_ema documents: it writes into ``.data``, and back."""
    torch_ema = pytest.importorskip("torch_ema")
    model = model_in(branch_norm, deployed).train()
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=1e-2)
    average = torch_ema.ExponentialMovingAverage(parameters=model.parameters(), decay=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
        average.update()
    model.eval()
    with torch.no_grad():
        before = model(images())
        with average.average_parameters():
            within = model(images())
            assert torch.equal(within, copy.deepcopy(model)(images()))
        assert relative_error(within, before) > 1e-3
        assert torch.equal(model(images()), before)


# Weights that are written


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns a state dict like the model's with other values where these are not fixed."""
    return randomize(copy.deepcopy(model), seed=1).state_dict()


def in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


def through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def by_other_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def through_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        values = parameter.detach().numpy()
        values *= 1.1


def from_a_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(parameters=model.parameters())
    nn.utils.vector_to_parameters(vec=1.1 * vector, parameters=model.parameters())


def by_an_optimizer(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(params=model.parameters(), lr=1e-2, fused=True).step()


def by_new_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter * 1.1))


def by_a_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: x * 1.1 if x.is_floating_point() else x for name, x in model.state_dict().items()})


def by_an_assigned_state_dict(model: nn.Module) -> None:
    scaled = {name: x * 1.1 if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.load_state_dict(state_dict=scaled, assign=True)


WRITES = [
    in_place,
    through_data,
    by_other_data,
    through_numpy,
    from_a_vector,
    by_an_optimizer,
    by_new_parameters,
    by_a_state_dict,
    by_an_assigned_state_dict,
]


@each_engine
@each_form
def test_the_next_pass_sees_every_write(branch_norm: str, deployed: bool, engine: str) -> None:
    model, pristine, x = model_in(branch_norm, deployed), model_in(branch_norm, deployed), images(32, 32)
    with mrconvnext.engine(engine):
        for train in (False, True):
            model.train(train)
            for write in WRITES:
                with torch.no_grad():
                    before = model(x)
                    write(model)
                    fresh = copy.deepcopy(pristine).train(train)
                    fresh.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
                    after = model(x)
                    assert torch.equal(after, fresh(x)), write.__name__
                    assert relative_error(after, before) > 1e-3, write.__name__
                if branch_norm != "kernel" and not deployed:  # as the pass in training mode has moved them
                    model.load_state_dict(fresh.state_dict())


@pytest.fixture
def swapping() -> Iterator[None]:
    """Parameters are swapped, not replaced, as PyTorch will do by itself one day."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@each_form
def test_parameters_that_are_swapped(branch_norm: str, deployed: bool, swapping: None) -> None:
    model = model_in(branch_norm, deployed)
    other = copy.deepcopy(model)
    other.load_state_dict(other_weights(model))
    by_new_parameters(other)
    with torch.no_grad():
        assert relative_error(model(images()), other(images())) > 1e-3
        model.load_state_dict(other.state_dict())
        expected = other(images())
        assert torch.equal(model(images()), expected)
        assert_agree(model.double()(images().double()), expected)


# State dicts


def fresh_layer(deployed: bool = False, **options) -> MRConv2d:
    layer = MRConv2d(3, (9, 11), **{"kernel_size": 3, "min_length": 28, "seed": 5, **options}).eval()
    if deployed:
        layer.reparameterize()
    return layer


@each_form
def test_models_load_each_others_weights_in_all_directions(branch_norm: str, deployed: bool) -> None:
    source = model_in(branch_norm, deployed)
    for target in (model_in(branch_norm), model_in(branch_norm, deployed=True)):
        randomize(target, seed=1)
        target.load_state_dict(source.state_dict())
        assert target.state_dict().keys() == source.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(target(images()), source(images()))


@each_form
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_made_on_the_meta_device_takes_weights(branch_norm: str, deployed: bool, assign: bool) -> None:
    source = model_in(branch_norm, deployed)
    with torch.device("meta"):
        model = timm.create_model("mrconvnext_atto", branch_norm=branch_norm, inference_mode=deployed, **SMALL).eval()
        assert model(images().to("meta")).shape == (2, 10)
    assert all(parameter.is_meta for parameter in model.parameters())
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(state_dict=source.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(model(images()), source(images()))


def test_a_model_deployed_without_its_taps_is_refused() -> None:
    model = small_model().reparameterize()
    old = {name: x for name, x in model.state_dict().items() if not name.endswith("local_taps")}
    overlay = dict(state_dict=old, num_classes=10)
    with pytest.raises(RuntimeError, match=r"Missing key.*local_taps"):
        timm.create_model("mrconvnext_atto", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    with pytest.raises(RuntimeError, match=r"Missing key.*local_taps"):
        model.load_state_dict(state_dict=old)


def one_twice(lags: Tensor) -> Tensor:
    lags[0, 0, 0, 1] = lags[0, 0, 0, 0]
    return lags


def one_beyond_its_branch(lags: Tensor) -> Tensor:
    lags[0, 0, 0, 0] = 28  # the first branch's length, in the range of the second's
    return lags


HOSTILE: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("kernels.lags", one_twice),
    ("kernels.lags", one_beyond_its_branch),
    ("kernels.lags", lambda lags: -1 - lags),
    ("kernels.lags", lambda lags: lags.long() + 2**40),
    ("kernels.lags", lambda lags: lags.float()),
    ("kernels.lags", lambda lags: lags.to(torch.complex64)),
    ("kernels.lags", lambda lags: lags[..., :8]),
    ("kernels.lags", lambda lags: lags[:1]),
    ("kernels.lags", lambda lags: lags.flatten()),
    ("grid", lambda grid: grid + 1),
    ("grid", lambda grid: grid[:2]),
    ("grid", lambda grid: grid.float() + 0.5),
    ("grid", lambda grid: grid[0]),
    ("lengths", lambda lengths: lengths + 1),
    ("lengths", lambda lengths: lengths[:1]),
    ("format", lambda form: form + 1),
    ("alpha", lambda alpha: alpha[:1]),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize(("name", "change"), HOSTILE)
def test_a_hostile_state_dict_changes_nothing(name: str, change, deployed: bool, strict: bool) -> None:
    layer = randomize(fresh_layer(deployed))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    state = {key: value.clone() for key, value in randomize(fresh_layer(seed=6), seed=1).state_dict().items()}
    state[name] = change(state[name])
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")) as error:
        layer.load_state_dict(state_dict=state, strict=strict)
    assert len(str(error.value)) < 500
    after = layer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_a_deployed_layer_stays_what_it_is_when_kernels_do_not_fit() -> None:
    layer = fresh_layer(deployed=True)
    before = layer.kernel.detach().clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for kernels\.coefficients"):
        layer.load_state_dict(fresh_layer(modes=4).state_dict())
    assert torch.equal(layer.kernel, before)


@pytest.mark.parametrize("kernel", ["sparse", "fourier_sparse"])
def test_lags_go_with_the_weights(kernel: str) -> None:
    """Layers with other seeds, so other lags, compute the same with the same state dict."""
    a, b = (randomize(fresh_layer(kernel=kernel, seed=seed)) for seed in (1, 2))
    x = torch.randn(2, 3, 9, 11)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b(x), a(x))


# Weights that are assigned by their names, around PyTorch's own way


def mismatches(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Returns the names of the weights that a loader by names, such as transformers', refuses by their shapes."""
    own = dict([*model.named_parameters(), *model.named_buffers()])
    return [name for name, value in weights.items() if name in own and own[name].shape != value.shape]


@pytest.mark.parametrize("branch_norm", ["kernel", "parseval", "batch"])
def test_the_weights_of_one_form_do_not_pass_for_those_of_the_other(branch_norm: str) -> None:
    training, deployed = model_in(branch_norm), model_in(branch_norm, deployed=True)
    names = [f"{name}.alpha" for name, layer in training.named_modules() if isinstance(layer, MRConv2d)]
    assert len(names) == 5
    for model, other in ((training, deployed), (deployed, training)):
        assert mismatches(model, other.state_dict()) == names
        assert mismatches(model, model.state_dict()) == []


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int16])
def test_weights_that_are_no_floating_point_numbers_are_refused(deployed: bool, dtype: torch.dtype) -> None:
    model = model_in("batch", deployed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in before.items():
        if "conv_dw" in name and value.is_floating_point() and value.numel() > 0:
            with pytest.raises(RuntimeError, match=f"{name} must hold floating-point numbers.*{dtype}"):
                model.load_state_dict({**before, name: value.to(dtype)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
