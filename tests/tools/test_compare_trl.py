"""The comparison with TRL: what is run, in which order, for how long; what is refused; and one that is run for real."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from inputs import Inputs, write_prompts
from places import TOOLS
from small_config import make_config

from megatron_npd.config import load_config
from megatron_npd.files import read_json, write_json
from megatron_npd.run_directory import RunDirectory

pytestmark = pytest.mark.heavy  # the tool imports what draws reports

HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("compare_trl")


def figures(kl: float, right: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "heldout_kl": kl, "top1_agreement": 0.5, "heldout_tokens": 10, "right": right, "asked": 8, "chosen": 4 + right,
        "offered": 8, "by_chance": 2.0, "answers": [], **more,
    }  # fmt: skip


def test_times_and_rates(tool: ModuleType) -> None:
    gkd = importlib.import_module("trl_gkd")
    assert [gkd.annealed(t, 100.0) for t in (-1, 0, 50, 100, 120)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert gkd.annealed(1.0, 0.0) == 0.0
    assert not gkd.is_over(now=85.0, deadline=100.0, seconds_a_step=20.0), "15 of 20 seconds are left: one more"
    assert gkd.is_over(now=95.0, deadline=100.0, seconds_a_step=20.0)
    assert gkd.left_padded([[5], [6, 7, 8]], 0) == ([[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]])


def test_the_table(tool: ModuleType) -> None:
    cost = {"seconds": 100.0, "steps": 9, "generated_tokens": 50, "trained_tokens": 70, "cores_used_by_others": 0.1}
    ours = [
        figures(kl, 2, name=f"ours_{i}", system=tool.OURS, rate=7e-5, seconds_by_kind={"training": 40.0}, **cost)
        for i, kl in ((1, 3.0), (2, 3.2), (3, 3.1))
    ]
    trials = [
        figures(kl, 1, name=f"trl_{rate:g}_1", system=tool.TRL, rate=rate, beside="ours_1", **cost)
        for rate, kl in ((1e-5, 3.9), (3e-5, 3.7), (1e-4, 4.2))
    ]
    more = figures(3.9, 1, name="trl_3e-05_2", system=tool.TRL, rate=3e-5, beside="ours_2", **cost)
    before = figures(4.0, 0, name="before", system=tool.BEFORE, teacher=figures(0.0, 7))
    text = tool.text([before, ours[0], *trials, ours[1], more, ours[2]])
    assert "| held-out KL, nats a token (before: 4.0000) | 3.1000 (3.0000, 3.2000, 3.1000) | 3.8000 (3.7000" in text
    assert "ours +0.9000, TRL's best rate +0.2000 nats a token: **4.5 times**." in text
    assert "| **3e-05** | 3.7000 | +0.3000 |" in text and "| 0.0001 | 4.2000 | -0.2000 |" in text
    assert "| training | 40 (40, 40, 40) |" in text and "| annotation | 0 (0, 0, 0) |" in text
    assert "right answers of 8 (before 0, teacher 7) | 2 (2, 2, 2) | 1 (1, 1) |" in text
    table = importlib.import_module("comparison_table")
    assert "gained nothing, so no ratio" in table.gain_sentence(before, ours, [trials[2]])


KL = {"ours_1": 3.0, "ours_2": 3.1, "trl_1e-05_1": 3.9, "trl_0.0001_1": 3.5, "trl_0.0001_2": 3.6}


class Machine:
    """Takes the place of every command: writes what it would leave, at a cost that is decided here."""

    def __init__(self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
        self.tool, self.ran, self.words = tool, [], []
        self.fails: str | None = None
        monkeypatch.setattr(tool, "measured", self.measured)
        monkeypatch.setattr(tool, "measured_course", lambda _: tool.Course([], 1.0))
        monkeypatch.setattr(tool, "read_metrics", lambda _: [])
        summary = {"optimizer_steps": 4, "trained_tokens": 9, "heldout_kl_after": 3.0, "near_policy_kl": None}
        monkeypatch.setattr(tool, "summarise", lambda *_: summary)

    def measured(self, words: Sequence[str], environment: dict[str, str]) -> Any:
        self.words.append(words := list(words))
        if "judge_student.py" in words[1]:
            students = [Path(word) for word in words[2 : words.index("--json")]]
            write_json(Path(words[words.index("--json") + 1]), [figures(KL.get(s.parent.name, 4.0)) for s in students])
            return self.tool.Done(0, 1.0, 0.0)
        if "trl_gkd.py" in words[1]:
            folder = Path(words[words.index("--output") + 1])
            trained = dict.fromkeys(("steps", "generated_tokens", "trained_tokens", "first_step_after"), 5)
            write_json(folder / "trained.json", trained)
        else:
            values = dict(word.split("=", 1) for word in words if "=" in word)
            folder = Path(json.loads(values["run_directory"]))
            run = RunDirectory(folder)
            run.student.mkdir(parents=True)
            config = make_config(folder, seed=int(values.get("seed", 1234))).with_dtype("float32", "so")
            run.config.write_text(config.to_toml())
            write_json(run.summary, {})
        self.ran.append(folder.name)
        return self.tool.Done(3 if folder.name == self.fails else 0, 100.0 + len(self.ran), 0.0)


@pytest.fixture
def machine(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda _: True)
    return Machine(tool, monkeypatch)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(make_config("unused", warmup={"samples_per_prompt": 1}).to_toml())
    return file


def test_both_sides_take_turns_and_the_same_time(
    tool: ModuleType, machine: Machine, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(config_file), "--output", str(out), "--rates", "1e-5", "1e-4"]
    assert tool.main([*words, "--repeat", "2"]) == 0
    assert machine.ran == ["start", "ours_1", "trl_1e-05_1", "trl_0.0001_1", "ours_2", "trl_0.0001_2"]
    budgets = {
        Path(w[w.index("--output") + 1]).name: (w[w.index("--seconds") + 1], w[w.index("--seed") + 1])
        for w in machine.words
        if "trl_gkd.py" in w[1]
    }
    ours = {name: read_json(out / f"{name}.json") for name in ("ours_1", "ours_2")}
    assert (ours["ours_1"]["seed"], ours["ours_2"]["seed"]) == (1234, 1235)
    assert budgets == {
        "trl_1e-05_1": ("102.000", "1234"), "trl_0.0001_1": ("102.000", "1234"), "trl_0.0001_2": ("105.000", "1235")
    }  # fmt: skip
    assert ours["ours_1"]["seconds"] == 102.0
    runs = [w for w in machine.words if w[1] == "-m"]
    assert "rounds.count=0" in runs[0] and not any("models.student" in word for word in runs[0])
    student = f"models.student={json.dumps(str(out / 'start' / 'student_hf'))}"
    for run in runs[1:]:
        assert {student, "warmup.samples_per_prompt=0", 'models.dtype="float32"'} <= set(run)
    assert "**2.1 times**" in capsys.readouterr().out  # 0.95 of ours, 0.45 of TRL's

    machine.ran.clear()
    assert tool.main([*words, "--repeat", "2"]) == 0
    assert machine.ran == [], "nothing that is finished is run again"
    (out / "ours_2.json").unlink()
    (out / "ours_2" / "leftover").write_text("of an interrupted run")
    assert tool.main([*words, "--repeat", "2"]) == 0
    assert machine.ran == ["ours_2"] and not (out / "ours_2" / "leftover").exists()
    assert tool.main([*words, "--repeat", "2", "--set", "training.lr=1e-3"]) == 2
    assert "holds another comparison; must be another folder" in capsys.readouterr().err


def test_only_a_folder_of_its_own_is_taken(
    tool: ModuleType, machine: Machine, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In it, what an interrupted run left is removed."""
    (tmp_path / "ours_1").mkdir()
    assert tool.main([str(config_file), "--output", str(tmp_path)]) == 2
    assert "holds no comparison; must be a new or an empty folder" in capsys.readouterr().err
    assert (tmp_path / "ours_1").is_dir() and machine.ran == []


