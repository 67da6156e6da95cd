"""What every entry point shares: a user's mistake becomes one line on stderr and exit status 2."""

import sys
from collections.abc import Callable

from configs.errors import UserError


def run_main(main: Callable[[], int | None]) -> None:
    """Runs `main` and exits with its status; a `UserError` prints its message alone."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # the reader of our output went away (| head)
        status = 1
    sys.exit(status or 0)
