#!/usr/bin/env bash
# Format and lint rules (ruff.toml). The import rules are a test: tests/test_import_rules.py.
#
#   tools/lint.sh          check, change nothing
#   tools/lint.sh --fix    apply what can be applied
#
# Uses $NPD_ENV/bin/ruff where NPD_ENV names an environment, else the ruff on PATH.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
ruff=${NPD_ENV:+$NPD_ENV/bin/}ruff

if [[ ${1:-} == --fix ]]; then
    "$ruff" check --fix .
    "$ruff" format .
else
    "$ruff" format --check .
    "$ruff" check .
fi
