#!/usr/bin/env bash
# Make, or bring up to date, a virtual environment for NVIDIA GPUs: Megatron-Core, vLLM, Transformer Engine, our kernels.
#
#   tools/make_gpu_env.sh [--dry-run] DIR      --dry-run: print every command, run none
#
# Linux on x86-64 with Python 3.12 and a driver of release 580 or later (CUDA 13.0). 8.6 GB on disk without Transformer
# Engine. Versions are those of constraints/gpu.txt. No CUDA toolkit is needed: pip's own nvcc is installed. A C++ compiler
# is, for Transformer Engine's PyTorch part, which is built here, and for the kernels.
#
# NPD_PYTHON           the Python 3.12 that makes it (default: python3.12)
# NPD_PIP_ARGS         words for every `pip install`; pip's own settings count as well
# NPD_WITHOUT_TE=1     leave Transformer Engine out: attention is torch's own then, layers are Megatron's
# NPD_REQUIRE_TE=1     an error where it cannot be built; otherwise that is said, and the rest goes on
# NPD_REQUIRE_KERNELS=1  the same for the fused kernels
#
# The last lines say of every part whether it can be imported here. On a node with GPUs `npd check CONFIG --devices` then
# tries them. An interrupted installation is continued by the same command.
# Exit status: 0 ready; 1 a part that is needed cannot be imported; 2 the request cannot be met (one line); else pip's.
set -euo pipefail

DRIVER=580
CUDA=13.0

refuse() {
    echo "make_gpu_env: error: $*" >&2
    exit 2
}

say() {
    echo "make_gpu_env: $*"
}

# Run a command, or with --dry-run print it as one could type it.
run() {
    if ((dry_run)); then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

check_python() {
    local version
    ((!dry_run)) || return 0
    version=$("$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        refuse "$1: does not run, or has no venv module; must be Python 3.12 (NPD_PYTHON names another)"
    [[ $version == 3.12 ]] || refuse "$1: is Python $version; must be Python 3.12 (NPD_PYTHON names another)"
}

# What the GPUs' driver must serve. A login node may have none.
check_driver() {
    local version
    if ! version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1); then
        say "no NVIDIA driver on this machine; where the roles run it must be $DRIVER or later (CUDA $CUDA)"
        return
    fi
    ((${version%%.*} >= DRIVER)) || say "the driver here is $version; it must be $DRIVER or later (CUDA $CUDA), or NVIDIA's" \
        "forward-compatibility package be installed"
}

install_packages() {
    run "$python" -m venv "$environment"
    # The compiler is one that fits torch's headers; torch alone would bring a newer one.
    run "${pip[@]}" -c "$constraints" -e "${checkout}[gpu,test]" nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm \
        nvidia-cuda-cccl
}

# Against the torch that is there: pip's build isolation would take the newest of the index for it.
install_transformer_engine() {
    if [[ ${NPD_WITHOUT_TE:-0} != 0 ]]; then
        say "NPD_WITHOUT_TE=$NPD_WITHOUT_TE: without Transformer Engine"
        return
    fi
    run "${pip[@]}" setuptools wheel ninja pybind11
    # Its own search does not look into pip's packages.
    local cuda=${CUDA_HOME:-"$environment/lib/python3.12/site-packages/nvidia/cu13"}
    if ! run env CUDA_HOME="$cuda" PATH="$cuda/bin:$environment/bin:$PATH" NVTE_FRAMEWORK=pytorch \
        "${pip[@]}" -c "$constraints" --no-build-isolation "transformer-engine[core_cu13,pytorch]"; then
        [[ ${NPD_REQUIRE_TE:-0} == 0 ]] || refuse "NPD_REQUIRE_TE=$NPD_REQUIRE_TE: Transformer Engine could not be built"
        say "Transformer Engine could not be built (the reason is above); going on without: attention is torch's own"
    fi
}

build_kernels() {
    local required=()
    [[ ${NPD_REQUIRE_KERNELS:-0} == 0 ]] || required=(--require-cuda)
    run "$environment/bin/python" "$checkout/megatron_npd/kernels/build.py" "${required[@]}" ||
        ((${#required[@]} == 0)) || refuse "NPD_REQUIRE_KERNELS=$NPD_REQUIRE_KERNELS: the fused kernels could not be" \
        "built; the reason is above"
}

# One line of verdict for each part; status 1 if one that is needed is missing.
import_everything() {
    run "$environment/bin/python" "$checkout/tools/import_parts.py"
}

dry_run=0
if [[ ${1:-} == --dry-run ]]; then
    dry_run=1
    shift
fi
[[ $# -eq 1 && $1 != -* ]] || refuse "usage: tools/make_gpu_env.sh [--dry-run] DIR"
script=$(readlink -f -- "${BASH_SOURCE[0]}")
checkout=$(dirname -- "$(dirname -- "$script")")
environment=$(readlink -m -- "$1")
constraints=$checkout/constraints/gpu.txt
python=${NPD_PYTHON:-python3.12}
read -ra pip_args <<<"${NPD_PIP_ARGS:-}"
pip=("$environment/bin/python" -m pip --disable-pip-version-check install "${pip_args[@]}")

if [[ -d $environment && ! -f $environment/pyvenv.cfg && -n $(ls -A -- "$environment") ]]; then
    refuse "$environment: exists, is not empty and is no virtual environment; name another folder"
fi
check_python "$python"
check_driver
install_packages
install_transformer_engine
build_kernels
import_everything
((dry_run)) || say "$environment is ready"
