"""Compares the cost of a training step of branch_norm="parseval" with that of "batch", time and peak memory.

Every measurement is a fresh process; the norms take turns, so that a change of the machine's speed hits both.

    python scripts/training_cost.py --rounds 3
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import timm
import torch

import mrconvnext  # noqa: F401  registers the models

NORMS = ("batch", "parseval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mrconvnext_tiny", help="model name (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (default: %(default)s)")
    parser.add_argument("--img-size", type=int, default=224, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each norm (default: %(default)s)")
    parser.add_argument("--measure", choices=NORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return

    runs = {norm: [] for norm in NORMS}
    for round_ in range(args.rounds):
        for norm in NORMS:
            run = subprocess.run(
                [sys.executable, *sys.argv, "--measure", norm], check=True, stdout=subprocess.PIPE, text=True
            )
            runs[norm].append(json.loads(run.stdout))
            print(f"round {round_ + 1}/{args.rounds} {norm:8s} {describe(runs[norm][-1])}", flush=True)

    print(f"{args.model}, batch {args.batch_size}, {args.img_size} px, float32, {torch.get_num_threads()} threads")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, timm {timm.__version__}")
    for key, name, better in (("ms", "speed", "batch / parseval"), ("mib", "memory", "parseval / batch")):
        ratios = [b[key] / p[key] for b, p in zip(runs["batch"], runs["parseval"])]
        ratios = ratios if key == "ms" else [1 / ratio for ratio in ratios]
        spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
        print(f"{name}, {better}: {statistics.median(ratios):.2f} (rounds: {spread})")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Returns the median time of a step in ms, and the peak memory above that before the model was made, in MiB."""
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    targets = torch.randint(0, 1000, (args.batch_size,))
    before = resident_mib()
    model = timm.create_model(args.model, branch_norm=args.measure).train()
    optimizer = torch.optim.AdamW(model.parameters())
    times = []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms": 1000 * statistics.median(times[2:]), "mib": peak - before}


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def describe(run: dict[str, float]) -> str:
    return f"{run['ms']:7.0f} ms a step, peak {run['mib']:6.0f} MiB"


if __name__ == "__main__":
    main()
