"""The compiled engine against the plain one in float64: every instruction set, size, order in memory and thread number.

Where it was not built, all but the tests of that are skipped.
"""

import logging
import multiprocessing
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from torch import Tensor

import mrconvnext
from mrconvnext.engines import cpu, library, plain, serving

needs_library = pytest.mark.skipif(cpu.library().functions is None, reason=cpu.library().description)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
VECTORS = [size for size in library.VECTORS if size <= cpu.library().vector_bytes]
GUARD = 3


def arguments(
    batch: int, channels: int, height: int, width: int, branches: int = 1, dtype=torch.float32, last=True, causal=False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns images, kernels, biases, gradients and means."""
    generator = torch.Generator().manual_seed(batch + channels + height + width)
    order = torch.channels_last if last else torch.contiguous_format

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(batch, channels, height, width).contiguous(memory_format=order)
    grad = normal(batch, branches * channels, height, width).contiguous(memory_format=order)
    reach = height * (width + GUARD) - 1
    kernel = normal(branches * channels, 2 * reach + 1)
    if causal:
        kernel[:, :reach] = 0
    return x, kernel, normal(branches * channels), grad, normal(channels)


def results(engine, x: Tensor, kernel: Tensor, bias: Tensor, grad: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Returns everything that an engine computes."""
    stride = x.shape[3] + GUARD
    gradients = engine.convolve_backward(grad, x, kernel, stride, GUARD)
    return {
        "output": engine.convolve(x, kernel, bias, stride, GUARD),
        **dict(zip(("gradient of x", "gradient of the kernel", "gradient of the bias"), gradients)),
        "autocorrelation": engine.autocorrelation(x, mean, GUARD),
    }


def assert_right(given: tuple[Tensor, ...]) -> None:
    expected = results(plain, *(x.double() for x in given))
    for name, found in results(cpu, *given).items():
        error = relative_error(found, expected[name])
        assert error <= TOLERANCE[given[0].dtype], f"{name}: relative error {error:.1e}"


@pytest.fixture
def use_library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes what is known of the library: its vectors, its threads."""

    def change(**known) -> None:
        found = cpu.library()._replace(**known)
        monkeypatch.setattr(cpu, "library", lambda: found)

    return change


@needs_library
@pytest.mark.parametrize("vector_bytes", VECTORS, ids=[library.VECTORS[size] for size in VECTORS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("channels", [1, 3, 16, 40])
@pytest.mark.parametrize("branches", [1, 3])
def test_every_instruction_set(vector_bytes: int, dtype, last: bool, channels: int, branches: int, use_library) -> None:
    use_library(vector_bytes=vector_bytes)
    assert_right(arguments(3, channels, 7, 9, branches, dtype, last))


@needs_library
@pytest.mark.parametrize("seed", range(8))
def test_any_size(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK", 2)
    choose = random.Random(seed)
    for _ in range(8):
        batch, channels, branches = choose.randint(1, 5), choose.randint(1, 20), choose.randint(1, 2)
        height, width = choose.randint(1, 70), choose.randint(1, 70)
        last, causal = choose.random() < 0.5, choose.random() < 0.5
        assert_right(arguments(batch, channels, height, width, branches, torch.float32, last, causal))


@needs_library
@pytest.mark.parametrize("size", [(129, 257), (300, 300), (1, 5000), (5000, 1)], ids=str)
def test_large_sizes(size: tuple[int, int]) -> None:
    assert_right(arguments(1, 5, *size))


@needs_library
def test_sizes_that_the_kernel_was_not_made_for() -> None:
    x, kernel, bias, *_ = arguments(2, 20, 9, 11)
    for height, width in ((5, 6), (13, 17), (1, 1)):
        own = torch.randn(2, 20, height, width)
        expected = plain.convolve(own.double(), kernel.double(), bias.double(), 11 + GUARD, GUARD)
        assert relative_error(cpu.convolve(own, kernel, bias, 11 + GUARD, GUARD), expected) <= 1e-6


@needs_library
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_threads_change_nothing(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK", 2)
    given = arguments(7, 40, 13, 9, last=last)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(cpu, *given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@needs_library
def test_several_threads_of_python_at_once() -> None:
    given = [arguments(2, 20, 5 + i, 12) for i in range(6)]
    expected = [results(cpu, *own) for own in given]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            found = results(cpu, *given[i])
            wrong.extend(name for name in found if not torch.equal(found[name], expected[i][name]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(results_of: multiprocessing.Queue) -> None:
    given = arguments(2, 20, 9, 12)
    torch.set_num_threads(2)
    results_of.put(float(results(cpu, *given)["output"].double().sum()))


@needs_library
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process() -> None:
    """Whose parent has used its threads, which the child has not."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = float(results(cpu, *arguments(2, 20, 9, 12))["output"].double().sum())
    torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


class Blurred(torch.utils.data.Dataset):
    """Images that a loader's workers convolve."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        x, kernel, bias, *_ = arguments(1, 20, 5 + index, 12)
        with mrconvnext.engine("auto"):
            return torch.ops.mrconvnext.convolve(x, kernel, bias, 12 + GUARD, GUARD).sum()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_loader() -> None:
    data = Blurred()
    loaded = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=60)
    assert [float(x) for x in loaded] == pytest.approx([float(data[i]) for i in range(4)], rel=1e-4)


@needs_library
def test_what_is_not_finite_stays_with_its_image_and_channel() -> None:
    x, kernel, bias, grad, mean = arguments(3, 20, 6, 7)
    x[0, 1, 2, 3], x[1, 17, 0, 0], grad[2, 5, 1, 1] = float("nan"), float("inf"), -float("inf")
    expected = results(plain, x, kernel, bias, grad, mean)
    for name, found in results(cpu, x, kernel, bias, grad, mean).items():
        if name == "autocorrelation":  # whose last lags no two pixels have: they are exact zeros here
            found, expected[name] = found[:, :-GUARD], expected[name][:, :-GUARD]
        assert torch.equal(found.isfinite(), expected[name].isfinite()), name


@needs_library
def test_an_empty_batch() -> None:
    given = arguments(0, 5, 6, 7)
    expected = results(plain, *given)
    for name, found in results(cpu, *given).items():
        assert found.shape == expected[name].shape and torch.equal(found, expected[name]), name


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, kernel, bias, *_ = arguments(2, 20, 6, 7)
    x = x.to(dtype)
    expected = cpu.convolve(x.float(), kernel, bias, 7 + GUARD, GUARD).to(dtype)
    assert torch.equal(cpu.convolve(x, kernel, bias, 7 + GUARD, GUARD), expected)


@pytest.mark.parametrize("order", ["expanded", "every second column", "transposed"])
def test_any_order_in_memory(order: str) -> None:
    x = {
        "expanded": torch.randn(1, 1, 6, 8).expand(2, 20, 6, 8),
        "every second column": torch.randn(2, 20, 6, 16)[..., ::2],
        "transposed": torch.randn(2, 20, 8, 6).mT,
    }[order]
    _, kernel, bias, *_ = arguments(2, 20, 6, 8)
    found = torch.ops.mrconvnext.convolve(x, kernel, bias, 8 + GUARD, GUARD)
    expected = plain.convolve(x.double(), kernel.double(), bias.double(), 8 + GUARD, GUARD)
    assert relative_error(found, expected) <= 1e-6


class Tagged(torch.Tensor):
    """A tensor of another class."""


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(1, 2, 3, 3, device="meta"),
        torch.zeros(1, 2, 3, 3).as_subclass(Tagged),
        torch.zeros(2, 2).to_sparse(),
    ],
    ids=["another device", "a subclass", "another layout"],
)
def test_other_tensors_are_the_plain_engines(x: Tensor) -> None:
    assert serving(x) is plain and serving(torch.zeros(1), x) is plain


# Bad input, which must not reach the library


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("engine", mrconvnext.engines.NAMES)
def test_operations_refuse_sizes_that_do_not_fit(seed: int, engine: str) -> None:
    """Of random calls all are refused, or computed as the plain engine does."""
    choose = random.Random(seed)
    refused = computed = 0
    for _ in range(200):
        x = torch.randn([choose.randint(0, 3) for _ in range(choose.choice([3, 4, 4, 4]))])
        rows = choose.choice([0, 3, x.shape[1], 2 * x.shape[1]])
        kernel = torch.randn([rows, choose.randint(0, 9)][: choose.choice([1, 2, 2, 2])])
        bias = choose.choice([None, torch.randn(rows), torch.randn(choose.randint(0, 6))])
        stride, guard = choose.randint(0, 5), choose.randint(-1, 2)
        with mrconvnext.engine(engine):
            try:
                found = torch.ops.mrconvnext.convolve(x, kernel, bias, stride, guard)
            except ValueError:
                refused += 1
                continue
        computed += 1
        expected = plain.convolve(x.double(), kernel.double(), bias if bias is None else bias.double(), stride, guard)
        assert found.shape == expected.shape and torch.allclose(found.double(), expected, atol=1e-5)
    assert refused > 20 and computed > 5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ops, x, k: ops.convolve(x, k[:, 1:], None, 8, 3), "odd number of lags"),
        (lambda ops, x, k: ops.convolve(x, k[1:], None, 8, 3), "whole number of kernels"),
        (lambda ops, x, k: ops.convolve(x, k, torch.zeros(3), 8, 3), r"bias must be \(2,\)"),
        (lambda ops, x, k: ops.convolve(x[0], k, None, 8, 3), r"x must be \(B, C, H, W\)"),
        (lambda ops, x, k: ops.convolve_backward(x[:, :1], x, k, 8, 3), "grad must be"),
        (lambda ops, x, k: ops.autocorrelation(x, torch.zeros(3), 3), r"mean \(C\)"),
    ],
)
def test_errors_name_what_does_not_fit(call: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(torch.ops.mrconvnext, torch.zeros(1, 2, 4, 5), torch.zeros(2, 63))


# The library itself


def test_without_a_library_the_plain_engine_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = library.load(tmp_path / "_native.so")
    assert missing.functions is None and "finds a C++ compiler" in missing.description
    monkeypatch.setattr(cpu, "library", lambda: missing)
    with mrconvnext.engine("auto"):
        assert serving(torch.zeros(1)) is plain
        assert str(mrconvnext.engine()).startswith(f"auto: on CPUs {missing.description}; on GPUs ")


def test_a_broken_or_foreign_library_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, foreign = tmp_path / "broken.so", tmp_path / "foreign.so"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    foreign.write_bytes(Path(torch.__file__).with_name("lib").joinpath("libshm.so").read_bytes())
    with caplog.at_level(logging.WARNING):
        for file in (broken, foreign):
            assert library.load(file).functions is None
            assert str(file) in caplog.messages[-1] and "PyTorch's FFTs" in caplog.messages[-1]
