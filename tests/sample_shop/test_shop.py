import csv
import hashlib
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from mmm4rec_cli.sample_shop import Shop, ShopDomain, write_shop
from mmm4rec_cli.sample_shop.customers import FEWEST, MOST
from mmm4rec_cli.sample_shop.goods import COLOUR_NAMES, LINES, MATERIALS, PATTERNS, SOURCES, TARGET
from mmm4rec_cli.sample_shop.pictures import SIZE

DAY = 86400


def fingerprint(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def interactions(domain: ShopDomain):
    with domain.interactions.open(encoding="utf-8", newline="") as stream:
        return [(row["user_id"], row["item_id"], int(row["timestamp"])) for row in csv.DictReader(stream)]


def items(domain: ShopDomain):
    return [json.loads(line) for line in domain.items.read_text(encoding="utf-8").splitlines()]


def histories(domain: ShopDomain):
    by_user: dict[str, list[tuple[int, str]]] = {}
    for user, item, time in interactions(domain):
        by_user.setdefault(user, []).append((time, item))
    return by_user


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    return write_shop(tmp_path_factory.mktemp("shop"), 7)


def test_the_same_seed_gives_the_same_bytes(shop, tmp_path):
    again = write_shop(tmp_path, 7)
    assert fingerprint(tmp_path) == fingerprint(shop.target.items.parent.parent)
    assert again.seed == 7


def test_writing_over_a_shop_of_the_same_seed_changes_nothing(tmp_path):
    write_shop(tmp_path, 3)
    before = fingerprint(tmp_path)
    write_shop(tmp_path, 3)
    assert fingerprint(tmp_path) == before


def test_another_seed_draws_another_shop(shop, tmp_path):
    other = write_shop(tmp_path, 8)
    for mine, theirs in zip(shop.domains, other.domains, strict=True):
        assert mine.name == theirs.name
        assert mine.interactions.read_bytes() != theirs.interactions.read_bytes()
        assert mine.items.read_bytes() != theirs.items.read_bytes()


def test_a_shop_written_over_another_is_the_shop_alone(tmp_path):
    write_shop(tmp_path / "reused", 4)
    write_shop(tmp_path / "reused", 5)
    write_shop(tmp_path / "fresh", 5)
    assert fingerprint(tmp_path / "reused") == fingerprint(tmp_path / "fresh")


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError):
        write_shop(tmp_path, -1)
    assert not list(tmp_path.iterdir())


def test_three_sources_and_a_smaller_target(shop):
    assert [domain.name for domain in shop.sources] == [line.domain for line in SOURCES]
    assert shop.target.name == TARGET.domain
    assert all(len(interactions(shop.target)) < len(interactions(source)) for source in shop.sources)


def test_interactions_have_the_columns_of_own_data(shop):
    for domain, line in zip(shop.domains, LINES, strict=True):
        assert domain.interactions.read_text(encoding="utf-8").startswith("user_id,item_id,timestamp\n")
        rows = interactions(domain)
        known = {row["item_id"] for row in items(domain)}
        assert {item for _, item, _ in rows} <= known
        assert len({user for user, _, _ in rows}) == line.n_users


def test_items_have_the_columns_of_own_data(shop):
    for domain, line in zip(shop.domains, LINES, strict=True):
        rows = items(domain)
        assert len(rows) == len({row["item_id"] for row in rows}) == line.n_items
        assert all(list(row) == ["item_id", "title", "brand", "description", "image"] for row in rows)
        assert all(isinstance(row["title"], str) and row["title"] for row in rows)


def test_no_user_and_no_item_is_shared(shop):
    users = [user for domain in shop.domains for user in histories(domain)]
    ids = [row["item_id"] for domain in shop.domains for row in items(domain)]
    assert len(users) == len(set(users))
    assert len(ids) == len(set(ids))


def test_histories_are_five_to_twenty_five_long_and_span_at_most_some_years(shop):
    for domain in shop.domains:
        for events in histories(domain).values():
            times = [time for time, _ in events]
            assert FEWEST <= len(events) <= MOST
            assert times == sorted(times)
            assert max(times) - min(times) < 5 * 365 * DAY


def test_purchases_follow_within_days_but_for_one_off_ones_after_weeks(shop):
    for domain in shop.domains:
        gaps = np.array(
            [b - a for events in histories(domain).values() for (a, _), (b, _) in pairwise(events)], dtype=float
        )
        assert 0.75 < (gaps < 7 * DAY).mean() < 0.85
        assert ((gaps > 7 * DAY) & (gaps < 14 * DAY)).mean() < 0.02


def test_a_few_pictures_and_a_few_descriptions_are_missing(shop):
    rows = [row for domain in shop.domains for row in items(domain)]
    assert 0.01 < np.mean([row["image"] is None for row in rows]) < 0.08
    assert 0.01 < np.mean([row["description"] is None for row in rows]) < 0.07


def test_descriptions_are_hundreds_of_different_texts(shop):
    texts = {row["description"] for domain in shop.domains for row in items(domain)} - {None}
    assert len(texts) > 500
    assert not any("{" in text or "  " in text for text in texts)


def test_every_picture_opens_and_none_is_left_over(shop):
    for domain in shop.domains:
        named = {row["image"] for row in items(domain)} - {None}
        folder = domain.items.parent
        assert {str(path.relative_to(folder)) for path in (folder / "images").iterdir()} == named
        for name in named:
            with Image.open(folder / name) as picture:
                picture.load()
                assert picture.mode == "RGB"
                assert picture.size == (SIZE, SIZE)


def test_no_text_tells_what_only_pictures_show(shop):
    shown = {*COLOUR_NAMES, *PATTERNS}
    for domain in shop.domains:
        for row in items(domain):
            words = f"{row['title']} {row['brand']} {row['description']}".lower().replace(".", "").split()
            assert not shown & set(words)


def test_every_title_names_one_material(shop):
    nouns = [noun for family_nouns, _ in MATERIALS.values() for noun in family_nouns]
    assert len(nouns) == len(set(nouns))
    for domain in shop.domains:
        assert all(row["title"].split()[1].lower() in nouns for row in items(domain))


def test_some_items_are_bought_far_more_often_than_others(shop):
    for domain in shop.domains:
        counts = sorted(Counter(item for _, item, _ in interactions(domain)).values(), reverse=True)
        tenth = len(counts) // 10
        assert sum(counts[:tenth]) > 2 * sum(counts) / 10
