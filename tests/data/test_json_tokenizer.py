"""Where there is a tokenizer.json, ids are those of that file, whatever class and settings lie beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from byte_level_tokenizer import byte_level, write_byte_level
from tiny_tokenizer import TEMPLATE
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from megatron_npd.data.round_trip import SAMPLE_TEXTS, changes
from megatron_npd.data.tokenizer import load_tokenizer
from megatron_npd.errors import UserError

pytestmark = pytest.mark.heavy  # transformers

CLASSES = (
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "GPT2TokenizerFast",
    "GemmaTokenizerFast",
    "T5TokenizerFast",
    "BertTokenizerFast",
    "CodeLlamaTokenizerFast",
    "SomethingOfTheirOwnFast",
    None,
)
MODEL_TYPES = ("llama", "qwen2", "qwen3")
TEXTS = (*SAMPLE_TEXTS, "  leading", "<s> a </s>b <pad>", "")
CHAT = [[{"role": "user", "content": "Hello big\n x"}]]


def ids_of_file(folder: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def load(folder: Path) -> Any:
    return load_tokenizer(folder, trust_remote_code=False)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_the_files_whatever_class_is_named(tmp_path: Path, name: str | None, model_type: str) -> None:
    """Llama's, Gemma's, T5's and Bert's classes of transformers 5 build another tokenizer of the same vocabulary."""
    write_byte_level(tmp_path, tokenizer_class=name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": ["LlamaForCausalLM"]}))
    tokenizer = load(tmp_path)
    for text in TEXTS:
        assert tokenizer.text_ids(text) == ids_of_file(tmp_path, text), repr(text)
    assert list(changes(tokenizer)) == []
    assert tokenizer.decode(tokenizer.text_ids("Hello big\n x")) == "Hello big\n x"


OTHER_FILES = {
    "prefix space": lambda: byte_level(prefix_space=True),
    "normaliser": lambda: byte_level(normalizer=normalizers.NFC()),
    "greedy token": lambda: byte_level(AddedToken("<|x|>", lstrip=True, rstrip=True, special=True)),
    "whole words": lambda: byte_level(AddedToken("fox", single_word=True, normalized=True)),
}


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}])
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_nothing_of_the_file_is_replaced(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """transformers 4 writes its default of add_prefix_space into it; 5 takes flags from tokenizer_config.json."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    made = OTHER_FILES[kind]()
    decoder = {str(i): {"content": token.content} | flags for i, token in made.get_added_tokens_decoder().items()}
    write_byte_level(tmp_path, made, added_tokens_decoder=decoder, clean_up_tokenization_spaces=True, **settings)
    tokenizer = load(tmp_path)
    for text in (*TEXTS, "a <|x|> b", "a fox, foxes <|x|>\n"):
        assert tokenizer.text_ids(text) == ids_of_file(tmp_path, text), repr(text)
    assert tokenizer.decode(tokenizer.text_ids("x . y , z")).strip() == "x . y , z", "spaces are not cleaned up"


def test_truncation_and_padding_of_the_file_are_left_out(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(4)
    made.enable_padding(length=12)
    tokenizer = load(write_byte_level(tmp_path, made))
    assert tokenizer.text_ids("the quick brown fox jumps") == ids_of_file(tmp_path, "the quick brown fox jumps")
    assert tokenizer.decode(tokenizer.chat_ids(CHAT)[0]) == "<s>user\nHello big\n x</s>\n<s>assistant\n"


@pytest.mark.parametrize(
    ("settings", "before"), [({}, [1]), ({"add_bos_token": False}, []), ({"add_bos_token": True}, [1])]
)
def test_bos_of_plain_text(tmp_path: Path, settings: dict[str, Any], before: list[int]) -> None:
    """The file's post-processor, unless the settings say it outright; a chat never has a second one."""
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = load(write_byte_level(tmp_path, made, **settings))
    assert tokenizer.encoder.encode("the fox") == before + ids_of_file(tmp_path, "the fox")
    assert tokenizer.prepends_bos == bool(before)
    assert tokenizer.chat_ids(CHAT)[0][:2].count(1) == 1


def test_bos_that_only_the_settings_ask_for(tmp_path: Path) -> None:
    """As DeepSeek's: the file has no such post-processor."""
    template = "{{ bos_token }}" + TEMPLATE.replace("<s>", "")
    tokenizer = load(write_byte_level(tmp_path, add_bos_token=True, add_eos_token=True, chat_template=template))
    assert tokenizer.encoder.encode("x") == [1, *ids_of_file(tmp_path, "x"), 2]
    assert tokenizer.decode(tokenizer.chat_ids(CHAT)[0]) == "<s>user\nHello big\n x</s>\nassistant\n"


@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
@pytest.mark.parametrize("tokens", [["<|y|>"], [{"content": "<|y|>", "lstrip": True}], {"image_token": "<|y|>"}])
def test_special_tokens_of_every_format_are_cut_out(tmp_path: Path, key: str, tokens: Any) -> None:
    tokenizer = load(write_byte_level(tmp_path, **{key: tokens}))
    (index,) = tokenizer.text_ids("<|y|>")
    assert tokenizer.vocabulary()["<|y|>"] == index and "<|y|>" in tokenizer.control_tokens


def test_a_token_that_the_file_lacks_gets_the_id_it_is_said_to_have(tmp_path: Path) -> None:
    ids = byte_level().get_vocab_size()
    added = {str(ids): {"content": "<|y|>", "special": True}, "1": {"content": "<s>", "special": True}}
    tokenizer = load(write_byte_level(tmp_path, added_tokens_decoder=added))
    assert tokenizer.text_ids("a<|y|>")[-1] == ids and tokenizer.ids == ids + 1
    wrong = {str(ids + 1): {"content": "<|y|>", "special": True}}
    with pytest.raises(UserError, match=r"'<\|y\|>' has id \d+ in tokenizer_config.json but \d+ by tokenizer.json"):
        load(write_byte_level(tmp_path, added_tokens_decoder=wrong))


def test_templates_by_name_and_in_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}]
    assert load(write_byte_level(tmp_path, chat_template=named)).chat_template == {"default": TEMPLATE, "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("A")
    assert load(tmp_path).chat_template == "A"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("B")
    assert load(tmp_path).chat_template == {"default": "A", "tool_use": "B"}


def test_a_large_vocabulary_is_loaded_without_a_network(tmp_path: Path) -> None:
    """transformers 5 asks the Hub whether a tokenizer of more than 100,000 tokens may be Mistral's."""
    words = {f"w{number}": number for number in range(100_100)} | {"<s>": 100_100, "</s>": 100_101, "<pad>": 100_102}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert load(write_byte_level(tmp_path, made)).text_ids("w7 w100000") == [7, 100_000]
