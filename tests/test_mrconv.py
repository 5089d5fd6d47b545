import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agree, randomize, relative_error
from torch import Tensor

from mrconvnext import MRConv1d, MRConv2d, long_conv_reference
from mrconvnext.grid import to_image, to_sequence
from mrconvnext.kernels import KERNELS
from mrconvnext.norms import NORMS
from mrconvnext.options import branch_lengths

LENGTHS = (1, 2, 7, 49, 129, 1134)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def layer_2d(grid=(9, 11), **options) -> MRConv2d:
    torch.manual_seed(0)
    if not KERNELS[options.get("kernel", "fourier")].is_single:
        options.setdefault("min_length", 28)
    return randomize(MRConv2d(3, grid, **{"kernel_size": 3, **options})).eval()


def layer_1d(length=129, **options) -> MRConv1d:
    torch.manual_seed(0)
    return randomize(MRConv1d(3, length, **options)).eval()


def direct_1d(layer: MRConv1d, x: Tensor) -> Tensor:
    kernel, bias = layer.merged_kernel()
    return long_conv_reference(x.double(), kernel.double()) + bias.double()[:, None]


def direct_2d(layer: MRConv2d, x: Tensor) -> Tensor:
    """On the reference grid only, where the merged kernel applies as it is."""
    kernel, bias = layer.merged_kernel()
    y = long_conv_reference(to_sequence(x.double(), layer.guard), kernel.double())
    return to_image(y, x.shape[2], layer.guard) + bias.double()[:, None, None]


# What a layer computes


def test_branch_lengths_are_the_papers() -> None:
    assert branch_lengths(3136) == [196, 392, 784, 1568, 3136]
    assert branch_lengths(784) == [49, 98, 196, 392, 784]
    assert branch_lengths(196) == [28, 56, 112, 196]
    assert branch_lengths(49) == [28, 49]
    assert branch_lengths(1) == [1]
    assert branch_lengths(3136, min_length=100, max_branches=3) == [100, 200, 3136]
    assert branch_lengths(3136, max_branches=1) == [3136]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("reference", [1, 49, 1134])
@pytest.mark.parametrize("length", LENGTHS)
def test_1d_equals_direct_convolution(length, reference, branch_norm, bidirectional, dtype) -> None:
    layer = layer_1d(reference, branch_norm=branch_norm, bidirectional=bidirectional, dtype=dtype)
    x = torch.randn(2, 3, length, dtype=dtype)
    expected = direct_1d(layer, x)
    assert_agree(layer(x), expected, TOLERANCE[dtype])
    layer.reparameterize()
    assert_agree(layer(x), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (7, 1), (7, 7), (3, 43), (27, 42)])
def test_2d_equals_direct_convolution(grid, branch_norm, bidirectional, dtype) -> None:
    options = dict(branch_norm=branch_norm, bidirectional=bidirectional, dtype=dtype, min_length=1)
    layer = layer_2d(grid, kernel_size=min(3, 2 * min(grid) - 1), **options)
    x = torch.randn(2, 3, *grid, dtype=dtype)
    expected = direct_2d(layer, x)
    assert_agree(layer(x), expected, TOLERANCE[dtype])
    layer.reparameterize()
    assert_agree(layer(x), expected, TOLERANCE[dtype])


def statistics(layer: MRConv2d, branch: int) -> list[Tensor]:
    """Returns running mean and variance, weight and bias of a branch's norm, each (C)."""
    norm = layer.norm
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return [own.view(layer.alpha.shape)[branch] for own in tensors]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("branch_norm", NORMS)
def test_eval_is_the_sum_of_normalised_branches(kernel: str, branch_norm: str) -> None:
    """The paper's definition, branch by branch in float64, beside a 2D convolution with the local taps."""
    layer = layer_2d(kernel=kernel, branch_norm=branch_norm).double()
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=3)
    for i, k in enumerate(layer.branch_kernels()):
        assert k.shape == (3, 2 * layer.branch_lengths[i] - 1)
        c = to_image(long_conv_reference(to_sequence(x, layer.guard), k), 9, layer.guard).flatten(2)
        if branch_norm == "kernel":
            c = c / (k.norm(dim=1) + 1e-5)[:, None]
        elif branch_norm != "none":
            c = F.batch_norm(c, *statistics(layer, i), eps=layer.norm.eps)
        expected = expected + layer.alpha[i][:, None, None] * c.view_as(x)
    assert_agree(layer(x), expected, 1e-12)


