"""Compiles the programs for GPUs, for cards that need not be here, and prints what they take.

    python scripts/triton_sizes.py

Shared memory must fit into what a program may have on the card, see ``LONGEST`` in `mrconvnext.engines.cuda`; registers
that spill cost time. Registers are those of NVIDIA's assembler, which comes with Triton.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mrconvnext.engines import cuda, triton_kernels

TARGETS = [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
FLOAT32 = dict.fromkeys(("kernel", "spectrum", "bias", "tables", "mean", "sums", "totals"), "*fp32")
FLAGS = {"LAST": True, "HAS_BIAS": True, "ADD": False}
OF_IMAGES = ("convolve", "convolve_backward", "power")
PROGRAMS = ("spectra", *OF_IMAGES, "kernels_of")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--positions", type=int, nargs="+", default=sorted(cuda.LONGEST), help="(default: %(default)s)")
    args = parser.parse_args()
    print("| card | program | positions | images | shared bytes | registers | spilled bytes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for target in TARGETS:
        for n in args.positions:
            for name in PROGRAMS:
                for dtype in ("bf16", "fp32") if name in OF_IMAGES else ("fp32",):
                    program = compiled(name, n, dtype, target)
                    card = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
                    registers, spilled = assembled(program, target)
                    shared = program.metadata.shared
                    print(f"| {card} | {name} | {n} | {dtype} | {shared} | {registers} | {spilled} |", flush=True)


def compiled(name: str, n: int, dtype: str, target: GPUTarget) -> Any:
    """Returns a program for transforms of n positions of images of a dtype."""
    plan = cuda.plan_for(torch.empty(1, 1, 1, n), guard=0, reach=0)
    precision = "ieee" if target.backend == "hip" else "tf32x3" if dtype == "fp32" else "tf32"
    function = getattr(triton_kernels, name)
    constants = {"N1": plan.n1, "N2": plan.n2, "CB": plan.channels, "PRECISION": precision, **FLAGS}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    types = {
        **FLOAT32,
        **dict.fromkeys(("x", "y", "grad", "grad_x"), f"*{dtype}"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {key: types.get(key, "i32") for key in function.arg_names}
    options = {"num_warps": 8, "num_stages": 1}
    return triton.compile(ASTSource(function, signature, constants), target=target, options=options)


def assembled(program: Any, target: GPUTarget) -> tuple[str, str]:
    """Returns the registers of a thread, and how many of their bytes do not fit."""
    if target.backend != "cuda":
        return "", ""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        Path(file.name).write_text(program.asm["ptx"])
        command: list[Any] = [ASSEMBLER, "-v", "--gpu-name", f"sm_{target.arch}a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r"Used (\d+) registers", said)[0], re.findall(r"(\d+) bytes spill stores", said)[0]


if __name__ == "__main__":
    main()
