#!/usr/bin/env bash
# The whole reproduction, or with --quick a part of it: makes the environment, the models and prompts, runs what has no
# result yet, and writes RESULTS.md and a page. Stopped at any time, the same command goes on. Options go to run.py.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cd "$root"
environment=${NPD_ENV:-.venv}
tools/make_env.sh "$environment"
python="$environment/bin/python"
"$python" "$here/run.py" "$@"
"$python" "$here/page.py"
