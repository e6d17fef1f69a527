#!/usr/bin/env bash
# The quickstart, from a bare machine to a distilled student: environment, models, run, proof. No GPU needed.
#
#   bash examples/quickstart/run.sh [--set key=value ...]
#
# Makes its environment in .venv of the checkout (NPD_ENV overrides), the two models in runs/models and the run in
# runs/quickstart (--set run_directory=DIR overrides). Run again after an interruption: what is done is kept.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
NPD_ENV=$(readlink -m -- "${NPD_ENV:-.venv}")
run=runs/quickstart
for word in "$@"; do [[ $word != run_directory=* ]] || run=${word#*=}; done
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE

tools/make_env.sh "$NPD_ENV"
"$NPD_ENV/bin/python" examples/quickstart/prepare_models.py --output runs/models
"$NPD_ENV/bin/npd" run examples/quickstart/quickstart.toml "$@"
"$NPD_ENV/bin/python" tools/verify_student.py "$run"
echo "report: $(readlink -f -- "$run")/report.html"
echo "next:   examples/does_it_pay/README.md (does it pay?)"
