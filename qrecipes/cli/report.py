"""How a command ends: errors meant for the user become one message and an exit code, others keep their
traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from qrecipes.errors import ConfigError, QRecipesError

Main = Callable[[list[str]], int | None]


def exit_code(main: Main, argv: Sequence[str]) -> int:
    """What `main` returns, 0 for None; 2 after a ConfigError and 1 after another QRecipesError, printed to
    stderr.

    With QRECIPES_TRACEBACK=1 in the environment the traceback comes too. Other exceptions pass, SystemExit
    and KeyboardInterrupt among them.
    """
    try:
        return main(list(argv)) or 0
    except BrokenPipeError:  # who reads our output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 141  # what a shell gives for SIGPIPE
    except QRecipesError as error:
        if os.environ.get("QRECIPES_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def run_main(main: Main) -> NoReturn:
    """Run a script's `main` on the command line's arguments, and exit as `exit_code` says."""
    sys.exit(exit_code(main, sys.argv[1:]))
