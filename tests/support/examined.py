"""Inputs of a tiny run whose versions answer two evaluations. Random models know nothing: what is right is what some of
their answers happen to end with."""

from __future__ import annotations

import json
import string
from pathlib import Path

from inputs import Inputs

LETTERS, SUMS = "letters", "sums"
PROBLEMS = 12


def examined_inputs(root: Path) -> Inputs:
    """`letters`: an exact match of the last character, by each version; `sums`: of reasoning-gym, by three."""
    inputs = Inputs(root)
    rows = [
        {"id": f"p{i}", "prompt": f"Say {i}.", "answer": list(string.ascii_letters[i % 2 :: 2])}
        for i in range(PROBLEMS)
    ]
    (root / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs.set("prompts.max_prompt_tokens", 160)
    inputs.set("annotator.pack_length", 256)
    inputs.set("training.sequence_length", 256)
    inputs.set("rollout", {"max_new_tokens": 24, "samples_per_unit": 4, "kv_cache_gib": 0.05, "threads": 1})
    inputs.set("selection", {"reject_truncated": False, "tau": 1e9})  # random models rarely end by themselves
    inputs.set("annotator.threads", 1)
    inputs.set("training.lr", 3e-3)
    inputs.set("training.global_batch_size", 1)
    inputs.set(
        "evaluation",
        [
            {
                "task": "exact_match",
                "name": LETTERS,
                "path": str(root / "letters.jsonl"),
                "options": {"extract": "[a-zA-Z]"},
                "versions": "each",
            },
            {
                "task": "reasoning_gym",
                "name": SUMS,
                "options": {"dataset": "chain_sum", "config": {"max_terms": 2}, "instruction": ""},
                "problems": 5,
                "max_new_tokens": 8,
            },
        ],
    )
    return inputs
