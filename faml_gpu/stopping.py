"""A run that is asked to stop, by a signal, goes on to where what it has done can be kept."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Stopping"]


class Stopping:
    """A request to stop. Made once, it waits while there is something to be kept; made again, it does not.

    Attributes
    ----------
    kept : what was kept of the work under way when the run stopped, in words; "" if nothing was
    """

    def __init__(self) -> None:
        self.kept = ""
        self._asked: BaseException | None = None
        self._keep: Callable[[], str] | None = None

    def ask(self, error: BaseException) -> None:
        """Stop by raising `error`: here, or where this returns, at the next `check` or `release`."""
        waits = self._keep is not None and self._asked is None
        self._asked = error
        if not waits:
            raise error

    def hold(self, keep: Callable[[], str]) -> None:
        """From here on requests wait; `keep` writes down what is being done, and says what that is."""
        self._keep = keep

    def check(self) -> None:
        """Stop here if asked to: `keep` can be called."""
        if self._asked is not None and self._keep is not None:
            self.kept = self._keep()
            raise self._asked

    def release(self) -> None:
        """Stop here if asked to; there is nothing more to be kept."""
        self._keep = None
        if self._asked is not None:
            raise self._asked
