"""openPangu-Embedded (1B tied, 7B untied): Llama's shape with biases on q, k, v and o."""

from __future__ import annotations

from megatron_npd.models.families.family import ATTENTION_BIAS, DENSE, AttentionBias, Family

CHAT_TEMPLATE = (
    "{%- set names = {'system': '系统', 'user': '用户', 'assistant': '助手', 'tool': '工具'} -%}"
    "{%- if messages[0]['role'] != 'system' -%}[unused9]系统：[unused10]{%- endif -%}"
    "{%- for message in messages -%}"
    "[unused9]{{ names[message['role']] }}：{{ message['content'] }}[unused10]"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}[unused9]助手：{%- endif -%}"
)
"""[unused9] opens a turn and [unused10], the end token, closes it. A chat without a system turn gets an empty one."""

FAMILY = Family(
    name="openpangu",
    architecture="PanguEmbeddedForCausalLM",
    tensors=DENSE + ATTENTION_BIAS,
    bias=AttentionBias(output=True, key="bias", default=True),
    num_kv_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=16e6,
    must_be_false=("mlp_bias",),
    chat_template=CHAT_TEMPLATE,
    bos_before_chat=True,
)
