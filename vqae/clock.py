"""When the process began, as near as Python can tell: imported before anything slow."""

import time

PROCESS_START = time.monotonic()


def elapsed_s() -> float:
    """Seconds since the process began."""
    return time.monotonic() - PROCESS_START
