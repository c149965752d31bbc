#!/usr/bin/env bash
# What only a machine with a GPU can show, in about seven minutes on an H200: the tests that need
# one, DynamiCrafter at full size in bf16, a processor that computes in bf16, and what VBench's
# networks cost.
#
#     bash benchmarks/gpu.sh FOLDER [PYTHON]
#
# FOLDER gets a log of each part, and the rows as JSON as they come; a part that takes too long is
# stopped, and what it had is kept.
set -u
folder=${1:?usage: bash benchmarks/gpu.sh FOLDER [PYTHON]}
python=${2:-python}
benchmarks=$(dirname "$0")
mkdir -p "$folder" || exit 1

part() {  # name, seconds, command
    local name=$1 limit=$2 status
    shift 2
    timeout "$limit" "$@" >"$folder/$name.log" 2>&1
    status=$?
    echo "$name: exit status $status"
    tail -n 12 "$folder/$name.log"
}

part tests 150 "$python" -m pytest -q -p no:cacheprovider \
    "$benchmarks/../tests/sampling/test_cuda.py"
part full_size 240 "$python" "$benchmarks/sampling.py" --size full --device cuda --steps 16 --rounds 1 \
    --only bf16 --output "$folder/full_size.json"
part processor 180 "$python" "$benchmarks/sampling.py" --rounds 1 --only bf16 \
    --output "$folder/processor.json"
part vbench 120 "$python" "$benchmarks/vbench.py" --device cuda --output "$folder/vbench.json"