def test_batch_norm_training_is_the_papers() -> None:
    """In training every branch is normalised by its own output's statistics over real pixels, guards left out."""
    layer = layer_2d(branch_norm="batch").double().train()
    x = torch.randn(4, 3, 9, 11, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=3)
    for i, k in enumerate(layer.branch_kernels()):
        c = to_image(long_conv_reference(to_sequence(x, layer.guard), k), 9, layer.guard)
        _, _, weight, bias = statistics(layer, i)
        c = F.batch_norm(c, None, None, weight, bias, training=True, eps=layer.norm.eps)
        expected = expected + layer.alpha[i][:, None, None] * c
    before = layer.norm.running_mean.clone()
    assert_agree(layer(x), expected, 1e-12)
    assert (layer.norm.running_mean != before).all()


@pytest.mark.parametrize("branch_norm", NORMS)
def test_causal_layer_sees_nothing_ahead(branch_norm: str) -> None:
    layer = layer_1d(bidirectional=False, branch_norm=branch_norm, dtype=torch.float64)
    x = torch.randn(1, 3, 129, dtype=torch.float64)
    later = x.clone()
    later[..., 60:] += 1
    for _ in range(2):
        change = (layer(later) - layer(x)).abs().amax((0, 1))
        assert change[:60].max() < 1e-12 < change[60:].min()
        layer.reparameterize()


def test_local_taps_do_not_wrap_and_global_ones_may() -> None:
    layer = layer_2d(kernel_size=7, dtype=torch.float64)
    x = torch.zeros(1, 3, 9, 11, dtype=torch.float64)
    x[0, :, 4, 10] = 1
    with torch.no_grad():
        layer.alpha.zero_()
        offset = layer(torch.zeros_like(x))
        response = (layer(x) - offset).abs().amax((0, 1))
        assert response[:, :7].max() < 1e-12 < response[4, 7:].min()
        layer.alpha.fill_(1)
        assert (layer(x) - layer(torch.zeros_like(x)))[..., 0].abs().max() > 1e-3


