"""What every command of this package does around its work: signals, messages, exit codes."""

import logging
import os
import sys
from importlib import import_module
from typing import NoReturn

from vqae.errors import DivergedError, LostProcessError, UsageError
from vqae.interrupt import Interrupted, SignalHandler
from vqae.launch import speaks_for_its_machine


def run_command(module_name: str) -> NoReturn:
    """Call the main(arguments, signals) of a module and exit: 0; 2 for bad input; 1 for a loss that is not finite; 130
    after SIGINT, 143 after SIGTERM; of several processes, 1 for those that lost another.

    The module is named, not given, so that it is loaded, and torch with it, after the signal handlers stand. Of the
    processes of one machine, which fail alike, one says why.
    """
    signals = SignalHandler()
    signals.install()
    main = import_module(module_name).main
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vqae").setLevel(logging.INFO if speaks_for_its_machine() else logging.ERROR)
    try:
        with signals.raising():
            main(sys.argv[1:], signals)
            sys.stdout.flush()
    except UsageError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except DivergedError as error:
        _say(f"error: {error}; the last checkpoint is kept, if there is one\na lower --lr may help")
        sys.exit(1)
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # each on its own: any of them may be the only one left
        os._exit(1)  # at once: what the lost one still owes would be waited for
    except Interrupted as interrupted:
        _say(f"stopped by {interrupted}")
        sys.exit(interrupted.exit_code)
    sys.exit(0)


def _say(text: str) -> None:
    if speaks_for_its_machine():
        print(text, file=sys.stderr)
