"""Is a Hugging Face checkpoint whole, and one we know? From headers alone: no weight is read, no model built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_npd.errors import UserError
from megatron_npd.models.hf_config import ModelDims, eos_token_ids, read_model_dims
from megatron_npd.run_directory import read_json

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


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
        _check_tensors(checkpoint, _tensor_shapes(checkpoint))
    for eos in checkpoint.eos_ids:
        if not 0 <= eos < checkpoint.dims.vocab_size:
            raise UserError(
                f"{checkpoint}: eos_token_id = {eos}: must be below its vocab_size = {checkpoint.dims.vocab_size}"
            )
    return checkpoint


def _tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in every weight file, those the index lists included."""
    folder = checkpoint.folder
    files = {file.name for file in folder.glob("*.safetensors")} | _listed_files(folder / INDEX)
    if not files:
        raise UserError(f"{checkpoint}: no *.safetensors file in it; weights must be in the safetensors format")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(files):
        if not (folder / name).is_file():
            raise UserError(f"{checkpoint}: weight file {name} is missing, though {INDEX} lists it")
        shapes |= _read_shapes(folder / name)
    return shapes


def _listed_files(index: Path) -> set[str]:
    if not index.is_file():
        return set()
    try:
        return set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not readable as an index; must be JSON with a weight_map of file names") from None


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of one file; opening it verifies that its header and its size agree."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); must be a whole safetensors file") from None


def _check_tensors(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    # They import torch: not before it is needed.
    from megatron_npd.weights.name_map import all_hugging_face_names, unknown_hugging_face_names

    dims = checkpoint.dims
    missing = [name for name in all_hugging_face_names(dims) if name not in shapes]
    if missing:
        raise UserError(
            f"{checkpoint}: tensor {missing[0]} is missing ({len(missing)} in all); the weight files must hold every "
            "tensor that config.json implies"
        )
    unknown = unknown_hugging_face_names(shapes, dims)
    if unknown:
        raise UserError(
            f"{checkpoint}: tensor {unknown[0]} is not known to the {dims.family} family ({len(unknown)} in all); the "
            "weight files must hold no tensor that the family does not have"
        )
    expected = (dims.vocab_size, dims.hidden_size)
    if shapes[EMBEDDING] != expected:
        raise UserError(
            f"{checkpoint}: {EMBEDDING} has shape {shapes[EMBEDDING]}; must be {expected} (vocab_size, hidden_size)"
        )
