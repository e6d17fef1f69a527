"""Inputs of a run that pass every check: two tiny checkpoints that share a tokenizer, prompts, a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w

from megatron_npd.config import Config, load_config

if TYPE_CHECKING:
    from megatron_npd.prepare.tokenise import TokenisedPrompts


class Inputs:
    """Files of one run below `root`; a test spoils one of them and looks at what is said about it."""

    def __init__(self, root: Path):
        self.root = root
        self.teacher, self.student = root / "teacher", root / "student"
        self.train, self.heldout = root / "train.jsonl", root / "heldout.jsonl"
        self.run = root / "run"
        self.values: dict[str, Any] = {
            "run_directory": str(self.run),
            "models": {"teacher": str(self.teacher), "student": str(self.student), "dtype": "float32"},
            "prompts": {"train": str(self.train), "heldout": str(self.heldout), "max_prompt_tokens": 64},
            "rollout": {"max_new_tokens": 32},
            "annotator": {"top_k": 4, "pack_length": 128},
            "training": {"sequence_length": 128},
        }
        write_prompts(self.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(6)})
        write_prompts(self.heldout, {f"h{i}": f"Name {i} things." for i in range(3)})

    @property
    def path(self) -> Path:
        """The configuration as a file."""
        path = self.root / "run.toml"
        path.write_text(tomli_w.dumps(self.values))
        return path

    @property
    def config(self) -> Config:
        return load_config(self.path)

    def set(self, key: str, value: object) -> None:
        """Change one value of the configuration, e.g. `set("training.lr", 1e-4)`."""
        *sections, name = key.split(".")
        table = self.values
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value


def token_ids(prompts: TokenisedPrompts) -> list[list[int]]:
    """Of every prompt."""
    parts = [part.prompts for part in prompts.parts()]
    return [ids.tolist() for part in parts for ids in np.split(part.ids, np.cumsum(part.lengths)[:-1])]


def write_prompts(path: Path, prompts: dict[str, str]) -> None:
    """A prompt file of single user turns, by id."""
    lines = (
        json.dumps({"id": name, "messages": [{"role": "user", "content": text}]}) for name, text in prompts.items()
    )
    path.write_text("\n".join(lines) + "\n")
