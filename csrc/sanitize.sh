#!/usr/bin/env bash
# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: build them in a folder of their own, put them into a
# copy of the package and fuzz it. Exits with 0 when nothing is reported. Needs GCC, CMake, Ninja, pybind11 and torch.
#
#   csrc/sanitize.sh [arguments of tests/native_fuzz.py, for example --seconds 60 --seed 7]
#
# PYTHON chooses the interpreter, VITOK_SANITIZE_BUILD the build folder, which is kept so that a second run compiles less.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
[ "${python#/}" != "$python" ] || python=$PWD/$python  # it is called from another folder
build=${VITOK_SANITIZE_BUILD:-$root/build/sanitize}
cxx=${CXX:-g++}

# The build tools of the interpreter's environment come before the system's.
export PATH="$(dirname "$python"):$PATH"
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER="$cxx" -DVITOK_SANITIZE=ON \
    -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > /dev/null
cmake --build "$build" ${MAX_JOBS:+--parallel "$MAX_JOBS"}

package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/vitok"
(cd "$root/vitok" && tar --exclude=__pycache__ --exclude='_C.*' --exclude=weights --exclude=./kernels -cf - .) | tar -xf - -C "$package/vitok"
cp -r "$root/kernels" "$package/vitok/kernels"
cp "$build"/module/_C.* "$package/vitok/"

# The sanitizers' runtime has to be the first library of the process, and libstdc++ there before it looks for __cxx_throw.
# Python itself leaks by design; what a kernel could leak is memory that it allocates, and kernels allocate none.
cd "$package"
export PYTHONPATH=$package PYTHONDONTWRITEBYTECODE=1 VITOK_NATIVE=auto
export ASAN_OPTIONS=detect_leaks=0:exitcode=99:allocator_may_return_null=1:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
preload="$("$cxx" -print-file-name=libasan.so):$("$cxx" -print-file-name=libubsan.so):$("$cxx" -print-file-name=libstdc++.so)"
code=0
LD_PRELOAD=$preload timeout 600 "$python" "$root/tests/native_fuzz.py" "$@" || code=$?
[ "$code" = 0 ] || { echo "sanitize: exit code $code; the last calls were"; tail -n 3 fuzz.log; } >&2
exit "$code"
