"""Compares the speed, memory, size and operations of MRConvNeXt, ConvNeXt and any other model of timm.

    python benchmark_throughput.py --output benchmark
    python benchmark_throughput.py --train --batch-sizes 16 --rounds 3 --output benchmark-training

Models take turns, round by round, so that a change of the machine's speed hits all alike. Forward passes are timed in
one process that holds all models; training steps in a fresh process for each model and round. Peak memory is that of
a fresh process less what it held before the model was made; a model that fails there says so in its row and is left
out of the rounds. On CPU with --compile the compiler's own memory is part of it.

Every MRConvNeXt has a row for its training form, in eval mode, and one deployed. Every ConvNeXt has one in its default
layout, one with conv_mlp=True, and one with the block optimisations of MRConvNeXt. Ratios are of images/s, to
the ConvNeXt of the same size in its default layout, taken round by round. Weights are random, but as large as trained
ones, so that the error of a deployed model is not hidden by layer scales near zero.
"""

import argparse
import ast
import csv
import dataclasses
import datetime
import difflib
import itertools
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model_in_modules
from torch import Tensor, nn
from tqdm import tqdm

import mrconvnext
from mrconvnext.block import use_fast_blocks
from mrconvnext.flops import count_flops
from mrconvnext.plots import plot_accuracy, plot_throughput, plot_time_per_pixel

MODELS = ("mrconvnext_tiny", "convnext_tiny", "inception_next_tiny", "swin_tiny_patch4_window7_224")

# The forms that a model of a timm module is measured in, the first as it is made.
FORMS = {"mrconvnext": ("training form", "deployed"), "convnext": ("default", "conv_mlp", "fast blocks")}

# Forms that are made of another one's weights, can't be trained and must give the same logits.
DERIVED = {"deployed": "training form", "fast blocks": "default"}

WARM_UP = 2  # passes before the first that counts: allocators settle, kernels' spectra are kept
TURN_SECONDS = 0.2  # in its turn a model makes as many passes as take about this long, at least one
KILLED = -9  # status of a process that the system killed

# Ranges of what trained models have, by the parameter's or statistic's name.
TRAINED = {"running_mean": (-0.5, 0.5), "running_var": (0.3, 2.0), "alpha": (-1.0, 1.0), "gamma": (0.5, 1.5)}

# The columns on the screen; the files have more.
SHOWN = ("model", "form", "batch_size", "img_size", "images_per_s", "ms", "ratio", "first_ms")
SHOWN += ("parameters", "gflops", "memory_mib", "memory_ratio", "error", "note")


@dataclasses.dataclass
class Row:
    """What is measured of a model in one form, at one batch and image size."""

    model: str
    form: str
    batch_size: int
    img_size: int
    ms: list[float] = dataclasses.field(default_factory=list)  # of a forward pass or a training step, one a round
    memory_mib: list[float] = dataclasses.field(default_factory=list)  # peak, one a fresh process
    first_ms: Optional[float] = None  # of the first forward pass, which derives what is kept from the weights
    parameters: Optional[int] = None
    gflops: Optional[float] = None
    gflops_per_pass: Optional[float] = None
    error: Optional[float] = None
    note: str = ""


