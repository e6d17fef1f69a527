"""Does a tokenizer give a text back? Text to ids to text, on samples of what prompts and responses are made of.

A tokenizer that loses spaces or letters trains a model on other words than the user's, and says nothing: teacher and
student agree. What a tokenizer declares to change (Unicode normalisation, letter case, a leading space) is its own
affair, and worth a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_npd.data.tokenizer import Tokenizer

SAMPLE_TEXTS = (
    "Hello big\n x",
    "two  spaces,   three   and     five",
    "\n\nan empty line\n\n\nand two\n",
    "a\ttab\t\tand two",
    "trailing space \n and lines \n",
    "The year 2026, 3.14159 and 1,000,000 - isn't it? I'll say: don't!",
    "def f(x):\n    if x >= 0:\n        return {'a': [1, 2], \"b\": x ** 2}\n    # done",
    '<div class="a">&amp;</div> ; \\frac{1}{2} $x_i^2$ `code` ~/path | a@b.c',
    "éàü ñ ß Œuvre naïve café",
    "cafe\u0301 e\u0323\u0302 combined",
    "北京是中华人民共和国的首都。你好，世界！",
    "日本語のひらがなとカタカナ",
    "한국어 문장입니다",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "שלום עולם",
    "ไทยไม่มีช่องว่าง",
    "Γειά σου Κόσμε",
    "emoji 😀 👩‍👩‍👧 🇩🇪 ✓",
    "∑ ∫ ≤ √ π → ∞",
)
"""Spaces, lines, digits, code, scripts, emoji, combining characters."""


@dataclass(frozen=True)
class Change:
    """A text that does not come back as it was."""

    text: str
    becomes: str
    loses: bool
    """Words or letters are gone, or run into one another; otherwise all are there, as the tokenizer declares it."""
    unknown: str = ""
    """Characters it has no token for, which become its unknown token; of a tokenizer of whole words, such words."""


def changes(tokenizer: Tokenizer, texts: tuple[str, ...] = SAMPLE_TEXTS) -> Iterator[Change]:
    """The texts that a tokenizer changes, and how."""
    for text in texts:
        change = changed(tokenizer, text)
        if change:
            yield change


def changed(tokenizer: Tokenizer, text: str) -> Change | None:
    """How a tokenizer changes a text; None where it comes back as it was."""
    becomes = _there_and_back(tokenizer, text)
    if becomes == text:
        return None
    lacking = "".join(word for word in re.split("[ \n]+", text) if _has_unknown(tokenizer, word))
    unknown = "".join(character for character in dict.fromkeys(lacking) if _has_unknown(tokenizer, character))
    known = "".join(character for character in text if character not in unknown)
    if strange := [word for word in known.split() if _has_unknown(tokenizer, word)]:
        known = " ".join(word for word in known.split() if word not in strange)
    return Change(text, becomes, not _has_words_of(tokenizer, known), " ".join(filter(None, [unknown, *strange])))


def different_ids(one: Tokenizer, other: Tokenizer, texts: tuple[str, ...] = SAMPLE_TEXTS) -> str | None:
    """The first text to which two tokenizers give other ids; None if there is none."""
    return next((text for text in texts if one.text_ids(text) != other.text_ids(text)), None)


def _there_and_back(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.text_ids(text))


def _has_unknown(tokenizer: Tokenizer, text: str) -> bool:
    """Whether something in a text has no token and becomes the unknown one, which is seen. Not to be asked of blanks
    and line ends: those must not be unknown."""
    return tokenizer.unk_token_id in tokenizer.text_ids(text)


def _has_words_of(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the words of a text come back, as they are or as the tokenizer's normaliser writes them."""
    words, back = _words(text), _words(_there_and_back(tokenizer, text))
    return back == words or (len(back) == len(words) and back == _words(tokenizer.normalised(text)))


def _words(text: str) -> list[str]:
    """Words, whatever is between them, in one case and one Unicode form."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split()
