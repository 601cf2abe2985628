# shellcheck shell=bash
# Sourced by the other scripts: `make_venv DIRECTORY EXTRAS` leaves $PY pointing into a virtual
# environment with recursive_jax installed. PYTHON=… chooses the interpreter (3.11 or newer).

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer was not found; install it, or set PYTHON=/path/to/python" >&2
  return 1
}

# What is imported is compiled when it is; compiling all that is installed doubles the time. Where
# Python may not write what it compiled, every start of it compiles 3,000 files again: 5 seconds.
unset PYTHONDONTWRITEBYTECODE
install() {
  "$PY" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}

make_venv() {
  local directory=$1 extras=${2:-} python
  python=$(find_python)
  if [ ! -x "$directory/bin/python" ]; then
    echo "creating $directory with $("$python" --version)"
    "$python" -m venv "$directory"
  fi
  PY=$directory/bin/python
  echo "installing recursive_jax$extras (a minute or two the first time)"
  install -e ".$extras"
}
