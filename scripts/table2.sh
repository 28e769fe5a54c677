#!/usr/bin/env bash
# Table 2 (classifiers with and without generated images) for a data root, in one command; --help lists the options.
#   scripts/table2.sh --data data/oct --output runs/oct --dry-run
source "$(dirname "${BASH_SOURCE[0]}")/tables.sh"
exec python "$HERE/scripts/plan.py" 2 "$@"
