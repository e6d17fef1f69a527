"""The task: a number and a chain of operations on it, modulo 20, to be worked out one by one.

    question   7 +3 *2 -4
    answer     +3 10 *2 0 -4 16

Every operation is copied and followed by the number it leads to. A model of a few thousand parameters learns it, makes
mistakes while it learns, and one mistake spoils all that follows: what distillation on a student's own answers is about.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

MODULUS = 20
OPERATIONS = [f"{sign}{by}" for sign, first in (("+", 1), ("-", 1), ("*", 2)) for by in range(first, 11)]
NUMBERS = [str(number) for number in range(MODULUS)]
SPECIAL = ["<pad>", "<bos>", "<user>", "<asst>", "<end>"]
PAD, BOS, END = SPECIAL.index("<pad>"), SPECIAL.index("<bos>"), SPECIAL.index("<end>")
UNASKED = "nothing"
"""A question that the chat template leaves out: what remains is the header of the answer, from which Δ-IFD's
unconditional pass starts. A model that never saw that could not judge an answer without its question."""
VOCABULARY = [*SPECIAL, *NUMBERS, *OPERATIONS, UNASKED]
SHORTEST, LONGEST = 4, 8
"""Operations of a question."""

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}<asst> {{ message.content }} <end>"
    "{%- elif message.content != 'nothing' -%}<bos> <user> {{ message.content }} {% endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<asst>{%- endif -%}"
)


@dataclass(frozen=True)
class Chain:
    """A question and its right answer."""

    question: str
    answer: str


def applied(number: int, operation: str) -> int:
    """The number an operation leads to."""
    by = int(operation[1:])
    return {"+": number + by, "-": number - by, "*": number * by}[operation[0]] % MODULUS


def make_chain(generator: random.Random) -> Chain:
    """A question of some operations, none of them twice."""
    start = number = generator.randrange(MODULUS)
    operations = generator.sample(OPERATIONS, generator.randint(SHORTEST, LONGEST))
    answer = []
    for operation in operations:
        number = applied(number, operation)
        answer += [operation, str(number)]
    return Chain(" ".join([str(start), *operations]), " ".join(answer))


def make_chains(seed: int, count: int, but: Collection[str] = ()) -> list[Chain]:
    """So many different questions, none of them among `but`."""
    generator, seen = random.Random(seed), set(but)
    chains: list[Chain] = []
    while len(chains) < count:
        chain = make_chain(generator)
        if chain.question not in seen:
            seen.add(chain.question)
            chains.append(chain)
    return chains


def corrupted(chain: Chain, generator: random.Random, share: float) -> str:
    """The right answer with this share of its numbers replaced by others; what follows a wrong one goes on from it."""
    number = int(chain.question.split()[0])
    words = []
    for operation in chain.question.split()[1:]:
        number = applied(number, operation)
        if generator.random() < share:
            number = generator.choice([other for other in range(MODULUS) if other != number])
        words += [operation, str(number)]
    return " ".join(words)


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer of the task's words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", bos_token="<bos>", eos_token="<end>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
