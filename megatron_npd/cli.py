"""The command line: `npd COMMAND ...`. Commands import what they need when they run, so `npd --help` is instant.

Exit status: 0 done; 2 the input is refused, with one line on stderr; 1 a role failed; 74 a file could not be written or
read (disk full, no permission), with one line; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_npd import __version__
from megatron_npd.errors import STORAGE_STATUS, USAGE_STATUS, BadVersionError, GraderError, UserError, storage_reason
from megatron_npd.roles import ANNOTATOR, ROLLOUT, SIDECAR, STUDENT, TEACHER, TRAINER

if TYPE_CHECKING:
    from megatron_npd.config import Config

Arguments = argparse.Namespace
ALL_POLICIES = "all"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments) or 0
    except BrokenPipeError:  # `npd inspect RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:
        if reason := storage_reason(error):
            _say(f"error: {reason}")
            return STORAGE_STATUS
        if isinstance(error, UserError):
            _say(f"error: {error}")
            return USAGE_STATUS
        if isinstance(error, BadVersionError | GraderError):
            _say(f"error: {error}")
            return 1
        raise


def _say(text: str) -> None:
    """One line on stderr, which may lie on the very disk that is full."""
    try:
        print(f"npd: {' '.join(text.split())}", file=sys.stderr, flush=True)
    except OSError:  # what is left in the buffer would turn the exit status into Python's own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _run(arguments: Arguments) -> int:
    from megatron_npd.supervise.supervisor import supervise

    def conclude(*finished: Any) -> None:
        from megatron_npd.report.conclusion import conclude  # it draws: not before there is something to draw

        conclude(*finished)

    return supervise(_load(arguments), conclude)


def _check(arguments: Arguments) -> int:
    if arguments.devices:
        return _check_devices(_load(arguments))
    import numpy as np

    from megatron_npd.buffer.plan import make_plan
    from megatron_npd.estimates.text import estimate, names_slurm
    from megatron_npd.prepare.dtype import decide_dtype, describe_dtype
    from megatron_npd.prepare.machine import machine_lines
    from megatron_npd.prepare.preflight import preflight
    from megatron_npd.prepare.prepare import check_directory
    from megatron_npd.run_directory import RunDirectory

    config = _load(arguments)
    run = RunDirectory(Path(config.run_directory))
    check_directory(run, config)
    inputs = preflight(config, with_weights=not arguments.without_weights)
    if not run.config.is_file():  # else decided when the run was prepared
        config = decide_dtype(config, in_cluster=names_slurm(config))
    for checkpoint in (inputs.teacher, inputs.student):
        dims = checkpoint.dims
        print(
            f"{checkpoint}: {dims.family}, {dims.num_layers} layers, hidden {dims.hidden_size}, vocab {dims.vocab_size}"
        )
    print(f"prompts.train = {config.prompts.train}: {inputs.train}")
    print(f"prompts.heldout = {config.prompts.heldout}: {inputs.heldout}")
    for asked in inputs.evaluations:
        print(f"evaluation {asked.evaluation.name}: {asked}")
    print(describe_dtype(config))
    plan = make_plan(config, len(inputs.train), len(inputs.heldout), np.arange(inputs.train.answered))
    rates = Path(arguments.rates) if arguments.rates else None
    print("\n".join(estimate(config, inputs.teacher.dims, inputs.student.dims, plan, rates)))
    for line in machine_lines(config, inputs.teacher.dims, inputs.student.dims):
        print(line)
    print("ok: nothing was found that would keep this run from starting")
    return 0


def _check_devices(config: Config) -> int:
    from megatron_npd.prepare.devices import check_devices, planned

    good = True
    try:
        for well, line in check_devices(config):
            good = good and well
            print(line, flush=True)
    except UserError:
        print("would check:", *planned(), sep="\n  ", flush=True)
        raise
    return 0 if good else 1


def _prompts(arguments: Arguments) -> None:
    from megatron_npd.prepare.prompt_report import report_on_config, report_on_file

    if arguments.file.endswith(".toml"):
        if arguments.tokenizer:
            raise UserError(f"--tokenizer {arguments.tokenizer}: must be left out with a configuration, which names it")
        lines = report_on_config(_load(argparse.Namespace(config=arguments.file, set=arguments.set)), arguments.show)
    elif arguments.tokenizer:
        lines = report_on_file(arguments.file, Path(arguments.tokenizer), arguments.set, arguments.show)
    else:
        raise UserError(
            f"{arguments.file}: needs --tokenizer FOLDER, or must be a configuration (.toml), which names it"
        )
    for line in lines:
        print(line)


def _prepare(arguments: Arguments) -> None:
    from megatron_npd.prepare.dtype import describe_dtype
    from megatron_npd.prepare.prepare import as_prepared, prepare

    config = _load(arguments)
    print(f"prepared: {prepare(config, in_cluster='SLURM_JOB_ID' in os.environ).root}")
    print(describe_dtype(as_prepared(config)))


def _trainer(arguments: Arguments) -> None:
    config = _enter_role(arguments, TRAINER)
    from megatron_npd.training import trainer

    trainer.run(config)


def _annotator(arguments: Arguments) -> None:
    config = _enter_role(arguments, ANNOTATOR)
    from megatron_npd.teacher import annotator

    annotator.run(config)


def _rollout(arguments: Arguments) -> int:
    config = _enter_role(arguments, ROLLOUT)
    if arguments.policy == ALL_POLICIES:
        from megatron_npd.supervise.policies import sample_both

        return sample_both(config)
    from megatron_npd.rollout import sidecar

    sidecar.run(config, arguments.policy)
    return 0


def _slurm(arguments: Arguments) -> None:
    from megatron_npd.slurm.script import render
    from megatron_npd.slurm.submit import submit

    config = _load(arguments)
    script = render(config, arguments.config, arguments.set)
    if arguments.output:
        Path(arguments.output).write_text(script, encoding="utf-8")
    if arguments.submit:
        if not arguments.no_check:
            _check(arguments)
        print("\n".join(f"submitted job {job}" for job in submit(config, script)))
    elif not arguments.output:
        print(script, end="")


def _supervise(arguments: Arguments) -> int:
    from megatron_npd.slurm.srun_steps import supervise_steps

    return supervise_steps(_load(arguments), arguments.steps)


def _report(arguments: Arguments) -> None:
    from megatron_npd.config import load_config
    from megatron_npd.report.summary import write_report
    from megatron_npd.run_directory import RunDirectory

    run = RunDirectory(Path(arguments.run))
    if not run.config.is_file():
        raise UserError(f"{run.root}: no config.toml in it; must be a run directory")
    write_report(run, load_config(run.config))
    print(run.report)


def _status(arguments: Arguments) -> None:
    from megatron_npd.report.status import status
    from megatron_npd.report.status_text import as_text

    now = status(arguments.run)
    print(json.dumps(now, indent=2, ensure_ascii=False) if arguments.json else as_text(now))


def _inspect(arguments: Arguments) -> None:
    from megatron_npd.report.inspect import inspect

    for line in inspect(
        arguments.run,
        rejected=arguments.rejected,
        kept=arguments.kept,
        stage=arguments.stage,
        reason=arguments.reason,
        limit=arguments.limit,
        as_json=arguments.json,
    ):
        print(line)


def _evaluate(arguments: Arguments) -> int:
    """Whatever it is asked about, in this process; so it computes as a sidecar does."""
    from megatron_npd.evaluate.subjects import place_of_subjects
    from megatron_npd.hardware import device
    from megatron_npd.supervise.role_work import role_environment

    place = place_of_subjects(Path(arguments.place), arguments.version, arguments.teacher, arguments.set)
    device.settle()
    output = Path(arguments.output) if arguments.output else None

    def say(line: str) -> None:
        print(line, flush=True)

    if arguments.lm_eval:
        if arguments.task:
            raise UserError(f"--task {arguments.task[0]}: must be left out with --lm-eval, which has tasks of its own")
        from megatron_npd.evaluate.by_harness import evaluate_by_harness

        return evaluate_by_harness(place, arguments.lm_eval, arguments.problems or 0, output, say)
    for name, value in role_environment(place.config, ROLLOUT).items():
        os.environ.setdefault(name, value)
    from megatron_npd.evaluate.by_tasks import evaluate_by_tasks, evaluations_asked

    keys = {name: getattr(arguments, name) for name in ("path", "problems", "max_new_tokens")}
    given = {name: value for name, value in keys.items() if value is not None}
    evaluate_by_tasks(place, evaluations_asked(place, arguments.task, given, arguments.key), output, say)
    return 0


def _load(arguments: Arguments) -> Config:
    from megatron_npd.prepare.prepare import load_run_config

    return load_run_config(arguments.config, arguments.set)


def _enter_role(arguments: Arguments, role: str) -> Config:
    """The configuration of a role whose run directory is prepared; sets up logging, environment, signals, and the
    process's signs of life, which end with it. `role`: as `npd` calls it."""
    import logging

    from megatron_npd.hardware import device
    from megatron_npd.prepare.prepare import open_run
    from megatron_npd.process import stopping
    from megatron_npd.process.heartbeat import Heartbeat
    from megatron_npd.process.logs import configure_logging
    from megatron_npd.supervise.role_work import role_environment

    config = _load(arguments)
    run = open_run(config)
    for name, value in role_environment(config, role).items():
        os.environ.setdefault(name, value)
    if arguments.slurm:
        from megatron_npd.slurm.task import task_environment

        of_task = task_environment(config, role, arguments.slurm, os.environ)
        if device.VISIBLE in of_task and (unfit := device.gpu_obstacle()):
            raise UserError(f"--slurm {arguments.slurm}: {unfit}")
        os.environ.update(of_task)
    configure_logging()
    device.settle()
    if unused := device.unused_gpus():
        logging.getLogger(__name__).warning(unused)
    stopping.install()
    if role != ROLLOUT or arguments.policy != ALL_POLICIES:  # which has processes of its own
        name = SIDECAR[arguments.policy] if role == ROLLOUT else role
        Heartbeat(run, name, int(os.environ.get("RANK", 0))).start()
    return config


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other refusal."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="npd", description="Near-Policy Distillation at Megatron scale.")
    parser.add_argument("--version", action="version", version=f"npd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    configured = argparse.ArgumentParser(add_help=False)
    configured.add_argument("config", metavar="CONFIG", help="TOML file, or the config.toml of a run directory")
    configured.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. --set training.lr=2e-5"
    )
    of_run = argparse.ArgumentParser(add_help=False)
    of_run.add_argument("run", metavar="RUN", help="run directory")

    for name, command, text in (
        ("run", _run, "all roles on this machine, from prompts to finished student; continues what was begun"),
        ("prepare", _prepare, "check, then make the run directory (the first thing `run` does)"),
    ):
        commands.add_parser(name, help=text, description=text, parents=[configured]).set_defaults(command=command)

    text = "find what would keep a run from working and say what it takes, without loading a model or touching the run"
    check = commands.add_parser("check", help=text, description=text, parents=[configured])
    check.add_argument(
        "--without-weights",
        action="store_true",
        help="of the checkpoints only the .json and tokenizer files are here yet",
    )
    check.add_argument(
        "--rates", metavar="FILE|RUN", help="estimate the time: rates in a TOML file, or those a run has measured"
    )
    check.add_argument(
        "--devices", action="store_true", help="instead: try this node's GPUs and what is installed for them; seconds"
    )
    check.set_defaults(command=_check)

    text = "show how prompts are framed, token by token, and what is lost on the way, before anything runs"
    prompts = commands.add_parser("prompts", help=text, description=text)
    prompts.add_argument("file", metavar="FILE", help="a run's TOML file, or a data set as prompts.train takes it")
    prompts.add_argument("--tokenizer", metavar="FOLDER", help="checkpoint folder; for a data set")
    prompts.add_argument("--show", type=int, default=2, metavar="N", help="prompts shown of each way of framing (2)")
    prompts.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. --set prompts.columns.prompt=question"
    )
    prompts.set_defaults(command=_prompts)

    of_role = argparse.ArgumentParser(add_help=False, parents=[configured])
    of_role.add_argument(
        "--slurm", metavar="GPUS", help="a task of an srun step whose GPUs on each node are these: 0-3, 5 or none"
    )
    for name, command, text in (
        (TRAINER, _trainer, "one trainer rank (RANK, WORLD_SIZE from torchrun, npd run, or srun with --slurm)"),
        (ANNOTATOR, _annotator, "one annotator rank"),
        (ROLLOUT, _rollout, "one rollout sidecar; any number may work in one run directory"),
    ):
        role = commands.add_parser(name, help=text, description=text, parents=[of_role])
        role.set_defaults(command=command)
        if name == ROLLOUT:
            role.add_argument(
                "--policy", choices=(STUDENT, TEACHER, ALL_POLICIES), default=STUDENT,
                help="whose responses; all: the teacher's, then the student's",
            )  # fmt: skip

    text = "render the sbatch script of a run, or send it"
    slurm = commands.add_parser("slurm", help=text, description=text, parents=[configured])
    slurm.add_argument("--output", metavar="FILE", help="write the script there instead of showing it")
    slurm.add_argument("--submit", action="store_true", help="check as `npd check` does, then hand it to sbatch")
    slurm.add_argument("--no-check", action="store_true", help="submit without the check")
    slurm.set_defaults(command=_slurm, without_weights=False, rates=None, devices=False)

    text = "watch the steps of a Slurm job, as the script of `npd slurm` does"
    supervise = commands.add_parser("supervise", help=text, description=text, parents=[configured])
    supervise.add_argument("steps", nargs=argparse.REMAINDER, metavar="--step NAME SRUN...", help="one srun of a role")
    supervise.set_defaults(command=_supervise)

    text = "write summary.json and report.html of a run in any state"
    commands.add_parser("report", help=text, description=text, parents=[of_run]).set_defaults(command=_report)

    text = "who does what, or waits for what, since when; how far the run is; what went wrong"
    status = commands.add_parser("status", help=text, description=text, parents=[of_run])
    status.add_argument("--json", action="store_true", help="for machines")
    status.set_defaults(command=_status)

    text = "what a checkpoint, a version of a run or its teacher scores in tasks"
    evaluate = commands.add_parser("evaluate", help=text, description=text)
    evaluate.add_argument("place", metavar="MODEL|RUN", help="a Hugging Face checkpoint folder, or a run directory")
    evaluate.add_argument(
        "--task", action="append", default=[], metavar="NAME",
        help="an evaluation of the run by its name (without: all of them), or a task: command, exact_match, ...",
    )  # fmt: skip
    evaluate.add_argument("--version", metavar="N|last|each", help="which versions of a run (last)")
    evaluate.add_argument("--teacher", action="store_true", help="the run's teacher instead")
    evaluate.add_argument("--path", metavar="FILE", help="the task's data set")
    evaluate.add_argument("--problems", type=int, metavar="N", help="the first so many; 0: all")
    evaluate.add_argument("--max-new-tokens", type=int, metavar="N", help="length limit of an answer")
    evaluate.add_argument(
        "--with", action="append", default=[], dest="key", metavar="KEY=VALUE",
        help="any other key of [[evaluation]], e.g. --with options.dataset=chain_sum",
    )  # fmt: skip
    evaluate.add_argument("--output", metavar="FILE", help="write every answer there, JSON lines")
    evaluate.add_argument("--lm-eval", metavar="TASKS", help="instead: lm-evaluation-harness, e.g. gsm8k,ifeval")
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a checkpoint, e.g. --set prompts.format=text",
    )
    evaluate.set_defaults(command=_evaluate)

    text = "judged samples as text, with their scores"
    inspect = commands.add_parser("inspect", help=text, description=text, parents=[of_run])
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--rejected", action="store_true", help="only rejected samples")
    which.add_argument("--kept", action="store_true", help="only kept samples")
    inspect.add_argument("--stage", help="warmup, round_0000, ...")
    inspect.add_argument("--reason", help="only samples with this verdict, e.g. cognitive_disconnect")
    inspect.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many; 0: all (default 20)")
    inspect.add_argument("--json", action="store_true", help="one JSON object a line")
    inspect.set_defaults(command=_inspect)
    return parser


if __name__ == "__main__":
    sys.exit(main())
