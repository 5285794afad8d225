"""Presets: settings that go together. Each is a nested dict of the settings' own keys."""

from typing import Any

Nested = dict[str, Any]

PROTOCOLS: dict[str, Nested] = {
    "corrected": {},
    "published": {
        "model": {"padding_candidate": True, "mask_duplicate_labels": False},
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


def merged(under: Nested, over: Nested) -> Nested:
    """A new nested dict: `over` laid on `under`, section by section."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result
