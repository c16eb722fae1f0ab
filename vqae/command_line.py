"""What every command of this package does around its work: signals, messages, exit codes."""

import logging
import sys
from importlib import import_module
from typing import NoReturn

from vqae.errors import DivergedError, UsageError
from vqae.interrupt import Interrupted, SignalHandler


def run_command(module_name: str) -> NoReturn:
    """Call the main(arguments, signals) of a module and exit: 0; 2 for bad input; 1 for a loss that is not finite; 130
    after SIGINT, 143 after SIGTERM.

    The module is named, not given, so that it is loaded, and torch with it, after the signal handlers stand.
    """
    signals = SignalHandler()
    signals.install()
    main = import_module(module_name).main
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vqae").setLevel(logging.INFO)
    try:
        with signals.raising():
            main(sys.argv[1:], signals)
            sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except DivergedError as error:
        print(f"error: {error}; the last good checkpoint is kept, if there is one", file=sys.stderr)
        print("a lower --lr may help", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    sys.exit(0)
