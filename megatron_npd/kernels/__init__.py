"""Operators on vocabulary-parallel logits: scores, teacher top-k, the distillation loss.

Today a plain-torch reference that works chunk by chunk; the fused kernels go behind the same functions.
"""

from megatron_npd.kernels.reference import ce_topk_kl, forward_kl, token_logprobs, top_token, topk_logprobs

__all__ = ["ce_topk_kl", "forward_kl", "token_logprobs", "top_token", "topk_logprobs"]
