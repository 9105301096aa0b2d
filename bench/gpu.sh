#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go: build, test, check for races, measure.
#
#   bench/gpu.sh [FOLDER]
#
# FOLDER (default: bench/results) receives what is measured as JSON, the tables as gpu.txt, and the log of each step.
# The virtual environment is .venv-gpu, or what FASTCAM_GPU_VENV names. Exit status: 0 all right, 1 a step failed (the
# others still run), 2 this machine lacks what is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

results=$PWD/bench/results
out=${1:-$results}
venv=${FASTCAM_GPU_VENV:-.venv-gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

lack() {
  printf 'bench/gpu.sh: %s\n' "$1" >&2
  exit 2
}

# run NAME COMMAND...: the output goes to the terminal and to NAME.log; a failure is noted.
run() {
  local name=$1
  shift
  step "$name: $*"
  if ! "$@" 2>&1 | tee "$out/$name.log"; then
    failed+=("$name")
    printf '** %s failed\n' "$name"
  fi
}

command -v nvidia-smi >/dev/null || lack "no nvidia-smi: this machine has no NVIDIA driver"
nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv | tee "$out/device.csv" ||
  lack "nvidia-smi finds no device"
command -v nvcc >/dev/null || lack "no nvcc: install the CUDA toolkit, or put its bin folder into PATH"
command -v c++ >/dev/null || lack "no C++ compiler: install g++"
python3 -c 'import venv, ensurepip' 2>/dev/null || lack "no Python with venv: install python3-venv"

step "build"
[[ -x $venv/bin/python ]] || python3 -m venv "$venv"
# This machine's architecture only: the build is then several times as fast.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | head -n 1 | tr -d '. ')
"$venv/bin/pip" install --quiet --config-settings=cmake.define.FASTCAM_CUDA=ON \
  --config-settings=cmake.define.FASTCAM_CUDA_ARCHITECTURES="$capability" -e ".[test,gpu,peers]" torchvision
# The tests ask for onnxruntime, whose files are in the place of onnxruntime-gpu's.
"$venv/bin/pip" uninstall --quiet --yes onnxruntime
"$venv/bin/pip" install --quiet --force-reinstall --no-deps onnxruntime-gpu
python=$venv/bin/python

run tests "$python" -m pytest -q -m gpu

# Few cases are enough for the tools: they follow every access to memory, and take a hundred times as long.
cases=(-q -p no:cacheprovider -x -m gpu tests/kernels/test_cuda_kernels.py -k "not nvrtc and (batch or bfloat16 or prepare or rows)")
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=cam_ \
      "$python" -m pytest "${cases[@]}"
  done
else
  printf 'no compute-sanitizer: memory accesses and races were not checked\n' | tee "$out/memcheck.log"
  failed+=(compute-sanitizer)
fi

run gpu_kernel "$python" -m bench.gpu_kernel
if [[ -f bench/gpu.py ]]; then
  run gpu "$python" -m bench.gpu
fi

step "results in $out"
if [[ $out != "$results" ]]; then
  for name in gpu_kernel gpu; do
    if [[ -f $results/$name.json ]]; then cp "$results/$name.json" "$out"; fi
  done
fi
cat "$out"/device.csv "$out"/gpu_kernel.log "$out"/gpu.log 2>/dev/null | tee "$out/gpu.txt" || true
if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[*]}"
  exit 1
fi
echo "all steps passed"
