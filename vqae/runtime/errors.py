"""Exceptions that the commands turn into an error message and an exit code, without a traceback."""


class UsageError(Exception):
    """A command cannot be carried out as requested.

    The message names the argument or file, the rule and the value, and says what to do.
    """

    exit_code = 2


class DivergedError(Exception):
    """A loss or a reconstruction was NaN or Inf. The message names the step."""

    exit_code = 1


class LostProcessError(Exception):
    """Another process of the group died, and this one cannot continue."""

    exit_code = 1
