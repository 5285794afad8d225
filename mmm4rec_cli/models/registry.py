"""The models behind `--model`."""

from collections.abc import Callable

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.errors import RunError, UsageError
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.settings.schema import ModelSettings

Builder = Callable[[ModelSettings, ModelFeatures], SequenceModel]


def _mmm4rec(config: ModelSettings, features: ModelFeatures) -> SequenceModel:
    return MMM4Rec(
        config,
        features.text,
        features.image,
        text_missing=features.text_missing,
        image_missing=features.image_missing,
    )


MODELS: dict[str, Builder] = {"mmm4rec": _mmm4rec}


def check_model(name: str) -> None:
    """Raise UsageError unless `name` is a known model."""
    if name not in MODELS:
        raise UsageError(f"model {name!r} is not known", hint=f"known models: {', '.join(sorted(MODELS))}")


def build_model(name: str, config: ModelSettings, features: ModelFeatures) -> SequenceModel:
    """A freshly initialised model.

    Raises:
        UsageError: no such model.
        RunError: the features and the settings do not fit.
    """
    check_model(name)
    try:
        return MODELS[name](config, features)
    except ValueError as error:
        raise RunError(str(error), hint="check the features and the settings of the model section") from error
