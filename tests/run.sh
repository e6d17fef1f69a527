#!/usr/bin/env bash
# Everything that must hold before a commit: environment, lint, the fast tests, then the slow ones.
#
#   tests/run.sh                    all of it
#   tests/run.sh quick              seconds: lint, and the tests that need neither torch nor transformers nor a process
#   tests/run.sh fast               lint, and every test but the slow ones
#   tests/run.sh -k shards -x       pytest alone, with these arguments
#
# The environment is made in .venv of the checkout, or where NPD_ENV says, and reused while it is up to date.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export NPD_ENV=${NPD_ENV:-$PWD/.venv}
NPD_ENV=$(readlink -m -- "$NPD_ENV")

# pytest compiles tests, and hypothesis, with asserts of its own: seconds for each process that may not keep the result.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$NPD_ENV/pycache

tools/make_env.sh "$NPD_ENV"
pytest=("$NPD_ENV/bin/python" -m pytest)
fast=("${pytest[@]}" -m "not slow" -n 2 --durations=5)

case ${1:-} in
quick | fast)
    tools/lint.sh
    [[ $1 == quick ]] || exec "${fast[@]}" "${@:2}"
    exec "${pytest[@]}" --quick -n 2 -q "${@:2}"
    ;;
?*) exec "${pytest[@]}" "$@" ;;
esac
tools/lint.sh
status=0
"${fast[@]}" || status=$?
# The slow tests run even where fast ones failed: one run then shows everything that is wrong.
# Two files at a time: half of such a test is waiting for processes to start and to meet.
"${pytest[@]}" -m slow -n 2 --dist loadfile --durations=25 || { slow=$?; ((slow == 5)) || status=$slow; } # 5: no slow test
exit "$status"
