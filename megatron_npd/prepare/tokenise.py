"""Prompts, tokenised and checked before anything starts: none refused by the chat template, none too long."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_npd.data.prompts import read_chats
from megatron_npd.data.tokenizer import Messages, Tokenizer
from megatron_npd.errors import UserError

logger = logging.getLogger(__name__)

Chat = tuple[str, Messages]
"""A prompt's id and its messages."""

BATCH = 1000
"""Prompts tokenised by one call: the tokenizer works through them in parallel."""


@dataclass(frozen=True)
class TokenisedPrompts:
    """A prompt file after the chat template: `token_ids[i]` belongs to the prompt the user named `names[i]`."""

    names: list[str]
    token_ids: list[list[int]]

    def __str__(self) -> str:
        lengths = [len(ids) for ids in self.token_ids]
        return f"{len(lengths)} prompts, {sum(lengths)} tokens, the longest {max(lengths)}"


def tokenised_splits(
    tokenizer: Tokenizer, train: str, heldout: str, limit: int
) -> tuple[TokenisedPrompts, TokenisedPrompts]:
    """Read and tokenise the training and the held-out prompts; `limit` is prompts.max_prompt_tokens.

    Raises:
        UserError: a broken file or line, a prompt the chat template refuses or that is longer than `limit` tokens,
            or one that is in both files.
    """
    train_chats, heldout_chats = read_chats(train), read_chats(heldout)
    seen = {_text(messages): name for name, messages in train_chats}
    for name, messages in heldout_chats:
        if _text(messages) in seen:
            raise UserError(
                f"{heldout}: prompt {name!r} has the text of prompt {seen[_text(messages)]!r} in {train}; held-out "
                "prompts must not be trained on"
            )
    return _tokenise(tokenizer, train, train_chats, limit), _tokenise(tokenizer, heldout, heldout_chats, limit)


def _tokenise(tokenizer: Tokenizer, path: str, chats: list[Chat], limit: int) -> TokenisedPrompts:
    _warn_of_control_tokens(tokenizer, path, chats)
    token_ids = [ids for batch in _batches(chats) for ids in _apply_template(tokenizer, path, batch)]
    names = [name for name, _ in chats]
    too_long = [(name, len(ids)) for name, ids in zip(names, token_ids, strict=True) if len(ids) > limit]
    if too_long:
        name, length = too_long[0]
        more = f" ({len(too_long)} such prompts, the longest {max(n for _, n in too_long)})" if too_long[1:] else ""
        raise UserError(
            f"{path}: prompt {name!r} has {length} tokens; must not exceed prompts.max_prompt_tokens = {limit}{more}"
        )
    return TokenisedPrompts(names, token_ids)


def _warn_of_control_tokens(tokenizer: Tokenizer, path: str, chats: list[Chat]) -> None:
    """Say where a prompt's own words hold the text of a control token: it becomes one (see `Tokenizer.chat_ids`)."""
    quoting = [(name, token) for name, chat in chats if (token := tokenizer.quoted_control_token(chat)) is not None]
    if quoting:
        logger.warning(
            "%s: %d prompts hold the text of a control token, which acts as one there as everywhere; the first is %r "
            "with %s", path, len(quoting), *quoting[0],
        )  # fmt: skip


def _apply_template(tokenizer: Tokenizer, path: str, chats: list[Chat]) -> list[list[int]]:
    try:
        return tokenizer.chat_ids([messages for _, messages in chats])
    except Exception as error:  # a template may raise anything; find the prompt it refuses
        if len(chats) == 1:
            raise UserError(f"{path}: prompt {chats[0][0]!r}: the chat template refuses it: {error}") from None
        return [ids for chat in chats for ids in _apply_template(tokenizer, path, [chat])]


def _batches(chats: list[Chat]) -> Iterator[list[Chat]]:
    for start in range(0, len(chats), BATCH):
        yield chats[start : start + BATCH]


def _text(messages: Messages) -> str:
    return json.dumps([(message["role"], message["content"]) for message in messages])
