"""Prompts as token ids: thinking modes, tools, plain texts, given responses, and what is said of changed words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import TEMPLATE, THINKING, make_tokenizer

from megatron_npd.data.framing import Framed, Framer, Notes
from megatron_npd.data.prompt_rows import Prompt
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import UserError

pytestmark = pytest.mark.heavy  # transformers

END = 2
"""Id of </s>, which the template closes turns with."""


def tokenizer_of(folder: Path, template: str | None = TEMPLATE, **special: str) -> Tokenizer:
    return load_tokenizer(make_tokenizer(folder, template=template, **special), trust_remote_code=False)


def frame(tokenizer: Tokenizer, *prompts: Prompt, format: str = "chat") -> tuple[list[Framed], Notes]:
    def refuse(prompt: Prompt, what: str) -> UserError:
        return UserError(f"{prompt.name}: {what}")

    return Framer(tokenizer, format, [END]).frame(list(prompts), refuse)


def chat(*turns: str, name: str = "p", **more: Any) -> Prompt:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]
    return Prompt(name, messages, **more)


def reply(content: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, **more}


def test_thinking_may_differ_from_prompt_to_prompt(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, THINKING)
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    prompts = [chat("a", template_kwargs=off), chat("b", template_kwargs=on), chat("c"), chat("d", template_kwargs=off)]
    framed, notes = frame(tokenizer, *prompts)
    header, silent = "<s>assistant\n", "(think)(end)\n"
    assert [tokenizer.decode(one.ids) for one in framed] == [
        f"<s>user\na</s>\n{header}{silent}",
        f"<s>user\nb</s>\n{header}",
        f"<s>user\nc</s>\n{header}",
        f"<s>user\nd</s>\n{header}{silent}",
    ]
    settings = [json.loads(one.framing)["chat_template_kwargs"] for one in framed]
    assert settings == [off, on, {}, off]
    assert len({json.loads(one.framing)["chat_template"] for one in framed}) == 1
    assert not notes.found


def test_a_setting_the_template_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p: .*does not read 'enable_thinkin'; it reads enable_thinking"):
        frame(tokenizer_of(tmp_path / "a", THINKING), chat("a", template_kwargs={"enable_thinkin": False}))
    with pytest.raises(UserError, match="does not read 'enable_thinking'; it reads none"):
        frame(tokenizer_of(tmp_path / "b"), chat("a", template_kwargs={"enable_thinking": False}))


def test_what_the_template_refuses_is_named(tmp_path: Path) -> None:
    picky = "{% if messages[0]['content'] == 'b' %}{{ raise_exception('No!') }}{% endif %}" + TEMPLATE
    with pytest.raises(UserError, match="second: the chat template refuses it: No!"):
        frame(tokenizer_of(tmp_path, picky), chat("a", name="first"), chat("b", name="second"))


@pytest.mark.parametrize(
    ("template", "prompt", "words"),
    [
        (TEMPLATE.replace("message['content']", "message['content'] | trim"), chat(" a b \n"), ["whitespace", "'a b'"]),
        (TEMPLATE.replace("message['content']", "message['content'][:4]"), chat("a long one"), ["words", "a long one"]),
        (THINKING, chat("a", "(think)why(end)b", "c"), ["words in a turn of the assistant", "(think)why(end)b"]),
        (TEMPLATE, chat("a", tools=[{"function": {"name": "add"}}]), ["tools that the chat template does not show"]),
        (TEMPLATE, chat("what is </s>?"), ["control token", "</s>"]),
    ],
)
def test_changed_words_are_spoken_of(tmp_path: Path, template: str, prompt: Prompt, words: list[str]) -> None:
    _, notes = frame(tokenizer_of(tmp_path, template), chat("fine"), prompt, prompt)
    (line,) = notes.lines()
    assert line.startswith("2 prompts ") and "'p'" in line, "a count and an example"
    assert all(word in line for word in words), line


def test_words_that_the_tokenizer_changes_are_spoken_of(tmp_path: Path) -> None:
    """The tiny tokenizer has ASCII alone: the rest becomes its unknown token."""
    _, notes = frame(tokenizer_of(tmp_path), chat("naïve é", name="accents"))
    (line,) = notes.lines()
    assert (
        line.startswith("1 prompts have words that the tokenizer changes") and "'accents'" in line and "naïve" in line
    )


def test_tools_reach_the_template(tmp_path: Path) -> None:
    with_tools = "{% if tools %}tools: {{ tools[0]['function']['name'] }}\n{% endif %}" + TEMPLATE
    tokenizer = tokenizer_of(tmp_path, with_tools)
    framed, notes = frame(tokenizer, chat("a", tools=[{"function": {"name": "add"}}]), chat("b"))
    assert tokenizer.decode(framed[0].ids).startswith("tools: add\n<s>user")
    assert tokenizer.decode(framed[1].ids).startswith("<s>user")
    assert not notes.found


# --- plain texts ----------------------------------------------------------------------------------------------------


def test_plain_texts_need_no_template(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, None)
    prompts = Prompt("a", text="Once upon"), Prompt("b", text="A time", response=reply(" later"))
    framed, notes = frame(tokenizer, *prompts, format="text")
    assert [tokenizer.decode(one.ids) for one in framed] == ["Once upon", "A time"]
    assert framed[0].response_ids == []
    assert tokenizer.decode(framed[1].response_ids) == " later</s>"
    assert json.loads(framed[0].framing) == {"format": "text"}
    assert not notes.found


# --- given responses ------------------------------------------------------------------------------------------------


def test_a_given_response_is_what_the_template_writes_after_its_generation_prompt(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    framed, notes = frame(
        tokenizer, chat("a", response=reply("yes\n no")), chat("b"), chat("c", "d", "e", response=reply("f"))
    )
    assert [tokenizer.decode(one.response_ids) for one in framed] == ["yes\n no</s>", "", "f</s>"]
    assert [one.response_ids[-1:] for one in framed] == [[END], [], [END]], "its end token, and nothing after it"
    whole = [tokenizer.decode(one.ids + one.response_ids) for one in framed]
    assert whole[0] == "<s>user\na</s>\n<s>assistant\nyes\n no</s>"
    assert not notes.found


def test_a_thinking_template_decides_what_a_response_begins_with(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, THINKING)
    off = {"enable_thinking": False}
    prompts = [
        chat("a", response=reply("yes")),
        chat("a", response=reply("yes", reasoning_content="well")),
        chat("a", response=reply("yes"), template_kwargs=off),
    ]
    framed, notes = frame(tokenizer, *prompts)
    assert [tokenizer.decode(one.response_ids) for one in framed] == [
        "(think)(end)\nyes</s>",
        "(think)well(end)\nyes</s>",
        "yes</s>",
    ]
    assert not notes.found


def test_a_response_that_the_template_does_not_continue_with_is_taken_as_it_is(tmp_path: Path) -> None:
    other = TEMPLATE.replace("{% if add_generation_prompt %}<s>assistant\n", "{% if add_generation_prompt %}<s>bot\n")
    tokenizer = tokenizer_of(tmp_path, other)
    (framed,), notes = frame(tokenizer, chat("a", response=reply("yes")))
    assert tokenizer.decode(framed.response_ids) == "yes</s>"
    (line,) = notes.lines()
    assert "after its own generation prompt" in line


def test_a_response_that_the_template_changes_is_spoken_of(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, TEMPLATE.replace("message['content']", "message['content'] | trim"))
    (framed,), notes = frame(tokenizer, chat("a", response=reply("yes ")))
    assert tokenizer.decode(framed.response_ids) == "yes</s>"
    (line,) = notes.lines()
    assert "given response" in line and "whitespace" in line
