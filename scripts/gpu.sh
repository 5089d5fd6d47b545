#!/usr/bin/env bash
# What a GPU says, in at most nine minutes: tests, training and deployed speed beside ConvNeXt, a profiled step.
#
#   scripts/gpu.sh gpu            results as text, CSV and JSON in the folder gpu; runs the `python` on the path
#   DEVICE=cpu scripts/gpu.sh x   the same with tiny models, to try the script where there is no GPU
#   PARTS="tests profile" …       some parts
#
# Installs nothing from elsewhere: if there is a folder wheels/, what the machine lacks is taken from it. A part that
# fails or takes too long leaves the others their time; the exit status is the number of these.
set -uo pipefail
output=${1:?usage: scripts/gpu.sh FOLDER}
device=${DEVICE:-cuda}
cd "$(dirname "$0")/.."
mkdir -p "$output"
failed=0
patience=1

if [ -d wheels ]; then
    python -m pip install --quiet --no-index --no-deps wheels/*.whl
fi

# part NAME SECONDS COMMAND …: runs a command whose output goes into a file, for no longer than that on a GPU
part() {
    local name=$1 seconds=$2 started=$SECONDS
    shift 2
    [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
    timeout "$((patience * seconds))" "$@" >"$output/$name.txt" 2>&1
    local status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    echo "$name: $((SECONDS - started)) s, exit status $status"
    tail -n 12 "$output/$name.txt"
}

if [ "$device" = cuda ]; then
    ours=mrconvnext_tiny convnext=convnext_tiny more=(mrconvnext_tiny:branch_norm=batch)
    train=(--batch-sizes 128 --rounds 2) deployed=(--batch-sizes 1 128) step=(--batch-size 128)
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$output/card.txt"
else
    patience=5 # of a CPU that is busy with other things
    tiny='depths=(1,1,1,1):dims=(8,8,8,8)'
    ours=mrconvnext_atto:$tiny convnext=convnext_atto:$tiny more=()
    sizes=(--img-sizes 32 --rounds 1)
    train=(--batch-sizes 2 --steps 1 "${sizes[@]}") deployed=(--batch-sizes 2 "${sizes[@]}")
    step=(--batch-size 2 --img-size 32 --model mrconvnext_atto)
fi
models=(--models "$ours" "$convnext" "${more[@]}" --reference "$convnext")
half=(--amp-dtype bfloat16 --channels-last)
speed=(python benchmark_throughput.py --device "$device")

part tests 100 python -m pytest -q tests/test_cuda.py tests/test_timm_contract.py -k "cuda and not compile"
part profile 60 python scripts/profile_step.py --device "$device" --output "$output/profile" "${half[@]}" "${step[@]}"
part training-bf16 100 "${speed[@]}" --output "$output/training-bf16" --train "${half[@]}" "${train[@]}" "${models[@]}"
part deployed-bf16 50 "${speed[@]}" --output "$output/deployed-bf16" "${half[@]}" "${deployed[@]}" "${models[@]}"
part training-bf16-compiled 100 "${speed[@]}" --output "$output/training-bf16-compiled" --train --compile "${half[@]}" "${train[@]}" --rounds 1 "${models[@]}"
part deployed-bf16-compiled 50 "${speed[@]}" --output "$output/deployed-bf16-compiled" --compile "${half[@]}" "${deployed[@]}" "${models[@]}"
part training-fp32 50 "${speed[@]}" --output "$output/training-fp32" --train --channels-last "${train[@]}" "${models[@]}"
part deployed-fp32 30 "${speed[@]}" --output "$output/deployed-fp32" --channels-last "${deployed[@]}" "${models[@]}"
exit $failed
