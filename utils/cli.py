"""What every entry point shares: a user's mistake becomes one line on stderr and exit status 2; bars of progress."""

import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from utils.errors import UserError


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


def progress(items: Iterable | None = None, **options) -> tqdm:
    """tqdm on stderr; where that is no terminal, a line every half minute instead of ten a second."""
    return tqdm(items, mininterval=0.2 if sys.stderr.isatty() else 30, **options)
