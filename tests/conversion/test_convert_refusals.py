"""What the conversion tool refuses: one line on stderr, exit status 2, nothing lost."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from converting import AWKWARD, assert_same_model, contents, convert, weights
from safetensors.torch import save_file
from tiny_models import make_llama

pytestmark = pytest.mark.slow  # they import Megatron


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf` and `megatron`, the same model; tests copy it."""
    root = tmp_path_factory.mktemp("good")
    make_llama(root / "hf", 4, **AWKWARD)
    assert convert("hf-to-megatron", "--input", root / "hf", "--output", root / "megatron") == 0
    return root


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run the tool on what it must refuse, with one line and status 2; the line."""

    def run(*arguments: object) -> str:
        assert convert(*arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("convert_checkpoint: error: ") and err.count("\n") == 1
        return err

    return run


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


class Call:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def pickled_text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


NORM, PROJ = "model.norm.weight", "model.layers.1.self_attn.o_proj.weight"
BAD_HUGGING_FACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (shutil.rmtree, "hf/config.json: cannot read: No such file"),
    "unknown family": (lambda f: change_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not support"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors file in it"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "damaged or cut short"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 9999), "damaged or cut short"),
    "missing tensor": (lambda f: change_weights(f, lambda t: t.pop(PROJ)), f"tensor {PROJ} is missing"),
    "unknown tensor": (
        lambda f: change_weights(f, lambda t: t.update({"model.extra": torch.zeros(1)})),
        "tensor model.extra is not known to the llama family",
    ),
    "wrong shape": (
        lambda f: change_weights(f, lambda t: t.update({PROJ: torch.zeros(96, 95)})),
        f"tensor {PROJ} has shape (96, 95); must be (96, 96) to fit config.json",
    ),
    "other dimensions": (lambda f: change_config(f, intermediate_size=80), "must be (80, 96) to fit config.json"),
    "integers": (
        lambda f: change_weights(f, lambda t: t.update({NORM: torch.zeros(96, dtype=torch.int8)})),
        f"tensor {NORM} is I8; must be one of F32, BF16, F16",
    ),
    "one layer is narrower": (
        lambda f: change_weights(f, lambda t: t.update({PROJ: t[PROJ].half()})),
        "choose one data type with --dtype",
    ),
    "listed file missing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}'),
        "weight file other.safetensors is missing, though model.safetensors.index.json lists it",
    ),
}
BAD_MEGATRON: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (shutil.rmtree, "no such folder; must be a torch_dist checkpoint"),
    "no checkpoint": (
        lambda f: (f / "metadata.json").unlink(),
        "not a torch_dist checkpoint: holds neither meta",
    ),
    "another format": (
        lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "sharded_backend 'zarr' is not supported; must be 'torch_dist'",
    ),
    "index missing": (lambda f: (f / ".metadata").unlink(), ".metadata: no such file; the checkpoint is not complete"),
    "index damaged": (lambda f: os.truncate(f / ".metadata", 99), ".metadata: not a readable index"),
    "index runs code": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Call(os.mkdir, str(f.parent / "exploded")))),
        "it names posix.mkdir, which does not belong there",
    ),
    "index runs code through a module that belongs there": (
        lambda f: (f / ".metadata").write_bytes(
            b"\x80\x04"
            + pickled_text("torch.distributed.checkpoint.filesystem")
            + pickled_text("os.mkdir")
            + b"\x93"  # the function of that name
            + pickled_text(str(f.parent / "exploded"))
            + b"\x85R."  # called with that text
        ),
        "it names torch.distributed.checkpoint.filesystem.os.mkdir, which does not belong there",
    ),
    "file missing": (lambda f: (f / "__1_0.distcp").unlink(), "cannot be read"),
    "file damaged": (lambda f: os.truncate(f / "__2_0.distcp", 999), "cannot be read"),
    "no configuration": (lambda f: shutil.rmtree(f / "hf"), "name a Hugging Face folder with --template"),
    "fewer layers": (lambda f: change_config(f / "hf", num_hidden_layers=1), "has shape (2, 96"),
    "other sizes": (
        lambda f: change_config(f / "hf", intermediate_size=80),
        "mlp.linear_fc1.weight has shape (192, 96), config.json implies (160, 96)",
    ),
    "other heads": (lambda f: change_config(f / "hf", num_attention_heads=12, num_key_value_heads=4), "cannot have sh"),
    "larger vocabulary": (
        lambda f: change_config(f / "hf", vocab_size=200),
        "has shape (131, 96), config.json implies",
    ),
    "a bias more": (lambda f: change_config(f / "hf", attention_bias=True), "linear_proj.bias is missing (2 in all)"),
    "tied": (lambda f: change_config(f / "hf", tie_word_embeddings=True), "tensor output_layer.weight is unknown"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_HUGGING_FACE.values(), ids=BAD_HUGGING_FACE)
def test_bad_hugging_face_input(
    spoil: Callable[[Path], object], message: str, good: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(good / "hf", tmp_path / "hf")
    spoil(tmp_path / "hf")
    assert message in refused("hf-to-megatron", "--input", tmp_path / "hf", "--output", tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} <= {"hf"}, "nothing was written"


@pytest.mark.parametrize(("spoil", "message"), BAD_MEGATRON.values(), ids=BAD_MEGATRON)
def test_bad_megatron_input(
    spoil: Callable[[Path], object], message: str, good: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(good / "megatron", tmp_path / "megatron")
    spoil(tmp_path / "megatron")
    assert message in refused("megatron-to-hf", "--input", tmp_path / "megatron", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "exploded").exists()


def test_bad_output_and_options(good: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    there, back = ("hf-to-megatron", "--input", good / "hf"), ("megatron-to-hf", "--input", good / "megatron")
    assert "is there already; --overwrite replaces it" in refused(*there, "--output", good / "megatron")
    (tmp_path / "file").write_text("")
    assert "file: is a file" in refused(*there, "--output", tmp_path / "file")
    assert "megatron: holds the input" in refused(*back, "--output", good / "megatron", "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "mine: is no checkpoint" in refused(*there, "--output", tmp_path / "mine", "--overwrite")
    assert "Not a directory" in refused(*there, "--output", tmp_path / "file" / "below")
    out = ("--output", tmp_path / "out")
    assert "must be a size such as 5GB" in refused(*back, *out, "--max-shard-size", "5 apples")
    assert "holds no config.json" in refused(*back, *out, "--template", tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "mine"}
    for argument, message in (("1,2;x", "must be a .jsonl file, or token ids"), ("131", "must be from 0 to 130")):
        assert message in refused(*there, *out, "--overwrite", "--verify", argument)


def test_too_little_space(good: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    """An embedding larger than the disk: its file is a hole, only headers are read."""
    shutil.copytree(good / "hf", tmp_path / "hf")
    change_weights(tmp_path / "hf", lambda t: [t.pop(name) for name in list(t) if "embed" in name or "lm_head" in name])
    rows = 2 * shutil.disk_usage(tmp_path).total // (96 * 4)
    change_config(tmp_path / "hf", vocab_size=rows)
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        header = {name: {"dtype": "F32", "shape": [rows, 96], "data_offsets": [0, rows * 96 * 4]}}
        text = json.dumps(header).encode()
        path = tmp_path / "hf" / f"huge_{number}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + rows * 96 * 4)
    assert "GB free; must be at least" in refused(
        "hf-to-megatron", "--input", tmp_path / "hf", "--output", tmp_path / "out"
    )
    assert {entry.name for entry in tmp_path.iterdir()} == {"hf"}


def test_a_failing_write_and_another_process_at_work(good: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    """One line; and the same command succeeds when the cause is gone."""
    for command in (("hf-to-megatron", "--input", good / "hf"), ("megatron-to-hf", "--input", good / "megatron")):
        out, soft = tmp_path / command[0], resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft[1]))
        try:
            assert "File too large" in refused(*command, "--output", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        with open(out.with_name(f".staging-{out.name}") / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert "another process is working in it" in refused(*command, "--output", out)
        assert convert(*command, "--output", out) == 0
    assert contents(tmp_path / "hf-to-megatron") == contents(good / "megatron")
    assert_same_model(tmp_path / "megatron-to-hf", good / "hf")