@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients(branch_norm: str, training: bool) -> None:
    layer = layer_2d((5, 4), min_length=7, branch_norm=branch_norm, dtype=torch.float64).train(training)
    names = [name for name, _ in layer.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def test_drop_in_for_a_depthwise_conv2d() -> None:
    conv = torch.nn.Conv2d(3, 3, 5, padding="same", dilation=2, groups=3)
    layer = MRConv2d(3, (20, 20), kernel_size=5, dilation=2, alpha_init=0)
    layer.load_state_dict(conv.state_dict(), strict=False)
    x = torch.randn(2, 3, 17, 30)
    assert_agree(layer(x), conv(x))
    layer = MRConv2d(3, (20, 20), kernel_size=5, dilation=2)
    assert relative_error(layer(x), conv(x)) > 0.1
    layer.load_state_dict(conv.state_dict(), strict=False)  # a convolution has no branches: their α is zero then
    assert_agree(layer(x), conv(x))
    layer.alpha.data.fill_(1)
    layer.load_state_dict({**conv.state_dict(), "alpha": layer.alpha}, strict=False)
    layer.load_state_dict({"weight": conv.weight}, strict=False)  # less than a convolution: nothing is said of α
    assert (layer.alpha == 1).all()


def test_what_is_no_parameter_is_not_folded() -> None:
    """And the layer stays as it is."""
    normed, pruned = layer_2d((5, 4), min_length=7), layer_2d((5, 4), min_length=7)
    torch.nn.utils.parametrizations.weight_norm(normed, "weight")
    torch.nn.utils.prune.l1_unstructured(pruned, "weight", 0.5)
    x = torch.randn(1, 3, 5, 4)
    for layer, advice in (
        (normed, r"remove_parametrizations\(layer, name\)"),
        (pruned, r"prune\.remove\(layer, name\)"),
    ):
        expected = layer(x)
        with pytest.raises(RuntimeError, match=advice):
            layer.reparameterize()
        assert torch.equal(layer(x), expected)


# The two forms


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_deployed_equals_trained_at_any_size(kernel: str, branch_norm: str, bidirectional: bool) -> None:
    layer = layer_2d(kernel=kernel, branch_norm=branch_norm, bidirectional=bidirectional)
    layer.train()
    for _ in range(3):
        layer(torch.randn(4, 3, 9, 11) * 2 + 1)
    layer.eval()
    inputs = [torch.randn(2, 3, *size) for size in ((9, 11), (3, 5), (20, 7), (9, 30), (1, 1), (40, 41))]
    expected = [layer(x) for x in inputs]
    layer.reparameterize()
    state = layer.state_dict()
    assert set(state) == {"bias", "kernel", "alpha", "local_taps", "grid", "format"} and state["alpha"].numel() == 0
    assert state["kernel"].shape == (3, 2 * 9 * 12 - 1)
    for x, y in zip(inputs, expected):
        assert_agree(layer(x), y)
    kernel = layer.kernel
    layer.reparameterize()
    assert layer.kernel is kernel

    with torch.no_grad():
        layer.kernel.normal_()
    assert relative_error(layer(inputs[0]), expected[0]) > 0.1


@pytest.mark.parametrize("branch_norm", NORMS)
def test_state_dicts_load_in_all_four_directions(branch_norm: str) -> None:
    def fresh(deployed: bool, **options) -> MRConv2d:
        torch.manual_seed(1)
        layer = MRConv2d(3, (9, 11), kernel_size=3, branch_norm=branch_norm, seed=5, **options).eval()
        if deployed:
            layer.reparameterize()
        return layer

    trained = layer_2d(branch_norm=branch_norm)
    deployed = copy.deepcopy(trained)
    deployed.reparameterize()
    x = torch.randn(2, 3, 9, 11)
    for source in (trained, deployed):
        for target in (fresh(False), fresh(True)):
            target.requires_grad_(False)
            target.load_state_dict(source.state_dict())
            assert set(target.state_dict()) == set(source.state_dict())
            assert torch.equal(target(x), source(x))
            assert not target.training and not any(p.requires_grad for p in target.parameters())
            assert not any(module.training for module in target.modules())
        always = fresh(False, inference_mode=True)
        assert set(always.state_dict()) == set(deployed.state_dict())
        always.load_state_dict(source.state_dict())
        assert set(always.state_dict()) == set(deployed.state_dict())
        assert_agree(always(x), trained(x))


def test_loading_keeps_dtype_and_training_flag() -> None:
    target = MRConv2d(3, (9, 11), kernel_size=3, min_length=28, dtype=torch.float64, inference_mode=False).train()
    target.reparameterize()
    target.load_state_dict(layer_2d().state_dict())
    assert all(p.dtype == torch.float64 for p in target.parameters())
    assert all(module.training for module in target.modules())


@pytest.mark.parametrize(
    ("options", "name", "deployed"),
    [
        (dict(grid=(11, 9)), "grid", False),
        (dict(grid=(9, 12)), "grid", False),
        (dict(kernel_size=5), "grid", False),
        (dict(grid=(11, 9)), "grid", True),
        (dict(grid=(9, 12)), "grid", True),
        (dict(kernel_size=5), "grid", True),
        (dict(max_branches=1), "lengths", False),
    ],
)
def test_state_dict_of_another_reference_is_refused(options: dict, name: str, deployed: bool) -> None:
    source, target = layer_2d(), layer_2d(**options)
    if deployed:
        source.reparameterize()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        target.load_state_dict(source.state_dict())
    assert len(str(error.value)) < 500
    assert target.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    own, given = target.state_dict()[name].tolist(), source.state_dict()[name].tolist()
    assert name in str(error.value) and str(own) in str(error.value) and str(given) in str(error.value)


@pytest.mark.parametrize("name", ["alpha", "kernel"])
def test_state_dict_of_another_width_is_refused(name: str) -> None:
    source, target = MRConv2d(4, (9, 11), kernel_size=3, min_length=28), layer_2d()
    if name == "kernel":
        source.reparameterize()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}.*4.*3"):
        target.load_state_dict(source.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("missing", ["alpha", "norm.running_var", "kernels"])
def test_deployed_layer_refuses_part_of_a_training_form(missing: str, strict: bool) -> None:
    """The rest would stay random, and be folded."""
    layer = MRConv2d(3, (9, 11), kernel_size=3, min_length=28, branch_norm="parseval", inference_mode=True)
    before = layer.kernel.clone()
    state = layer_2d(branch_norm="parseval").state_dict()
    state = {name: value for name, value in state.items() if not name.startswith(missing)}
    with pytest.raises(RuntimeError, match=f"neither kernel nor all of the training form.*{missing}"):
        layer.load_state_dict(state, strict=strict)
    assert torch.equal(layer.kernel, before)
    with pytest.raises(RuntimeError, match="neither kernel nor all of the training form"):
        layer.load_state_dict(torch.nn.Conv2d(3, 3, 3, groups=3).state_dict(), strict=strict)


def test_only_a_layer_frozen_as_a_whole_is_frozen_when_deployed() -> None:
    layer = layer_2d()
    layer.alpha.requires_grad_(False)
    layer.reparameterize()
    assert layer.kernel.requires_grad
    frozen = layer_2d().requires_grad_(False)
    frozen.reparameterize()
    assert not frozen.kernel.requires_grad and not frozen.bias.requires_grad


def test_branches_of_a_deployed_layer_are_refused() -> None:
    layer = layer_1d()
    layer.reparameterize()
    with pytest.raises(RuntimeError, match="branch_kernels"):
        layer.branch_kernels()


def deployed_layer(**options) -> MRConv2d:
    layer = layer_2d(**options)
    layer.reparameterize()
    return layer


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_every_change_of_the_weights_is_seen(deployed: bool, training: bool) -> None:
    """However they are written: nothing is kept between calls."""
    layer = (deployed_layer() if deployed else layer_2d()).train(training)
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        parameter.mul_(2)
    name = "kernel" if deployed else "alpha"
    changes = (
        lambda: getattr(layer, name).mul_(3),
        lambda: getattr(layer, name).data.mul_(3),
        lambda: setattr(getattr(layer, name), "data", getattr(layer, name).data * 2),
        lambda: setattr(layer, name, torch.nn.Parameter(getattr(layer, name) * 2)),
        lambda: getattr(layer, name).numpy().__imul__(2),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: layer.load_state_dict(copy.deepcopy(layer).state_dict(), assign=True),
    )
    x = torch.randn(2, 3, 9, 11)
    for change in changes:
        layer(x)
        change()
        fresh = copy.deepcopy(layer)
        assert torch.equal(layer(x), fresh(x))
    assert_agree(layer.double()(x.double()), fresh(x))


@pytest.mark.parametrize("branch_norm", NORMS)
def test_a_deployed_layer_has_one_kernel_and_no_branches(branch_norm: str) -> None:
    layer = deployed_layer(branch_norm=branch_norm)
    assert [name for name, _ in layer.named_parameters()] == ["kernel", "bias"]
    assert not list(layer.children()) and None not in layer._modules.values()


# Bad input


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MRConv2d(3, (9, 11), kernel="gaussian"), ["kernel", "gaussian", "fourier_sparse"]),
        (lambda: MRConv2d(3, (9, 11), branch_norm="layer"), ["branch_norm", "layer", "parseval"]),
        (lambda: MRConv2d(3, (9, 11), kernel_size=4), ["kernel_size", "4", "odd"]),
        (lambda: MRConv2d(3, (9, 11), kernel_size=-3), ["kernel_size", "-3"]),
        (lambda: MRConv2d(3, (3, 11)), ["grid", "(3, 11)", "at least 4"]),
        (lambda: MRConv2d(3, (9, 11), dilation=0), ["dilation", "0"]),
        (lambda: MRConv2d(0, (9, 11)), ["channels", "0"]),
        (lambda: MRConv2d(3, (9, 11.5)), ["grid", "11.5"]),
        (lambda: MRConv2d(3, (9,)), ["grid", "(9,)", "(height, width)"]),
        (lambda: MRConv2d(3, "9"), ["grid", "'9'", "(height, width)"]),
        (lambda: MRConv2d(3, None), ["grid", "None", "(height, width)"]),
        (lambda: MRConv2d(True, (9, 11)), ["channels", "True"]),
        (lambda: MRConv2d(3, (9, 11), alpha_init=float("nan")), ["alpha_init", "nan", "finite"]),
        (lambda: MRConv2d(3, (9, 11), bidirectional="no"), ["bidirectional", "'no'", "True or False"]),
        (lambda: MRConv2d(3, (9, 11), kernel_size=(3, 3)), ["kernel_size", "(3, 3)"]),
        (
            lambda: MRConv2d(3, (9, 11), branch_norm="batch", sync_norm=True),
            ["sync_norm", "batch", "convert_sync_batchnorm"],
        ),
        (lambda: MRConv1d(3, 0), ["length", "0", "at least 1"]),
        (lambda: MRConv1d(3, 49.0), ["length", "49.0", "integer"]),
        (lambda: MRConv1d(3, 49, min_length=7.5), ["min_length", "7.5", "49"]),
        (lambda: MRConv1d(3, 49, max_branches=2.5), ["max_branches", "2.5"]),
        (lambda: MRConv1d(3, 49, modes=0), ["modes", "0"]),
        (lambda: MRConv1d(3, 49, min_length=0), ["min_length", "0", "49"]),
        (lambda: MRConv1d(3, 49, min_length=50), ["min_length", "50", "49"]),
        (lambda: MRConv1d(3, 49, max_branches=0), ["max_branches", "0"]),
    ],
)
def test_bad_arguments_are_named(make, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("deployed", [False, True])
def test_bad_inputs_are_named(deployed: bool) -> None:
    layer = deployed_layer() if deployed else layer_2d()
    with pytest.raises(ValueError, match=r"3 channels.*\[1, 4, 9, 11\]"):
        layer(torch.randn(1, 4, 9, 11))
    with pytest.raises(ValueError, match=r"4 dimensions.*\[3, 9, 11\]"):
        layer(torch.randn(3, 9, 11))
    with pytest.raises(ValueError, match=r"3 dimensions.*\[1, 3, 9, 11\]"):
        layer_1d()(torch.randn(1, 3, 9, 11))
    with pytest.raises(ValueError, match=r"at least 1 position, got \[1, 3, 0, 5\]"):
        layer(torch.randn(1, 3, 0, 5))
    with pytest.raises(ValueError, match=r"at least 1 position, got \[1, 3, 0\]"):
        layer_1d()(torch.randn(1, 3, 0))
    with pytest.raises(TypeError, match="floating-point.*int64"):
        layer(torch.ones(1, 3, 9, 11, dtype=torch.int64))


def test_two_layers_have_different_lags_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    a, expected = MRConv2d(3, (9, 11), kernel="sparse", seed=1), torch.rand(3)
    torch.manual_seed(0)
    b, actual = MRConv2d(3, (9, 11), kernel="sparse", seed=2), torch.rand(3)
    assert torch.equal(actual, expected)
    assert torch.equal(a.kernels.values, b.kernels.values)
    assert not torch.equal(a.kernels.lags, b.kernels.lags)
    a, b = MRConv2d(3, (9, 11), kernel="sparse"), MRConv2d(3, (9, 11), kernel="sparse")
    assert not torch.equal(a.kernels.lags, b.kernels.lags)
    again = MRConv2d(3, (9, 11), kernel="sparse", seed=a.seed)
    assert torch.equal(a.kernels.lags, again.kernels.lags)


@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("deployed", [False, True])
def test_low_precision_comes_out_as_it_went_in(branch_norm: str, deployed: bool) -> None:
    layer = layer_2d(branch_norm=branch_norm)
    x = torch.randn(2, 3, 9, 11)
    expected = layer(x)
    if deployed:
        layer.reparameterize()
    with torch.autocast("cpu", torch.bfloat16):
        assert_agree(layer(x), expected)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_agree(half, expected, 0.05)
    layer.train()(x.bfloat16()).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
