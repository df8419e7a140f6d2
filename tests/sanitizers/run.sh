#!/usr/bin/env bash
# Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer into a temporary directory, beside the
# in-place build, and run the tests marked `sanitize` (forward, backward, tails, in place, bad input) on it, for every
# instruction set of this machine. Arguments go to pytest. PYTHON names the interpreter, .venv/bin/python by default.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
python=${PYTHON:-$root/.venv/bin/python}
compiler=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

library() {
  local path
  path=$("$compiler" -print-file-name="$1")
  [[ -f $path ]] || { echo "$compiler has no $1; install the sanitizer runtimes of that compiler" >&2; exit 2; }
  readlink -f "$path"
}
# libstdc++ goes along, so that the sanitizer finds the real __cxa_throw before torch is loaded.
preload="$(library libasan.so):$(library libubsan.so):$(library libstdc++.so.6)"

mkdir "$work/tree"
cp -rL metakern csrc tests bench setup.py pyproject.toml README.md LICENSE "$work/tree"
rm -f "$work"/tree/metakern/*.so
cd "$work/tree"
METAKERN_CUDA=0 METAKERN_SANITIZE=address,undefined "$python" setup.py -q build_ext --build-lib "$work/lib"
cp "$work"/lib/metakern/*.so metakern/

# verify_asan_link_order: the interpreter itself is not instrumented. detect_leaks: Python never frees all it has.
run=(env "PYTHONPATH=$work/tree" TRITON_INTERPRET=0 METAKERN_BACKEND= METAKERN_CPU_CAPABILITY= PYTHONDONTWRITEBYTECODE=1
  "LD_PRELOAD=$preload"
  "ASAN_OPTIONS=detect_leaks=0,verify_asan_link_order=0,allocator_may_return_null=1,detect_stack_use_after_return=1"
  "UBSAN_OPTIONS=halt_on_error=1,print_stacktrace=1" "$python")
"${run[@]}" - "$work/tree" <<'CHECK'
import sys

from metakern import _C

assert _C.__file__.startswith(sys.argv[1]), f"the tests would run on another build: {_C.__file__}"
assert "libasan" in open("/proc/self/maps").read(), "AddressSanitizer is not loaded"
CHECK
# --capture=sys leaves file descriptor 2 alone: the sanitizers' report must not end in pytest's buffers.
"${run[@]}" -m pytest -q -p no:cacheprovider --capture=sys -m sanitize tests/ops tests/conformance/ops "$@" || {
  echo "The sanitized tests failed; a report of a sanitizer, if there is one, stands above." >&2
  exit 1
}
echo "No error found by AddressSanitizer and UBSan."
