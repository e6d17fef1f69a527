"""Where each Megatron parameter lies in a Hugging Face checkpoint: a family's declarations, spelled out for a model.

Conversion, loading and publishing all read these rules, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_npd.models.families import FAMILIES
from megatron_npd.models.families.family import TIED_HEAD, UNTIED_HEAD
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.weights.layouts import LAYOUTS, Arithmetic

_TENSORS = {family.name: family.tensors for family in FAMILIES.values()}


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (`{layer}` stands for the layer number) and the Hugging Face tensors it holds."""

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Arithmetic


def rules_for(dims: ModelDims) -> dict[str, tuple[Rule, int]]:
    """Megatron parameter name -> (rule, layer number) for a whole model."""
    head = TIED_HEAD if dims.tied_embeddings else UNTIED_HEAD
    named = {}
    for tensors in (*_TENSORS[dims.family], head):
        if tensors.only_if and not getattr(dims, tensors.only_if):
            continue
        rule = Rule(tensors.megatron, tensors.hugging_face, LAYOUTS[tensors.layout])
        for layer in range(dims.num_layers) if "{layer}" in rule.megatron else (0,):
            named[rule.megatron.format(layer=layer)] = (rule, layer)
    return named


def hugging_face_names(rule: Rule, layer: int) -> list[str]:
    """Tensor names of a rule's Hugging Face side."""
    return [name.format(layer=layer) for name in rule.hugging_face]


def all_hugging_face_names(dims: ModelDims) -> Iterator[str]:
    """Every tensor a complete checkpoint of these dimensions holds."""
    seen = set()
    for rule, layer in rules_for(dims).values():
        for name in hugging_face_names(rule, layer):
            if name not in seen:
                seen.add(name)
                yield name


def unknown_hugging_face_names(found: Iterable[str], dims: ModelDims) -> list[str]:
    """Tensors of a checkpoint that no rule reads and that say something of their own, sorted.

    Left out are a stored copy of the tied head, which some writers add, and the rotary frequencies of old checkpoints.
    """
    ignored = {"lm_head.weight"} if dims.tied_embeddings else set()
    unknown = set(found) - set(all_hugging_face_names(dims)) - ignored
    return sorted(name for name in unknown if not name.endswith("rotary_emb.inv_freq"))


def is_tied_copy(name: str, dims: ModelDims) -> bool:
    """Whether a Megatron parameter is the last stage's copy of tied embeddings."""
    return dims.tied_embeddings and name == TIED_HEAD.megatron
