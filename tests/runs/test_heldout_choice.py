"""A whole run without a filter, whose held-out responses are the user's and whose held-out KL is of chosen versions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from inputs import Inputs
from npd_runs import npd
from test_given_responses import make_inputs, shards

from megatron_npd.buffer.shards import read_shard
from megatron_npd.files import read_json
from megatron_npd.process.metrics import read_metrics
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import GIVEN_VERSION

pytestmark = pytest.mark.slow

ROUNDS = 3


@pytest.fixture(scope="module")
def run(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    inputs: Inputs = make_inputs(checkpoints, tmp_path_factory.mktemp("heldout_choice"))
    rows = [{"id": f"h{i}", "question": f"Name {i} things.", "answer": f"Thing {i}."} for i in range(3)]
    inputs.heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs.set("heldout", {"source": "data", "versions": [1]})
    inputs.set("rounds", {"count": ROUNDS, "prompts_per_round": 4, "epochs_per_round": 1})
    inputs.set("warmup", {"samples_per_prompt": 0})
    inputs.set("selection", {"rule": "none", "reject_truncated": False})
    npd("run", inputs.path)
    return RunDirectory(inputs.run)


def test_the_heldout_set_is_what_the_data_says(run: RunDirectory) -> None:
    shard = read_shard(run.unit("rollouts", "heldout", 0), "rollouts")
    assert len(shard) == 3 and set(shard["policy_version"]) == {GIVEN_VERSION}


def test_no_engine_was_started_on_the_teacher(run: RunDirectory) -> None:
    teachers = [record for record in read_metrics(run.metrics_folder) if record["role"] == "rollout_teacher"]
    assert not [record for record in teachers if record["event"] == "start"]


def test_chosen_versions_are_evaluated_and_no_other(run: RunDirectory) -> None:
    assert sorted(path.stem for path in run.evaluations.glob("v*.json")) == ["v000001", f"v{ROUNDS:06d}"]
    summary = read_json(run.summary)
    assert list(summary["heldout_kl_by_version"]) == ["1", str(ROUNDS)]
    assert summary["heldout_kl_before"] is None and summary["heldout_kl_after"] > 0
    assert run.student.is_dir()


def test_without_a_filter_the_run_needs_no_score(run: RunDirectory) -> None:
    for shard in shards(run, "samples", "round_0001"):
        assert np.isnan(shard["delta_ifd"]).all() and np.isfinite(shard["nll_student_conditional"]).all()
    summary = read_json(run.summary)
    assert summary["rollouts_kept"] == summary["rollouts_generated"] == 4 * ROUNDS
    assert run.report.stat().st_size > 10_000
    assert npd("inspect", run.root)
