"""Whatever is wrong with a version, the engine serves the old one, says what is wrong, and takes the next good one."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import TOLERANCE, largest_difference, published, refresh, requests, rewrite, start
from open_files import open_files
from safetensors.torch import load_file, save_file
from tiny_models import make_model, probe_sequences, publish

from megatron_npd.errors import BadVersionError
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.versions.manifest import read_manifest, read_parity_probe, verify_version, write_manifest
from megatron_npd.versions.staged import ServedVersion, stage_version
from megatron_npd.vllm_engine import engine as engine_module
from megatron_npd.vllm_engine import worker
from megatron_npd.vllm_engine.engine import RolloutEngine, RolloutError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("engines_live_on")]

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, engines_live_on: None) -> RolloutEngine:
    """An engine shared by the tests below, which may refresh it to newer versions as they like."""
    return start(published(tmp_path_factory.mktemp("start"), 0, tied=True), 0)


@pytest.fixture
def next_version(engine: RolloutEngine, tmp_path: Path) -> Path:
    """Folder of a version that may replace the served one, in several files."""
    return published(tmp_path, engine.version + 1, tied=True, split=True)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_serves(engine: RolloutEngine, folder: Path) -> None:
    """The engine computes what transformers computes from the version in `folder`."""
    assert largest_difference(engine.logprobs(probe_sequences()), read_parity_probe(folder).logprobs) < TOLERANCE


# --- what can be wrong with a version -------------------------------------------------------------------------------


def remove_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(NORM))


def add_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(surplus=torch.zeros(1)))


def change_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(65)}))


def change_dtype(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16()}))


def flip_byte(folder: Path) -> None:
    file = weight_files(folder)[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = weight_files(folder)[0]
    os.truncate(file, file.stat().st_size - 4096)


def remove_file(folder: Path) -> None:
    weight_files(folder)[-1].unlink()


def repeat_tensor(folder: Path) -> None:
    save_file({NORM: torch.zeros(64)}, folder / "another.safetensors")
    write_manifest(folder, read_manifest(folder).version)


def slip_in_file(folder: Path) -> None:
    save_file({NORM: torch.zeros(64)}, folder / "another.safetensors")


def lie_about_a_tensor(folder: Path) -> None:
    """The manifest promises what the served version has; the file, correctly summed, holds something else."""
    promised = json.loads((folder / "version.json").read_text())
    change_shape(folder)
    summed = json.loads((folder / "version.json").read_text())
    (folder / "version.json").write_text(json.dumps(summed | {"tensors": promised["tensors"]}))


def change_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, read_manifest(folder).version)


def change_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["OtherForCausalLM"]}))
    write_manifest(folder, read_manifest(folder).version)


def tear_config(folder: Path) -> None:
    os.truncate(folder / "config.json", 20)


def relabel(folder: Path) -> None:
    write_manifest(folder, 999)


def tear_manifest(folder: Path) -> None:
    os.truncate(folder / "version.json", 100)


def two_writers(folder: Path) -> None:
    """One writer's first file under the other's manifest."""
    other = make_model("llama", folder.with_name("other_writer"), 1, tied=True, split=True)
    shutil.copy(weight_files(other)[0], weight_files(folder)[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tensor, "tensor model.norm.weight is missing"),
        (add_tensor, "tensor surplus is not in the served version"),
        (change_shape, r"tensor model.norm.weight is F32 \[65\], must be F32 \[64\]"),
        (change_dtype, r"tensor model.norm.weight is BF16 \[64\], must be F32 \[64\]"),
        (flip_byte, r"model-00003-of-00003.safetensors: content differs from the checksum"),
        (truncate, r"model-00001-of-00003.safetensors: content differs from the checksum"),
        (remove_file, r"model-00003-of-00003.safetensors: missing"),
        (repeat_tensor, "tensor model.norm.weight is also in"),
        (slip_in_file, "another.safetensors: not listed"),
        (lie_about_a_tensor, r"tensor model.norm.weight is \('F32', \(65,\)\), the manifest says"),
        (change_rope, "config.json: rope_theta = 5000.0, must be 10000.0"),
        (change_family, "config.json: architecture OtherForCausalLM"),
        (tear_config, "config.json: content differs from the checksum"),
        (relabel, "the manifest says version 999"),
        (tear_manifest, "version.json: no readable manifest"),
        (two_writers, r"model-00001-of-00003.safetensors: content differs from the checksum"),
        (shutil.rmtree, "version.json: no readable manifest"),
    ],
)
def test_bad_version_changes_nothing_and_a_good_one_follows(
    engine: RolloutEngine, next_version: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    good = shutil.copytree(next_version, tmp_path / "good")
    damage(next_version)
    version, before = engine.version, engine.logprobs(probe_sequences())
    held = files_held(next_version)
    with pytest.raises(BadVersionError, match=message):
        refresh(engine, next_version)
    assert files_held(next_version) == held, "nothing of what was read of it may stay open, or in memory"
    assert (engine.version, engine.logprobs(probe_sequences())) == (version, before)
    assert engine.generate(requests(2))[0].version == version
    refresh(engine, good)
    assert_serves(engine, good)


def files_held(folder: Path) -> list[str]:
    """What this process has open of a folder, and of files in memory."""
    return [file for file in open_files() if file.startswith(("/memfd:", str(folder)))]


def test_only_a_newer_version_is_accepted(engine: RolloutEngine, next_version: Path, tmp_path: Path) -> None:
    with engine.stage(next_version, engine.version + 1) as late:
        refresh(engine, next_version)
        with pytest.raises(BadVersionError, match="is not newer than version"):
            engine.refresh(late)  # it was when it was staged
    older = published(tmp_path / "older", 0, tied=True)
    for folder, version in ((next_version, engine.version), (older, 0)):
        with pytest.raises(BadVersionError, match="is not newer than version"):
            engine.stage(folder, version)
    assert_serves(engine, next_version)


def test_damaged_version_is_not_started_on(tmp_path: Path) -> None:
    folder = published(tmp_path, 0)
    flip_byte(folder)
    with pytest.raises(BadVersionError, match="content differs"):
        start(folder, 0)


def test_load_that_fails_half_way_never_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixed model is not repaired: the engine refuses all work, and the process must be restarted."""
    # Other positions than the other tests' models: vLLM shares the rotary module of equal ones within a process.
    engine = start(published(tmp_path, 0, max_position_embeddings=512), 0)
    new = published(tmp_path, 1, max_position_embeddings=512)

    def torn(files, whole=worker.checkpoint_tensors):
        yield from itertools.islice(whole(files), 8)
        raise OSError("the disk is gone")

    monkeypatch.setattr(worker, "checkpoint_tensors", torn)
    with pytest.raises(RolloutError, match="update to version 1 failed half-way: the disk is gone"):
        refresh(engine, new)
    monkeypatch.undo()
    for use in (lambda: engine.generate(requests()), lambda: engine.logprobs([[3, 4]]), lambda: refresh(engine, new)):
        with pytest.raises(RolloutError, match="cannot be used any more"):
            use()


