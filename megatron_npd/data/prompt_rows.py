"""From a row of a data set to a prompt: which field holds what, and what is refused.

`PromptsConfig` says where the chat, the plain prompt or the question lies. A field that nothing reads is refused unless
`prompts.columns.unused` names it: what vanishes unsaid is trained on wrongly.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_npd.config import PromptsConfig
from megatron_npd.config.inputs import RESERVED
from megatron_npd.data.rows import Row, Rows, open_rows, place_of
from megatron_npd.errors import UserError

SPEAKERS = ("system", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""What a turn may hold, as the field's chat templates read it."""
ALL = "*"
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt as the user's data has it: a chat, or with `prompts.format = "text"` a text."""

    name: str
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    response: Message | None = None
    """The assistant's turn that the data gives as the answer; of a text, its content alone counts."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Settings of the chat template for this prompt: the configuration's, and over them the row's own."""

    @property
    def words(self) -> str:
        """Everything that is said, to compare prompts by."""
        return self.text or "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


class RowReader:
    """Makes prompts of the rows of one data set.

    Args:
        table: the configuration's table of `config`, as messages name it.
        also_read: fields that the caller reads.

    Raises:
        UserError: a column that the configuration names is not there (the nearest that is there is named).
    """

    def __init__(
        self,
        path: str,
        kind: str,
        columns: list[str] | None,
        config: PromptsConfig,
        table: str = "prompts",
        also_read: Collection[str] = (),
    ):
        self._path, self._kind, self._config, self._table = path, kind, config, table
        self._also_read = frozenset(also_read)
        if columns is not None:
            self._check_columns(columns)

    def prompt(self, number: int, row: Row) -> Prompt:
        """The prompt of a row, which is named after its number if it has no id.

        Raises:
            UserError: the row breaks a rule; row and rule are named.
        """
        try:
            return self._prompt(number, row)
        except _RowError as error:
            raise UserError(f"{place_of(self._path, self._kind, number)}: {error}") from None

    def _prompt(self, number: int, row: Row) -> Prompt:
        columns = self._config.columns
        said, response = self._said(row), self._given_response(row)
        self._refuse_unknown(row)
        name = str(row.get(columns.id, f"{self._kind}-{number}"))
        if "\n" in name:
            raise _RowError(f"{columns.id} {name!r} must not contain a line break")
        if isinstance(said, str):
            if self._config.format == "text":
                return Prompt(name, text=_sound(said), response=response)
            said = [{"role": "user", "content": _sound(said)}]
        elif self._config.format == "text":
            raise _RowError("holds a chat; prompts.format = 'text' wants a text")
        if said[-1]["role"] == "assistant":
            if response:
                raise _RowError(f"ends with the assistant's turn and has {columns.response} as well; one is enough")
            *said, response = said
        if not said:
            raise _RowError("holds the assistant's turn alone; must hold what it answers before the last message")
        if self._config.system and said[0]["role"] != "system":
            said = [{"role": "system", "content": self._config.system}, *said]
        return Prompt(name, said, "", response, self._tools(row), self._template_kwargs(row))

    def _said(self, row: Row) -> str | list[Message]:
        """The chat, or the plain prompt."""
        columns, wrap = self._config.columns, self._config.wrap
        if wrap:
            return _wrapped(wrap, row, f"{self._table}.wrap")
        if columns.messages in row and columns.prompt in row:
            raise _RowError(
                f"has both {columns.messages} and {columns.prompt}; name one of them in {self._table}.columns.unused"
            )
        if columns.messages in row:
            return _chat(columns.messages, row[columns.messages])
        if columns.prompt in row:
            said = row[columns.prompt]
            return said if isinstance(said, str) else _chat(columns.prompt, said)
        there = ", ".join(row) or "nothing"
        raise _RowError(
            f'must have a list "{columns.messages}", or a text "{columns.prompt}", as {self._table}.columns maps names'
            f"; has {there}"
        )

    def _given_response(self, row: Row) -> Message | None:
        column = self._config.columns.response
        if column not in row or column in self._config.columns.unused:
            return None
        value = row[column]
        if isinstance(value, str):
            return {"role": "assistant", "content": _sound(value)}
        turns = _chat(column, value)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise _RowError(f"{column} must be a text, or a list of one turn, the assistant's")
        return turns[0]

    def _tools(self, row: Row) -> list[dict[str, Any]] | None:
        column = self._config.columns.tools
        value = _from_json(column, row.get(column))
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise _RowError(f"{column} must be a list of objects, or JSON text of one")
        return value

    def _template_kwargs(self, row: Row) -> dict[str, Any]:
        column = self._config.columns.chat_template_kwargs
        own = _from_json(column, row.get(column))
        if own is not None and not isinstance(own, dict):
            raise _RowError(f"{column} must be an object")
        if reserved := sorted((own or {}).keys() & set(RESERVED)):
            raise _RowError(f"{column}: {reserved[0]} is not a setting of a chat template")
        return self._config.chat_template_kwargs | (own or {})

    def _refuse_unknown(self, row: Row) -> None:
        unused = self._config.columns.unused
        unknown = [] if ALL in unused else [name for name in row if name not in self._read and name not in unused]
        if unknown:
            raise _RowError(self._unknown(unknown[0]))

    def _unknown(self, column: str) -> str:
        near = difflib.get_close_matches(column, sorted(self._read), n=1)
        mean = f" did you mean {near[0]!r}?" if near else ""
        return (
            f"{column!r} is read by nothing;{mean} map it in [{self._table}.columns], or name it in "
            f'{self._table}.columns.unused (["{ALL}"]: whatever is left over)'
        )

    @cached_property
    def _read(self) -> set[str]:
        """Names of the fields that have a meaning."""
        columns = self._config.columns
        named = {columns.id, columns.response, columns.tools, columns.chat_template_kwargs}
        said = set(_placeholders(self._config.wrap)) if self._config.wrap else {columns.messages, columns.prompt}
        return named | said | self._also_read

    def _check_columns(self, there: list[str]) -> None:
        """A table's columns are known before its rows."""
        columns, wrap = self._config.columns, self._config.wrap
        defaults = type(columns)()
        wanted = {
            f"{self._table}.columns.{key}": name
            for key, name in columns.model_dump().items()
            if key != "unused" and name != getattr(defaults, key) and not (wrap and key in ("messages", "prompt"))
        }
        wanted |= {f"{self._table}.columns.unused: {name}": name for name in columns.unused if name != ALL}
        pairs = [*wanted.items(), *((f"{self._table}.wrap", name) for name in _placeholders(wrap))]
        for key, name in pairs:
            if name not in there:
                near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)
                raise UserError(f"{key} = {name!r}: no such column in {self._path}; the nearest is {near[0]!r}")
        if not wrap and columns.messages not in there and columns.prompt not in there:
            raise UserError(
                f"{self._path}: has neither a column {columns.messages!r} nor {columns.prompt!r}; say in "
                f"[{self._table}.columns] which of its columns holds the chats or the prompts: {', '.join(there)}"
            )
        for name in there:
            if name not in self._read and name not in columns.unused and ALL not in columns.unused:
                raise UserError(f"{self._path}: column {self._unknown(name)}")


