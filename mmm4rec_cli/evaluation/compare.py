"""Is one run better than another? A paired bootstrap over users."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from mmm4rec_cli.evaluation.metrics import metric_names, per_user

RESAMPLES = 2000


def paired_bootstrap(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], cutoffs: Sequence[int], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Difference of the means (ours minus theirs) of every metric with its 95 % percentile interval.

    Args:
        ours: rank0 [U] of each seed, the same users in the same order; per-user values are averaged over seeds.
        theirs: the same of the other run.
        cutoffs: cut-offs of the metrics.
        seed: of the resampling.
    """
    found = {}
    for name in metric_names(cutoffs):
        mean_ours, mean_theirs = (torch.stack([per_user(r, name) for r in ranks]).mean(0) for ranks in (ours, theirs))
        difference = (mean_ours - mean_theirs).numpy()
        low = high = float(difference.mean())
        if np.ptp(difference):  # a constant difference has no spread to resample
            interval = bootstrap(
                (difference,),
                np.mean,
                n_resamples=RESAMPLES,
                batch=max(1, 10_000_000 // len(difference)),
                method="percentile",
                rng=np.random.default_rng(seed),
            ).confidence_interval
            low, high = float(interval.low), float(interval.high)
        found[name] = {"difference": float(difference.mean()), "low": low, "high": high}
    return found
