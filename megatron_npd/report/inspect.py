"""`npd inspect RUN`: judged samples as text, with the scores they were judged by.

The prompt shown is the last user turn of the chat it came from, as long as those words are in the tokens the models
saw; else it is those tokens, decoded. Nothing in the run directory is changed, a corrupt shard is passed over.
"""

from __future__ import annotations

import json
import logging
import math
import textwrap
import unicodedata
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_npd.buffer.plan import Stage, make_plan
from megatron_npd.buffer.shards import CorruptShardError, Shard, read_shard
from megatron_npd.config import Config, load_config
from megatron_npd.data.prompt_rows import read_prompts
from megatron_npd.data.prompts import TRAIN, load_prompt_set
from megatron_npd.data.tokenizer import VOCABULARY_FILES, Tokenizer, load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import GIVEN_VERSION, TEACHER_VERSION, FinishReason, Verdict
from megatron_npd.versions.manifest import published_versions

logger = logging.getLogger(__name__)

WIDTH = 120
AUTHORS = {TEACHER_VERSION: "by the teacher", GIVEN_VERSION: "given"}
"""Of responses that no version of the student sampled."""
NLLS = (
    "nll_teacher_conditional",
    "nll_teacher_unconditional",
    "nll_student_conditional",
    "nll_student_unconditional",
)
JudgedSample = tuple[dict[str, Any], dict[str, Any]]
SCORES = (*NLLS, "ifd_teacher", "ifd_student", "delta_ifd")


def inspect(
    run_dir: str | Path,
    *,
    rejected: bool,
    kept: bool,
    stage: str | None,
    reason: str | None,
    limit: int,
    as_json: bool,
) -> Iterator[str]:
    """Samples of a run as text, in the order of stage, prompt and sample of its units.

    Args:
        rejected, kept: which samples; neither means both.
        stage: `warmup`, `round_0000`, ...; None: all of them.
        reason: only samples with this verdict (a lower-case `schema.Verdict` name).
        limit: at most so many samples; 0: all.
        as_json: one JSON object a line instead of text.

    Returns:
        Lines without line breaks at their ends. Arguments are checked by the call, not by the first line.

    Raises:
        UserError: no run directory, an unknown stage or reason, options that exclude each other, no tokenizer.
    """
    run = RunDirectory(Path(run_dir))
    if not run.config.is_file():
        raise UserError(f"{run_dir}: not a run directory: it has no {run.config.name}")
    config = load_config(run.config)
    # The held-out stage has no samples: it is evaluated, not judged.
    stages = {stage.name: stage for stage in make_plan(config, 1, 1).training_stages}
    if stage is not None and stage not in stages:
        raise UserError(f"--stage {stage}: must be one of {', '.join(stages)}")
    if limit < 0:
        raise UserError(f"--limit {limit}: must not be negative (0: no limit)")
    wanted = _wanted_verdicts(rejected, kept, reason)
    # Rounds first: the teacher's own warm-up responses have no Δ-IFD, and are not what people tune τ from.
    chosen = [stages[stage]] if stage else sorted(stages.values(), key=lambda s: s.version == TEACHER_VERSION)
    samples = islice(_samples(run, config, chosen, wanted), limit or None)
    return (_as_json(sample) for sample, _ in samples) if as_json else _as_text(samples)


def _wanted_verdicts(rejected: bool, kept: bool, reason: str | None) -> set[Verdict]:
    by_flags = {verdict for verdict in Verdict if (kept if verdict is Verdict.KEPT else rejected)} or set(Verdict)
    if reason is None:
        return by_flags
    names = [verdict.name.lower() for verdict in Verdict]
    if reason not in names:
        raise UserError(f"--reason {reason}: must be one of {', '.join(names)}")
    wanted = {Verdict[reason.upper()]}
    if not wanted <= by_flags:
        raise UserError(f"--reason {reason}: contradicts {'--kept' if kept else '--rejected'}; leave one of them out")
    return wanted


def _samples(run: RunDirectory, config: Config, stages: list[Stage], wanted: set[Verdict]) -> Iterator[JudgedSample]:
    """Every wanted sample as a flat dictionary of JSON values, and how the rule that judged it describes itself."""
    tokenizer = None
    for stage in stages:
        paths = sorted(run.stage("samples", stage.name).glob("unit_*.safetensors"))
        prompts = _Prompts(run, config, stage.split)
        for path in paths:
            try:
                shard = read_shard(path, "samples")
            except (CorruptShardError, OSError) as error:
                logger.warning("passed over: %s", error)
                continue
            for row in range(len(shard)):
                if shard["verdict"][row] in wanted:
                    tokenizer = tokenizer or _load_tokenizer(run, config)
                    sample = _sample(shard, row, stage.name, tokenizer, prompts)
                    yield sample, shard.metadata.get("selection", {})


