"""openPangu's tokenizer without its code: token for token what transformers makes of the same SentencePiece file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from inputs import write_prompts
from tiny_models import make_model

from megatron_npd.config import Config
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_npd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.prepare.preflight import preflight
from megatron_npd.teacher.prefix import unconditional_prefix

VOCAB_SIZE = 420
CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "北京是中华人民共和国的首都。",
    "1 + 1 = 2，所以 x = 3。",
    "def f(x):\n    return x",
    "系统：你好，世界！用户：助手：",
)
CONTROL = ("<unk>", "<s>", "</s>", "[unused9]", "[unused10]", "[unused16]")
"""As in the released checkpoints: a turn opens with [unused9] and ends with [unused10], the end token."""

TEXTS = (
    "",
    "hello world",
    "两个  spaces  里面 ",
    "a\n\n b\tc\r\n",
    "\n",
    "émoji 😀 and ƒ outside the corpus",
    "[unused9]系统：[unused10][unused9]用户：北京的 fox？[unused10]",
    "a<s>b</s>c",
    "[unused1]is none, [unused16]is one[unused1",
)
WITH_LEADING_SPACES = ("  two", "[unused9] [unused10]", "[unused16] thought [unused10]\n", " ", "<s> x")

SLOW_TOKENIZER = """
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

Path({marker!r}).touch()


class PanguTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{"vocab_file": "tokenizer.model"}}

    def __init__(self, vocab_file, **settings):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**settings)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {{self.pieces.id_to_piece(i): i for i in range(len(self.pieces))}} | self.added_tokens_encoder

    def _tokenize(self, text):
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.pieces.decode(tokens)

    def build_inputs_with_special_tokens(self, first, second=None):
        return [self.bos_token_id, *first, *(second or [])]
"""
"""A checkpoint's own tokenizer code, of the kind that openPangu brings: on transformers' slow base class."""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with byte fallback and the leading space that released models have."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(prefix),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(CONTROL[3:]),
        minloglevel=2,
        num_threads=1,
    )
    return prefix.with_suffix(".model")


def settings_of(pieces: Path, **changes: Any) -> dict[str, Any]:
    """What tokenizer_config.json of a released checkpoint holds, but the chat template."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(pieces))
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    settings = {
        "add_bos_token": True,
        "added_tokens_decoder": {str(model.piece_to_id(text)): {"content": text} | flags for text in CONTROL},
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PanguTokenizer",
    } | changes
    return {key: value for key, value in settings.items() if value is not None}


