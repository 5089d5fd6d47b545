"""Transforms of functions, by torch.func: gradients, tangents and batches of them, of one model or of several."""

import copy
import itertools

import pytest
import torch
from helpers import assert_agree, each_engine, each_form, model_in
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import mrconvnext
from mrconvnext.longconv import autocorrelation, convolve

SAMPLES = 3
LAYOUT = dict(row_stride=8, guard=1)  # the images' rows take 6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def arguments() -> list[Tensor]:
    """Returns images, two kernels a channel, and a bias."""
    return [random(2, 3, 4, 5).requires_grad_(), random(6, 41).requires_grad_(), random(6).requires_grad_()]


def convolved(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return convolve(x, kernel, bias, **LAYOUT)


def correlated(x: Tensor, mean: Tensor) -> Tensor:
    return autocorrelation(x, mean, guard=1)


# The operations


@each_engine
def test_gradients_and_tangents_of_any_order(engine: str) -> None:
    means = random(3).requires_grad_()
    with mrconvnext.engine(engine):
        for function, inputs in ((convolved, arguments()), (correlated, [arguments()[0], means])):
            batched = dict(check_batched_grad=True)
            assert gradcheck(
                func=function, inputs=inputs, check_forward_ad=True, check_batched_forward_grad=True, **batched
            )
            assert gradgradcheck(func=function, inputs=inputs, check_fwd_over_rev=True, fast_mode=True, **batched)


def assert_maps(function, inputs: list[Tensor], dims: tuple) -> None:
    """Compares a function of inputs, of which some are mapped over a dimension, with what it gives for each sample."""
    mapped = [x if dim is None else torch.stack([x + i for i in range(SAMPLES)], dim) for x, dim in zip(inputs, dims)]
    samples = [[x if dim is None else x.select(dim, i) for x, dim in zip(mapped, dims)] for i in range(SAMPLES)]
    found, expected = vmap(function, in_dims=dims)(*mapped), [function(*sample) for sample in samples]
    if isinstance(found, Tensor):
        found, expected = (found,), [(one,) for one in expected]
    for own, theirs in zip(found, zip(*expected)):
        assert_agree(own, torch.stack(theirs), 1e-12)


@pytest.mark.parametrize(
    "dims", [dims for dims in itertools.product((None, 0, -1), repeat=3) if any(d is not None for d in dims)]
)
def test_a_batch_of_convolutions_and_of_their_gradients(dims: tuple) -> None:
    inputs = [x.detach() for x in arguments()]
    weights = random(2, 6, 4, 5)
    assert_maps(convolved, inputs, dims)
    assert_maps(grad(lambda *args: (convolved(*args) * weights).sum(), argnums=(0, 1, 2)), inputs, dims)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (-1, 1)])
def test_a_batch_of_correlations_and_of_their_gradients(dims: tuple) -> None:
    inputs, weights = [random(2, 3, 4, 5), random(3)], random(3, 24)
    assert_maps(correlated, inputs, dims)
    assert_maps(grad(lambda *args: (correlated(*args) * weights).sum(), argnums=(0, 1)), inputs, dims)


# Models


def tiny_model(branch_norm: str, deployed: bool = False) -> nn.Module:
    return model_in(branch_norm, deployed, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)).double()


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: p.detach() for name, p in model.named_parameters()}, dict(model.named_buffers())


def loss_of(model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, (parameters, buffers), (x,)).square().sum()


@pytest.mark.parametrize("train", [False, True])
@each_form
def test_gradients_are_those_of_backward(branch_norm: str, deployed: bool, train: bool) -> None:
    model, x = tiny_model(branch_norm, deployed).train(train), random(2, 3, 32, 32)
    reference = copy.deepcopy(model)
    found = grad(lambda *state: loss_of(model, *state, x))(*state_of(model))
    reference(x).square().sum().backward()
    for name, parameter in reference.named_parameters():
        assert_agree(found[name], parameter.grad, 1e-8)
    for (name, moved), own in zip(reference.named_buffers(), model.buffers()):
        torch.testing.assert_close(own, moved, msg=name)


@each_form
def test_a_functional_call_is_the_models(branch_norm: str, deployed: bool) -> None:
    """In training as well, by weights that require no gradients: these are not frozen ones."""
    model, x = tiny_model(branch_norm, deployed).train(), random(2, 3, 32, 32)
    state = state_of(copy.deepcopy(model))
    assert_agree(functional_call(model, state, (x,)), copy.deepcopy(model)(x), 1e-12)
    moved = {name: buffer for name, buffer in state[1].items() if not torch.equal(buffer, model.get_buffer(name))}
    assert (moved != {}) == (branch_norm != "kernel" and not deployed)


@each_form
def test_gradients_of_each_image(branch_norm: str, deployed: bool) -> None:
    model, x = tiny_model(branch_norm, deployed), random(SAMPLES, 3, 32, 32)
    parameters, buffers = state_of(model)
    one = grad(lambda parameters, image: loss_of(model, parameters, buffers, image.unsqueeze(0)))
    found = vmap(one, in_dims=(None, 0))(parameters, x)
    for i in range(SAMPLES):
        for name, expected in one(parameters, x[i]).items():
            assert_agree(found[name][i], expected, 1e-8)


@each_form
def test_tangents_of_a_model(branch_norm: str, deployed: bool) -> None:
    """Of images and parameters: ⟨w, J v⟩, forward, is ⟨Jᵀ w, v⟩, backward."""
    model, x = tiny_model(branch_norm, deployed), random(2, 3, 32, 32)
    (parameters, buffers), weights = state_of(model), random(2, 10)
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(x)

    def logits(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,))

    tangents = jvp(logits, primals=(parameters, x), tangents=directions)[1]
    gradients, grad_x = grad(lambda *args: (logits(*args) * weights).sum(), argnums=(0, 1))(parameters, x)
    expected = (grad_x * directions[1]).sum() + sum((g * directions[0][name]).sum() for name, g in gradients.items())
    assert_agree((tangents * weights).sum(), expected, 1e-8)


@each_form
def test_several_models_at_once(branch_norm: str, deployed: bool) -> None:
    models = [tiny_model(branch_norm, deployed) for _ in range(SAMPLES)]
    for i, model in enumerate(models):
        model.load_state_dict(
            {n: v * (1 + i / 8) if v.is_floating_point() else v for n, v in model.state_dict().items()}
        )
    state, x = stack_module_state(models), random(2, 3, 32, 32)
    found = vmap(lambda *state: functional_call(models[0], state, (x,)))(*state)
    for own, model in zip(found, models):
        assert_agree(own, model(x), 1e-10)


def test_a_transform_leaves_nothing_behind() -> None:
    """Sizes that are first seen inside of a transform, then outside."""
    model, x = tiny_model("parseval").train(), random(2, 3, 96, 40)
    grad(lambda *state: loss_of(model, *state, x))(*state_of(copy.deepcopy(model)))
    reference = copy.deepcopy(model)
    model(x).square().sum().backward()
    with torch.inference_mode():
        assert reference.eval()(x).isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
