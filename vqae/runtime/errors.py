"""The exceptions that the commands of this package turn into a message and an exit code."""


class UsageError(Exception):
    """What the user asked for cannot be done.

    The message names the argument or file, the rule and the value, and says what to do. The command line prints it
    without a traceback and exits with 2.
    """


class DivergedError(Exception):
    """A loss, or what the model makes of images, was NaN or Inf; the message says at which step.

    The command line exits with 1.
    """


class LostProcessError(Exception):
    """One of the processes that train together is gone, and this one cannot go on alone.

    The command line exits with 1.
    """
