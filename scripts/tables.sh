# Sourced by table1.sh, table2.sh and tables_demo.sh: makes the installation that scripts/plan.py needs, and leaves
# the working directory as it was, since paths are as seen from where the command was given.
set -euo pipefail
FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
HERE=$PWD
source scripts/setup.sh >&2  # what --dry-run prints stays a script
cd "$FROM"
