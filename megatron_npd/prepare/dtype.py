"""Which dtype a run computes in (`models.dtype`): decided once, when the run is prepared, and kept from then on."""

from __future__ import annotations

from collections.abc import Callable

from megatron_npd.config import Config
from megatron_npd.errors import UserError
from megatron_npd.hardware.matrix_rates import MatrixRates, measure_rates

WORTH_IT = 1.2
"""bfloat16 is taken where its matrix products are so many times as fast: it costs precision, so it must pay."""


def decide_dtype(
    config: Config, in_cluster: bool = False, measure: Callable[[int], MatrixRates] = measure_rates
) -> Config:
    """The configuration with a dtype in place of "auto", and the reason.

    `in_cluster`: the roles will run on the nodes that `[slurm]` describes, which this machine may not be like.
    `measure`: takes a number of CPU threads.

    Raises:
        UserError: the dtype that is configured cannot be computed in here.
    """
    wanted = config.models.dtype
    if wanted == "float32":  # any device can
        return config.with_dtype(wanted, "configured")
    if in_cluster and config.slurm.gpus_per_node:
        return config.with_dtype("bfloat16", "the nodes have GPUs" if wanted == "auto" else "configured")
    rates = measure(config.rollout.threads)
    if wanted == "auto":
        return config.with_dtype(*_choice(rates))
    if not rates.has_bfloat16:
        raise UserError(f"models.dtype = 'bfloat16': {rates.device} has no bfloat16; must be 'float32' or 'auto' here")
    return config.with_dtype(wanted, _warning(rates) or "configured")


def describe_dtype(config: Config) -> str:
    """One line for people."""
    return f"models.dtype = {config.models.dtype}: {config.models.dtype_reason or 'configured'}"


def _choice(rates: MatrixRates) -> tuple[str, str]:
    if rates.device != "cpu":
        if rates.has_bfloat16:
            return "bfloat16", f"{rates.device} computes in it"
        return "float32", f"{rates.device} has no bfloat16"
    return ("bfloat16" if rates.gain >= WORTH_IT else "float32"), f"chosen by measurement: {_comparison(rates)}"


def _warning(rates: MatrixRates) -> str | None:
    """What is wrong with a configured bfloat16 here, or None."""
    if rates.device != "cpu" or rates.gain >= 1.0:
        return None
    return f"configured, but slow: {_comparison(rates)}; 'auto' would take float32"


def _comparison(rates: MatrixRates) -> str:
    factor = max(rates.gain, 1.0 / rates.gain)
    return (
        f"matrix products on this processor run at {rates.bfloat16:.3g} GFLOP/s in bfloat16, {rates.float32:.3g} in "
        f"float32, {factor:.3g} times as {'fast' if rates.gain >= 1.0 else 'slow'}"
    )
