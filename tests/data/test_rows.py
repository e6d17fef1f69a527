"""Rows of data sets: JSON Lines to the letter, tables as pyarrow and `datasets` write them, each fault in one line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow.parquet import write_table

from megatron_npd.data.rows import Row, open_rows
from megatron_npd.errors import UserError

SEPARATORS = "next\x85line\u2028and\u2029paragraph"


def rows_of(path: str | Path, size: int = 3) -> list[tuple[int, Row]]:
    """All rows, as they come out of batches that crossed to another process."""
    batches = [pickle.loads(pickle.dumps(batch)) for batch in open_rows(str(path)).batches(size)]
    assert all(len(batch) <= size for batch in batches)
    return [row for batch in batches for row in batch.rows()]


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    text = json.dumps({"prompt": SEPARATORS}, ensure_ascii=False).encode()
    path = write_lines(tmp_path / "x.jsonl", text, b"", b'{"prompt": "second"}\r', b"")
    assert rows_of(path) == [(1, {"prompt": SEPARATORS}), (3, {"prompt": "second"})]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"prompt": "first"}', b'{"prompt": "second"}')
    assert [row["prompt"] for _, row in rows_of(path)] == ["first", "second"]


def test_null_is_a_field_that_is_not_there(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", b'{"id": null, "prompt": "a"}', b'{"id": null, "prompt": "b"}')
    assert rows_of(path) == [(1, {"prompt": "a"}), (2, {"prompt": "b"})]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": [}', ["x.jsonl:2", "not JSON", "column 13"]),
        (b'["prompt"]', ["x.jsonl:2", "JSON object"]),
        (b'{"prompt": "\xff"}', ["x.jsonl:2", "not utf-8", "byte 12"]),
        (b"[" * 200_000, ["x.jsonl:2", "not JSON"]),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, words: list[str]) -> None:
    path = write_lines(tmp_path / "x.jsonl", b'{"prompt": "good"}', line)
    with pytest.raises(UserError) as refused:
        rows_of(path)
    assert all(word in str(refused.value) for word in words), refused.value


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "name": "bot"}]
TABLE: list[dict[str, Any]] = [{"id": f"r{i}", "prompt": f"p{i} {SEPARATORS}", "messages": CHAT} for i in range(8)]


def as_parquet(folder: Path) -> Path:
    write_table(pyarrow.Table.from_pylist(TABLE), folder / "x.parquet", row_group_size=3)
    return folder / "x.parquet"


def as_parquet_folder(folder: Path) -> Path:
    (folder / "several").mkdir()
    for number, part in enumerate((TABLE[:5], TABLE[5:])):
        write_table(pyarrow.Table.from_pylist(part), folder / "several" / f"{number}.parquet")
    return folder / "several"


def as_saved_set(folder: Path) -> Path:
    datasets.Dataset.from_list(TABLE).save_to_disk(folder / "saved")
    return folder / "saved"


def as_chosen_rows_of_a_saved_set(folder: Path) -> Path:
    """A data set that is rows of another, in another order: the order is what counts, not what lies in the file."""
    datasets.Dataset.from_list([*TABLE[::-1], TABLE[0]]).select(range(7, -1, -1)).save_to_disk(folder / "chosen")
    return folder / "chosen"


TABLES = (as_parquet, as_parquet_folder, as_saved_set, as_chosen_rows_of_a_saved_set)


@pytest.mark.parametrize("write", TABLES)
def test_tables_give_the_rows_that_were_put_in(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    assert open_rows(str(path)).columns == ["id", "prompt", "messages"]
    assert rows_of(path) == list(enumerate(TABLE, 1)), "fields that a turn does not have are not there, as in JSON"


def test_a_batch_holds_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table(pyarrow.table({"prompt": ["x" * 1000] * 1000}), path)
    first = next(iter(open_rows(str(path)).batches(10)))
    assert len(pickle.dumps(first)) < 20_000


def corrupt(folder: Path) -> Path:
    path = as_parquet(folder)
    content = bytearray(path.read_bytes())
    content[8:200] = bytes(192)
    path.write_bytes(content)
    return path


def no_parquet(folder: Path) -> Path:
    return write_lines(folder / "x.parquet", b'{"prompt": "json"}')


def several_sets(folder: Path) -> Path:
    one = datasets.Dataset.from_list(TABLE)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(folder / "all")
    return folder / "all"


def script(folder: Path) -> Path:
    (folder / "scripted").mkdir()
    (folder / "scripted" / "scripted.py").write_text("raise SystemExit('this code was run')")
    return folder / "scripted"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def broken_set(folder: Path) -> Path:
    path = as_saved_set(folder)
    next(path.glob("*.arrow")).write_bytes(b"no arrow")
    return path


def other_columns(folder: Path) -> Path:
    path = as_parquet_folder(folder)
    write_table(pyarrow.table({"text": ["a"]}), path / "2.parquet")
    return path


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (corrupt, ["x.parquet", "damaged after row 0"]),
        (no_parquet, ["x.parquet", "not a readable parquet file"]),
        (several_sets, ["all", "several data sets", "test, train"]),
        (script, ["scripted.py", "needs its code"]),
        (empty_folder, ["empty", "must hold parquet files"]),
        (broken_set, ["saved", "cannot be read as a saved data set"]),
        (other_columns, ["2.parquet", "has columns text", "0.parquet"]),
        (lambda folder: folder / "nowhere.jsonl", ["nowhere.jsonl", "No such file"]),
        (lambda folder: folder / "nowhere.parquet", ["nowhere.parquet", "No such file"]),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, write: Callable[[Path], Path], words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        rows_of(write(tmp_path))
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf://gsm8k", ["must have the form hf://OWNER/NAME"]),
        ("hf://openai/gsm8k?splt=train", ["must have the form hf://OWNER/NAME"]),
        ("hf://openai/gsm8k?config=main", ["cannot be loaded from the hub"]),
    ],
)
def test_names_on_the_hub(name: str, words: list[str]) -> None:
    """The tests run offline (HF_HUB_OFFLINE): what can be shown here is what is said then."""
    with pytest.raises(UserError) as refused:
        open_rows(name)
    assert all(word in str(refused.value) for word in [name, *words]), refused.value
