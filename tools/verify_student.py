"""Prove that the exported student is the trained model: three engines, one greedy answer.

    python tools/verify_student.py RUN [--prompts 8] [--max-new-tokens 32]

For held-out prompts, plain vLLM and plain transformers decode greedily from RUN/student_hf, and the trainer's own model
- Megatron-Core, weights from RUN/checkpoints, not from the export - scores the answer: each token must be its most
probable one, which by induction means that it decodes the same answer. All three compute in float32, because in
16 bits near-ties fall either way. Exit status: 0 equal; 1 different, with the first difference named; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megatron_npd.config import Config, load_config
from megatron_npd.data.batch import lay_out
from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.distributed.parallel import Parallel
from megatron_npd.errors import USAGE_STATUS, UserError
from megatron_npd.hardware import device
from megatron_npd.models.hf_config import eos_token_ids, read_model_dims
from megatron_npd.run_directory import RunDirectory

Answers = list[list[int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=8, help="held-out prompts to answer")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--vllm-answers", type=Path, help=argparse.SUPPRESS)  # the child process that holds vLLM
    arguments = parser.parse_args()
    device.settle()  # transformers comes before the doors that do so
    try:
        run, config = RunDirectory(arguments.run), load_config(arguments.run / "config.toml")
        if not run.student.is_dir():
            raise UserError(f"{run.student}: no exported student yet; the run must have finished")
        prompts = _prompts(run, arguments.prompts)
        if arguments.vllm_answers:
            answers = vllm_answers(run, config, prompts, arguments.max_new_tokens)
            arguments.vllm_answers.write_text(json.dumps(answers))
            return 0
        return compare(run, config, prompts, arguments.max_new_tokens)
    except UserError as error:
        print(f"verify_student: error: {error}", file=sys.stderr)
        return USAGE_STATUS


def compare(run: RunDirectory, config: Config, prompts: Answers, max_new_tokens: int) -> int:
    """Ask all three and say what was found."""
    from_vllm = _in_own_process(run, len(prompts), max_new_tokens)
    from_transformers = transformers_answers(run, prompts, max_new_tokens)
    for index, (a, b) in enumerate(zip(from_vllm, from_transformers, strict=True)):
        if a != b:
            print(f"verify_student: prompt {index}: vLLM answers {a}, transformers {b}", file=sys.stderr)
            return 1
    first = megatron_disagreement(run, config, prompts, from_vllm)
    if first:
        print(f"verify_student: {first}", file=sys.stderr)
        return 1
    total = sum(map(len, from_vllm))
    print(f"verify_student: vLLM, transformers and the trainer's model agree on {len(prompts)} answers, {total} tokens")
    return 0


def vllm_answers(run: RunDirectory, config: Config, prompts: Answers, max_new_tokens: int) -> Answers:
    """Greedy answers of plain vLLM on the exported folder."""
    from megatron_npd.schema import TEACHER_VERSION
    from megatron_npd.vllm_engine.engine import Request, RolloutEngine

    stop = eos_token_ids(run.student)
    length = max(map(len, prompts)) + max_new_tokens
    engine = RolloutEngine(run.student, TEACHER_VERSION, config.rollout, "float32", length)
    requests = [Request(ids, 0, max_new_tokens, stop, temperature=0.0) for ids in prompts]
    return [response.ids for response in engine.generate(requests)]


def transformers_answers(run: RunDirectory, prompts: Answers, max_new_tokens: int) -> Answers:
    """Greedy answers of plain transformers on the exported folder."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.student, dtype=torch.float32).eval()
    stop = eos_token_ids(run.student)
    answers = []
    for ids in prompts:
        with torch.no_grad():
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop,
                pad_token_id=stop[0],
            )
        answers.append(output[0, len(ids) :].tolist())
    return answers


def megatron_disagreement(run: RunDirectory, config: Config, prompts: Answers, answers: Answers) -> str | None:
    """The first answer token that is not the most probable one of the checkpointed Megatron model, or None."""
    import torch

    from megatron_npd.kernels import top_token
    from megatron_npd.mcore.model import forward_packed, projected
    from megatron_npd.mcore.model_parallel import initialize, shutdown

    parallel = initialize()
    dims = read_model_dims(run.student)
    model = checkpointed_model(run, config, parallel)
    pairs = [(np.array(p), np.array(a)) for p, a in zip(prompts, answers, strict=True)]
    tokens, cu_seqlens, rows = lay_out(pairs)
    tokens, rows = torch.from_numpy(tokens), torch.from_numpy(rows)
    with torch.no_grad():
        hidden = forward_packed(model, tokens, cu_seqlens, rows, parallel)
        chunks = projected(model, hidden, config.training.logits_chunk_tokens)
        best = [token for _, logits in chunks for token in top_token(logits, parallel, dims.vocab_size).tolist()]
    shutdown()
    for index, answer in enumerate(answers):
        for position, token in enumerate(answer):
            if (ours := best.pop(0)) != token:
                return f"prompt {index}, answer token {position}: the trainer's model says {ours}, the export {token}"
    return None


def checkpointed_model(run: RunDirectory, config: Config, parallel: Parallel) -> Any:
    """The model of the current checkpoint, to compute in float32 with the weights as the run has them.

    Raises:
        UserError: there is no checkpoint.
    """
    import torch

    from megatron_npd.mcore.checkpoint import latest_checkpoint, load_model_only
    from megatron_npd.mcore.model import ModelOptions, build_gpt

    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise UserError(f"{run.checkpoints}: holds no checkpoint")
    # In the run's dtype: weights of a float32 run must not be rounded to be compared with its export.
    dtype = getattr(torch, config.models.dtype)
    [model] = build_gpt(read_model_dims(run.student), parallel, dtype, ModelOptions("reference"))
    load_model_only(checkpoint, [model])
    model = model.float()
    model.config.params_dtype = torch.float32
    return model


def _prompts(run: RunDirectory, count: int) -> Answers:
    prompts = load_prompt_set(run.prompts("heldout"))
    return [prompts[index].tolist() for index in range(min(count, len(prompts)))]


def _in_own_process(run: RunDirectory, prompts: int, max_new_tokens: int) -> Answers:
    """vLLM's answers from a process of its own: it and Megatron both change global state of torch."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.json"
        command = [sys.executable, __file__, str(run.root), "--prompts", str(prompts)]
        command += ["--max-new-tokens", str(max_new_tokens), "--vllm-answers", str(out)]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        return json.loads(out.read_text())


if __name__ == "__main__":
    sys.exit(main())
