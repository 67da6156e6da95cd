"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A foreseeable mistake, said in one message: what is wrong, where, what was expected, what to do.

    Entry points print the message alone and exit with status 2; every other exception is a bug of ours.
    """
