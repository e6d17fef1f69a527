"""Is a Hugging Face checkpoint whole, and one we know? From headers alone: no weight is read, no model built."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_npd.errors import UserError
from megatron_npd.files import read_json
from megatron_npd.models.hf_config import ModelDims, eos_token_ids, read_model_dims
from megatron_npd.models.tensor_map import all_hugging_face_names, unknown_hugging_face_names
from megatron_npd.models.tensor_shapes import implied_shape

INDEX = "model.safetensors.index.json"
FLOAT_TYPES = ("F32", "BF16", "F16")
"""Data types that weights may have, as safetensors names them. Others would be cast unsaid: integers are no weights
without their scales, and eight-bit floats neither."""
NAMED = 3
"""Of what is left out, how much is spelled out."""


@dataclass(frozen=True)
class TensorFiles:
    """From which file each tensor of a checkpoint is read: where there is an index, it decides."""

    of: dict[str, Path]
    """By tensor name."""
    shapes: dict[str, tuple[int, ...]]
    """By tensor name."""
    dtypes: dict[str, str]
    """By tensor name, as safetensors names them."""
    left_out: list[str]
    """Files and copies of tensors that the index does not name, for people."""

    def left_out_text(self) -> str:
        """What is left out, in one line; empty where nothing is."""
        more = len(self.left_out) - NAMED
        return "; ".join(self.left_out[:NAMED]) + (f"; and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that passed `check_checkpoint`."""

    key: str
    """Configuration key that names it, e.g. models.teacher."""
    folder: Path
    dims: ModelDims
    eos_ids: list[int]
    """Token ids that end its responses."""
    tensors: TensorFiles | None = None
    """Where its weights lie; None: they were not looked for."""

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
        checkpoint = replace(checkpoint, tensors=_check_tensors(checkpoint))
    for eos in checkpoint.eos_ids:
        if not 0 <= eos < checkpoint.dims.vocab_size:
            raise UserError(
                f"{checkpoint}: eos_token_id = {eos}: must be below its vocab_size = {checkpoint.dims.vocab_size}"
            )
    return checkpoint


def weight_files(folder: Path, called: str = "") -> list[Path]:
    """The safetensors files of a checkpoint, by name: those its index lists, or without an index all there are.

    `called`: what messages call the folder, e.g. with the key that names it.

    Raises:
        UserError: there is none, or one that the index lists is missing.
    """
    called = called or str(folder)
    listed = set(_weight_map(folder / INDEX).values())
    names = listed or {file.name for file in folder.glob("*.safetensors")}
    if not names:
        raise UserError(f"{called}: no *.safetensors file in it; weights must be in the safetensors format")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{called}: weight file {name} is missing, though {INDEX} lists it")
    return [folder / name for name in sorted(names)]


def tensor_files(folder: Path, called: str = "") -> TensorFiles:
    """Where the tensors of a checkpoint lie, from the headers of its files. All that reads weights goes by it.

    Raises:
        UserError: see `weight_files`; a file is damaged or cut short, does not hold what the index says, or, without an
            index, holds a tensor that another one holds as well.
    """
    called = called or str(folder)
    index, files = _weight_map(folder / INDEX), weight_files(folder, called)
    unlisted = sorted({file.name for file in folder.glob("*.safetensors")} - {file.name for file in files})
    left_out = [f"file {name}, which {INDEX} does not list" for name in unlisted]
    of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        for name, (shape, dtype) in _read_kinds(file).items():
            if index and index.get(name) != file.name:
                left_out.append(f"tensor {name} of {file.name}, which {INDEX} does not name")
            elif name in of:
                raise UserError(
                    f"{called}: tensor {name} is in {of[name].name} and in {file.name}; must be in one file, or "
                    f"{INDEX} must say which counts"
                )
            else:
                of[name], shapes[name], dtypes[name] = file, shape, dtype
    for name, file_name in index.items():
        if name not in of:
            raise UserError(f"{called}: {INDEX} says that {file_name} holds tensor {name}; it does not")
    return TensorFiles(of, shapes, dtypes, left_out)


def check_names(called: str, found: Collection[str], dims: ModelDims) -> None:
    """Refuse a checkpoint whose tensors are not those of its model; `called`: what messages call it.

    Raises:
        UserError: a tensor is missing, or says something that the model has no place for.
    """
    missing = [name for name in all_hugging_face_names(dims) if name not in found]
    if missing:
        raise UserError(
            f"{called}: tensor {missing[0]} is missing ({len(missing)} in all); the weight files must hold, and an "
            "index must name, every tensor that config.json implies"
        )
    unknown = unknown_hugging_face_names(found, dims)
    if unknown:
        raise UserError(
            f"{called}: tensor {unknown[0]} is not known to the {dims.family} family ({len(unknown)} in all); the "
            "weight files must hold no tensor that the family does not have"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of its file; empty without an index."""
    if not index.is_file():
        return {}
    try:
        mapped = dict(read_json(index)["weight_map"])
        if mapped and all(isinstance(name, str) and Path(name).name == name for name in mapped.values()):
            return mapped
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{index}: not readable as an index; must be JSON with a weight_map of file names")


def _check_tensors(checkpoint: Checkpoint) -> TensorFiles:
    """Names, shapes and data types of all tensors."""
    dims, found = checkpoint.dims, tensor_files(checkpoint.folder, str(checkpoint))
    check_names(str(checkpoint), found.of, dims)
    for name in all_hugging_face_names(dims):
        expected, derived = implied_shape(name, dims)
        if found.shapes[name] != expected:
            raise UserError(f"{checkpoint}: {name} has shape {found.shapes[name]}; must be {expected} ({derived})")
        if found.dtypes[name] not in FLOAT_TYPES:
            raise UserError(
                f"{checkpoint}: tensor {name} is {found.dtypes[name]}; must be one of {', '.join(FLOAT_TYPES)}"
            )
    return found


def _read_kinds(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and data type of each tensor of a file; opening it verifies that its header and its size agree."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); must be a whole safetensors file") from None
