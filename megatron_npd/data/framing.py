"""From prompts to token ids: framed by the chat template or as plain text, and what was changed on the way.

Whoever frames them, a prompt becomes the ids that the student will see in use. What a template or a tokenizer makes of
the user's words is not always these words: templates trim, drop earlier thoughts, leave out what they do not know;
tokenizers normalise. Each prompt is read back, and what differs is noted with a count and an example.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_npd.data.prompt_rows import Message, Prompt
from megatron_npd.data.tokenizer import Tokenizer
from megatron_npd.errors import UserError

Refuse = Callable[[Prompt, str], UserError]
"""Makes the error that says what is wrong with a prompt."""

SNIPPET = 60
"""Characters of an example."""


@dataclass(frozen=True)
class Framed:
    """One prompt as token ids."""

    ids: list[int]
    response_ids: list[int]
    """Of the given response, its end token included; empty without one."""
    framing: str
    """JSON: how it was framed (`Framer.describe`)."""


@dataclass
class Notes:
    """What is to be said about a set of prompts: what it is -> how many prompts it concerns, and the first of them."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, what: str, example: str, count: int = 1) -> None:
        """`what` reads on after a number of prompts."""
        before, first = self.found.get(what, (0, example))
        self.found[what] = before + count, first

    def merge(self, other: Notes) -> None:
        """Take in those of later prompts."""
        for what, (count, example) in other.found.items():
            self.add(what, example, count)

    def lines(self) -> Iterator[str]:
        """For people."""
        for what, (count, example) in self.found.items():
            yield f"{count:,} prompts {what}; the first is {example}"


