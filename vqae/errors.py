"""The one exception that the commands of this package turn into a message and exit code 2."""


class UsageError(Exception):
    """What the user asked for cannot be done.

    The message names the argument or file, the rule and the value, and says what to do. The command line prints it
    without a traceback and exits with 2.
    """
