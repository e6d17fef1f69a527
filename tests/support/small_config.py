"""The smallest configuration, for what needs no model."""

from __future__ import annotations

from pathlib import Path

from megatron_npd.config import Config


def make_config(run: Path | str = "run", **sections: dict[str, object]) -> Config:
    return Config.model_validate(
        {
            "run_directory": str(run),
            "models": {"teacher": "t", "student": "s"},
            "prompts": {"train": "a", "heldout": "b"},
            "annotator": {"pack_length": 4096},
        }
        | sections
    )
