import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.features.extract import encode_catalogue, extract_features
from mmm4rec_cli.features.parts import Plan, Shard, read_shard
from mmm4rec_cli.settings.schema import FeatureSettings

WORDS = ["red", "blue", "cotton", "scarf", "mouse", "book", "cats", "mug", "winter", "wireless"]


@pytest.fixture
def shop(workspace, write_domain):
    """Twelve items with pictures, one of them broken, one a copy, one text twice."""
    folder = workspace.root / "data" / "raw" / "shop" / "images"
    folder.mkdir(parents=True)
    items = {}
    for number in range(12):
        path = folder / f"{number:02d}.png"
        noise = np.random.default_rng(number % 11).integers(0, 256, (20 + number % 11, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        items[f"i{number:02d}"] = (" ".join(WORDS[: number % 10 + 1]), str(path))
    (folder / "05.png").write_bytes(b"no picture")
    write_domain(items)
    return items


@pytest.fixture
def pair(model):
    return {
        "text_model": model("bert"),
        "image_model": model("vit"),
        "encoder": "pair",
        "batch_size": 2,
        "part_size": 4,
    }


def rows(path):
    return pq.read_table(path).to_pylist()


@pytest.mark.usefixtures("shop")
def test_shards_and_a_merge_make_the_very_file_of_one_run(workspace, pair, reporter):
    settings = FeatureSettings(**pair)
    straight = extract_features(workspace, "shop", settings, "cpu")
    expected = straight.read_bytes()
    for count in (2, 3, 5):
        straight.unlink()
        for index in range(count, 0, -1):
            assert extract_features(workspace, "shop", settings, "cpu", reporter, shard=Shard(index, count)) is None
        assert any(f"shard 1/{count}" in text and "--merge" in text for text in reporter.notes)
        assert not straight.exists()
        assert extract_features(workspace, "shop", settings, "cpu", merge=True).read_bytes() == expected
        assert not straight.with_suffix(".parts").exists()
    assert extract_features(workspace, "shop", settings, "cpu", reporter, merge=True) == straight
    assert any("joined already" in text for text in reporter.notes)


@pytest.mark.usefixtures("shop")
def test_batch_and_part_sizes_change_no_vector_beyond_rounding(workspace, pair):
    found = []
    for sizes in ({}, {"batch_size": 3, "part_size": 5}, {"batch_size": 64, "part_size": 8192}):
        path = extract_features(workspace, "shop", FeatureSettings(**pair | sizes), "cpu")
        found.append(rows(path))
        path.unlink()
    for other in found[1:]:
        for row, expected in zip(other, found[0], strict=True):
            for side in ("text", "image"):
                if expected[side] is None:
                    assert row[side] is None
                else:
                    np.testing.assert_allclose(row[side], expected[side], atol=2e-6)
    assert [row["item_id"] for row in found[0] if row["image"] is None] == [6]


@pytest.mark.usefixtures("shop")
def test_a_merge_without_a_shard_names_the_parts_and_whose_they_are(workspace, pair):
    settings = FeatureSettings(**pair)
    extract_features(workspace, "shop", settings, "cpu", shard=Shard(1, 2))
    with pytest.raises(DataError) as caught:
        extract_features(workspace, "shop", settings, "cpu", merge=True)
    assert "1 of 3 text parts are missing or damaged (parts 1; part p is made by shard p mod N + 1 of N)" in str(
        caught.value
    )
    assert "1 of 3 image parts" in str(caught.value)
    assert "--shard I/N" in caught.value.hint


@pytest.mark.usefixtures("shop")
def test_a_merge_of_different_encoders_is_refused(workspace, pair, model):
    extract_features(workspace, "shop", FeatureSettings(**pair), "cpu", shard=Shard(1, 2))
    other = FeatureSettings(**pair | {"image_model": model("vit", seed=2)})
    extract_features(workspace, "shop", other, "cpu", shard=Shard(2, 2))
    with pytest.raises(
        DataError, match=r"image parts come from 2 different encoders \(\w+: parts 0, 2; \w+: parts 1\)"
    ):
        extract_features(workspace, "shop", other, "cpu", merge=True)


def test_a_merge_of_parts_of_another_catalogue_says_so(workspace, pair, shop, write_domain):
    settings = FeatureSettings(**pair)
    for index in (1, 2):
        extract_features(workspace, "shop", settings, "cpu", shard=Shard(index, 2))
    write_domain(shop | {"i99": ("another text", None)})
    with pytest.raises(DataError, match="parts were made of other items"):
        extract_features(workspace, "shop", settings, "cpu", merge=True)


@pytest.mark.usefixtures("shop")
def test_a_damaged_part_is_made_again_by_a_run_and_refused_by_a_merge(workspace, pair, reporter):
    settings = FeatureSettings(**pair)
    straight = extract_features(workspace, "shop", settings, "cpu")
    expected = straight.read_bytes()
    straight.unlink()
    extract_features(workspace, "shop", settings, "cpu", shard=Shard(1, 1))
    part = next(straight.with_suffix(".parts").glob("text-*-00001.arrow"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DataError, match="1 of 3 text parts are missing or damaged"):
        extract_features(workspace, "shop", settings, "cpu", merge=True)
    assert extract_features(workspace, "shop", settings, "cpu", reporter).read_bytes() == expected
    assert reporter.done == {"texts": 4}


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/0", "a/b", "1/2/3", "-1/2", "1.0/2", "/", ""])
def test_what_is_no_shard_is_a_usage_error(text):
    with pytest.raises(UsageError, match="no shard"):
        read_shard(text)
    assert read_shard("4/4") == Shard(4, 4)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_part_belongs_to_one_shard_and_every_input_to_one_job(count, of):
    plan = Plan(
        "text", [bytes([number]) * 32 for number in range(count)], ["x" * (number % 7) for number in range(count)], 4
    )
    shares = [part for index in range(1, of + 1) for part in plan.share(Shard(index, of))]
    assert sorted(shares) == list(range(plan.n_parts)) == plan.share(None)
    jobs = [place for part in shares for places in plan.jobs(part, 3) for place in places]
    assert sorted(jobs) == list(range(count))


def test_a_catalogue_that_grew_costs_only_what_is_new(workspace, pair, shop, write_domain, reporter):
    settings = FeatureSettings(**pair)
    path = extract_features(workspace, "shop", settings, "cpu")
    before = {row["item_id"]: row for row in rows(path)}
    folder = Path(shop["i00"][1]).parent
    Image.new("RGB", (9, 9), "teal").save(folder / "new.png")
    new = {"i005": ("a text of its own", str(folder / "new.png")), "i99": (shop["i03"][0], shop["i04"][1])}
    write_domain(shop | new)
    assert extract_features(workspace, "shop", settings, "cpu", reporter) == path
    assert reporter.done == {"texts": 1, "images": 2}  # the broken picture is tried again
    assert any("taken over from the features before: 10 texts, 10 pictures" in text for text in reporter.notes)
    after = rows(path)
    assert len(after) == 14
    old = [row for row in after if row["item_id"] not in {2, 14}]
    for row, (_, expected) in zip(old, sorted(before.items()), strict=True):
        assert {**row, "item_id": 0} == {**expected, "item_id": 0}
    assert after[13]["text"] == before[4]["text"]
    assert after[13]["image"] == before[5]["image"]
    fresh = path.with_name("fresh.parquet")
    shutil.copy(path, fresh)
    path.unlink()
    anew = rows(extract_features(workspace, "shop", settings, "cpu"))
    for row, expected in zip(rows(fresh), anew, strict=True):
        for side in ("text", "image"):
            assert (row[side] is None) == (expected[side] is None)
            np.testing.assert_allclose(row[side] or [], expected[side] or [], atol=2e-6)


@pytest.mark.usefixtures("shop")
def test_another_image_model_leaves_the_texts_as_they_were(workspace, pair, model, reporter):
    path = extract_features(workspace, "shop", FeatureSettings(**pair), "cpu")
    texts = pq.read_table(path)["text"]
    other = FeatureSettings(**pair | {"image_model": model("vit", seed=2)})
    extract_features(workspace, "shop", other, "cpu", reporter)
    assert reporter.done == {"images": 11}
    assert pq.read_table(path)["text"] == texts


def test_shards_take_over_what_did_not_change_and_the_merge_knows_it(
    workspace, pair, shop, write_domain, model, reporter
):
    path = extract_features(workspace, "shop", FeatureSettings(**pair), "cpu")
    grown = FeatureSettings(**pair | {"image_model": model("vit", seed=2)})
    write_domain(shop | {"i99": ("another text", None)})
    for index in (1, 2):
        extract_features(workspace, "shop", grown, "cpu", reporter, shard=Shard(index, 2))
    extract_features(workspace, "shop", grown, "cpu", reporter, merge=True)
    assert any("taken over from the features before: 10 texts, 0 pictures" in text for text in reporter.notes)
    sharded = rows(path)
    path.unlink()
    anew = rows(extract_features(workspace, "shop", grown, "cpu"))
    for row, expected in zip(sharded, anew, strict=True):
        np.testing.assert_allclose(row["text"], expected["text"], atol=2e-6)
        assert row["image"] == expected["image"]


@pytest.mark.usefixtures("shop")
def test_vectors_stored_as_float16_are_not_taken_for_float32(workspace, pair, reporter):
    path = extract_features(workspace, "shop", FeatureSettings(**pair, dtype="float16"), "cpu")
    extract_features(workspace, "shop", FeatureSettings(**pair), "cpu", reporter)
    assert reporter.done == {"texts": 10, "images": 11}
    extract_features(workspace, "shop", FeatureSettings(**pair, dtype="float16"), "cpu", reporter)
    assert str(pq.read_schema(path).field("text").type.value_type) == "halffloat"


def test_a_catalogue_goes_into_a_new_file_and_the_old_one_stays(workspace, pair, shop, tmp_path, reporter):
    settings = FeatureSettings(**pair)
    old = extract_features(workspace, "shop", settings, "cpu")
    content = old.read_bytes()
    target = tmp_path / "grown.parquet"
    texts = [text for text, _ in shop.values()]
    images = [Path(image) for _, image in shop.values()]
    made = encode_catalogue(
        target, [*shop, "i99"], [*texts, "winter mouse"], [*images, None], settings, "cpu", reporter, existing=old
    )
    assert made == target
    assert old.read_bytes() == content
    assert reporter.done == {"texts": 1, "images": 1}
    assert rows(target)[:12] == rows(old)
    assert sorted(path.name for path in tmp_path.glob("grown*")) == ["grown.log", "grown.parquet"]


def test_parts_of_another_catalogue_are_thrown_away_and_that_is_said(workspace, pair, shop, write_domain, reporter):
    settings = FeatureSettings(**pair)
    extract_features(workspace, "shop", settings, "cpu", shard=Shard(1, 2))
    write_domain(shop | {"i99": ("another text", None)})
    path = extract_features(workspace, "shop", settings, "cpu", reporter)
    assert any("thrown away" in text for text in reporter.notes)
    assert not path.with_suffix(".parts").exists()
