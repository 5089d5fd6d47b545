"""How a batch of images is convolved in eager mode: a few images at a time, keeping little for the backward pass.

Sequences padded to an FFT length and their spectra take more memory than the images they stand for, and fresh memory
costs more time than the arithmetic on it. So the batch goes through in pieces whose buffers are used again.
"""

from collections.abc import Callable, Iterator
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .derived import define_operation, derived, outside_of_trace
from .grid import image_fft_length, place_kernel, to_image
from .longconv import centred_spectrum, centred_taps, correlation_of, inverse, spectrum
from .matrixconv import convolve_by_constants, convolve_by_matrices, is_small, kernel_factors, transforms

# Of a piece's padded sequences, on a CPU: large enough that launching operations costs little beside them.
PIECE_BYTES = 3 * 2**20


class Sequences:
    """Lays out images as sequences padded with zeros, piece by piece, and transforms them.

    Args:
        x: Images (B, C, H, W), of the type that is computed in.
        guard: Columns of zeros between rows.
    """

    def __init__(self, x: Tensor, guard: int) -> None:
        self.height, self.width = x.shape[2:]
        self.guard = guard
        self.length = self.height * (self.width + guard)
        self.n = image_fft_length(x, guard)
        size = x.shape[0]
        if x.device.type == "cpu":
            size = min(size, PIECE_BYTES // (x.shape[1] * self.n * x.element_size()))
        self.buffer = x.new_zeros((max(1, size), x.shape[1], self.n))

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the images (b, C, H, W) of each piece; none of an empty batch, which some FFTs refuse."""
        if x.shape[0] > 0:
            yield from x.split(self.buffer.shape[0])

    def spectrum(self, piece: Tensor, mean: Tensor) -> Tensor:
        """Returns the spectrum (b, C, n // 2 + 1) of images less their channels' ``mean`` (C, 1, 1)."""
        sequences = self.buffer[: piece.shape[0], : piece.shape[1]]
        torch.sub(piece, mean, out=self.pixels(sequences))
        return spectrum(sequences, self.n)

    def ones(self) -> Tensor:
        """Returns the spectrum (1, n // 2 + 1) of an image of ones."""
        image = self.buffer.new_ones((1, 1, self.height, self.width))
        return self.spectrum(image, image.new_zeros(()))[0]

    def pixels(self, sequences: Tensor) -> Tensor:
        """Returns the view (b, C, H, W) of the pixels in sequences (b, C, n)."""
        return to_image(sequences[..., : self.length], self.height, self.guard)

    def image(self, spectrum: Tensor) -> Tensor:
        """Returns the images (b, C, H, W) whose sequences have ``spectrum``."""
        return self.pixels(inverse(spectrum, self.n))


def channel_sums(x: Tensor) -> Tensor:
    """Returns Σ x of every channel of ``x`` (B, C, …), then the number of values in each, (C + 1)."""
    values = x.flatten(2)
    return torch.cat([values.sum(dim=(0, 2)), values.new_full((1,), values.shape[0] * values.shape[2])])


def batch_sum(x: Tensor) -> Tensor:
    """Returns the sum (1, C, H, W) of images (B, C, H, W)."""
    if len(x) == 0:
        return x.new_zeros((1, *x.shape[1:]))
    total = torch.zeros_like(x[:1])
    for image in x.split(1):  # ``x.sum(0)`` takes 20 times as long in channels-last order
        total += image
    return total


def convolve_images(x: Tensor, kernel_spectrum: Tensor, n: int, bias: Tensor, guard: int) -> Tensor:
    """Returns images (B, C, H, W) convolved with a kernel, plus a bias. Without gradients.

    Args:
        x: Images (B, C, H, W).
        kernel_spectrum: The kernel's `longconv.centred_spectrum` (C, n // 2 + 1).
        n: The FFT length.
        bias: Bias (C).
        guard: Columns of zeros between rows.
    """
    sequences, zero, constant = Sequences(x, guard), x.new_zeros(()), n * bias
    y = torch.empty_like(x)
    for piece, out in zip(sequences.pieces(x), sequences.pieces(y)):
        product = sequences.spectrum(piece, zero).mul_(kernel_spectrum)
        torch.view_as_real(product)[:, :, 0, 0] += constant
        out.copy_(sequences.image(product))
    return y


def convolve_small_images(x: Tensor, factors: tuple, matrices: tuple, bias: Tensor) -> Tensor:
    """Returns images (B, C, H, W) convolved by matrices, a few at a time; see `convolve_by_matrices`."""
    y = torch.empty_like(x)
    size = max(1, PIECE_BYTES // (factors[0].numel() * 2 * x.element_size()))
    images, outputs = (tensor.permute(0, 2, 3, 1) for tensor in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[0], size):
            piece = images[start : start + size]
            outputs[start : start + size] = convolve_by_matrices(piece, matrices, factors, bias)
    return y


def constants(x: Tensor, kernel: Tensor, row_stride: int, guard: int) -> tuple[tuple, tuple]:
    """Returns a kernel's factors and the transforms that convolve images like ``x`` by matrices."""
    height, width = x.shape[2:]
    placed = place_kernel(kernel, row_stride, x, guard).to(x.dtype)
    return kernel_factors(placed, height, width + guard), transforms(height, width, guard, x.dtype, x.device)


def convolve_deployed(x: Tensor, kernel: Tensor, bias: Tensor, row_stride: int, guard: int) -> Tensor:
    """Returns images (B, C, H, W) convolved with a kernel, plus a bias. Without gradients.

    What is derived from the kernel is kept for the last two sizes of images.

    Args:
        x: Images (B, C, H, W), in float32 or float64.
        kernel: Two-sided kernel (C, 2·M − 1).
        bias: Bias (C).
        row_stride: Row stride that the kernel was made for.
        guard: Columns of zeros between rows.
    """
    small = is_small(x, guard)

    def compute() -> tuple:
        if small:
            return constants(x, kernel, row_stride, guard)
        placed = place_kernel(kernel, row_stride, x, guard).to(x.dtype)
        n = image_fft_length(x, guard)
        return centred_spectrum(placed, n), n

    kept = derived([kernel], (*x.shape[2:], row_stride, guard, x.dtype), 2, compute)
    bias = bias.to(x.dtype)
    return convolve_small_images(x, *kept, bias) if small else convolve_images(x, *kept, bias, guard)


define_operation(
    "convolve",
    "(Tensor x, Tensor kernel, Tensor bias, int row_stride, int guard) -> Tensor",
    convolve_deployed,
    lambda x, kernel, bias, row_stride, guard: torch.empty_like(x),
)


def convolve_for_onnx(x: Tensor, kernel: Tensor, bias: Tensor, row_stride: int, guard: int) -> Tensor:
    """Returns what `convolve_deployed` returns, by real matrices: a graph for ONNX of the images' size.

    FFTs are not among the operations of PyTorch's exporter that traces. What is derived from the kernel are constants
    of the graph.
    """
    factors, matrices = outside_of_trace(lambda: constants(x, kernel, row_stride, guard))
    return convolve_by_constants(x.permute(0, 2, 3, 1), matrices, factors, bias.to(x.dtype)).permute(0, 3, 1, 2)


class AdaptiveConvolution(torch.autograd.Function):
    """The convolution of images with a kernel that depends on their statistics.

    Saved for the backward pass are the images, which a plain convolution keeps as well, and the graph that leads from
    their statistics to the kernel, which has no batch. Spectra, at least twice as large as the images, are computed
    again.

    Called with ``mean_of, merge, guard, x, *parameters``. ``mean_of(sums)`` returns the mean (C) and the number of
    pixels that it is taken over for the `channel_sums` of the images ``x``;
    ``merge(parameters, x, correlation, mean, count)`` the kernel (C, 2·M − 1) and bias (C) for the autocorrelation
    (C, H·(W + guard)) of the images less their mean.
    """

    @staticmethod
    def forward(ctx, mean_of: Callable, merge: Callable, guard: int, x: Tensor, *parameters: Tensor):
        with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
            # A graph from the statistics to the kernel, for the backward pass. It has no batch.
            sums = channel_sums(x.detach()).requires_grad_()
            mean, count = mean_of(sums)
            own_mean = mean.detach().requires_grad_()
        centre = own_mean.detach()[:, None, None]

        sequences = Sequences(x, guard)
        spectra = [sequences.spectrum(piece, centre) for piece in sequences.pieces(x)]
        power = x.new_zeros((x.shape[1], sequences.n // 2 + 1, 2))
        for image in (image for own in spectra for image in torch.view_as_real(own)):
            power.addcmul_(image, image)
        correlation = correlation_of(power[..., 0] + power[..., 1], sequences.n, sequences.length).requires_grad_()
        with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
            # Views: hooks of the parameters are for their gradients as a whole, once.
            parameters = [parameter.view_as(parameter) for parameter in parameters]
            kernel, bias = merge(parameters, x, correlation, own_mean, count)
        ctx.graph = (kernel, bias), (correlation, own_mean, *parameters), (mean, sums)
        kernel, bias = kernel.detach(), bias.detach()

        kernel_spectrum = centred_spectrum(kernel, sequences.n)
        constant = centre[..., 0] * sequences.ones() * kernel_spectrum
        constant[:, 0] += bias * sequences.n
        y = torch.empty_like(x)
        for out in sequences.pieces(y):
            own = spectra.pop(0)
            out.copy_(sequences.image(torch.addcmul(constant, own, kernel_spectrum, out=own)))
        ctx.guard = guard
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        (kernel, bias), inputs, (mean, sums) = ctx.graph
        own_mean = inputs[1]
        centre, zero = own_mean.detach()[:, None, None], x.new_zeros(())
        sequences = Sequences(x, ctx.guard)
        n = sequences.n

        # For the kernel and the bias, and through them for the statistics and the parameters. Of the images' spectra
        # the conjugates are kept at first: they are what the kernel's gradient takes.
        kernel_spectrum = centred_spectrum(kernel.detach(), n).conj().resolve_conj()
        cross = torch.zeros_like(kernel_spectrum)
        spectra, grad_spectra = [], []
        for piece, grad_piece in zip(sequences.pieces(x), sequences.pieces(grad)):
            spectra.append(sequences.spectrum(piece, centre).conj_physical_())
            grad_spectra.append(sequences.spectrum(grad_piece, zero))
            for own, grad_own in zip(spectra[-1], grad_spectra[-1]):
                cross.addcmul_(own, grad_own)
        total = sequences.spectrum(batch_sum(x), x.shape[0] * centre)[0]
        grad_total = sequences.spectrum(batch_sum(grad), zero)[0]
        cross += centre[..., 0] * sequences.ones().conj() * grad_total
        grad_kernel = centred_taps(inverse(cross, n), kernel.shape[-1])
        grad_correlation, grad_mean, *grad_parameters = _gradients(
            (kernel, bias), inputs, (grad_kernel, grad_total[:, 0].real)
        )

        # For the images: through the convolution, the autocorrelation, which is even in the lag, and the mean.
        gain = 2 * spectrum(grad_correlation.to(x.dtype), n).real
        grad_mean = grad_mean - sequences.image((total * gain).unsqueeze(0)).sum(dim=(0, 2, 3))
        (grad_sums,) = _gradients((mean,), (sums,), (grad_mean,))
        grad_sums = grad_sums[:-1, None, None]
        gain = gain.to(total.dtype)
        grad_x = torch.empty_like(x)
        for out in sequences.pieces(grad_x):
            own, grad_own = spectra.pop(0).conj_physical_(), grad_spectra.pop(0)
            torch.add(sequences.image(grad_own.mul_(kernel_spectrum).addcmul_(own, gain)), grad_sums, out=out)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            del ctx.graph  # as autograd frees what was saved; a loss that somebody keeps would hold it
        return None, None, None, grad_x, *grad_parameters


def _gradients(outputs: tuple, inputs: tuple, grads: tuple) -> list[Optional[Tensor]]:
    """Returns the gradients for ``inputs``, None for those that require none. The graph stays for another call."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]
