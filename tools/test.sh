#!/usr/bin/env bash
# Sets up what is needed and runs the tests.
#   bash tools/test.sh            the default tests, minutes
#   bash tools/test.sh --slow     the slow ones too (several processes, comparison with PyTorch, TPU programs, a wheel, a README that runs)
#   bash tools/test.sh ARGS...    pytest with these arguments, for example: tests/test_decode.py -k beam
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

. tools/setup_env.sh
slow=
if [ "${1:-}" = --slow ]; then
  shift
  slow=1
fi
setup_env ${slow:+torch,pod}
export JAX_PLATFORMS=cpu

if [ $# -gt 0 ]; then
  exec "$PYTHON" -m pytest ${slow:+-m slow} "$@"
fi

# `test.sh && test.sh --slow` does not run the default tests twice over the same files.
passed="$VENV/t5x_cpm-tests.passed"
tree="$(date)"  # outside of git they do run again
if git rev-parse --git-dir >/dev/null 2>&1; then
  tree="$(git ls-files -co --exclude-standard -z | xargs -0 cksum 2>/dev/null | cksum)" || true  # xargs fails on a link to a folder, which is no file
fi
if [ -z "$slow" ] || [ "$(cat "$passed" 2>/dev/null)" != "$tree" ]; then
  rm -f "$passed"
  # One worker per core: most of the time goes into compiling tiny models, which uses one core. Each worker takes about 3 GB.
  "$PYTHON" -m pytest -m 'not slow' -q --durations=10 -n logical --maxprocesses 4 --dist worksteal
  echo "$tree" > "$passed"
fi
if [ -n "$slow" ]; then
  # Tests that share a long preparation, or start as many processes as there are cores, form a group, which one worker runs.
  "$PYTHON" -m pytest -m slow -q --durations=10 -n logical --maxprocesses 2 --dist loadgroup
fi
