"""Errors a user can act on."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Input that cannot be processed: names the file, row or option, what was found and what was expected.

    The command line prints the message without a traceback and leaves with exit status 2.
    """
