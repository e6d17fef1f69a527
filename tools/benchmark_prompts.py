#!/usr/bin/env python3
"""How long it takes to prepare a million prompts, and how much memory: read, framed, tokenised, checked, written.

    python tools/benchmark_prompts.py MODEL [--prompts 1000000] [--kind jsonl|parquet] [--folder DIR] [--json FILE]

MODEL is a checkpoint folder with a tokenizer and a chat template. The prompts are questions of 5 to 25 English words,
the same for the same number. The cache is one of its own, so nothing is found ready; then the same is done once more,
with everything in the cache. Memory is the peak of this process and, for each worker, that of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = """
what when where which why how is are was were the a an of in on at by for with number sum river mountain city house
train water light time year day week month red green blue large small old new fast slow between before after three
seven twelve hundred explain compare describe calculate list name write find prove show people country
"""


def write_rows(path: Path, count: int, kind: str) -> None:
    """The prompts as JSON Lines, or as a parquet file of a column."""
    chooser = random.Random(count)
    texts = [
        " ".join(chooser.choices(WORDS.split(), k=chooser.randint(5, 25))) + f" {number}?" for number in range(count)
    ]
    if kind == "parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.table({"prompt": texts}), path)
        return
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in texts)


def prepare_once(values: dict[str, Any], target: Path) -> dict[str, float]:
    """Seconds of tokenising and checking, and of writing the prompt set."""
    from megatron_npd.config import Config
    from megatron_npd.data.tokenizer import load_tokenizer
    from megatron_npd.models.hf_config import eos_token_ids
    from megatron_npd.prepare.prompt_checks import checked_splits

    config = Config.model_validate(values)
    student = Path(config.models.student)
    started = time.monotonic()
    tokenizer = load_tokenizer(student, trust_remote_code=False)
    train = checked_splits(config, tokenizer, eos_token_ids(student))["train"]
    checked = time.monotonic()
    train.save(target, with_responses=False)
    return {"check_seconds": checked - started, "write_seconds": time.monotonic() - checked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--folder", help="where the prompts and the cache are made for the time being")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        os.environ["NPD_CACHE"] = str(folder / "cache")
        train, heldout = folder / f"train.{arguments.kind}", folder / "heldout.jsonl"
        write_rows(train, arguments.prompts, arguments.kind)
        heldout.write_text('{"prompt": "What is held out?"}\n')
        values = {
            "run_directory": str(folder / "run"),
            "models": {"teacher": str(arguments.model), "student": str(arguments.model)},
            "prompts": {"train": str(train), "heldout": str(heldout), "max_prompt_tokens": 512},
        }
        figures: dict[str, Any] = {"prompts": arguments.prompts, "kind": arguments.kind}
        figures["first"] = prepare_once(values, folder / "set")
        figures["again"] = prepare_once(values, folder / "set")
    figures["own_peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    figures["worker_peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
