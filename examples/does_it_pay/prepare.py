"""What the runs start from: the teachers, a student for each prompt set, the sets, and the problems that are graded.

    python prepare.py --output FOLDER [--sets 4 5]

What is there is not made again; everything follows from the seeds below, which were fixed before any run.

    models/teacher, models/uncertain     right on all chains, and meant to be on about 95 %
    models/student_04 …                  random weights, another seed for each set
    sets/problems.jsonl                  500 problems that are graded; no set and no held-out question is among them
    sets/TEACHER_heldout.jsonl           100 questions with the teacher's answers, for the held-out KL
    sets/TEACHER_04/train.jsonl          585 questions with the teacher's answers
    sets/TEACHER_04/warm.jsonl           the same, and 20 answers without their question (see chain.py)
    sets/TEACHER_04/varied.jsonl         four answers to each of the 585, sampled from the teacher at temperature 1.5
    sets/TEACHER_04/corrupted.jsonl      four to each, right but for 10 % of the numbers
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from arms import PLAN, PROMPTS
from chain import UNASKED, Chain, corrupted, make_chains

HERE = Path(__file__).resolve().parent
SETS = sorted({number for setting, _ in PLAN for number in setting.sets})
"""Numbers of the prompt sets; a set's seeds follow from its number."""
PROBLEMS, HELDOUT, UNASKED_ROWS = 500, 100, 20
PROBLEM_SEED, HELDOUT_SEED, SET_SEED = 777, 778, 1000
TEACHERS = {"teacher": (), "uncertain": ("--until", "0.92")}
"""What models.py makes of each."""
HOT = 1.5
COPIES = 4
"""Answers to each question in varied.jsonl and corrupted.jsonl: as many as four rounds sample."""
CORRUPTED_SHARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sets", type=int, nargs="+", default=SETS)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    arguments = parser.parse_args()
    prepare(arguments.output, arguments.sets, arguments.teachers)


def prepare(output: Path, sets: Iterable[int], teachers: Iterable[str]) -> None:
    """Make what is not there yet."""
    for number in sets:
        model(output / "models" / student_name(number), "--student", "--seed", str(number))
    problems = make_chains(PROBLEM_SEED, PROBLEMS)
    heldout = make_chains(HELDOUT_SEED, HELDOUT, but={problem.question for problem in problems})
    graded = [{"prompt": problem.question, "answer": problem.answer} for problem in problems]
    make(output / "sets" / "problems.jsonl", lambda: graded)
    apart = {chain.question for chain in [*problems, *heldout]}
    for teacher in teachers:
        model(output / "models" / teacher, *TEACHERS[teacher], "--seed", "0")
        answer = Answers(output / "models" / teacher)
        make(output / "sets" / f"{teacher}_heldout.jsonl", partial(answer.rows, heldout))
        for number in sets:
            chains = make_chains(SET_SEED + number, PROMPTS, but=apart)
            make_set(output / "sets" / set_name(teacher, number), chains, answer, SET_SEED + number)


def student_name(number: int) -> str:
    return f"student_{number:02d}"


def set_name(teacher: str, number: int) -> str:
    return f"{teacher}_{number:02d}"


class Answers:
    """A teacher that is loaded when it is first asked."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, questions: list[str], temperature: float = 0.0, seed: int = 0) -> list[str]:
        import torch
        from models import ANSWER_TOKENS, respond
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

        torch.set_num_threads(1)
        model = LlamaForCausalLM.from_pretrained(self._folder).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self._folder)
        # Whatever is given to a run gets an end, for which there must be room.
        return respond(model, tokenizer, questions, temperature, seed, longest=ANSWER_TOKENS - 1)

    def rows(self, chains: list[Chain], temperature: float = 0.0, seed: int = 0) -> list[dict[str, str]]:
        """Questions with the teacher's answers."""
        questions = [chain.question for chain in chains]
        replies = self(questions, temperature, seed)
        return [{"prompt": asked, "response": reply} for asked, reply in zip(questions, replies, strict=True)]


def make_set(folder: Path, chains: list[Chain], answer: Answers, seed: int) -> None:
    """The files of one prompt set."""
    make(folder / "train.jsonl", lambda: answer.rows(chains))
    answered = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    unasked = [{"prompt": UNASKED, "response": row["response"]} for row in answered[:UNASKED_ROWS]]
    make(folder / "warm.jsonl", lambda: answered + unasked)
    make(folder / "varied.jsonl", lambda: answer.rows(chains * COPIES, HOT, seed))
    generator = random.Random(seed)
    make(
        folder / "corrupted.jsonl",
        lambda: [
            {"prompt": chain.question, "response": corrupted(chain, generator, CORRUPTED_SHARE)}
            for chain in chains * COPIES
        ],
    )


def model(folder: Path, *options: str) -> None:
    """A model's folder, made by models.py, whole or not at all."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    subprocess.run([sys.executable, str(HERE / "models.py"), "--output", str(unfinished), *options], check=True)
    try:
        unfinished.rename(folder)
    except OSError:  # beside us another made it
        if not folder.is_dir():
            raise
        shutil.rmtree(unfinished)


def make(path: Path, rows: Callable[[], list[dict[str, str]]]) -> None:
    """A file of JSON lines, whole or not at all."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows())
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(lines)
    unfinished.rename(path)


if __name__ == "__main__":
    main()
