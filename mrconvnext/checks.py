"""What the operations of `longconv` refuse before an engine reads memory by it."""

from typing import Optional

from torch import Tensor


def check_sequences(u: Tensor, kernel: Tensor) -> None:
    """Raises a TypeError or ValueError if sequences (B, C, L) and kernels (C, 2·M − 1) do not fit."""
    if not (u.is_floating_point() and kernel.is_floating_point()):
        raise TypeError(f"u and kernel must be floating-point tensors, got {u.dtype} and {kernel.dtype}")
    if u.dim() != 3 or kernel.dim() != 2 or kernel.shape[0] != u.shape[1]:
        raise ValueError(
            f"u must be (B, C, L) and kernel (C, 2·M − 1), with the channels of u, got {list(u.shape)} and "
            f"{list(kernel.shape)}"
        )
    if kernel.shape[-1] % 2 == 0:
        raise ValueError(f"kernel must have an odd number of lags, lag 0 in the middle, got {kernel.shape[-1]}")
    if u.shape[-1] < 1:
        raise ValueError(f"u must have at least 1 position, got {list(u.shape)}")


def check_images(x: Tensor, kernel: Tensor, bias: Optional[Tensor], row_stride: int, guard: int) -> None:
    """Raises a ValueError if images, kernels and layout do not fit: engines read memory by them."""
    if x.dim() != 4 or kernel.dim() != 2 or min(x.shape[1:]) < 1:
        raise ValueError(
            f"x must be (B, C, H, W), not empty, and kernel (N · C, 2·M − 1), got {list(x.shape)}, {list(kernel.shape)}"
        )
    if kernel.shape[0] < 1 or kernel.shape[0] % x.shape[1] or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"kernel must have a whole number of kernels for each of the {x.shape[1]} channels, and an odd number of "
            f"lags, got {list(kernel.shape)}"
        )
    if bias is not None and bias.shape != kernel.shape[:1]:
        raise ValueError(f"bias must be ({kernel.shape[0]},), as many as there are kernels, got {list(bias.shape)}")
    if guard < 0 or row_stride < 1:
        raise ValueError(f"guard must be at least 0 and row_stride at least 1, got {guard} and {row_stride}")


def check_gradient(grad: Tensor, x: Tensor, kernel: Tensor) -> None:
    """Raises a ValueError if a gradient is not that of images convolved with kernels."""
    if grad.shape != (x.shape[0], kernel.shape[0], *x.shape[2:]):
        raise ValueError(f"grad must be of {kernel.shape[0]} channels for {list(x.shape)}, got {list(grad.shape)}")


def check_mean(x: Tensor, mean: Tensor, guard: int) -> None:
    """Raises a ValueError if images, their channels' mean and the guard do not fit."""
    if x.dim() != 4 or min(x.shape[1:]) < 1 or mean.shape != x.shape[1:2] or guard < 0:
        raise ValueError(
            f"x must be (B, C, H, W), not empty, mean (C) and guard at least 0, got {list(x.shape)}, "
            f"{list(mean.shape)}, {guard}"
        )
