"""Metrics against cases worked by hand."""

import math

import pytest
import torch

from mmm4rec_cli.evaluation.metrics import metric_names, per_user, summary


def test_metrics_of_hand_worked_ranks():
    rank0 = torch.tensor([0.0, 1.0, 9.0, 10.0], dtype=torch.float64)
    got = summary(rank0, (10, 2))
    assert got["Hit@2"] == 0.5
    assert got["Hit@10"] == 0.75
    assert got["NDCG@2"] == pytest.approx((1 + 1 / math.log2(3)) / 4, abs=1e-15)
    assert got["NDCG@10"] == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 4, abs=1e-15)
    assert got["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4, abs=1e-15)
    assert list(got) == metric_names((2, 10)) == ["Hit@2", "Hit@10", "NDCG@2", "NDCG@10", "MRR"]


def test_a_tie_counts_with_its_fractional_rank():
    half = torch.tensor([9.5])
    assert per_user(half, "Hit@10").item() == 1
    assert per_user(half, "NDCG@10").item() == pytest.approx(1 / math.log2(11.5))
    assert per_user(half, "Hit@9").item() == 0
