"""The same problems asked in plain transformers, greedily: does every answer of `npd evaluate` come again?

    npd evaluate MODEL --task exact_match --path sets/problems.jsonl --output answers.jsonl
    python check_answers.py MODEL answers.jsonl

Prints how many are right, here and there, and every answer that differs; exit status 1 if one does. Nothing of
megatron_npd is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from models import respond
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("answers", type=Path, help="JSON lines that npd evaluate, or a run's evaluation, wrote")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    given = [json.loads(line) for line in arguments.answers.read_text().splitlines()]
    ours = respond(model, tokenizer, [row["prompt"] for row in given])
    differ = 0
    for row, answer in zip(given, ours, strict=True):
        if answer.split() != row["response"].split():
            differ += 1
            print(f"{row['prompt']}: {answer!r} here, {row['response']!r} there")
    right = sum(answer.split() == row["reference"].split() for row, answer in zip(given, ours, strict=True))
    theirs = sum(row["correct"] for row in given)
    print(f"{arguments.model}: {right} of {len(given)} right here, {theirs} there; {differ} answers differ")
    sys.exit(1 if differ or right != theirs else 0)


if __name__ == "__main__":
    main()
