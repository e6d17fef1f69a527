"""Several sidecars and one list of evaluations: nobody does what another is at, nothing is lost with one that dies."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_config import make_config

from megatron_npd.buffer.evaluations import Exam, taking
from megatron_npd.buffer.plan import make_plan
from megatron_npd.files import write_json
from megatron_npd.rollout.examining import Examiner
from megatron_npd.run_directory import RunDirectory


@pytest.fixture
def context(tmp_path: Path) -> Any:
    """Of a run whose versions 0 and 2 answer `mine`; all that an examiner asks of it."""
    config = make_config(
        tmp_path / "run",
        evaluation=[{"task": "exact_match", "name": "mine"}],
        launch={"poll_seconds": 0.01, "lease_seconds": 60.0},
    )
    return SimpleNamespace(config=config, run=RunDirectory(tmp_path / "run"), plan=make_plan(config, 4, 2))


def test_what_another_is_at_is_not_wanted_and_waited_for(context: Any) -> None:
    examiner, exam = Examiner(context, [2]), Exam(0, "mine")
    assert examiner.wants(0) and not examiner.wants(1) and examiner.wants(2)
    with taking(context.run, context.config, exam):
        assert not examiner.wants(0) and examiner.left() == [exam, Exam(2, "mine")]

        def finish() -> None:
            time.sleep(0.1)
            write_json(context.run.result("mine", 0), {"accuracy": 0.5})

        other = threading.Thread(target=finish)
        other.start()
        examiner.wait_for_others([exam])
        assert examiner.left() == [Exam(2, "mine")]
        other.join()


def test_what_nobody_is_at_is_not_waited_for(context: Any) -> None:
    examiner = Examiner(context, [2])
    lease = context.run.lease("evaluation", "mine", 0)
    with taking(context.run, context.config, Exam(0, "mine")):
        lease.unlink()  # as the supervisor does with leases of the dead
        examiner.wait_for_others([Exam(0, "mine")])
        assert examiner.wants(0)
