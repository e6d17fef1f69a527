"""Teacher and student of one tokenizer with different numbers of padding rows: the same figures at any TP."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron_runs import run_ranks
from places import SUPPORT
from rows_worker import figures
from tiny_models import make_llama

from megatron_npd.distributed.parallel import Parallel

WORKER = SUPPORT / "rows_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize(("of_teacher", "of_student"), [(152, 136), (131, 153)])
def test_two_ranks_give_what_one_gives(of_teacher: int, of_student: int, tmp_path: Path, parallel: Parallel) -> None:
    """As Qwen2.5 has them, 152,064 against 151,936: cut in two, each model's own slices would not line up."""
    for seed, (name, rows) in enumerate({"teacher": of_teacher, "student": of_student}.items()):
        make_llama(tmp_path / name, seed, vocab_size=rows, tied=name == "student")
    job = {name: str(tmp_path / name) for name in ("teacher", "student")}
    job |= {"out": str(tmp_path / "rank"), "common": min(of_teacher, of_student)}
    expected = figures(job, parallel)
    run_ranks([sys.executable, str(WORKER), json.dumps(job)], 2, tmp_path / "rendezvous")
    for rank in range(2):
        found = dict(np.load(tmp_path / f"rank_{rank}.npz"))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(found["ids"], expected["ids"])
