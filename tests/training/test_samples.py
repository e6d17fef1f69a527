"""Reading single samples of verified shards: the same values as the whole file gives, little read, changes noticed."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_files import open_files
from shard_factory import make_shard
from small_config import make_config

from megatron_npd.buffer import shards
from megatron_npd.buffer.plan import Stage
from megatron_npd.buffer.shards import (
    CorruptShardError,
    Shard,
    ShardFile,
    concatenate_ragged,
    read_shard,
    write_shard,
)
from megatron_npd.data.batch import TrainingSample
from megatron_npd.errors import UserError
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import COLUMNS, GIVEN_VERSION, TEACHER_VERSION, Verdict
from megatron_npd.training import samples
from megatron_npd.training.samples import StageIndex, open_stage, wait_for_stage

Sizes = list[tuple[int, int, Verdict]]
"""(prompt tokens, response tokens, verdict) of each sample"""

KEPT, DEGENERATE, EMPTY = Verdict.KEPT, Verdict.DEGENERATE, Verdict.EMPTY
SIZES: Sizes = [(3, 5, KEPT), (2, 4, DEGENERATE), (7, 1, KEPT), (1, 0, EMPTY), (4, 6, KEPT), (2, 3, KEPT), (5, 2, KEPT)]


def make_unit(sizes: Sizes, first: int, k: int = 3, version: int = 0) -> Shard:
    """Samples of prompts `first`, `first` + 1, ... with random tokens and scores."""
    generator = np.random.default_rng(first)

    def ragged(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return concatenate_ragged([generator.integers(0, 10**6, length) for length in lengths], "int32")

    prompt_ids, prompt_offsets = ragged([prompt for prompt, _, _ in sizes])
    response_ids, response_offsets = ragged([response for _, response, _ in sizes])
    _, topk_offsets = ragged([response if verdict == KEPT else 0 for _, response, verdict in sizes])
    annotated, count = int(topk_offsets[-1]), len(sizes)
    columns = {name: np.zeros(count, dtype) for name, (dtype, shape) in COLUMNS["samples"].items() if shape == "N"}
    columns |= {
        "prompt_index": np.arange(first, first + count),
        "policy_version": np.full(count, version, np.int32),
        "verdict": np.array([verdict for _, _, verdict in sizes], np.uint8),
        "prompt_ids": prompt_ids,
        "prompt_offsets": prompt_offsets,
        "response_ids": response_ids,
        "response_offsets": response_offsets,
        "behaviour_logprobs": generator.random(len(response_ids)).astype(np.float32),
        "topk_offsets": topk_offsets,
        "topk_ids": generator.integers(0, 10**6, (annotated, k)).astype(np.int32),
        "topk_logprobs": generator.random((annotated, k)).astype(np.float32),
        "tail_mass": generator.random(annotated).astype(np.float32),
    }
    return Shard("samples", columns, {"kd_temperature": "1.0"})


def make_stage(root: Path, units: list[Sizes], version: int = 0) -> tuple[RunDirectory, Stage]:
    """A run directory with the annotated units of one stage; all but the last must be of the same size."""
    run, count = RunDirectory(root), sum(map(len, units))
    for number, sizes in enumerate(units):
        write_shard(
            run.unit("samples", "round_0000", number), make_unit(sizes, number * len(units[0]), version=version)
        )
    return run, Stage("round_0000", "train", version, np.arange(count), np.zeros(count, np.int32), len(units[0]))


def whole_file_samples(run: RunDirectory, stage: Stage) -> list[TrainingSample]:
    """The kept samples of a stage as the whole-file reader gives them."""
    found = []
    for unit in range(stage.units):
        shard = read_shard(run.unit("samples", stage.name, unit), "samples")
        for row in np.flatnonzero(shard["verdict"] == KEPT).tolist():
            topk = (shard.ragged(name, row, "topk_offsets") for name in ("topk_ids", "topk_logprobs", "tail_mass"))
            behaviour = shard.ragged("behaviour_logprobs", row, "response_offsets")
            found.append(TrainingSample(shard.prompt(row), shard.response(row), behaviour, *topk))
    return found


def assert_equal(one: TrainingSample, other: TrainingSample) -> None:
    for field in fields(TrainingSample):
        got, expected = getattr(one, field.name), getattr(other, field.name)
        assert got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_array_equal(got, expected)


def opened(run: RunDirectory, stage: Stage, newest_version: int = 0, **sections: dict[str, object]) -> StageIndex:
    return open_stage(run, make_config(run.root, **sections), stage, newest_version)


class Counter:
    """Counts the bytes that are read through `os.pread`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes = 0
        real = os.pread

        def pread(descriptor: int, size: int, offset: int) -> bytes:
            content = real(descriptor, size, offset)
            self.bytes += len(content)
            return content

        monkeypatch.setattr(os, "pread", pread)

    def take(self) -> int:
        """Bytes since the last call."""
        taken, self.bytes = self.bytes, 0
        return taken


