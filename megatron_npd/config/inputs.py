"""The configuration's tables of what goes in: where prompts lie, what holds what in a row, how they are framed, and the
held-out set."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_npd.config.section import Section
from megatron_npd.config.versions import VersionChoice

RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Names that chat templates have for other things than settings."""


class ColumnsConfig(Section):
    """Names of the fields of a row. A field that nothing reads is refused unless `unused` has it."""

    id: str = "id"
    """A name for the prompt, unique in its data set. A row without one is named after its number."""
    messages: str = "messages"
    """The chat: a list of turns with `role` (system, user, assistant, tool) and `content` (a text, or a list of text
    parts). A last turn of the assistant's is a given response."""
    prompt: str = "prompt"
    """In place of a chat, what the user says: a text (or a list of turns, as above)."""
    response: str = "response"
    """A given response: a text, or a list of the assistant's one turn."""
    tools: str = "tools"
    """Tools the chat template describes: a list of JSON schemas, or JSON text of one."""
    chat_template_kwargs: str = "chat_template_kwargs"
    """Settings of the chat template for this prompt alone, over `prompts.chat_template_kwargs`: an object."""
    unused: list[str] = Field(default_factory=list)
    """Fields that are there and left alone; "*": whatever is left over."""


class PromptsConfig(Section):
    train: str
    """The prompts of the warm-up and of the rounds: a file of JSON Lines, a parquet file or a folder of them, the
    folder of a Hugging Face data set that was saved to disk, or `hf://OWNER/NAME?config=...&split=...&revision=...`."""
    heldout: str
    """The same, never trained on: the teacher's responses to it are the fixed set of the held-out KL."""
    columns: ColumnsConfig = ColumnsConfig()
    format: Literal["chat", "text"] = "chat"
    """chat: framed by the chat template. text: a plain text that the model goes on with, for base models; it needs no
    chat template."""
    wrap: str = ""
    """What the user says, made of a row's fields: `Solve, step by step: {question}`. In place of a prompt column."""
    system: str = ""
    """The system's turn of chats that have none."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Settings of the chat template, e.g. `enable_thinking = false`. A row's own come over them."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longest prompt, tokens, chat template included."""
    too_long: Literal["refuse", "leave_out"] = "refuse"
    """What is done about a prompt longer than `max_prompt_tokens`, or a given response longer than
    `rollout.max_new_tokens`: nothing starts, or it is left out, counted, and listed in the run directory."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_kwargs(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(settings.keys() & set(RESERVED)):
            raise ValueError(f"{reserved[0]} is not a setting of a chat template")
        return settings

    @model_validator(mode="after")
    def _check_format(self) -> PromptsConfig:
        for key, value in (("system", self.system), ("chat_template_kwargs", self.chat_template_kwargs)):
            if self.format == "text" and value:
                raise ValueError(f"{key} = {value!r}: must be left out with format = 'text', which has no chat")
        return self


class HeldoutConfig(Section):
    source: Literal["teacher", "data"] = "teacher"
    """Whose responses the held-out KL is measured on: the teacher's, sampled once, or those that every held-out prompt
    brings (`prompts.columns.response`), which need no engine."""
    versions: VersionChoice = "each"
    """Of which versions it is measured: each; ends (0, the one that the rounds start from, the last); last; or these
    numbers and the last."""
