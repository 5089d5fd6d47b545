"""The operations on a GPU, in Triton: what one program does. `cuda` says how many there are and what they are given.

A sequence of at most N = N1 · N2 positions is the matrix u[a, b] = u[a · N2 + b]. Its transform is that of a real
sequence at odd frequencies ("right-angle"): the complex transform of exp(iπt / 2N) · u[t]. So products of transforms
are convolutions that wrap round, with the opposite sign, only after 2N positions, which two sequences of N positions
never do. A lag −t stands at N − t with the factor −i.

A transform is a product with a matrix over a, F[k1, a] = exp(−2πi·a·(k1 − ¼) / N1), one with the twiddles
exp(−2πi·b·(k1 − ¼) / N), and a product with a matrix over b, exp(−2πi·b·k2 / N2): what comes out at [k1, k2] is
frequency k1 + N1 · k2, and the quarters are the factor exp(iπt / 2N). A program transforms CB channels at once: over a
as the matrix (N1, N2 · CB), over b as (N1 · CB, N2).
"""

import triton
import triton.language as tl


@triton.jit
def _times(ar, ai, br, bi):
    """Returns the product of complex numbers."""
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _product(ar, ai, br, bi, PRECISION: tl.constexpr):
    """Returns the product of complex matrices."""
    yr = tl.dot(ar, br, input_precision=PRECISION)
    yr = tl.dot(-ai, bi, acc=yr, input_precision=PRECISION)
    yi = tl.dot(ar, bi, input_precision=PRECISION)
    yi = tl.dot(ai, br, acc=yi, input_precision=PRECISION)
    return yr, yi


@triton.jit
def _columns(N2: tl.constexpr, CB: tl.constexpr, LAST: tl.constexpr):
    """Returns position b and channel of each column of (N1, N2 · CB): channels last, or each channel's positions."""
    j = tl.arange(0, N2 * CB)[None, :]
    if LAST:
        b, c = j // CB, j % CB
    else:
        b, c = j % N2, j // N2
    return b, c


@triton.jit
def _to_rows(x, N1: tl.constexpr, N2: tl.constexpr, CB: tl.constexpr, LAST: tl.constexpr):
    """Returns (N1, N2 · CB) as (N1 · CB, N2)."""
    if LAST:
        x = tl.permute(tl.reshape(x, (N1, N2, CB)), (0, 2, 1))
    return tl.reshape(x, (N1 * CB, N2))


@triton.jit
def _to_columns(x, N1: tl.constexpr, N2: tl.constexpr, CB: tl.constexpr, LAST: tl.constexpr):
    """Returns (N1 · CB, N2) as (N1, N2 · CB)."""
    if LAST:
        x = tl.permute(tl.reshape(x, (N1, CB, N2)), (0, 2, 1))
    return tl.reshape(x, (N1, N2 * CB))


@triton.jit
def _sums(x, N1: tl.constexpr, N2: tl.constexpr, CB: tl.constexpr, LAST: tl.constexpr):
    """Returns the sum (CB) of each channel of (N1, N2 · CB)."""
    over_a = tl.sum(x, axis=0)
    return tl.sum(tl.reshape(over_a, (N2, CB)), axis=0) if LAST else tl.sum(tl.reshape(over_a, (CB, N2)), axis=1)


@triton.jit
def _over_a(tables, N1: tl.constexpr):
    """Returns F[k1, a], as real and imaginary part."""
    at = tl.arange(0, N1)[:, None] * N1 + tl.arange(0, N1)[None, :]
    return tl.load(tables + at), tl.load(tables + N1 * N1 + at)


@triton.jit
def _back_over_a(tables, N1: tl.constexpr):
    """Returns the conjugate of F[k1, a], at [a, k1], as real and imaginary part."""
    at = tl.arange(0, N1)[None, :] * N1 + tl.arange(0, N1)[:, None]
    return tl.load(tables + at), -tl.load(tables + N1 * N1 + at)


@triton.jit
def _over_b(tables, N1: tl.constexpr, N2: tl.constexpr):
    """Returns exp(−2πi·b·k2 / N2), as real and imaginary part."""
    at = 2 * N1 * N1 + tl.arange(0, N2)[:, None] * N2 + tl.arange(0, N2)[None, :]
    return tl.load(tables + at), tl.load(tables + N2 * N2 + at)


