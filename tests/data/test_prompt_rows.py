"""Which field of a row holds what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table

from megatron_npd.config import make_config
from megatron_npd.data.prompt_rows import Prompt, RowReader, read_prompts
from megatron_npd.data.rows import Row
from megatron_npd.errors import UserError

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yes"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


def reader(*settings: str, columns: list[str] | None = None) -> RowReader:
    raw = {"run_directory": "-", "models": {"teacher": "-", "student": "-"}, "prompts": {"train": "f", "heldout": "f"}}
    return RowReader("f", "line", columns, make_config(raw, [f"prompts.{each}" for each in settings], "test").prompts)


def read(row: Row, *settings: str) -> Prompt:
    return reader(*settings).prompt(7, row)


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"messages": [USER]}, [], Prompt("line-7", [USER])),
        ({"id": 3, "prompt": "hi"}, [], Prompt("3", [USER])),
        ({"prompt": [USER]}, [], Prompt("line-7", [USER])),
        ({"messages": [USER, REPLY]}, [], Prompt("line-7", [USER], response=REPLY)),
        ({"prompt": "hi", "response": "yes"}, [], Prompt("line-7", [USER], response=REPLY)),
        ({"prompt": [USER], "response": [REPLY]}, [], Prompt("line-7", [USER], response=REPLY)),
        ({"prompt": "hi", "response": "yes"}, ["columns.unused=['response']"], Prompt("line-7", [USER])),
        ({"question": "hi"}, ["columns.prompt=question"], Prompt("line-7", [USER])),
        ({"q": "1 + 1", "a": 2}, ["wrap={{Say}} {q}?", "columns.unused=['a']"],
         Prompt("line-7", [{"role": "user", "content": "{Say} 1 + 1?"}])),
        ({"q": "x"}, [r"wrap={q} in \boxed{}"], Prompt("line-7", [{"role": "user", "content": r"x in \boxed{}"}])),
        ({"messages": [USER]}, ["system=Be brief."],
         Prompt("line-7", [{"role": "system", "content": "Be brief."}, USER])),
        ({"messages": [{"role": "system", "content": "own"}, USER]}, ["system=Be brief."],
         Prompt("line-7", [{"role": "system", "content": "own"}, USER])),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
         [], Prompt("line-7", [USER])),
        ({"messages": [USER, CALL, {"role": "tool", "content": "2"}], "tools": [TOOL]}, [],
         Prompt("line-7", [USER, {"role": "assistant", "content": "", "tool_calls": CALL["tool_calls"]},
                           {"role": "tool", "content": "2"}], tools=[TOOL])),
        ({"prompt": "hi", "tools": json.dumps([TOOL])}, [], Prompt("line-7", [USER], tools=[TOOL])),
        ({"prompt": "hi", "chat_template_kwargs": {"b": 2}},
         ["chat_template_kwargs.a=1", "chat_template_kwargs.b=1"],
         Prompt("line-7", [USER], template_kwargs={"a": 1, "b": 2})),
        ({"prompt": "Once", "response": "upon"}, ["format=text"],
         Prompt("line-7", text="Once", response={"role": "assistant", "content": "upon"})),
        ({"prompt": "hi", "extra": 1, "more": 2}, ["columns.unused=['*']"], Prompt("line-7", [USER])),
    ],
)  # fmt: skip
def test_rows_become_prompts(row: Row, settings: list[str], expected: Prompt) -> None:
    assert read(row, *settings) == expected


def turns(**message: Any) -> Row:
    return {"messages": [message]}


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"prompt": "hi", "respnse": "x"}, [], ["'respnse' is read by nothing", "did you mean 'response'", "unused"]),
        ({"text": "hi"}, [], ['"messages"', '"prompt"', "has text"]),
        ({"messages": [USER], "prompt": "hi"}, [], ["has both messages and prompt"]),
        ({"messages": [USER, REPLY], "response": "x"}, [], ["one is enough"]),
        ({"messages": [REPLY]}, [], ["before the last message"]),
        ({"messages": []}, [], ["non-empty list"]),
        ({"messages": "hi"}, [], ["non-empty list", "has str"]),
        ({"prompt": 3}, [], ["non-empty list", "has int"]),
        (turns(role="human", content="hi"), [], ["role", "system, user, assistant, tool"]),
        (turns(role="user", content="hi", weight=1), [], ["a message has 'weight'"]),
        (turns(role="user"), [], ["needs a content"]),
        (turns(role="user", content=3), [], ["text as its content", "has int"]),
        (turns(role="user", content=[{"type": "image", "image": "x"}]), [], ["part 'image'"]),
        (turns(role="user", content="a\ud800b"), [], ["half a surrogate pair at character 1"]),
        ({"prompt": "\udfff"}, [], ["half a surrogate pair"]),
        ({"id": "a\nb", "prompt": "hi"}, [], ["line break"]),
        ({"prompt": "hi", "response": [USER]}, [], ["the assistant's"]),
        ({"prompt": "hi", "tools": "{"}, [], ["tools is a text, and not JSON"]),
        ({"prompt": "hi", "tools": {"name": "x"}}, [], ["tools must be a list of objects"]),
        ({"prompt": "hi", "chat_template_kwargs": [1]}, [], ["chat_template_kwargs must be an object"]),
        ({"prompt": "hi", "chat_template_kwargs": {"tools": []}}, [], ["tools is not a setting"]),
        ({"a": "hi"}, ["wrap={question}", "columns.unused=['a']"], ["prompts.wrap wants 'question'"]),
        ({"messages": [USER]}, ["format=text"], ["holds a chat"]),
    ],
)
def test_a_row_that_breaks_a_rule_is_named(row: Row, settings: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        read(row, *settings)
    assert all(word in str(refused.value) for word in ["f:7: ", *words]), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("columns", "settings", "words"),
    [
        (["question"], ["columns.prompt=questoin"], ["prompts.columns.prompt = 'questoin'", "nearest is 'question'"]),
        (["question", "x"], ["wrap={q}"], ["prompts.wrap = 'q'", "no such column"]),
        (["prompt"], ["columns.unused=['awnser']"], ["'awnser'", "nearest is 'prompt'"]),
        (["question", "answer"], [], ["neither a column 'messages' nor 'prompt'", "question, answer"]),
        (["prompt", "answer"], [], ["column 'answer' is read by nothing"]),
    ],
)
def test_columns_of_a_table_are_checked_before_its_rows(
    columns: list[str], settings: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        reader(*settings, columns=columns)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_row_of_another_type_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table(pyarrow.table({"prompt": pyarrow.array(["a", None, "c"])}), path)
    raw = {"run_directory": "-", "models": {"teacher": "-", "student": "-"}, "prompts": {"train": "f", "heldout": "f"}}
    with pytest.raises(UserError, match=r"x\.parquet: row 2: must have"):
        list(read_prompts(str(path), make_config(raw, [], "test").prompts))
