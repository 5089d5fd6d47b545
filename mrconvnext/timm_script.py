"""Runs one of timm's scripts with MRConvNeXt's models registered, which timm has no other way to learn of.

python -m mrconvnext.timm_script path/to/validate.py --model mrconvnext_tiny …
torchrun --nproc-per-node 2 -m mrconvnext.timm_script path/to/train.py …
"""

import runpy
import sys
from pathlib import Path

from . import mrconvnext  # noqa: F401 (registers the models)


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = f"{sys.argv[1]} is not a file" if len(sys.argv) > 1 else "no script given"
        sys.exit(f"{given}; usage: python -m mrconvnext.timm_script SCRIPT [ARGUMENTS]")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if Python had been given the script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
