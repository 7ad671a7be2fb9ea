#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest.    ./run_tests.sh [tests/megatron_jobs/test_order.py …]
set -euo pipefail
cd "$(dirname "$0")"
./install.sh
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
