"""Tokenizers, all loaded here: from tokenizer.json itself where there is one, else through transformers where it knows
them, and through SentencePiece where they are code.

A checkpoint's own code runs only where `models.trust_remote_code` says so; the token ids are the same either way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_npd.data.json_tokenizer import JSON_FILE, json_tokenizer
from megatron_npd.data.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from megatron_npd.data.tokenizer_settings import read_settings
from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.models.hf_config import find_family

VOCABULARY_FILES = (JSON_FILE, MODEL_FILE, "vocab.json")

TURN = "It is so"
"""An assistant's words that no template has of its own."""

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
    def unk_token_id(self) -> int | None:
        return self.encoder.unk_token_id

    @property
    def chat_template(self) -> str | None:
        return self.encoder.chat_template

    @property
    def ids(self) -> int:
        """Number of ids: one more than the largest. A model's embedding may have more rows, which are padding."""
        return max(self.vocabulary().values()) + 1

    @property
    def prepends_bos(self) -> bool:
        """Plain text starts with BOS."""
        return self.bos_token_id is not None and self.encoder.encode("a")[:1] == [self.bos_token_id]

    def vocabulary(self) -> dict[str, int]:
        """Text of every token -> its id."""
        return self.encoder.get_vocab()

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without the BOS that may be put before it."""
        return list(self.encoder.encode(text, add_special_tokens=False))

    def normalised(self, text: str) -> str:
        """A text as the tokenizer's own normaliser writes it before it is cut into tokens."""
        backend = getattr(self.encoder, "backend_tokenizer", None)
        if backend is None:
            return self.encoder.normalised(text) if isinstance(self.encoder, SentencePieceTokenizer) else text
        return backend.normalizer.normalize_str(text).replace("▁", " ") if backend.normalizer else text

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
        framed, bos = self.batch_ids(texts), self.bos_token_id
        if self.bos_before_chat and bos is not None:
            framed = [ids if ids[:1] == [bos] else [bos, *ids] for ids in framed]
        return framed

    def batch_ids(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
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
            tree = jinja2.Environment(extensions=[loopcontrols]).parse(template)  # parsed, never rendered
        except jinja2.TemplateError:
            return None
        return frozenset(jinja2.meta.find_undeclared_variables(tree))

    def turn_end_ids(self) -> list[int]:
        """Ids the chat template closes an assistant's turn with, the last of them a control token; [] if it cannot be
        told (it writes no control token there, or refuses such a chat).

        Nearly always a single id, such as that of <|im_end|>. Llama 2's template has a space before it. What follows
        the control token, often a line break, belongs to no turn: it is written once the next one begins.
        """
        chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": TURN}]
        try:
            text = self.encoder.apply_chat_template([chat], add_generation_prompt=False, tokenize=False)[0]
            (whole,) = self.chat_ids([chat], add_generation_prompt=False)
        except Exception:  # a template may raise anything
            return []
        _, found, after = text.rpartition(TURN)
        closing = list(self._control_pattern.finditer(after))
        if not found or not closing:
            return []
        token = self.vocabulary()[closing[0].group()]
        places = [place for place, index in enumerate(whole) if index == token]
        after_words = sum(match.group() == closing[0].group() for match in closing)
        if len(places) < after_words:
            return []
        end = places[-after_words]
        between = after[: closing[0].start()]
        start = next((start for start in range(end, -1, -1) if self.decode(whole[start:end]) == between), end)
        return whole[start : end + 1]

    def quoted_control_token(self, messages: Messages) -> str | None:
        """The first control token's text that a user's or system's own words hold, None if there is none."""
        own = (message["content"] for message in messages if message["role"] in ("user", "system"))
        return next((found.group() for found in map(self._control_pattern.search, own) if found), None)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


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
        settings = read_settings(folder)
        runs_code = trust_remote_code and code_of(settings)
        if trust_remote_code or _known_to_transformers(folder, settings):
            from_json = (folder / JSON_FILE).is_file() and not runs_code
            encoder = json_tokenizer(folder, settings) if from_json else auto_tokenizer(folder, trust_remote_code)
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


def code_of(settings: dict[str, Any]) -> Any:
    """The checkpoint's own code that its tokenizer is made of, by name; nothing where it needs none."""
    auto_map = settings.get("auto_map") or {}
    return auto_map if isinstance(auto_map, list) else auto_map.get("AutoTokenizer")


def auto_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """What transformers' AutoTokenizer makes of a folder, decoding text as it is; raises whatever it raises."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    # Said outright: left open, transformers would ask on the terminal, and wait.
    encoder = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    encoder.clean_up_tokenization_spaces = False  # it takes spaces out of a text: " ." becomes "."
    return encoder


def _known_to_transformers(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether transformers can load it without running the checkpoint's code."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    name, code = settings.get("tokenizer_class"), code_of(settings)
    if not code and (folder / JSON_FILE).is_file():
        return True
    if name or code:
        return name is not None and hasattr(transformers, name)
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in TOKENIZER_MAPPING_NAMES
