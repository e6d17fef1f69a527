"""Is a Hugging Face checkpoint whole, and one we know? From headers alone: no weight is read, no model built."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.models.families.family import EMBEDDING
from megatron_npd.models.hf_config import ModelDims, eos_token_ids, read_model_dims
from megatron_npd.models.tensor_map import all_hugging_face_names, unknown_hugging_face_names

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that passed `check_checkpoint`."""

    key: str
    """Configuration key that names it, e.g. models.teacher."""
    folder: Path
    dims: ModelDims
    eos_ids: list[int]
    """Token ids that end its responses."""

    def __str__(self) -> str:
        return f"{self.key} = {self.folder}"


def check_checkpoint(key: str, folder: Path, with_weights: bool = True) -> Checkpoint:
    """Check everything about a checkpoint but its tokenizer; `with_weights` False: nor its weight files.

    Raises:
        UserError: no such folder, an unsupported model, a weight file that is missing or cut short, a tensor that is
            missing or unknown, an embedding that does not fit config.json, or no usable end token.
    """
    if not folder.is_dir():
        raise UserError(f"{key} = {folder}: no such folder; must be a Hugging Face checkpoint")
    checkpoint = Checkpoint(key, folder, read_model_dims(folder), eos_token_ids(folder))
    if with_weights:
        _check_tensors(checkpoint)
    for eos in checkpoint.eos_ids:
        if not 0 <= eos < checkpoint.dims.vocab_size:
            raise UserError(
                f"{checkpoint}: eos_token_id = {eos}: must be below its vocab_size = {checkpoint.dims.vocab_size}"
            )
    return checkpoint


def weight_files(folder: Path, called: str = "") -> list[Path]:
    """The safetensors files of a checkpoint: those its index lists and those beside them, by name.

    `called`: what messages call the folder, e.g. with the key that names it.

    Raises:
        UserError: there is none, or one that the index lists is missing.
    """
    called = called or str(folder)
    names = {file.name for file in folder.glob("*.safetensors")} | _listed_files(folder / INDEX)
    if not names:
        raise UserError(f"{called}: no *.safetensors file in it; weights must be in the safetensors format")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{called}: weight file {name} is missing, though {INDEX} lists it")
    return [folder / name for name in sorted(names)]


def check_names(called: str, found: Collection[str], dims: ModelDims) -> None:
    """Refuse a checkpoint whose tensors are not those of its model; `called`: what messages call it.

    Raises:
        UserError: a tensor is missing, or says something that the model has no place for.
    """
    missing = [name for name in all_hugging_face_names(dims) if name not in found]
    if missing:
        raise UserError(
            f"{called}: tensor {missing[0]} is missing ({len(missing)} in all); the weight files must hold every "
            "tensor that config.json implies"
        )
    unknown = unknown_hugging_face_names(found, dims)
    if unknown:
        raise UserError(
            f"{called}: tensor {unknown[0]} is not known to the {dims.family} family ({len(unknown)} in all); the "
            "weight files must hold no tensor that the family does not have"
        )


def _listed_files(index: Path) -> set[str]:
    if not index.is_file():
        return set()
    try:
        return set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not readable as an index; must be JSON with a weight_map of file names") from None


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every weight file, those the index lists included: names of all tensors, shape of the embedding."""
    dims, shapes = checkpoint.dims, {}
    for file in weight_files(checkpoint.folder, str(checkpoint)):
        shapes |= _read_shapes(file)
    check_names(str(checkpoint), shapes, dims)
    expected = (dims.vocab_size, dims.hidden_size)
    if shapes[EMBEDDING] != expected:
        raise UserError(
            f"{checkpoint}: {EMBEDDING} has shape {shapes[EMBEDDING]}; must be {expected} (vocab_size, hidden_size)"
        )


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of one file; opening it verifies that its header and its size agree."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); must be a whole safetensors file") from None