class Framer:
    """Frames prompts with one tokenizer.

    Args:
        format: `prompts.format`; chat needs a tokenizer with a chat template.
        end_ids: tokens that end a response.
    """

    def __init__(self, tokenizer: Tokenizer, format: str, end_ids: list[int]):
        self._tokenizer, self._is_text = tokenizer, format == "text"
        template = (tokenizer.chat_template or "").encode()
        self._template_hash = hashlib.sha256(template).hexdigest()[:16]
        self._end = self._end_token(end_ids)
        self._end_text = tokenizer.decode([self._end])

    def frame(self, prompts: list[Prompt], refuse: Refuse) -> tuple[list[Framed], Notes]:
        """Token ids of prompts.

        Raises:
            UserError: the template refuses a prompt, or does not know one of its settings.
        """
        notes = Notes()
        if self._is_text:
            return self._plain(prompts, notes), notes
        alike: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            alike.setdefault(json.dumps([prompt.tools, prompt.template_kwargs], sort_keys=True), []).append(index)
        framed: dict[int, Framed] = {}
        for indices in alike.values():
            members = [prompts[index] for index in indices]
            self._check_settings(members[0], refuse)
            framed |= zip(indices, self._chats(members, refuse, notes), strict=True)
        return [framed[index] for index in range(len(prompts))], notes

    def describe(self, template_kwargs: dict[str, Any]) -> str:
        """How prompts with these settings are framed, JSON."""
        if self._is_text:
            return json.dumps({"format": "text"})
        return json.dumps(
            {"format": "chat", "chat_template": self._template_hash, "chat_template_kwargs": template_kwargs},
            sort_keys=True,
        )

    def _plain(self, prompts: list[Prompt], notes: Notes) -> list[Framed]:
        texts = [prompt.text for prompt in prompts]
        ids = self._tokenizer.batch_ids(texts, add_special_tokens=True)
        # Some tokenizers end a text: what is to be gone on with has no end yet.
        ids = [row[:-1] if len(row) > 1 and row[-1] == self._tokenizer.eos_token_id else row for row in ids]
        self._read_back(prompts, texts, ids, notes)
        replies = self._tokenizer.batch_ids([str((p.response or {}).get("content", "")) for p in prompts])
        framing = self.describe({})
        return [
            Framed(row, [*reply, self._end] if prompt.response else [], framing)
            for prompt, row, reply in zip(prompts, ids, replies, strict=True)
        ]

    def _chats(self, prompts: list[Prompt], refuse: Refuse, notes: Notes) -> list[Framed]:
        """Prompts that share their tools and settings."""
        texts = self._render(prompts, [prompt.messages for prompt in prompts], True, refuse)
        ids = self._tokenizer.framed_ids(texts)
        for prompt, text in zip(prompts, texts, strict=True):
            self._note_dropped(prompt, text, notes)
        self._read_back(prompts, texts, ids, notes)
        replies = self._replies(prompts, texts, refuse, notes)
        framing = self.describe(prompts[0].template_kwargs)
        return [Framed(row, reply, framing) for row, reply in zip(ids, replies, strict=True)]

    def _replies(self, prompts: list[Prompt], texts: list[str], refuse: Refuse, notes: Notes) -> list[list[int]]:
        """Token ids of the given responses, as the template writes them after its generation prompt, and the end."""
        answered = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if prompt.response]
        if not answered:
            return [[] for _ in prompts]
        chats = [[*prompt.messages, prompt.response or {}] for prompt, _ in answered]
        whole = self._render([prompt for prompt, _ in answered], chats, False, refuse)
        tails = [self._tail(prompt, text, full, notes) for (prompt, text), full in zip(answered, whole, strict=True)]
        ids = iter(self._tokenizer.batch_ids(tails))
        return [[*next(ids), self._end] if prompt.response else [] for prompt in prompts]

    def _tail(self, prompt: Prompt, text: str, full: str, notes: Notes) -> str:
        """What the assistant says after the generation prompt, without its end."""
        content = str((prompt.response or {}).get("content", ""))
        if not full.startswith(text):
            notes.add(
                "have a given response that the template does not write after its own generation prompt; its text is "
                "taken as it is",
                _example(prompt, full[len(text) - SNIPPET :]),
            )
            return content
        tail = full[len(text) :]
        if self._end_text in tail:
            tail = tail[: tail.rindex(self._end_text)]
        if content not in tail:
            what = "whitespace of" if " ".join(content.split()) in " ".join(tail.split()) else "words of"
            notes.add(f"have a given response of which the template changes {what} it", _example(prompt, content))
        return tail

    def _render(self, prompts: list[Prompt], chats: list[list[Message]], open_ended: bool, refuse: Refuse) -> list[str]:
        """Chats of these prompts as texts, ready for the assistant's turn if `open_ended`."""
        try:
            return self._tokenizer.chat_texts(chats, open_ended, prompts[0].tools, **prompts[0].template_kwargs)
        except Exception as error:  # a template may raise anything; find the prompt it refuses
            if len(chats) == 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise refuse(prompts[0], f"the chat template refuses it: {reason}") from None
            pairs = zip(prompts, chats, strict=True)
            return [text for prompt, chat in pairs for text in self._render([prompt], [chat], open_ended, refuse)]

    def _note_dropped(self, prompt: Prompt, text: str, notes: Notes) -> None:
        """Words of the user's that the template leaves out or changes."""
        for message in prompt.messages:
            for name in ("content", "reasoning_content"):
                words = message.get(name, "")
                if words in text:
                    continue
                kind = "whitespace" if " ".join(words.split()) in " ".join(text.split()) else "words"
                notes.add(
                    f"have {kind} in a turn of the {message['role']} that the chat template changes or drops",
                    _example(prompt, words),
                )
        if prompt.tools and not any(str(tool.get("function", tool).get("name", "")) in text for tool in prompt.tools):
            notes.add("have tools that the chat template does not show", repr(prompt.name))
        if token := self._tokenizer.quoted_control_token(prompt.messages):
            notes.add(
                "hold the text of a control token, which acts as one there as everywhere",
                f"{prompt.name!r} with {token}",
            )

    def _read_back(self, prompts: list[Prompt], texts: list[str], ids: list[list[int]], notes: Notes) -> None:
        """Note where token ids say something else than the text they are of."""
        for prompt, text, back in zip(prompts, texts, self._tokenizer.texts(ids), strict=True):
            if back == text or (said := self._words(text)) == (read := self._words(back)):
                continue
            pairs = zip([*said, ""], [*read, ""], strict=False)
            word, other = next(((a, b) for a, b in pairs if a != b), ("", ""))
            notes.add(
                "have words that the tokenizer changes",
                f"{prompt.name!r}, where {word[:SNIPPET]!r} becomes {other[:SNIPPET]!r}",
            )

    def _words(self, text: str) -> list[str]:
        """Words of a text; control tokens apart, for a decoder may put spaces around them, and BOS before them all."""
        return self._tokenizer.spaced(text).removeprefix(self._bos_text).split()

    @property
    def _bos_text(self) -> str:
        bos = self._tokenizer.bos_token_id
        return "" if bos is None else f" {self._tokenizer.decode([bos])} "

    def _check_settings(self, prompt: Prompt, refuse: Refuse) -> None:
        known = self._tokenizer.template_settings
        unknown = sorted(prompt.template_kwargs.keys() - known) if known is not None else []
        if unknown:
            readable = ", ".join(sorted((known or frozenset()) - {"messages", "tools", "add_generation_prompt"}))
            raise refuse(
                prompt,
                f"chat_template_kwargs: the chat template does not read {unknown[0]!r}; it reads {readable or 'none'}",
            )

    def _end_token(self, end_ids: list[int]) -> int:
        """What ends a given response: as the template closes a turn, if generation stops there too."""
        closing = [] if self._is_text else self._tokenizer.turn_end_ids()[-1:]
        preferred = [*closing, self._tokenizer.eos_token_id]
        return next((token for token in preferred if token is not None and token in end_ids), end_ids[0])


def _example(prompt: Prompt, text: str) -> str:
    short = " ".join(text.split())
    return f"{prompt.name!r}: {short[:SNIPPET]!r}" + ("..." if len(short) > SNIPPET else "")
