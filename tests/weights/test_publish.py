"""Publishing: whole, exact and atomic from any layout, beside training, and harmless when it fails.

The writing alone is tested from one process on a checkpoint's weights (`lone_publisher.py`); the layouts, and what one
rank's failure does to the others, with real Megatron models (`publish_worker.py`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lone_publisher import PROBE, make_publisher, parameters_of
from megatron_runs import run_ranks, start_ranks
from places import SUPPORT
from publish_worker import write_normally, write_slowly
from safetensors.torch import load_file
from tiny_models import FAMILIES, make_llama, make_model
from transformers import AutoModelForCausalLM

from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.models.tensor_map import all_hugging_face_names
from megatron_npd.run_directory import RunDirectory
from megatron_npd.versions.manifest import published_versions, read_parity_probe, verify_version
from megatron_npd.weights.buckets import deal_buckets, plan_buckets
from megatron_npd.weights.publish import Published

NAMES = {"config.json", "generation_config.json", "parity.json", "version.json", "model.safetensors.index.json"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("student"), 0)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Nothing is written until this is set."""
    hold = threading.Event()
    write_slowly(hold=hold)
    yield hold
    hold.set()
    write_normally()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Planning


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_buckets_hold_every_tensor_once_as_it_is(family: str, tied: bool, size: int, tmp_path: Path) -> None:
    """Names and shapes are those of the checkpoint, seen from one tensor-parallel rank's shards alone."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131}
    folder = make_model(family, tmp_path, 0, tied=tied, **shape)
    dims, expected = read_model_dims(folder), tensors_in(folder)
    shards = parameters_of(folder, size - 1, size)
    for writers, largest, smallest in ((1, 2**30, 1), (8, 2**30, 1), (3, 30_000, 1), (8, 2**30, 2**20)):
        buckets = plan_buckets(shards, dims, size, writers, largest, smallest)
        specs = [spec for bucket in buckets for spec in bucket.tensors]
        assert sorted(spec.name for spec in specs) == sorted(all_hugging_face_names(dims)) == sorted(expected)
        assert all(spec.shape == expected[spec.name].shape for spec in specs)
        assert all(bucket.nbytes <= largest or len(bucket.parameters) == 1 for bucket in buckets)
        assert len(buckets) >= min(writers, 4) or smallest > 1
        assert len(buckets) == 1 or (writers, smallest) != (8, 2**20), "a small model stays in one file"


def test_a_bucket_has_one_dtype(student: Path) -> None:
    shards = parameters_of(student)
    norms = {name for name in shards if "norm" in name}
    mixed = {name: shard.bfloat16() if name not in norms else shard for name, shard in shards.items()}
    for bucket in plan_buckets(mixed, read_model_dims(student), 1, 1):
        assert len({spec.dtype for spec in bucket.tensors}) == 1


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_buckets_are_dealt_evenly(sizes: list[int], writers: int) -> None:
    given = deal_buckets(sizes, writers)
    loads = [sum(size for size, to in zip(sizes, given, strict=True) if to == writer) for writer in range(writers)]
    assert sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


# What is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_version_is_the_parameters_as_they_were(
    dtype: torch.dtype, run: RunDirectory, tmp_path: Path, held: threading.Event
) -> None:
    """They change while the version is written, and transformers loads what they were before."""
    folder = make_llama(tmp_path / "student", 0, dtype=dtype, tied=True)
    (folder / "weights.pt").write_bytes(b"not to be carried along")
    parameters, published = parameters_of(folder), []
    publisher = make_publisher(run, folder, on_published=published.append, smallest_bucket=1, largest_bucket=40_000)
    started = time.monotonic()
    publisher.publish(3, parameters, PROBE)
    for parameter in parameters.values():
        parameter.fill_(float("nan"))
    assert not publisher.poll() and published_versions(run) == []
    held.set()
    publisher.wait()
    took = time.monotonic() - started
    version = run.version(3)
    assert verify_version(version).version == 3 and read_parity_probe(version) == PROBE
    expected, found = tensors_in(folder), tensors_in(version)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    index = read_json(version / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"] == {key: file.name for file in version.glob("*.safetensors") for key in load_file(file)}
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)] and files[1:]
    assert set(names_in(version)) == NAMES | set(files), "and nothing of the writing is left"
    assert read_json(version / "config.json")["dtype"] == str(dtype).removeprefix("torch.")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (version, folder))
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == dtype for name in theirs)
    (told,) = published
    assert told.version == 3 and told.bytes == index["metadata"]["total_size"]
    assert 0 < told.seconds <= took and 0 < told.stall_seconds <= took


def test_only_standing_still_counts_as_stall(student: Path, run: RunDirectory, held: threading.Event) -> None:
    published: list[Published] = []
    publisher = make_publisher(run, student, on_published=published.append)
    started = time.monotonic()
    publisher.publish(0, parameters_of(student))
    stood_still = time.monotonic() - started
    time.sleep(1.0)  # training
    held.set()
    while not publisher.poll():
        time.sleep(0.01)
    held.clear()
    publisher.publish(1, parameters_of(student))
    threading.Timer(1.0, held.set).start()
    publisher.publish(2, parameters_of(student))  # waits for the one before
    publisher.wait()
    beside, waited, last = published
    assert [beside.version, waited.version, last.version] == [0, 1, 2] == published_versions(run)
    assert beside.seconds > 1.0 and beside.stall_seconds <= stood_still
    assert waited.seconds > 0.8 and waited.stall_seconds > 0.8


def test_leftovers_of_killed_writers_go_and_newer_ones_stay(student: Path, run: RunDirectory) -> None:
    for name in ("v000001-00000000", "v000002-ffffffff", "v000001", "v000003-abcdabcd"):
        (run.weights / f".staging-{name}" / ".shares").mkdir(parents=True)
    publisher = make_publisher(run, student)
    publisher.publish(2, parameters_of(student))
    publisher.wait()
    assert names_in(run.weights) == [".staging-v000003-abcdabcd", "v000002"]


# What goes wrong


def test_a_version_is_published_once(student: Path, run: RunDirectory) -> None:
    publisher = make_publisher(run, student)
    publisher.publish(0, parameters_of(student))
    publisher.wait()
    before = {path: path.stat().st_mtime_ns for path in run.version(0).iterdir()}
    with pytest.raises(UserError, match=r"v000000: is published already"):
        publisher.publish(0, parameters_of(student))
    assert {path: path.stat().st_mtime_ns for path in run.version(0).iterdir()} == before


def test_of_two_writers_one_wins(student: Path, run: RunDirectory, held: threading.Event) -> None:
    """Both begin, neither sees the other's version; the winner's is whole, the other has a clear error."""
    publishers = [make_publisher(run, student) for _ in range(2)]
    other = parameters_of(make_llama(run.root / "other", 1))
    publishers[0].publish(0, parameters_of(student))
    publishers[1].publish(0, other)
    held.set()
    outcomes = []
    for publisher in publishers:
        try:
            publisher.wait()
            outcomes.append("")
        except UserError as error:
            outcomes.append(str(error))
    assert sorted(map(bool, outcomes)) == [False, True]
    assert "v000000: is published already" in max(outcomes) and "another trainer" in max(outcomes)
    verify_version(run.version(0))
    winner = [parameters_of(student), other][outcomes.index("")]
    published = tensors_in(run.version(0))["model.norm.weight"]
    assert torch.equal(published, winner["decoder.final_layernorm.weight"])
    assert names_in(run.weights) == ["v000000"]


def test_a_slow_writer_whose_folder_was_tidied_up_is_told_why(
    student: Path, run: RunDirectory, held: threading.Event
) -> None:
    late, first = make_publisher(run, student), make_publisher(run, student)
    late.publish(0, parameters_of(student))
    while not list(run.weights.glob("*/*.safetensors")):
        time.sleep(0.001)
    write_slowly()  # the next one does not wait
    first.publish(0, parameters_of(student))
    first.wait()
    held.set()
    with pytest.raises(UserError, match="v000000: is published already"):
        late.wait()
    verify_version(run.version(0))
    assert names_in(run.weights) == ["v000000"]


def test_a_folder_that_vanishes_is_an_error_at_once(student: Path, run: RunDirectory, held: threading.Event) -> None:
    publisher = make_publisher(run, student)
    publisher.publish(0, parameters_of(student))
    (staging,) = run.weights.iterdir()
    staging.rename(run.root / "elsewhere")
    held.set()
    with pytest.raises(UserError, match=r"\.staging-v000000-\w{8}.*: cannot write v000000"):
        publisher.wait()


def test_a_folder_that_cannot_be_made_is_one_line(student: Path, run: RunDirectory) -> None:
    run.root.mkdir()
    run.weights.write_text("a file where a folder must be")
    publisher = make_publisher(run, student)
    with pytest.raises(
        UserError, match=r"weights.*: cannot write v000000: Not a directory; must be a writable"
    ) as error:
        publisher.publish(0, parameters_of(student))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_misses_a_tensor_never_becomes_visible(student: Path, run: RunDirectory) -> None:
    """A fault of ours, not the user's."""
    publisher = make_publisher(run, student)
    publisher.dims = read_model_dims(make_llama(run.root / "deeper", 0, num_hidden_layers=3))
    publisher.publish(0, parameters_of(student))
    with pytest.raises(RuntimeError, match="holds 21 tensors, the model has 30"):
        publisher.wait()
    assert names_in(run.weights) == []


