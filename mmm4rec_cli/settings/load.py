"""Sources of the settings and their order."""
from mmm4rec_cli.settings.schema import Settings


def load(file=None, overrides=()):
    return Settings()
