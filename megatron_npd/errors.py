"""The errors that end a command with one line instead of a traceback, and its exit status."""

from __future__ import annotations

import errno
import re

USAGE_STATUS = 2
"""Exit status of every command that refuses its input (see `UserError`)."""

STORAGE_STATUS = 74
"""Exit status of every command that the filesystem let down (EX_IOERR of sysexits.h): the same may work later."""

NODE_LOST_STATUS = 75
"""Exit status of `npd supervise` where a role has lost its last node: on other nodes the run goes on (EX_TEMPFAIL)."""

STORAGE_ERRNOS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE}
)
"""No room, no permission, or a filesystem in trouble: not a fault of this program, and none of its input."""


class UserError(ValueError):
    """Bad input. Its text is one line naming the key or file, the value and the rule.

    `megatron_npd.cli.main` prints it to stderr without a traceback and exits with `USAGE_STATUS`.
    """


class StorageError(UserError):
    """Something could not be written, for a reason outside of this program. Its text is one line naming the file and
    the reason. Ends a command with `STORAGE_STATUS`: unlike other refusals it is worth trying again."""


class BadVersionError(ValueError):
    """A published policy version that must not be used. Its text is one line naming the file or tensor and what is
    wrong with it. Ends a command with status 1: what was read wrongly may be read well the next time."""


class GraderError(RuntimeError):
    """Answers could not be graded. Its text is one line naming the grader and what is wrong. Ends a command with status
    1: a grader that fails once may do well the next time.
    """


_ERRNO_IN_TEXT = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
"""How Python and Rust libraries pass on an operating-system error whose exception they replaced."""


def storage_reason(error: Exception) -> str | None:
    """If the filesystem is to blame for an error: which file and why, in one line. None for any other error."""
    if isinstance(error, StorageError):
        return str(error)
    if isinstance(error, OSError):
        known = error.errno in STORAGE_ERRNOS
        return f"{error.filename or 'a file of this run'}: {error.strerror}" if known else None
    found = _ERRNO_IN_TEXT.search(str(error))
    number = int(found.group(1) or found.group(2)) if found else None
    return str(error) if number in STORAGE_ERRNOS else None