def _sample(shard: Shard, row: int, stage: str, tokenizer: Tokenizer, prompts: _Prompts) -> dict[str, Any]:
    index = int(shard["prompt_index"][row])
    return {
        "stage": stage,
        "prompt_name": prompts.name(index),
        "prompt_index": index,
        "sample_index": int(shard["sample_index"][row]),
        "policy_version": int(shard["policy_version"][row]),
        "verdict": Verdict(int(shard["verdict"][row])).name.lower(),
        "finish_reason": FinishReason(int(shard["finish_reason"][row])).name.lower(),
        "prompt_tokens": len(shard.prompt(row)),
        "response_tokens": len(shard.response(row)),
        **{name: _finite(shard[name][row]) for name in SCORES},
        "prompt": prompts.text(index, tokenizer.decode(shard.prompt(row).tolist())),
        "response": tokenizer.decode(shard.response(row).tolist()),
    }


class _Prompts:
    """Names and last user turns of a prompt set, read when first asked for; both may be gone."""

    def __init__(self, run: RunDirectory, config: Config, split: str):
        self._folder, self._config = run.prompts(split), config
        self._source = config.prompts.train if split == TRAIN else config.prompts.heldout
        self._names: list[str] | None = None
        self._turns: dict[str, str] = {}

    def name(self, index: int) -> str | None:
        """The id the user gave to a prompt, None if the prompt set is not there."""
        if self._names is None:
            self._read()
        assert self._names is not None
        return self._names[index] if index < len(self._names) else None

    def text(self, index: int, decoded: str) -> str:
        """The last user turn, if it is what the tokens say."""
        turn = self._turns.get(self.name(index) or "", "").strip()
        return turn if turn and turn in decoded else decoded

    def _read(self) -> None:
        try:
            self._names = load_prompt_set(self._folder).names
            for prompt in read_prompts(self._source, self._config.prompts):
                users = [message["content"] for message in prompt.messages if message["role"] == "user"]
                self._turns[prompt.name] = users[-1] if users else prompt.text
        except (OSError, UserError) as error:
            logger.warning("prompts are shown as decoded tokens: %s", error)
            self._names = self._names or []


def _load_tokenizer(run: RunDirectory, config: Config) -> Tokenizer:
    """The student's tokenizer, or that of the newest published version where the student's folder is gone."""
    for folder in [Path(config.models.student), *map(run.version, reversed(published_versions(run)))]:
        if any((folder / name).is_file() for name in VOCABULARY_FILES):
            return load_tokenizer(folder, trust_remote_code=config.models.trust_remote_code)
    raise UserError(
        f"models.student = {config.models.student}: has no tokenizer, nor has a version in {run.weights}; one of them "
        f"must hold {', '.join(VOCABULARY_FILES[:-1])} or {VOCABULARY_FILES[-1]}"
    )


def _as_json(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False)


def _as_text(samples: Iterator[JudgedSample]) -> Iterator[str]:
    first = next(samples, None)
    if first is None:
        yield "No such sample (yet)."
        return
    for sample in chain([first], samples):
        yield from _sample_lines(*sample)


def _sample_lines(sample: dict[str, Any], selection: dict[str, Any]) -> Iterator[str]:
    """One sample; no line is wider than WIDTH, but for a prompt's name that is."""
    version = sample["policy_version"]
    title = (
        f"{sample['stage']}  prompt {_printable(str(sample['prompt_name'] or sample['prompt_index']))}  "
        f"sample {sample['sample_index']}  {AUTHORS.get(version, f'policy v{version}')}"
    )
    for line in textwrap.wrap(title, WIDTH - len("──  "), break_long_words=False, break_on_hyphens=False):
        yield f"── {line} ".ljust(WIDTH, "─")
    outcome = sample["verdict"].upper().replace("_", " ")
    yield f"{outcome}   {sample['response_tokens']} tokens, finish: {sample['finish_reason']}"
    for model in ("teacher", "student"):
        conditional, unconditional = (sample[f"nll_{model}_{kind}"] for kind in ("conditional", "unconditional"))
        yield (
            f"  {model}   NLL with the prompt {_number(conditional)}   without {_number(unconditional)}   "
            f"IFD {_number(sample[f'ifd_{model}'])}"
        )
    rule = selection.get("keeps", "by a rule that was not recorded")
    rule = {TEACHER_VERSION: "whatever it is (the teacher's own)", GIVEN_VERSION: "as it was given"}.get(version, rule)
    yield f"  Δ-IFD  {_number(sample['delta_ifd'], '+')}   kept: {rule}"
    for part in ("prompt", "response"):
        yield f"  {part}"
        yield from _block(sample[part])
    yield ""


def _block(text: str) -> Iterator[str]:
    """Text behind a bar, wrapped; what would move the cursor of a terminal is spelled out."""
    wide = any(unicodedata.east_asian_width(char) in "WF" for char in text)  # two columns a character
    for line in text.split("\n"):
        yield from textwrap.wrap(
            _printable(line.expandtabs(4)),
            WIDTH // 2 if wide else WIDTH,
            initial_indent="  │ ",
            subsequent_indent="  │ ",
            drop_whitespace=False,
            replace_whitespace=False,
        ) or ["  │"]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _number(value: float | None, sign: str = "") -> str:
    return "     –" if value is None else f"{value:{sign}6.3f}"


def _finite(value: float) -> float | None:
    """A JSON number, None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None
