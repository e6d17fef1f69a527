"""The command line: `npd COMMAND ...`. Commands import what they need when they run, so `npd --help` is instant.

Exit status: 0 done; 2 the input is refused, with one line on stderr; 1 a role failed; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_npd import __version__
from megatron_npd.errors import USAGE_STATUS, UserError

if TYPE_CHECKING:
    from megatron_npd.config import Config

Arguments = argparse.Namespace


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments) or 0
    except UserError as error:
        print(f"npd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_STATUS
    except BrokenPipeError:  # `npd inspect RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("npd: interrupted", file=sys.stderr)
        return 130


def _run(arguments: Arguments) -> int:
    from megatron_npd.launch.supervisor import supervise

    return supervise(_load(arguments))


def _check(arguments: Arguments) -> None:
    from megatron_npd.launch.preflight import preflight
    from megatron_npd.launch.prepare import check_directory
    from megatron_npd.run_directory import RunDirectory

    config = _load(arguments)
    check_directory(RunDirectory(Path(config.run_directory)), config)
    inputs = preflight(config)
    for checkpoint in (inputs.teacher, inputs.student):
        dims = checkpoint.dims
        print(
            f"{checkpoint}: {dims.family}, {dims.num_layers} layers, hidden {dims.hidden_size}, vocab {dims.vocab_size}"
        )
    print(f"prompts.train = {config.prompts.train}: {inputs.train}")
    print(f"prompts.heldout = {config.prompts.heldout}: {inputs.heldout}")
    print("ok: nothing was found that would keep this run from starting")


def _prepare(arguments: Arguments) -> None:
    from megatron_npd.launch.prepare import prepare

    print(f"prepared: {prepare(_load(arguments)).root}")


def _trainer(arguments: Arguments) -> None:
    config = _enter_role(arguments, "trainer")
    from megatron_npd.training import trainer

    trainer.run(config)


def _annotator(arguments: Arguments) -> None:
    config = _enter_role(arguments, "annotator")
    from megatron_npd.teacher import annotator

    annotator.run(config)


def _rollout(arguments: Arguments) -> None:
    config = _enter_role(arguments, "rollout")
    from megatron_npd.rollout import sidecar

    sidecar.run(config, arguments.policy)


def _report(arguments: Arguments) -> None:
    from megatron_npd.config import load_config
    from megatron_npd.launch.summary import write_report
    from megatron_npd.run_directory import RunDirectory

    run = RunDirectory(Path(arguments.run))
    if not run.config.is_file():
        raise UserError(f"{run.root}: no config.toml in it; must be a run directory")
    write_report(run, load_config(run.config))
    print(run.report)


def _inspect(arguments: Arguments) -> None:
    from megatron_npd.launch.inspect import inspect

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


def _load(arguments: Arguments) -> Config:
    from megatron_npd.launch.prepare import load_run_config

    return load_run_config(arguments.config, arguments.set)


def _enter_role(arguments: Arguments, role: str) -> Config:
    """The configuration of a role whose run directory is prepared; sets up logging, environment and SIGTERM."""
    from megatron_npd.launch.logs import configure_logging
    from megatron_npd.launch.prepare import open_run
    from megatron_npd.launch.roles import role_environment

    config = _load(arguments)
    open_run(config)
    for name, value in role_environment(config, role).items():
        os.environ.setdefault(name, value)
    configure_logging()
    # A stopped role unwinds like a failing one, and so returns its leases instead of letting them expire.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
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
        ("check", _check, "find what would keep a run from working, without loading a model or writing a file"),
        ("prepare", _prepare, "check, then make the run directory (the first thing `run` does)"),
        ("trainer", _trainer, "one trainer rank (RANK, WORLD_SIZE from torchrun, srun or npd run)"),
        ("annotator", _annotator, "one annotator rank"),
    ):
        commands.add_parser(name, help=text, description=text, parents=[configured]).set_defaults(command=command)

    text = "one rollout sidecar; any number may work in one run directory"
    rollout = commands.add_parser("rollout", help=text, description=text, parents=[configured])
    rollout.add_argument("--policy", choices=("student", "teacher"), default="student", help="whose responses")
    rollout.set_defaults(command=_rollout)

    text = "write summary.json and report.html of a run in any state"
    commands.add_parser("report", help=text, description=text, parents=[of_run]).set_defaults(command=_report)

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
