"""One settings model shared by all commands."""

from mmm4rec_cli.settings.load import load
from mmm4rec_cli.settings.schema import Settings

__all__ = ["Settings", "load"]
