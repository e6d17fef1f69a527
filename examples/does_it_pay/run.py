"""All runs of the reproduction; every finished one leaves a small file in results/.

    python run.py [--quick] [--only SETTING/ARM ...] [--sets 4 5] [--work FOLDER] [--list]

Where costs are compared a run has the machine to itself, elsewhere two run side by side (`at_once` of a setting).
What has its result is not run again, so the whole can be stopped at any time, and made in parts on several machines.
Everything goes through `npd run base.toml --set ...`; the log of a run lies beside its directory below --work.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import prepare
from arms import Arm, Setting
from tqdm import tqdm

from megatron_npd.config import load_config
from megatron_npd.hardware.host import cores
from megatron_npd.process.durations import duration
from megatron_npd.process.metrics import busy_span, read_metrics
from megatron_npd.roles import ANNOTATOR, ROLLOUT, TRAINER
from megatron_npd.schema import Event

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
EVALUATION = "chains"
NO_COST = (Event.START, Event.EVALUATION, Event.ANSWERS, Event.STAGE)
"""Starting processes, and measuring how good a student is, are no part of what a method costs."""
KEPT_LINES = 25


@dataclass(frozen=True)
class Job:
    """One run."""

    setting: Setting
    arm: Arm
    number: int
    """Of its prompt set."""

    @property
    def name(self) -> str:
        return f"{self.setting.name}/{self.arm.name}/set_{self.number:02d}"

    def result(self, results: Path) -> Path:
        return results / f"{self.name}.json"


def jobs_of(plan: list[tuple[Setting, list[Arm]]]) -> list[Job]:
    """Of each setting set by set, so that what is there is comparable whenever it is stopped."""
    return [
        Job(setting, arm, number)
        for setting, its_arms in plan
        for place, number in enumerate(setting.sets)
        for arm in [*([] if setting.warmed_as else [arms.WARM]), *its_arms]
        if place < arm.sets
    ]


def warmup_of(job: Job) -> Job:
    """The run that makes the student which this one starts from."""
    named = {setting.name: setting for setting, _ in arms.PLAN}
    return Job(named[job.setting.warmed_as or job.setting.name], arms.WARM, job.number)


class RunError(RuntimeError):
    """A run ended with an error."""


class Runner:
    """Runs jobs below a folder."""

    def __init__(self, work: Path, results: Path, keep: bool):
        self.work, self.results, self._keep = work, results, keep
        self._preparing = threading.Lock()
        self._warming: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def run(self, job: Job) -> None:
        """One job, and the warmed-up student it starts from; the result is there afterwards. Several may run at once.

        Raises:
            RunError: a run ended with an error; its last lines are the message.
        """
        target = job.result(self.results)
        if target.is_file():
            return
        with self._preparing:
            prepare.prepare(self.work, [job.number], [job.setting.teacher])
        if job.arm is arms.WARM:
            self._warm(job)
        else:
            self._warm(warmup_of(job))
            self._npd(job, job.arm.keys, self._file(job, job.arm.prompts), self._student(job))

    def _warm(self, job: Job) -> None:
        """The warmed-up student and its result. Where there is one without the other the run is made again or gone on
        with: the result is another machine's, or this was stopped between the two."""
        with self._warming[warmup_of(job).name]:
            if self._student(job).is_dir() and warmup_of(job).result(self.results).is_file():
                return
            start = self.work / "models" / prepare.student_name(job.number)
            self._npd(job, arms.warmup(job.setting), self._file(job, "warm"), start)

    def _student(self, job: Job) -> Path:
        return self._folder(warmup_of(job)) / "student_hf"

    def _folder(self, job: Job) -> Path:
        return self.work / "runs" / job.name

    def _file(self, job: Job, name: str) -> Path:
        return self.work / "sets" / prepare.set_name(job.setting.teacher, job.number) / f"{name}.jsonl"

    def _npd(self, job: Job, keys: dict[str, Any], prompts: Path, student: Path) -> None:
        folder, log = self._folder(job), self._folder(job).with_suffix(".log")
        settings = {
            "run_directory": str(folder),
            "seed": job.number,
            "models.teacher": str(self.work / "models" / job.setting.teacher),
            "models.student": str(student),
            "prompts.train": str(prompts),
            "prompts.heldout": str(self.work / "sets" / f"{job.setting.teacher}_heldout.jsonl"),
            "selection.tau": job.setting.tau,
            **job.setting.keys,
            **keys,
        }
        evaluation = {
            "task": "exact_match", "name": EVALUATION, "path": str(self.work / "sets" / "problems.jsonl"),
            "versions": "last",
        }  # fmt: skip
        command = [sys.executable, "-m", "megatron_npd.cli", "run", str(HERE / "base.toml")]
        for key, value in settings.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in evaluation.items())
        command += ["--set", f"evaluation=[{{{inline}}}]"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        since = time.monotonic()
        with open(log, "a") as output:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if status:
            last = log.read_text().splitlines()[-KEPT_LINES:]
            raise RunError("\n".join([*last, f"{job.name}: npd run ended with status {status}; see {log}"]))
        if not job.result(self.results).is_file():
            write_result(job, folder, job.result(self.results), time.monotonic() - since)
        if job.arm is not arms.WARM and not self._keep:
            shutil.rmtree(folder)


def write_result(job: Job, folder: Path, target: Path, seconds: float) -> None:
    """What is kept of a run (README.md says what each key is)."""
    summary, provenance = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "provenance"))
    ((_, answers),) = summary["evaluation"][EVALUATION].items()
    records = read_metrics(folder / "metrics")
    rounds = summary["rollouts_by_round"] or {}
    result = {
        "setting": job.setting.name,
        "arm": job.arm.name,
        "prompt_set": job.number,
        "seed": job.number,
        "config_digest": load_config(folder / "config.toml").digest,
        "git_commit": provenance.get("git_commit"),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cores()} cores, {processor()}",
        "correct": answers["correct"],
        "problems": answers["problems"],
        "heldout_kl": summary["heldout_kl_after"],
        "device_seconds": {role: device_seconds(records, role) for role in (ROLLOUT, ANNOTATOR, TRAINER)},
        "generated_tokens": tokens(records, ROLLOUT, "response_tokens"),
        "annotated_tokens": tokens(records, ANNOTATOR, "tokens"),
        "trained_tokens": summary["trained_tokens"],
        "optimizer_steps": summary["optimizer_steps"],
        "kept_share": [stage["kept"] / stage["generated"] for stage in rounds.values()][:12],
        "wall_seconds": round(seconds, 1),
        "at_once": job.setting.at_once,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.rename(target)


