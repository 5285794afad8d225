"""A run's own log: everything that was said while it trained."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmm4rec_cli.reporter import Progress, Reporter


class _LoggedProgress:
    def __init__(self, inner: Progress) -> None:
        self.inner = inner
        self.status = ""

    def advance(self, n: int = 1, status: str = "") -> None:
        self.status = status or self.status
        self.inner.advance(n, status)


class LoggedReporter:
    """Passes everything on and writes it to a file, one line a note or finished stage, with the time (UTC)."""

    def __init__(self, inner: Reporter, path: Path) -> None:
        self.inner = inner
        self.path = path

    def note(self, text: str) -> None:
        """Say and log one line."""
        self._log(text)
        self.inner.note(text)

    def warn(self, text: str) -> None:
        """Warn and log one line."""
        self._log(f"warning: {text}")
        self.inner.warn(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        """Show the stage and log its end."""
        with self.inner.stage(name, total, unit) as progress:
            logged = _LoggedProgress(progress)
            yield logged
        self._log(f"{name}: {logged.status}" if logged.status else name)

    def _log(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")
