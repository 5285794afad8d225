"""Segments, comparisons, yardsticks and the temporal split of a run's evaluation."""

import numpy as np
import pytest
import torch

from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.evaluation.compare import paired_bootstrap
from mmm4rec_cli.evaluation.evaluate import rank_by_popularity, rank_by_repeating
from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
from mmm4rec_cli.evaluation.metrics import per_user
from mmm4rec_cli.evaluation.ranks import target_ranks
from mmm4rec_cli.evaluation.segments import SEGMENTS, group_names, groups_of
from mmm4rec_cli.runs import newest_run
from mmm4rec_cli.training.finetune import finetune


@pytest.fixture
def dataset(workspace, make_domain):
    make_domain()
    return load_dataset(workspace, ["ring"], "test")


def test_groups_are_named_and_filled_as_counted_by_hand(dataset):
    assert group_names((0, 1, 5, 20)) == ["0", "1-4", "5-19", "20+"]
    sequences, split = dataset.sequences, dataset.sequences.split("leave_one_out")
    histories = [
        sequences.items_N[a:b].tolist() for a, b in zip(sequences.offsets_U1, sequences.offsets_U1[1:], strict=False)
    ]
    seen = [item for items in histories for item in items[:-2]]
    for kind in SEGMENTS:
        names, groups = groups_of(kind, dataset, split, "test")
        for user, items in enumerate(histories):
            count = seen.count(items[-1])
            expected = {
                "length": next(n for low, n in [(10, "10-19"), (5, "5-9"), (1, "1-4")] if len(items) - 1 >= low),
                "popularity": "0"
                if not count
                else next(n for low, n in [(100, "100+"), (20, "20-99"), (5, "5-19"), (1, "1-4")] if count >= low),
                "novelty": "known" if count else "new",
                "modality": "text and image" if dataset.features.has_image[items[-1]] else "text only",
            }[kind]
            assert names[int(groups[user])] == expected


def test_yardsticks_rank_as_their_scores_would(dataset):
    sequences, split = dataset.sequences, dataset.sequences.split("leave_one_out")
    for ties in ("half", "optimistic", "pessimistic"):
        repeated = rank_by_repeating(sequences, split.test, "test", dataset.n_items, ties)
        last = torch.nn.functional.one_hot(sequences.items_N[split.test - 1].long(), dataset.n_items + 1).double()
        table = torch.eye(dataset.n_items + 1, dtype=torch.float64)
        expected = target_ranks(last, table, sequences.items_N[split.test].long(), ties=ties)
        assert torch.equal(repeated.rank0_U, expected)
    popular = rank_by_popularity(sequences, split.known_N, split.test, "test", dataset.n_items)
    counts = np.bincount(sequences.items_N[split.known_N].numpy(), minlength=dataset.n_items + 1)
    for target, rank0 in zip(popular.target_U.tolist(), popular.rank0_U.tolist(), strict=True):
        others = np.delete(counts, [0, target])
        assert rank0 == (others > counts[target]).sum() + (others == counts[target]).sum() / 2


def test_popularity_is_masked_as_the_model_is(dataset):
    sequences, split = dataset.sequences, dataset.sequences.split("leave_one_out")
    masked = rank_by_popularity(sequences, split.known_N, split.test, "test", dataset.n_items, mask_seen=True)
    counts = np.bincount(sequences.items_N[split.known_N].numpy(), minlength=dataset.n_items + 1)
    for user, target, rank0 in zip(
        *(x.tolist() for x in (masked.user_U, masked.target_U, masked.rank0_U)), strict=True
    ):
        begin, end = sequences.offsets_U1[user : user + 2].tolist()
        others = np.delete(counts, [0, target, *sequences.items_N[begin : end - 1].tolist()])
        assert rank0 == (others > counts[target]).sum() + (others == counts[target]).sum() / 2


