"""What preflight says of tokenizers that are usable, but not as a user may think."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from byte_level_tokenizer import byte_level, write_byte_level
from inputs import Inputs, token_ids
from tiny_models import EOS, make_llama
from tiny_tokenizer import TEMPLATE, make_tokenizer
from tokenizers import normalizers

from megatron_npd.cli import main
from megatron_npd.errors import UserError
from megatron_npd.files import read_json, write_json
from megatron_npd.models.hf_checkpoint import check_checkpoint
from megatron_npd.prepare.preflight import preflight
from megatron_npd.prepare.shared_tokenizer import shared_tokenizer

ROWS = 320


@pytest.fixture
def byte_level_pair(tmp_path: Path) -> Inputs:
    """Two models with rows for the byte-level tokenizer's ids."""
    for seed, name in enumerate(("teacher", "student")):
        make_llama(tmp_path / name, seed, vocab_size=ROWS, num_hidden_layers=1)
        write_byte_level(tmp_path / name, tokenizer_class="PreTrainedTokenizerFast")
    return Inputs(tmp_path)


def warnings_of(inputs: Inputs, caplog: pytest.LogCaptureFixture, trust: bool = False) -> list[str]:
    """What the check of the pair warns of."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="megatron_npd.prepare.tokenizer_notes"):
        pair = (check_checkpoint(f"models.{folder.name}", folder) for folder in (inputs.teacher, inputs.student))
        shared_tokenizer(*pair, trust)
    return [record.getMessage() for record in caplog.records]


def set_end(inputs: Inputs, *ids: int) -> None:
    for folder in (inputs.teacher, inputs.student):
        path = folder / "generation_config.json"
        write_json(path, read_json(path) | {"eos_token_id": list(ids)})


def test_nothing_is_said_of_a_tokenizer_that_gives_every_text_back(
    byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(byte_level_pair, caplog) == []


def test_a_class_that_loses_spaces_elsewhere_is_spoken_of(
    byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    """This run's ids are right; those of whoever loads the student by AutoTokenizer are not."""
    for folder in (byte_level_pair.teacher, byte_level_pair.student):
        write_byte_level(folder, tokenizer_class="LlamaTokenizerFast")
    (message,) = warnings_of(byte_level_pair, caplog)
    assert "AutoTokenizer reads 'Hello big\\n x' as 'Hellobigx'" in message and "tokenizer.json itself" in message
    prompts = preflight(byte_level_pair.config).train
    assert token_ids(prompts)[0] == preflight_ids(byte_level_pair, "What is 0 plus 0?")


def preflight_ids(inputs: Inputs, text: str) -> list[int]:
    from tokenizers import Tokenizer

    framed = f"<s>user\n{text}</s>\n<s>assistant\n"
    return Tokenizer.from_file(str(inputs.student / "tokenizer.json")).encode(framed).ids


