"""Which file a tensor is read from, in every role; and what of a checkpoint must not be dropped or wrong unsaid."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import Inputs
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, LLAMA3_ROPE, make_llama, make_model

from megatron_npd.conversion.to_megatron import to_megatron
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import UserError
from megatron_npd.mcore.rotary import inverse_frequencies
from megatron_npd.models.hf_checkpoint import FLOAT_TYPES, INDEX, check_checkpoint, tensor_files
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.prepare.preflight import preflight
from megatron_npd.weights import soundness
from megatron_npd.weights.source import HuggingFaceSource, open_checkpoint
from megatron_npd.weights.tensor_file import DTYPES

HEAD, NORM, EMBEDDING = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    """Replace or add tensors of a file (None: remove); dots of names are spelled __."""
    content = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
    save_file(content, path, {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """An untied checkpoint in several files, with its index."""
    return make_llama(tmp_path / "model", 0, tied=False, split=True)


def files_of(folder: Path) -> tuple[Path, Path]:
    """The file that holds the head, and another one."""
    places = tensor_files(folder).of
    holder = places[HEAD]
    return holder, next(path for path in sorted(set(places.values())) if path != holder)


@pytest.mark.parametrize("where", ["a listed file", "a file beside them"])
def test_the_index_decides_whatever_else_holds_a_tensor(sharded: Path, where: str) -> None:
    holder, other = files_of(sharded)
    right = load_file(holder)[HEAD]
    old = torch.full_like(right, 7.0)
    # Names before and after the right file's, so that neither the first nor the last one wins by chance.
    for name in (other.name,) if where == "a listed file" else ("a.safetensors", "model.safetensors", "z.safetensors"):
        path = sharded / name
        change(path, lm_head__weight=old) if path.is_file() else save_file({HEAD: old, NORM: torch.zeros(64)}, path)
    with open_checkpoint(sharded) as files:
        assert torch.equal(files[HEAD].get_tensor(HEAD), right)
    source = HuggingFaceSource(sharded, read_model_dims(sharded))
    assert torch.equal(source.tensors[HEAD].read(), right)
    said = " ".join(source.places.left_out)
    assert (f"tensor {HEAD} of {other.name}" if where == "a listed file" else "file z.safetensors") in said


def test_what_is_left_out_is_named_by_check_and_conversion(
    inputs: Inputs, parallel: Parallel, caplog: pytest.LogCaptureFixture
) -> None:
    make_llama(inputs.student, 0, num_hidden_layers=1, split=True)
    save_file({HEAD: torch.zeros(2)}, inputs.student / "old.safetensors")
    with caplog.at_level(logging.WARNING):
        preflight(inputs.config)
    assert "models.student" in caplog.text and "file old.safetensors" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        to_megatron(inputs.student, inputs.root / "converted", parallel)
    assert "file old.safetensors" in caplog.text


def lying_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][HEAD] = files_of(folder)[1].name
    (folder / INDEX).write_text(json.dumps(index))


def no_index(folder: Path) -> None:
    change(files_of(folder)[1], lm_head__weight=torch.zeros(128, 64))
    (folder / INDEX).unlink()


def outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][HEAD] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lying_index, [INDEX, "says that", f"holds tensor {HEAD}", "does not"]),
        (no_index, [f"tensor {HEAD} is in", "and in", "must be in one file"]),
        (outside, [INDEX, "weight_map of file names"]),
    ],
)
def test_what_leaves_a_doubt_is_refused(sharded: Path, spoil: Callable[[Path], None], words: list[str]) -> None:
    spoil(sharded)
    with pytest.raises(UserError) as refused:
        check_checkpoint("models.teacher", sharded)
    assert all(word in str(refused.value) for word in words), refused.value


def test_much_that_is_left_out_is_one_line(
    inputs: Inputs, parallel: Parallel, caplog: pytest.LogCaptureFixture
) -> None:
    """All tensors lie in each of the listed files."""
    (inputs.student / "model.safetensors").unlink()
    make_llama(inputs.student, 0, num_hidden_layers=1, tied=False, split=True)
    index = json.loads((inputs.student / INDEX).read_text())["weight_map"]
    tensors = {name: load_file(inputs.student / file)[name] for name, file in index.items()}
    for file in set(index.values()):
        save_file(tensors, inputs.student / file, {"format": "pt"})
    for command in (lambda: preflight(inputs.config), lambda: to_megatron(inputs.student, inputs.root / "c", parallel)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            command()
        [line] = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
        assert f"and {len(tensors) * (len(set(index.values())) - 1) - 3} more" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_every_family(family: str, tmp_path: Path) -> None:
    """Sizes differ, so that no two are mistaken for one another."""
    head_dim = 16 if family == "openpangu" else 20  # its config.json has no key for another
    sizes = {"vocab_size": 130, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim}
    folder = make_model(family, tmp_path, 0, **sizes)
    assert check_checkpoint("models.teacher", folder).tensors is not None
    for name in {name.split(".")[-2] + "." + name.split(".")[-1]: name for name in tensor_files(folder).of}.values():
        right = load_file(folder / "model.safetensors")[name]
        change(folder / "model.safetensors", **{name.replace(".", "__"): right[:-1].contiguous()})
        with pytest.raises(UserError, match=rf"models.teacher = .*: {name} has shape .*; must be "):
            check_checkpoint("models.teacher", folder)
        change(folder / "model.safetensors", **{name.replace(".", "__"): right})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_weights_of_other_types_are_not_cast_unsaid(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_llama(tmp_path, 0)
    change(folder / "model.safetensors", model__norm__weight=torch.ones(64).to(dtype))
    with pytest.raises(UserError, match=r"tensor model.norm.weight is \w+; must be one of F32, BF16, F16"):
        check_checkpoint("models.teacher", folder)
    assert tuple(DTYPES) == FLOAT_TYPES


def looked_at(folder: Path) -> None:
    soundness.check_weights("models.teacher", tensor_files(folder), read_model_dims(folder))


# --- a stored head beside a tied one ---


def test_an_equal_copy_of_a_tied_head_is_fine(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, 0, tied=True)
    change(folder / "model.safetensors", lm_head__weight=load_file(folder / "model.safetensors")[EMBEDDING].clone())
    looked_at(folder)


@pytest.mark.parametrize("other", [lambda head: head * 1.5, lambda head: head.bfloat16(), lambda head: head[:-1]])
def test_another_head_than_the_tied_one_is_not_dropped(tmp_path: Path, other: Callable[..., torch.Tensor]) -> None:
    folder = make_llama(tmp_path, 0, tied=True)
    head = load_file(folder / "model.safetensors")[EMBEDDING]
    change(folder / "model.safetensors", lm_head__weight=other(head).contiguous())
    with pytest.raises(UserError, match=r"tie_word_embeddings = true, but lm_head.weight of model.safetensors is not"):
        looked_at(folder)


def test_families_tie_by_default_what_transformers_ties(tmp_path: Path) -> None:
    """config.json may leave the key out."""
    for family, (config_class, _) in FAMILIES.items():
        folder = make_model(family, tmp_path / family, 0, tied=bool(config_class().tie_word_embeddings))
        config = json.loads((folder / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(config))
        assert read_model_dims(folder).tied_embeddings == config_class().tie_word_embeddings, family


def store_frequencies(folder: Path, frequencies: torch.Tensor) -> None:
    change(folder / "model.safetensors", model__layers__0__self_attn__rotary_emb__inv_freq=frequencies)


def frequencies_of(theta: float) -> torch.Tensor:
    return theta ** -(torch.arange(0, 32, 2) / 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_stored_rotary_frequencies_of_config_json_are_fine(tmp_path: Path, dtype: torch.dtype, theta: float) -> None:
    """The smallest of theta 1e7 are no multiple of what float16 can tell apart."""
    folder = make_llama(tmp_path, 0, rope_parameters={"rope_type": "default", "rope_theta": theta})
    store_frequencies(folder, frequencies_of(theta).to(dtype))
    looked_at(folder)


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}])
def test_stored_frequencies_are_scaled_or_not(tmp_path: Path, rope: dict[str, Any]) -> None:
    """As newer and as older versions of transformers stored them; other scaling is other frequencies."""
    folder = make_llama(tmp_path, 0, rope_parameters=rope)
    scaled = inverse_frequencies(read_model_dims(folder))
    for right in (scaled, frequencies_of(1e4)):
        store_frequencies(folder, right.clone())
        looked_at(folder)
    store_frequencies(folder, scaled / 2)
    with pytest.raises(UserError, match="rotary frequencies other"):
        looked_at(folder)


@pytest.mark.parametrize(
    "stored", [frequencies_of(1e4) / 2, frequencies_of(2e4), frequencies_of(1e4)[:-1], torch.arange(16)]
)
def test_other_rotary_frequencies_are_not_dropped(tmp_path: Path, stored: torch.Tensor) -> None:
    folder = make_llama(tmp_path, 0)
    store_frequencies(folder, stored.contiguous())
    with pytest.raises(UserError, match=r"rotary frequencies other than config\.json implies"):
        looked_at(folder)


# --- numbers that are none ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_broken_number_is_found(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    folder = make_llama(tmp_path, 0, dtype=dtype)
    looked_at(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor[3, 5] = bad
    change(folder / "model.safetensors", **{name.replace(".", "__"): tensor})
    with pytest.raises(UserError) as refused:
        looked_at(folder)
    assert str(refused.value) == (
        f"models.teacher: tensor {name} of model.safetensors holds 1 value NaN or infinite; must be finite numbers"
    )


def test_large_numbers_are_numbers(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, 0)
    largest = torch.full((64,), torch.finfo(torch.float32).max)
    largest[::2] *= -1
    change(folder / "model.safetensors", model__norm__weight=largest)
    looked_at(folder)


def test_chunks_of_any_size_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path, 0, dtype=torch.bfloat16)
    tensor = load_file(folder / "model.safetensors")[EMBEDDING].clone()
    tensor.view(-1)[[0, 1000, -1]] = float("inf")
    change(folder / "model.safetensors", model__embed_tokens__weight=tensor)
    for chunk in (2, 1 << 10, 1 << 24):
        monkeypatch.setattr(soundness, "CHUNK", chunk)
        with pytest.raises(UserError, match="holds 3 values NaN or infinite"):
            looked_at(folder)


def test_sound_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    folder = make_llama(tmp_path / "model", 0)
    read: list[Path] = []
    chunks = soundness._chunks
    monkeypatch.setattr(soundness, "_chunks", lambda stored: read.append(stored.path) or chunks(stored))
    looked_at(folder)
    count = len(read)
    looked_at(folder)
    assert count == len(read) > 5
    change(folder / "model.safetensors", model__norm__weight=torch.ones(64))
    looked_at(folder)
    assert len(read) == 2 * count


def test_a_cache_that_cannot_be_written_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        looked_at(make_llama(tmp_path / "model", 0))
    assert "NPD_CACHE" in caplog.text


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path / "model", 0)
    places, dims = tensor_files(folder), read_model_dims(folder)
    header = soundness.stored_tensors(places)
    monkeypatch.setattr(soundness, "stored_tensors", lambda _: header)
    (folder / "model.safetensors").rename(folder / "elsewhere")
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(Is a directory\)"):
        soundness.check_weights("models.teacher", places, dims)
