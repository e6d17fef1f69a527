"""Builds the fused operators: `python -m megatron_npd.kernels.build`, also run by setup.py and tools/make_env.sh.

One library for CPUs, and one for CUDA where nvcc (of a toolkit, or of NVIDIA's pip packages) and a CUDA build of torch
are there; with `--require-cuda` it is an error if they are not. A library's name holds a hash of
what it was built from (sources, flags, torch's stable ABI, machine), so one that no longer fits the sources is not
found, never loaded. It does not hold torch's version: the stable ABI serves every torch from 2.10 on.

Standard library only, importable as a lone file: a build without torch must be able to say so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().with_name("csrc")
LIBRARIES = Path(__file__).resolve().with_name("lib")
COMMAND = "python -m megatron_npd.kernels.build"

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
CPU_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-shared", STABLE_ABI]
"""No -march: one build holds every instruction set and chooses when it is used. Hidden: torch loads libraries with all
their symbols global, where inline functions of the same name in the other library would replace each other."""
CUDA_FLAGS = ["-std=c++17", "-O3", "--shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI]
CUDA_ARCHITECTURES = ("80", "90", "100")
"""Compute capabilities to compile for, those that the installed nvcc knows; the last also as PTX for later ones."""
TOOLKIT = "/usr/local/cuda"
"""Where a CUDA toolkit lies that nothing names."""


class BuildError(Exception):
    """Why a library cannot be built here, in one line."""


def library_file(kind: str, folder: Path | None = None) -> Path:
    """Where the library of these sources lies once it is built; `kind` is "cpu" or "cuda"."""
    return (folder or LIBRARIES) / f"libnpd_{kind}-{_fingerprint(kind)}.so"


def other_builds(kind: str, folder: Path | None = None) -> list[Path]:
    """Libraries in the folder that were built from other sources."""
    wanted = library_file(kind, folder)
    return sorted(path for path in wanted.parent.glob(f"libnpd_{kind}-*.so") if path != wanted)


def build_cpu(folder: Path | None = None) -> Path:
    """Build the CPU library unless it is there; raises BuildError."""
    compiler = _compiler()
    sources = [str(SOURCES / "ops.cpp"), str(SOURCES / "cpu" / "operators.cpp")]
    return _build("cpu", folder, [*compiler, *CPU_FLAGS, *sources], ["-ltorch_cpu"])


def build_cuda(folder: Path | None = None) -> Path:
    """Build the CUDA library unless it is there; raises BuildError."""
    nvcc = find_nvcc()
    sources = [str(path) for path in sorted((SOURCES / "cuda").glob("*.cu"))]
    if not sources:
        raise BuildError("no CUDA sources")
    if not (_torch() / "lib" / "libtorch_cuda.so").exists():
        raise BuildError("torch is a build for CPUs alone")
    command = [nvcc, *CUDA_FLAGS, *_architectures(nvcc), *toolkit_flags(nvcc), f"-I{SOURCES}", *sources]
    return _build("cuda", folder, command, ["-ltorch_cpu", "-ltorch_cuda"])


def find_nvcc() -> str:
    """The nvcc to use: NVCC where it is set, else that of PATH, of a toolkit, of NVIDIA's pip packages beside torch.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("NVCC")
    if named:
        if found := shutil.which(named):
            return found
        raise BuildError(f"NVCC={named}: no such program")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT]
    homes += sorted(map(str, (_torch().parent / "nvidia").glob("cu[0-9]*")), reverse=True)
    for place in ("nvcc", *(f"{home}/bin/nvcc" for home in homes if home)):
        if found := shutil.which(place):
            return found
    raise BuildError(
        "no nvcc on PATH, in CUDA_HOME, /usr/local/cuda or pip's package nvidia-cuda-nvcc (NVCC names another)"
    )


def toolkit_flags(nvcc: str) -> list[str]:
    """Where the nvcc of pip's packages has its headers and libraries; a toolkit's own nvcc knows.

    The packages of CUDA 13 share one folder, `nvidia/cu13`; those of CUDA 12 have no nvcc. The nvcc of 13.0 looks for
    its libraries in `lib64`, and they lie in `lib`.
    """
    home = Path(nvcc).resolve().parent.parent
    if home.parent.name != "nvidia":
        return []
    return [f"-I{home / 'include'}", f"-I{home / 'include' / 'cccl'}", f"-L{home / 'lib'}"]


def build(folder: Path | None = None, cuda_required: bool = False) -> bool:
    """Build what can be built, and say what was done and what is missing.

    Returns:
        Whether the CPU library is there, and with `cuda_required` the CUDA library as well.
    """
    try:
        print(f"kernels: {build_cpu(folder).name} is ready", flush=True)
    except BuildError as error:
        print(f"kernels: NOT built, the plain torch reference will run instead: {error}", file=sys.stderr, flush=True)
        return False
    try:
        print(f"kernels: {build_cuda(folder).name} is ready", flush=True)
    except BuildError as error:
        print(f"kernels: no CUDA library: {error}", file=sys.stderr if cuda_required else sys.stdout, flush=True)
        return not cuda_required
    return True


def _fingerprint(kind: str) -> str:
    """Hash of all that a library is made from."""
    flags = CPU_FLAGS if kind == "cpu" else [*CUDA_FLAGS, *CUDA_ARCHITECTURES]
    digest = hashlib.sha256(repr((flags, platform.system(), platform.machine())).encode())
    shared = [SOURCES / "ops.cpp", *(SOURCES.glob("*.h") if kind == "cuda" else ())]
    for path in sorted([*shared, *(SOURCES / kind).rglob("*")]):
        if path.is_file():
            digest.update(f"\0{path.relative_to(SOURCES).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(kind: str, folder: Path | None, command: list[str], libraries: list[str]) -> Path:
    """Compile and link in one command, put the library in place whole, and remove what other sources made."""
    target, torch = library_file(kind, folder), _torch()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}.tmp")
        place = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", *libraries, "-o", str(unfinished)]
        print(f"kernels: compiling {target.name}", flush=True)
        try:
            subprocess.run([*command, *place], check=True, capture_output=True, text=True)
            unfinished.rename(target)
        except OSError as error:
            raise BuildError(f"{command[0]}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{shlex.join(error.cmd)} failed:\n{error.stderr.strip()}") from None
        finally:
            unfinished.unlink(missing_ok=True)
    for path in other_builds(kind, folder):
        path.unlink(missing_ok=True)  # a process that has it loaded keeps it
    return target


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler: g++, c++ or clang++ on PATH (CXX names another)")


def _torch() -> Path:
    """Folder of the installed torch, found without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise BuildError(
            f"torch can't be imported by {sys.executable} (pip builds in an isolated environment: install torch "
            f"first, then use `pip install --no-build-isolation`, or run `{COMMAND}` afterwards)"
        )
    return Path(found.origin).parent


def _architectures(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in listed]
    if not known:
        raise BuildError(f"{nvcc} compiles for none of compute_{', compute_'.join(CUDA_ARCHITECTURES)}")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    return [*codes, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


if __name__ == "__main__":
    sys.exit(0 if build(cuda_required="--require-cuda" in sys.argv[1:]) else 1)
