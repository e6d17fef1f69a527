#!/usr/bin/env bash
# Everything that must hold before a commit: environment, lint, the fast tests, then the slow ones.
#
#   tests/run.sh                    all of it
#   tests/run.sh -k shards -x       pytest alone, with these arguments
#
# The environment is made in .venv of the checkout, or where NPD_ENV says, and reused while it is up to date.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export NPD_ENV=${NPD_ENV:-$PWD/.venv}
NPD_ENV=$(readlink -m -- "$NPD_ENV")

tools/make_env.sh "$NPD_ENV"
pytest=("$NPD_ENV/bin/python" -m pytest)

if (($#)); then
    exec "${pytest[@]}" "$@"
fi
tools/lint.sh
status=0
"${pytest[@]}" -m "not slow" -n 2 --durations=5 || status=$?
# The slow tests run even where fast ones failed: one run then shows everything that is wrong.
# Two files at a time: half of such a test is waiting for processes to start and to meet.
"${pytest[@]}" -m slow -n 2 --dist loadfile --durations=25 || { slow=$?; ((slow == 5)) || status=$slow; } # 5: no slow test
exit "$status"
