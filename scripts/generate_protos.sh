#!/usr/bin/env bash
# Generates the Python stubs, with types, from protos/ into protos/gen.
#   scripts/generate_protos.sh            writes them
#   scripts/generate_protos.sh --check    fails if the committed ones are stale
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=protos/gen
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
mkdir -p "$out"
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc \
  -I protos -I protos/third_party \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
  protos/tensafe/v1/*.proto
"$python" -m grpc_tools.protoc -I protos/third_party --python_out="$out" \
  protos/third_party/buf/validate/validate.proto
rm -f "$out"/tensafe/v1/{types,errors,losses}_pb2_grpc.py*
: >"$out/tensafe/v1/__init__.py"
: >"$out/tensafe/v1/py.typed"
if [ "$out" != protos/gen ]; then
  diff -r -x __pycache__ protos/gen "$out" >/dev/null || {
    echo "The stubs in protos/gen are stale: run 'make protos' and commit the result." >&2
    exit 1
  }
fi
