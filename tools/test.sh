#!/usr/bin/env bash
# Sets up what is needed and runs the tests.
#   bash tools/test.sh            the default tests, minutes
#   bash tools/test.sh --slow     the slow ones too (several processes, comparison with PyTorch, a wheel, a README that runs)
#   bash tools/test.sh ARGS...    pytest with these arguments, for example: tests/test_decode.py -k beam
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = --slow ]; then
  shift
  . tools/setup_env.sh torch
  slow=1
else
  . tools/setup_env.sh
  slow=
fi
export JAX_PLATFORMS=cpu

if [ $# -gt 0 ]; then
  exec "$PYTHON" -m pytest ${slow:+-m slow} "$@"
fi

# The default tests are not run twice over the same files by `test.sh && test.sh --slow`.
tree="$(git ls-files -co --exclude-standard -z 2>/dev/null | LC_ALL=C sort -z | xargs -0 cksum 2>/dev/null | cksum || true)"
passed="$VENV/t5x_cpm-tests.passed"
if [ -z "$slow" ] || [ "$(cat "$passed" 2>/dev/null)" != "$tree" ]; then
  rm -f "$passed"
  "$PYTHON" -m pytest -m 'not slow' -q --durations=10
  echo "$tree" > "$passed"
fi
if [ -n "$slow" ]; then
  "$PYTHON" -m pytest -m slow -q --durations=10
fi