def test_no_thread_outlives_a_publication(student: Path, run: RunDirectory) -> None:
    """A checkpoint forks this process next: another thread could hold a lock that the child then waits for."""
    publisher = make_publisher(run, student)
    for version in range(5):
        publisher.publish(version, parameters_of(student))
        publisher.wait()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("publish")]


# Killed, out of space, not writable: other processes


def lone(action: str, run: RunDirectory, student: Path, *before: str) -> list[dict[str, Any]]:
    command = [*before, sys.executable, str(SUPPORT / "lone_publisher.py"), action, str(run.root), str(student)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_writer_killed_at_any_point_harms_nothing(student: Path, run: RunDirectory) -> None:
    """At every fsync and rename there is: no version or a whole one, the old one untouched, and a restart completes."""
    points = lone("crash", run, student)
    assert len(points) > 20 and not points[-1]["killed"]
    assert all(point["killed"] for point in points[:-1])
    for point in points:
        assert point["visible"] in ([0], [0, 1]) and point["whole"] == point["visible"]
        assert point["after"] == ["v000000", "v000001"] or point["visible"] == [0, 1], "the restart tidied up"
    assert sum(point["visible"] == [0] and bool(point["left"]) for point in points) > 15, "most died half-way"
    assert points[-2]["visible"] == [0, 1], "the last died after the rename"


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_are_one_line_each(student: Path, run: RunDirectory) -> None:
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    run.weights.mkdir(parents=True)
    size = sum(file.stat().st_size for file in student.iterdir())
    mount = f'mount -t tmpfs -o size={3 * size // 2} tmpfs "$0" && exec "$@"'
    no_space, read_only = lone("full", run, student, *space, "sh", "-c", mount, str(run.weights))
    assert "No space left on device" in no_space["error"] and ".staging-v000001-" in no_space["error"]
    assert "v000002: Read-only file system; must be a writable folder" in read_only["error"]
    for refused in (no_space, read_only):
        assert refused["left"] == ["v000000"] and refused["whole"] == 0 and "\n" not in refused["error"]


# Real models, several ranks


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By tied: 3 groups of heads and 131 tokens, padded at TP 2; 4 layers."""
    root = tmp_path_factory.mktemp("padded")
    size = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 131}
    return {tied: make_llama(root / str(tied), 0, tied=tied, num_hidden_layers=4, **size) for tied in (True, False)}


def work(jobs: dict[str, dict[str, Any]], out: Path, ranks: int) -> list[str]:
    """The command of a worker for these jobs; each has a run directory and a folder of results of its name."""
    for name, job in jobs.items():
        (out / name / "out").mkdir(parents=True, exist_ok=True)
        job |= {"run": str(out / name / "run"), "out": str(out / name / "out")}
    return [sys.executable, str(SUPPORT / "publish_worker.py"), json.dumps(list(jobs.values()))]


def told(out: Path, name: str, ranks: int) -> list[dict[str, Any]]:
    return [read_json(out / name / "out" / f"rank{rank}.json") for rank in range(ranks)]


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tp": 2, "pp": 2},
    "dp2_tp2": {"tp": 2, "distributed_optimizer": True},
    "cp2_tp2": {"tp": 2, "cp": 2, "dtype": "bfloat16"},
    "dp2_pp2_interleaved": {"pp": 2, "vpp": 2},
}


@pytest.mark.slow
def test_training_goes_on_while_every_rank_writes_its_share(padded: dict[bool, Path], tmp_path: Path) -> None:
    jobs = {
        name: {"action": "train_on", "checkpoint": str(padded[name != "dp2_tp2"])} | layout
        for name, layout in LAYOUTS.items()
    }
    run_ranks(work(jobs, tmp_path, 4), 4, tmp_path / "rendezvous")
    for name, job in jobs.items():
        run = RunDirectory(Path(job["run"]))
        ranks = told(tmp_path, name, 4)
        for version in (0, 1):
            assert verify_version(run.version(version)).version == version
        dtype = torch.bfloat16 if job.get("dtype") else torch.float32
        loaded = {key: tensor.to(dtype) for key, tensor in tensors_in(Path(job["checkpoint"])).items()}
        expected, trained = {}, {}
        for file in Path(job["out"]).glob("*.safetensors"):
            (expected if file.name.startswith("expected") else trained).update(load_file(file))
        first, second = tensors_in(run.version(0)), tensors_in(run.version(1))
        assert first.keys() == second.keys() == expected.keys() == loaded.keys(), name
        for key in first:
            assert torch.equal(first[key], loaded[key]), (name, key)
            assert torch.equal(second[key], expected[key]), (name, key)
            assert not torch.equal(trained[key], expected[key]), f"{name}: training did not move {key} meanwhile"
        size = sum(tensor.nbytes for tensor in first.values())
        held = [rank["held"] for rank in ranks]
        assert sum(held) == size and min(held) > 0.1 * size, f"{name}: {held}"
        for rank in ranks:
            assert rank["busy"] == [True] * 3 and not rank["early"], f"{name}: nothing is out before all is written"
            zero, one = rank["published"]
            assert zero["bytes"] == one["bytes"] == size
            assert one["seconds"] > zero["seconds"] > 0 and one["seconds"] == ranks[0]["published"][1]["seconds"]


@pytest.mark.slow
def test_one_ranks_death_and_one_ranks_full_disk_reach_all(padded: dict[bool, Path], tmp_path: Path) -> None:
    """No rank hangs, old versions stay; a restart completes, also the one version that a rank could not write."""
    jobs = {"all": {"action": "die", "rank": 1, "tp": 2, "checkpoint": str(padded[True])}}
    run = RunDirectory(tmp_path / "all" / "run")
    ranks = start_ranks(work(jobs, tmp_path, 2), 2, tmp_path / "rendezvous")
    try:
        logs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == -9 and ranks[0].returncode == 1, logs[0][-3000:]
    assert published_versions(run) == [0] and len(names_in(run.weights)) == 2, "the dead one's folder is there"
    verify_version(run.version(0))

    jobs = {"all": {"action": "fill_the_disk", "version": 1, "rank": 1, "tp": 2, "checkpoint": str(padded[True])}}
    run_ranks(work(jobs, tmp_path, 2), 2, tmp_path / "rendezvous_again")
    for rank in told(tmp_path, "all", 2):
        assert "cannot write v000001: File too large" in rank["error"] and ".safetensors: " in rank["error"]
        assert rank["seconds"] < 15 and "v000001" not in rank["left"]
    assert published_versions(run) == [0, 1] and names_in(run.weights) == ["v000000", "v000001"]
    for version in (0, 1):
        verify_version(run.version(version))
