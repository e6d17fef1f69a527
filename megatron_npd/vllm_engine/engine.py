"""vLLM inside this process: our own step loop, raw logprobs, verified in-place weight updates.

`generate` promises that every response was sampled by exactly one policy version and is complete; whatever the
engine gave up on is retried once and then raises, so that a failure never becomes a sample.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_npd.config import RolloutConfig
from megatron_npd.models.hf_config import read_model_dims
from megatron_npd.process import activity
from megatron_npd.schema import TEACHER_VERSION, FinishReason
from megatron_npd.versions.manifest import verified
from megatron_npd.versions.staged import (
    ServedVersion,
    StagedVersion,
    require_newer,
    stage_version,
)
from megatron_npd.vllm_engine.start import start_vllm

logger = logging.getLogger(__name__)


class RolloutError(RuntimeError):
    """The engine did not do what was asked; nothing it produced may be used."""


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    stop_token_ids: list[int]
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Response:
    """One sampled response of R tokens."""

    ids: list[int]
    """Token ids, the end token included."""
    logprobs: list[float]
    """log pi(y_t | x, y_<t) of each id, nats, at temperature 1 over the full vocabulary, whatever the sampling was."""
    finish_reason: FinishReason
    """STOP (the last id is a stop token) or LENGTH."""
    version: int
    """Policy version that sampled all of it."""


class RolloutEngine:
    """One vLLM engine serving one checkpoint.

    Args:
        folder: Hugging Face checkpoint: a published version, or the teacher's.
        version: the published version in `folder` (it is verified first), or TEACHER_VERSION (never refreshed).
        rollout: engine sizes.
        dtype: compute dtype, `models.dtype`.
        max_model_len: longest prompt and response together, tokens; bounded by the model's positions.
        trust_remote_code: `models.trust_remote_code`.

    Raises:
        BadVersionError: the published version fails verification, or was changed while it was loaded.
        UserError: the checkpoint's config.json cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        version: int,
        rollout: RolloutConfig,
        dtype: str,
        max_model_len: int,
        trust_remote_code: bool = False,
    ):
        self.version = version
        self._broken: str | None = None
        self._names = itertools.count()
        # vLLM reads the files by itself.
        with verified(folder, version) if version != TEACHER_VERSION else contextlib.nullcontext() as manifest:
            dims = read_model_dims(folder)
            # vLLM wants room for one new token after a sequence that is only scored.
            length = min(max_model_len + 1, dims.max_positions)
            self._llm = start_vllm(folder, rollout, dtype, length, manifest is not None, trust_remote_code)
        self._served = None if manifest is None else ServedVersion(version, dims, manifest.tensors)
        self._llm.engine_core.set_weight_version(str(version))

    def generate(self, requests: list[Request]) -> list[Response]:
        """Sample a response to each request, in order. The same request gives the same response.

        Raises:
            RolloutError: a request was aborted twice, or an output is inconsistent or not finite.
        """
        responses = self._attempt(dict(enumerate(requests)))
        lost = {index: request for index, request in enumerate(requests) if index not in responses}
        if lost:
            logger.warning("the engine gave up on %d of %d requests; trying those again", len(lost), len(requests))
            responses |= self._attempt(lost)
        if len(responses) < len(requests):
            raise RolloutError(
                f"the engine gave up twice on {len(requests) - len(responses)} of {len(requests)} requests"
            )
        return [responses[index] for index in range(len(requests))]

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """log p(token t | tokens before t) for t >= 1 of each sequence, nats, temperature 1."""
        from vllm import SamplingParams

        params = SamplingParams(prompt_logprobs=0, max_tokens=1, **_plain_output())
        outputs = self._run({index: (sequence, params) for index, sequence in enumerate(sequences)})
        scored = [list(outputs[index].prompt_logprobs.logprobs) for index in range(len(sequences))]
        if [len(row) + 1 for row in scored] != [len(sequence) for sequence in sequences]:
            raise RolloutError("vLLM did not return one logprob for each token")
        return scored

    def stage(self, folder: Path, version: int) -> StagedVersion:
        """Read a newer version into memory and verify it, in any thread, while this engine generates.

        Raises:
            BadVersionError: the version is refused.
            RolloutError: this engine serves the teacher, or cannot be used any more.
            MemoryError: the version does not fit into this host's memory beside what is there.
        """
        return stage_version(self._require_updatable(), folder, version)

    def refresh(self, staged: StagedVersion) -> None:
        """Serve a staged version from now on. All or nothing.

        Raises:
            BadVersionError: it is not newer than the served one, which goes on serving.
            RolloutError: requests are running (nothing was changed), this engine serves the teacher, or the load
                failed half-way: then the engine refuses to work any more and the process must be restarted.
        """
        version = staged.version
        require_newer(self._require_updatable(), "refresh", version)
        if self._llm.has_unfinished_requests():
            raise RolloutError(f"cannot refresh to version {version}: requests are running; each has one version")
        self._broken = f"the update to version {version} failed half-way"
        try:
            self._load(staged)
        except Exception as error:
            raise RolloutError(f"this engine cannot be used any more: {self._broken}: {error}") from error
        self._served, self.version, self._broken = staged.served, version, None

    def _load(self, new: StagedVersion) -> None:
        """Replace the weights, between two steps, and everything that was computed with the old ones."""
        files = [str(file) for file in new.copy.weights]
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", kwargs={"update_info": {"files": files}})
        self._llm.collective_rpc("finish_weight_update")
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        self._llm.engine_core.set_weight_version(str(new.version))

    def _attempt(self, requests: Mapping[int, Request]) -> dict[int, Response]:
        """Responses of those requests that the engine finished."""
        outputs = self._run({i: (request.prompt_ids, _sampling(request)) for i, request in requests.items()})
        finished = {i: output for i, output in outputs.items() if output.outputs[0].finish_reason in _FINISHED}
        return {i: self._response(requests[i], output.outputs[0]) for i, output in finished.items()}

    def _run(self, work: Mapping[int, tuple[list[int], Any]]) -> dict[int, Any]:
        """Run (token ids, sampling parameters) to their ends; vLLM's outputs by the same keys."""
        self._require_sound()
        keys: dict[str, int] = {}
        for key, (ids, params) in work.items():
            name = str(next(self._names))
            keys[name] = key
            self._llm.add_request(name, {"prompt_token_ids": list(ids)}, params)
        outputs = {}
        while self._llm.has_unfinished_requests():
            activity.progress()
            for output in self._llm.step():
                outputs[keys[output.request_id]] = output
        return outputs

    def _response(self, request: Request, completion: Any) -> Response:
        """vLLM's completion as a checked `Response`."""
        ids, logprobs = list(completion.token_ids), list(completion.logprobs.logprobs)
        reason = _FINISHED[completion.finish_reason]
        versions = [span.version for span in completion.weight_versions]
        if versions != [str(self.version)]:
            raise RolloutError(f"a response was sampled by versions {versions}, expected {self.version} alone")
        if len(logprobs) != len(ids) or not all(map(math.isfinite, logprobs)):
            raise RolloutError(
                f"version {self.version}: a response of {len(ids)} tokens has unusable logprobs {logprobs}"
            )
        if (reason is FinishReason.STOP) != (ids[-1] in request.stop_token_ids):
            raise RolloutError(f"a response that ended by {reason.name} ends with token {ids[-1]}")
        return Response(ids, logprobs, reason, self.version)

    def _require_updatable(self) -> ServedVersion:
        self._require_sound()
        if self._served is None:
            raise RolloutError("the teacher's engine is never refreshed")
        return self._served

    def _require_sound(self) -> None:
        if self._broken is not None:
            raise RolloutError(f"this engine cannot be used any more: {self._broken}")


_FINISHED = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
"""vLLM's finish reasons of complete responses; `abort`, `error` and others are failures."""


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        seed=request.seed,
        max_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=True,  # or the end tokens of the checkpoint's generation config would stop it as well
        logprobs=0,  # of the sampled token alone
        **_plain_output(),
    )


def _plain_output() -> dict[str, Any]:
    """Token ids and flat logprobs at the end of a request; no text, nothing on the way."""
    from vllm.sampling_params import RequestOutputKind

    return {"detokenize": False, "flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}
