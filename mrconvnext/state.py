"""State dicts of the layers: what the weights were made for, and the form that a layer takes of those it is given.

These are hooks of `layer.LongConvolution`, which is what ``layer`` stands for.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize, prune

from .kernels import SparseKernels, check_lags

# Of what a layer's state dict holds. 1 had a module for each branch.
FORMAT = 2

# What stands in a layer's state dict beside its weights; see `entries`.
ENTRIES = ("format", "grid", "kernel_grid", "lengths", "kernel_options")

# Parameters of either form of a layer.
OF_LAYER = ("alpha", "kernel", "weight", "bias")


class Entries:
    """What stands in a layer's state dict beside its weights, for those who read and assign it by name."""

    if TYPE_CHECKING:  # of the layer
        made_for: tuple[int, int]
        branch_lengths: list[int]
        options: Any

    __jit_unused_properties__ = ["format", "grid", "kernel_grid", "lengths", "kernel_options"]

    @property
    def format(self) -> torch.Tensor:
        """See `entries`."""
        return torch.tensor(entries(self)["format"])

    @property
    def grid(self) -> torch.Tensor:
        """Height and width of the reference grid, and the guard."""
        return torch.tensor(entries(self)["grid"])

    @property
    def kernel_grid(self) -> torch.Tensor:
        """Height and width of the grid that the branches' kernels are parameterized for."""
        return torch.tensor(self.made_for)

    @property
    def lengths(self) -> torch.Tensor:
        """The lengths of the branches."""
        return torch.tensor(self.branch_lengths)

    @property
    def kernel_options(self) -> torch.Tensor:
        """See `BranchOptions.digest`."""
        return torch.tensor([self.options.digest])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ENTRIES:
            check_entry(self, name, value)
        else:
            super().__setattr__(name, value)