def test_the_interval_holds_the_true_difference_and_shrinks_with_users():
    random = np.random.default_rng(0)
    widths = []
    for users in (200, 5000):
        ours, theirs = (torch.from_numpy(random.integers(0, top, users).astype(float)) for top in (30, 40))
        found = paired_bootstrap([ours], [theirs], (10,))["Hit@10"]
        exact = float((per_user(ours, "Hit@10") - per_user(theirs, "Hit@10")).mean())
        assert found["difference"] == pytest.approx(exact)
        assert found["low"] < exact < found["high"]
        widths.append(found["high"] - found["low"])
        spread = 2 * 1.96 * float((per_user(ours, "Hit@10") - per_user(theirs, "Hit@10")).std()) / users**0.5
        assert widths[-1] == pytest.approx(spread, rel=0.15)
    assert widths[1] < widths[0] / 3
    same = paired_bootstrap([ours], [ours], (10,))["MRR"]
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)


def test_a_run_is_evaluated_by_segments_and_against_another(workspace, make_domain, small_settings):
    make_domain()
    make_domain("other", seed=4)
    settings = small_settings()
    finetune(workspace, "ring", settings, pretrained="none", seeds=[1, 2])
    two_seeds = newest_run(workspace, "finetune")
    finetune(workspace, "ring", small_settings(finetune={"epochs": 1}), pretrained="none")
    weak = newest_run(workspace, "finetune")
    document = evaluate_run(workspace, two_seeds, settings, segments=SEGMENTS, compare=weak)
    for groups in document["segments"].values():
        assert sum(group["n_users"] for group in groups.values()) == document["n_users"]
        weighted = sum(group["n_users"] * group["MRR"] for group in groups.values()) / document["n_users"]
        assert weighted == pytest.approx(document["metrics"]["MRR"])
    other = evaluate_run(workspace, weak, settings)
    for name, found in document["compare"].items():
        assert found["difference"] == pytest.approx(document["metrics"][name] - other["metrics"][name], abs=1e-12)
        assert found["low"] <= found["difference"] <= found["high"]
    assert set(document["yardsticks"]) == {"popularity", "repeat last"}
    masked = evaluate_run(workspace, two_seeds, settings, mask_seen=True)
    assert set(masked["yardsticks"]) == {"popularity"}
    assert masked["metrics_unmasked"] == document["metrics"]
    assert masked["metrics_unmasked_sd"] == document["metrics_sd"]
    assert masked["metrics"]["MRR"] > document["metrics"]["MRR"]
    finetune(workspace, "other", settings, pretrained="none")
    foreign = newest_run(workspace, "finetune", "other")
    with pytest.raises(RunError, match="no pairs"):
        evaluate_run(workspace, weak, settings, compare=foreign)


def test_the_temporal_split_leaves_no_future_to_train_on(workspace, make_domain, small_settings):
    make_domain(users=200)
    settings = small_settings(data={"split": "temporal", "split_share": 0.2}, finetune={"epochs": 1})
    result = finetune(workspace, "ring", settings, pretrained="none")
    assert result["split"] == "temporal"
    run = newest_run(workspace, "finetune")
    document = evaluate_run(workspace, run, settings)
    assert document["trained_on_later"] == 0
    assert document["metrics"] == result["metrics"]["test"]
    one_out = small_settings(finetune={"epochs": 1})
    finetune(workspace, "ring", one_out, pretrained="none")
    assert evaluate_run(workspace, newest_run(workspace, "finetune"), one_out)["trained_on_later"] > 0


def test_a_run_of_a_removed_domain_is_refused(workspace, make_domain, small_settings):
    make_domain()
    finetune(workspace, "ring", small_settings(finetune={"epochs": 1}), pretrained="none")
    run = newest_run(workspace, "finetune")
    for file in workspace.processed("ring").iterdir():
        file.unlink()
    with pytest.raises(RunError, match="no longer there"):
        evaluate_run(workspace, run, run.settings)
