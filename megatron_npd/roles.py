"""The roles of a run: each name once. It is also the name of a role's metrics, logs and signs of life."""

from __future__ import annotations

TRAINER, ANNOTATOR, ROLLOUT = ROLES = ("trainer", "annotator", "rollout")
"""As `npd` and Slurm call them. A sidecar of ROLLOUT samples for the student, for the teacher or for both."""
ROLLOUT_TEACHER = "rollout_teacher"
"""What a sidecar that samples for the teacher calls itself; one of the student is a ROLLOUT."""
SUPERVISOR = "supervisor"

TEACHER, STUDENT = POLICIES = ("teacher", "student")
SIDECAR = {TEACHER: ROLLOUT_TEACHER, STUDENT: ROLLOUT}
"""Policy -> name of the role that samples for it."""
