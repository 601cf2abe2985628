#!/usr/bin/env bash
# Installs the test extra and runs the suite. Arguments go to pytest. TORCH=1 adds transformers'
# torch models (Python 3.11, CPU build), against which the parity tests then run. TPU=1 adds the
# compiler for TPUs, for which the engine is then compiled. INSTALL=only ends before the tests,
# INSTALL=no takes what is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh
version=$("$(find_python)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "${INSTALL:-yes}" = no ]; then
  PY=.venv-test-$version/bin/python
else
  extras='test'
  [ "${TPU:-0}" = 1 ] && extras=test,tpu
  make_venv ".venv-test-$version" "[$extras]"
  if [ "${TORCH:-0}" = 1 ] && [ "$version" = 3.11 ]; then
    install "torch==2.13.0" accelerate sentencepiece
  fi
  [ "${INSTALL:-yes}" = only ] && exit
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
"$PY" -m ruff check .
"$PY" -m ruff format --check .
workers=$("$PY" -c 'import os; print(min(max(os.cpu_count() or 2, 2), 8))')
# loadfile: a file's fixtures are made once; in the order of tests/conftest.py. With a restart, pytest
# waits for ever for the tests of a worker that crashed.
"$PY" -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
