#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes: build for this GPU, test, sanitize, benchmark.
#
#   benchmarks/gpu.sh [--dry-run] [FOLDER]
#
# FOLDER, by default benchmarks/results/gpu, gets at most 10 files:
#   stages.txt                result and seconds of each stage, and a sum over the sources it was run on
#   log.txt                   what every stage printed, one test a line
#   machine.json              GPU, driver, torch, triton, and how the native library was built, or why there is none
#   tests.xml, sanitizer.xml  tests/gpu; compute-sanitizer's three tools side by side over small cases
#   ops-cuda.csv              vitok bench ops, a row a provider, on disk as soon as it is measured
#   model-, peers-, scale-, packed-cuda.csv  the same of whole models
#
# No network: it builds with the compilers and Python packages that are there, into build/gpu only. The build is for the GPU that
# is there and fails without its CUDA kernels; the other stages then run with Python and Triton alone, and the exit code is 1.
# Rows name the commit by git or, in a tree without it, by the file COMMIT in its root.
# A stage may take what is left of the time but for what the stages after it need; the benchmarks get all that is left. A stage
# that is out of time is interrupted, so that its report is written, and killed 10 s later.
# Run it again after an interruption: a stage that is done on the same sources is not run again, and benchmarks go on with the rows
# that are missing. Exits with 0 when all stages are done, with 2 when it cannot start.
# PYTHON chooses the interpreter, BUDGET the seconds in all, STAGES some of "build tests sanitizer bench models". --dry-run goes through all
# stages and prints their commands instead of running them; it needs no GPU and leaves no files.
set -uo pipefail

dry=""
[ "${1:-}" != --dry-run ] || { dry=yes; shift; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: ${PYTHON:-python3} was not found" >&2; exit 2; }
deadline=$(($(date +%s) + ${BUDGET:-520}))
out=${1:-$root/benchmarks/results/gpu}
work=$root/build/gpu
[ -z "$dry" ] || { work=$(mktemp -d) && out=$work/out; }
mkdir -p "$out" "$work" && out=$(cd "$out" && pwd) || exit 2
site=$work/site
touch "$out/stages.txt"
exec > >(tee -a "$out/log.txt") 2>&1
log=$!
trap 'exec >&- 2>&-; wait $log; [ -z "$dry" ] || rm -rf "$work"' EXIT

export PYTHONPATH=$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton} CUBLAS_WORKSPACE_CONFIG=:4096:8
export PATH=$PATH:/usr/local/cuda/bin  # nvcc and compute-sanitizer, where they are not on it
unset TRITON_INTERPRET VITOK_IMPL VITOK_NATIVE
cd "$work"  # not the root, whose folders would stand in for the installed package

# pytest as it is configured in the repository, in parallel where pytest-xdist is there: Triton's compilations take the time.
has() { "$python" -c "import $1" 2> /dev/null; }
parallel=""
has xdist && parallel="-n $(n=$(env -u OMP_NUM_THREADS nproc); echo $((n < 12 ? n : 12)))"
vitok=("$python" -c "from vitok.cli import main; main()")
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -v -rs)

# What is planned, in the dry run; else what is done.
act() {
    [ -n "$dry" ] || { "$@"; return; }
    printf '   '; printf ' %q' "$@"; echo
}

# sources_of NAME: a sum over what the stage NAME depends on. Whether there is a native library counts from the tests on.
sources_of() {
    local files=(csrc kernels vitok setup.py CMakeLists.txt pyproject.toml)
    case $1 in
        tests | sanitizer) files+=(tests "$work/built") ;;
        bench | models) files+=("$work/built") ;;
    esac
    (cd "$root" && { echo "$arch"; find "${files[@]}" -type f ! -name "*.pyc" ! -name "_C.*" ! -name _build.json -print0 2> /dev/null \
        | LC_ALL=C sort -z | xargs -0 sha256sum; } | sha256sum | cut -c 1-16)
}

# The package with its CUDA kernels, or nothing.
build() {
    local mark missing=""
    mark=$(sources_of build)
    [ "$(cat "$work/built" 2> /dev/null)" != "$mark" ] || { echo "the package in build/gpu is up to date"; return; }
    rm -rf "$site" "$work/built"
    for package in setuptools pybind11; do has $package || missing="$missing $package"; done
    for tool in nvcc cmake ninja; do command -v $tool > /dev/null || has $tool || missing="$missing $tool"; done
    [ -z "$missing" ] || echo "gpu.sh: missing for the build:$missing"
    [ -z "$missing" ] || [ -n "$dry" ] || return 1
    act env VITOK_CUDA=on VITOK_CUDA_ARCHS="$arch" \
        "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --target "$site" "$root" || return 1
    act "$python" -c 'from vitok import _native
assert _native.library(), _native.reason()
assert _native.library().cuda_archs(), "the library holds no CUDA kernels"' || return 1
    echo "$mark" > "$work/built"
}

# What the other stages use when there is no such package.
python_alone() {
    echo "gpu.sh: NO NATIVE KERNELS; going on with Python and Triton alone, so that no native kernel is tested or timed"
    rm -rf "$site" && mkdir -p "$site"
    cp -rL "$root/vitok" "$site/vitok" && rm -rf "$site"/vitok/_C.* "$site"/vitok/_build.json "$site/vitok/kernels"
    cp -r "$root/kernels" "$site/vitok/kernels"
}

tests() { act "${pytest[@]}" $parallel --junitxml "$out/tests.xml" --deselect tests/gpu/test_sanitizer.py "$root/tests/gpu"; }

