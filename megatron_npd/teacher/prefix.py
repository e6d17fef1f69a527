"""What the unconditional pass starts from: BOS, the bare assistant header of the chat template, or what ends a text."""

from __future__ import annotations

from megatron_npd.data.tokenizer import Tokenizer
from megatron_npd.errors import UserError


def unconditional_prefix(tokenizer: Tokenizer, mode: str, format: str = "chat") -> list[int]:
    """Token ids before the response in the unconditional pass; at least one, so that its first token is scored.

    `mode` is `selection.unconditional_prefix`: with "auto", BOS where the tokenizer itself prepends one to plain text,
    else the tokens that the chat template's generation prompt adds. (A tokenizer may name a bos_token that only ever
    opens a chat turn, as SmolLM2's does: that is no document start.) Where prompts are plain texts (`format`, that of
    the prompts), there is no header: then the end token, which is what stands before a text in pretraining.

    Raises:
        UserError: "bos" without a BOS token, a template whose generation prompt adds nothing, or plain texts and no
            token of these.
    """
    bos = tokenizer.bos_token_id
    if mode == "auto" and format == "text" and not tokenizer.prepends_bos:
        if tokenizer.eos_token_id is None:
            raise UserError("prompts.format = 'text': the tokenizer has neither BOS nor an end token to start from")
        return [int(tokenizer.eos_token_id)]
    if mode == "assistant_header" and format == "text":
        raise UserError(
            "selection.unconditional_prefix = 'assistant_header': plain texts (prompts.format) have none; use 'auto'"
        )
    if mode == "auto":
        mode = "bos" if tokenizer.prepends_bos else "assistant_header"
    if mode == "bos":
        if bos is None:
            raise UserError("selection.unconditional_prefix = 'bos': the tokenizer has no BOS token")
        return [int(bos)]
    chat = [{"role": "user", "content": "a"}]
    (without,), (whole,) = (tokenizer.chat_ids([chat], add_generation_prompt=prompt) for prompt in (False, True))
    header = [int(token) for token in whole[len(without) :]]
    if whole[: len(without)] != without or not header:
        raise UserError(
            "selection.unconditional_prefix = 'assistant_header': the chat template adds no generation prompt to "
            "take the header from; use 'bos'"
        )
    return header
