"""Texts that do not come back: lost words are told apart from what a tokenizer declares to change."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_level_tokenizer import byte_level, write_byte_level
from tiny_tokenizer import make_tokenizer
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as WholeTokenizer

from megatron_npd.data.round_trip import SAMPLE_TEXTS, Change, changed, changes
from megatron_npd.data.tokenizer import Tokenizer, auto_tokenizer, load_tokenizer

pytestmark = pytest.mark.heavy  # transformers

TEXT = "Hello big\n x"


def load(folder: Path, **parts: object) -> Tokenizer:
    """A byte-level tokenizer with parts of it replaced."""
    made = byte_level()
    for name, part in parts.items():
        setattr(made, name, part)
    return load_tokenizer(write_byte_level(folder, made), trust_remote_code=False)


DECLARED = {
    "lower case": (normalizers.Lowercase(), "hello big\n x"),
    "compatible forms": (normalizers.NFKC(), None),
    "accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), None),
    "a leading space": (normalizers.Prepend(" "), " Hello big\n x"),
    "runs of spaces": (normalizers.Replace(Regex(r"\s+"), " "), "Hello big x"),
}


@pytest.mark.parametrize("kind", DECLARED)
def test_what_the_normaliser_declares_is_no_loss(tmp_path: Path, kind: str) -> None:
    normalizer, becomes = DECLARED[kind]
    found = list(changes(load(tmp_path, normalizer=normalizer)))
    assert found and not any(change.loses or change.unknown for change in found)
    if becomes:
        assert found[0] == Change(TEXT, becomes, False)


LOSSES = {
    "spaces taken out": {"normalizer": normalizers.Replace(" ", "")},
    "letters taken out": {"normalizer": normalizers.Replace(Regex("[aeiou]+ ?"), "")},
    "no decoder": {"decoder": decoders.Fuse()},
    "spaces cut off": {"pre_tokenizer": pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )},
    "no bytes": {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()},
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
def test_words_and_letters_that_vanish_are_a_loss(tmp_path: Path, kind: str) -> None:
    change = changed(load(tmp_path, **LOSSES[kind]), TEXT)
    assert change is not None and change.loses, change


def test_the_class_that_loses_every_space(tmp_path: Path) -> None:
    """The fault itself, as transformers 5 has it; 4 took these parts from the file."""
    write_byte_level(tmp_path, tokenizer_class="LlamaTokenizerFast")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    encoder = auto_tokenizer(tmp_path, trust_remote_code=False)
    if type(encoder).__name__ == "LlamaTokenizer":
        assert changed(Tokenizer(encoder, False, frozenset()), TEXT) == Change(TEXT, "Hellobigx", True)
    assert changed(load_tokenizer(tmp_path, trust_remote_code=False), TEXT) is None


def test_characters_without_a_token_are_seen_and_named(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    assert changed(tokenizer, "naïve") == Change("naïve", "na<pad><pad>ve", False, "ï")
    assert changed(tokenizer, TEXT) is None
    assert not any(change.loses for change in changes(tokenizer))


def test_a_tokenizer_of_whole_words_lacks_words_and_loses_none(tmp_path: Path) -> None:
    """Each character of an unknown word may have a token of its own."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "2": 3, "0": 4, "7": 5, "+3": 6}
    made = WholeTokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "words", made, unk_token="<pad>"), trust_remote_code=False)
    assert changed(tokenizer, "7 +3 2") is None
    assert changed(tokenizer, "2 +3 2027 7") == Change("2 +3 2027 7", "2 +3 <pad> 7", False, "2027")
    made.decoder = decoders.Fuse()
    fused = load_tokenizer(write_byte_level(tmp_path / "fused", made, unk_token="<pad>"), trust_remote_code=False)
    assert changed(fused, "2 +3 2027 7") == Change("2 +3 2027 7", "2+3<pad>7", True, "2027"), "known words run together"


def test_unknown_spaces_are_a_loss(tmp_path: Path) -> None:
    """A vocabulary of words: what is between them has no token."""
    made = byte_level()
    made.model = models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "Hello": 3, "big": 4, "x": 5}, unk_token="<pad>")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    change = changed(load_tokenizer(write_byte_level(tmp_path, made), trust_remote_code=False), TEXT)
    assert change == Change(TEXT, "Hellobigx", True)


def test_sample_texts_hold_what_prompts_are_made_of() -> None:
    text = "".join(SAMPLE_TEXTS)
    assert all(part in text for part in ("  ", "\n\n", "\t", "\n    ", "3.14", "\u0301", "\u200d", "北", "é", "ไ"))
