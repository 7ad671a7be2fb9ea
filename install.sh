#!/usr/bin/env bash
# Makes .venv with Mujina and its pinned dependencies in it; does nothing when that is done. Called by quickstart.sh and run_tests.sh.
set -euo pipefail
cd "$(dirname "$0")"

is_fit() { "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
    local candidate pyenv_root
    pyenv_root=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")
    for candidate in python3.12 python3.13 python3 "$pyenv_root"/versions/3.1[23]*/bin/python; do
        if is_fit "$candidate"; then command -v "$candidate"; return; fi
    done
    if command -v uv >/dev/null; then
        uv python find '>=3.12,<3.14' 2>/dev/null && return
        echo "install.sh: no Python 3.12 here; uv downloads one" >&2
        uv python install -q 3.12 >&2 && uv python find 3.12 && return
    fi
    echo "install.sh: Mujina needs Python 3.12 or 3.13: install it (Ubuntu 24.04: apt-get install python3.12-venv; elsewhere: https://docs.astral.sh/uv, then uv python install 3.12) and call this again" >&2
    return 1
}

state=$(cat setup.py constraints.txt | sha256sum | cut -d ' ' -f 1)
if [[ $(cat .venv/installed 2>/dev/null) == "$state" ]]; then exit 0; fi
python=$(find_python)
echo "install.sh: making .venv with $("$python" --version) (about 5 GB, most of it PyTorch with CUDA)"
rm -rf .venv
if ! "$python" -m venv .venv 2>/dev/null; then  # Debian keeps ensurepip in a package of its own
    rm -rf .venv
    uv venv -q --seed -p "$python" .venv || { echo "install.sh: $python cannot make environments: install its venv package (such as python3.12-venv) or uv" >&2; exit 1; }
fi
.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
# uv is fast; pip is the way where only pip knows how to reach the package index
# --compile-bytecode, as pip does: without it every process compiles megatron-core anew where Python may not write beside it
.venv/bin/uv pip install -q --compile-bytecode -p .venv/bin/python -c constraints.txt -e '.[data,docs,ray,test,wandb]' ||
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[data,docs,ray,test,wandb]'
echo "$state" > .venv/installed
