#!/usr/bin/env python3
"""Whether this system works, and how fast, on the GPU of this machine: tests, then benchmarks, in one Markdown table.

    python tools/gpu_acceptance.py --list
    python tools/gpu_acceptance.py [--only NAME ...] [--output FILE.md] [--json FILE]

Minutes on an H100. Every check has a time limit of its own, and the table is written anew after each, so a run that is
cut off leaves what it has found. A part that is not installed (vLLM, Transformer Engine) is skipped by name.

Exit status: 0 all that ran met its goal; 1 something did not; 2 no GPU, or wrong usage, in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
USAGE_STATUS = 2
PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "transformers")
SHOWN = 8000
"""Characters of what failing tests said, the last ones: the table has room for their names alone."""
ROWS, VOCABULARIES = 8192, (131_072, 153_376)
SHAPE, SEQUENCE_LENGTH, GLOBAL_BATCH = "openpangu-1b", 32_768, 4
RECOMPUTE = (("none", 0), ("block", 4), ("block", 10), ("full", 0))
"""Tried in this order until one fits the memory."""


class Measured(NamedTuple):
    """What a check found, and whether that is good enough."""

    text: str
    good: bool


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    compares: str
    goal: str
    run: Callable[[float], Measured]
    """Of the seconds it may take."""
    seconds: float
    needs: str | None = None
    """A module without which it is skipped."""


@dataclass(frozen=True)
class Finding:
    """What became of a check."""

    name: str
    compares: str
    goal: str
    result: str
    verdict: str
    """met, missed, failed or skipped."""
    seconds: float


class FailedError(Exception):
    """A check could not be carried out; the text is its reason in a line."""


def tests(*arguments: str) -> Callable[[float], Measured]:
    """Tests, as pytest's arguments, that must all pass; what they skip is said."""

    def run(seconds: float) -> Measured:
        done = call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], seconds)
        last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
        counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last[0]))
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode:
            print(done.stdout[-SHOWN:], file=sys.stderr, flush=True)
        return Measured("; ".join([counts or last[0], *failed[:3]]), done.returncode == 0 and "passed" in counts)

    return run


def bandwidth(seconds: float) -> Measured:
    """The operators' shares of the device's own copy bandwidth, and top-k's time in score's, the worst vocabulary's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.json"
        sizes = ["--rows", str(ROWS), "--vocabulary", *map(str, VOCABULARIES), "--rounds", "25"]
        run_tool("benchmark_kernels.py", *sizes, "--no-compile", "--json", str(file), seconds=seconds)
        results = json.loads(file.read_text())["results"]

    def fused(operator: str, candidate: str = "fused") -> dict[int, dict]:
        """By vocabulary."""
        return {r["vocabulary"]: r for r in results if (r["operator"], r["candidate"]) == (operator, candidate)}

    score, topk, loss = fused("score"), fused("topk"), fused("loss", "fused, in place")
    score_share = min(one["bandwidth_share"] for one in score.values())
    loss_share = min(one["bandwidth_share"] for one in loss.values())
    times = max(topk[size]["milliseconds"] / score[size]["milliseconds"] for size in score)
    text = f"score {score_share:.0%}, loss {loss_share:.0%}, top-k {times:.2f} × score"
    return Measured(text, score_share >= 0.90 and loss_share >= 0.85 and times <= 1.3)


def utilisation(backend: str, goal: float) -> Callable[[float], Measured]:
    """Model FLOPs utilisation of the trainer's step, with as little recomputed as fits."""

    def run(seconds: float) -> Measured:
        until = time.monotonic() + seconds
        for recompute, layers in RECOMPUTE:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "train.json"
                try:
                    run_tool(
                        "benchmark_train.py",
                        *("--shape", SHAPE, "--sequence-length", str(SEQUENCE_LENGTH)),
                        *("--global-batch", str(GLOBAL_BATCH), "--repeats", "2", "--padded-samples"),
                        *("--recompute", recompute, "--recompute-layers", str(max(layers, 1))),
                        *("--attention-backend", backend, "--json", str(file)),
                        seconds=until - time.monotonic(),
                    )
                except FailedError as error:
                    if "out of GPU memory" in str(error):
                        continue
                    raise
                report = json.loads(file.read_text())
            packed = report["variants"]["packed"]
            again = f"recompute {recompute}" + (f" of {layers} layers" if layers else "")
            text = (
                f"{packed['mfu']:.1%}, {packed['tokens_per_second']:,.0f} tokens/s, "
                f"{packed['peak_memory_bytes'] / 2**30:.0f} GiB, {again}"
            )
            return Measured(text, packed["mfu"] >= goal)
        raise FailedError("out of GPU memory with everything recomputed")

    return run


