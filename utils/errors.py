"""The one exception that a user's mistake raises, and what tells that memory ran out. Standard library only."""

import re


class UserError(Exception):
    """A foreseeable mistake, said in one message: what is wrong, where, what was expected, what to do.

    Entry points print the message alone and exit with status 2; every other exception is a bug of ours.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the machine; torch and the system say so only in words."""
    signs = "out of memory|(not enough|n't allocate|not allocate) memory|(start new thread|create a primitive)$"
    in_words = isinstance(error, RuntimeError | OSError) and re.search(signs, str(error), re.IGNORECASE) is not None
    return in_words or isinstance(error, MemoryError)
