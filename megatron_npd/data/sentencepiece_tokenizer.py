"""A tokenizer from a bare SentencePiece file: for checkpoints whose tokenizer is code that is not to be run.

openPangu is the case in hand: `tokenizer.model`, `tokenizer_config.json`, and a Python class that transformers does not
have. What that class does is what transformers' SentencePiece tokenizers have always done, and is done here: added
tokens are cut out of the text first, wherever they stand, and each stretch between them goes to SentencePiece alone
(which puts its own leading space before it, if the file says so).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_npd.data.tokenizer_settings import (
    NAMED_TOKENS,
    chat_template,
    further_special,
    named_tokens,
    optional_json,
)

MODEL_FILE = "tokenizer.model"


class SentencePieceTokenizer:
    """The part of a transformers tokenizer that this project uses, under the same names.

    Args:
        folder: holds tokenizer.model; further, where they are there, special_tokens_map.json, added_tokens.json and
            chat_template.jinja.
        settings: the content of tokenizer_config.json.
        default_template: the chat template of a checkpoint that has none.

    Raises:
        ValueError: a file that is not what its name says, or a setting that would change the tokens.
        OSError: a file cannot be read.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], default_template: str | None = None):
        from sentencepiece import SentencePieceProcessor

        try:
            self._pieces = SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
        except RuntimeError as error:
            raise ValueError(f"{MODEL_FILE} is not a SentencePiece model ({' '.join(str(error).split())})") from None
        self.named = named_tokens(folder, settings, NAMED_TOKENS)
        self._added, self._special = self._added_tokens(folder, settings)
        self._texts = {index: text for text, index in self._added.items()}
        self._cuts = re.compile("|".join(map(re.escape, sorted(self._added, key=len, reverse=True))) or r"(?!)")
        self._adds_bos = bool(settings.get("add_bos_token", True))
        template = chat_template(folder, settings)
        self.chat_template = (template.get("default") if isinstance(template, dict) else template) or default_template

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._named_id("unk_token")

    @property
    def special_tokens(self) -> frozenset[str]:
        """Texts of the control tokens."""
        return self._special

    def get_vocab(self) -> dict[str, int]:
        """Text of every token -> its id."""
        return {self._pieces.id_to_piece(index): index for index in range(len(self._pieces))} | self._added

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; BOS before them if the tokenizer adds one and `add_special_tokens` asks for it."""
        ids = [self.bos_token_id] if add_special_tokens and self._adds_bos and self.bos_token_id is not None else []
        start = 0
        for cut in self._cuts.finditer(text):
            ids += self._encode_stretch(text[start : cut.start()])
            ids.append(self._added[cut.group()])
            start = cut.end()
        return ids + self._encode_stretch(text[start:])

    def normalised(self, text: str) -> str:
        """A text as SentencePiece's normaliser writes it before it is cut into pieces."""
        return self._pieces.normalize(text).replace("▁", " ")

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, control tokens spelled out; an id the tokenizer does not have is U+FFFD."""
        parts: list[str] = []
        stretch: list[int] = []
        for index in ids:
            if index in self._texts or not 0 <= index < len(self._pieces):
                parts += [self._pieces.decode(stretch), self._texts.get(index, "\ufffd")]
                stretch = []
            else:
                stretch.append(index)
        return "".join([*parts, self._pieces.decode(stretch)])

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        tools: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> Any:
        """One chat or several as text or, with `tokenize`, as token ids. No BOS but the template's own. `settings`:
        further variables of the template.

        Raises:
            ValueError: the tokenizer has no chat template.
            jinja2.TemplateError: the template refuses the chat.
        """
        # Not in every process that loads a tokenizer; transformers' own sandbox, so that templates mean the same.
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        if return_dict:
            raise NotImplementedError("token ids only")
        several = bool(conversation) and isinstance(conversation[0], list)
        rendered, _ = render_jinja_template(
            conversations=conversation if several else [conversation],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **self.named | settings,
        )
        chats = [self.encode(text, add_special_tokens=False) for text in rendered] if tokenize else rendered
        return chats if several else chats[0]

    def _encode_stretch(self, text: str) -> list[int]:
        return self._pieces.encode(text) if text else []

    def _named_id(self, name: str) -> int | None:
        return self._added[self.named[name]] if name in self.named else None

    def _added_tokens(self, folder: Path, settings: dict[str, Any]) -> tuple[dict[str, int], frozenset[str]]:
        """Text -> id of the tokens that SentencePiece is not asked about, and the special ones' texts."""
        added: dict[str, int] = dict(optional_json(folder / "added_tokens.json"))
        special = {*self.named.values(), *further_special(settings)}
        for index, token in settings.get("added_tokens_decoder", {}).items():
            for flag in ("lstrip", "rstrip", "single_word"):
                if token.get(flag):
                    raise ValueError(f"added token {token['content']!r} has {flag} = true, which is not supported")
            added[token["content"]] = int(index)
            if token.get("special"):
                special.add(token["content"])
        for text in special - added.keys():
            added[text] = self._piece_id(text)
        return added, frozenset(special)

    def _piece_id(self, text: str) -> int:
        index = self._pieces.piece_to_id(text)
        if self._pieces.id_to_piece(index) != text:  # what is not there has the id of the unknown token
            raise ValueError(f"special token {text!r} is neither in {MODEL_FILE} nor in added_tokens_decoder")
        return index
