"""Summary, report and `npd inspect` on a small run directory with real shards and realistic metrics."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from megatron_npd.buffer.plan import Stage, make_plan
from megatron_npd.buffer.retention import retire_stages
from megatron_npd.buffer.shards import Shard, concatenate_ragged, read_shard, write_shard
from megatron_npd.config import Config
from megatron_npd.data.prompts import save_prompt_set
from megatron_npd.errors import UserError
from megatron_npd.files import read_json, write_atomically, write_json
from megatron_npd.process.metrics import Metrics
from megatron_npd.report.inspect import WIDTH, _sample_lines, inspect
from megatron_npd.report.plots import plot_histogram, plot_scatter
from megatron_npd.report.summary import collect_scores, summarise, write_report
from megatron_npd.run_directory import RunDirectory
from megatron_npd.schema import ROLLOUT_COLUMNS, TEACHER_VERSION, FinishReason, Verdict
from megatron_npd.selection.delta_ifd import DeltaIfd, judge
from megatron_npd.selection.rules import rule_of

PROMPTS, EOS, TOP_K = 40, 0, 2
EVIL = "<script>alert('\x1b[2J 5 < 6 & 7')</script>"
HELDOUT_KL = [4.0, 2.0, 1.5, 1.0]
SECTIONS = ["Held-out KL", "Training loss", "what the filter saw", "distribution", "Roles over time", "drift"]


class Clock:
    """Stands in for the time module: a record lies `seconds` after the one before."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("megatron_npd.process.metrics.time", clock)
    return clock


