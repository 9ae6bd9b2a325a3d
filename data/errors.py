"""Errors that a user can cause and mend: the command line prints them in a line. Any other error is a defect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class UserError(Exception):
    """A fault: names the file, row or key, the value, and what to do."""


class UserErrors(UserError):
    """All faults of one look, in their order in `faults`, so that they can be mended at once."""

    def __init__(self, title: str, faults: Sequence[str]) -> None:
        self.title = title
        self.faults = list(faults)
        super().__init__("\n".join([title, *(f"  - {fault}" for fault in self.faults)]))


class Outage(UserError):
    """The other side did not answer, or another run holds what is needed: the same command may succeed later.

    Callers that try again decide by this type; between processes, by the exit status `TRY_AGAIN`.
    """


class Terminated(UserError):
    """SIGTERM ended the run, and its state is saved. Exit status 143, so that DVC sees no success."""


TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class RowFault(Exception):
    """Why a row of a manifest is left out: `reason` is one of a few fixed texts, `detail` names the value."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling, and so on to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