def test_a_class_that_cannot_be_loaded_elsewhere_is_spoken_of(
    byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (byte_level_pair.teacher, byte_level_pair.student):
        write_byte_level(folder, tokenizer_class="T5TokenizerFast")
    (message,) = warnings_of(byte_level_pair, caplog)
    assert "AutoTokenizer cannot load it" in message


def test_what_a_normaliser_changes_is_spoken_of_with_a_count_and_an_example(
    byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (byte_level_pair.teacher, byte_level_pair.student):
        write_byte_level(folder, byte_level(normalizer=normalizers.Lowercase()), tokenizer_class="TokenizersBackend")
    messages = [message for message in warnings_of(byte_level_pair, caplog) if "AutoTokenizer" not in message]
    assert len(messages) == 2, "of teacher and of student"
    assert all("letter case" in message and "'hello big\\n x'" in message for message in messages), messages


def test_characters_without_a_token_are_spoken_of(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    messages = warnings_of(inputs, caplog)
    found = [message for message in messages if "no token for characters or words of" in message]
    assert found and "<pad>" in found[0], messages


# --- the end of a turn ----------------------------------------------------------------------------------------------

CHATML = TEMPLATE.replace("</s>", "<|im_end|>")


def test_a_turn_that_closes_with_no_end_token_is_spoken_of(
    byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    made = byte_level("<|im_end|>")
    index = made.token_to_id("<|im_end|>")
    for folder in (byte_level_pair.teacher, byte_level_pair.student):
        write_byte_level(folder, made, chat_template=CHATML)
    (message,) = warnings_of(byte_level_pair, caplog)
    assert f"'<|im_end|>' (id {index}), which is no end token ('</s>', id {EOS})" in message
    assert "past the end of the turn" in message and "eos_token_id" in message
    set_end(byte_level_pair, EOS, index)
    assert warnings_of(byte_level_pair, caplog) == []


# --- a teacher that knows more --------------------------------------------------------------------------------------


def test_a_teachers_surplus_is_usable_and_spoken_of(byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    write_byte_level(byte_level_pair.teacher, byte_level(*(f"<|more {number}|>" for number in range(5))))
    (message,) = warnings_of(byte_level_pair, caplog)
    assert "has 5 tokens that models.student" in message and "'<|more 2|>', ..." in message
    assert main(["check", str(byte_level_pair.path)]) == 0


def test_the_students_tokenizer_frames_the_prompts(byte_level_pair: Inputs) -> None:
    write_byte_level(byte_level_pair.teacher, byte_level("plus"))
    prompts = preflight(byte_level_pair.config).train
    assert token_ids(prompts)[0] == preflight_ids(byte_level_pair, "What is 0 plus 0?")


def test_end_tokens_of_the_surplus_do_not_end_a_response(
    byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    made = byte_level("<|more|>")
    write_byte_level(byte_level_pair.teacher, made, eos_token="<|more|>")
    path = byte_level_pair.teacher / "generation_config.json"
    write_json(path, read_json(path) | {"eos_token_id": [EOS, made.token_to_id("<|more|>")]})
    surplus, ends = warnings_of(byte_level_pair, caplog)
    assert "has 1 tokens" in surplus
    assert "ends responses with '<|more|>' as well" in ends and "only '</s>', id 2 end a response" in ends


def test_a_student_that_knows_more_is_refused(byte_level_pair: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    write_byte_level(byte_level_pair.student, byte_level("<|more|>"))
    with pytest.raises(UserError, match=r"'<\|more\|>' has id none against id"):
        warnings_of(byte_level_pair, caplog)


def test_a_surplus_needs_rows_of_the_teacher_only(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    make_llama(inputs.teacher, 0, vocab_size=160)
    make_tokenizer(inputs.teacher, more=tuple(f"m{number}" for number in range(40)))
    assert any("has 40 tokens" in message for message in warnings_of(inputs, caplog))
    make_llama(inputs.teacher, 0, vocab_size=128)
    with pytest.raises(UserError, match=r"128 embedding rows.*139 ids"):
        warnings_of(inputs, caplog)


# --- code of a checkpoint -------------------------------------------------------------------------------------------

CODE = """
from transformers import PreTrainedTokenizerFast


class TheirTokenizer(PreTrainedTokenizerFast):
    def {method}(self, *arguments, **settings):
        return super().{method}(*arguments, **settings)
"""
"""A class with an `__init__` of its own is one that transformers 5 builds a tokenizer for, as it does for Llama's."""


@pytest.mark.parametrize("changes", [False, True])
def test_trusted_code_must_give_the_ids_of_the_file(
    byte_level_pair: Inputs,
    changes: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = {"AutoTokenizer": [None, f"their_tokenizer_{changes}.TheirTokenizer"]}
    for folder in (byte_level_pair.teacher, byte_level_pair.student):
        write_byte_level(folder, tokenizer_class="TheirTokenizer", auto_map=code)
        (folder / f"their_tokenizer_{changes}.py").write_text(CODE.format(method="__init__" if changes else "encode"))
    if changes:
        with pytest.raises(UserError, match=r"its code gives 'Hello big.* other ids than its tokenizer.json"):
            warnings_of(byte_level_pair, caplog, trust=True)
    else:
        assert warnings_of(byte_level_pair, caplog, trust=True) == []
