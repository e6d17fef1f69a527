"""What one optimizer step is reported as."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_npd.schema import StepMetric
from megatron_npd.training.step import StepSums


@dataclass(frozen=True)
class StepReport:
    """Measured on one optimizer step of the global batch."""

    sums: StepSums
    gradient_norm: float
    learning_rate: float
    seconds: float
    """From wanting the batches to knowing the loss, without waiting for a turn at computing."""
    positions: int
    """Positions computed, padding included."""
    used_positions: int
    """Positions of samples."""
    imbalance: float
    """Largest over mean cost of a data-parallel rank; 1.0 is perfect."""
    flops: float
    """Floating-point operations of the model's matrix products on used positions, forward and backward."""
    policy_lag: int | None
    """Versions the samples are behind the newest; None: the teacher's samples."""

    @property
    def drift(self) -> float | None:
        """KL(current || generator), nats a token, estimated on those of these samples that a policy sampled; None: none
        did, or it was the teacher."""
        return None if self.policy_lag is None or not self.sums.sampled else self.sums.drift / self.sums.sampled

    def metrics(self) -> dict[str, float | int | None]:
        """By metric name."""
        sums = self.sums
        values = {
            StepMetric.LOSS: sums.loss / sums.tokens,
            StepMetric.CE: sums.ce / sums.tokens,
            StepMetric.KD: sums.kd / sums.tokens,
            StepMetric.GRADIENT_NORM: self.gradient_norm,
            StepMetric.LEARNING_RATE: self.learning_rate,
            StepMetric.RESPONSE_TOKENS: int(sums.tokens),
            StepMetric.TOKENS: self.positions,
            StepMetric.SECONDS: self.seconds,
            StepMetric.TOKENS_PER_SECOND: self.positions / self.seconds,
            StepMetric.TFLOPS_PER_SECOND: self.flops / self.seconds / 1e12,
            StepMetric.IMBALANCE: self.imbalance,
            StepMetric.PACKING_EFFICIENCY: self.used_positions / self.positions,
            StepMetric.DRIFT: self.drift,
            StepMetric.POLICY_LAG: self.policy_lag if sums.sampled else None,
        }
        return {str(name): value for name, value in values.items()}
