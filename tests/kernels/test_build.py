"""kernels/build.py: which nvcc it takes, with what flags, and that the CUDA sources fit every torch from 2.10 on.

Headers of the installed torch cannot show what an older one lacks: from 2.13 on some headers bring in others that they
did not before. So the fast test holds that every macro comes from a header included by name, and a slow one compiles
with the headers of older releases.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_npd.kernels import build

TORCH = Path(importlib.util.find_spec("torch").origin).parent
MACRO = re.compile(r"\b(?:STD|TORCH|STABLE_TORCH)_[A-Z_]+\b")
INCLUDE = re.compile(r'^#include [<"](.+)[>"]', re.MULTILINE)
NVCC = """#!{python}
# Writes down how it was called, and makes what it is asked for.
import pathlib, sys
if "--list-gpu-arch" in sys.argv:
    print("compute_80 compute_90")
else:
    pathlib.Path({log!r}).write_text("\\n".join(sys.argv))
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("library")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """site-packages with a CUDA build of torch, as far as a build looks at it; no nvcc anywhere."""
    torch = tmp_path / "site-packages" / "torch"
    (torch / "lib").mkdir(parents=True)
    (torch / "lib" / "libtorch_cuda.so").touch()
    monkeypatch.setattr(build, "_torch", lambda: torch)
    monkeypatch.setattr(build, "TOOLKIT", str(tmp_path / "nowhere"))
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    return torch.parent


def put_nvcc(home: Path) -> str:
    """An nvcc in this toolkit that writes its arguments beside itself."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(python=sys.executable, log=str(home / "arguments")))
    nvcc.chmod(0o755)
    return str(nvcc)


def test_nvcc_of_pips_packages_gets_its_headers_and_libraries(site: Path, tmp_path: Path) -> None:
    home = site / "nvidia" / "cu13"
    put_nvcc(home)
    library = build.build_cuda(tmp_path / "lib")
    assert library == build.library_file("cuda", tmp_path / "lib") and library.read_text() == "library"
    arguments = (home / "arguments").read_text().splitlines()
    assert {f"-I{home}/include", f"-I{home}/include/cccl", f"-L{home}/lib"} <= {*arguments}
    assert (
        "-gencode=arch=compute_90,code=sm_90" in arguments and "-gencode=arch=compute_100,code=sm_100" not in arguments
    )


def test_the_first_nvcc_of_the_order_is_taken(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.BuildError, match=r"no nvcc on PATH, in CUDA_HOME, .* or pip's package nvidia-cuda-nvcc"):
        build.find_nvcc()
    for place in ("site-packages/nvidia/cu13", "site-packages/nvidia/cu14", "nowhere", "home", "path"):
        nvcc = put_nvcc(tmp_path / place)
        if place == "home":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / place))
        elif place == "path":
            monkeypatch.setenv("PATH", str(tmp_path / place / "bin"))
        assert build.find_nvcc() == nvcc, place
    assert build.toolkit_flags(nvcc) == [], "a toolkit's own nvcc knows where its files are"
    named = put_nvcc(tmp_path / "named")
    monkeypatch.setenv("NVCC", named)
    assert build.find_nvcc() == named


def test_an_nvcc_that_is_named_and_missing_is_no_reason_to_take_another(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nvcc(site / "nvidia" / "cu13")
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(build.BuildError, match="NVCC=/nowhere/nvcc: no such program"):
        build.build_cuda()


def test_a_cuda_library_can_be_required(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "build_cpu", lambda folder: build.library_file("cpu", folder))
    assert build.build(tmp_path) and "no CUDA library: no nvcc" in capsys.readouterr().out
    assert not build.build(tmp_path, cuda_required=True) and "no CUDA library: no nvcc" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["cuda/operators.cu", "cuda/checks.h", "cpu/operators.cpp", "ops.cpp"])
def test_every_macro_of_torch_comes_from_a_header_included_by_name(source: str) -> None:
    used = {*MACRO.findall(without_comments(build.SOURCES / source))} - {"TORCH_TARGET_VERSION"}
    named = [TORCH / "include" / name for name in includes(build.SOURCES / source) if name.startswith("torch/")]
    defined = {macro for header in named for macro in re.findall(r"# *define (\w+)", header.read_text())}
    assert used and used <= defined, f"{source}: no header included by name defines {sorted(used - defined)}"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.10.0", "2.12.1"])
def test_the_operators_compile_with_an_older_torch(
    version: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One architecture of the one CUDA source that includes torch's headers, and both CPU sources."""
    headers = headers_of(version, request.config.cache.mkdir(f"torch-headers-{version}"), tmp_path)
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    flags = [flag for flag in build.CUDA_FLAGS if flag != "--shared"]
    place = [f"-I{build.SOURCES}", f"-I{headers}", "-o", str(tmp_path / "object.o"), "-c"]
    compiled([nvcc, *flags, *build.toolkit_flags(nvcc), "-arch=sm_90", *place, "cuda/operators.cu"])
    for source in ("cpu/operators.cpp", "ops.cpp"):
        compiled(["g++", "-std=c++17", "-fsyntax-only", build.STABLE_ABI, *place, source])


def compiled(command: list[str]) -> None:
    done = subprocess.run(command, cwd=build.SOURCES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def headers_of(version: str, cache: Path, scratch: Path) -> Path:
    """The include folder of a release; its smallest wheel (80 MB, for macOS) is downloaded once for pytest's cache."""
    if not (cache / "complete").exists():
        platforms = ["--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
        done = subprocess.run(
            [*pip, "--python-version=3.12", f"--dest={scratch}", f"torch=={version}"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"torch {version} can't be downloaded: {done.stderr.strip().splitlines()[-1]}")
        [wheel] = scratch.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(cache, [name for name in archive.namelist() if name.startswith("torch/include/")])
        wheel.unlink()
        (cache / "complete").touch()
    return cache / "torch" / "include"


def without_comments(source: Path) -> str:
    return re.sub(r"//.*", "", source.read_text())


def includes(source: Path) -> set[str]:
    """What a source includes by name, itself or by headers of this package."""
    found = set(INCLUDE.findall(source.read_text()))
    own = [source.parent / name for name in found if (source.parent / name).is_file()]
    return found.union(*map(includes, own))
