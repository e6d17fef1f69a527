#!/usr/bin/env python3
"""How good students are, by plain transformers alone: held-out KL in float64, and answers to questions with a key.

    python tools/judge_student.py STUDENT... --teacher DIR --run RUN [--task FILE] [--json FILE]

Nothing of the project's own models, kernels or engines is used, so the figures are an independent check of a run's, and
fair to a student of any origin. Of the checkpoint folders STUDENT... (the teacher's may be one):

* held-out KL: exact KL(teacher || student) over the whole vocabulary, the mean over the response tokens of the run's
  held-out set (the teacher's responses that lie in RUN/rollouts/heldout), nats a token; layers in float32, softmax in
  float64; over the common rows where the vocabularies are padded differently;
* right answers: rows of FILE, JSON Lines of {"messages": [...], "answer": "..."}, whose greedy response is right
  (`is_right`). Default: examples/quickstart/prompts/graded.jsonl;
* right choices: of the rows that have "choices" (the right one first) and an "opening" of the response, those where the
  right one is the likeliest to follow. A student that cannot yet say an answer may already prefer it.

The tokenizer is the teacher's. Exit status: 0; 2 bad input, with one line on stderr.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_npd.buffer.shards import CorruptShardError, read_shard
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.files import write_json
from megatron_npd.models.hf_config import eos_token_ids
from megatron_npd.run_directory import HELDOUT_STAGE, RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "prompts" / "graded.jsonl"
MAX_NEW_TOKENS = 24
PROMPTS_AT_ONCE = 32

Pair = tuple[list[int], list[int]]
"""Prompt and response."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", type=Path, nargs="+", metavar="STUDENT", help="Hugging Face checkpoint folders")
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--run", type=Path, required=True, help="run directory whose held-out responses are used")
    parser.add_argument("--task", type=Path, default=TASK, help="questions with answers, JSON Lines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON: a list, one a student")
    options = parser.parse_args(argv)
    try:
        pairs, questions = heldout_pairs(RunDirectory(options.run)), read_task(options.task)
        figures = judge(options.teacher, options.students, pairs, questions)
    except UserError as error:
        print(f"judge_student: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_STATUS
    for student, found in zip(options.students, figures, strict=True):
        kl, right, chosen = found["heldout_kl"], found["right"], found["chosen"]
        print(
            f"{student}: held-out KL {kl:.4f} nats a token; of {found['asked']} answers {right} right; of "
            f"{found['offered']} choices {chosen} right, {found['by_chance']:.0f} by chance"
        )
    if options.json:
        write_json(options.json, figures)
    return 0


def is_right(response: str, key: str) -> bool:
    """The grader: whether the key is in the response, as a word of its own.

    `key` may name several that will do, with | between them, and after a ! ones that must not be there as well:
    "positive!negative" is not answered by "positive or negative".
    """
    wanted, _, unwanted = key.partition("!")
    return any(_says(response, word) for word in wanted.split("|")) and not any(
        _says(response, word) for word in unwanted.split("|") if word
    )


def _says(response: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?!\w|\.\d)", response, re.IGNORECASE) is not None


def read_task(file: Path) -> list[dict[str, Any]]:
    """Rows with `messages` and `answer`.

    Raises:
        UserError: the file cannot be read, has no row, or one lacks something.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--task {file}: cannot read it: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("answer"), str) or not row.get("messages"):
            raise UserError(f'--task {file}: line {number}: must be {{"messages": [...], "answer": "..."}}')
        rows.append(row)
    if not rows:
        raise UserError(f"--task {file}: has no question")
    return rows


def heldout_pairs(run: RunDirectory) -> list[Pair]:
    """(prompt, response) of the teacher's held-out responses; empty responses are left out, as the run does.

    Raises:
        UserError: there are none, or a shard cannot be read.
    """
    pairs: list[Pair] = []
    for path in sorted(run.stage("rollouts", HELDOUT_STAGE).glob("unit_*.safetensors")):
        try:
            shard = read_shard(path, "rollouts")
        except CorruptShardError as error:
            raise UserError(str(error)) from None
        pairs += [(shard.prompt(row).tolist(), shard.response(row).tolist()) for row in range(len(shard))]
    if not any(response for _, response in pairs):
        raise UserError(f"--run {run.root}: holds no held-out responses; must be a run that has sampled them")
    return [pair for pair in pairs if pair[1]]


def judge(teacher: Path, students: list[Path], pairs: list[Pair], questions: list[dict[str, Any]]) -> list[dict]:
    """Of each student: heldout_kl, heldout_tokens, top1_agreement; right of the asked answers; chosen of the offered
    choices, and how many would be by_chance."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer, reference = AutoTokenizer.from_pretrained(teacher), _load(teacher)
    figures = []
    for folder in students:
        student = _load(folder)
        kl, agreement, tokens = heldout_kl(reference, student, pairs)
        answers = greedy_answers(student, tokenizer, questions, eos_token_ids(teacher))
        right = sum(is_right(answer, row["answer"]) for answer, row in zip(answers, questions, strict=True))
        offered = [row for row in questions if row.get("choices")]
        found = {"student": str(folder), "heldout_kl": kl, "top1_agreement": agreement, "heldout_tokens": tokens}
        found |= {"right": right, "asked": len(questions), "answers": answers, "offered": len(offered)}
        found["chosen"] = sum(chooses_right(student, tokenizer, row) for row in offered)
        found["by_chance"] = sum(1 / len(row["choices"]) for row in offered)
        figures.append(found)
    return figures


def heldout_kl(teacher: PreTrainedModel, student: PreTrainedModel, pairs: list[Pair]) -> tuple[float, float, int]:
    """(KL(teacher || student) in nats, share of equal likeliest tokens) as means over so many response tokens."""
    import torch

    kl = agreement = 0.0
    tokens = 0
    with torch.no_grad():
        for prompt, response in pairs:
            ids_1T = torch.tensor([prompt + response])
            kept = len(response) + 1  # the last one predicts what nobody sampled
            both = [model(ids_1T, logits_to_keep=kept).logits[0, :-1] for model in (teacher, student)]
            rows = min(logits.shape[1] for logits in both)
            log_p_RV, log_q_RV = (logits[:, :rows].double().log_softmax(-1) for logits in both)
            kl += (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum().item()
            agreement += (log_p_RV.argmax(-1) == log_q_RV.argmax(-1)).sum().item()
            tokens += len(response)
    return kl / tokens, agreement / tokens, tokens


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[dict[str, Any]], end: list[int]
) -> list[str]:
    """The text of greedy responses, several prompts at once."""
    import torch

    answers: list[str] = []
    for rows in _chunks(questions, PROMPTS_AT_ONCE):
        texts = [
            tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in rows
        ]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        length = max(map(len, ids))
        input_ids = torch.tensor([[end[0]] * (length - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        with torch.no_grad():
            output = model.generate(
                input_ids, attention_mask=mask, do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=end, pad_token_id=end[0],
            )  # fmt: skip
        answers += tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return answers


def chooses_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> bool:
    """Whether the first choice is the likeliest to follow the opening: by the sum of its tokens' log p."""
    import torch

    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt + row["opening"], add_special_tokens=False)["input_ids"]
    scores = []
    with torch.no_grad():
        read = model(torch.tensor([before]), use_cache=True, logits_to_keep=1)
        for choice in row["choices"]:
            ids = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            logits_RV = read.logits[0]
            if len(ids) > 1:
                more = model(torch.tensor([ids[:-1]]), past_key_values=copy.deepcopy(read.past_key_values))
                logits_RV = torch.cat([logits_RV, more.logits[0]])
            scores.append(logits_RV.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
    return scores[0] > max(scores[1:])


def _load(folder: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {error}") from None


def _chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


if __name__ == "__main__":
    sys.exit(main())
