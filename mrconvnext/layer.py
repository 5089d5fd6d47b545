"""What both layers are: branches over a reference grid, in training or deployed form.

In the training form several branches of doubling length, each normalised and weighted by ``alpha``, are added (MRConv,
Cunningham et al. 2024, section 3). `reparameterize` folds them, and the local taps of `mrconv.MRConv2d`, into the
deployed form: one kernel and one bias.
"""

import copy
import itertools
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .grid import add_local_taps, convolve_locally
from .kernels import KERNELS, create_kernels
from .longconv import check_not_onnx, convolve, convolve_real
from .norms import create_norm, decayed, eval_affine, merge_kernels, merge_shifts, weigh_branches
from .options import BranchOptions, check_positive
from .precision import as_autocast
from .resampling import OnGrid
from .state import Entries, check_parameters, reparameterize_after_load, take_form, write_reference

# Seeds of layers made without one, far from those that a model gives its layers. The generator uses 32 bits of them.
_seeds = itertools.count(2**31)

# FX keeps these as single nodes: they depend on sizes and dtypes that are known only when the traced model runs.
for _name in (
    *(
        "add_local_taps",
        "as_autocast",
        "check_not_onnx",
        "convolve",
        "convolve_locally",
        "convolve_real",
        "decayed",
    ),
    *("merge_kernels", "merge_shifts", "weigh_branches"),
):
    torch.fx.wrap(_name)