@triton.jit
def _twiddles(tables, N1: tl.constexpr, N2: tl.constexpr, CB: tl.constexpr, LAST: tl.constexpr):
    """Returns the twiddles at (N1, N2 · CB), as real and imaginary part."""
    b, _ = _columns(N2, CB, LAST)
    at = 2 * N1 * N1 + 2 * N2 * N2 + tl.arange(0, N1)[:, None] * N2 + b
    return tl.load(tables + at), tl.load(tables + N1 * N2 + at)


@triton.jit
def _rest_of_forward(
    xr,
    xi,
    tables,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns the spectra (N1 · CB, N2) of what was transformed over a, (N1, N2 · CB)."""
    wr, wi = _twiddles(tables, N1, N2, CB, LAST)
    xr, xi = _times(xr, xi, wr, wi)
    fr, fi = _over_b(tables, N1, N2)
    return _product(_to_rows(xr, N1, N2, CB, LAST), _to_rows(xi, N1, N2, CB, LAST), fr, fi, PRECISION)


@triton.jit
def _forward(
    u,
    tables,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns the spectra (N1 · CB, N2) of real sequences (N1, N2 · CB)."""
    fr, fi = _over_a(tables, N1)
    xr = tl.dot(fr, u, input_precision=PRECISION)
    xi = tl.dot(fi, u, input_precision=PRECISION)
    return _rest_of_forward(xr, xi, tables, N1, N2, CB, LAST, PRECISION)


@triton.jit
def _most_of_inverse(
    xr,
    xi,
    tables,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns what is still to be transformed back over a, (N1, N2 · CB), of spectra (N1 · CB, N2)."""
    fr, fi = _over_b(tables, N1, N2)
    xr, xi = _product(xr, xi, fr, -fi, PRECISION)
    wr, wi = _twiddles(tables, N1, N2, CB, LAST)
    scale: tl.constexpr = 1.0 / (N1 * N2)
    return _times(_to_columns(xr, N1, N2, CB, LAST), _to_columns(xi, N1, N2, CB, LAST), wr * scale, -wi * scale)


@triton.jit
def _inverse(
    xr,
    xi,
    tables,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns the first N values (N1, N2 · CB) of the sequences of 2N that have the spectra (N1 · CB, N2)."""
    xr, xi = _most_of_inverse(xr, xi, tables, N1, N2, CB, LAST, PRECISION)
    fr, fi = _back_over_a(tables, N1)
    u = tl.dot(fr, xr, input_precision=PRECISION)
    return tl.dot(-fi, xi, acc=u, input_precision=PRECISION)


@triton.jit
def _image_at(
    image,
    first,
    channels,
    width,
    stride,
    pixels,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
):
    """Returns where an image's channels from the first one on lie, as (N1, N2 · CB), and which of that are pixels."""
    b, c = _columns(N2, CB, LAST)
    t = tl.arange(0, N1)[:, None] * N2 + b
    row, column = t // stride, t % stride
    pixel = row * width + column
    within = pixel * channels + first + c if LAST else (first + c) * pixels + pixel
    is_pixel = (column < width) & (pixel < pixels) & (first + c < channels)
    return tl.cast(image, tl.int64) * channels * pixels + within, is_pixel


@triton.jit
def _spectrum_at(first, rows, N1: tl.constexpr, N2: tl.constexpr, CB: tl.constexpr):
    """Returns where spectra (N1 · CB, N2) of rows from the first one on lie in (rows, N1 · N2), and which are rows."""
    i = tl.arange(0, N1 * CB)[:, None]
    row = first + i % CB
    at = tl.cast(row, tl.int64) * (N1 * N2) + (i // CB) * N2 + tl.arange(0, N2)[None, :]
    return at, row < rows


@triton.jit
def spectra(
    kernel,
    spectrum,
    tables,
    rows,
    reach,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the spectra of two-sided kernels (rows, 2 · reach + 1), real parts (rows, N) and then imaginary ones."""
    first = tl.program_id(0) * CB
    b, c = _columns(N2, CB, False)
    t = tl.arange(0, N1)[:, None] * N2 + b
    n: tl.constexpr = N1 * N2
    start = kernel + tl.cast(first + c, tl.int64) * (2 * reach + 1) + reach
    is_row = first + c < rows
    ahead = tl.load(start + t, mask=is_row & (t <= reach), other=0.0)
    behind = tl.load(start + t - n, mask=is_row & (n - t <= reach), other=0.0)
    fr, fi = _over_a(tables, N1)
    xr, xi = _product(fr, fi, ahead, -behind, PRECISION)
    xr, xi = _rest_of_forward(xr, xi, tables, N1, N2, CB, False, PRECISION)
    at, is_row = _spectrum_at(first, rows, N1, N2, CB)
    tl.store(spectrum + at, xr, mask=is_row)
    tl.store(spectrum + tl.cast(rows, tl.int64) * n + at, xi, mask=is_row)


@triton.jit
def convolve(
    x,
    spectrum,
    bias,
    y,
    tables,
    channels,
    rows,
    width,
    stride,
    pixels,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes images (B, rows, H, W) convolved with the kernels that have the given spectra.

    A program convolves some channels of an image of x (B, channels, H, W) with one kernel each.
    """
    blocks = tl.cdiv(channels, CB)
    block, other = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, branch = other // (rows // channels), other % (rows // channels)
    first = block * CB
    at, is_pixel = _image_at(image, first, channels, width, stride, pixels, N1, N2, CB, LAST)
    u = tl.load(x + at, mask=is_pixel, other=0.0).to(tl.float32)
    xr, xi = _forward(u, tables, N1, N2, CB, LAST, PRECISION)
    at, is_row = _spectrum_at(branch * channels + first, (branch + 1) * channels, N1, N2, CB)
    kr = tl.load(spectrum + at, mask=is_row, other=0.0)
    ki = tl.load(spectrum + tl.cast(rows, tl.int64) * (N1 * N2) + at, mask=is_row, other=0.0)
    xr, xi = _times(xr, xi, kr, ki)
    out = _inverse(xr, xi, tables, N1, N2, CB, LAST, PRECISION)
    if HAS_BIAS:
        _, c = _columns(N2, CB, LAST)
        out += tl.load(bias + branch * channels + first + c, mask=first + c < channels, other=0.0)
    # The last channels of a branch are not those after them, of the next one.
    at, _ = _image_at(image, branch * channels + first, rows, width, stride, pixels, N1, N2, CB, LAST)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=is_pixel)


@triton.jit
def convolve_backward(
    grad,
    x,
    spectrum,
    grad_x,
    sums,
    totals,
    tables,
    images,
    chunk,
    channels,
    rows,
    branch,
    width,
    stride,
    pixels,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradients by a branch's output: for images, and what `kernels_of` makes those for kernel and bias of.

    A program takes some channels of a chunk of images. ``grad_x`` is written, or added to with ADD. The sums over the
    chunk of grad's spectra times the conjugate of x's are written as real parts (chunks, rows, N) and then imaginary
    ones, those of grad's pixels as (chunks, rows).
    """
    n: tl.constexpr = N1 * N2
    blocks = tl.cdiv(channels, CB)
    number, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * CB
    row_at, is_row = _spectrum_at(branch * channels + first, (branch + 1) * channels, N1, N2, CB)
    sr = tl.zeros((N1 * CB, N2), dtype=tl.float32)
    si = tl.zeros((N1 * CB, N2), dtype=tl.float32)
    total = tl.zeros((CB,), dtype=tl.float32)
    for image in range(number * chunk, tl.minimum((number + 1) * chunk, images)):
        at, is_pixel = _image_at(image, first, channels, width, stride, pixels, N1, N2, CB, LAST)
        u = tl.load(x + at, mask=is_pixel, other=0.0).to(tl.float32)
        xr, xi = _forward(u, tables, N1, N2, CB, LAST, PRECISION)
        grad_at, _ = _image_at(image, branch * channels + first, rows, width, stride, pixels, N1, N2, CB, LAST)
        u = tl.load(grad + grad_at, mask=is_pixel, other=0.0).to(tl.float32)
        total += _sums(u, N1, N2, CB, LAST)
        gr, gi = _forward(u, tables, N1, N2, CB, LAST, PRECISION)
        pr, pi = _times(gr, gi, xr, -xi)
        sr += pr
        si += pi
        kr = tl.load(spectrum + row_at, mask=is_row, other=0.0)
        ki = tl.load(spectrum + tl.cast(rows, tl.int64) * n + row_at, mask=is_row, other=0.0)
        gr, gi = _times(gr, gi, kr, -ki)
        out = _inverse(gr, gi, tables, N1, N2, CB, LAST, PRECISION)
        if ADD:
            out += tl.load(grad_x + at, mask=is_pixel, other=0.0).to(tl.float32)
        tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=is_pixel)
    own = sums + tl.cast(number, tl.int64) * rows * n
    tl.store(own + row_at, sr, mask=is_row)
    tl.store(own + tl.cast(tl.cdiv(images, chunk), tl.int64) * rows * n + row_at, si, mask=is_row)
    c = first + tl.arange(0, CB)
    tl.store(totals + number * rows + branch * channels + c, total, mask=c < channels)


@triton.jit
def power(
    x,
    mean,
    sums,
    tables,
    images,
    chunk,
    channels,
    width,
    stride,
    pixels,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the sums over each chunk of images of the squares of their spectra over N, less the channels' mean.

    As (chunks, channels, N).
    """
    n: tl.constexpr = N1 * N2
    blocks = tl.cdiv(channels, CB)
    number, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * CB
    squares = tl.zeros((N1 * CB, N2), dtype=tl.float32)
    _, c = _columns(N2, CB, LAST)
    centre = tl.load(mean + first + c, mask=first + c < channels, other=0.0)
    for image in range(number * chunk, tl.minimum((number + 1) * chunk, images)):
        at, is_pixel = _image_at(image, first, channels, width, stride, pixels, N1, N2, CB, LAST)
        u = tl.load(x + at, mask=is_pixel, other=0.0).to(tl.float32)
        u = tl.where(is_pixel, u - centre, 0.0) / n
        xr, xi = _forward(u, tables, N1, N2, CB, LAST, PRECISION)
        squares += xr * xr + xi * xi
    at, is_row = _spectrum_at(first, channels, N1, N2, CB)
    tl.store(sums + tl.cast(number, tl.int64) * channels * n + at, squares, mask=is_row)


@triton.jit
def kernels_of(
    sums,
    totals,
    kernel,
    bias,
    tables,
    chunks,
    rows,
    reach,
    N1: tl.constexpr,
    N2: tl.constexpr,
    CB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the two-sided kernels (rows, 2 · reach + 1) whose spectra are the sums over all chunks, and the totals."""
    first = tl.program_id(0) * CB
    n: tl.constexpr = N1 * N2
    at, is_row = _spectrum_at(first, rows, N1, N2, CB)
    xr = tl.zeros((N1 * CB, N2), dtype=tl.float32)
    xi = tl.zeros((N1 * CB, N2), dtype=tl.float32)
    c = tl.arange(0, CB)
    total = tl.zeros((CB,), dtype=tl.float32)
    for number in range(chunks):
        own = sums + tl.cast(number, tl.int64) * rows * n
        xr += tl.load(own + at, mask=is_row, other=0.0)
        xi += tl.load(own + tl.cast(chunks, tl.int64) * rows * n + at, mask=is_row, other=0.0)
        total += tl.load(totals + number * rows + first + c, mask=first + c < rows, other=0.0)
    tl.store(bias + first + c, total, mask=first + c < rows)
    xr, xi = _most_of_inverse(xr, xi, tables, N1, N2, CB, False, PRECISION)
    fr, fi = _back_over_a(tables, N1)
    ahead, behind = _product(fr, fi, xr, xi, PRECISION)
    b, c = _columns(N2, CB, False)
    t = tl.arange(0, N1)[:, None] * N2 + b
    start = kernel + tl.cast(first + c, tl.int64) * (2 * reach + 1) + reach
    tl.store(start + t, ahead, mask=(first + c < rows) & (t <= reach))
    tl.store(start + t - n, -behind, mask=(first + c < rows) & (t > 0) & (n - t <= reach))
