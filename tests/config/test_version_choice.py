"""Which versions a choice means."""

from __future__ import annotations

import pytest

from megatron_npd.config.versions import VersionChoice, chosen_versions, refuse_unknown_versions


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("each", {0, 1, 2, 3, 4}), ("ends", {0, 1, 4}), ("last", {4}), ([], {4}), ([2], {2, 4}), ([4, 0], {0, 4})],
)
def test_chosen(choice: VersionChoice, expected: set[int]) -> None:
    assert chosen_versions(choice, first_of_rounds=1, last=4) == expected


def test_without_a_warmup_the_rounds_start_where_the_student_does() -> None:
    assert chosen_versions("ends", first_of_rounds=0, last=4) == {0, 4}


@pytest.mark.parametrize("choice", [[5], [-1], [2, 2]])
def test_refused(choice: VersionChoice) -> None:
    with pytest.raises(ValueError, match=r"^heldout\.versions = \["):
        refuse_unknown_versions("heldout.versions", choice, last=4)