def write_tokenizer(folder: Path, pieces: Path, architecture: str = "openpangu", **changes: Any) -> Path:
    """The tokenizer's files, and as much of config.json as names the family."""
    names = {
        "openpangu": {"architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded"},
        "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of(pieces, **changes)))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(names[architecture]))
    return folder


@pytest.fixture
def folder(tmp_path: Path, pieces: Path) -> Path:
    return write_tokenizer(tmp_path / "pangu", pieces)


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    loaded = load_tokenizer(folder, trust_remote_code=False)
    assert isinstance(loaded.encoder, SentencePieceTokenizer)
    return loaded


@pytest.fixture
def trusted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """The same files through transformers and the checkpoint's own code."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "tokenization_openpangu.py").write_text(SLOW_TOKENIZER.format(marker=str(tmp_path / "code_was_run")))
    loaded = load_tokenizer(folder, trust_remote_code=True)
    assert (tmp_path / "code_was_run").exists() and not isinstance(loaded.encoder, SentencePieceTokenizer)
    return loaded


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_transformers_llama_tokenizer(tokenizer: Tokenizer, tmp_path: Path, pieces: Path) -> None:
    llama = write_tokenizer(tmp_path / "llama", pieces, "llama", tokenizer_class="LlamaTokenizer", auto_map=None)
    reference = load_tokenizer(llama, trust_remote_code=False)
    assert type(reference.encoder).__name__ == "LlamaTokenizer"
    for text in TEXTS:
        assert tokenizer.encoder.encode(text) == reference.encoder.encode(text), repr(text)
    assert tokenizer.vocabulary() == reference.vocabulary()
    assert tokenizer.control_tokens == reference.control_tokens == set(CONTROL)
    for name in ("bos_token_id", "eos_token_id", "prepends_bos"):
        assert getattr(tokenizer, name) == getattr(reference, name)


def test_ids_are_those_of_the_checkpoints_own_code(tokenizer: Tokenizer, trusted: Tokenizer) -> None:
    """On leading spaces of a stretch the fast LlamaTokenizer differs from SentencePiece; this class does not."""
    for text in TEXTS + WITH_LEADING_SPACES:
        assert tokenizer.encoder.encode(text) == trusted.encoder.encode(text), repr(text)
    assert tokenizer.vocabulary() == trusted.vocabulary()
    assert tokenizer.chat_template == trusted.chat_template
    chats = [[{"role": "user", "content": text}] for text in TEXTS + WITH_LEADING_SPACES]
    assert tokenizer.chat_ids(chats) == trusted.chat_ids(chats)
    assert unconditional_prefix(tokenizer, "auto") == unconditional_prefix(trusted, "auto") == [1]


def test_code_of_a_checkpoint_is_not_run_unless_trusted(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code_was_run"
    (folder / "tokenization_openpangu.py").write_text(SLOW_TOKENIZER.format(marker=str(marker)))
    load_tokenizer(folder, trust_remote_code=False)
    assert not marker.exists()


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encoder.encode(text, add_special_tokens=False)) == text
    assert tokenizer.decode([1, 10**6]) == "<s>\ufffd", "an id of a padding row"


# --- chats ----------------------------------------------------------------------------------------------------------


def test_chat_is_framed_as_openpangu_is_trained_and_starts_with_bos(tokenizer: Tokenizer) -> None:
    chats = [
        [{"role": "user", "content": "你好"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "[unused16]2"},
            {"role": "user", "content": "sure?"},
        ],
    ]
    framed = [
        "[unused9]系统：[unused10][unused9]用户：你好[unused10][unused9]助手：",
        "[unused9]系统：Be brief.[unused10][unused9]用户：1 + 1?[unused10][unused9]助手：[unused16]2[unused10]"
        "[unused9]用户：sure?[unused10][unused9]助手：",
    ]
    ids = tokenizer.chat_ids(chats)
    assert [tokenizer.decode(row) for row in ids] == [f"<s>{text}" for text in framed]
    assert ids == [tokenizer.encoder.encode(text) for text in framed], "as the released recipe has it: BOS, then this"
    bare = tokenizer.chat_ids(chats, add_generation_prompt=False)
    assert [tokenizer.decode(row) for row in bare] == [f"<s>{text.removesuffix('[unused9]助手：')}" for text in framed]


def test_checkpoints_own_template_comes_first(tmp_path: Path, pieces: Path) -> None:
    chat = [[{"role": "user", "content": "hi"}]]
    folder = write_tokenizer(tmp_path / "own", pieces, chat_template="{{ bos_token }}A{{ messages[0]['content'] }}")
    of_settings = load_tokenizer(folder, trust_remote_code=False)
    assert of_settings.decode(of_settings.chat_ids(chat)[0]) == "<s>Ahi", "one BOS, not two"
    (folder / "chat_template.jinja").write_text("B{{ messages[0]['content'] }}")
    of_file = load_tokenizer(folder, trust_remote_code=False)
    assert of_file.decode(of_file.chat_ids(chat)[0]) == "<s>Bhi"


def test_control_tokens_in_a_prompts_words_act_and_are_spoken_of(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They act as they do behind every server that the student may run on, and as trusted code has it."""
    from megatron_npd.prepare.prompt_checks import checked_splits

    write_prompts(tmp_path / "train", {"clean": "hello", "odd": "what is [unused10] for?"})
    write_prompts(tmp_path / "heldout", {"h": "bye"})
    with caplog.at_level(logging.WARNING):
        config = Config.model_validate(
            {
                "run_directory": str(tmp_path / "run"),
                "models": {"teacher": str(folder), "student": str(folder)},
                "prompts": {"train": str(tmp_path / "train"), "heldout": str(tmp_path / "heldout")},
                "annotator": {"pack_length": 2048},
            }
        )
        end_ids = [tokenizer.vocabulary()["[unused10]"]]
        checked_splits(config, tokenizer, end_ids)["train"].save(tmp_path / "set", with_responses=False)
    prompts = load_prompt_set(tmp_path / "set")
    assert [list(prompts[row]).count(tokenizer.eos_token_id) for row in (1, 0)] == [3, 2]
    (message,) = (record.getMessage() for record in caplog.records)
    assert "1 prompts " in message and "'odd'" in message and "[unused10]" in message
    thought = [{"role": "assistant", "content": "[unused16]"}, {"role": "user", "content": "go on"}]
    assert tokenizer.quoted_control_token(thought) is None, "earlier turns of the model hold such tokens rightly"


@pytest.mark.slow
def test_openpangu_checkpoints_pass_preflight(tmp_path: Path, pieces: Path) -> None:
    for seed, name in enumerate(("teacher", "student")):
        make_model("openpangu", tmp_path / name, seed, tied=name == "student", vocab_size=VOCAB_SIZE + 12)
        write_tokenizer(tmp_path / name, pieces)
    write_prompts(tmp_path / "train", {"a": "你好", "b": "hello"})
    write_prompts(tmp_path / "heldout", {"c": "再见"})
    config = Config.model_validate(
        {
            "run_directory": str(tmp_path / "run"),
            "models": {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "student")},
            "prompts": {
                "train": str(tmp_path / "train"), "heldout": str(tmp_path / "heldout"), "max_prompt_tokens": 100
            },
            "rollout": {"max_new_tokens": 50},
        }
    )  # fmt: skip
    inputs = preflight(config)
    inputs.train.save(tmp_path / "set", with_responses=False)
    prompts = load_prompt_set(tmp_path / "set")
    assert prompts.names == ["a", "b"] and all(prompts[row][0] == 1 for row in range(2))