CHECKS = (
    Check(
        "kernels",
        "CUDA operators with float64 of the same logits, on the device",
        "all pass",
        tests("tests/gpu/test_kernels_on_device.py"),
        120,
    ),
    Check(
        "attention",
        "torch_varlen and te with the reference in float32, forward and backward, grouped heads, context parallel",
        "all pass",
        tests("tests/gpu/test_attention_on_device.py"),
        120,
    ),
    Check(
        "training",
        "steps with the CPU's in float32 and bfloat16, a resume with the run it continues, published weights with "
        "those in GPU memory",
        "all pass",
        tests("tests/gpu/test_training_on_device.py"),
        300,
    ),
    Check(
        "engine",
        "vLLM's logprobs with transformers', an engine after a refresh with a fresh one",
        "all pass",
        tests("tests/vllm_engine"),
        900,
        "vllm",
    ),
    Check(
        "pipeline",
        "a whole run with what its parts give one by one",
        "all pass",
        tests("tests/runs/test_pipeline.py"),
        900,
        "vllm",
    ),
    Check(
        "bandwidth",
        "bytes an operator must move with the device's own copy",
        "score ≥ 90 %, loss ≥ 85 %, top-k ≤ 1.3 × score",
        bandwidth,
        180,
    ),
    Check(
        "MFU, torch_varlen",
        f"FLOPs of a packed step ({SHAPE}, {SEQUENCE_LENGTH:,} tokens) with the data sheet's",
        "≥ 35 %",
        utilisation("torch_varlen", 0.35),
        240,
    ),
    Check("MFU, te", "the same with Transformer Engine", "≥ 40 %", utilisation("te", 0.40), 240, "transformer_engine"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--list", action="store_true", help="name every check, what it compares with what, and its goal"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as data")
    arguments = parser.parse_args(argv)
    names = [check.name for check in CHECKS]
    if unknown := sorted(set(arguments.only or []) - set(names)):
        return refuse(f"--only {unknown[0]}: must be one of {'; '.join(names)}")
    chosen = [check for check in CHECKS if not arguments.only or check.name in arguments.only]
    if arguments.list:
        for check in chosen:
            print(f"{check.name}: compares {check.compares}; goal: {check.goal}")
        return 0
    try:
        machine = describe_machine()
    except FailedError as error:
        return refuse(str(error))
    findings: list[Finding] = []
    for check in chosen:
        print(f"{check.name} ...", file=sys.stderr, flush=True)
        findings.append(carry_out(check))
        write(machine, findings, arguments)
    print(table(machine, findings))
    return 0 if all(finding.verdict in ("met", "skipped") for finding in findings) else 1


def carry_out(check: Check) -> Finding:
    """Run a check, or say why it is left out."""
    started = time.monotonic()

    def found(result: str, verdict: str) -> Finding:
        return Finding(check.name, check.compares, check.goal, result, verdict, time.monotonic() - started)

    if check.needs and importlib.util.find_spec(check.needs) is None:
        return found(f"{check.needs} is not installed", "skipped")
    try:
        text, good = check.run(check.seconds)
    except FailedError as error:
        return found(str(error), "failed")
    return found(text, "met" if good else "missed")


def describe_machine() -> dict[str, str]:
    """GPU, driver and versions.

    Raises:
        FailedError: there is no GPU that torch can use.
    """
    import torch

    if not torch.cuda.is_available():
        raise FailedError("no GPU that torch can use: must run on a machine with one")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    versions = {name: installed(name) for name in PACKAGES}
    return {
        "GPU": f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}",
        "driver": driver,
        "CUDA": str(torch.version.cuda),
        "Python": sys.version.split()[0],
        **versions,
    }


def installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def run_tool(name: str, *words: str, seconds: float) -> None:
    """Run a tool of this folder; raises FailedError with its last line."""
    done = call([sys.executable, str(ROOT / "tools" / name), *words], seconds)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "said nothing").splitlines()
        raise FailedError(f"{name} ended with status {done.returncode}: {lines[-1][:300]}")


def call(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """A command in this checkout, with the allocator that roles have; raises FailedError where it takes too long."""
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        raise FailedError(f"took more than {seconds:.0f} s") from None
    finally:
        end_group(process)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def end_group(process: subprocess.Popen[str]) -> None:
    """End a command and what it has started: a rank left behind would hold the GPU's memory of the next check."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(machine: dict[str, str], findings: list[Finding], arguments: argparse.Namespace) -> None:
    if arguments.output:
        arguments.output.write_text(table(machine, findings) + "\n")
    if arguments.json:
        report = {"machine": machine, "checks": [asdict(finding) for finding in findings]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def table(machine: dict[str, str], findings: list[Finding]) -> str:
    """For docs/benchmarks.md."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine.items()),
        "",
        "| check | compared | goal | found | verdict | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {f.name} | {f.compares} | {f.goal} | {f.result} | {f.verdict} | {f.seconds:.0f} |" for f in findings]
    return "\n".join(lines)


def refuse(reason: str) -> int:
    print(f"gpu_acceptance: error: {reason}", file=sys.stderr)
    return USAGE_STATUS


if __name__ == "__main__":
    sys.exit(main())