def device_seconds(records: list[dict[str, Any]], role: str) -> float:
    """Seconds a role worked on what the method needs; here each has one device, a thread of the processor."""
    spans = (busy_span(one) for one in records if one["role"] == role and one["event"] not in NO_COST)
    return round(sum(end - begin for begin, end in filter(None, spans)), 3)


def tokens(records: list[dict[str, Any]], role: str, key: str) -> int:
    units = (one for one in records if (one["role"], one["event"]) == (role, Event.UNIT))
    return int(sum(one[key] for one in units))


def processor() -> str:
    """Its name, and the widest instructions that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    widest = next((isa for isa in ("avx512_bf16", "avx512f", "avx2") if isa in text), platform.machine())
    return f"{name} ({widest})"


def expected_seconds(job: Job, results: Path) -> float:
    """How long a run takes: what finished ones of its arm took, else what `arms.py` says."""
    finished = [json.loads(path.read_text())["wall_seconds"] for path in results.glob(f"*/{job.arm.name}/set_*.json")]
    return sum(finished) / len(finished) if finished else job.arm.seconds


def chosen(arguments: argparse.Namespace) -> Iterator[Job]:
    """The jobs that the command line means."""
    wanted = set(arguments.only or [])
    for job in jobs_of(arms.QUICK if arguments.quick else arms.PLAN):
        asked = not wanted or wanted & {job.setting.name, f"{job.setting.name}/{job.arm.name}"}
        if asked and (not arguments.sets or job.number in arguments.sets):
            yield job


def run_all(runner: Runner, jobs: list[Job], at_once: int, bar: tqdm) -> None:
    """Jobs in their order, so many side by side; the first that fails lets those under way end, and begins no other."""

    def run(job: Job) -> None:
        bar.set_description(job.name)
        runner.run(job)

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for ended in as_completed([pool.submit(run, job) for job in jobs]):
                ended.result()
                bar.update()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, RunError):
                sys.exit(str(error))
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two prompt sets, three arms")
    parser.add_argument("--only", nargs="+", metavar="SETTING[/ARM]")
    parser.add_argument("--sets", type=int, nargs="+")
    parser.add_argument("--work", type=Path, default=Path("runs/does_it_pay"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="keep the run directories")
    parser.add_argument("--list", action="store_true", help="print what would be run and end")
    arguments = parser.parse_args()
    jobs = list(chosen(arguments))
    left = [job for job in jobs if not job.result(arguments.results).is_file()]
    if arguments.list:
        print("\n".join(job.name for job in left))
        return
    seconds = sum(expected_seconds(job, arguments.results) / job.setting.at_once for job in left)
    print(f"{len(jobs)} runs, of which {len(jobs) - len(left)} are done; the others take about {duration(seconds)}")
    runner = Runner(arguments.work, arguments.results, arguments.keep)
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="run") as bar:
        for at_once in sorted({job.setting.at_once for job in left}):
            run_all(runner, [job for job in left if job.setting.at_once == at_once], at_once, bar)


if __name__ == "__main__":
    main()
