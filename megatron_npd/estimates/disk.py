"""Space on disk that a run directory takes at most: shards, published versions, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_npd.buffer.plan import Plan
from megatron_npd.config import Config
from megatron_npd.estimates.parameters import stage_parameters
from megatron_npd.estimates.rates import SampleRates
from megatron_npd.estimates.role_memory import element_bytes
from megatron_npd.models.hf_config import ModelDims
from megatron_npd.run_directory import HELDOUT_STAGE
from megatron_npd.schema import COLUMNS


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes."""

    rollouts: float
    samples: float
    versions: float
    checkpoints: float

    @property
    def bytes(self) -> float:
        return self.rollouts + self.samples + self.versions + self.checkpoints


def disk_estimate(config: Config, plan: Plan, student: ModelDims, samples: SampleRates | None = None) -> DiskEstimate:
    """What is there at the end, if nothing is retired (`buffer.keep_rounds`).

    `samples` None: every prompt and response as long as it may be, all of them kept: an upper bound.
    """
    prompt = samples.prompt_tokens if samples else config.prompts.max_prompt_tokens
    response = samples.response_tokens if samples else config.rollout.max_new_tokens
    kept = samples.kept_share if samples else 1.0
    judged = sum(len(stage.prompt_index) for stage in plan.stages.values() if stage.name != HELDOUT_STAGE)
    everything = judged + len(plan.stages[HELDOUT_STAGE].prompt_index)
    sizes = {"N": 1.0, "N+1": 1.0, "P": prompt, "R": response, "A": kept * response}
    sizes["A,K"] = sizes["A"] * config.annotator.top_k
    element, tensor = element_bytes(config), config.training.tensor_model_parallel_size
    # Model, main weights and two moments of the padded model; one more checkpoint is being written than is kept.
    checkpoint = (element + (12 if element < 4 else 8)) * tensor * stage_parameters(student, tensor)
    return DiskEstimate(
        rollouts=everything * _bytes_of_one("rollouts", sizes),
        samples=judged * _bytes_of_one("samples", sizes),
        versions=(plan.final_version + 1) * element * stage_parameters(student),  # student_hf/ is links to the last
        checkpoints=(config.training.keep_checkpoints + 1) * checkpoint,
    )


def _bytes_of_one(kind: str, sizes: dict[str, float]) -> float:
    """Bytes of one sample in a shard, without the header."""
    return sum(np.dtype(dtype).itemsize * sizes[dimensions] for dtype, dimensions in COLUMNS[kind].values())
