#!/usr/bin/env python3
"""From a data set to the two files of prompts a run wants: shuffled, without repetitions, some of them held out.

    python tools/prepare_prompts.py SOURCE --output FOLDER [--heldout 256] [--limit N] [--seed 1] [--set KEY=VALUE ...]

SOURCE is whatever `prompts.train` takes: JSON Lines, a parquet file or a folder of them, a data set saved on disk, or
hf://OWNER/NAME?config=...&split=... Keys of [prompts] say what holds what, as in a run's configuration:

    python tools/prepare_prompts.py "hf://openai/gsm8k?config=main" --output prompts/math \\
        --set prompts.columns.prompt=question --set 'prompts.columns.unused=["answer"]'

FOLDER gets train.jsonl and heldout.jsonl. A prompt that says the same as an earlier one, but for case, spaces or a last
stop, is left out. Given responses are kept. The same source and seed give the same files.

Exit status: 0 done, 2 with one line on stderr when the source cannot be used; then nothing was written.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from megatron_npd.config import PromptsConfig, make_config
from megatron_npd.data.prompt_rows import Prompt, read_prompts
from megatron_npd.errors import UserError
from megatron_npd.files import write_atomically
from megatron_npd.prepare.prompt_parts import normalised


def distinct(source: str, config: PromptsConfig) -> tuple[list[Prompt], int]:
    """Prompts that differ, in their order, and how many were left out."""
    kept: dict[str, Prompt] = {}
    count = 0
    for prompt in read_prompts(source, config):
        kept.setdefault(normalised(prompt.words), prompt)
        count += 1
    return list(kept.values()), count - len(kept)


def line(prompt: Prompt, format: str) -> str:
    """A prompt as a line of JSON, with the fields that `prompts.columns` has by default."""
    row: dict[str, Any] = {"id": prompt.name}
    row |= {"prompt": prompt.text} if format == "text" else {"messages": prompt.messages}
    if prompt.response:
        row["response"] = prompt.response["content"] if format == "text" else [prompt.response]
    if prompt.tools:
        row["tools"] = prompt.tools
    if prompt.template_kwargs:
        row["chat_template_kwargs"] = prompt.template_kwargs
    return json.dumps(row, ensure_ascii=False) + "\n"


def prepare(arguments: argparse.Namespace) -> str:
    """Write the two files; what was done, for people."""
    source, output = arguments.source, Path(arguments.output)
    raw = {
        "run_directory": "-",
        "models": {"teacher": "-", "student": "-"},
        "prompts": {"train": source, "heldout": source},
    }
    config = make_config(raw, arguments.set, source).prompts
    prompts, repeated = distinct(source, config)
    random.Random(arguments.seed).shuffle(prompts)
    prompts = prompts[: arguments.limit or None]
    if arguments.heldout < 1 or arguments.heldout >= len(prompts):
        raise UserError(
            f"--heldout {arguments.heldout}: must be at least 1 and less than the {len(prompts)} prompts of {source}"
        )
    splits = {"heldout": prompts[: arguments.heldout], "train": prompts[arguments.heldout :]}
    for split, members in splits.items():
        text = "".join(line(prompt, config.format) for prompt in members)
        write_atomically(output / f"{split}.jsonl", text.encode())
    counts = f"{len(splits['train']):,} prompts to train on, {len(splits['heldout']):,} held out"
    return f"{output}: {counts}; {repeated:,} that repeat another left out"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--heldout", type=int, default=256, metavar="N")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="take so many, held-out ones included")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    try:
        print(prepare(parser.parse_args()))
    except UserError as error:
        print(f"prepare_prompts: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
