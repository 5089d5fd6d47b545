#!/usr/bin/env bash
# Runs the tests of the compiled engine with AddressSanitizer and UndefinedBehaviorSanitizer in it, on a copy of the
# package:
#
#     scripts/sanitize.sh .venv/bin/python
set -euo pipefail
python=$(realpath -s "${1:?the Python to run the tests with}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cd "$(dirname "$0")/.."
cp -r mrconvnext tests pyproject.toml "$copy"
flags="-std=c++17 -O1 -g -fPIC -shared -fno-rtti -fvisibility=hidden -Wno-psabi"
g++ $flags -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    -o "$copy/mrconvnext/engines/_native.so" mrconvnext/engines/native/cpu.cpp
cd "$copy"
# Python itself, and what PyTorch keeps for good, are not what is looked at.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    PYTHONPATH="$copy" "$python" -m pytest -q -p no:cacheprovider tests/test_native.py tests/test_block.py