# --- single rows of a shard ---


def test_columns_and_rows_are_those_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    write_shard(path, make_unit(SIZES, 0))
    whole = read_shard(path, "samples")
    with closing(ShardFile(path, "samples")) as shard:
        assert shard.metadata == whole.metadata == {"kd_temperature": "1.0"}
        for name in COLUMNS["samples"]:
            assert shard[name].dtype == whole[name].dtype
            np.testing.assert_array_equal(shard[name], whole[name])
            np.testing.assert_array_equal(shard.rows(name, 1, 4), whole[name][1:4])
            assert shard.rows(name, 2, 2).shape == whole[name][2:2].shape
        with pytest.raises(AssertionError, match="rows 5:999 of column verdict"):
            shard.rows("verdict", 5, 999)


def test_an_empty_shard_opens(tmp_path: Path) -> None:
    write_shard(tmp_path / "unit", make_shard("rollouts", rows=0))
    with closing(ShardFile(tmp_path / "unit", "rollouts")) as shard:
        assert shard["prompt_ids"].shape == (0,)
        assert shard["prompt_offsets"].tolist() == [0]


def test_a_shard_whose_length_does_not_fit_its_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "unit.safetensors"
    write_shard(path, make_shard("samples"))
    content = path.read_bytes()
    for size in [*range(0, len(content), 64), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CorruptShardError, match=r"unit\.safetensors: "):
            ShardFile(path, "samples")
    path.write_bytes(content + b"x")
    with pytest.raises(CorruptShardError, match="the header says"):
        ShardFile(path, "samples")


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    write_shard(path, make_shard("samples"))
    content = path.read_bytes()
    sizes = {name: len(column) for name, column in make_shard("samples").columns.items()}
    for position in range(0, 8 + int.from_bytes(content[:8], "little"), 3):
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        try:
            with closing(ShardFile(path, "samples")) as shard:
                assert {name: len(shard[name]) for name in sizes} == sizes
        except CorruptShardError:
            continue


@pytest.mark.parametrize("key", ["kind", "schema_version"])
def test_a_shard_of_another_kind_or_schema_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "unit"
    write_shard(path, make_shard("samples"))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["npd"] = json.dumps(json.loads(header["__metadata__"]["npd"]) | {key: "rollouts"})
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises(CorruptShardError, match="expected samples of schema 2"):
        ShardFile(path, "samples")


def test_columns_that_break_the_schema_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "unit", make_shard("rollouts"))
    monkeypatch.setitem(COLUMNS, "rollouts", COLUMNS["rollouts"] | {"seed": ("int32", "N")})
    with pytest.raises(CorruptShardError, match=r"unit: .*column seed is int64"):
        ShardFile(tmp_path / "unit", "rollouts")


def test_a_small_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    write_shard(path, make_unit(SIZES, 0))
    there = read_shard(path, "samples")
    with closing(ShardFile(path, "samples")) as shard:
        path.write_bytes(b"")
        assert not shard.is_current()
        for name in COLUMNS["samples"]:
            np.testing.assert_array_equal(shard[name], there[name])
            assert shard[name].flags.writeable


def test_a_file_that_shrinks_while_it_is_open_gives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "unit"
    monkeypatch.setattr(shards, "SMALL_BYTES", 0)
    write_shard(path, make_unit(SIZES, 0))
    with closing(ShardFile(path, "samples")) as shard:
        assert shard.is_current()
        os.truncate(path, path.stat().st_size - 1)
        assert not shard.is_current()
        with pytest.raises(CorruptShardError, match="unit: ends before byte"):
            _ = [shard[name] for name in COLUMNS["samples"]]


