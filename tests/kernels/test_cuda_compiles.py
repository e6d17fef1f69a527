"""The CUDA kernels compile for every architecture without a spill, and their operators register. Needs nvcc, no GPU."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from places import ROOT

TOOL = ROOT / "tools" / "compile_cuda.py"
CSRC = ROOT / "megatron_npd" / "kernels" / "csrc"
ARCHITECTURES = ("80", "90", "100")
KERNELS = {
    f"{name}<{element}{temperatures}>"
    for name, variants in {
        "score_partials": [""],
        "topk_rows": [""],
        "statistics_partials": [", 1", ", 2"],
        "gradient_rows": [", 1", ", 2"],
    }.items()
    for element in ("float", "BFloat16", "Float16")
    for temperatures in variants
} | {"score_merge<1>", "statistics_merge<1>", "statistics_merge<2>"}

ONLY_IN_TORCH_CUDA = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }
extern "C" int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char** text) {
  *text = nullptr;
  return 0;
}
extern "C" void torch_c10_cuda_free_error_msg(char*) {}
"""
"""What the library needs of libtorch_cuda.so, which a torch for CPUs does not have."""

CALL_WITH_CPU_TENSORS = """
import sys
import torch

for library in sys.argv[1:]:
    torch.ops.load_library(library)
operators = torch.ops.megatron_npd
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
z, y = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
ids, p = y[:, None], torch.ones(2, 1)
calls = {
    "score": (z, y, None, 0, 8, 1.0),
    "topk": (z, 3, 0, 8, 1.0),
    "loss_statistics": (z, y, ids, p, 0, 8, 1.0),
    "loss_gradient_": (z, y, ids, p, torch.ones(8, 2), 0, 8, 1.0),
}
for name, arguments in calls.items():
    try:
        getattr(operators, name).default.redispatch(cuda, *arguments)
        print(name, "ran on CPU tensors")
    except RuntimeError as error:
        print(name, str(error).splitlines()[0])
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(folder of the object files, what the tool reports)."""
    folder = tmp_path_factory.mktemp("cuda")
    report = folder / "usage.json"
    result = subprocess.run([sys.executable, TOOL, "--json", report, "--keep", folder], capture_output=True, text=True)
    if result.returncode == 2:
        pytest.skip(result.stderr.strip())
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(report.read_text())


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(compiled):
    _, usages = compiled  # the tool fails on any spill or stack frame
    assert {(usage["kernel"], usage["architecture"]) for usage in usages} == {
        (kernel, architecture) for kernel in KERNELS for architecture in ARCHITECTURES
    }
    # Two blocks of 512 threads on a multiprocessor: what the bytes in flight (csrc/cuda/load.cuh) rest on.
    assert all(usage["registers"] <= 64 for usage in usages)


@pytest.mark.slow
def test_the_operators_link_register_and_take_their_arguments(compiled):
    """Called past the dispatcher with CPU tensors, each must say that it wants CUDA ones: nothing else runs here."""
    folder, _ = compiled
    tool = load_tool()
    torch, settings = tool.torch_folder(), tool.build_settings()
    (folder / "stub.cpp").write_text(ONLY_IN_TORCH_CUDA)
    schemas, stub, library = folder / "schemas.so", folder / "libstub.so", folder / "library.so"
    flags = ["-shared", "-fPIC", "-std=c++17"]
    place = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    run("g++", *flags, folder / "stub.cpp", "-o", stub)
    run("g++", *flags, settings.STABLE_ABI, CSRC / "ops.cpp", *place, "-o", schemas)
    objects = [*folder.glob("*.o"), f"-L{folder}", "-lstub", *place, "-Xlinker", f"-rpath={folder}"]
    run(settings.find_nvcc(), "--shared", *objects, "-o", library)
    said = run(sys.executable, "-c", CALL_WITH_CPU_TENSORS, schemas, library).splitlines()
    assert [line.split()[0] for line in said] == ["score", "topk", "loss_statistics", "loss_gradient_"]
    assert all("on a CUDA device" in line for line in said), said


def test_a_missing_nvcc_is_said_in_one_line():
    result = subprocess.run(
        [sys.executable, TOOL], capture_output=True, text=True, env={"NVCC": "/nowhere/nvcc", "PATH": "/nowhere"}
    )
    assert result.returncode == 2
    assert (
        result.stderr.startswith("compile_cuda: NVCC=/nowhere/nvcc: no such program") and result.stderr.count("\n") == 1
    )


MANGLED = "_ZN3npd13gradient_rowsINS_8BFloat16ELi2EEEvNS_17GradientArgumentsIT_XT0_EEE"
REPORT = f"""
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90'
ptxas info    : Function properties for {MANGLED}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers, 128 bytes smem, 424 bytes cmem[0]
"""


def test_spills_are_seen():
    tool = load_tool()
    (usage,) = tool.parse(REPORT)
    assert usage == tool.Usage("gradient_rows<BFloat16, 2>", "90", registers=56, shared=128, spilled=12, stack=16)
    assert not usage.clean
    assert "56/128/12/16" in tool.table([usage])


def load_tool():
    spec = importlib.util.spec_from_file_location("compile_cuda", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_cuda"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*command):
    """Standard output of a command that must succeed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
