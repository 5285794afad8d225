"""Metrics of full ranking with one target a user, from rank0 (0 is best, fractional under ties)."""

from collections.abc import Iterable

import torch
from torch import Tensor


def hit(rank0_U: Tensor, k: int) -> Tensor:
    """Hit@k a user: 1 where rank0 < k, else 0; float64 [U]."""
    return (rank0_U < k).double()


def ndcg(rank0_U: Tensor, k: int) -> Tensor:
    """NDCG@k a user: 1 / log2(rank0 + 2) where rank0 < k, else 0; float64 [U]. One target, so the ideal is 1."""
    rank0_U = rank0_U.double()
    return torch.where(rank0_U < k, 1 / torch.log2(rank0_U + 2), 0.0)


def reciprocal_rank(rank0_U: Tensor) -> Tensor:
    """1 / (rank0 + 1) a user over the whole catalogue, float64 [U]; its mean is MRR."""
    return 1 / (rank0_U.double() + 1)


def per_user(rank0_U: Tensor, name: str) -> Tensor:
    """The metric `name` (`Hit@10`, `NDCG@10`, `MRR`) a user, float64 [U]."""
    if name == "MRR":
        return reciprocal_rank(rank0_U)
    kind, k = name.split("@")
    return {"Hit": hit, "NDCG": ndcg}[kind](rank0_U, int(k))


def metric_names(cutoffs: Iterable[int]) -> list[str]:
    """Hit@k and NDCG@k for every cut-off, then MRR."""
    ks = sorted(set(cutoffs))
    return [*(f"Hit@{k}" for k in ks), *(f"NDCG@{k}" for k in ks), "MRR"]


def summary(rank0_U: Tensor, cutoffs: Iterable[int]) -> dict[str, float]:
    """Means over users of every metric; all users weigh the same."""
    return {name: float(per_user(rank0_U, name).mean()) for name in metric_names(cutoffs)}
