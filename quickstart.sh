#!/usr/bin/env bash
# Raw text to a Hugging Face mixture of experts on this machine's CPU, in about a quarter of an hour. Call it again to go on or to reuse.
set -euo pipefail
cd "$(dirname "$0")"
./install.sh
exec .venv/bin/python examples/quickstart/run.py
