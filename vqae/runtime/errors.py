"""Exceptions that the commands turn into an error message and an exit code, without a traceback."""


class UsageError(Exception):
    """The user's request cannot be fulfilled. Exit code 2.

    The message names the argument or file, the rule and the value, and says what to do.
    """


class DivergedError(Exception):
    """A loss or a reconstruction was NaN or Inf. The message names the step. Exit code 1."""


class LostProcessError(Exception):
    """Another process of the group died, and this one cannot continue. Exit code 1."""
