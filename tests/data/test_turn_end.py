"""What a chat template closes an assistant's turn with."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_level_tokenizer import byte_level, write_byte_level
from tiny_tokenizer import TEMPLATE, make_tokenizer

from megatron_npd.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.heavy  # transformers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
TWO_TOKENS = "{% for m in messages %}{{ m['content'] }}<|im_end|></s>{% endfor %}"
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
NO_CONTROL = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
REFUSES = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('No!') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA_2, [" ", "</s>"]),
        (TWO_TOKENS, ["<|im_end|>"]),
        (THINKING, ["<|im_end|>"]),
        (NO_CONTROL, []),
        (REFUSES, []),
    ],
)
def test_ids_up_to_the_first_control_token(tmp_path: Path, template: str, closing: list[str]) -> None:
    made = byte_level("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = load_tokenizer(write_byte_level(tmp_path, made, chat_template=template), trust_remote_code=False)
    ids = tokenizer.turn_end_ids()
    assert [tokenizer.decode([index]) for index in ids] == closing
    if ids:
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes"}]
        (whole,) = tokenizer.chat_ids([chat], add_generation_prompt=False)
        assert tokenizer.decode(whole).rpartition("Yes")[2].startswith("".join(closing))
        assert any(whole[at : at + len(ids)] == ids for at in range(len(whole)))


def test_tiny_tokenizer_closes_with_its_end_token(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, template=TEMPLATE)
    assert load_tokenizer(tmp_path, trust_remote_code=False).turn_end_ids() == [2]