def read_prompts(path: str, config: PromptsConfig, *, trust_code: bool = False) -> Iterator[Prompt]:
    """The prompts of a data set, in this process.

    Raises:
        UserError: see `open_rows` and `RowReader`.
    """
    rows: Rows = open_rows(path, trust_code=trust_code)
    reader = RowReader(path, rows.kind, rows.columns, config)
    for batch in rows.batches(1000):
        for number, row in batch.rows():
            yield reader.prompt(number, row)


class _RowError(ValueError):
    """What is wrong with a row; who raises it does not know which row it is."""


def _chat(column: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _RowError(f'must have a non-empty list "{column}", has {type(value).__name__}')
    return [_message(turn) for turn in value]


def _message(turn: Any) -> Message:
    """A turn with its fields in a fixed order, its content one text."""
    if not isinstance(turn, dict) or turn.get("role") not in SPEAKERS:
        raise _RowError(f"each message needs a role, one of {', '.join(SPEAKERS)}")
    turn = {name: value for name, value in turn.items() if value is not None}
    if unknown := [name for name in turn if name not in MESSAGE_FIELDS]:
        raise _RowError(f"a message has {unknown[0]!r}; must have nothing but {', '.join(MESSAGE_FIELDS)}")
    if "content" not in turn and not turn.get("tool_calls"):
        raise _RowError("each message needs a content, or tool_calls")
    turn["content"] = _content(turn.get("content", ""))
    return {name: turn[name] for name in MESSAGE_FIELDS if name in turn}


def _content(value: Any) -> str:
    """A text, or the text of its parts one after another."""
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                what = part.get("type") if isinstance(part, dict) else part
                raise _RowError(f'content has a part {what!r}; parts must be {{"type": "text", "text": ...}}')
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise _RowError(f"each message needs a text as its content, or text parts; has {type(value).__name__}")
    return _sound(value)


def _sound(text: str) -> str:
    """The text, unless it is none: JSON can spell half a surrogate pair, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _RowError(f"holds half a surrogate pair at character {error.start}; must be Unicode text") from None
    return text


def _from_json(column: str, value: Any) -> Any:
    """A value, which a table may hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise _RowError(f"{column} is a text, and not JSON") from None


def _placeholders(wrap: str) -> list[str]:
    """Names of the columns in a template such as `Solve: {question}`; a doubled brace stands for itself."""
    return [name for name in _PLACEHOLDER.findall(wrap) if name]


def _wrapped(wrap: str, row: Row, key: str) -> str:
    def put(found: re.Match[str]) -> str:
        name = found.group(1)
        if name is None:
            return found.group()[0]
        if name not in row:
            raise _RowError(f"{key} wants {name!r}, which it does not have")
        return str(row[name])

    return _PLACEHOLDER.sub(put, wrap)
