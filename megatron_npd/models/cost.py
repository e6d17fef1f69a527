"""What a sequence costs to train on: floating-point operations as a function of its length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_npd.models.hf_config import ModelDims


@dataclass(frozen=True)
class CostModel:
    """FLOPs of one forward and backward over one sequence of L positions: linear * L + attention * L²; and of the
    vocabulary head for each row that is scored."""

    linear: float
    attention: float
    head: float = 0.0

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """FLOPs of sequences of these lengths, float64 of the same shape."""
        positions = np.asarray(lengths, dtype=np.float64)
        return self.linear * positions + self.attention * positions**2


def cost_model(dims: ModelDims) -> CostModel:
    """The cost model of a student.

    A matrix of n parameters takes 2n FLOPs a position forward and 4n backward (Narayanan et al. 2021, arXiv
    2104.04473, appendix, without activation recomputation); here the query, key, value, output, gate, up and down
    matrices of every layer. Scores and their product with the values take 4 * heads * head_dim * L² forward and twice
    that backward, for each layer; a causal mask needs half of it (packed flash attention skips the other half).

    The vocabulary head is computed for response tokens alone, whatever the length around them, so it is no part of a
    sequence's cost. Left out: norms, activations and the embedding, which are not matrix products. Recomputation,
    where it is on, scales both terms by about the same factor, which changes no comparison of costs.
    """
    query = dims.hidden_size * dims.num_heads * dims.head_dim
    key = dims.hidden_size * dims.num_kv_heads * dims.head_dim
    parameters = 2 * query + 2 * key + 3 * dims.hidden_size * dims.intermediate_size
    return CostModel(
        linear=6.0 * dims.num_layers * parameters,
        attention=6.0 * dims.num_layers * dims.num_heads * dims.head_dim,
        head=6.0 * dims.hidden_size * dims.vocab_size,
    )
