"""Recommendations against the ranks of an evaluation and a plain sort."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch

from mmm4rec_cli.errors import DataError, RunError, UsageError
from mmm4rec_cli.evaluation import top_k as top_k_module
from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
from mmm4rec_cli.evaluation.recommend import Asked, load_recommender, parse_moment
from mmm4rec_cli.evaluation.recommend_files import read_asked, read_ids, recommendation_file
from mmm4rec_cli.features.new_items import NewItems
from mmm4rec_cli.reporter import SilentReporter
from mmm4rec_cli.runs import newest_run
from mmm4rec_cli.training.finetune import finetune


@pytest.fixture
def trained(workspace, make_domain, small_settings):
    def make(time="observed", network="mmm4rec", **sections):
        make_domain()
        settings = small_settings(
            model={**small_settings().model.model_dump(), "time": time}, finetune={"epochs": 1}, **sections
        )
        finetune(workspace, "ring", settings, model=network, pretrained="none")
        return newest_run(workspace, "finetune"), settings

    return make


@pytest.fixture
def recommender(workspace, trained):
    return load_recommender(workspace, *trained())


@pytest.mark.parametrize("time", ["observed", "published"])
def test_with_everything_asked_for_the_targets_stand_at_their_ranks(workspace, trained, time):
    run, settings = trained(time)
    evaluate_run(workspace, run, settings)
    recommender = load_recommender(workspace, run, settings)
    dataset = recommender.dataset
    ranks = pq.read_table(run.path / "ranks.parquet").filter(pa.compute.field("split") == "test").to_pylist()
    asked = [Asked(dataset.raw_user_ids[row["user_id"]]) for row in ranks]
    (found,) = recommender.recommend(asked, dataset.n_items, include_seen=True, before="test")
    assert len(ranks) == dataset.n_users
    for row, items in zip(ranks, found.item.tolist(), strict=True):
        assert sorted(items) == list(range(1, dataset.n_items + 1))
        assert items.index(row["item_id"]) == row["rank0"]
    assert np.allclose(found.parts["text"] + found.parts["image"], found.score, atol=1e-5)


def test_answers_equal_a_plain_sort_without_the_seen_and_blocks_change_nothing(
    workspace, trained, small_settings, monkeypatch
):
    run, settings = trained()
    recommender = load_recommender(workspace, run, settings)
    dataset = recommender.dataset
    sequences, asked = dataset.sequences, [Asked(raw) for raw in dataset.raw_user_ids]
    (whole,) = recommender.recommend(asked, 7)
    for user in range(dataset.n_users):
        begin, end = sequences.offsets_U1[user : user + 2].tolist()
        history = sequences.items_N[begin:end].long()
        kept = history[-6:]
        items, times = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64)
        items[0, : len(kept)] = kept
        times[0, : len(kept)] = sequences.times_N[begin:end][-6:]
        with torch.inference_mode():
            scores = recommender.model.scores(recommender.model(items, torch.tensor([len(kept)]), times))[0]
        scores = scores.clone()
        scores[0] = scores[history] = -torch.inf
        best = torch.argsort(scores, descending=True, stable=True)[:7]
        assert whole.item[user].tolist() == best.tolist()
        assert np.allclose(whole.score[user], scores[best], atol=1e-5)
    monkeypatch.setattr(top_k_module, "_BLOCK_ELEMENTS", {"cpu": 30})
    small = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"batch_size": 7})})
    blocks = list(load_recommender(workspace, run, small).recommend(asked, 7))
    assert [len(block.users) for block in blocks] == [7] * 8 + [4]
    assert np.concatenate([block.item for block in blocks]).tolist() == whole.item.tolist()


def test_a_bare_history_is_answered_as_its_user(recommender):
    dataset = recommender.dataset
    begin, end = dataset.sequences.offsets_U1[3:5].tolist()
    history = [dataset.raw_item_ids[i - 1] for i in dataset.sequences.items_N[begin:end].tolist()]
    times = dataset.sequences.times_N[begin:end].tolist()
    (found,) = recommender.recommend([Asked("u003"), Asked(None, history, times), Asked(None, history)])
    assert found.item[0].tolist() == found.item[1].tolist()
    assert not set(found.item[0].tolist()) & set(dataset.sequences.items_N[begin:end].tolist())
    unknown_gaps = recommender.user_vectors([recommender._history(Asked(None, history), 10**9, None)])
    other_moment = recommender.user_vectors([recommender._history(Asked(None, history), 2 * 10**9, None)])
    assert torch.equal(unknown_gaps, other_moment)


def test_the_moment_of_asking_counts_only_where_the_label_stamp_stood(workspace, trained):
    run, settings = trained("published")
    recommender = load_recommender(workspace, run, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a model this young hardly reads its time streams
        for name, weight in recommender.model.named_parameters():
            if "time" in name or "filter" in name:
                weight.add_(0.5 * torch.randn(weight.shape, generator=generator))
    asked = Asked(None, ["i001", "i002"], [1_500_000_000, 1_500_100_000])
    (soon,), (late,) = (recommender.recommend([asked], at=at) for at in (1_500_200_000, 1_900_000_000))
    assert not np.array_equal(soon.score, late.score)


def test_candidates_and_excluded_items(workspace, trained):
    run, settings = trained()
    recommender = load_recommender(workspace, run, settings, candidates=["i003", "i001", "i009"], exclude=["i009", "x"])
    (found,) = recommender.recommend([Asked("u000"), Asked(None, ["i001"])], 5)
    (everything,) = recommender.recommend([Asked("u000")], 5, include_seen=True)
    assert {recommender.raw(i) for i in everything.item[0].tolist()} == {"i001", "i003"}
    assert [one["raw_item_id"] for one in recommender.documents(found)[1]["items"]] == ["i003"]
    assert recommender.table(found).num_rows == (found.item > 0).sum()
    with pytest.raises(DataError, match="no candidate"):
        load_recommender(workspace, run, settings, candidates=["i001"], exclude=["i001"])
    with pytest.raises(DataError, match="candidate 'i001x'") as error:
        load_recommender(workspace, run, settings, candidates=["i001x"])
    assert "i001" in error.value.hint


def test_neighbours_are_the_highest_cosines(recommender):
    found = recommender.similar("i004", 5)
    rows = torch.nn.functional.normalize(recommender.item_VD, dim=-1)
    cosine = rows @ rows[5]
    cosine[[0, 5]] = -2
    assert found.item[0].tolist() == cosine.argsort(descending=True, stable=True)[:5].tolist()
    assert np.allclose(found.score[0], cosine.sort(descending=True).values[:5], atol=1e-6)
    assert np.allclose(found.parts["text"] + found.parts["image"], found.score, atol=1e-6)
    with pytest.raises(DataError, match="'i04'"):
        recommender.similar("i04")


class Notes(SilentReporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def new_items(dataset, raw_ids, like, fingerprint=None, image=True):
    present = np.ones(len(like), np.bool_)
    return NewItems(
        list(raw_ids),
        ["new one"] * len(like),
        (dataset.features.text[like], present),
        (dataset.features.image[like], present & image),
        fingerprint or dataset.features.fingerprint,
    )


@pytest.mark.parametrize("missing", ["mean", "zero", "learned"])
def test_new_items_are_ranked_beside_the_known_whose_scores_stay(workspace, trained, missing):
    run, settings = trained(features={"encoder": "test", "missing": missing})
    known = load_recommender(workspace, run, settings)
    new = new_items(known.dataset, ["n1", "n2"], [3, 8], image=np.array([True, False]))
    both = load_recommender(workspace, run, settings, new_items=new)
    assert torch.allclose(both.item_VD[:26], known.item_VD, atol=1e-6)
    text = known.model.text
    with torch.inference_mode():
        own = both.model.item_table_parts(torch.tensor([26]))["text"][0]
        without_bias = torch.nn.functional.normalize(text.adapter(text.features[3]), dim=-1)
    assert torch.allclose(own, without_bias / settings.model.temperature, atol=1e-6)
    (found,) = both.recommend([Asked("u000"), Asked(None, ["n1", "i004"])], 27, include_seen=True)
    assert sorted(found.item[0].tolist()) == list(range(1, 28))
    titles = {item["raw_item_id"]: item["title"] for item in both.documents(found)[0]["items"]}
    assert titles["n1"] == "new one"
    with pytest.raises(DataError, match="i004"):
        load_recommender(workspace, run, settings, new_items=new_items(known.dataset, ["i004"], [1]))
    with pytest.raises(DataError, match="another encoder"):
        load_recommender(workspace, run, settings, new_items=new_items(known.dataset, ["n"], [1], "f" * 64))


def test_starved_new_items_get_their_share_where_asked_for(workspace, trained):
    run, settings = trained()
    dataset = load_recommender(workspace, run, settings).dataset
    n, new = dataset.n_items, new_items(dataset, [f"n{i}" for i in range(8)], list(range(1, 9)))
    recommender = load_recommender(workspace, run, settings, new_items=new)
    recommender._candidate_VD = recommender._candidate_VD.clone()
    recommender._candidate_VD[n:] = 0  # every new item scores 0, below what most known ones get
    asked = [Asked(raw) for raw in recommender.dataset.raw_user_ids]
    (plain,) = recommender.recommend(asked, 10, before="valid")
    offset = recommender.raise_new(n + 1)
    (raised,) = recommender.recommend(asked, 10, before="valid")
    assert (plain.item > n).mean() < 8 / 33 - 0.02
    assert (raised.item > n).mean() == pytest.approx(8 / 33, abs=0.005)
    assert offset > 0
    assert np.allclose(raised.score[raised.item > n], offset)
    for before, after in zip(plain.item.tolist(), raised.item.tolist(), strict=True):
        kept = [item for item in after if item <= n]
        assert kept == [item for item in before if item <= n][: len(kept)]
    recommender._candidate_VD[n:] = recommender._candidate_VD[:8] * 3  # beloved: nothing is to be raised
    assert recommender.raise_new(n + 1) == 0
    fair = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"new_items": "fair_share"})})
    said = Notes()
    load_recommender(workspace, run, fair, new_items=new, reporter=said)
    assert any("fair_share: the scores of new items are raised by" in note for note in said.notes)


@pytest.mark.parametrize(
    ("model", "words"), [("mmm4rec", "no trained item bias"), ("gru4rec", "gru4rec has a trained")]
)
def test_what_new_items_lack_is_said(workspace, trained, model, words):
    run, settings = trained(network=model)
    new, said = new_items(load_recommender(workspace, run, settings).dataset, ["n1"], [3]), Notes()
    load_recommender(workspace, run, settings, new_items=new, reporter=said)
    assert [note for note in said.notes if words in note]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked("u00"), "user 'u00'"),
        (Asked(None, []), "empty"),
        (Asked(None, ["i001", "zzz"]), "item 'zzz'"),
        (Asked(None, ["i001"], [1, 2]), "2 times"),
        (Asked(None, ["i001", "i002"], [2, 1]), "go back"),
    ],
)
def test_who_cannot_be_answered_is_named(recommender, asked, said):
    with pytest.raises(DataError, match=said):
        list(recommender.recommend([asked]))


def test_no_places_and_a_removed_domain_are_refused(workspace, trained):
    run, settings = trained()
    recommender = load_recommender(workspace, run, settings)
    with pytest.raises(UsageError, match="k = 0"):
        list(recommender.recommend([Asked("u000")], 0))
    for file in workspace.processed("ring").iterdir():
        file.unlink()
    with pytest.raises(RunError, match="no longer there"):
        load_recommender(workspace, run, settings)


def test_vectors_of_another_encoder_and_an_unfinished_run_are_refused(workspace, trained, make_domain):
    run, settings = trained()
    make_domain(widths=(6, 4))
    with pytest.raises(RunError, match="vectors of another encoder"):
        load_recommender(workspace, run, settings)
    (run.path / "result.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        load_recommender(workspace, run, settings)


def test_more_users_take_no_more_memory(workspace, trained, tmp_path):
    """Ten times the users, streamed from file to file: the most that is held at once stays the same."""
    run, settings = trained()
    small = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"batch_size": 50})})
    recommender = load_recommender(workspace, run, small)

    def stream(users):
        with (tmp_path / "users.csv").open("w") as asked:
            asked.write("user,history\n")
            asked.writelines(f'n{i},"i{i % 25:03d},i{(i + 7) % 25:03d}"\n' for i in range(users))
        with recommendation_file(tmp_path / "out.parquet") as write:
            for block in recommender.recommend(read_asked(tmp_path / "users.csv"), 3):
                write(recommender.table(block))
        assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 3 * users

    stream(200)  # what is loaded or cached once
    peaks = []
    for users in (500, 5000):
        pa.default_memory_pool().release_unused()
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        stream(users)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 100_000
    held_by_all = 5000 * 3 * 100  # the least that answers kept in Python would take
    assert peaks[1] < peaks[0] + held_by_all / 4


def test_moments_are_seconds_or_iso_dates():
    assert parse_moment("1500000000") == 1_500_000_000
    assert parse_moment("2017-07-14T02:40:00") == parse_moment("2017-07-14T04:40:00+02:00") == 1_500_000_000
    with pytest.raises(UsageError, match="'soon'"):
        parse_moment("soon")


def test_all_formats_of_questions_say_the_same(tmp_path):
    rows = [{"user": "007", "history": None, "times": None}, {"user": None, "history": "a,b", "times": "1,2"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    pa_csv.write_csv(pa.Table.from_pylist(rows), tmp_path / "q.csv")
    (tmp_path / "q.jsonl").write_text('{"user": "007"}\n\n{"history": ["a", "b"], "times": [1, 2]}\n')
    for suffix in ("parquet", "csv", "jsonl"):
        got = [(one.user, one.history, one.times) for one in read_asked(tmp_path / f"q.{suffix}")]
        assert got == [("007", None, None), (None, ["a", "b"], [1, 2])]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.csv", "name\nx\n", "no column user or history"),
        ("q.jsonl", '{"user": "a"}\n{"user"\n', "line 2"),
        ("q.jsonl", "{}\n", "neither user nor history"),
        ("q.jsonl", '{"history": ["a"], "times": ["noon"]}\n', "Unix seconds"),
        ("q.parquet", "no parquet", "cannot be read"),
        ("q.txt", "a\n", "unknown format"),
    ],
)
def test_broken_questions_are_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        list(read_asked(tmp_path / name))


def test_lists_of_ids(tmp_path):
    (tmp_path / "ids.txt").write_text("007\n\n b\n")
    (tmp_path / "ids.csv").write_text("item_id,x\n007,1\nb,2\n")
    pq.write_table(pa.table({"item_id": ["007", "b"]}), tmp_path / "ids.parquet")
    for suffix in ("txt", "csv", "parquet"):
        assert read_ids(tmp_path / f"ids.{suffix}") == ["007", "b"]
    (tmp_path / "ids.txt").write_text("\n")
    with pytest.raises(DataError, match="no item ids"):
        read_ids(tmp_path / "ids.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(tmp_path / "nowhere.txt")


def test_a_file_of_answers_is_whole_or_not_there(recommender, tmp_path):
    (found,) = recommender.recommend([Asked("u000"), Asked("u001")], 3)
    table = recommender.table(found)
    for suffix in (".parquet", ".csv", ".jsonl"):
        with recommendation_file(tmp_path / f"out{suffix}") as write:
            write(table)
            write(table)
    assert pq.read_table(tmp_path / "out.parquet").equals(pa.concat_tables([table, table]))
    assert (tmp_path / "out.jsonl").read_text().count("\n") == (tmp_path / "out.csv").read_text().count("\n") - 1 == 12

    def cut():
        with recommendation_file(tmp_path / "cut.csv") as write:
            write(table)
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        cut()
    assert not list(tmp_path.glob("*cut*"))
    assert not list(tmp_path.glob(".*.part"))
