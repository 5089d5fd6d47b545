"""Compares the speed, memory, size and operations of MRConvNeXt, ConvNeXt and any other model of timm.

    python benchmark_throughput.py --output benchmark
    python benchmark_throughput.py --train --batch-sizes 16 --rounds 3 --output benchmark-training

Models take turns, round by round, so that a change of the machine's speed hits all alike. Forward passes are timed in
one process that holds all models; training steps in a fresh process for each model and round. Peak memory is that of
a fresh process less what it held before the model was made; a model that fails there says so in its row and is left
out of the rounds. On CPU with --compile the compiler's own memory is part of it.

Every MRConvNeXt has a row for its training form and, without --train, one deployed; the former is then in eval mode.
Every ConvNeXt has one in its default layout, one with conv_mlp=True, and, where they differ from timm's, one with the
blocks that MRConvNeXt has on a CPU ("fused blocks"). Ratios are of images/s, to the ConvNeXt of the same size in its
default layout, taken round by round.
Weights are random, but as large as trained ones, so that the error of a deployed model is not hidden by layer scales
near zero.
"""

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Optional

import torch
from tqdm import tqdm

from mrconvnext.benchmarking.report import as_text, describe_environment, save, save_plots, summary
from mrconvnext.benchmarking.rows import Row, make_rows
from mrconvnext.benchmarking.timing import measure, pass_in_turns, train_in_turns
from mrconvnext.hub import check_name

MODELS = ("mrconvnext_tiny", "convnext_tiny", "inception_next_tiny", "swin_tiny_patch4_window7_224")


def main(argv: Optional[list[str]] = None) -> int:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(args.threads)
    try:
        if args.measure:
            row = Row(**json.loads(args.measure))
            measure(row, args)
            print(json.dumps(dataclasses.asdict(row)))
            return 0
        return run(args)
    except KeyboardInterrupt:
        return 130


# Arguments


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
    args.command = [__file__, *argv]
    args.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    if not args.measure and importlib.util.find_spec("matplotlib") is None:
        parser.error('the plots need matplotlib: pip install "mrconvnext[bench]"')
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
    try:
        check_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
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


# The run


def run(args: argparse.Namespace) -> int:
    """Measures all rows, saves them as they come, prints and plots them. Returns the exit status."""
    args.output.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(args)
    print("\n".join(f"{name:13} {value}" for name, value in environment.items()), flush=True)
    rows = make_rows(args)
    settings = [list(own) for _, own in itertools.groupby(rows, key=lambda row: row.size)]
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
                (train_in_turns if args.train else pass_in_turns)(setting, args, done)
        except KeyboardInterrupt:
            status = 130
            save(rows, environment, args)
    table = summary(rows, args.reference)
    print(as_text(table))
    save_plots(table, args)
    print(f"{'Interrupted; what was measured' if status else 'All of it'} is in {args.output}")
    return status


if __name__ == "__main__":
    sys.exit(main())
