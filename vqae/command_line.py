"""What every command of this package does around its work: signals, messages, exit codes."""

import sys
from collections.abc import Callable
from typing import NoReturn

from vqae.errors import UsageError
from vqae.interrupt import Interrupted, SignalHandler
from vqae.loss_watch import DivergedError


def run_command(main: Callable[[list[str], SignalHandler], None]) -> NoReturn:
    """Call main(arguments, signals) and exit: 0; 2 for bad input; 1 for a loss that is not finite; 130 after SIGINT,
    143 after SIGTERM."""
    signals = SignalHandler()
    signals.install()
    try:
        main(sys.argv[1:], signals)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except DivergedError as error:
        print(f"error: {error}; the last good checkpoint is kept; a lower --lr may help", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    sys.exit(0)
