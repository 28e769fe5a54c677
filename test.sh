#!/usr/bin/env bash
# Install what is needed into .venv and run the linter and all tests: ./test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
install tests "pytest>=8,<10" "ruff>=0.6,<1"
ruff check .
exec python -m pytest "$@"
