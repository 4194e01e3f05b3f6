#!/usr/bin/env bash
# Install what is missing and run the checks: lint, types, tests.
# usage: tests/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash recipes/setup.sh libero video dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# One process per core with one thread each: the tests are too small to gain from a second thread.
processes=$(nproc) # before the next line, which it would obey
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n "$processes" --dist worksteal "$@"
