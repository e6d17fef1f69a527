"""Faults of published implementations (shared/method.md): each has a check that our operator passes, and fails with it.

The second half is proved, not believed: the fault is put into a copy of the package's Python source, and the check must
see it; the fused operators are out of the way then. The fifth known fault, the mean of per-micro-batch means, lives in
the trainer.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from loss_problem import LAYOUTS, TAILS, Problem, relative_error, use_implementation

from megatron_npd import kernels

FAULTY = "faulty_kernels"


def check_teacher_mass(operators: ModuleType) -> None:
    """`none` sums p·log q over a p that sums to P, so its gradient is P·q - p and sums to 0 over the vocabulary."""
    problem = Problem()
    gradient = problem.ours(1.0, "none", operators=operators)[1]
    assert gradient.sum(-1).abs().max() < 1e-6, "P is missing: the gradient does not sum to 0"
    expected = problem.reference(1.0, "none")[1]
    assert relative_error(gradient, expected) < 1e-5, "P is missing: the gradient is not that of the loss"


def check_values_of_foreign_ids(operators: ModuleType) -> None:
    """A rank adds nothing to Σ p·z and to the target's z for ids that it does not hold."""
    problem = Problem()
    for tail in TAILS:
        for tp, padding in LAYOUTS[1:]:
            ours, expected = problem.ours(0.5, tail, tp, padding, operators)[0], problem.reference(0.5, tail)[0]
            assert relative_error(ours, expected) < 1e-5, "foreign ids enter the loss"


def check_gradients_of_foreign_ids(operators: ModuleType) -> None:
    """A rank writes no gradient for ids that it does not hold: column 0 keeps its own."""
    problem = Problem()
    for tail in TAILS:
        for tp, padding in LAYOUTS[1:]:
            ours, expected = problem.ours(0.5, tail, tp, padding, operators)[1], problem.reference(0.5, tail)[1]
            assert relative_error(ours, expected) < 1e-5, "foreign ids enter the gradient"


def check_negative_values(operators: ModuleType) -> None:
    """The truncated sum is no KL: where it is negative it stays negative."""
    problem = Problem()
    problem.give_student_more_mass()
    expected = problem.reference(1.0, "none")[0]
    assert expected.max() < 0
    assert relative_error(problem.ours(1.0, "none", operators=operators)[0], expected) < 1e-5, "clamped value"


def check_gradients_of_negative_values(operators: ModuleType) -> None:
    """A negative truncated sum still has its gradient."""
    problem = Problem()
    problem.give_student_more_mass()
    loss, expected = problem.reference(1.0, "none")
    assert loss.max() < 0
    gradient = problem.ours(1.0, "none", operators=operators)[1]
    assert relative_error(gradient, expected) < 1e-5, "clamped gradient"


def check_padded_vocabulary(operators: ModuleType) -> None:
    """Columns past the vocabulary are in no softmax, however large."""
    problem = Problem()
    for tail in TAILS:
        for tp, padding in LAYOUTS:
            loss, _, padding_gradient = problem.ours_with_padding(0.5, tail, tp, padding, operators)
            assert relative_error(loss, problem.reference(0.5, tail)[0]) < 1e-5, "padding enters the softmax"
            assert not padding_gradient.any(), "padding has a gradient"


@dataclass(frozen=True)
class Fault:
    """A right expression of the package, what it is in a faulty implementation, the check, and how the check fails."""

    name: str
    right: str
    wrong: str
    check: Callable[[ModuleType], None]
    complaint: str


FAULTS = [
    Fault(
        "backward of q - p, without P",
        "mass_T = labels.p_TK.sum(-1)  # P",
        "mass_T = one_T  # P",
        check_teacher_mass,
        "P is missing: the gradient does not sum to 0",
    ),
    Fault(
        "ids of other shards read local column 0",
        "return torch.where(mine_CK, logits_CV.gather(1, column_CK).float(), 0.0)",
        "return logits_CV.gather(1, column_CK).float()",
        check_values_of_foreign_ids,
        "foreign ids enter the loss",
    ),
    Fault(
        "ids of other shards write local column 0",
        "into_CV.scatter_(1, columns_CK, torch.where(mine_CK, values_CK, spare_C1))",
        "into_CV.scatter_(1, column_CK, values_CK)",
        check_gradients_of_foreign_ids,
        "foreign ids enter the gradient",
    ),
    Fault(
        "clamp_min(0) on the value of the truncated sum",
        "kd_T = objective.temperature**2 * kd_T",
        "kd_T = objective.temperature**2 * kd_T.clamp_min(0)",
        check_negative_values,
        "clamped value",
    ),
    Fault(
        "clamp_min(0) on the truncated sum, through which autograd goes",
        "return TokenLosses(*_CeTopkKl.apply(logits_TV, labels, objective, parallel, valid))",
        "return TokenLosses(*(x.clamp_min(0) for x in _CeTopkKl.apply(logits_TV, labels, objective, parallel, valid)))",
        check_gradients_of_negative_values,
        "clamped gradient",
    ),
    Fault(
        "padded vocabulary columns enter the softmax",
        "return cls(parallel.tp_rank * columns, valid)",
        "return cls(parallel.tp_rank * columns, columns)",
        check_padded_vocabulary,
        "padding enters the softmax",
    ),
]


@pytest.mark.parametrize("implementation", ["fused", "reference"])
@pytest.mark.parametrize("check", [fault.check for fault in FAULTS])
def test_our_operator_passes(check: Callable[[ModuleType], None], implementation: str) -> None:
    with contextmanager(use_implementation)(implementation):
        check(kernels)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_caught(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = kernels_with(fault, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=fault.complaint):
        fault.check(faulty)


def test_the_copy_alone_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the faulty copies fail is due to the fault, not to the copying."""
    right = FAULTS[0].right
    copy = kernels_with(Fault("none", right, right, check_teacher_mass, ""), tmp_path, monkeypatch)
    assert copy.__name__ == FAULTY and copy.ce_topk_kl is not kernels.ce_topk_kl
    for fault in FAULTS:
        fault.check(copy)


def kernels_with(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`megatron_npd.kernels` as a package of its own, with the one right expression replaced by the wrong one."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = {name: importlib.import_module(f"{kernels.__name__}.{name}") for name in names}
    sources = {name: inspect.getsource(module) for name, module in {**modules, "__init__": kernels}.items()}
    occurrences = sum(source.count(fault.right) for source in sources.values())
    assert occurrences == 1, f"{fault.right!r} occurs {occurrences} times in kernels/: the fault can't be put there"
    (folder / FAULTY).mkdir()
    for name, source in sources.items():
        source = source.replace(fault.right, fault.wrong).replace(kernels.__name__, FAULTY)
        (folder / FAULTY / f"{name}.py").write_text(source)
    for name in [name for name in sys.modules if name.split(".")[0] == FAULTY]:
        del sys.modules[name]
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("NPD_REQUIRE_KERNELS", raising=False)
    monkeypatch.setenv("NPD_DISABLE_KERNELS", "1")  # the copy loads kernels by itself
    return importlib.import_module(FAULTY)
