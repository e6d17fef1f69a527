"""Whole runs with rules of selection: what is judged how, and a round that keeps too little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from npd_runs import npd
from test_given_responses import make_inputs, shards

from megatron_npd.files import read_json
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import Verdict
from megatron_npd.selection.rules import quantile_of

pytestmark = pytest.mark.slow


def test_tau_follows_the_round_before_and_a_random_drop_is_of_that_size(checkpoints: Path, tmp_path: Path) -> None:
    inputs = make_inputs(checkpoints, tmp_path)
    inputs.set("rounds", {"count": 2, "epochs_per_round": 1})
    inputs.set("heldout", {"versions": "last"})
    inputs.set("selection", {"rule": "random", "tau": 1e9, "tau_quantile": 0.5, "reject_truncated": False})
    npd("run", inputs.path)
    run = RunDirectory(inputs.run)
    first, second = (shards(run, "samples", f"round_000{index}") for index in range(2))
    tau = quantile_of(np.concatenate([shard["delta_ifd"] for shard in first]), 0.5)
    kept, left = 0, 0
    for shard in second:
        assert shard.metadata["selection"]["like"]["tau"] == tau
        delta, usable = shard["delta_ifd"], np.isin(shard["verdict"], [Verdict.KEPT, Verdict.RANDOM])
        would = np.count_nonzero(usable & (delta >= 0) & (delta <= tau))
        assert np.count_nonzero(shard["verdict"] == Verdict.KEPT) == would
        kept, left = kept + would, left + np.count_nonzero(usable) - would
    assert kept and left
    summary = read_json(run.summary)
    assert summary["rollouts_rejected"]["random"] > 0
    assert "random" in npd("inspect", inputs.run, "--rejected")


def test_a_round_that_keeps_too_little_ends_the_run_with_one_line(checkpoints: Path, tmp_path: Path) -> None:
    inputs = make_inputs(checkpoints, tmp_path)
    inputs.set("rounds", {"count": 2, "epochs_per_round": 1})
    inputs.set("selection", {"tau": 1e9, "reject_truncated": True, "least_kept_share": 1.0})
    inputs.set("rollout.max_new_tokens", 4)  # random models rarely end within these
    inputs.set("launch", {"max_restarts": 0})
    npd("run", inputs.path, status=2)
    log = (RunDirectory(inputs.run).log("trainer")).read_text()
    assert "samples were kept, must be selection.least_kept_share = 1 of them at least" in log
