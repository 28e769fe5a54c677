#!/usr/bin/env bash
# Install what is needed into .venv and run the linter and the tests: ./test.sh [--long] [pytest arguments]
# --long adds those that take minutes, half an hour in all: faults by the hundred, and random input.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh
install tests "pytest>=8,<10" "ruff>=0.6,<1" "hypothesis>=6.100,<7"
ruff check .
[ "${1:-}" = --long ] && set -- -m "" "${@:2}"
exec python -m pytest "$@"
