"""Inputs that are exchanged between two starts of a run are refused, by name; what does not matter is no change."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inputs import Inputs, write_prompts
from safetensors.torch import load_file, save_file

from megatron_npd.cli import main
from megatron_npd.files import read_json, write_json
from megatron_npd.prepare import fingerprints
from megatron_npd.prepare.fingerprints import fingerprint_of_path
from megatron_npd.prepare.prepare import prepare
from megatron_npd.run_directory import RunDirectory


def one_weight(folder: Path, place: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"].view(-1)[place] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def later_end(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5}))


CHANGES: dict[str, tuple[Callable[[Inputs], object], list[str]]] = {
    "a prompt": (
        lambda i: i.train.write_text(i.train.read_text().replace("3 plus 3", "3 times 3")),
        ["prompts.train", "train.jsonl", "its content changed"],
    ),
    "another held-out file": (
        lambda i: write_prompts(i.heldout, {"h": "Something else?"}),
        ["prompts.heldout", "heldout.jsonl", "its content changed"],
    ),
    "the teacher's first weight": (
        lambda i: one_weight(i.teacher, 0),
        ["models.teacher", "model.safetensors was changed"],
    ),
    "the student's last weight": (
        lambda i: one_weight(i.student, -1),
        ["models.student", "model.safetensors was changed"],
    ),
    "a setting": (lambda i: later_end(i.teacher), ["models.teacher", "generation_config.json was changed"]),
    "the template": (
        lambda i: (i.student / "chat_template.jinja").write_text("{{ messages }}"),
        ["models.student", "chat_template.jinja was changed"],
    ),
    "a file more": (
        lambda i: (i.teacher / "added_tokens.json").write_text("{}"),
        ["models.teacher", "added_tokens.json was added"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_exchanged_input_is_refused_by_name(inputs: Inputs, capsys: pytest.CaptureFixture[str], change: str) -> None:
    exchange, words = CHANGES[change]
    assert main(["prepare", str(inputs.path)]) == 0
    exchange(inputs)
    capsys.readouterr()
    for command in (["prepare"], ["run"], ["rollout", "--policy", "teacher"], ["annotator"]):
        if words[0].startswith("prompts") and command[0] not in ("prepare", "run"):
            continue  # a role reads the tokenised prompts of the run, not these files
        assert main([*command, str(inputs.path)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and all(word in line for word in [*words, "was prepared"]), line


def test_a_tensor_from_elsewhere_is_found_however_large_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies between the blocks that are read evenly over the file."""
    path, tensors = tmp_path / "model.safetensors", {f"x{number:03d}": torch.ones(1 << 10) for number in range(256)}
    monkeypatch.setattr(fingerprints, "SAMPLES", 4)
    monkeypatch.setattr(fingerprints, "BLOCK", 1 << 10)
    monkeypatch.setattr(fingerprints, "OF_TENSOR", 64)
    save_file(tensors, path)
    before, found = fingerprints._of_weights(path), set()
    for name in tensors:
        save_file(tensors | {name: tensors[name] * 1.5}, path)
        found.add(fingerprints._of_weights(path))
    assert len(found) == len(tensors) and before not in found


def test_what_does_not_matter_is_no_change(inputs: Inputs) -> None:
    prepare(inputs.config)
    for path in (inputs.train, inputs.teacher / "model.safetensors", inputs.student / "config.json"):
        os.utime(path, (1, 1))
    (inputs.teacher / "README.md").write_text("a model card")
    shutil.copytree(inputs.student, inputs.root / "copy")
    shutil.rmtree(inputs.student)
    (inputs.root / "copy").rename(inputs.student)
    inputs.train.unlink()  # its tokens are in the run directory
    prepare(inputs.config)


def test_a_run_of_an_older_version_goes_on_and_says_so(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    path = RunDirectory(prepare(inputs.config).root).provenance
    write_json(path, {key: value for key, value in read_json(path).items() if key != "inputs"})
    one_weight(inputs.teacher, 0)
    with caplog.at_level(logging.WARNING):
        prepare(inputs.config)
    assert "does not say what its inputs were" in caplog.text


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_record_is_one_line(inputs: Inputs, capsys: pytest.CaptureFixture[str], content: str) -> None:
    RunDirectory(prepare(inputs.config).root).provenance.write_text(content)
    assert main(["prepare", str(inputs.path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "provenance.json: must be JSON" in line, line


def test_large_weights_are_sampled_over_their_whole_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.arange(1 << 20)}, path)
    before = fingerprints._of_weights(path)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, start: read.append(size) or pread(fd, size, start))
    monkeypatch.setattr(fingerprints, "BLOCK", 1 << 10)
    few = fingerprints._of_weights(path)
    assert few != before and sum(read) < path.stat().st_size / 50
    for offset in (0, path.stat().st_size // 3 * 2, path.stat().st_size - 1):
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            changed = fingerprints._of_weights(path)
            file.seek(offset)
            file.write(byte)
        assert offset not in (0, path.stat().st_size - 1) or changed != few, "header and end are always read"
    assert fingerprints._of_weights(path) == few


def test_a_folder_counts_by_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "a").write_text("1")
    (folder / "b").write_text("2")
    before = fingerprint_of_path(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint_of_path(tmp_path / "copy") == before
    # Left there by `datasets`, by NFS and by a file manager.
    for passing in ("part/cache-0123.arrow", ".nfs0001", ".DS_Store"):
        (folder / passing).write_text("x")
    assert fingerprint_of_path(folder) == before
    (folder / ".part.parquet").write_text("x")
    assert fingerprint_of_path(folder) != before
    (folder / ".part.parquet").unlink()
    (folder / "b").rename(folder / "c")
    assert fingerprint_of_path(folder) != before
