"""The judge: grading by key, the graded questions of the quickstart, and its figures against another way to them."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from places import EXAMPLES, TOOLS

from megatron_npd.errors import UserError

PROMPTS = EXAMPLES / "quickstart" / "prompts"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("judge_student")


@pytest.mark.parametrize(
    ("response", "key", "right"),
    [
        ("The capital of Spain is Madrid.", "Madrid", True),
        ("the capital is madrid", "Madrid", True),
        ("Madridian", "Madrid", False),
        ("", "Madrid", False),
        ("5 + 8 = 13.", "13|thirteen", True),
        ("It is Thirteen", "13|thirteen", True),
        ("It is 131", "13|thirteen", False),
        ("It is 13.5", "13|thirteen", False),
        ("It is 2.13", "13|thirteen", False),
        ("This is positive.", "positive!negative", True),
        ("Positive or negative", "positive!negative", False),
        ("negative", "positive!negative", False),
    ],
)
def test_grading(response: str, key: str, right: bool, tool: ModuleType) -> None:
    assert tool.is_right(response, key) is right


def test_the_graded_questions_are_new_and_have_their_answers(tool: ModuleType) -> None:
    rows = tool.read_task(PROMPTS / "graded.jsonl")
    asked = {row["messages"][0]["content"] for row in rows}
    known = {
        json.loads(line)["messages"][-1]["content"]
        for split in ("train", "heldout")
        for line in (PROMPTS / f"{split}.jsonl").read_text().splitlines()
    }
    assert len(asked) == len(rows) == 96 and not asked & known
    for row in rows:
        first, *others = row["choices"]
        assert tool.is_right(first, row["answer"]), row
        assert len(set(row["choices"])) == len(row["choices"]) and not any(
            tool.is_right(other, row["answer"]) for other in others
        )
        if sums := re.fullmatch(r"What is (\d) \+ (\d)\?", row["messages"][0]["content"]):
            assert int(first) == sum(map(int, sums.groups()))


@pytest.mark.parametrize("content", ["", "[1]\n", '{"messages": []}\n', '{"answer": "a"}\n', "no json\n"])
def test_a_task_that_is_none_is_refused(content: str, tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match="--task"):
        tool.read_task(tmp_path / "a.jsonl")


@pytest.mark.heavy
def test_the_held_out_kl_is_that_of_the_logprobs(tool: ModuleType, tmp_path: Path) -> None:
    import numpy as np
    import torch
    from tiny_models import make_llama

    teacher, student = (tool._load(make_llama(tmp_path / str(seed), seed)) for seed in (1, 2))
    pairs = [([5, 6, 7], [8, 9, 2]), ([10], [11]), ([12, 13], [14, 15, 16, 17, 2])]
    expected = []
    for prompt, response in pairs:
        for end in range(len(response)):
            ids = torch.tensor([prompt + response[:end]])
            with torch.no_grad():
                p, q = (model(ids).logits[0, -1].double().softmax(-1).numpy() for model in (teacher, student))
            expected.append((np.sum(p * np.log(p / q)), p.argmax() == q.argmax()))
    kl, agreement, tokens = tool.heldout_kl(teacher, student, pairs)
    assert tokens == len(expected) == 9
    assert (kl, agreement) == pytest.approx(tuple(np.mean(expected, axis=0)), rel=1e-4)
    assert tool.heldout_kl(teacher, teacher, pairs)[:2] == (0.0, 1.0)


@pytest.mark.heavy
def test_the_likelier_choice_is_chosen(tool: ModuleType, tmp_path: Path) -> None:
    """Against scores of the whole text, read anew for every choice."""
    import torch
    from tiny_models import make_llama
    from tiny_tokenizer import make_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "t"))
    model = tool._load(make_llama(tmp_path / "m", 3))
    found = set()
    for choices in (["yes", "no"], ["no", "yes"], ["a", "b", "c"], ["word", "x"]):
        row = {"messages": [{"role": "user", "content": "Say."}], "opening": "It is", "choices": choices}
        prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt + "It is", add_special_tokens=False)["input_ids"]
        scores = []
        for choice in choices:
            ids = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([before + ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(logprobs[len(before) - 1 + i, token].item() for i, token in enumerate(ids)))
        right = tool.chooses_right(model, tokenizer, row)
        assert right == (max(scores) == scores[0])
        found.add(right)
    assert found == {True, False}


@pytest.mark.heavy
def test_answers_do_not_depend_on_what_is_asked_beside_them(tool: ModuleType, tmp_path: Path) -> None:
    from tiny_models import make_llama
    from tiny_tokenizer import make_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "t"))
    model = tool._load(make_llama(tmp_path / "m", 3))
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("Say a.", "Say something else.", "?")]
    together = tool.greedy_answers(model, tokenizer, rows, [2])
    assert together == [tool.greedy_answers(model, tokenizer, [row], [2])[0] for row in rows]
    assert any(together)
