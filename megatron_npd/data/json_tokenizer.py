"""A tokenizer whose ids are those of its `tokenizer.json`, whatever class tokenizer_config.json names.

The classes that transformers has for model families build normaliser, pre-tokenizer and decoder anew (since 5.0; the
older ones change parts of them) and take little more than the vocabulary from the file. A byte-level tokenizer.json
under the name LlamaTokenizerFast then loses every space: "Hello big" becomes "Hellobig". The file says all there is to
say, and other programs read it alone, so nothing of it is replaced here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_npd.data.tokenizer_settings import (
    FLAGS,
    SETTINGS_FILE,
    chat_template,
    further_special,
    named_tokens,
    token_text,
)

JSON_FILE = "tokenizer.json"


def json_tokenizer(folder: Path, settings: dict[str, Any]) -> Any:
    """A transformers tokenizer on a folder's tokenizer.json.

    `settings`, the content of tokenizer_config.json, add what the file does not hold: which tokens are the end token
    and the like, the chat template, special tokens that the file lacks, and whether plain text gets BOS and end token.
    Decoding leaves text as it is (`clean_up_tokenization_spaces` would take spaces out of it).

    Raises:
        ValueError: the settings contradict the file, or would spell control tokens out.
        Exception: whatever `tokenizers` raises of a file that is none.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if settings.get("split_special_tokens"):
        raise ValueError(f"split_special_tokens = true in {SETTINGS_FILE} would spell the control tokens of a chat out")
    backend = Tokenizer.from_file(str(folder / JSON_FILE))
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(backend, settings)
    named = named_tokens(folder, settings)
    encoder = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=further_special(settings),
        clean_up_tokenization_spaces=False,
        # A large vocabulary is looked at once more, as Mistral's may be: in this folder, not on the network.
        name_or_path=str(folder),
        local_files_only=True,
        **named,
    )
    # transformers 4 writes its own default of `add_prefix_space` into it.
    encoder.backend_tokenizer.pre_tokenizer = backend.pre_tokenizer
    encoder.backend_tokenizer.post_processor = _post_processor(encoder.backend_tokenizer, settings, named)
    encoder.chat_template = chat_template(folder, settings)
    return encoder


def _add_tokens(backend: Any, settings: dict[str, Any]) -> None:
    """Have the tokens of `added_tokens_decoder` cut out of a text first; the flags of those the file has stay.

    Raises:
        ValueError: a token would have another id than the settings say.
    """
    from tokenizers import AddedToken

    there = backend.get_added_tokens_decoder()
    for index, token in sorted(
        (int(index), token) for index, token in settings.get("added_tokens_decoder", {}).items()
    ):
        text = token_text(token)
        if index not in there:
            flags = {flag: token[flag] for flag in FLAGS if flag in token} if isinstance(token, dict) else {}
            backend.add_tokens([AddedToken(text, **flags)])
        if backend.token_to_id(text) != index:
            raise ValueError(
                f"token {text!r} has id {index} in {SETTINGS_FILE} but {backend.token_to_id(text)} by {JSON_FILE}"
            )


def _post_processor(backend: Any, settings: dict[str, Any], named: dict[str, str]) -> Any:
    """What puts BOS and end token around plain text: the file's, unless the settings say it outright."""
    from tokenizers.processors import TemplateProcessing

    if settings.get("add_bos_token") is None and settings.get("add_eos_token") is None:
        return backend.post_processor
    before, after = (named.get(name) if settings.get(f"add_{name}") else None for name in ("bos_token", "eos_token"))
    return TemplateProcessing(
        single=[*filter(None, [before]), "$A", *filter(None, [after])],
        special_tokens=[(text, backend.token_to_id(text)) for text in {before, after} if text],
    )