def test_a_command_that_fails_ends_it(
    tool: ModuleType, machine: Machine, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.fails = "trl_1e-05_1"
    words = [str(config_file), "--output", str(tmp_path / "out"), "--rates", "1e-5"]
    assert tool.main(words) == 3
    assert "trl_gkd.py" in capsys.readouterr().err
    assert (tmp_path / "out" / "ours_1.json").is_file() and not (tmp_path / "out" / "trl_1e-05_1.json").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--repeat", "0"], "--repeat 0: must be at least 1"),
        (["--rates", "1e-5", "0"], "--rates 0: must be greater than 0"),
        (["--set", "rounds.count=0"], "rounds.count = 0: there is nothing to compare"),
        (["--task", "no.jsonl"], "--task no.jsonl: cannot read it"),
        (["--set", "rounds.cout=1"], "did you mean"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], complaint: str, tool: ModuleType, machine: Machine, config_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert tool.main([str(config_file), "--output", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare_trl: error: ") and error.count("\n") == 1 and complaint in error
    assert machine.ran == [] and not (tmp_path / "out").exists()


def test_without_trl_nothing_is_run(
    tool: ModuleType, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda _: None)
    assert tool.main([str(config_file)]) == 2
    assert capsys.readouterr().err.startswith("compare_trl: error: trl is not installed; `pip install '.[trl]'`")


STUB = """
import pathlib, shutil, sys, json
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(words["--output"])
shutil.copytree(words["--student"], out / "student")
keys = ("steps", "generated_tokens", "trained_tokens", "first_step_after")
(out / "trained.json").write_text(json.dumps(dict.fromkeys(keys, 1)))
"""


@pytest.mark.skipif(not HAS_TRL, reason="needs TRL (pip install '.[trl]'), and minutes: run by hand")
@pytest.mark.slow
def test_a_small_comparison(
    tool: ModuleType, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real runs of tiny models, judged, with what copies its student in TRL's place; then, where it is installed, TRL
    itself at another rate, which is all that is left to run."""
    shutil.copytree(checkpoints, tmp_path / "inputs")
    inputs = Inputs(tmp_path / "inputs")
    write_prompts(inputs.train, {f"t{i}": f"What is {i} plus {i}?" for i in range(12)})
    write_prompts(inputs.heldout, {f"h{i}": f"Name {i} things." for i in range(3)})
    inputs.set("warmup", {"samples_per_prompt": 1, "lr": 1e-2})
    inputs.set("rounds", {"count": 1, "epochs_per_round": 1})
    inputs.set("rollout", {"max_new_tokens": 16, "samples_per_unit": 12, "kv_cache_gib": 0.05, "threads": 1})
    inputs.set("selection", {"reject_truncated": False})
    task, out = tmp_path / "task.jsonl", tmp_path / "out"
    question = {"messages": [{"role": "user", "content": "Say yes."}], "answer": "yes"}
    task.write_text(json.dumps(question | {"opening": "I say", "choices": ["yes", "no"]}) + "\n")
    words = [str(inputs.path), "--output", str(out), "--repeat", "1", "--task", str(task), "--rates", "1e-3"]

    with monkeypatch.context() as patch:
        patch.setattr(tool.importlib.util, "find_spec", lambda _: True)
        (tmp_path / "tools").mkdir()
        (tmp_path / "tools" / "trl_gkd.py").write_text(STUB)
        shutil.copy(TOOLS / "judge_student.py", tmp_path / "tools")
        patch.setattr(tool, "TOOLS", tmp_path / "tools")
        assert tool.main(words) == 0
    ours, theirs, before = (read_json(out / f"{name}.json") for name in ("ours_1", "trl_0.001_1", "before"))
    assert ours["heldout_kl"] == pytest.approx(ours["own_heldout_kl"], rel=1e-4), "two ways to one figure"
    assert before["heldout_kl"] == theirs["heldout_kl"] > 0 and before["asked"] == before["offered"] == 1
    assert before["teacher"]["heldout_kl"] == pytest.approx(0.0, abs=1e-9) and before["teacher"]["top1_agreement"] == 1
    assert ours["seconds"] > 1 and ours["trained_tokens"] > 0 and ours["generated_tokens"] > 0
    assert {"training", "annotation", "evaluation", "rollouts"} <= set(ours["seconds_by_kind"])
    assert load_config(out / "ours_1" / "config.toml").models.dtype == "float32"

    if HAS_TRL:
        assert tool.main([*words, "2e-3"]) == 0
        real = read_json(out / "trl_0.002_1.json")
        assert real["steps"] > 0 and real["generated_tokens"] == real["trained_tokens"] > 0
        assert real["heldout_kl"] != pytest.approx(before["heldout_kl"])
        assert read_json(out / "ours_1.json") == ours
