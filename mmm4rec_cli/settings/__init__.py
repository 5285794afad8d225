"""One settings model shared by all commands."""

from mmm4rec_cli.settings.load import Given, Resolved, for_run, load, resolve
from mmm4rec_cli.settings.schema import Settings

__all__ = ["Given", "Resolved", "Settings", "for_run", "load", "resolve"]
