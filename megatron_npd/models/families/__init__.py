"""The model families we know, one short file each. To add a dense one: write its file and name it here."""

from __future__ import annotations

from megatron_npd.models.families import llama, openpangu, qwen2, qwen3

FAMILIES = {module.FAMILY.architecture: module.FAMILY for module in (llama, qwen2, qwen3, openpangu)}
"""Architecture named by a checkpoint's config.json -> its family."""
