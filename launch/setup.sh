#!/usr/bin/env bash
# Makes .venv beside this repository's code and installs the tested set of packages into it. Quick when it is there.
# Sourced by demo.sh and test.sh; PYTHON says which interpreter to use (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "error: $PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 or newer is needed: PYTHON=python3.12 bash $0" >&2; exit 2; }
stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat .venv/restill-installed 2>/dev/null)" != "$stamp" ]; then
  echo "Installing into .venv (torch's CUDA build runs on the CPU too; 6 GB, once)"
  "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
  .venv/bin/python -c 'import cv2' 2>/dev/null || { .venv/bin/python -m launch.doctor; exit 2; }  # no libGL, say
  echo "$stamp" > .venv/restill-installed
fi
export PATH="$PWD/.venv/bin:$PATH"
