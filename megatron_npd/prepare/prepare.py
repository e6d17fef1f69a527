"""From a configuration to a prepared run directory, and from a prepared directory back to its configuration.

`config.toml` is written last, so a directory that holds it is complete. A run directory belongs to one configuration
digest; whatever else changes (`launch`, the place of the directory) may change between starts. What a configuration
leaves open (`models.dtype = "auto"`) is decided here once and kept: the directory may move to another machine.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from megatron_npd.config import Config, load_config
from megatron_npd.data.prompts import HELDOUT, TRAIN
from megatron_npd.errors import UserError
from megatron_npd.files import read_json, write_atomically, write_json
from megatron_npd.prepare.dtype import decide_dtype
from megatron_npd.prepare.fingerprints import Fingerprints, fingerprints_of, models_of, refuse_changed
from megatron_npd.prepare.preflight import check_models, preflight
from megatron_npd.prepare.problem_sets import complete_problems, save_all
from megatron_npd.prepare.provenance import provenance
from megatron_npd.run_directory import RunDirectory

logger = logging.getLogger(__name__)

UNFINISHED = re.compile(r"prompts|provenance\.json|\..+\.tmp")
"""Names an interrupted preparation leaves at the top of a run directory."""


def prepare(config: Config, in_cluster: bool = False) -> RunDirectory:
    """Make the run directory of a configuration, or find it made.

    `in_cluster`: the roles will run on the nodes that `[slurm]` describes, not here.

    Raises:
        UserError: the inputs do not pass `preflight`, the directory belongs to another configuration, or it holds
            something else. Nothing is touched then.
    """
    run = RunDirectory(Path(config.run_directory))
    check_directory(run, config)
    if run.config.is_file():
        config = as_prepared(config)
        check_models(config)
        check_inputs(run, config, fingerprints_of(config))
        complete_problems(run, config)
    else:
        inputs = preflight(config)
        config = decide_dtype(config, in_cluster)
        _create(run.root)
        inputs.train.save(run.prompts(TRAIN), with_responses=config.trains_on_given)
        inputs.heldout.save(run.prompts(HELDOUT), with_responses=config.heldout.source == "data")
        save_all(run, inputs.evaluations)
        write_json(run.provenance, provenance(config))
    # On a resume only what is not part of `Config.identity` can have changed: the roles read it from here.
    text = config.to_toml().encode()
    if not run.config.is_file() or run.config.read_bytes() != text:
        write_atomically(run.config, text)
    return run


def check_directory(run: RunDirectory, config: Config) -> None:
    """Refuse a run directory this configuration must not use; a missing or half-prepared one is fine.

    Raises:
        UserError: it belongs to another configuration, or holds something else.
    """
    where = f"run_directory = {config.run_directory}"
    if run.config.is_file():
        _check_same(run, config)
        return
    if run.root.exists() and not run.root.is_dir():
        raise UserError(f"{where}: is a file; must be a folder or not exist yet")
    if run.root.is_dir():
        foreign = sorted(entry.name for entry in run.root.iterdir() if not UNFINISHED.fullmatch(entry.name))
        if foreign:
            raise UserError(f"{where}: holds {foreign[0]} but no config.toml; must be empty, new or a run's own folder")


def as_prepared(config: Config) -> Config:
    """The configuration with the dtype of its prepared run directory in place of "auto"; unchanged where there is none.

    Raises:
        UserError: the run directory's own configuration cannot be read.
    """
    prepared = RunDirectory(Path(config.run_directory)).config
    if not prepared.is_file():
        return config
    models = load_config(prepared).models
    return (
        config.with_dtype(models.dtype, models.dtype_reason)
        if config.models.dtype in ("auto", models.dtype)
        else config
    )


def open_run(config: Config) -> RunDirectory:
    """The prepared run directory of a configuration, for a role that is started by hand.

    Raises:
        UserError: it is not prepared, belongs to another configuration, or its teacher or student was exchanged.
    """
    run = RunDirectory(Path(config.run_directory))
    if not run.config.is_file():
        raise UserError(f"run_directory = {config.run_directory}: not prepared; run `npd prepare CONFIG` first")
    _check_same(run, config)
    if os.environ.get("RANK", "0") == "0":  # for all ranks of a role
        check_inputs(run, config, models_of(config))
    return run


def check_inputs(run: RunDirectory, config: Config, now: Fingerprints) -> None:
    """Refuse inputs that were exchanged since a run was prepared.

    Raises:
        UserError: see `refuse_changed`; provenance.json is damaged.
    """
    try:
        recorded = dict(read_json(run.provenance)).get("inputs") if run.provenance.is_file() else None
    except (ValueError, TypeError):
        raise UserError(
            f"{run.provenance}: must be JSON, as it was written; without this file inputs are not compared"
        ) from None
    if recorded is None:
        logger.warning(
            "%s: does not say what its inputs were (an older version prepared it): they are not compared",
            run.provenance,
        )
        return
    refuse_changed(recorded, now, config, run.root)


def load_run_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a configuration `as_prepared`, or a run's own config.toml, which then means the directory it lies in.

    So a role can be run against a copy of a run directory, to reproduce a fault without touching the original.

    Raises:
        UserError: see `config.load_config`.
    """
    config = load_config(path, overrides)
    folder = Path(path).resolve().parent
    if Path(path).name == "config.toml" and RunDirectory(folder).provenance.is_file():
        return config.model_copy(update={"run_directory": str(folder)})
    return as_prepared(config)


def _create(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_directory = {root}: cannot be created: {error.strerror}") from None


def _check_same(run: RunDirectory, config: Config) -> None:
    prepared, config = load_config(run.config), as_prepared(config)
    if prepared.digest == config.digest:
        return
    key, old, new = _differences(prepared.identity, config.identity)[0]
    raise UserError(
        f"{key} = {new!r}: the run directory {run.root} was prepared with {old!r}; use another run_directory or the "
        "same value"
    )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of everything that decides what the run computes and differs."""
    found: list[tuple[str, Any, Any]] = []
    for name in old | new:  # tables of the user's own names may hold different ones
        key, ours, theirs = prefix + name, old.get(name), new.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += _differences(ours, theirs, f"{key}.")
        elif ours != theirs:
            found.append((key, ours, theirs))
    return found