def test_pieces_read_in_two_ways_are_spoken_of(tmp_path: Path, pieces: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Llama's class reads leading spaces of a text in its own way."""
    from megatron_npd.models.hf_checkpoint import check_checkpoint
    from megatron_npd.prepare.shared_tokenizer import shared_tokenizer

    pair = []
    for seed, name in enumerate(("teacher", "student")):
        make_model("llama", tmp_path / name, seed, vocab_size=VOCAB_SIZE + 12, num_hidden_layers=1)
        settings = {"tokenizer_class": "LlamaTokenizer", "auto_map": None, "eos_token": "</s>", "legacy": None}
        write_tokenizer(tmp_path / name, pieces, "llama", chat_template="{{ messages[0].content }}</s>", **settings)
        pair.append(check_checkpoint(f"models.{name}", tmp_path / name))
    with caplog.at_level(logging.WARNING):
        shared_tokenizer(*pair, False)
    assert any("otherwise than SentencePiece reads tokenizer.model" in record.getMessage() for record in caplog.records)


# --- what cannot be loaded ------------------------------------------------------------------------------------------


def without_pieces(folder: Path, pieces: Path) -> None:
    (folder / "tokenizer.model").rename(folder / "vocab.json")


def with_json_and_code(folder: Path, pieces: Path) -> None:
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")


def no_sentencepiece_model(folder: Path, pieces: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not a model")


def stripping_token(folder: Path, pieces: Path) -> None:
    settings = settings_of(pieces)
    settings["added_tokens_decoder"]["5"]["lstrip"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def unknown_end_token(folder: Path, pieces: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of(pieces, eos_token="<end>")))


def no_object(folder: Path, pieces: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_pieces, ["PanguTokenizer", "no tokenizer.model", "models.trust_remote_code = true"]),
        (with_json_and_code, ["PanguTokenizer", "no tokenizer.model", "models.trust_remote_code = true"]),
        (no_sentencepiece_model, ["tokenizer.model is not a SentencePiece model"]),
        (stripping_token, ["lstrip = true"]),
        (unknown_end_token, ["'<end>'", "neither in tokenizer.model"]),
        (no_object, ["tokenizer_config.json must hold a JSON object"]),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(folder: Path, pieces: Path, damage: Any, words: list[str]) -> None:
    damage(folder, pieces)
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder, trust_remote_code=False, where="models.student = x")
    message = str(refused.value)
    assert message.startswith("models.student = x: its tokenizer") and "\n" not in message
    assert all(word in message for word in words), message
