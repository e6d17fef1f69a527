"""Tokenising once, in parallel, from any format: the same bytes. And what holds of the prompts of a run together."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from inputs import Inputs
from pyarrow.parquet import write_table
from tiny_tokenizer import make_tokenizer

from megatron_npd.data.prompts import PromptSet, load_prompt_set
from megatron_npd.data.tokenizer import load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.models.hf_config import eos_token_ids
from megatron_npd.prepare import part_maker
from megatron_npd.prepare.preflight import preflight
from megatron_npd.prepare.prepare import prepare
from megatron_npd.prepare.prompt_parts import tokenise_part
from megatron_npd.teacher.prefix import unconditional_prefix

ROWS = [
    {"id": f"q{i}", "messages": [{"role": "user", "content": f"What is {i} + {i * i}?\u2028 {'x' * (i % 7)}"}]}
    for i in range(1000)
]


def as_lines(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return folder / "rows.jsonl"


def as_parquet(folder: Path) -> Path:
    write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=300)
    return folder / "rows.parquet"


def as_saved_set(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "rows_saved")
    return folder / "rows_saved"


FORMATS: dict[str, Callable[[Path], Path]] = {"lines": as_lines, "parquet": as_parquet, "saved": as_saved_set}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    part_maker._store.cache_clear()
    yield tmp_path / "cache" / "prompts"
    part_maker._store.cache_clear()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepared(inputs: Inputs, train: Path, name: str) -> Path:
    """The folder of the training prompts of a run that was prepared with them."""
    inputs.set("run_directory", str(inputs.root / name))
    inputs.set("prompts.train", str(train))
    prepare(inputs.config)
    return inputs.root / name / "prompts" / "train"


def test_every_format_gives_the_same_bytes(inputs: Inputs) -> None:
    folders = [prepared(inputs, write(inputs.root), name) for name, write in FORMATS.items()]
    assert len(load_prompt_set(folders[0])) == 1000
    assert content(folders[0]) == content(folders[1]) == content(folders[2])


@pytest.mark.slow  # starts processes
def test_processes_make_what_one_makes(inputs: Inputs, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = prepared(inputs, as_lines(inputs.root), "alone")
    monkeypatch.setattr(part_maker, "BATCH", 100)  # part of what a part is named after: nothing is found ready
    together = prepared(inputs, as_lines(inputs.root), "together")
    assert content(alone) == content(together)


@pytest.mark.slow  # starts processes
def test_a_fault_is_found_in_every_process_and_the_first_is_named(
    inputs: Inputs, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_lines(inputs.root)
    lines = path.read_text().split("\n")
    for number in (951, 420, 777):
        lines[number - 1] = '{"messages": []}'
    path.write_text("\n".join(lines))
    monkeypatch.setattr(part_maker, "BATCH", 100)
    with pytest.raises(UserError, match=r"rows\.jsonl:420: must have a non-empty list"):
        prepared(inputs, path, "run")
    assert not (inputs.root / "run").exists()


def test_what_was_tokenised_is_not_tokenised_again(
    inputs: Inputs, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(path, kind, batch, reader, framer):
        made.append(len(batch))
        return tokenise_part(path, kind, batch, reader, framer)

    monkeypatch.setattr(part_maker, "tokenise_part", counted)
    preflight(inputs.config)  # what `npd check` does
    assert made == [6, 3]
    prepare(inputs.config)
    assert made == [6, 3]
    inputs.set("prompts.max_prompt_tokens", 60)
    inputs.set("run_directory", str(inputs.root / "shorter"))
    prepare(inputs.config)
    assert made == [6, 3], "a limit chooses among prompts, it does not change them"
    inputs.heldout.write_text(inputs.heldout.read_text().replace("Name 1 things", "Name 1 thing"))
    preflight(inputs.config)
    assert made == [6, 3, 3], "content counts, not the name of a file"
    inputs.set("prompts.system", "Be brief.")
    inputs.set("prompts.max_prompt_tokens", 90)
    inputs.set("rollout.max_new_tokens", 30)
    preflight(inputs.config)
    assert made == [6, 3, 3, 6, 3]


def test_a_saved_sets_files_count_not_what_they_call_themselves(inputs: Inputs, cache: Path) -> None:
    path = as_saved_set(inputs.root)
    first = content(prepared(inputs, path, "first"))
    other = [row | {"messages": [{"role": "user", "content": f"Another {row['id']}"}]} for row in ROWS]
    datasets.Dataset.from_list(other).save_to_disk(inputs.root / "other")
    shutil.copyfile(next((inputs.root / "other").glob("*.arrow")), next(path.glob("*.arrow")))
    assert content(prepared(inputs, path, "second"))["ids.npy"] != first["ids.npy"]


def test_an_interrupted_command_goes_on_where_it_was(
    inputs: Inputs, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_maker, "BATCH", 400)
    monkeypatch.setattr(part_maker, "ALONE", 5)
    whole = prepared(inputs, as_lines(inputs.root), "whole")
    (done,) = [folder for folder in cache.iterdir() if len(list(folder.glob("part_*"))) == 3]
    (done / "done.json").unlink()
    (done / "part_000001.npz").unlink()
    first, last = ((done / f"part_00000{n}.npz").stat().st_ino for n in (0, 2))
    again = prepared(inputs, as_lines(inputs.root), "again")
    assert content(whole) == content(again)
    assert [(done / f"part_00000{n}.npz").stat().st_ino for n in (0, 2)] == [first, last]


def test_a_damaged_part_is_made_again(inputs: Inputs, cache: Path) -> None:
    whole = prepared(inputs, as_lines(inputs.root), "whole")
    for part in cache.rglob("part_*.npz"):
        part.write_bytes(part.read_bytes()[:1000])
    assert content(prepared(inputs, as_lines(inputs.root), "again")) == content(whole)


def test_a_cache_that_cannot_be_written_is_announced(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (inputs.root / "file").write_text("")
    monkeypatch.setenv("NPD_CACHE", str(inputs.root / "file"))
    part_maker._store.cache_clear()
    with caplog.at_level(logging.WARNING):
        prepare(inputs.config)
    part_maker._store.cache_clear()
    assert "NPD_CACHE" in caplog.text and "cannot be kept" in caplog.text
    assert len(load_prompt_set(inputs.run / "prompts" / "train")) == 6


def test_old_data_sets_leave_the_cache(inputs: Inputs, cache: Path) -> None:
    old, young = cache / "old", cache / "young"
    for folder, days in ((old, part_maker.KEPT_DAYS + 1), (young, part_maker.KEPT_DAYS - 1)):
        folder.mkdir(parents=True)
        os.utime(folder, (0, folder.stat().st_mtime - days * 86400))
    preflight(inputs.config)
    assert young.is_dir() and not old.exists()


# --- prompts of a run together --------------------------------------------------------------------------------------


def lines_of(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"id": f"t{i}", "prompt": text}) + "\n" for i, text in enumerate(texts)))


def test_too_long_prompts_are_left_out_counted_and_listed(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    lines_of(inputs.train, "short", "x" * 60, "fine", "x" * 90)
    inputs.set("prompts.too_long", "leave_out")
    with caplog.at_level(logging.WARNING):
        prepare(inputs.config)
    assert "2 prompts are left out" in caplog.text and "'t1' with 79 tokens" in caplog.text
    prompts = load_prompt_set(inputs.run / "prompts" / "train")
    assert prompts.names == ["t0", "t2"] and len(prompts) == 2
    assert len(prompts[1]) == len(prompts[0]) - 1, "each keeps its own tokens"
    left_out = json.loads((inputs.run / "prompts" / "train" / "left_out.json").read_text())
    assert [(one["id"], one["prompt_tokens"]) for one in left_out] == [("t1", 79), ("t3", 109)]


def test_nothing_is_left_of_too_long_prompts(inputs: Inputs) -> None:
    lines_of(inputs.train, "x" * 60, "x" * 90)
    inputs.set("prompts.too_long", "leave_out")
    with pytest.raises(UserError, match="all 2 prompts are too long"):
        prepare(inputs.config)


def test_near_repetitions_are_spoken_of(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    lines_of(inputs.train, "What is 3 - 3?", "what is  3 + 3", "Twice.", "twice", "TWICE!")
    lines_of(inputs.heldout, "What is 3 + 3?", "What is 4 + 4?")
    with caplog.at_level(logging.WARNING):
        preflight(inputs.config)
    said = [record.getMessage() for record in caplog.records if "its tokenizer" not in record.getMessage()]
    assert [line.split(": ", 1)[1][:40] for line in said] == [
        "1 prompts differ from one in " + str(inputs.train)[:11],
        "2 prompts repeat another; most often 't2"[:40],
    ]
    assert "'t0'" in said[0], "3 - 3 is another prompt than 3 + 3"


def test_prompt_sets_know_how_they_were_framed(inputs: Inputs) -> None:
    prepare(inputs.config)
    prompts: PromptSet = load_prompt_set(inputs.run / "prompts" / "train")
    (framing,) = prompts.framings_of(np.arange(6))
    assert framing["format"] == "chat" and framing["chat_template_kwargs"] == {} and framing["prompts"] == 6
    assert prompts.framing is None, "one way of framing needs no column"
    assert eos_token_ids(inputs.student) == [2]


def test_base_models_need_no_chat_template(inputs: Inputs) -> None:
    for folder in (inputs.teacher, inputs.student):
        make_tokenizer(folder, template=None)
        (folder / "chat_template.jinja").unlink()
    lines_of(inputs.train, "Once upon", "A time")
    lines_of(inputs.heldout, "There was")
    inputs.set("prompts.format", "text")
    prepare(inputs.config)
    prompts = load_prompt_set(inputs.run / "prompts" / "train")
    tokenizer = load_tokenizer(inputs.student, trust_remote_code=False)
    assert [tokenizer.decode(prompts[row].tolist()) for row in range(2)] == ["Once upon", "A time"]
    assert prompts.framings_of(np.arange(2)) == [{"format": "text", "prompts": 2}]
    assert unconditional_prefix(tokenizer, "auto", "text") == [2], "what ends a text stands before the next"
    with pytest.raises(UserError, match="plain texts"):
        unconditional_prefix(tokenizer, "assistant_header", "text")
