"""Presets: settings that go together. Each is a nested dict of the settings' own keys."""

from typing import Any

Nested = dict[str, Any]

PROTOCOLS: dict[str, Nested] = {
    "corrected": {},
    "published": {
        "model": {
            "padding_candidate": True,
            "mask_duplicate_labels": False,
            "baseline": {
                "overwrite_features": True,
                "mamba_start": "redrawn",
                "filter_padding": True,
                "mask_nothing": True,
                "empty_categories": True,
            },
        },
        "pretrain": {"mean_over_group": False, "stop_on_nonfinite": False, "seeded": False},
        "finetune": {"mean_over_group": False, "stop_on_nonfinite": False, "shuffle_validation": True},
    },
}
"""`corrected` is the fields' own defaults; `published` is the paper's code as it runs."""

DOMAINS: dict[str, Nested] = {
    "scientific": {"finetune": {"metric": "Hit@10"}},
    "pantry": {"finetune": {"metric": "Hit@10"}},
    "instruments": {"finetune": {"metric": "NDCG@10"}},
    "arts": {"finetune": {"metric": "NDCG@10"}},
    "office": {"finetune": {"metric": "NDCG@10"}},
    "fhckm": {
        "model": {"num_layers": 2, "item_bias": True},
        "pretrain": {"lr": 2.5e-4, "epochs": 100, "save_every": 5},
    },
}
"""What the published configurations of a domain set otherwise than our defaults, or rest on."""


def _baseline(
    model: Nested,
    *,
    dropout: float,
    max_len: int,
    batch_size: int,
    baseline: Nested | None = None,
    finetune: Nested | None = None,
) -> Nested:
    """A baseline's preset: what they share, and what is said. Heads and groups of an SSD divide any width."""
    dropouts = dict.fromkeys(("dropout", "embedding_dropout", "time_dropout"), dropout)
    ours: Nested = {"num_layers": 2, "head_dim": 1, "n_groups": 1, **dropouts, "max_len": max_len, **model}
    plan = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "batch_size": batch_size, "accumulation": 1}
    return {
        "model": ours | {"baseline": {"attention_dropout": dropout, **(baseline or {})}},
        "finetune": {**plan, "shuffle": False, **(finetune or {})},
        "pretrain": plan,
    }


_NARROW = {"hidden_size": 64, "inner_size": 256}
_WIDE = {"hidden_size": 256, "inner_size": 1024}
_MAMBA = _baseline({**_NARROW, "d_state": 32}, dropout=0.4, max_len=20, batch_size=2048)
_TIM = {**_NARROW, "d_state": 32, "head_dim": 32, "point_time_gate": True, "time": "observed"}

MODELS: dict[str, Nested] = {
    "gru4rec": _baseline({"hidden_size": 64, "inner_size": 128}, dropout=0.4, max_len=50, batch_size=2048),
    "sasrec": _baseline(_NARROW, dropout=0.5, max_len=5, batch_size=512, finetune={"shuffle": True}),
    "sasrec-t": _baseline(
        _WIDE,
        dropout=0.4,
        max_len=50,
        batch_size=512,
        baseline={"heads": 4},
        finetune={"accumulation": 8, "lr": 2.5e-4, "weight_decay": 1e-3},
    ),
    "bsarec": _baseline(
        _NARROW,
        dropout=0.4,
        max_len=50,
        batch_size=2048,
        baseline={"heads": 4, "attention_dropout": 0.5},
        finetune={"weight_decay": 1e-4, "metric": "Hit@10"},
    ),
    "mamba4rec": _MAMBA,
    "mamba4rec-t": _MAMBA,
    "tim4rec": _baseline({**_TIM, "n_groups": 4}, dropout=0.4, max_len=20, batch_size=2048),
    "tim4rec-t": _baseline(_TIM, dropout=0.4, max_len=20, batch_size=2048),
    "m3rec": _baseline(
        {**_WIDE, "d_state": 32},
        dropout=0.5,
        max_len=50,
        batch_size=512,
        finetune={"accumulation": 4, "patience": 5},
    ),
    "hm4sr": _baseline(_WIDE, dropout=0.4, max_len=50, batch_size=1024),
    "athwe": _baseline(
        _WIDE,
        dropout=0.4,
        max_len=50,
        batch_size=1024,
        baseline={"experts": 8, "mask_share": 0.2, "id_temperature": 0.1},
    ),
    "unisrec": _baseline(
        {"hidden_size": 300, "inner_size": 256, "temperature": 0.07},
        dropout=0.5,
        max_len=50,
        batch_size=2048,
        baseline={"experts": 8},
        finetune={"shuffle": True},
    ),
}
"""What the published configurations of the baselines set otherwise than our defaults; a domain's preset lies above.

SASRec's window of 5 is what its shipped file says. Seeds and number formats belong to the invocation and stay ours.
"""


def merged(under: Nested, over: Nested) -> Nested:
    """A new nested dict: `over` laid on `under`, section by section."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
