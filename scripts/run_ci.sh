#!/usr/bin/env bash
# Full validation: lint, tests, smoke test, goldens, benchmarks.
#   scripts/run_ci.sh            everything
#   scripts/run_ci.sh --quick    lint, the fast tests and the smoke test
#   scripts/run_ci.sh --tests    lint, all tests, the smoke test and the goldens
#   scripts/run_ci.sh --bench    only the benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:---all}
case $mode in
  --all | --quick | --tests | --bench) ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
make setup
python=.venv/bin/python

step() { printf '\n=== %s ===\n' "$*"; "$@"; }

goldens_are_current() {
  "$python" scripts/baseline_sft_smoke.py --save-golden >/dev/null
  git diff --exit-code -- tests/golden
}

# An extra of 30 packages, without which these tests are skipped: beside .venv, not in it.
reasoning_gym_is_an_environment() {
  local extra
  extra=$(mktemp -d)
  "$python" -m pip install --quiet -c constraints.txt --target "$extra" reasoning-gym
  PYTHONPATH=$extra "$python" -m pytest -q -k reasoning_gym \
    tests/unit/rlvr/test_environments.py tests/e2e/test_rlvr_quickstart.py
  rm -r "$extra"
}

if [ "$mode" != --bench ]; then
  step make lint
  step make test
  step "$python" scripts/baseline_sft_smoke.py
fi
if [ "$mode" = --tests ] || [ "$mode" = --all ]; then
  step make test-slow
  step reasoning_gym_is_an_environment
  step "$python" scripts/baseline_sft_smoke.py --backend torch
  step goldens_are_current
fi
if [ "$mode" = --bench ] || [ "$mode" = --all ]; then
  if [ -f scripts/bench_service.py ]; then
    step "$python" scripts/bench_service.py
  elif [ "$mode" = --bench ]; then
    echo "scripts/bench_service.py is not there" >&2
    exit 1
  fi
fi
printf '\nrun_ci: %s passed\n' "${mode#--}"