# --- the index of a stage ---

sizes = st.tuples(st.integers(1, 9), st.integers(0, 9), st.sampled_from(list(Verdict))).map(
    lambda size: size if size[1] else (size[0], 0, EMPTY)
)


@settings(max_examples=40)
@given(st.lists(sizes, min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_samples_are_those_of_the_whole_file_reader(every: Sizes, per_unit: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        units = [every[start : start + per_unit] for start in range(0, len(every), per_unit)]
        run, stage = make_stage(Path(folder), units)
        expected = whole_file_samples(run, stage)
        if not expected:
            with pytest.raises(UserError, match="no sample was kept"):
                opened(run, stage)
            return
        index = opened(run, stage)
        kept = [number for number, (_, _, verdict) in enumerate(every) if verdict == KEPT]
        assert index.identities.tolist() == [[number, 0] for number in kept]
        assert index.identities.dtype == index.lengths.dtype == np.int64
        assert index.lengths.tolist() == [sample.length for sample in expected]
        assert sum(index.verdicts.values()) == len(every) and index.verdicts["kept"] == len(index) == len(kept)
        wanted = data.draw(st.lists(st.integers(0, len(kept) - 1), max_size=20))
        read = index.read(wanted)
        assert index.positions(wanted) == sum(sample.length for sample in read)
        for item, sample in zip(wanted, read, strict=True):
            assert_equal(sample, expected[item])


def test_reading_few_samples_reads_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k, response = 10, 400
    run, count = RunDirectory(tmp_path), 128
    path = run.unit("samples", "round_0000", 0)
    write_shard(path, make_unit([(100, response, KEPT)] * count, 0, k))
    stage = Stage("round_0000", "train", 0, np.arange(count), np.zeros(count, np.int32), count)
    counter, size = Counter(monkeypatch), path.stat().st_size
    monkeypatch.setattr(Path, "read_bytes", None)  # the whole-file reader
    index = opened(run, stage)
    header = counter.take() - count * (8 + 4 + 4 + 1) - 3 * 8 * (count + 1)
    assert 0 < header < 4096, "opening reads the header and the small columns, nothing else"
    index.read([3, 77])
    assert counter.take() == header + 2 * (4 * 100 + response * (4 + 4 + k * (4 + 4) + 4))
    index.read([3])
    assert counter.take() < size / 100, "the file was open: its header is not read again"


def shards_open(run: RunDirectory) -> list[str]:
    return [file for file in open_files() if file.startswith(str(run.root))]


def test_a_bounded_number_of_files_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stage = make_stage(tmp_path, [[(2, 3, KEPT)]] * 9)
    index, expected = opened(run, stage), whole_file_samples(run, stage)
    monkeypatch.setattr(samples, "OPEN_FILES", 4)
    for _ in range(2):
        for item, sample in enumerate(index.read(list(range(9)))):
            assert_equal(sample, expected[item])
        assert len(shards_open(run)) == 4
    index.close()
    assert not shards_open(run)
    assert_equal(index.read([5])[0], expected[5])


@pytest.mark.parametrize("was_open", [False, True])
def test_a_shard_that_vanished_or_changed_is_named(tmp_path: Path, was_open: bool) -> None:
    run, stage = make_stage(tmp_path, [SIZES, SIZES])
    index = opened(run, stage)
    if was_open:
        index.read([0])
    path = run.unit("samples", stage.name, 0)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match=r"unit_000000\.safetensors: cannot be opened \(No such file"):
        index.read([0])
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"unit_000000\.safetensors: not a readable shard"):
        index.read([0])
    path.unlink()
    write_shard(path, make_unit(SIZES, 99))
    with pytest.raises(ValueError, match=r"unit_000000\.safetensors: changed since the stage was opened"):
        index.read([0])
    index.read([len(index) - 1])  # of the other shard
    path.write_bytes(content)  # written again by a second annotator, with the same content
    assert_equal(index.read([0])[0], whole_file_samples(run, stage)[0])


def spoil(run: RunDirectory, stage: Stage, columns: dict[str, object], metadata: dict[str, object]) -> None:
    """Rewrite unit 0 with other values."""
    shard = make_unit(SIZES, 0)
    for name, values in columns.items():
        shard.columns[name] = np.array(values, dtype=shard[name].dtype)
    run.unit("samples", stage.name, 0).unlink()  # a shard that is there is never replaced
    write_shard(run.unit("samples", stage.name, 0), Shard("samples", shard.columns, metadata))


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"prompt_index": [0, 1, 2, 3, 4, 6, 5]}, "samples are not those of the plan"),
        ({"sample_index": [0, 0, 0, 0, 0, 0, 1]}, "samples are not those of the plan"),
        ({"policy_version": [0, 0, 0, 0, 0, 0, 1]}, r"policy versions \{0, 1\}, expected 0"),
        ({"verdict": [KEPT] * 7}, "annotation rows do not match the kept responses"),
        ({"verdict": [DEGENERATE] * 7}, "annotation rows do not match the kept responses"),
    ],
)
def test_what_is_not_the_plans_is_refused(tmp_path: Path, columns: dict[str, object], complaint: str) -> None:
    run, stage = make_stage(tmp_path, [SIZES])
    spoil(run, stage, columns, {"kd_temperature": "1.0"})
    with pytest.raises(ValueError, match=rf"unit_000000\.safetensors: {complaint}"):
        opened(run, stage)


