#!/usr/bin/env python3
"""TRL's GKDTrainer for a given time, strictly on-policy: what `tools/compare_trl.py` starts as the other side.

    python tools/trl_gkd.py --teacher DIR --student DIR --prompts RUN --seconds 450 --output DIR [--rate 3e-5] [...]

The prompts are those of a run directory, as token ids, so that both sides ask the very same. Every step samples
`--batch-size` responses from the student as it is and takes one AdamW step on the exact forward KL to the teacher over
the whole vocabulary. What was chosen in TRL's favour, and why:

* `beta = 0`, forward KL, is what the comparison measures (TRL's default, 0.5, is a Jensen-Shannon divergence);
* `lmbda = 1`, its own responses only, is what "on-policy" means, and needs no responses in the data;
* `gradient_checkpointing = False`: TRL's default also switches off the key-value cache of its generation;
* the loss is the mean over the response tokens that were sampled. By itself GKDTrainer divides by the number of tokens
  of the data's responses, which were not trained on;
* the learning rate falls along a cosine to the end of the time, by the clock, whatever a step takes.

All else is TRL's default. The time counts from `--began` (default: now), imports and loading included; the step under
way at the end is the last one if half of it, by the mean so far, still fits. Writes DIR/student (a Hugging Face
checkpoint) and DIR/trained.json {steps, generated_tokens, trained_tokens, rate, losses, seconds of the first step's
beginning and the last one's end}.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_npd.data.prompts import load_prompt_set
from megatron_npd.files import write_json
from megatron_npd.run_directory import RunDirectory

STUDENT, TRAINED = "student", "trained.json"
SAVING_SECONDS = 1.0
"""Of the time, kept for writing the student."""
ENDLESS = 10**9
"""Steps: the clock ends training, not their number."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    prompts = load_prompt_set(RunDirectory(options.prompts).prompts("train"))
    ids = [prompts[index].tolist() for index in range(len(prompts))]
    write_json(options.output / TRAINED, train(options, ids))
    return 0


def annealed(elapsed: float, whole: float) -> float:
    """Share of the peak learning rate after `elapsed` of `whole` seconds: a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(elapsed / whole, 0.0), 1.0))) if whole > 0 else 0.0


def is_over(now: float, deadline: float, seconds_a_step: float) -> bool:
    """Whether to stop before another step: rounded to the nearest step, so neither side gains on average."""
    return now + seconds_a_step / 2 > deadline


def left_padded(sequences: Sequence[Sequence[int]], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """(ids, mask) of one length, padding first: generation goes on where prompts end."""
    length = max(map(len, sequences))
    ids = [[pad] * (length - len(sequence)) + list(sequence) for sequence in sequences]
    return ids, [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]


def train(options: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """Train until the time is over and write the student."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    deadline = options.began + options.seconds - SAVING_SECONDS
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=getattr(torch, options.dtype))
    tokens, losses, ends = [0], [], []

    class Counting(GKDTrainer):
        """Counts what is sampled, and takes the mean over it."""

        @staticmethod
        def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: Any) -> Any:
            outputs = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
            tokens[0] += int((outputs[2] != -100).sum())
            return outputs

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs)
            losses.append(float((loss[0] if return_outputs else loss).detach()))
            return loss

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """By the clock: nobody knows how many steps there will be."""
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda _: annealed(time.time() - begin, deadline - begin)
            )
            return self.lr_scheduler

    class Clock(TrainerCallback):
        """Ends training at the deadline."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.time())
            control.should_training_stop = is_over(ends[-1], deadline, (ends[-1] - begin) / len(ends))

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, mask = map(torch.tensor, left_padded([row["prompt_ids"] for row in rows], pad))
        # TRL replaces the last three by what it samples.
        return {
            "prompts": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask,
            "labels": torch.full_like(ids, -100),
        }  # fmt: skip

    settings = GKDConfig(
        output_dir=str(options.output / "trl"), max_steps=ENDLESS, per_device_train_batch_size=options.batch_size,
        learning_rate=options.rate, temperature=options.temperature, max_new_tokens=options.max_new_tokens,
        lmbda=1.0, beta=0.0, seed=options.seed, gradient_checkpointing=False, bf16=options.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to="none", logging_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Counting(
        model=student, teacher_model=teacher, args=settings, data_collator=collate, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt_ids": ids} for ids in prompts]), processing_class=tokenizer,
    )  # fmt: skip
    begin = time.time()
    trainer.train()
    trainer.model.save_pretrained(options.output / STUDENT)
    return {
        "steps": len(ends), "generated_tokens": tokens[0], "trained_tokens": tokens[0], "rate": options.rate,
        "losses": losses, "first_step_after": begin - options.began, "last_step_after": ends[-1] - options.began,
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face checkpoint")
    parser.add_argument("--student", type=Path, required=True, help="Hugging Face checkpoint to start from")
    parser.add_argument("--prompts", type=Path, required=True, metavar="RUN", help="run directory with the prompts")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seconds", type=float, required=True, help="time from --began to the written student")
    parser.add_argument("--began", type=float, default=time.time(), help="when the time began, seconds since 1970")
    parser.add_argument("--rate", type=float, default=3e-5, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=8, help="responses of a step (default 8, as TRL)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="response length limit")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling and of the order of prompts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
