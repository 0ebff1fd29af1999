#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: build for this GPU, test, sanitize, benchmark.
#
#   benchmarks/gpu.sh [FOLDER]        FOLDER, by default benchmarks/results/gpu, gets at most 8 files:
#       stages.txt        stage, result and seconds; a stage that is "done" there is not run again
#       log.txt           what every stage printed
#       machine.json      GPU, driver, torch, triton, and how the native library was built
#       tests.xml         tests/gpu; sanitizer.xml: compute-sanitizer over small cases
#       ops-cuda.csv, ops.json: timings of benchmarks/ops, of every provider and of what pytest-benchmark keeps
#
# No network: it builds with the compilers and Python packages that are there, installs into build/gpu only, and says what is
# missing. Run it again after an interruption and it goes on with the stage that was interrupted. Exits with 0 when all stages are done.
# PYTHON chooses the interpreter, BUDGET the seconds in all, STAGES some of "build tests sanitizer bench", BENCH the benchmarks' command.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-$root/benchmarks/results/gpu}"
out=$(cd "${1:-$root/benchmarks/results/gpu}" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: ${PYTHON:-python3} was not found" >&2; exit 2; }
work=$root/build/gpu
site=$work/site
deadline=$(($(date +%s) + ${BUDGET:-520}))
mkdir -p "$work"
touch "$out/stages.txt"
exec > >(tee -a "$out/log.txt") 2>&1

export PYTHONPATH=$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 VITOK_RESULTS=$out
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton} CUBLAS_WORKSPACE_CONFIG=:4096:8
unset TRITON_INTERPRET
cd "$work"  # not the root, whose folders would stand in for the installed package

# pytest as it is configured in the repository, in parallel where pytest-xdist is there: Triton's compilations take the time.
has() { "$python" -c "import $1" 2> /dev/null; }
parallel=""
has xdist && parallel="-n $(n=$(nproc); echo $((n < 8 ? n : 8)))"
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q -rs)

build() {
    local archs
    archs=$("$python" -c 'import torch; major, minor = torch.cuda.get_device_capability(); n = 10 * major + minor; print("90a" if n == 90 else n)') || return 1
    local sources
    sources=$(cd "$root" && { echo "$archs"; find csrc kernels vitok setup.py CMakeLists.txt pyproject.toml -type f ! -name "*.pyc" ! -name "_C.*" ! -name _build.json \
        | LC_ALL=C sort | xargs sha256sum; } | sha256sum)
    if [ "$(cat "$work/built" 2> /dev/null)" = "$sources" ]; then
        echo "the package in build/gpu is up to date"
    else
        rm -rf "$site" "$work/built"
        local missing=""
        for package in setuptools cmake ninja pybind11; do
            has "$package" || { [ "$package" != pybind11 ] && command -v "$package" > /dev/null; } || missing="$missing $package"
        done
        [ -z "$missing" ] || echo "gpu.sh: no native kernels: missing for the build:$missing"
        if [ -n "$missing" ] || ! VITOK_CUDA_ARCHS=$archs "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --target "$site" "$root"; then
            echo "gpu.sh: going on with the Python package alone; the tests of native kernels will be skipped"
            rm -rf "$site" && mkdir -p "$site"
            cp -rL "$root/vitok" "$site/vitok" && rm -rf "$site"/vitok/_C.* "$site"/vitok/_build.json "$site/vitok/kernels"
            cp -r "$root/kernels" "$site/vitok/kernels"
        fi
        echo "$sources" > "$work/built"
    fi
    "$python" - "$out/machine.json" << 'PYTHON'
import json, platform, subprocess, sys
import torch, triton
import vitok
from vitok import _native

query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
facts = {
    "gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
    "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
    "nvidia_smi": subprocess.run(query, capture_output=True, text=True).stdout.splitlines(),
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": triton.__version__, "vitok": vitok.__version__,
    "native": _native.reason() or "there", "build": _native.build_facts(),
}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file, indent=1)
print(json.dumps(facts, indent=1))
PYTHON
}

tests() { "${pytest[@]}" $parallel --junitxml "$out/tests.xml" --deselect tests/gpu/test_sanitizer.py "$root/tests/gpu"; }

sanitizer() { "${pytest[@]}" --junitxml "$out/sanitizer.xml" "$root/tests/gpu/test_sanitizer.py"; }

bench() {
    if [ -n "${BENCH:-}" ]; then
        bash -c "$BENCH"
    elif [ ! -d "$root/benchmarks/ops" ]; then
        echo "gpu.sh: benchmarks/ops is not there"
        return 1
    elif ! has pytest_benchmark; then
        echo "gpu.sh: no benchmarks: pytest-benchmark is not installed"
        return 1
    else
        "${pytest[@]}" --results "$out" --benchmark-json "$out/ops.json" "$root/benchmarks/ops"
    fi
}

# stage NAME SECONDS: run the function NAME in a shell of its own that is ended after so many seconds.
stage() {
    local name=$1 limit=$2 start left code
    [[ " ${STAGES:-build tests sanitizer bench} " == *" $name "* ]] || return 0
    if [ "$name" != build ] && grep -q "^$name done" "$out/stages.txt"; then
        echo "== $name: done before"
        return 0
    fi
    start=$(date +%s) left=$((deadline - $(date +%s)))
    if [ "$left" -lt 15 ]; then
        echo "== $name: not started, the time is up; run benchmarks/gpu.sh again"
        failed="$failed $name"
        return 0
    fi
    echo "== $name, at most $((limit < left ? limit : left)) s"
    timeout -k 5 "$((limit < left ? limit : left))" bash -c "$(declare -f has "$name"; declare -p python pytest parallel root out work site); $name"
    code=$?
    local result=done
    [ "$code" = 0 ] || { result="failed with exit code $code"; failed="$failed $name"; }
    [ "$code" != 124 ] || result="out of time"
    grep -v "^$name " "$out/stages.txt" > "$work/stages.txt"
    { cat "$work/stages.txt"; echo "$name $result $(($(date +%s) - start)) s"; } > "$out/stages.txt"
    echo "== $name: $result, $(($(date +%s) - start)) s"
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: torch sees no CUDA device"; exit 2; }
failed=""
stage build 170
stage tests 240
stage sanitizer 120
stage bench 300
cat "$out/stages.txt"
[ -z "$failed" ] || { echo "gpu.sh: not done:$failed"; exit 1; }
