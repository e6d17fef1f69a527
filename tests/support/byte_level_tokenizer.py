"""A byte-level tokenizer.json, as Llama 3, Qwen and DeepSeek have it, of few tokens; made by `tokenizers` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_tokenizer import TEMPLATE
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = ["Hello big x the quick brown fox jumps over the lazy dog\n"] * 5
SPECIAL = ("<pad>", "<s>", "</s>")
"""Ids 0, 1 and 2, as `tiny_models.make_llama` has them."""


def byte_level(
    *added: AddedToken | str, normalizer: normalizers.Normalizer | None = None, prefix_space: bool = False
) -> Tokenizer:
    """259 tokens and more of the corpus, and those `added`."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [token if isinstance(token, AddedToken) else AddedToken(token, special=True) for token in added]
    )
    return tokenizer


def write_byte_level(folder: Path, tokenizer: Tokenizer | None = None, **settings: Any) -> Path:
    """tokenizer.json and a tokenizer_config.json with `settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | settings))
    return folder
