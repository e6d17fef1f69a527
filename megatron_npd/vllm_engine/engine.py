"""vLLM inside this process: our own step loop, raw logprobs, verified in-place weight updates.

Requests join the running batch at any time (`begin`) and leave it one by one as they are done (`step`). Every response
was sampled by exactly one policy version and is complete; whatever the engine gave up on is tried once more and then
raises, so that a failure never becomes a sample.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class _Running:
    """A request the engine works on."""

    ticket: int
    request: Request
    is_second_attempt: bool = False
    name: str = ""
    """vLLM's own name for it, which begins with ours."""


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
        self._names, self._tickets = itertools.count(), itertools.count()
        self._running: dict[str, _Running] = {}  # by the name we gave
        # vLLM reads the files by itself.
        with verified(folder, version) if version != TEACHER_VERSION else contextlib.nullcontext() as manifest:
            dims = read_model_dims(folder)
            # vLLM wants room for one new token after a sequence that is only scored.
            length = min(max_model_len + 1, dims.max_positions)
            self._llm = start_vllm(folder, rollout, dtype, length, manifest is not None, trust_remote_code)
        self._served = None if manifest is None else ServedVersion(version, dims, manifest.tensors)
        self._llm.engine_core.set_weight_version(str(version))

    @property
    def max_num_seqs(self) -> int:
        """Sequences the engine decodes at once; more wait for their turn."""
        return self._llm.vllm_config.scheduler_config.max_num_seqs

    @property
    def running(self) -> int:
        """Requests that were begun and are not done."""
        return len(self._running)

    def begin(self, request: Request) -> int:
        """Sample a response to a request from the next `step` on; returns a ticket, by which `step` names it."""
        self._require_sound()
        ticket = next(self._tickets)
        self._add(_Running(ticket, request))
        return ticket

    def step(self) -> list[tuple[int, Response]]:
        """One step of all running requests: the tickets and responses of those that are done.

        Raises:
            RolloutError: a request was aborted twice, or an output is inconsistent or not finite. All that were running
                are given up.
        """
        activity.progress()
        responses = []
        try:
            for output in self._llm.step():
                one, completion = self._running.pop(output.request_id), output.outputs[0]
                if completion.finish_reason in _FINISHED:
                    responses.append((one.ticket, self._response(one.request, completion)))
                else:
                    self._try_again(one)
            for name in self._lost():
                self._try_again(self._running.pop(name))
        except RolloutError:
            self._llm.abort_request(list(self._running))
            self._running.clear()
            raise
        return responses

    def generate(self, requests: list[Request]) -> list[Response]:
        """Sample a response to each request, in order, in a batch of their own.

        Raises:
            RolloutError: as `step`; or others are running.
        """
        if self._running:
            raise RolloutError(f"cannot generate: {self.running} other requests are running")
        tickets = [self.begin(request) for request in requests]
        responses: dict[int, Response] = {}
        while self._running:
            responses |= self.step()
        return [responses[ticket] for ticket in tickets]

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """log p(token t | tokens before t) for t >= 1 of each sequence, nats, temperature 1."""
        from vllm import SamplingParams

        params = SamplingParams(prompt_logprobs=0, max_tokens=1, **_plain_output())
        self._require_sound()
        names = [str(next(self._names)) for _ in sequences]
        for name, sequence in zip(names, sequences, strict=True):
            self._llm.add_request(name, {"prompt_token_ids": list(sequence)}, params)
        outputs = {}
        while self._llm.has_unfinished_requests():
            activity.progress()
            outputs |= {output.request_id: output for output in self._llm.step()}
        scored = [list(outputs[name].prompt_logprobs.logprobs) for name in names]
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

    def _add(self, one: _Running) -> None:
        name = str(next(self._names))
        prompt = {"prompt_token_ids": list(one.request.prompt_ids)}
        self._running[name] = replace(one, name=self._llm.add_request(name, prompt, _sampling(one.request)))

    def _try_again(self, one: _Running) -> None:
        """Once: with its seed, so that the response is the one that it would have been."""
        if one.is_second_attempt:
            raise RolloutError(f"the engine gave up twice on a request of {len(one.request.prompt_ids)} prompt tokens")
        logger.warning("the engine gave up on a request; trying it again")
        self._add(replace(one, is_second_attempt=True))

    def _lost(self) -> list[str]:
        """Requests that the engine no longer has, though it said nothing of their end."""
        if self._llm.get_num_unfinished_requests() == len(self._running):
            return []
        has_request = self._llm.output_processor.has_request
        return [name for name, one in self._running.items() if not has_request(one.name)]

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