@pytest.fixture
def started(tmp_path: Path) -> tuple[RunDirectory, Config]:
    """A prepared run directory in which nothing has happened yet."""
    student = make_tokenizer(tmp_path / "student")
    for split in ("train", "heldout"):
        lines = [
            json.dumps({"id": f"q{i}", "messages": [{"role": "user", "content": question(i)}]}) for i in range(PROMPTS)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    run = RunDirectory(tmp_path / "run <b>")
    config = Config.model_validate(
        {
            "run_directory": str(run.root),
            "models": {"teacher": str(tmp_path / "teacher"), "student": str(student)},
            "prompts": {key: str(tmp_path / f"{key}.jsonl") for key in ("train", "heldout")},
            "rounds": {"count": 2},
            "rollout": {"samples_per_unit": 16},
            "warmup": {"samples_per_prompt": 1},
        }
    )
    for split in ("train", "heldout"):
        save_prompt_set(run.prompts(split), [f"q{i}" for i in range(PROMPTS)], [prompt_ids(i) for i in range(PROMPTS)])
    write_json(run.provenance, {"git_commit": "abc123", "packages": {"torch": "2.13.0"}})
    write_atomically(run.config, config.to_toml().encode())
    return run, config


@pytest.fixture
def finished(started: tuple[RunDirectory, Config], clock: Clock) -> tuple[RunDirectory, Config]:
    """The same when everything is done."""
    run, config = started
    for stage in make_plan(config, PROMPTS, PROMPTS).stages.values():
        for unit in range(stage.units):
            shard = sample_shard(stage, unit, config)
            rollout = {name: column for name, column in shard.columns.items() if name in ROLLOUT_COLUMNS}
            write_shard(run.unit("rollouts", stage.name, unit), Shard("rollouts", rollout, {}))
            write_shard(run.unit("samples", stage.name, unit), shard)
    for version, kl in enumerate(HELDOUT_KL):
        figures = {"version": version, "heldout_kl": kl, "heldout_ce": 3.0, "top1_agreement": 0.5, "tokens": 900}
        write_json(run.evaluation(version), figures)
    write_metrics(run, config, clock)
    return run, config


def test_figures_outlive_the_shards(finished: tuple[RunDirectory, Config]) -> None:
    run, config = finished
    before = summarise(run, config)
    plan = make_plan(config, PROMPTS, PROMPTS)
    retire_stages(run, plan, [stage.name for stage in plan.training_stages], keep=1)
    assert not run.unit("samples", "round_0000", 0).exists() and run.unit("samples", "round_0001", 0).exists()
    after = summarise(run, config)
    assert {key: after[key] for key in before} == before


def make_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes: id 0 is the end token, id b + 1 stands for byte b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = {"</s>": EOS} | {char: index + 1 for index, char in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


def encode(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


def question(index: int) -> str:
    return f"What is {index} plus {index}?"


def prompt_ids(index: int) -> list[int]:
    return encode(f"[user] {question(index)} [assistant]")


def response(row: int) -> str:
    return EVIL if row == 1 else f"It is {row}, because " + "one thing leads to another and " * (row % 7)


def sample_shard(stage: Stage, unit: int, config: Config) -> Shard:
    """A judged unit: mostly learnable samples, with some of every other kind."""
    rows = np.arange(stage.rows(unit).start, stage.rows(unit).stop)
    generator = np.random.default_rng([unit, stage.version + 1])
    by_teacher = stage.version == TEACHER_VERSION
    finish = np.where(rows % 13 == 5, FinishReason.LENGTH, FinishReason.STOP).astype(np.uint8)
    finish[rows % 29 == 7] = FinishReason.ABORT
    nlls = np.array([[1.6], [2.0], [1.2], [2.3]]) + generator.normal(0, 0.25, (4, len(rows)))
    nlls[0, rows % 17 == 3] = np.nan
    nlls[0, rows == 1] = 1.75
    nlls[2:, rows == 1] = [[1.2], [2.3]]
    if by_teacher:
        nlls[1:] = np.nan
    judgement = judge(
        *nlls,
        np.full(len(rows), 5),
        finish,
        np.zeros(len(rows), dtype=bool),
        form=config.selection.form,
        tau=config.selection.tau,
        reject_truncated=True,
        by_delta=not by_teacher,
    )
    responses = [[*encode(response(row)), EOS] for row in rows]
    kept = [ids if v == Verdict.KEPT else [] for ids, v in zip(responses, judgement.verdict, strict=True)]
    response_ids, response_offsets = concatenate_ragged([np.array(ids) for ids in responses], "int32")
    _, topk_offsets = concatenate_ragged([np.array(ids) for ids in kept], "int32")
    prompts, prompt_offsets = concatenate_ragged(
        [np.array(prompt_ids(index)) for index in stage.prompt_index[rows]], "int32"
    )
    annotated = topk_offsets[-1]
    columns = {
        "prompt_index": stage.prompt_index[rows],
        "sample_index": stage.sample_index[rows],
        "seed": rows.astype(np.int64),
        "policy_version": np.full(len(rows), stage.version, dtype=np.int32),
        "finish_reason": finish,
        "prompt_ids": prompts,
        "prompt_offsets": prompt_offsets,
        "response_ids": response_ids,
        "response_offsets": response_offsets,
        "behaviour_logprobs": np.full(len(response_ids), -1.0, dtype=np.float32),
        "nll_teacher_conditional": nlls[0],
        "nll_teacher_unconditional": nlls[1],
        "nll_student_conditional": nlls[2],
        "nll_student_unconditional": nlls[3],
        "ifd_teacher": judgement.ifd_teacher,
        "ifd_student": judgement.ifd_student,
        "delta_ifd": judgement.delta_ifd,
        "verdict": judgement.verdict,
        "topk_offsets": topk_offsets,
        "topk_ids": np.zeros((annotated, TOP_K), dtype=np.int32),
        "topk_logprobs": np.full((annotated, TOP_K), -1.0, dtype=np.float32),
        "tail_mass": np.full(annotated, 0.2, dtype=np.float32),
    }
    return Shard("samples", columns, {"selection": rule_of(config.selection).describe()})


def write_metrics(run: RunDirectory, config: Config, clock: Clock) -> None:
    """Records of every role; the trainer was killed after step 6 and did steps 5 and 6 again."""
    logs = {
        role: Metrics(run.metrics(role), role)
        for role in ("supervisor", "rollout_teacher", "rollout", "annotator", "trainer")
    }

    def log(role: str, event: str, seconds: float, step: int | None = None, **values: Any) -> None:
        clock.now += seconds
        logs[role].log(event, step, **values | ({} if event == "step" else {"seconds": seconds}))

    log("supervisor", "phase", 2.0, name="prepare")
    log("trainer", "start", 3.0, attention_backend="reference", parameters=74_000_000)
    log("annotator", "start", 3.0, attention_backend="torch_varlen")
    number = 0
    for version, stage in enumerate(make_plan(config, PROMPTS, PROMPTS).stages.values(), start=-1):
        sampler = "rollout_teacher" if stage.version == TEACHER_VERSION else "rollout"
        if sampler == "rollout":
            log(sampler, "refresh", 0.5, version=version, parity_mean=0.01 * version, parity_max=0.2)
        for unit in range(stage.units):
            n = stage.rows(unit).stop - stage.rows(unit).start
            log(sampler, "unit", 4.0, stage=stage.name, unit=unit, samples=n, response_tokens=50 * n, prompt_tokens=9)
            verdicts = sample_shard(stage, unit, config)["verdict"]
            rejected = Counter(Verdict(int(v)).name.lower() for v in verdicts if v != Verdict.KEPT)
            kept = n - rejected.total()
            log(
                "annotator",
                "unit",
                2.0,
                stage=stage.name,
                unit=unit,
                samples=n,
                kept=kept,
                rejected=rejected,
                tokens=200 * n,
            )
        if stage.name == "heldout":
            continue
        for again in (0, 1, 2, 3, 4, 5, 4, 5) if version == 0 else range(6):
            values = {
                "train/loss": 3.0 / (1 + number + again),
                "train/ce": 2.0,
                "train/kd": 1.0,
                "train/grad_norm": 0.7,
            }
            values |= {"train/lr": 1e-5, "train/response_tokens": 1000, "perf/tokens": 2048, "perf/seconds": 4.0}
            values |= {"buffer/packing_efficiency": 0.75, "near_policy/lag": 0}
            if sampler == "rollout":
                values["near_policy/kl"] = 0.01 * (again + 1)
            log("trainer", "step", 4.0, step=number + again + 1, stage=stage.name, **values)
        number += 6
        log("trainer", "publish", 1.0, version=version + 1, bytes=148_000_000, stall_seconds=1.0)
        log("annotator", "evaluation", 1.0, version=version + 1, heldout_kl=HELDOUT_KL[version + 1], tokens=900)
    log("trainer", "checkpoint", 1.5)


def test_summary_of_a_finished_run(finished: tuple[RunDirectory, Config]) -> None:
    run, config = finished
    summary = summarise(run, config)
    assert summary["rollouts_generated"] == 2 * PROMPTS
    scores = collect_scores(run)
    assert summary["rollouts_kept"] == np.sum(scores["verdict"] == Verdict.KEPT) > 20
    assert set(summary["rollouts_rejected"]) == {v.name.lower() for v in Verdict if v is not Verdict.KEPT}
    assert summary["rollouts_kept"] + sum(summary["rollouts_rejected"].values()) == summary["rollouts_generated"]
    assert summary["rollouts_rejected"]["truncated"] > 0 and summary["rollouts_rejected"]["aborted"] > 0
    assert list(summary["rollouts_by_round"]) == ["round_0000", "round_0001"]
    assert 20 < summary["warmup_kept"] < PROMPTS
    assert (summary["warmup_responses"], summary["rounds"], summary["refreshes"]) == (PROMPTS, 2, 1)
    assert summary["optimizer_steps"] == 18, "steps done again after a restart count once"
    assert summary["trained_tokens"] == 18_000
    assert summary["packing_efficiency"] == pytest.approx(0.75)
    assert summary["heldout_kl_by_version"] == {"0": 4.0, "1": 2.0, "2": 1.5, "3": 1.0}
    assert [summary[f"heldout_kl_{k}"] for k in ("before", "after_warmup", "after")] == [4.0, 2.0, 1.0]
    assert summary["heldout_kl_reduction"] == {"whole_run": 0.75, "rounds": 0.5}
    speed = summary["tokens_per_second_by_role"]
    assert speed["trainer"] == pytest.approx(512) and speed["rollout"] == pytest.approx(50 * PROMPTS / 12)
    assert speed["annotator"] == pytest.approx(200 * PROMPTS / 6)
    wall = summary["wall_seconds_by_phase"]
    assert wall["trainer"]["warmup"] == pytest.approx(32), "but their time was spent"
    assert wall["trainer"]["publish"] == pytest.approx(3) and wall["rollout"]["round_0001"] == pytest.approx(12)
    busy = sum(seconds for role in wall if role != "total" for seconds in wall[role].values())
    assert wall["total"] == pytest.approx(busy), "in this run one role works at a time"
    assert summary["near_policy_kl"] == {"max": 0.06, "last": 0.06}
    assert summary["publishing"]["2"] == {"bytes": 148_000_000, "seconds": 1.0, "stall_seconds": 1.0}
    assert summary["parity"]["2"] == {"mean": 0.02, "max": 0.2}
    assert summary["attention_backend"] == "reference" and summary["versions"] == {"torch": "2.13.0"}


def test_the_page_is_whole_and_escaped(finished: tuple[RunDirectory, Config]) -> None:
    run, config = finished
    summary = write_report(run, config)
    assert read_json(run.summary) == summary == summarise(run, config)
    page = run.report.read_text()
    assert all(section in page for section in SECTIONS)
    assert page.count("data:image/svg+xml;base64,") == 6 and "Nothing to draw" not in page
    assert "<script" not in page and "run <b>" not in page and "run &lt;b&gt;" in page
    assert "http" not in page, "self-contained"
    assert "examples/does_it_pay/" in page[page.index("<footer>") :], "what to read next"
    assert "1.0 s, of which training stood still 1.0 s" in page
    assert "4.000 → 2.000 → 1.000" in page and "75.0% less" in page


def test_every_scored_sample_is_drawn(finished: tuple[RunDirectory, Config]) -> None:
    """An axes without its points is easy to make and hard to see in a test of the page."""
    scores = collect_scores(finished[0])
    figure = plot_scatter(scores)
    assert figure is not None
    drawn = [len(c.get_offsets()) for axes in figure.axes for c in axes.collections if isinstance(c, PathCollection)]
    scored = np.isfinite(scores["delta_ifd"])
    assert drawn == [np.sum(scored & (scores["round"] == index)) for index in (0, 1)]
    histogram = plot_histogram(scores)
    assert histogram is not None
    heights = sum(bar.get_height() for bar in histogram.axes[0].patches)
    outside = re.search(r"(\d+) samples lie outside", histogram.axes[0].get_xlabel())
    assert heights + int(outside.group(1) if outside else 0) == np.sum(scored)


def test_bands_are_those_of_the_rule_that_judged(finished: tuple[RunDirectory, Config]) -> None:
    """Read from the shards: the configuration may say something else by now, and rounds may differ."""
    run, config = finished
    stage = make_plan(config, PROMPTS, PROMPTS).stages["round_0001"]
    for unit in range(stage.units):
        path = run.unit("samples", stage.name, unit)
        shard = read_shard(path, "samples")
        path.unlink()
        rule = DeltaIfd("loss", 0.5, True).describe()
        write_shard(path, Shard("samples", shard.columns, {"selection": rule if unit else {}}))  # one of an old version
    figure, histogram = plot_scatter(collect_scores(run)), plot_histogram(collect_scores(run))
    assert figure is not None and histogram is not None
    drawn = [sorted(text.get_text() for text in axes.texts) for axes in figure.axes]
    assert drawn == [["Δ = 0", "Δ = 0.8"], ["Δ = 0", "Δ = 0.5"]]
    assert [text.get_text() for text in histogram.axes[0].texts] == ["0", "0.5", "0.8"]
    text = "\n".join(show(run, stage="round_0001", limit=0))
    assert text.count("kept: 0 to τ = 0.5 (loss form)") + text.count("kept: by a rule that was not") == PROMPTS
    settings = summarise(run, config)["settings"]
    assert (settings["form"], settings["tau"]) == ("loss", 0.5), "of the newest"


def test_a_run_that_has_not_begun(started: tuple[RunDirectory, Config]) -> None:
    run, config = started
    summary = write_report(run, config)
    known = {"run", "versions", "git_commit", "settings", "heldout_kl_reduction"}
    assert all(summary[key] is None for key in summary.keys() - known)
    page = run.report.read_text()
    assert all(section in page for section in SECTIONS) and page.count("Nothing to draw yet") == 6


def test_a_broken_run(finished: tuple[RunDirectory, Config]) -> None:
    """Killed in round 1, one shard corrupt, one metrics line torn, figures that are no numbers."""
    run, config = finished
    shutil.rmtree(run.unit("samples", "round_0001", 0).parent)
    run.unit("samples", "round_0000", 1).write_bytes(b"not a shard")
    run.evaluation(3).unlink()
    run.provenance.unlink()
    lines = [json.loads(line) for line in run.metrics("trainer").read_text().splitlines()]
    lines[-4] |= {"train/loss": float("nan"), "near_policy/kl": float("inf"), "perf/tokens": None}
    run.metrics("trainer").write_text("\n".join(map(json.dumps, lines)) + '\n{"time": 17')
    summary = write_report(run, config)
    assert summary["rollouts_generated"] == 2 * PROMPTS
    assert summary["rollouts_kept"] + sum(summary["rollouts_rejected"].values()) == PROMPTS - 16
    assert summary["rollouts_by_round"]["round_0001"]["kept"] is None
    assert summary["heldout_kl_after"] is None and summary["heldout_kl_reduction"]["whole_run"] is None
    assert "NaN" not in run.summary.read_text() and "Infinity" not in run.summary.read_text()
    assert run.unit("samples", "round_0000", 1).exists(), "a report moves nothing"


def test_a_run_that_has_just_begun(finished: tuple[RunDirectory, Config]) -> None:
    """Every role has written a few lines and nothing else is there."""
    run, config = finished
    for kind in ("rollouts", "samples", "evaluation"):
        shutil.rmtree(run.root / kind)
    whole = {path: path.read_text().splitlines() for path in (run.root / "metrics").iterdir()}
    for lines in (7, 1, 2):
        for path, text in whole.items():
            path.write_text("\n".join(text[:lines]))
        assert summarise(run, config)["wall_seconds_by_phase"]["total"] > 0
    assert write_report(run, config)["rollouts_generated"] is None
    assert run.report.read_text().count("Nothing to draw yet") == 4


def show(run: RunDirectory, **options: Any) -> list[str]:
    chosen = {"rejected": False, "kept": False, "stage": None, "reason": None, "limit": 0, "as_json": False} | options
    return list(inspect(run.root, **chosen))


def test_inspect_prints_what_was_rejected(finished: tuple[RunDirectory, Config]) -> None:
    run, _ = finished
    lines = show(run, rejected=True, stage="round_0000", limit=3)
    assert sum(line.startswith("── round_0000") for line in lines) == 3
    assert max(map(len, lines)) <= WIDTH
    text = "\n".join(lines)
    assert "  │ What is" in text and "[user]" not in text, "the last user turn, not the whole template"
    assert "policy v1" in text and "Δ-IFD" in text and "KEPT   " not in text
    assert text.count("kept: 0 to τ = 0.8 (ppl form)") == 3
    assert any("by the teacher" in line for line in show(run, rejected=True, stage="warmup", limit=1))


def test_inspect_shows_a_long_name_whole(finished: tuple[RunDirectory, Config]) -> None:
    run, _ = finished
    sample = next(json.loads(line) for line in show(run, as_json=True, limit=1))
    for name in ("a name of several words " * 8, "one-word" * 20):
        title, *_ = "\n".join(_sample_lines(sample | {"prompt_name": name.strip()}, {})).split("\n  teacher")
        assert name.strip() in " ".join(line.strip("─ ") for line in title.splitlines())


def test_inspect_spells_out_control_characters(finished: tuple[RunDirectory, Config]) -> None:
    text = "\n".join(show(finished[0], stage="round_0000"))
    assert "\x1b" not in text and "\\x1b[2J" in text


def test_inspect_json_agrees_with_the_shards(finished: tuple[RunDirectory, Config]) -> None:
    run, config = finished
    samples = [json.loads(line) for line in show(run, as_json=True, stage="round_0001")]
    counted = Counter(sample["verdict"] for sample in samples)
    by_round = summarise(run, config)["rollouts_by_round"]["round_0001"]
    assert counted == Counter({"kept": by_round["kept"]} | {r: n for r, n in by_round["rejected"].items() if n})
    assert samples[1]["response"] == EVIL + "</s>" and samples[1]["policy_version"] == 2
    assert {sample["verdict"] for sample in map(json.loads, show(run, as_json=True, reason="truncated"))} == {
        "truncated"
    }
    unscored = [sample for sample in samples if sample["verdict"] == "non_finite"]
    assert unscored and unscored[0]["delta_ifd"] is None


def test_inspect_without_the_prompts_and_the_student(finished: tuple[RunDirectory, Config]) -> None:
    run, config = finished
    Path(config.prompts.train).unlink()
    shutil.move(config.models.student, run.version(2))
    assert any("│ [user] What is" in line for line in show(run, kept=True, stage="round_0000", limit=1))
    shutil.rmtree(run.version(2))
    with pytest.raises(UserError, match=r"models\.student = .*: has no tokenizer"):
        show(run)


def test_inspect_refuses_what_it_cannot_show(started: tuple[RunDirectory, Config], tmp_path: Path) -> None:
    run, _ = started
    assert show(run) == ["No such sample (yet)."] and show(run, as_json=True) == []
    for options, message in (
        ({"stage": "round_7"}, r"--stage round_7: must be one of warmup, round_0000, round_0001$"),
        ({"reason": "boring"}, r"--reason boring: must be one of kept, degenerate, cognitive_disconnect"),
        ({"reason": "empty", "kept": True}, r"--reason empty: contradicts --kept"),
        ({"limit": -1}, r"--limit -1"),
    ):
        with pytest.raises(UserError, match=message):
            show(run, **options)
    with pytest.raises(UserError, match="not a run directory"):
        show(RunDirectory(tmp_path))
