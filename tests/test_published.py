"""The published rows that travel with the package."""

import pytest

from mmm4rec_cli.published import published_domains, published_result


def test_all_ten_published_runs_are_there():
    assert sorted(published_domains()) == ["arts", "instruments", "office", "pantry", "scientific"]
    for domain in published_domains():
        for item_bias in (True, False):
            result = published_result(domain, item_bias=item_bias)
            assert set(result.test) == {f"{m}@{k}" for m in ("Hit", "NDCG") for k in (10, 20, 50)}
            assert 0 < result.test["NDCG@10"] < result.test["Hit@10"] < 1
            assert result.best_epoch <= result.epochs


def test_figures_are_those_of_the_paper_to_its_four_places():
    row = published_result("scientific", item_bias=True)
    assert (row.n_users, row.n_items, row.valid_metric) == (8442, 4385, "Hit@10")
    assert row.test["Hit@10"] == pytest.approx(0.1348, abs=5e-5)
    assert row.test["NDCG@10"] == pytest.approx(0.0724, abs=5e-5)
    assert published_result("office", item_bias=False).test["Hit@50"] == pytest.approx(0.1999, abs=5e-5)
    assert published_result("magazine", item_bias=True) is None
