"""Signals that ask a training to stop, kept until it stands where it can be gone on with."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """Whether somebody asked for the end."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def obey(self) -> None:
        """Stop now, as the signal would have.

        Raises:
            KeyboardInterrupt: SIGINT was kept.
            SystemExit: SIGTERM was kept.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextmanager
def kept_signals() -> Iterator[Interruption]:
    """Keep the first SIGINT or SIGTERM for the block to ask for; a second one acts at once.

    Outside the main thread, where signals cannot be handled, nothing is ever kept.
    """
    interruption = Interruption()
    before: dict[int, Any] = {}

    def keep(number: int, frame: FrameType | None) -> None:
        interruption.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, keep)
    except ValueError:  # not in the main thread
        pass
    try:
        yield interruption
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
