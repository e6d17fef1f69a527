"""A tokenizer of single ASCII characters with a chat template: real files that fit the vocabulary of `tiny_models`."""

from __future__ import annotations

from pathlib import Path

SPECIAL = ("<pad>", "<s>", "</s>")
"""Ids 0, 1 and 2: as `tiny_models.make_llama` has them."""

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)

THINKING = (
    "{% for message in messages %}<s>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% if loop.last %}(think){{ message.get('reasoning_content', '') }}(end)\n{% endif %}"
    "{{ message['content'].split('(end)')[-1].strip() }}"
    "{% else %}{{ message['content'] }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}(think)(end)\n{% endif %}{% endif %}"
)
"""As Qwen3's: thinking is switched off by an empty thought before the answer, and earlier thoughts are dropped."""


def make_tokenizer(
    folder: Path, *, template: str | None = TEMPLATE, more: tuple[str, ...] = (), **special: str
) -> Path:
    """Write a tokenizer of 3 special tokens, 96 characters and the tokens `more` into `folder`.

    `special` overrides the special tokens, e.g. `eos_token="<s>"`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # What the byte-level pre-tokenizer makes of a newline, of a space, and of the printable characters.
    characters = ["Ċ", "Ġ", *map(chr, range(33, 127))]
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *characters, *more))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"pad_token": "<pad>", "unk_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | special
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder
