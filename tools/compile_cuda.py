"""Compile the CUDA kernels for every architecture and show what the compiler made of them.

    python tools/compile_cuda.py [--json FILE] [--keep FOLDER]

One row for each kernel; for each architecture its registers a thread, bytes of static shared memory, spilled bytes and
bytes of stack frame. Needs nvcc (from NVCC, PATH, CUDA_HOME, /usr/local/cuda or NVIDIA's pip packages) and torch's
headers, but no GPU and no CUDA build of torch: nothing is linked. Flags and architectures are those of
megatron_npd/kernels/build.py.

Exit status: 0 all well, 1 something does not compile or a kernel spills or has a stack frame, 2 no nvcc.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

KERNELS = Path(__file__).resolve().parent.parent / "megatron_npd" / "kernels"
SOURCES = KERNELS / "csrc" / "cuda"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture; the last three in bytes."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    spilled: int
    stack: int

    @property
    def clean(self) -> bool:
        return self.spilled == 0 and self.stack == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    parser.add_argument("--keep", type=Path, help="keep the object files in this folder")
    options = parser.parse_args()
    settings = build_settings()
    try:
        nvcc = settings.find_nvcc()
    except settings.BuildError as error:
        print(f"compile_cuda: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        usages, failed = compile_all(nvcc, folder)
    if options.json:
        options.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=1))
    print(table(usages))
    unclean = [usage for usage in usages if not usage.clean]
    for usage in unclean:
        print(
            f"compile_cuda: {usage.kernel} on sm_{usage.architecture} spills {usage.spilled} bytes and has a stack "
            f"frame of {usage.stack}",
            file=sys.stderr,
        )
    return 1 if unclean or failed else 0


def compile_all(nvcc: str, folder: Path) -> tuple[list[Usage], bool]:
    """Compile every source, two at a time; what each kernel uses, and whether a source failed (its errors printed)."""
    sources = sorted(SOURCES.glob("*.cu"))
    usages, failed = [], not sources
    with ThreadPoolExecutor(2) as pool:
        for source, result in zip(sources, pool.map(lambda s: compile_one(nvcc, s, folder), sources), strict=True):
            seconds, completed = result
            print(f"{source.name}: {seconds:.1f} s", flush=True)
            if completed.returncode:
                print(completed.stderr.rstrip(), file=sys.stderr)
                failed = True
            usages += parse(completed.stderr)
    return usages, failed


def compile_one(nvcc: str, source: Path, folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """One source to an object file for all architectures; seconds taken."""
    settings, torch = build_settings(), torch_folder()
    command = [nvcc, *(flag for flag in settings.CUDA_FLAGS if flag != "--shared"), "-Xptxas", "-v", "-c", str(source)]
    for number in settings.CUDA_ARCHITECTURES:
        command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    command += settings.toolkit_flags(nvcc)
    command += [f"-I{SOURCES.parent}", f"-I{torch / 'include'}", "-o", str(folder / f"{source.stem}.o")]
    start = time.monotonic()
    completed = subprocess.run(command, capture_output=True, text=True)
    return time.monotonic() - start, completed


def parse(report: str) -> list[Usage]:
    """The kernels in what ptxas -v says."""
    usages = []
    for part in report.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for 'sm_(\w+)'", part).groups()
        stack, stored, loaded = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = re.search(r"(\d+) bytes smem", part)
        usages.append(
            Usage(
                readable(name), architecture, registers, int(shared.group(1)) if shared else 0, stored + loaded, stack
            )
        )
    return usages


def readable(mangled: str) -> str:
    """`score_partials<BFloat16, 1>` for `_ZN3npd14score_partialsINS_8BFloat16ELi1EEEv...`."""
    length, rest = re.match(r"_ZN3npd(\d+)(\w+)", mangled).groups()
    name, rest = rest[: int(length)], rest[int(length) :]
    if not rest.startswith("I"):
        return name
    arguments = []
    rest = rest[1:]
    while match := re.match(r"NS_\d+([A-Z]+[a-z]+\d+)E?|Li(\d+)E|(f)", rest):
        arguments.append(match.group(1) or match.group(2) or "float")
        rest = rest[match.end() :]
    return f"{name}<{', '.join(arguments)}>"


def table(usages: list[Usage]) -> str:
    """One row a kernel, one column an architecture."""
    rows: dict[str, dict[str, Usage]] = defaultdict(dict)
    for usage in usages:
        rows[usage.kernel][usage.architecture] = usage
    architectures = sorted({usage.architecture for usage in usages}, key=int)
    lines = [["registers/shared/spilled/stack", *(f"sm_{architecture}" for architecture in architectures)]]
    for kernel in sorted(rows):
        cells = [rows[kernel].get(architecture) for architecture in architectures]
        lines.append([kernel, *(f"{c.registers}/{c.shared}/{c.spilled}/{c.stack}" if c else "-" for c in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def build_settings() -> ModuleType:
    """megatron_npd/kernels/build.py, without importing the package and with it torch."""
    spec = importlib.util.spec_from_file_location("npd_build_settings", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_folder() -> Path:
    """Where torch is installed, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        sys.exit(f"compile_cuda: {sys.executable} has no torch, whose headers are needed")
    return Path(spec.origin).parent


if __name__ == "__main__":
    sys.exit(main())
