"""The models behind `--model`."""

from collections.abc import Callable
from functools import partial

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.errors import RunError, UsageError
from mmm4rec_cli.models.baselines.athwe import ATHWE
from mmm4rec_cli.models.baselines.bsarec import BSARec
from mmm4rec_cli.models.baselines.gru4rec import GRU4Rec
from mmm4rec_cli.models.baselines.hm4sr import HM4SR
from mmm4rec_cli.models.baselines.m3rec import M3Rec
from mmm4rec_cli.models.baselines.mamba4rec import Mamba4Rec
from mmm4rec_cli.models.baselines.sasrec import SASRec
from mmm4rec_cli.models.baselines.tim4rec import TiM4Rec
from mmm4rec_cli.models.baselines.unisrec import UniSRec
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


MODELS: dict[str, Builder] = {
    "mmm4rec": _mmm4rec,
    "gru4rec": GRU4Rec,
    "sasrec": SASRec,
    "sasrec-t": partial(SASRec, from_text=True),
    "bsarec": BSARec,
    "mamba4rec": Mamba4Rec,
    "mamba4rec-t": partial(Mamba4Rec, from_text=True),
    "tim4rec": TiM4Rec,
    "tim4rec-t": partial(TiM4Rec, from_text=True),
    "m3rec": M3Rec,
    "hm4sr": HM4SR,
    "athwe": ATHWE,
    "unisrec": UniSRec,
}


def check_model(name: str) -> None:
    """Raise UsageError unless `name` is a known model."""
    if name not in MODELS:
        raise UsageError(f"model {name!r} is not known", hint=f"known models: {', '.join(sorted(MODELS))}")


def build_model(name: str, config: ModelSettings, features: ModelFeatures) -> SequenceModel:
    """A freshly initialised model.

    Raises:
        UsageError: no such model, or settings that it cannot run with.
        RunError: the features and the settings do not fit.
    """
    check_model(name)
    try:
        return MODELS[name](config, features)
    except ValueError as error:
        raise RunError(str(error), hint="check the features and the settings of the model section") from error