# --- what can happen to it meanwhile --------------------------------------------------------------------------------


def overwrite_in_place(folder: Path) -> None:
    """Another model's values under the same inodes, whoever has the files open or mapped."""
    for file in weight_files(folder):
        size = file.stat().st_size
        with open(file, "r+b") as stream:
            stream.seek(size // 2)
            stream.write(os.urandom(size - size // 2))


def replace(folder: Path) -> None:
    """Another version under the same name, whole and consistent."""
    version = read_manifest(folder).version
    shutil.rmtree(folder)
    publish(make_model("llama", folder, 77, tied=True, split=True), version)


@pytest.mark.parametrize("happens", [shutil.rmtree, overwrite_in_place, replace])
def test_what_happens_to_the_files_after_verification_does_not_matter(
    engine: RolloutEngine, next_version: Path, tmp_path: Path, happens: Callable[[Path], object]
) -> None:
    original = shutil.copytree(next_version, tmp_path / "original")
    with engine.stage(next_version, engine.version + 1) as staged:
        happens(next_version)
        engine.refresh(staged)
    assert_serves(engine, original)


def test_version_that_is_swapped_while_it_is_read_is_one_of_the_two_or_refused(tmp_path: Path) -> None:
    """Two whole versions of one number, exchanged all the time by renames: never a mixture."""
    first = published(tmp_path, 0, tied=True)
    served = ServedVersion(0, read_model_dims(first), verify_version(first).tensors)
    folder, aside = tmp_path / "v000001", tmp_path / "aside"
    contents = []
    for seed, place in enumerate((folder, aside)):
        publish(make_model("llama", place, seed, tied=True, split=True), 1)
        contents.append({name: tensor for file in weight_files(place) for name, tensor in load_file(file).items()})
    stop, outcomes = threading.Event(), set()
    pauses = random.Random(0)

    def exchange() -> None:
        while not stop.wait(pauses.uniform(0, 0.02)):
            for source, target in ((folder, tmp_path / "third"), (aside, folder), (tmp_path / "third", aside)):
                source.rename(target)

    swapper = threading.Thread(target=exchange)
    swapper.start()
    try:
        for _ in range(5000):
            try:
                with stage_version(served, folder, 1) as staged:
                    found = dict(worker.checkpoint_tensors([str(file) for file in staged.copy.weights]))
                which = next(i for i, content in enumerate(contents) if torch.equal(content[NORM], found[NORM]))
                assert all(torch.equal(tensor, found[name]) for name, tensor in contents[which].items())
                outcomes.add(which)
            except BadVersionError:
                outcomes.add("refused")
            if len(outcomes) == 3:
                return
    finally:
        stop.set()
        swapper.join()
    raise AssertionError(f"the exchange must hit a reading, and miss it, for this to show anything: {outcomes}")


def test_files_that_change_while_vllm_starts_on_them_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start vLLM reads the verified files by itself."""
    folder = published(tmp_path, 0)

    def start_then_touch(*arguments, really=engine_module.start_vllm):
        started = really(*arguments)
        overwrite_in_place(folder)
        return started

    monkeypatch.setattr(engine_module, "start_vllm", start_then_touch)
    with pytest.raises(BadVersionError, match=r"model.safetensors: changed while it was being loaded"):
        start(folder, 0)


def test_version_that_does_not_fit_into_memory_changes_nothing(engine: RolloutEngine, next_version: Path) -> None:
    version, before = engine.version, engine.logprobs(probe_sequences())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))  # holds for files in memory as well
    try:
        with pytest.raises(MemoryError, match="no memory for a copy of a published version"):
            refresh(engine, next_version)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (engine.version, engine.logprobs(probe_sequences())) == (version, before)
    refresh(engine, next_version)
    assert_serves(engine, next_version)


def test_staging_runs_beside_generation(engine: RolloutEngine, next_version: Path) -> None:
    asked = requests(16, stop_token_ids=[])
    expected, version = engine.generate(asked), engine.version
    staged = []
    thread = threading.Thread(target=lambda: staged.append(engine.stage(next_version, version + 1)))
    thread.start()
    assert engine.generate(asked) == expected
    thread.join()
    with staged[0]:
        assert engine.generate(asked) == expected, "a staged version is not served yet"
        engine.refresh(staged[0])
    assert_serves(engine, next_version)
