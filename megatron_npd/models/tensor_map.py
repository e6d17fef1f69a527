"""Where each Megatron parameter lies in a Hugging Face checkpoint: a family's declarations, spelled out for a model.

Conversion, loading and publishing all read this map, so they cannot disagree. Names alone, no torch: `weights.layouts`
has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_npd.models.families import FAMILIES
from megatron_npd.models.families.family import TIED_HEAD, UNTIED_HEAD, Layout
from megatron_npd.models.hf_config import ModelDims

_TENSORS = {family.name: family.tensors for family in FAMILIES.values()}


@dataclass(frozen=True)
class MappedParameter:
    """One Megatron parameter of a model, and the Hugging Face tensors it holds."""

    megatron: str
    """Its name."""
    hugging_face: tuple[str, ...]
    """Their names, in the order in which `layout` takes them."""
    layout: Layout
    layer: int | None
    """Number of its layer in the whole model; None: of none."""


def parameter_map(dims: ModelDims) -> dict[str, MappedParameter]:
    """Every parameter of a whole model, by Megatron name."""
    head = TIED_HEAD if dims.tied_embeddings else UNTIED_HEAD
    parameters = {}
    for tensors in (*_TENSORS[dims.family], head):
        if tensors.only_if and not getattr(dims, tensors.only_if):
            continue
        for layer in range(dims.num_layers) if "{layer}" in tensors.megatron else (None,):
            name = tensors.megatron.format(layer=layer)
            held = tuple(hf_name.format(layer=layer) for hf_name in tensors.hugging_face)
            parameters[name] = MappedParameter(name, held, tensors.layout, layer)
    return parameters


def all_hugging_face_names(dims: ModelDims) -> Iterator[str]:
    """Every tensor a complete checkpoint of these dimensions holds, once."""
    yield from dict.fromkeys(
        hf_name for parameter in parameter_map(dims).values() for hf_name in parameter.hugging_face
    )


def unknown_hugging_face_names(found: Iterable[str], dims: ModelDims) -> list[str]:
    """Tensors of a checkpoint that no parameter holds and that say something of their own, sorted.

    Left out are a stored copy of the tied head, which some writers add, and the rotary frequencies of old checkpoints.
    """
    ignored = {"lm_head.weight"} if dims.tied_embeddings else set()
    unknown = set(found) - set(all_hugging_face_names(dims)) - ignored
    return sorted(name for name in unknown if not name.endswith("rotary_emb.inv_freq"))


def is_tied_copy(name: str, dims: ModelDims) -> bool:
    """Whether a Megatron parameter is the last stage's copy of tied embeddings."""
    return dims.tied_embeddings and name == TIED_HEAD.megatron