def test_stale_samples_are_refused_but_not_the_teachers(tmp_path: Path) -> None:
    run, stage = make_stage(tmp_path / "student", [SIZES])
    assert len(opened(run, stage, newest_version=1)) == 5
    with pytest.raises(ValueError, match=r"more than rounds\.max_policy_lag = 1 behind"):
        opened(run, stage, newest_version=2)
    run, stage = make_stage(tmp_path / "teacher", [SIZES], TEACHER_VERSION)
    assert len(opened(run, stage, newest_version=9)) == 5


def test_a_stage_without_kept_samples_says_why(tmp_path: Path) -> None:
    run, stage = make_stage(tmp_path, [[(3, 2, DEGENERATE), (2, 0, EMPTY)], [(3, 1, DEGENERATE)]])
    with pytest.raises(UserError, match=r"round_0000: no sample was kept \(2 degenerate, 1 empty\)"):
        opened(run, stage)


def test_a_round_that_keeps_too_little_says_so(tmp_path: Path) -> None:
    samples = [(3, 2, KEPT), (2, 2, DEGENERATE), (2, 0, EMPTY), (3, 2, KEPT)]
    run, stage = make_stage(tmp_path / "student", [samples])
    assert len(opened(run, stage, selection={"least_kept_share": 0.5})) == 2
    rule = r"must be selection\.least_kept_share = 0\.6 of them at least \(1 degenerate, 1 empty, 2 kept\)"
    with pytest.raises(UserError, match=rf"round_0000: 2 of 4 samples were kept, {rule}; see npd inspect --rejected"):
        opened(run, stage, selection={"least_kept_share": 0.6})
    run, stage = make_stage(tmp_path / "teacher", [samples], TEACHER_VERSION)
    assert len(opened(run, stage, selection={"least_kept_share": 0.6})) == 2, "a warm-up is not judged by it"


@pytest.mark.parametrize(
    "metadata", [{}, {"kd_temperature": "2.0"}, {"kd_temperature": "hot"}, {"kd_temperature": None}]
)
def test_another_distillation_temperature_is_refused(tmp_path: Path, metadata: dict[str, object]) -> None:
    run, stage = make_stage(tmp_path, [SIZES])
    spoil(run, stage, {}, metadata)
    value = repr(metadata.get("kd_temperature"))
    with pytest.raises(
        ValueError,
        match=rf"unit_000000\.safetensors: kd_temperature = {value}: must equal training\.kd_temperature = 1",
    ):
        opened(run, stage)


@pytest.mark.parametrize("recorded", ["2.0", "2", "2.00", 2.0])
def test_the_distillation_temperature_is_compared_as_a_number(tmp_path: Path, recorded: object) -> None:
    run, stage = make_stage(tmp_path, [SIZES])
    spoil(run, stage, {}, {"kd_temperature": recorded})
    assert len(opened(run, stage, training={"kd_temperature": 2.0})) == 5


