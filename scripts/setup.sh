# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with req.txt (and any extra packages named
# in $EXTRA) installed. Repeated only when req.txt changes. Needs Python 3.10 or newer and the package index.
PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $($PYTHON --version)"
    $PYTHON -m venv .venv
fi
WANTED=$(cat req.txt; echo "${EXTRA:-}")
if [ "$(cat .venv/installed 2>/dev/null)" != "$WANTED" ]; then
    echo "installing req.txt: about 3 minutes and 6 GB, once"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r req.txt ${EXTRA:-}
    echo "$WANTED" > .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
# On a CPU that is shared with other work, OpenMP threads that spin while they wait make training 20 times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
