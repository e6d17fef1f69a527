"""Tokenizers, all loaded here: through transformers where it knows them, through SentencePiece where they are code.

A checkpoint's own code runs only where `models.trust_remote_code` says so; the token ids are the same either way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_npd.data.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.models.hf_config import find_family

VOCABULARY_FILES = ("tokenizer.json", MODEL_FILE, "vocab.json")

Messages = list[dict[str, Any]]
"""One chat: role and content of each turn."""


@dataclass(frozen=True)
class Tokenizer:
    """What this project needs of a tokenizer, whoever does the work."""

    encoder: Any
    """A transformers tokenizer, or a `SentencePieceTokenizer`."""
    bos_before_chat: bool
    """A chat starts with BOS although the template writes none (`models.families.family.Family`)."""
    control_tokens: frozenset[str]
    """Texts that become control tokens wherever they stand, in a user's words as well."""

    @property
    def bos_token_id(self) -> int | None:
        return self.encoder.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        return self.encoder.eos_token_id

    @property
    def chat_template(self) -> str | None:
        return self.encoder.chat_template

    @property
    def prepends_bos(self) -> bool:
        """Plain text starts with BOS."""
        return self.bos_token_id is not None and self.encoder.encode("a")[:1] == [self.bos_token_id]

    def vocabulary(self) -> dict[str, int]:
        """Text of every token -> its id."""
        return self.encoder.get_vocab()

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, control tokens spelled out."""
        return self.encoder.decode(ids)

    def chat_ids(self, chats: list[Messages], add_generation_prompt: bool = True) -> list[list[int]]:
        """Token ids of chats, framed by the chat template; raises whatever the template raises.

        A control token's text inside a message becomes that control token, as it does in transformers and in every
        server the student may run behind: a student must see the same ids in training as in use, and earlier turns
        may well hold such tokens (thoughts, tool calls). `quoted_control_token` finds them, so that preflight can warn.
        """
        return self.framed_ids(self.chat_texts(chats, add_generation_prompt))

    def chat_texts(
        self,
        chats: list[Messages],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Chats as the chat template writes them; raises whatever it raises. `settings`: see `template_settings`."""
        return self.encoder.apply_chat_template(
            chats, add_generation_prompt=add_generation_prompt, tokenize=False, tools=tools, **settings
        )

    def framed_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of what `chat_texts` gave, BOS before them where the model wants one."""
        framed, bos = self.text_ids(texts), self.bos_token_id
        if self.bos_before_chat and bos is not None:
            framed = [ids if ids[:1] == [bos] else [bos, *ids] for ids in framed]
        return framed

    def text_ids(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of texts; `add_special_tokens`: with what the tokenizer puts around a plain text."""
        if isinstance(self.encoder, SentencePieceTokenizer):
            return [self.encoder.encode(text, add_special_tokens) for text in texts]
        encoded = self.encoder(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, return_token_type_ids=False
        )
        return encoded["input_ids"]

    def texts(self, sequences: list[list[int]]) -> list[str]:
        """The texts of token ids, control tokens spelled out, nothing tidied up."""
        if backend := getattr(self.encoder, "backend_tokenizer", None):
            return backend.decode_batch(sequences, skip_special_tokens=False)
        return [self.decode(ids) for ids in sequences]

    def turn_end_ids(self) -> list[int]:
        return []

    def spaced(self, text: str) -> str:
        """A text with every control token apart from the words around it."""
        return self._control_pattern.sub(lambda found: f" {found.group()} ", text)

    @cached_property
    def template_settings(self) -> frozenset[str] | None:
        """Names of the variables that the chat template reads; None: it cannot be told."""
        import jinja2
        import jinja2.meta
        from jinja2.ext import loopcontrols

        # transformers' own tag, which marks what an assistant said and changes nothing.
        template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.chat_template or "")
        try:
            tree = jinja2.Environment(extensions=[loopcontrols]).parse(template)  # noqa: S701: parsed, not rendered
        except jinja2.TemplateError:
            return None
        return frozenset(jinja2.meta.find_undeclared_variables(tree))

    def quoted_control_token(self, messages: Messages) -> str | None:
        """The first control token's text that a user's or system's own words hold, None if there is none."""
        own = (message["content"] for message in messages if message["role"] in ("user", "system"))
        return next((found.group() for found in map(self._control_pattern.search, own) if found), None)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")


def load_tokenizer(folder: Path, *, trust_remote_code: bool, where: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        trust_remote_code: the configuration's `models.trust_remote_code`.
        where: how messages name the checkpoint; its folder if None.

    Raises:
        UserError: there is none, it cannot be read, or it is code that is not trusted.
    """
    where = where or str(folder)
    # Without this check transformers makes up an empty tokenizer from config.json.
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(f"{where}: no tokenizer in it; must hold one of {', '.join(VOCABULARY_FILES)}")
    family = find_family(folder)
    template = family.chat_template if family else None
    try:
        settings = _settings(folder)
        if trust_remote_code or _known_to_transformers(folder, settings):
            encoder: Any = _from_transformers(folder, trust_remote_code)
            control = frozenset(token.content for token in encoder.added_tokens_decoder.values() if token.special)
        elif (folder / MODEL_FILE).is_file():
            encoder = SentencePieceTokenizer(folder, settings, template)
            control = encoder.special_tokens
        else:
            raise UserError(
                f"{where}: its tokenizer {settings.get('tokenizer_class', '')} is code of the checkpoint and there is "
                f"no {MODEL_FILE} to do without; set models.trust_remote_code = true to run that code"
            )
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes a loader raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: its tokenizer cannot be loaded: {reason}") from None
    if encoder.chat_template is None:
        encoder.chat_template = template
    return Tokenizer(encoder, family is not None and family.bos_before_chat, control)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} must hold a JSON object")
    return settings


def _known_to_transformers(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether transformers can load it without running the checkpoint's code."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    name = settings.get("tokenizer_class")
    auto_map = settings.get("auto_map") or {}
    code = auto_map if isinstance(auto_map, list) else auto_map.get("AutoTokenizer")
    if not code and (folder / "tokenizer.json").is_file():
        return True
    if name or code:
        return name is not None and hasattr(transformers, name)
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in TOKENIZER_MAPPING_NAMES


def _from_transformers(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    # Said outright: left open, transformers would ask on the terminal, and wait.
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
