"""What a checkpoint's small files say of its tokenizer: named and special tokens, chat templates, added tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_npd.files import read_json

SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
ALL_NAMED_TOKENS = (*NAMED_TOKENS, "sep_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; {} where there is none.

    Raises:
        ValueError: it is no JSON object.
        OSError: it cannot be read.
    """
    return optional_json(folder / SETTINGS_FILE)


def named_tokens(folder: Path, settings: dict[str, Any], wanted: tuple[str, ...] = ALL_NAMED_TOKENS) -> dict[str, str]:
    """Name -> text of those of the `wanted` tokens that the checkpoint names, such as eos_token."""
    names = optional_json(folder / SPECIAL_TOKENS_FILE) | settings
    return {name: token_text(names[name]) for name in wanted if names.get(name) is not None}


def further_special(settings: dict[str, Any]) -> list[str]:
    """Texts of special tokens without a role of their own: under their old or their new name, a list or a table."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return [token_text(token) for token in (more.values() if isinstance(more, dict) else more)]


def chat_template(folder: Path, settings: dict[str, Any]) -> str | dict[str, str] | None:
    """The checkpoint's own template; several by name where it has several, as transformers has them."""
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        default = (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
        more = {
            file.stem: file.read_text(encoding="utf-8") for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
        }
        return {"default": default} | more if more else default
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template


def token_text(token: Any) -> str:
    """The text of a token, which the files write as that or as a table of it and its flags."""
    return token["content"] if isinstance(token, dict) else str(token)


def optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object")
    return value
