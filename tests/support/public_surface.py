"""What users and their scripts rely on, one line a thing: `tests/public_surface.txt` holds it as it is meant to be.

python tests/support/public_surface.py     writes that file anew, when a change is meant; it shows in review
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
FROZEN = ROOT / "tests" / "public_surface.txt"
SELF_EVIDENT = ("-h", "--help")


def light_surface() -> Iterator[str]:
    """Configuration keys with defaults, commands with options, metrics and events: nothing is loaded or run for it."""
    from megatron_npd.cli import _parser
    from megatron_npd.config import Config
    from megatron_npd.schema import Event, StepMetric, Verdict

    yield from _keys(Config)
    yield from _commands(_parser())
    yield from (f"metric of a step: {name}" for name in StepMetric)
    yield from (f"event: {name}" for name in Event)
    yield from (f"verdict: {verdict.name.lower()}" for verdict in Verdict)


def summary_surface(folder: Path) -> Iterator[str]:
    """Keys of summary.json, which are all there from the beginning; `folder`: an empty one."""
    from small_config import make_config

    from megatron_npd.report.summary import summarise
    from megatron_npd.run_directory import RunDirectory

    for key, value in summarise(RunDirectory(folder), make_config(folder)).items():
        yield f"summary: {key}"
        yield from (f"summary: {key}.{inner}" for inner in (value if isinstance(value, dict) else ()))


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        tables = [table for table in get_args(field.annotation) if isinstance(table, type)]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        elif tables and issubclass(tables[0], BaseModel):  # as often as there are such tables
            yield from _keys(tables[0], f"{prefix}{name}[].")
        else:
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            yield f"key: {prefix}{name} = {default}"


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                words = [_argument(a) for a in command._actions if a.option_strings[-1:] != ["--help"]]
                yield " ".join(["command: npd", name, *words])
        elif action.option_strings[-1] not in SELF_EVIDENT:
            yield f"command: npd {_argument(action)}"


def _argument(action: argparse.Action) -> str:
    value = "|".join(action.choices) if action.choices else action.metavar or action.dest.upper()
    if not action.option_strings:
        return str(value)
    option = "/".join(action.option_strings)
    return f"[{option}]" if action.nargs == 0 else f"[{option} {value}]"


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lines = [*light_surface(), *summary_surface(Path(folder))]
    FROZEN.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