def test_waiting_verifies_whole_files(tmp_path: Path) -> None:
    """A flipped bit in a column that opening does not read is found before, and the unit's work is redone."""
    run, stage = make_stage(tmp_path, [SIZES])
    config = make_config(tmp_path, launch={"poll_seconds": 0.01})
    wait_for_stage(run, config, stage)
    path = run.unit("samples", stage.name, 0)
    tail = read_shard(path, "samples")["tail_mass"].tobytes()
    path.write_bytes(path.read_bytes().replace(tail, tail[:-1] + bytes([tail[-1] ^ 1])))
    opened(run, stage)

    class Waiting(Exception):
        pass

    def redo(_: float) -> None:
        raise Waiting

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Waiting):
        patch.setattr("megatron_npd.process.waiting.time.sleep", redo)
        wait_for_stage(run, config, stage)
    assert [entry.name for entry in path.parent.iterdir()] == ["unit_000000.safetensors.quarantined"]


# --- given responses beside others ---


def make_mixed(root: Path, own: Sizes, given: int, share: float) -> tuple[RunDirectory, Stage, dict[str, object]]:
    """A round of one unit that version 0 sampled, and units of two given responses each."""
    run, unit = RunDirectory(root), len(own)
    stage = Stage(
        "round_0000",
        "train",
        0,
        np.arange(unit + given),
        np.repeat(np.array([0, 1], np.int32), [unit, given]),
        unit,
        given,
    )
    write_shard(run.unit("samples", stage.name, 0), make_unit(own, 0))
    for number in range(1, stage.units):
        rows = stage.rows(number)
        shard = make_unit([(2, 4, KEPT)] * (rows.stop - rows.start), rows.start, version=GIVEN_VERSION)
        shard.columns["sample_index"] = stage.sample_index[rows]
        write_shard(run.unit("samples", stage.name, number), shard)
    return run, stage, {"rounds": {"given_share": share}}


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.25, 2), (0.0, 0), (0.7, 12)])
def test_given_responses_are_taken_in_the_stated_share_of_what_was_kept(
    tmp_path: Path, share: float, expected: int
) -> None:
    """5 of SIZES are kept; the share is one of what is trained on, however many were rejected."""
    run, stage, sections = make_mixed(tmp_path, SIZES, 14, share)
    index = opened(run, stage, **sections)
    assert (len(index), index.given) == (5 + expected, expected)
    assert len({tuple(pair) for pair in index.identities.tolist()}) == len(index)
    again = opened(run, stage, **sections)
    assert np.array_equal(index.identities, again.identities), "a restart takes the same ones"
    other = opened(run, stage, **sections, seed=77)
    assert expected in (0, 14) or not np.array_equal(index.identities, other.identities)
    read = index.read(list(range(len(index))))
    assert [len(sample.response_ids) for sample in read[5:]] == [4] * expected


def test_too_few_given_responses_are_all_taken_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, stage, sections = make_mixed(tmp_path, SIZES, 3, 0.5)
    with caplog.at_level("WARNING"):
        assert opened(run, stage, **sections).given == 3
    assert "3 given responses are there beside 5 others: a share of 0.375" in caplog.text


def test_a_round_of_which_nothing_was_kept_is_not_trained_on_given_responses_alone(tmp_path: Path) -> None:
    run, stage, sections = make_mixed(tmp_path, [(2, 4, DEGENERATE), (1, 0, EMPTY)], 4, 0.5)
    with pytest.raises(UserError, match=r"no sample was kept beside which .* \(1 degenerate, 1 empty\)"):
        opened(run, stage, **sections)


def test_given_responses_do_not_grow_stale_but_must_be_given(tmp_path: Path) -> None:
    run, stage, sections = make_mixed(tmp_path, SIZES, 7, 0.5)
    with pytest.raises(ValueError, match=r"unit_000000\.safetensors: sampled by version 0, newest is 2"):
        opened(run, stage, newest_version=2, **sections)
    path = run.unit("samples", stage.name, 1)
    shard = read_shard(path, "samples")
    shard.columns["policy_version"] = np.zeros(len(shard), np.int32)
    path.unlink()
    write_shard(path, shard)
    with pytest.raises(ValueError, match=r"unit_000001\.safetensors: policy versions \{0\}, expected -2"):
        opened(run, stage, **sections)
