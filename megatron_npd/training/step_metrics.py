"""What one optimizer step is reported as."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_npd.training.step import StepSums


@dataclass(frozen=True)
class StepReport:
    """Measured on one optimizer step of the global batch."""

    sums: StepSums
    gradient_norm: float
    learning_rate: float
    seconds: float
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
        """KL(current || generator), nats a token, estimated on these samples; None: the teacher's samples."""
        return None if self.policy_lag is None else self.sums.drift / self.sums.tokens

    def metrics(self) -> dict[str, float | int | None]:
        """By metric name."""
        sums = self.sums
        return {
            "train/loss": sums.loss / sums.tokens,
            "train/ce": sums.ce / sums.tokens,
            "train/kd": sums.kd / sums.tokens,
            "train/grad_norm": self.gradient_norm,
            "train/lr": self.learning_rate,
            "train/response_tokens": int(sums.tokens),
            "perf/tokens": self.positions,
            "perf/seconds": self.seconds,
            "perf/tokens_per_second": self.positions / self.seconds,
            "perf/model_tflops_per_second": self.flops / self.seconds / 1e12,
            "perf/imbalance": self.imbalance,
            "buffer/packing_efficiency": self.used_positions / self.positions,
            "near_policy/kl": self.drift,
            "near_policy/lag": self.policy_lag,
        }
