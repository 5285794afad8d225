"""How library code tells a person what it is doing, without knowing how that is shown."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """A running stage."""

    def advance(self, n: int = 1, status: str = "") -> None:
        """Count `n` more units as done; `status` is a short text beside the bar (a loss, a rate)."""


class Reporter(Protocol):
    """Where progress, notes and warnings go."""

    def note(self, text: str) -> None:
        """Say one line that is good to know."""

    def warn(self, text: str) -> None:
        """Say one line that may change what the user does."""

    def stage(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Progress]:
        """Open a stage of `total` units (None: unknown); leaving the context ends it."""


class _SilentProgress:
    def advance(self, n: int = 1, status: str = "") -> None:
        pass


class SilentReporter:
    """Says nothing: the default of library calls."""

    def note(self, text: str) -> None:
        """Drop the line."""

    def warn(self, text: str) -> None:
        """Drop the line."""

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        """Run the stage without showing it."""
        yield _SilentProgress()
