"""What a model family is: how its config.json reads and where its tensors lie. Declarations only, no torch.

A Megatron parameter and the Hugging Face tensors it is made of are one `Tensors` entry. Conversion, loading and
publishing all read the same entries (through `models.tensor_map`), so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Layout(Enum):
    """How Hugging Face tensors are merged into one Megatron parameter and cut over the tensor-parallel ranks.

    `weights.layouts` has the arithmetic.
    """

    REPLICATED = "the same on every rank"
    COLUMNS = "cut along dimension 1: the input of a row-parallel linear layer"
    VOCABULARY = "rows cut over the ranks after zero rows are added until they divide"
    GATED = "gate and up projection: each rank holds its gate rows, then its up rows"
    QKV = "q, k and v interleaved by key-value group, cut by group; weights and biases alike"
    ATTENTION_OUTPUT = "columns cut by key-value group, as QKV cuts rows"


@dataclass(frozen=True)
class Tensors:
    """One Megatron parameter and the Hugging Face tensors it holds; `{layer}` stands for the layer number."""

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout
    only_if: str | None = None
    """Flag of `models.hf_config.ModelDims` without which the tensors do not exist."""


@dataclass(frozen=True)
class AttentionBias:
    """Biases of the q, k and v projections, and where they are also those of the output projection."""

    output: bool
    """The output projection has one as well."""
    key: str | None = None
    """Switch in config.json; None: the biases are always there."""
    default: bool = False
    """What the switch is where config.json does not have it."""


@dataclass(frozen=True)
class Family:
    """One architecture. Defaults are transformers' own, for keys that config.json leaves out."""

    name: str
    architecture: str
    """As `architectures` of config.json names it."""
    tensors: tuple[Tensors, ...]
    """All but the output head's."""
    bias: AttentionBias | None = None
    qk_norm: bool = False
    """See `models.hf_config.ModelDims`."""
    num_kv_heads: int | None = None
    """num_key_value_heads where the key is absent; None: as many as query heads (as where it is null)."""
    head_dim: int | None = None
    """head_dim where config.json has none; None: hidden size / query heads."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    must_be_false: tuple[str, ...] = ()
    """Switches of config.json that would change the arithmetic, and are not supported."""
    chat_template: str | None = None
    """Jinja template of a checkpoint that brings none."""
    bos_before_chat: bool = False
    """Prompts start with BOS although the chat template writes none: as the model was trained and is to be used."""


_LAYER = "decoder.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attention.", _LAYER + "mlp."
_HF_LAYER = "model.layers.{layer}."
_HF_ATTENTION, _HF_MLP = _HF_LAYER + "self_attn.", _HF_LAYER + "mlp."

EMBEDDING = "model.embed_tokens.weight"

DENSE = (
    Tensors("embedding.word_embeddings.weight", (EMBEDDING,), Layout.VOCABULARY),
    Tensors(_LAYER + "input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",), Layout.REPLICATED),
    Tensors(
        _ATTENTION + "linear_qkv.weight", tuple(_HF_ATTENTION + f"{part}_proj.weight" for part in "qkv"), Layout.QKV
    ),
    Tensors(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), Layout.ATTENTION_OUTPUT),
    Tensors(
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        Layout.REPLICATED,
    ),
    Tensors(_MLP + "linear_fc1.weight", (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"), Layout.GATED),
    Tensors(_MLP + "linear_fc2.weight", (_HF_MLP + "down_proj.weight",), Layout.COLUMNS),
    Tensors("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.REPLICATED),
)
"""What every Llama-shaped model has: RMSNorm before attention and MLP."""

ATTENTION_BIAS = (
    Tensors(
        _ATTENTION + "linear_qkv.bias",
        tuple(_HF_ATTENTION + f"{part}_proj.bias" for part in "qkv"),
        Layout.QKV,
        only_if="qkv_bias",
    ),
    Tensors(
        _ATTENTION + "linear_proj.bias",
        (_HF_ATTENTION + "o_proj.bias",),
        Layout.REPLICATED,
        only_if="output_bias",
    ),
)

QK_NORM = tuple(
    Tensors(_ATTENTION + f"{part}_layernorm.weight", (_HF_ATTENTION + f"{part}_norm.weight",), Layout.REPLICATED)
    for part in "qk"
)

UNTIED_HEAD = Tensors("output_layer.weight", ("lm_head.weight",), Layout.VOCABULARY)
TIED_HEAD = Tensors("output_layer.weight", (EMBEDDING,), Layout.VOCABULARY)
"""With tied embeddings the last pipeline stage keeps its own copy, loaded from and never written beside the first's."""
