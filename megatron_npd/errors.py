"""The errors a user can cause, and the exit status they end a command with."""

USAGE_STATUS = 2
"""Exit status of every command that refuses its input (see `UserError`)."""


class UserError(ValueError):
    """Bad input. Its text is one line naming the key or file, the value and the rule.

    `megatron_npd.cli.main` prints it to stderr without a traceback and exits with `USAGE_STATUS`.
    """
