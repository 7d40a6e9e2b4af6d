#!/usr/bin/env bash
# Sets up .venv and runs every check: style, types, import contracts, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ruff check .
ruff format --check .
mypy
lint-imports
exec python -m pytest "$@"