def write_reference(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Writes what the weights were made for; see `entries`."""
    state_dict.update({prefix + name: torch.tensor(value) for name, value in entries(layer).items()})


def entries(layer: Any) -> dict[str, list[int]]:
    """Returns what stands in a layer's state dict beside its weights.

    ``format``: the format's number, and 1 if the layer is deployed; ``grid``: height, width, guard; ``kernel_grid``:
    height and width of the grid that the branches are or were parameterized for, if it is another; in training form
    ``lengths``: those of the branches, and ``kernel_options``: a number for kernel_args and concat_decay, if given.
    """
    deployed = layer.kernel is not None
    own = {"format": [FORMAT, int(deployed)], "grid": [*layer.reference_grid, layer.guard]}
    if layer.is_resampled:
        own["kernel_grid"] = list(layer.made_for)
    if deployed:
        return own
    own["lengths"] = layer.branch_lengths
    if layer.options.digest:
        own["kernel_options"] = [layer.options.digest]
    return own


def check_entry(layer: Any, name: str, given: torch.Tensor) -> None:
    """Raises a RuntimeError if what somebody assigns by name, without this package's loading, is not the layer's own.

    So load libraries that go through ``getattr`` and ``setattr``, which can't change a layer's form.
    """
    own = entries(layer).get(name)
    if name == "format" and not given.is_meta and given.tolist() != own:
        raise RuntimeError(
            f"the weights are of format [number, deployed] {given.tolist()}, the layer of {own}: weights of a deployed "
            "(fused, reparameterized) model go into one made with inference_mode=True, others into the training form"
        )
    if own is not None and not given.is_meta and given.tolist() != own:
        raise RuntimeError(f"{name} is {given.tolist()} in the weights and {own} in the layer")


def take_form(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
    """Changes a layer to the form, training or deployed, of the weights in a state dict, after checking these.

    Raised here, not collected: the layer's children would be loaded all the same.
    """
    check_reference(layer, state_dict, prefix)
    for name in ENTRIES:
        state_dict.pop(prefix + name, None)
    if prefix + "kernel" in state_dict:
        state_dict.setdefault(prefix + "alpha", layer.alpha.new_empty((0, layer.channels)))
        if layer.kernel is None:
            zeros = layer.alpha.new_zeros
            taps = None if layer.weight is None else torch.zeros_like(layer.weight)
            layer.build_deployed(zeros(state_dict[prefix + "kernel"].shape), zeros(layer.channels), taps)
    elif layer.kernel is None:
        _check_lags(layer, state_dict, prefix)
        if _is_of_a_convolution(layer, state_dict, prefix):
            # Its function, not that plus branches that it never had.
            state_dict[prefix + "alpha"] = torch.zeros_like(layer.alpha)
    elif any(name.startswith(prefix) for name in state_dict):
        deployed = (layer.kernel.detach(), layer.bias.detach(), layer.local_taps)
        requires_grad = layer.kernel.requires_grad
        layer.build_branches(deployed[0].device, deployed[0].dtype)
        layer.train(layer.training).requires_grad_(requires_grad)
        try:
            _check_branches(layer, state_dict, prefix)
        except RuntimeError:
            layer.build_deployed(*deployed)
            raise


def _check_branches(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Raises a RuntimeError if a state dict does not have all of the training form, in the layer's shapes."""
    own = {f"{prefix}{name}": value for name, value in layer.state_dict().items() if name in trainable_names(layer)}
    missing = [name for name in own if name not in state_dict]
    if missing:
        raise RuntimeError(
            f"the state dict has neither {prefix}kernel nor all of the training form; missing are "
            f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. A deployed layer can't take part of "
            "a training form: load it into a model in training form, then reparameterize."
        )
    _check_lags(layer, state_dict, prefix)
    for name, value in own.items():
        if state_dict[name].shape != value.shape:
            raise RuntimeError(
                f"size mismatch for {name}: {tuple(state_dict[name].shape)} given, {tuple(value.shape)} in the layer"
            )


def _check_lags(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    # The kernels check them as well, but after the layer's own weights were taken.
    if isinstance(layer.kernels, SparseKernels):
        check_lags(layer.kernels, state_dict, f"{prefix}kernels.")


def _is_of_a_convolution(layer: Any, state_dict: dict[str, Any], prefix: str) -> bool:
    """Returns whether a state dict has all of a depthwise convolution and nothing of the branches."""
    own = {name for name in trainable_names(layer) if prefix + name in state_dict}
    return own == ({"weight", "bias"} if layer.has_bias else {"weight"})


def trainable_names(layer: Any) -> list[str]:
    """Returns the names in a layer's state dict that a layer of its form can't do without."""
    return [name for name in layer.state_dict() if name not in ENTRIES]


def check_reference(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Raises a RuntimeError if a state dict's layer is of another format, grid, branches or channels than this one.

    Or if its weights are no floating-point numbers, of which PyTorch would take integers and booleans as well.
    """
    own = {"format": [FORMAT], "grid": [*layer.reference_grid, layer.guard], "lengths": layer.branch_lengths}
    found = {name: state_dict[prefix + name] for name in ENTRIES if prefix + name in state_dict}
    if "grid" in found:
        own["kernel_grid"] = list(layer.made_for)
        found.setdefault("kernel_grid", found["grid"].flatten()[:2])
    if "lengths" in found and found.get("kernel_options", torch.tensor([0])).tolist() != [layer.options.digest]:
        raise RuntimeError(
            f"{prefix}kernels: the weights were made with another kernel_args or concat_decay than the layer's "
            f"{dict(layer.options.kernel_args)} and {layer.options.concat_decay}"
        )
    own = dict(sorted(own.items()))  # what they were made for before what follows from it
    for name, value in own.items():
        given = found.get(name)
        if given is not None and not given.is_meta and _differs(name, given, value):
            raise RuntimeError(
                f"{prefix}{name} is {given.tolist()} in the state dict and {value} in the layer. "
                "Weights keep the grid [height, width, guard] and the branch lengths that they were made with: build "
                "the model with the same img_size, kernel_img_size, kernel_sizes, output_stride, min_lengths and "
                "max_branches, and move it to another size then, by model.set_input_size(img_size)."
            )
    check_numbers(layer, state_dict, prefix)
    shapes = {
        "kernel": [(layer.channels, 2 * layer.reference_grid[0] * layer.row_stride - 1)],
        "alpha": [(len(layer.branch_lengths), layer.channels), (0, layer.channels)],
    }
    for name, allowed in shapes.items():
        given = state_dict.get(prefix + name)
        if given is not None and tuple(given.shape) not in allowed:
            raise RuntimeError(
                f"size mismatch for {prefix}{name}: {tuple(given.shape)} given, {allowed[0]} in the layer"
            )


def check_numbers(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Raises a RuntimeError if a state dict has whole numbers or booleans for weights, which PyTorch would take."""
    own = (*module.named_parameters(), *module.named_buffers())
    names = [name for name, tensor in own if tensor.is_floating_point()]
    for name in dict.fromkeys((*names, *OF_LAYER)):
        given = state_dict.get(prefix + name)
        if given is not None and not given.is_floating_point():
            raise RuntimeError(f"{prefix}{name} must hold floating-point numbers, the state dict has {given.dtype}")


def _differs(name: str, given: torch.Tensor, value: list[int]) -> bool:
    return given.flatten().tolist()[:1] != value if name == "format" else given.tolist() != value  # whatever the form


def check_parameters(layer: Any) -> None:
    """Raises a RuntimeError if something else than a parameter stands in the place of one."""
    if prune.is_pruned(layer):
        raise RuntimeError(
            "a pruned layer can't be reparameterized: call torch.nn.utils.prune.remove(layer, name) before"
        )
    if any(parametrize.is_parametrized(module) for module in layer.modules()):
        raise RuntimeError(
            "a parametrized layer can't be reparameterized: call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, name) before"
        )


def reparameterize_after_load(layer: Any, incompatible_keys: Any) -> None:
    if layer.inference_mode:
        layer.reparameterize()
