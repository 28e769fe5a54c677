# Sourced by quickstart.sh and test.sh: a virtual environment in .venv with req.txt
# installed; again only when req.txt changes. Needs Python 3.10 or newer and the package index.
PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    echo "making .venv with $($PYTHON --version)"
    $PYTHON -m venv .venv
fi
"$PWD/.venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: .venv has $(.venv/bin/python --version), expected Python 3.10 or newer; remove .venv, set PYTHON" >&2
    exit 2
}
install() {  # install STAMP WHAT ...: pip install, unless the stamp says that it was done
    local stamp=.venv/installed-$1 wanted
    shift
    wanted=$(cat req.txt; echo "$@")
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
    echo "installing $*"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
    echo "$wanted" > "$stamp"
}
[ -e .venv/installed-requirements ] || echo "first installation: about 3 minutes and 6 GB"
install requirements -r req.txt
export PATH="$PWD/.venv/bin:$PATH"
# On a CPU that is shared with other work, OpenMP threads that spin while they wait make training 20 times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
