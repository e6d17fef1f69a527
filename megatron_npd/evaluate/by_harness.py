"""Public benchmarks by lm-evaluation-harness, where it is installed: one process of it for each subject."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_npd.data.tokenizer import load_tokenizer
from megatron_npd.errors import UserError
from megatron_npd.evaluate.subjects import Asked, Subject
from megatron_npd.hardware.device import device_here

HARNESS = "lm_eval"


def evaluate_by_harness(place: Asked, tasks: str, limit: int, output: Path | None, say: Callable[[str], None]) -> int:
    """Run its tasks, as it names them, on every subject; the exit status of the first run that fails, or 0.

    Args:
        limit: problems of each task; 0: all.
        output: folder for what it writes; None: below a run's evaluation/, of a checkpoint nowhere.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(HARNESS) is None:
        raise UserError(
            f"--lm-eval {tasks}: needs the Python package lm-eval, which is not installed; pip install "
            "'megatron_npd[lm-eval]'"
        )
    for subject in place.subjects:
        command = harness_command(place, subject, tasks, limit, output)
        say(" ".join(command))
        if status := subprocess.run(command, check=False).returncode:
            return status
    return 0


def harness_command(place: Asked, subject: Subject, tasks: str, limit: int, output: Path | None) -> list[str]:
    """What runs it on one subject: by vLLM on a GPU, by transformers elsewhere."""
    config, on_gpu = place.config, device_here() == "gpu"
    models = config.models
    arguments = [f"pretrained={subject.folder}", f"dtype={models.dtype}"]
    arguments += ["trust_remote_code=True"] if models.trust_remote_code else []
    command = [sys.executable, "-m", HARNESS, "--model", "vllm" if on_gpu else "hf", "--tasks", tasks]
    command += ["--model_args", ",".join(arguments)] + ([] if on_gpu else ["--device", "cpu"])
    tokenizer = load_tokenizer(subject.folder, trust_remote_code=models.trust_remote_code)
    if config.prompts.format == "chat" and tokenizer.chat_template:
        command.append("--apply_chat_template")
        if config.prompts.system:
            command += ["--system_instruction", config.prompts.system]
    if limit:
        command += ["--limit", str(limit)]
    if output is None and place.run:
        output = place.run.results(HARNESS) / (subject.called.removeprefix("the ").replace(" ", "_"))
    return command + (["--output_path", str(output)] if output else [])
