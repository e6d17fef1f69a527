"""`npd prompts`: what is shown of prompts before anything runs, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
from inputs import Inputs, write_prompts
from tiny_tokenizer import TEMPLATE, THINKING, make_tokenizer

from megatron_npd.cli import main

Captured = pytest.CaptureFixture[str]


def shown(capsys: Captured, *argv: str, status: int = 0) -> str:
    assert main(["prompts", *argv]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


def test_prompts_are_shown_token_by_token_with_control_tokens_marked(inputs: Inputs, capsys: Captured) -> None:
    write_prompts(inputs.train, {"a": "Hi you"})
    text = shown(capsys, str(inputs.path))
    assert "── a (line 1), 25 tokens" in text
    assert "⟦<s> 1⟧u│s│e│r│⏎│H│i│ │y│o│u⟦</s> 2⟧⏎⟦<s> 1⟧a│s│s│i│s│t│a│n│t│⏎" in text


def test_lengths_are_counted(inputs: Inputs, capsys: Captured) -> None:
    text = shown(capsys, str(inputs.path))
    bars = re.findall(r"^ +([\d,]+) - ([\d,]+) +(\d+)", text.split("prompts.heldout")[0], re.MULTILINE)
    assert sum(int(count) for _, _, count in bars) == 6
    assert [count for low, high, count in bars if int(low) <= 36 <= int(high)] == ["6"], "all of one length"


def test_every_way_of_framing_is_shown(inputs: Inputs, capsys: Captured) -> None:
    for folder in (inputs.teacher, inputs.student):
        make_tokenizer(folder, template=THINKING)
    rows = [
        {"id": f"{thinks}{i}", "prompt": f"{thinks} {i}", "chat_template_kwargs": {"enable_thinking": thinks}}
        for i in range(3)
        for thinks in (True, False)
    ]
    inputs.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(capsys, str(inputs.path), "--show", "1").split("prompts.heldout")[0]
    on, off = text.split('framing {"chat_template"')[1:]
    assert '"enable_thinking": true' in on and ": 3 prompts" in on and "── True0 (line 1)" in on
    assert '"enable_thinking": false' in off and "── False0 (line 2)" in off
    assert "(│e│n│d│)" in off and "(│e│n│d│)" not in on
    assert text.count("──") == 2


def test_what_is_lost_and_what_repeats_is_remarked(inputs: Inputs, capsys: Captured) -> None:
    for folder in (inputs.teacher, inputs.student):
        make_tokenizer(folder, template=TEMPLATE.replace("message['content']", "message['content'][:14]"))
    write_prompts(inputs.train, {"long": "What is left of this?", "same": "Name 1 things.", "twice": "name 1 things"})
    text = shown(capsys, str(inputs.path)).split("remarks\n")[1]
    assert "1 prompts have words in a turn of the user that the chat template changes or drops" in text
    assert "'long'" in text and "prompts repeat another" in text
    assert "refused: 1 held-out prompts are training prompts; the first is 'h1' ('same')" in text


def test_too_long_prompts_are_counted_whatever_is_done_about_them(inputs: Inputs, capsys: Captured) -> None:
    write_prompts(inputs.train, {"ok": "hi", "long": "x" * 60})
    assert "1 are too long: refused (prompts.too_long = 'leave_out'" in shown(capsys, str(inputs.path))
    left = shown(capsys, str(inputs.path), "--set", "prompts.too_long=leave_out")
    assert "1 are too long: left out; the first is 'long'" in left


def test_a_data_set_alone_needs_a_tokenizer(inputs: Inputs, capsys: Captured) -> None:
    inputs.train.write_text('{"question": "Hi?", "answer": "Yes."}\n')
    arguments = [str(inputs.train), "--tokenizer", str(inputs.student), "--set", "prompts.columns.prompt=question"]
    text = shown(capsys, *arguments, "--set", "prompts.columns.response=answer")
    assert "data set = " in text and "given response, 5 tokens: Y│e│s│.⟦</s> 2⟧" in text
    assert "none: every word of every prompt is in its tokens" in text
    assert "needs --tokenizer" in shown(capsys, str(inputs.train), status=2)
    assert "'answer' is read by nothing" in shown(capsys, *arguments, status=2)
    assert "must be left out with a configuration" in shown(
        capsys, str(inputs.path), "--tokenizer", str(inputs.student), status=2
    )