sanitizer() { act "${pytest[@]}" --junitxml "$out/sanitizer.xml" "$root/tests/gpu/test_sanitizer.py"; }

# In bfloat16 first: it is what people use, and the time may run out. 75 asks for another process: a kernel broke that one.
bench() {
    local code failed=0
    for dtype in bfloat16 float32; do
        while :; do
            act "${vitok[@]}" bench ops --dtype "$dtype" --seconds 0.1 --out "$out" --resume
            code=$?
            [ "$code" = 75 ] || break
        done
        [ "$code" = 0 ] || failed=$code
    done
    return "$failed"
}

# Whole models. Each command writes its rows as they come, so that the next run goes on with what is missing.
models() {
    local failed=0
    local photos=(--photos "$root/examples/photos")
    local quick="reference,vitok,vitok fast bf16,vitok fast int8,vitok fast fp8,linear layers alone"
    for suite in packed peers "scale --limit 5"; do
        act "${vitok[@]}" bench $suite --device cuda --out "$out" --resume || failed=$?
    done
    act "${vitok[@]}" bench model S-B/16 --batch 1,8,256 --what encode,decode,both,train --providers "$quick" "${photos[@]}" \
        --device cuda --out "$out" --resume || failed=$?
    act "${vitok[@]}" bench model S-L/16 --batch 64 --what both --providers "$quick" "${photos[@]}" \
        --device cuda --out "$out" --resume || failed=$?
    act "${vitok[@]}" bench model S-B/16 --batch 1,256 --what both --providers "$quick,compile,compile max-autotune" "${photos[@]}" \
        --device cuda --out "$out" --resume || failed=$?
    return "$failed"
}

selected() { [[ " ${STAGES:-build tests sanitizer bench models} " == *" $1 "* ]]; }

# The seconds that the stages before leave to each at least; together well under the budget, so that the build has some too.
declare -A least=([build]=0 [tests]=110 [sanitizer]=60 [bench]=110 [models]=110)

# The files of rows that a stage writes; JSON and pictures beside them say the same and are not kept.
declare -A rows=([bench]=ops [models]="model peers scale packed")

# note NAME TEXT: the line of the stage in stages.txt.
note() {
    grep -v "^$1 " "$out/stages.txt" > "$work/stages.txt"
    echo "$1 $2" >> "$work/stages.txt"
    cp "$work/stages.txt" "$out/stages.txt"
}

# counts REPORT: how many tests failed, were skipped and are there, from a report of pytest.
counts() {
    local numbers='errors="[0-9]*" failures="[0-9]*" skipped="[0-9]*" tests="[0-9]*"'
    sed -n "s/.*<testsuite [^>]*\($numbers\).*/, \1/p" "$1" 2> /dev/null | tr -d '"'
}

# stage NAME LATER...: run the function NAME in a shell of its own, and end it in time for the stages LATER.
stage() {
    local name=$1 mark start limit code result=done
    shift
    selected "$name" || return 0
    mark=$(sources_of "$name")
    if [ "$name" != build ] && grep -q "^$name done.*, sources $mark\$" "$out/stages.txt"; then
        echo "== $name: done before"
        return 0
    fi
    for file in ${rows[$name]:-}; do
        if [ -e "$out/$file-cuda.csv" ] && ! grep -q "^$name .*, sources $mark\$" "$out/stages.txt"; then
            echo "the rows of other sources go to $work/$file-cuda.csv"
            mv "$out/$file-cuda.csv" "$work/$file-cuda.csv"
        fi
    done
    start=$(date +%s) limit=$((deadline - $(date +%s)))
    for later in "$@"; do
        selected "$later" && limit=$((limit - least[$later]))
    done
    if [ "$limit" -lt 15 ]; then
        echo "== $name: not started, the time is up; run benchmarks/gpu.sh again"
        failed="$failed $name"
        return 0
    fi
    note "$name" "started, sources $mark"
    rm -f "$out/$name.xml"
    echo "== $name, at most $limit s"
    VITOK_STAGE_SECONDS=$limit timeout -s INT -k 10 "$limit" env --default-signal=INT bash -c \
        "$(declare -f); $(declare -p python vitok pytest parallel root out work site arch dry); trap 'exit 130' INT; $name"
    code=$?
    [ "$code" = 0 ] || { result="failed with exit code $code"; failed="$failed $name"; }
    [ "$code" != 124 ] && [ "$code" != 137 ] || result="out of time"
    for file in ${rows[$name]:-}; do rm -f "$out/$file-cuda.json" "$out/$file-cuda.png"; done
    [ ! -e "$out/$name.xml" ] || sed -i 's/ hostname="[^"]*"//' "$out/$name.xml"
    result="$result after $(($(date +%s) - start)) s$(counts "$out/$name.xml")"
    note "$name" "$result, sources $mark"
    echo "== $name: $result"
}

if [ -n "$dry" ]; then
    arch=90a
else
    arch=$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print("90a" if (major, minor) == (9, 0) else 10 * major + minor)') || { echo "gpu.sh: torch sees no CUDA device"; exit 2; }
fi
failed=""
stage build tests sanitizer bench models
if selected build; then
    [ -e "$work/built" ] || python_alone
    act timeout 60 "$python" -m vitok.bench.machine "$out/machine.json" || failed="$failed machine.json"
fi
stage tests sanitizer bench models
stage sanitizer bench models
stage bench models
stage models
cat "$out/stages.txt"
[ -e "$work/built" ] || echo "gpu.sh: no native CUDA kernel was built, tested or timed"
[ -z "$failed" ] || { echo "gpu.sh: not done:$failed"; exit 1; }
