#!/bin/bash
# Tests and measures sgl-kernel-dcp on one Hopper GPU; logs and kernels.json go to OUT_DIR. Needs apache-tvm-ffi, pytest, torch, nvcc.
# usage: test/gpu/kernels.sh OUT_DIR [tests|rounds|processes|attention|sanitize|measure]...   (default: all but sanitize)
# attention and measure also need FlashInfer and FlashMLA (sgl-flash-mla); MEASURE_FLAGS=--without-attention does without.
set -u
out=$(mkdir -p "$1" && cd "$1" && pwd); shift
cd "$(dirname "$0")/../.."
export CUDA_DEVICE_MAX_CONNECTIONS=32 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$PWD/python:$PWD/sgl-kernel-dcp/python${PYTHONPATH:+:$PYTHONPATH}"
tests=sgl-kernel-dcp/tests
check() { local name=$1 limit=$2; shift 2; echo "== $name"; timeout "$limit" "$@" > "$out/$name.log" 2>&1; echo "rc $?"; tail -n "${TAIL:-25}" "$out/$name.log"; }
for part in "${@:-tests rounds processes attention measure}"; do for step in $part; do
  case $step in
    tests) check tests 300 python3 -m pytest -q -p no:cacheprovider --durations=5 $tests -k "not ten_thousand and not processes" ;;
    rounds) check rounds 200 python3 -m pytest -q -p no:cacheprovider $tests/test_exchange_gpu.py -k ten_thousand ;;
    processes) check processes 300 python3 -m pytest -q -p no:cacheprovider $tests/test_processes_gpu.py ;;
    attention) check attention 200 python3 -m pytest -q -p no:cacheprovider test/gpu/test_kernels_attention.py ;;
    sanitize)
      small="$tests/test_exchange_gpu.py $tests/test_merge_gpu.py $tests/test_tables_gpu.py"
      for tool in memcheck racecheck; do
        TAIL=6 check "sanitize_$tool" 240 compute-sanitizer --tool $tool --error-exitcode 9 python3 -m pytest -q -x -p no:cacheprovider $small \
          -k "apart or look_like or (share_a_launch and (short_pieces or alone)) or (merge_equals and 5-3-40-128) or nothing_to_merge or (tables_equal and shape1 and mixed)"
      done ;;
    measure) TAIL=60 check measure 280 python3 -m benchmark.kernels.run --output "$out/kernels.json" ${MEASURE_FLAGS:-} ;;
  esac
done; done
