"""The runs: which arms there are, what each changes of base.toml, and on which prompt sets it is run.

All arms of a setting start from one warmed-up student of their prompt set and train for as many epochs over as many
prompts, so with as many steps and tokens. They differ in whose answers they see, and how often these are new.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

EPOCHS = 88
"""Of all arms, over a set's prompts: divisible by 1, 2, 4, 11 and 22 rounds."""
STEPS_A_PASS = 13
"""Packs, each a step, that a set's prompts with their answers fill: 22 tokens each are trained on, so 12.6 packs, give
or take 0.1: not near a whole number, so that a shorter answer here and there makes no pass a step shorter."""
PROMPTS = STEPS_A_PASS * 45
"""Of a set. A strictly on-policy round has as many of them as a step takes."""


@dataclass(frozen=True)
class Setting:
    """What the arms that are compared with each other have in common."""

    name: str
    says: str
    teacher: str = "teacher"
    warmup_epochs: int = 36
    sets: tuple[int, ...] = (4, 5, 6, 7, 8, 9)
    """Prompt sets, fixed beforehand; an arm may take the first few. Sets 1 to 3 are left out: how many prompts and
    passes there are was chosen by them."""
    tau: float = 0.3
    """τ of a filter's first round: the 80 % quantile of the Δ-IFD ≥ 0 of a warmed-up student of this setting. It was
    measured once, on 559 prompts of set 1, in plain PyTorch: an absolute τ would keep nearly all here and a fourth
    there."""
    keys: dict[str, Any] = field(default_factory=dict)
    at_once: int = 2
    """Runs side by side. Where costs are compared it is one: each has the machine to itself."""
    warmed_as: str = ""
    """The setting whose warmed-up students these are; left out: its own."""


@dataclass(frozen=True)
class Arm:
    """One kind of run."""

    name: str
    says: str
    keys: dict[str, Any]
    prompts: str = "train"
    """File of the set: train, varied or corrupted."""
    sets: int = 6
    """On so many of the setting's prompt sets."""
    refreshes: int | None = None
    """How often the student's answers were sampled anew; None: they are not the student's."""
    seconds: float = 50.0
    """What a run takes on two cores, about; known better once one has finished."""


def offline(kd_lambda: float, epochs: int = EPOCHS) -> dict[str, Any]:
    """Training on given responses alone."""
    return {
        "rounds.count": 0,
        "warmup.source": "data",
        "warmup.epochs": epochs,
        "warmup.lr": 2e-3,
        "warmup.kd_lambda": kd_lambda,
    }


def rounds(count: int, **more: Any) -> dict[str, Any]:
    """Rounds over all prompts of the set."""
    return {"rounds.count": count, "rounds.epochs_per_round": EPOCHS // count} | more


def filtered(rule: str) -> dict[str, Any]:
    """Four rounds with a filter that keeps about 80 % of the learnable samples; the first one's τ is the setting's."""
    return rounds(4) | {"selection.rule": rule, "selection.tau_quantile": 0.8}


WARM = Arm("warm", "the warmed-up student that the others start from", {})
SFT = Arm("sft", "supervised fine-tuning on the teacher's answers", offline(0.0))
KD = Arm("kd", "offline distillation on the teacher's answers", offline(0.9))
ONE_REFRESH = Arm("refresh_1", "its own answers, 1 refresh", rounds(2), refreshes=1)
THREE = Arm("refresh_3", "its own answers, 3 refreshes", rounds(4), refreshes=3)
TEN = Arm("refresh_10", "its own answers, 10 refreshes", rounds(11), refreshes=10)
TWENTY_ONE = Arm("refresh_21", "its own answers, 21 refreshes", rounds(22), refreshes=21, seconds=80.0)
STRICT = Arm(
    "strict",
    "strictly on-policy: new answers for every step",
    {
        "rounds.count": EPOCHS * STEPS_A_PASS,
        "rounds.prompts_per_round": PROMPTS // STEPS_A_PASS,
        "rounds.epochs_per_round": 1,
        "rollout.samples_per_unit": PROMPTS // STEPS_A_PASS,
        "training.checkpoint_rounds": 50,
        "training.sequence_length": 1280,  # room for all of a round, so that it is one step
    },
    sets=2,
    seconds=500.0,
    refreshes=EPOCHS * STEPS_A_PASS - 1,
)
FILTER = Arm("filter", "3 refreshes, filtered by Δ-IFD", filtered("delta_ifd"), refreshes=3)
RANDOM = Arm("random", "3 refreshes, as many dropped at random", filtered("random"), refreshes=3)
ARMS = [
    SFT,
    KD,
    Arm("refresh_0", "its own answers, sampled once", rounds(1), refreshes=0),
    ONE_REFRESH,
    THREE,
    TEN,
    TWENTY_ONE,
    STRICT,
    FILTER,
    RANDOM,
    Arm("varied", "the teacher's answers at temperature 1.5, four to a question", offline(0.9, 22), prompts="varied"),
    Arm(
        "corrupted", "right answers with 10 % wrong numbers, four to a question", offline(0.9, 22), prompts="corrupted"
    ),
]
FILTER_ARMS = [THREE, FILTER, RANDOM]
CERTAIN = Setting("certain", "a teacher that is always right", at_once=1)
PLAN: list[tuple[Setting, list[Arm]]] = [
    (CERTAIN, ARMS),
    (
        Setting("uncertain", "a teacher that is not certain", teacher="uncertain", tau=0.25),
        [SFT, KD, *FILTER_ARMS],
    ),
    (
        Setting(
            "hot",
            "answers sampled at temperature 1.6",
            tau=1.6,
            keys={"rollout.temperature": 1.6},
            warmed_as="certain",
        ),
        FILTER_ARMS,
    ),
    (Setting("weak", "half the warm-up", warmup_epochs=18, tau=1.0), FILTER_ARMS),
]
"""Everything, most wanted first."""
QUICK: list[tuple[Setting, list[Arm]]] = [(replace(CERTAIN, sets=CERTAIN.sets[:2]), [SFT, ONE_REFRESH, TEN])]


def warmup(setting: Setting) -> dict[str, Any]:
    """The run that makes a setting's warmed-up student of a set."""
    return offline(0.0, setting.warmup_epochs) | {"warmup.lr": 3e-3}