def main(argv: Optional[list[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    try:
        if args.measure:
            print(json.dumps(dataclasses.asdict(measured(Row(**json.loads(args.measure)), args))))
            return 0
        return run(args, argv)
    except KeyboardInterrupt:
        return 130


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the CSV, the JSON and the plots")
    models = f"names in timm, with options as in mrconvnext_tiny:branch_norm=parseval (default: {' '.join(MODELS)})"
    add("--models", nargs="+", type=model_spec, default=MODELS, metavar="MODEL", help=models)
    add("--reference", type=model_spec, help="model that ratios are to (default: the ConvNeXt of the model's size)")
    add("--batch-sizes", nargs="+", type=positive, default=[1, 8], help="images a pass (default: 1 8)")
    add("--img-sizes", nargs="+", type=positive, default=[224], help="height and width in pixels (default: 224)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads (default: %(default)s, torch's)")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="type to autocast to (default: float32, no autocast)")
    add("--channels-last", action="store_true", help="weights and images in channels-last layout")
    add("--compile", action="store_true", help="torch.compile, whole and for each size; graph breaks are failures")
    add("--train", action="store_true", help="time training steps: forward, backward and an AdamW step")
    add("--grad-checkpointing", action="store_true", help="with --train: compute blocks again instead of keeping them")
    add("--rounds", type=positive, default=10, help="turns of each model (default: %(default)s)")
    add("--steps", type=positive, default=10, help="timed training steps a turn (default: %(default)s)")
    add("--accuracies", type=accuracies, default={}, help="CSV of model,top1 with a header, for a plot; top1 in %%")
    add("--measure", help=argparse.SUPPRESS)  # a row as JSON: this is a fresh process, which answers with the row
    args = parser.parse_args(argv)
    args.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    if args.grad_checkpointing and not args.train:
        parser.error("--grad-checkpointing needs --train: a forward pass alone keeps nothing")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def model_spec(text: str) -> str:
    """Returns a model's name and options as given, once they are known to make sense."""
    name, *options = text.split(":")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5)
        hint = f"close are {', '.join(close)}" if close else "timm.list_models() lists the names"
        raise argparse.ArgumentTypeError(f"unknown model {name!r}: {hint}")
    for option in options:
        if "=" not in option:
            raise argparse.ArgumentTypeError(f"options must be given as name=value, got {option!r}")
    return text


def accuracies(path: str) -> dict[str, float]:
    """Returns the top-1 accuracy of each model of a CSV file, in %."""
    try:
        with open(path, newline="") as file:
            return {line["model"]: float(line["top1"]) for line in csv.DictReader(file)}
    except (OSError, KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path} is not a CSV file with columns model and top1: {error!r}") from error


# Which rows


def make_rows(args: argparse.Namespace) -> list[Row]:
    """Returns empty rows for the models asked for, each after the one that its ratios are to."""
    models = [name for model in args.models for name in (reference_of(model, args), model) if name]
    return [
        Row(model, form, batch_size, img_size)
        for batch_size, img_size in itertools.product(args.batch_sizes, args.img_sizes)
        for model in dict.fromkeys(models)
        for form in forms_of(model, args.train)
    ]


def reference_of(model: str, args: argparse.Namespace) -> Optional[str]:
    """Returns the model that the ratios of a model are to, if there is one."""
    if args.reference:
        return args.reference
    names = [f"convnext_{word}" for word in model.split(":")[0].split("_")]
    return next((name for name in names if timm.is_model(name)), None)


def forms_of(model: str, train: bool) -> list[str]:
    name = model.split(":")[0]
    forms = next((forms for module, forms in FORMS.items() if is_model_in_modules(name, [module])), ("default",))
    return [form for form in forms if not (train and form == "deployed")]


# The run


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Measures all rows, saves them as they come, prints and plots them. Returns the exit status."""
    args.output.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(args, argv)
    print("\n".join(f"{name:13} {value}" for name, value in environment.items()), flush=True)
    rows = make_rows(args)
    settings = [list(own) for _, own in itertools.groupby(rows, lambda row: (row.batch_size, row.img_size))]
    total = sum(args.rounds + (0 if args.train else len(setting)) for setting in settings)
    status = 0
    with tqdm(total=total, disable=not sys.stderr.isatty()) as bar:

        def done(what: str) -> None:
            save(rows, environment, args)
            bar.set_postfix_str(what)
            bar.update()
            if bar.disable:
                print(what, flush=True)

        try:
            for setting in settings:
                (train_in_turns if args.train else pass_in_turns)(setting, args, argv, done)
        except KeyboardInterrupt:
            status = 130
            save(rows, environment, args)
    table = summary(rows, args)
    print_table(table)
    plot(table, args)
    print(f"{'Interrupted; what was measured' if status else 'All of it'} is in {args.output}")
    return status


def pass_in_turns(rows: list[Row], args: argparse.Namespace, argv: list[str], done: Callable[[str], None]) -> None:
    """Measures each model in a fresh process, then times forward passes, in this one, of those that did not fail."""
    for row in rows:
        measure_apart(row, argv)
        done(f"{row.model} ({row.form}), {size_of(row)}: {row.note or 'measured in a fresh process'}")
    turns = []
    for row in rows:
        if not row.note:
            with failures_noted(row):
                step = make_step(row, make_images(row, args), args)
                seconds = [timed(step, args) for _ in range(WARM_UP)]
                row.first_ms = 1000 * seconds[0]
                turns.append((row, step, max(1, round(TURN_SECONDS / seconds[-1]))))
    for i in range(args.rounds):
        for row, step, passes in turns:
            if not row.note:
                with failures_noted(row):
                    row.ms.append(1000 * timed(step, args, passes) / passes)
        done(f"{size_of(rows[0])}: round {i + 1} of {args.rounds}")


def train_in_turns(rows: list[Row], args: argparse.Namespace, argv: list[str], done: Callable[[str], None]) -> None:
    """Times training steps, every round in a fresh process for each model."""
    for i in range(args.rounds):
        for row in rows:
            if not row.note:
                measure_apart(row, argv)
        done(f"{size_of(rows[0])}: round {i + 1} of {args.rounds}")


def size_of(row: Row) -> str:
    return f"batch {row.batch_size}, {row.img_size} px"


def measure_apart(row: Row, argv: list[str]) -> None:
    """Adds to a row what a fresh process measures, or why it could not."""
    command = [sys.executable, __file__, *argv, "--measure", json.dumps(dataclasses.asdict(row))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode == KILLED:
        row.note = "out of memory: the system killed the process"
    elif process.returncode != 0:
        row.note = f"the process ended with status {process.returncode}"
    else:
        vars(row).update(json.loads(process.stdout.splitlines()[-1]))


@contextmanager
def failures_noted(row: Row) -> Iterator[None]:
    """Turns an error inside into the row's note: the other rows go on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text
        row.note = "out of memory" if out_of_memory else f"{type(error).__name__}: {text[:200]}"


# One model


def measured(row: Row, args: argparse.Namespace) -> Row:
    """Returns the row with what this process, which must be fresh, measures of its model."""
    with failures_noted(row):
        images = make_images(row, args)
        before = memory_mib(args.device)
        step = make_step(row, images, args)
        timed(step, args, WARM_UP)
        reset_peak_memory(args.device)
        seconds = [timed(step, args) for _ in range(args.steps if args.train else 1)]
        if before is not None:
            row.memory_mib.append(memory_mib(args.device, peak=True) - before)
        if args.train:
            row.ms.append(1000 * statistics.median(seconds))
        if row.parameters is None:
            count(row, args)
    return row


def count(row: Row, args: argparse.Namespace) -> None:
    """Adds to a row what does not depend on time: parameters, operations and the error."""
    model = create_model(row, args)
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = count_flops(model, (3, row.img_size, row.img_size))
    row.gflops, row.gflops_per_pass = flops.per_image / 1e9, flops.per_pass / 1e9
    if row.form in DERIVED:
        images = make_images(dataclasses.replace(row, batch_size=1), args)
        original = create_model(dataclasses.replace(row, form=DERIVED[row.form]), args)
        row.error = largest_error(model, original, images)


@torch.no_grad()
def largest_error(model: nn.Module, original: nn.Module, images: Tensor) -> float:
    """Returns the largest difference of two models' logits, in float32, as a fraction of the largest logit."""
    logits, expected = model(images), original(images)
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def make_images(row: Row, args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(row.batch_size, 3, row.img_size, row.img_size, generator=generator)
    return images.to(args.device, memory_format=args.memory_format)


def create_model(row: Row, args: argparse.Namespace) -> nn.Module:
    """Returns a row's model in eval mode; forms of one model have the same weights."""
    name, *given = row.model.split(":")
    options = {key: literal(value) for key, _, value in (option.partition("=") for option in given)}
    if is_model_in_modules(name, ["mrconvnext"]) or timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options.setdefault("img_size", row.img_size)
    if row.form == "conv_mlp":
        options["conv_mlp"] = True
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    make_as_if_trained(model)
    model.to(args.device, memory_format=args.memory_format)
    if row.form == "deployed":
        model.reparameterize()
    if row.form == "fast blocks":
        use_fast_blocks(model)
    return model


def literal(text: str) -> Any:
    """Returns the Python value that a text stands for, or the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@torch.no_grad()
def make_as_if_trained(model: nn.Module) -> None:
    """Draws statistics, α and layer scales from `TRAINED`: a new ConvNeXt's logits hardly depend on its blocks."""
    for name, value in model.state_dict().items():
        if (last := name.rpartition(".")[2]) in TRAINED:
            value.uniform_(*TRAINED[last])


# Timing


def make_step(row: Row, images: Tensor, args: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that runs a forward pass of a row's model, or a training step."""
    model = create_model(row, args)
    run_model = compiled(model) if args.compile else model
    dtype = getattr(torch, args.amp_dtype or "float32")
    autocast = torch.autocast(args.device, dtype=dtype, enabled=args.amp_dtype is not None)

    @torch.no_grad()
    def forward_pass() -> None:
        with autocast:
            run_model(images)

    if not args.train:
        return forward_pass

    model.train().set_grad_checkpointing(args.grad_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters())
    targets = torch.arange(len(images), device=args.device) % model.num_classes

    def training_step() -> None:
        with autocast:
            loss = F.cross_entropy(run_model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return training_step


def compiled(model: nn.Module) -> nn.Module:
    # Models of one class share code, of which Dynamo by default compiles no more than eight versions.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(model, fullgraph=True, dynamic=False)


def timed(step: Callable[[], None], args: argparse.Namespace, passes: int = 1) -> float:
    """Returns how long a step takes ``passes`` times, in seconds."""
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(passes):
        step()
    synchronize()
    return time.perf_counter() - start


def memory_mib(device: str, peak: bool = False) -> Optional[float]:
    """Returns the memory in use, or its peak, in MiB: PyTorch's on CUDA, else the process's, known on Linux only."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    kib = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", read("/proc/self/status"))
    return int(kib[1]) / 1024 if kib else None


def reset_peak_memory(device: str) -> None:
    """Lets the peak start anew from the memory in use: making a model may take more than running it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not Linux, or not allowed: then the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def read(path: str) -> str:
    """Returns the text of a file that only Linux has, empty elsewhere."""
    return Path(path).read_text() if Path(path).exists() else ""


# What comes out


def describe_environment(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Returns what the numbers depend on, for every file that holds them."""
    names = re.findall(r"model name\s*: (.*)", read("/proc/cpuinfo"))
    names += [platform.processor() or platform.machine()]
    return {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else names[0],
        "threads": args.threads,
        "mode": "training step" if args.train else "forward pass",
        "dtype": f"{args.amp_dtype} autocast" if args.amp_dtype else "float32",
        "channels_last": args.channels_last,
        "compile": args.compile,
        "rounds": args.rounds,
        "mrconvnext": mrconvnext.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", Path(__file__).name, *argv]),
    }


def summary(rows: list[Row], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the columns of every row; None is what does not apply or was not measured."""
    references: dict[tuple, Row] = {}
    for row in rows:
        references.setdefault((row.model, row.batch_size, row.img_size), row)  # the first form of a model
    keys = [(reference_of(row.model, args), row.batch_size, row.img_size) for row in rows]
    return [columns(row, references.get(key)) for row, key in zip(rows, keys)]


def columns(row: Row, reference: Optional[Row]) -> dict[str, Any]:
    line = {name: getattr(row, name) for name in ("model", "form", "batch_size", "img_size")}
    line["images_per_s"] = 1000 * row.batch_size / statistics.median(row.ms) if row.ms else None
    times, memories = (reference.ms, reference.memory_mib) if reference else ([], [])
    line |= spread("ms", row.ms)
    line |= spread("ratio", [theirs / ours for ours, theirs in zip(row.ms, times)])
    line |= spread("memory_mib", row.memory_mib)
    line |= spread("memory_ratio", [ours / theirs for ours, theirs in zip(row.memory_mib, memories) if theirs > 0])
    rest = ("first_ms", "parameters", "gflops", "gflops_per_pass", "error", "note")
    return line | {name: getattr(row, name) for name in rest}


def spread(name: str, values: list[float]) -> dict[str, Optional[float]]:
    """Returns the median of the rounds or processes, the least and the largest value as columns."""
    median, least, largest = (statistics.median(values), min(values), max(values)) if values else (None, None, None)
    return {name: median, f"{name}_min": least, f"{name}_max": largest}


def save(rows: list[Row], environment: dict[str, Any], args: argparse.Namespace) -> None:
    """Writes all there is so far to benchmark.csv and benchmark.json; the latter has the times of every round."""
    table = summary(rows, args)
    with open(args.output / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *environment])
        writer.writeheader()
        writer.writerows({**line, **environment} for line in table)
    full = [{**line, "rounds_ms": row.ms, "processes_mib": row.memory_mib} for line, row in zip(table, rows)]
    (args.output / "benchmark.json").write_text(json.dumps({"environment": environment, "rows": full}, indent=1))


def print_table(table: list[dict[str, Any]]) -> None:
    """Prints the rows, each median with its spread; a blank is what does not apply or was not measured."""
    cells = [list(SHOWN), *([cell(line, name) for name in SHOWN] for line in table)]
    widths = [max(len(text) for text in column) for column in zip(*cells)]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def cell(line: dict[str, Any], name: str) -> str:
    text, *ends = (written(line[key]) for key in (name, f"{name}_min", f"{name}_max") if key in line)
    return f"{text} ({' … '.join(ends)})" if len(set(ends)) > 1 else text


def written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def plot(table: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Draws the rows that were measured."""
    lines = [line for line in table if line["ms"] is not None]
    if not lines:
        return
    plot_throughput(lines).savefig(args.output / "throughput.png", dpi=120)
    if len(args.img_sizes) > 1:
        plot_time_per_pixel(lines).savefig(args.output / "time_per_pixel.png", dpi=120)
    known = [{**line, "top1": args.accuracies[line["model"]]} for line in lines if line["model"] in args.accuracies]
    if known:
        plot_accuracy(known).savefig(args.output / "accuracy.png", dpi=120)


if __name__ == "__main__":
    sys.exit(main())
