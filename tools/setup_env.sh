# Sourced by quickstart.sh and test.sh, which then call  setup_env [EXTRA]
# It makes .venv with everything installed, or finds in a moment that it is there, and sets PYTHON to its interpreter.
# T5X_CPM_VENV names another folder than .venv; EXTRA is one or more of setup.py's extras, with commas between.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${T5X_CPM_VENV:-$ROOT/.venv}"

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo 'error: no Python 3.11, 3.12 or 3.13 with the modules venv and ensurepip was found (on Debian and Ubuntu: python3-venv).' >&2
  return 1
}

setup_env() {
  local extra="${1:-}" base stamp want
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    base="$(find_python)" || return 1
    echo "making $VENV with $("$base" --version)"
    "$base" -m venv "$VENV" || return 1
  fi
  PYTHON="$VENV/bin/python"
  stamp="$VENV/t5x_cpm${extra:+-$extra}.stamp"
  want="$("$PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
text = b''.join((root / name).read_bytes() for name in ('requirements.txt', 'setup.py'))
print(hashlib.sha256(text + str((root, sys.version)).encode()).hexdigest())
PY
)" || return 1
  if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    echo 'installing (a few minutes the first time)'
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt" || return 1
    # setuptools has come with the line above: none is downloaded for the build.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --use-pep517 --no-build-isolation \
      -e "$ROOT${extra:+[$extra]}" || return 1
    echo "$want" > "$stamp"  # last, so that an install that was interrupted starts again
  fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  echo 'error: this file does nothing by itself, it is to be sourced: . tools/setup_env.sh && setup_env' >&2
  exit 2
fi
