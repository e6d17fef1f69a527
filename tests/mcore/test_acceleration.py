"""Optional GPU parts: announced, refused where they are asked for but cannot run, never confused with a namesake."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megatron_npd.config import TrainingConfig
from megatron_npd.errors import UserError
from megatron_npd.mcore.acceleration import NONE, _apex_obstacle, choose_acceleration

PARTS = ("transformer_engine", "fused_optimizer", "gradient_accumulation_fusion")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")


@without_gpu
def test_what_cannot_run_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_acceleration(TrainingConfig()) == NONE
    for part in PARTS:
        assert f"{part}: not used (needs a GPU)" in caplog.text


@without_gpu
@pytest.mark.parametrize("part", PARTS)
def test_what_is_asked_for_is_refused(part: str) -> None:
    with pytest.raises(UserError, match=f"training.{part} = 'on': cannot run here: needs a GPU"):
        choose_acceleration(TrainingConfig(**{part: "on"}))


@pytest.mark.parametrize("part", PARTS)
def test_off_is_off(part: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not getattr(choose_acceleration(TrainingConfig(**{part: "off"})), part)


def test_the_web_toolkit_named_apex_is_not_taken_for_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert "not NVIDIA's" in _apex_obstacle("amp_C")
