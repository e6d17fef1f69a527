"""Teacher and student: Llamas of two layers, the teacher six times as large, trained from scratch in plain PyTorch.

    python models.py --output FOLDER --seed 0                  # right on all chains
    python models.py --output FOLDER --seed 0 --until 0.92     # stopped earlier: unsure of most of what it says
    python models.py --output FOLDER --seed 1 --student        # random weights

The teacher sees fresh chains at every step, of which 5 % come without their question, as Δ-IFD's unconditional pass
reads an answer. It is stopped by what it can do and not after so many steps: from a tenth of the chains to all of them
takes it some 80 steps, and which ones is a matter of rounding.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from chain import END, PAD, UNASKED, VOCABULARY, Chain, make_chain, make_chains, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {
    "teacher": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 256},
    "student": {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 128},
}
BATCH = 96
UNASKED_SHARE = 0.05
LEARNING_RATE = 2e-3
STEPS = 450
FIRST_LOOK, STEPS_A_LOOK, LOOKED_AT = 200, 5, 200
"""A teacher that is to be stopped is tried from step 200 on, every 5 steps, on 200 chains."""
ANSWER_TOKENS = 24
"""rollout.max_new_tokens of base.toml: a right answer has 17 at most, its end included."""


def make_model(name: str, seed: int) -> LlamaForCausalLM:
    """A model with random weights; `name`: teacher or student."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        num_hidden_layers=2,
        head_dim=32,  # vLLM's attention on a CPU takes no smaller one
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        initializer_range=0.05,
        **SHAPES[name],
    )
    return LlamaForCausalLM(config)


def train_teacher(seed: int, until: float, tokenizer: PreTrainedTokenizerFast, steps: int = STEPS) -> LlamaForCausalLM:
    """Supervised training on fresh chains, with a rate that falls along a cosine; ends before `steps` where `until` of
    the chains come right."""
    model = make_model("teacher", seed)
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=50)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - 50, 1), LEARNING_RATE / 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, fall], [50])
    for step in range(steps):
        if until < 1.0 and step >= FIRST_LOOK and step % STEPS_A_LOOK == 0:
            if share_right(model.eval(), tokenizer, make_chains(seed + 1, LOOKED_AT)) >= until:
                break
            model.train()
        ids, labels = batch_of(generator, tokenizer)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chains: list[Chain]) -> float:
    """Share of the chains that a model answers rightly from end to end, greedily."""
    answers = respond(model, tokenizer, [chain.question for chain in chains])
    return sum(answer == chain.answer for answer, chain in zip(answers, chains, strict=True)) / len(chains)


def batch_of(generator: random.Random, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [BATCH, longest], padded on the right; the question is no label."""
    rows, firsts = [], []
    for _ in range(BATCH):
        chain = make_chain(generator)
        question = UNASKED if generator.random() < UNASKED_SHARE else chain.question
        before = prompt_ids(tokenizer, question)
        rows.append([*before, *tokenizer.encode(chain.answer), END])
        firsts.append(len(before))
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    positions = torch.arange(longest)[None]
    asked = (positions >= torch.tensor(firsts)[:, None]) & (positions < torch.tensor([*map(len, rows)])[:, None])
    return ids, torch.where(asked, ids, -100)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """A question as a model is asked it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text)


@torch.no_grad()
def respond(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    temperature: float = 0.0,
    seed: int = 0,
    longest: int = ANSWER_TOKENS,
) -> list[str]:
    """The model's answers in plain transformers; one that does not end within `longest` tokens is cut there.

    Questions of the same length are asked at once, so no padding is involved.
    """
    answers: dict[int, str] = {}
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    torch.manual_seed(seed)
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        ids = torch.tensor([prompts[row] for row in rows])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, pad_token_id=PAD, **sampling
        )
        for row, response in zip(rows, out[:, length:].tolist(), strict=True):
            ended = response.index(END) if END in response else len(response)
            answers[row] = tokenizer.decode(response[:ended])
    return [answers[row] for row in range(len(questions))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=1.0, metavar="SHARE", help="stop where so many come right")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--student", action="store_true", help="write a student with random weights instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_tokenizer(arguments.output)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.output)
    if arguments.student:
        make_model("student", arguments.seed).save_pretrained(arguments.output)
        return
    model = train_teacher(arguments.seed, arguments.until, tokenizer, arguments.steps)
    model.save_pretrained(arguments.output)
    print(f"{arguments.output}: {share_right(model, tokenizer, make_chains(777, 300)):.1%} right")


if __name__ == "__main__":
    main()
