"""`models.dtype = "auto"`: decided by a measurement when a run is prepared, kept from then on, and said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import Inputs

from megatron_npd.cli import main
from megatron_npd.config import Config, load_config
from megatron_npd.errors import UserError
from megatron_npd.hardware.matrix_rates import MatrixRates, measure_rates
from megatron_npd.prepare.dtype import decide_dtype, describe_dtype
from megatron_npd.prepare.prepare import as_prepared, prepare
from megatron_npd.report.summary import write_report

RICH, POOR = MatrixRates("cpu", 150.0, 700.0), MatrixRates("cpu", 140.0, 1.4)
AMPERE, TURING = MatrixRates("NVIDIA A100"), MatrixRates("Tesla T4", has_bfloat16=False)
ONLY_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Makes torch take a processor for one without bfloat16 instructions."""


def decided(inputs: Inputs, dtype: str, rates: MatrixRates) -> tuple[str, str]:
    inputs.set("models.dtype", dtype)
    models = decide_dtype(inputs.config, measure=lambda threads: rates).models
    return models.dtype, models.dtype_reason


@pytest.mark.parametrize(
    ("wanted", "rates", "dtype", "reason"),
    [
        ("auto", RICH, "bfloat16", "700 GFLOP/s in bfloat16, 150 in float32, 4.67 times as fast"),
        ("auto", POOR, "float32", "1.4 GFLOP/s in bfloat16, 140 in float32, 100 times as slow"),
        ("auto", MatrixRates("cpu", 100.0, 110.0), "float32", "1.1 times as fast"),
        ("auto", AMPERE, "bfloat16", "NVIDIA A100 computes in it"),
        ("auto", TURING, "float32", "Tesla T4 has no bfloat16"),
        ("bfloat16", RICH, "bfloat16", "configured"),
        ("bfloat16", POOR, "bfloat16", "configured, but slow: .* 100 times as slow; 'auto' would take float32"),
        ("bfloat16", AMPERE, "bfloat16", "configured"),
        ("float32", TURING, "float32", "configured"),
    ],
)
def test_decision(inputs: Inputs, wanted: str, rates: MatrixRates, dtype: str, reason: str) -> None:
    found, why = decided(inputs, wanted, rates)
    assert found == dtype
    assert re.search(reason, why), why


def test_dtype_the_hardware_cannot_run_is_refused(inputs: Inputs) -> None:
    with pytest.raises(UserError, match=r"models.dtype = 'bfloat16': Tesla T4 has no bfloat16; must be 'float32'"):
        decided(inputs, "bfloat16", TURING)


def test_nodes_with_gpus_are_not_judged_by_the_login_node(inputs: Inputs) -> None:
    inputs.set("models.dtype", "auto")
    inputs.set("slurm.gpus_per_node", 8)
    assert decide_dtype(inputs.config, in_cluster=True, measure=lambda _: POOR).models.dtype == "bfloat16"
    assert decide_dtype(inputs.config, measure=lambda _: POOR).models.dtype == "float32", "npd run computes here"


@pytest.mark.slow  # measures matrix products in a process of its own
def test_measurement_is_of_this_machine() -> None:
    rates = measure_rates(threads=1)
    assert rates.device == "cpu" and rates.float32 > 0.1 and rates.bfloat16 > 0.01, rates


@pytest.mark.slow  # measures matrix products in a process of its own
def test_processor_without_bfloat16_gets_float32(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ONLY_AVX2.items():
        monkeypatch.setenv(name, value)
    inputs.set("models.dtype", "auto")
    config = decide_dtype(inputs.config)
    assert config.models.dtype == "float32", config.models.dtype_reason
    assert "times as slow" in config.models.dtype_reason


def test_torch_that_fails_is_one_line(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"models.dtype: .*: OSError: libtorch.so: cannot open shared object file"):
        measure_rates(threads=1)


def prepared(inputs: Inputs, dtype: str) -> Config:
    inputs.set("models.dtype", dtype)
    return load_config(prepare(inputs.config).config)


@pytest.mark.slow  # measures matrix products in a process of its own
def test_decision_is_written_with_its_reason_and_kept(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continued on a machine where the measurement would say otherwise."""
    before = prepared(inputs, "bfloat16")
    for name, value in ONLY_AVX2.items():
        monkeypatch.setenv(name, value)
    inputs.set("models.dtype", "auto")
    assert decide_dtype(inputs.config).models.dtype == "float32", "this machine would decide otherwise"
    run = prepare(inputs.config)
    after = load_config(run.config)
    assert after.models == before.models and after.models.dtype == "bfloat16"
    assert after.digest == before.digest == as_prepared(inputs.config).digest
    inputs.set("models.dtype", "float32")
    with pytest.raises(UserError, match=r"models.dtype = 'float32': .* was prepared with 'bfloat16'"):
        prepare(inputs.config)


@pytest.mark.slow  # measures matrix products in a process of its own
def test_auto_is_decided_once(inputs: Inputs) -> None:
    config = prepared(inputs, "auto")
    assert config.models.dtype in ("bfloat16", "float32")
    assert config.models.dtype_reason.startswith("chosen by measurement: matrix products on this processor run at ")
    copied = load_config(prepare(inputs.config).config)
    assert copied.models == config.models, "measured again"


@pytest.mark.slow  # measures matrix products in a process of its own
def test_reader_is_told(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    """By `npd check` before and after, by `npd prepare`, in summary and report."""
    inputs.set("models.dtype", "auto")
    assert main(["check", str(inputs.path)]) == 0
    assert "models.dtype = " in capsys.readouterr().out and not inputs.run.exists()
    assert main(["prepare", str(inputs.path)]) == 0
    line = describe_dtype(as_prepared(inputs.config))
    assert line in capsys.readouterr().out
    assert main(["check", str(inputs.path)]) == 0
    assert line in capsys.readouterr().out, "not what was decided"
    run = prepare(inputs.config)
    summary = write_report(run, as_prepared(inputs.config))
    models = as_prepared(inputs.config).models
    assert summary["settings"]["dtype"] == models.dtype == json.loads(run.summary.read_text())["settings"]["dtype"]
    assert summary["settings"]["dtype_reason"] == models.dtype_reason
    assert models.dtype_reason in run.report.read_text()


@pytest.mark.slow  # measures matrix products in a process of its own
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_reason_of_another_run_decides_nothing(inputs: Inputs, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A file made from the config.toml of another run brings its reason along."""
    inputs.set("models.dtype", dtype)
    inputs.set("models.dtype_reason", "of another machine")
    assert main(["check", str(inputs.path)]) == 0
    said = capsys.readouterr().out
    assert "models.dtype = " in said and "of another machine" not in said
    assert load_config(prepare(inputs.config).config).models.dtype_reason != "of another machine"


def test_role_started_by_hand_takes_the_runs_dtype(inputs: Inputs) -> None:
    """With the user's own file, in which the dtype is still open."""
    prepared(inputs, "float32")
    inputs.set("models.dtype", "auto")
    code = "from megatron_npd.prepare.prepare import load_run_config as load, open_run; import sys\n"
    code += "config = load(sys.argv[1]); open_run(config); print(config.models.dtype)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(inputs.path)], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "float32"
