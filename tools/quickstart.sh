#!/usr/bin/env bash
# Sets up what is needed and runs the main job, tools/quickstart.py, on the data that ships with the project.
#   bash tools/quickstart.sh [--output=DIR] [--steps=N]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup_env.sh
setup_env
exec "$PYTHON" tools/quickstart.py "$@"
