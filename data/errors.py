"""Errors a user can cause and mend. The command line prints them in one line each; anything else is a defect of
ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class UserError(Exception):
    """One fault: names the file, row or key, the value, and what to do."""


class UserErrors(UserError):
    """Several faults found in one look, so that they can all be mended at once.

    Raises nothing itself; `faults` keeps them in the order found.
    """

    def __init__(self, title: str, faults: Sequence[str]) -> None:
        self.title = title
        self.faults = list(faults)
        super().__init__("\n".join([title, *(f"  - {fault}" for fault in self.faults)]))


class Outage(UserError):
    """The other side did not answer, or another run holds what is needed: the same command may succeed later.

    Whatever tries again decides by this type; between processes, by the exit status `TRY_AGAIN`.
    """


TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling, and so on to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Terminated(UserError):
    """The run was asked to end (SIGTERM) and did so with its state saved. Exit status 143, as of whatever SIGTERM ends:
    DVC sees no success.
    """
