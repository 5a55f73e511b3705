#!/usr/bin/env bash
# Lint, types, layers, unit tests: before every commit, with the environment that is there (PYTHON=path to choose one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python; fi
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -q tests/test_layers.py tests/test_docs.py tests/unit "$@"