class LongConvolution(Entries, OnGrid, nn.Module):
    """What both layers are: branches over a reference grid, in training or deployed form.

    The layer takes the form of the state dict that it is given, unless ``inference_mode`` is set: then it always ends
    deployed. A change of form makes new parameters, which an optimizer made before does not know. Beside parameters and
    statistics a state dict holds the grid and the branches' lengths, which are compared with the layer's, and the
    sparse lags. None of them is a buffer, which averages of weights or casts could change.

    In the deployed form ``alpha`` is empty: it has no branches. So nobody who assigns weights by their names, whatever
    the form, can take the weights of one form for those of the other. ``local_taps`` are those in the kernel, kept for
    `set_grid`.

    Args:
        channels: Number of channels C.
        grid: Height and width of the reference grid.
        made_for: Height and width of the grid that the branches' kernels are parameterized for; on any other grid they
            are resampled, see `resampling`. Default: ``grid``.
        kernel_size: Size k of the local taps, odd; 0 for none.
        dilation: Distance of the local taps in pixels.
        bias: Whether there is a bias.
        options: What the branches are like.
        seed: Seed of the sparse lags. Default: one that no other layer of this process has.
        inference_mode: Whether the layer is deployed from the start.
        exportable: Whether the deployed form computes without complex numbers, for exporters that have none.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    merges: torch.jit.Final[bool]
    norm_is_linear: torch.jit.Final[bool]
    exportable: torch.jit.Final[bool]

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        made_for: Optional[tuple[int, int]],
        kernel_size: int,
        dilation: int,
        bias: bool,
        options: BranchOptions,
        seed: Optional[int],
        inference_mode: bool,
        exportable: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.channels = channels
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.local_reach = dilation * (kernel_size // 2)
        self.options = options
        self.bidirectional = options.bidirectional  # TorchScript reads no dataclass
        self.made_for = grid if made_for is None else made_for
        self._take_grid(grid)
        self.branch_lengths = self._lengths_for(self.made_for)
        self.has_bias = bias
        self.seed = next(_seeds) if seed is None else seed
        self.inference_mode = inference_mode
        self.merges = options.norm != "batch"
        self.branch_decay = 1.0 if options.concat_decay is None else float(options.concat_decay)
        self.norm_is_linear = options.norm in ("kernel", "none")
        self.exportable = exportable
        self.norm_is_parseval = options.norm == "parseval"
        self.is_single = KERNELS[options.kernel].is_single
        self.build_branches(device, dtype)
        self.register_state_dict_post_hook(write_reference)
        self.register_load_state_dict_pre_hook(take_form)
        self.register_load_state_dict_post_hook(reparameterize_after_load)
        if inference_mode:
            self.reparameterize()

    # The two forms

    def build_branches(self, device: Any, dtype: Any) -> None:
        """Gives the layer its training form, with new parameters."""
        dd = {"device": device, "dtype": dtype}
        channels, branches, options = self.channels, len(self.branch_lengths), self.options
        alpha = 1 / branches if options.alpha_init is None else options.alpha_init
        self.drop("alpha", "kernel", "weight", "bias", "local_taps")
        self.register_parameter("kernel", None)
        self.register_parameter("weight", None)
        if self.kernel_size > 0:
            self.weight = nn.Parameter(torch.empty(channels, 1, self.kernel_size, self.kernel_size, **dd))
            nn.init.trunc_normal_(self.weight, std=0.02)  # as ConvNeXt's
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels, **dd)) if self.has_bias else None)
        self.alpha = nn.Parameter(torch.full((branches, channels), float(alpha), **dd))
        self.kernels = create_kernels(
            options.kernel,
            channels,
            self.branch_lengths,
            directions=2 if options.bidirectional else 1,
            starts=options.starts(self.branch_lengths),
            modes=options.modes,
            taps=options.taps,
            seed=self.seed,
            kernel_args=options.kernel_args,
            **dd,
        )
        self.norm = create_norm(options.norm, branches, channels, sync=options.sync_norm, **dd)

    def build_deployed(self, kernel: Tensor, bias: Tensor, local_taps: Optional[Tensor]) -> None:
        """Gives the layer its deployed form. The local taps in the kernel are kept for `set_grid` alone."""
        requires_grad = any(parameter.requires_grad for parameter in self.parameters())
        self.drop("alpha", "kernel", "weight", "bias", "local_taps", "kernels", "norm")
        self.kernel = nn.Parameter(kernel, requires_grad)
        self.register_parameter("weight", None)
        self.bias = nn.Parameter(bias, requires_grad)
        self.register_buffer("alpha", kernel.new_empty((0, self.channels)))
        self.register_buffer("local_taps", local_taps)

    def drop(self, *names: str) -> None:
        for name in names:
            if hasattr(self, name):
                delattr(self, name)

    def branch_kernels(self) -> list[Tensor]:
        """Returns the branches' two-sided kernels (C, 2·l_i − 1) as parameterized: before norm and α.

        l_i is the branch's length, and where branches are concatenated that of those before it as well. The kernels of
        a layer that was moved to another grid are (C, 2·L − 1), L the number of its positions.

        Raises:
            RuntimeError: If the layer is deployed, its branches gone.
        """
        if self.kernel is not None:
            raise RuntimeError("a deployed layer has no branches: call branch_kernels() before reparameterize()")
        if self.is_resampled:
            return list(self._on_grid(self.kernels()))
        kernels = self.kernels()
        middle = kernels.shape[-1] // 2
        starts = self.options.starts(self.branch_lengths)
        reaches = [start + length for start, length in zip(starts, self.branch_lengths)]
        return [own[:, middle + 1 - n : middle + n] for own, n in zip(kernels, reaches)]

    @torch.no_grad()
    def merged_kernel(self) -> tuple[Tensor, Tensor]:
        """Returns the kernel (C, 2·L − 1) and bias (C) that the layer equals in eval mode, folded in float64.

        They act on the reference grid laid out by `grid.to_sequence`, L its number of positions.
        """
        if self.kernel is not None:
            return self.kernel.detach().clone(), self.bias.detach().clone()
        layer = copy.deepcopy(self).double().eval()
        kernels = layer.kernels()
        gain, bias = layer._gains(kernels)
        kernel, _ = layer._complete(layer._on_grid(merge_kernels(kernels, gain)), None)
        return kernel.to(self.alpha.dtype), bias.to(self.alpha.dtype)

    @torch.no_grad()
    def branch_gains(self) -> tuple[Tensor, Tensor]:
        """Returns what the branches' kernels are multiplied by in eval mode (N, C), and the bias (C), in float64."""
        layer = copy.deepcopy(self).double().eval()
        return layer._gains(layer.kernels())

    def _gains(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        gain, shift = eval_affine(self.norm, kernels)
        bias = merge_shifts(self._weights(), shift, self.bias)
        return self._weights() * gain, kernels.new_zeros(self.channels) if bias is None else bias

    def reparameterize(self) -> None:
        """Folds branches, norms, α and local taps into one kernel and one bias, in place. Idempotent.

        Raises:
            RuntimeError: If a parametrization or a pruning of PyTorch's stands in the place of a parameter.
        """
        if self.kernel is None:
            check_parameters(self)
            taps = None if self.weight is None else self.weight.detach().clone()
            self.build_deployed(*self.merged_kernel(), taps)

    def _convolve(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns the layer's output for images (B, C, H, W), statistics taken where the mask (B, H), if any, is True.

        Images are zero elsewhere.
        """
        x = as_autocast(x)
        if self.kernel is not None:
            if self.exportable:
                return convolve_real(x, self.kernel, self.bias, self.row_stride, self.guard)
            return convolve(x, self.kernel, self.bias, self.row_stride, self.guard)
        check_not_onnx()
        if self.merges:
            kernel, bias = self._merge(x)
            return convolve(x, kernel, bias, self.row_stride, self.guard)
        kernels = self._on_grid(self.kernels())  # (N, C, 2·L − 1)
        c = convolve(x, kernels.flatten(0, 1), None, self.row_stride, self.guard)  # (B, N · C, H, W)
        c = self.norm(c) if mask is None else self._norm_of_real(c, mask)
        y = weigh_branches(c, self._weights())
        if self.weight is not None:
            y = y + convolve_locally(x, self.weight, self.bias, self.dilation)
        return y.to(x.dtype)

    def _norm_of_real(self, c: Tensor, mask: Tensor) -> Tensor:
        """Returns branches (B, N·C, L, 1), normalised where the mask (B, L) is True, zero elsewhere."""
        c = c.squeeze(-1).transpose(1, 2)  # (B, L, N·C)
        real = self.norm(c[mask].unsqueeze(-1).unsqueeze(-1)).flatten(1)  # (positions, N·C)
        return torch.zeros_like(c).masked_scatter(mask.unsqueeze(-1), real).transpose(1, 2).unsqueeze(-1)

    def _merge(self, x: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """Returns the kernel (C, 2·L − 1) and bias (C), if any, that the layer equals for images (B, C, H, W)."""
        alpha = self._weights()
        if self.norm_is_linear:  # the norm is of the kernel as parameterized: moved, a branch keeps its gain
            kernel, shift = self.norm(x, self.kernels(), alpha, self.row_stride, self.guard)
            return self._complete(self._on_grid(kernel), shift)
        kernel, shift = self.norm(x, self._on_grid(self.kernels()), alpha, self.row_stride, self.guard)
        return self._complete(kernel, shift)

    def _weights(self) -> Tensor:
        """Returns the branches' weights (N, C): α, and where branches are concatenated its decay from one to the next.

        The decay is fixed, and not taken off by the norms, which come before.
        """
        return decayed(self.alpha, self.branch_decay)

    def _complete(self, kernel: Tensor, shift: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
        """Returns the branches' merged kernel with the local taps, and the bias that the norms' shifts add up to."""
        if self.weight is not None:
            kernel = add_local_taps(kernel, self.weight, self.dilation, self.row_stride)
        return kernel, merge_shifts(self._weights(), shift, self.bias)


def kernel_names(model: nn.Module) -> set[str]:
    """Returns the names of what the long kernels of a model are made of: their parameters, α and the branches' norms.

    They take a smaller learning rate than the others (MRConv, section 5).
    """
    names: set[str] = set()
    for prefix, layer in model.named_modules():
        if isinstance(layer, LongConvolution):
            own = (name for name, _ in layer.named_parameters() if name not in ("weight", "bias"))
            names.update(f"{prefix}.{name}" for name in own)
    return names


def undecayed_names(model: nn.Module) -> set[str]:
    """Returns those of `kernel_names` that take no weight decay: all but what SGConv and MultiresConv let decay."""
    names = kernel_names(model)
    for prefix, layer in model.named_modules():
        if isinstance(layer, LongConvolution) and layer.is_single:
            names = {name for name in names if not name.startswith(f"{prefix}.kernels.")}
    return names
