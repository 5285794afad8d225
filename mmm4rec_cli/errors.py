"""The errors that a user can cause or meet, each with the exit code of the command line.

Library code raises these; `mmm4rec_cli.app` is the one place that turns them into exit codes.
Anything else that escapes is a bug of this project (exit code 1, with its traceback).
"""

from typing import ClassVar


class UserError(Exception):
    """Something that the user can mend.

    Args:
        *problems: one line each, what is wrong, with the file, line or setting at fault.
        hint: one line, what to do next.
    """

    code: ClassVar[int]

    def __init__(self, *problems: str, hint: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.hint = hint


class UsageError(UserError):
    """A wrong option, domain or setting."""

    code = 2


class DataError(UserError):
    """Data that are missing, malformed or do not fit one another."""

    code = 3


class RunError(UserError):
    """A run or checkpoint that is missing, damaged or does not fit."""

    code = 4


class DeviceError(UserError):
    """A backend or device that cannot do what was asked, out of memory included."""

    code = 5


class NetworkError(UserError):
    """A download that failed for good."""

    code = 6
