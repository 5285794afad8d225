import gzip
import json
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from mmm4rec_cli.data.domains import CATEGORIES, MIXES
from mmm4rec_cli.data.preprocess import build_tables
from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.reporter import SilentReporter
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

LOOSE = DataSettings(min_user=1, min_item=1)


class Listening:
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    warn = note

    @contextmanager
    def stage(self, name, total=None, unit=""):
        with SilentReporter().stage(name, total, unit) as progress:
            yield progress


def write_raw(workspace, domain, rows, items):
    folder = workspace.raw(domain)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{item},{user},{rating},{time}\n" for item, user, rating, time in rows)
    (folder / f"{CATEGORIES[domain]}.csv").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / f"meta_{CATEGORIES[domain]}.json.gz").write_bytes(gzip.compress(lines.encode()))


def oracle(rows, known, min_user, min_item):
    """The published filters on plain sets and dictionaries; a row is (item, user, rating, time)."""
    counts = [summary(rows)]
    rows = list(dict.fromkeys(rows))
    counts.append(summary(rows))
    rows = [row for row in rows if row[0] in known]
    counts.append(summary(rows))
    while True:
        users, items = Counter(row[1] for row in rows), Counter(row[0] for row in rows)
        left = [row for row in rows if users[row[1]] >= min_user and items[row[0]] >= min_item]
        if left == rows:
            break
        rows = left
    counts.append(summary(rows))
    users, items = sorted({row[1] for row in rows}), sorted({row[0] for row in rows})
    numbered = [(users.index(user), items.index(item) + 1, time) for item, user, _, time in rows]
    return sorted(numbered, key=lambda row: (row[0], row[2])), users, items, counts


def summary(rows):
    return {"users": len({row[1] for row in rows}), "items": len({row[0] for row in rows}), "rows": len(rows)}


def assert_build_equals_oracle(workspace, domain, cores, expected):
    chosen = DataSettings(min_user=cores[0], min_item=cores[1])
    rows, users, items, counts = expected
    if not rows:
        with pytest.raises(DataError, match="is empty"):
            build_tables(workspace, domain, chosen)
        return
    build_tables(workspace, domain, chosen)
    tables = read_tables(workspace, domain)
    assert tables.raw_user_ids == users
    assert tables.raw_item_ids == items
    found = zip(tables.user_id.tolist(), tables.item_id.tolist(), tables.timestamp.tolist(), strict=True)
    assert list(found) == rows
    assert [{key: count[key] for key in ("users", "items", "rows")} for count in tables.manifest["counts"]] == counts
    ties = Counter((user, time) for user, _, time in rows)
    tied = sum(ties[user, time] > 1 for user, _, time in rows)
    assert tables.manifest["tied_share"] == pytest.approx(tied / len(rows))
    assert tables.manifest["repeated_pairs"] == len(rows) - len({(user, item) for user, item, _ in rows})


NAMES = ["a", "A", "b-1", "007", "7", "é", "\uffee", "\U0001f600"]
NAME = st.sampled_from(NAMES)
ROW = st.tuples(NAME, NAME, st.sampled_from(["1.0", "5.0"]), st.sampled_from([0, 86400, 9]))
ROWS = st.integers(1, 80).flatmap(lambda size: st.lists(ROW, min_size=size, max_size=size))
QUICK = settings(max_examples=60, deadline=None)


@given(rows=ROWS, known=st.sets(NAME, min_size=1), cores=st.tuples(*[st.integers(1, 4)] * 2))
@QUICK
def test_tables_equal_the_plain_sets_and_dictionaries(tmp_path_factory, rows, known, cores):
    expected = oracle(rows, known, *cores)
    workspace = Workspace(tmp_path_factory.mktemp("w"))
    write_raw(workspace, "magazine", rows, [{"asin": name} for name in sorted(known)])
    assert_build_equals_oracle(workspace, "magazine", cores, expected)


@given(parts=st.lists(ROWS, min_size=5, max_size=5), cores=st.tuples(*[st.integers(1, 3)] * 2))
@settings(QUICK, max_examples=15)
def test_a_mix_is_one_k_core_over_prefixed_ids(tmp_path_factory, parts, cores):
    workspace = Workspace(tmp_path_factory.mktemp("w"))
    together = []
    for domain, rows in zip(MIXES["fhckm"], parts, strict=True):
        write_raw(workspace, domain, rows, [{"asin": name, "title": f"{domain} {name}"} for name in NAMES])
        together += [(f"{domain}-{item}", f"{domain}-{user}", rating, time) for item, user, rating, time in rows]
    expected = oracle(together, {row[0] for row in together}, *cores)
    assert_build_equals_oracle(workspace, "fhckm", cores, expected)
    if not expected[0]:
        return
    tables = read_tables(workspace, "fhckm")
    titles = dict(zip(tables.raw_item_ids, tables.items["title"].to_pylist(), strict=True))
    assert titles == {name: name.replace("-", " ", 1) for name in tables.raw_item_ids}


def test_ratings_count_for_exact_duplicates_only(tmp_path):
    workspace = Workspace(tmp_path)
    rows = [("i", "u", "5.0", 1), ("i", "u", "4.0", 1), ("i", "u", "5", 1), ("i", "u", "5.0", 2)]
    write_raw(workspace, "magazine", rows, [{"asin": "i"}])
    manifest = build_tables(workspace, "magazine", LOOSE)
    assert [count["rows"] for count in manifest["counts"]] == [4, 3, 3, 3]
    assert manifest["repeated_pairs"] == 2


def test_optional_filters_stand_before_the_k_core(tmp_path):
    workspace = Workspace(tmp_path)
    rows = [(item, user, "1.0", 1) for item in "abc" for user in "xy"]
    write_raw(
        workspace,
        "magazine",
        rows,
        [
            {"asin": "a", "title": "Tea", "imageURL": ["https://x/a.jpg"]},
            {"asin": "b", "title": "<span"},
            {"asin": "c", "title": "Milk"},
        ],
    )
    chosen = DataSettings(min_user=1, min_item=1, require_text=True, require_image=True)
    manifest = build_tables(workspace, "magazine", chosen)
    assert [(count["step"], count["items"]) for count in manifest["counts"]] == [
        ("read", 3),
        ("exact duplicates dropped", 3),
        ("items in metadata", 3),
        ("items with text", 2),
        ("items with image", 1),
        ("k-core", 1),
    ]
    assert (manifest["text_share"], manifest["image_url_share"], manifest["image_share"]) == (1.0, 1.0, 0.0)
    with pytest.raises(DataError, match="empty"):
        build_tables(workspace, "magazine", DataSettings(min_user=2, min_item=1, require_image=True))


def write_own(
    folder, interactions="user_id,item_id,timestamp\nu,007,5\nu,i,6\n", items="item_id,text\n007,Bond\ni,Tea\n"
):
    (folder / "log.csv").write_text(interactions)
    (folder / "things.csv").write_text(items)
    return {"interactions": folder / "log.csv", "items": folder / "things.csv"}


def test_own_tables_and_pictures(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "i.png").write_bytes(b"x")
    own = write_own(
        tmp_path, items="item_id,text,image\n007,Bond,pics/none.png\ni,,./pics/i.png\nj,J,https://x/j.jpg\n"
    )
    workspace, reporter = Workspace(tmp_path / "w"), Listening()
    manifest = build_tables(workspace, "shop", LOOSE, **own, reporter=reporter)
    tables = read_tables(workspace, "shop")
    assert tables.raw_item_ids == ["007", "i"]
    assert tables.items["text"].to_pylist() == ["Bond", None]
    assert tables.items["image"].to_pylist() == [None, str(tmp_path / "pics" / "i.png")]
    assert manifest["pictures"] | {"sha256": ""} == {"named": 2, "missing": 1, "sha256": ""}
    assert (manifest["text_share"], manifest["image_share"]) == (0.5, 0.5)
    assert [(entry["role"], entry["path"]) for entry in manifest["sources"]] == [
        ("interactions", str(own["interactions"])),
        ("items", str(own["items"])),
    ]
    assert f"{own['interactions']}: timestamps read as seconds" in reporter.lines
    assert f"{own['items']}: 1 of 2 pictures are not there" in reporter.lines


def test_same_sources_and_settings_keep_the_tables(tmp_path):
    own, workspace, reporter = write_own(tmp_path), Workspace(tmp_path), Listening()
    first = build_tables(workspace, "shop", LOOSE, **own)
    written = {path: path.stat().st_mtime_ns for path in workspace.processed("shop").iterdir()}
    again = build_tables(workspace, "shop", LOOSE, reporter=reporter)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in workspace.processed("shop").iterdir()} == written
    assert any("were kept" in line for line in reporter.lines)
    assert build_tables(workspace, "shop", LOOSE.model_copy(update={"image_workers": 2}), **own) == first


@pytest.mark.parametrize("change", ["source", "settings", "damage", "picture"])
def test_anything_that_matters_makes_the_tables_anew(tmp_path, change):
    own = write_own(tmp_path, items="item_id,text,image\n007,Bond,x.png\ni,Tea,\n")
    workspace, chosen, reporter = Workspace(tmp_path), LOOSE, Listening()
    build_tables(workspace, "shop", LOOSE, **own)
    match change:
        case "source":
            own["interactions"].write_text("user_id,item_id,timestamp\nu,i,5\n")
        case "settings":
            chosen = DataSettings(min_user=2, min_item=1)
        case "damage":
            (workspace.processed("shop") / "users.parquet").write_bytes(b"PAR1")
        case "picture":
            (tmp_path / "x.png").write_bytes(b"x")
    build_tables(workspace, "shop", chosen, **own, reporter=reporter)
    tables = read_tables(workspace, "shop")
    assert not any("were kept" in line for line in reporter.lines)
    assert tables.manifest["settings"]["min_user"] == chosen.min_user
    assert len(tables.user_id) == (1 if change == "source" else 2)
    assert tables.items["image"].to_pylist()[0] == ("x.png" if change == "picture" else None)


def test_an_own_domain_is_made_anew_from_the_files_it_remembers(tmp_path):
    own, workspace = write_own(tmp_path), Workspace(tmp_path / "w")
    build_tables(workspace, "shop", LOOSE, **own)
    own["interactions"].write_text("user_id,item_id,timestamp\nu,i,5\n")
    assert build_tables(workspace, "shop", LOOSE)["rows"] == 1
    own["items"].unlink()
    with pytest.raises(DataError, match=r"things\.csv is missing") as caught:
        build_tables(workspace, "shop", LOOSE)
    assert "--interactions FILE --items FILE --domain shop" in caught.value.hint


def test_failed_build_leaves_the_old_tables(tmp_path):
    own, workspace = write_own(tmp_path), Workspace(tmp_path)
    build_tables(workspace, "shop", LOOSE, **own)
    before = {path: path.read_bytes() for path in workspace.processed("shop").iterdir()}
    own["interactions"].write_text("user_id,item_id,timestamp\nu,i,five\n")
    with pytest.raises(DataError, match="line 2"):
        build_tables(workspace, "shop", LOOSE, **own)
    assert {path: path.read_bytes() for path in workspace.processed("shop").iterdir()} == before


def test_failed_first_build_leaves_nothing(tmp_path):
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(DataError):
        build_tables(workspace, "shop", LOOSE, **write_own(tmp_path, interactions="user_id,item_id\nu,i\n"))
    assert not workspace.root.exists()


def test_empty_after_the_k_core_says_the_counts_and_the_settings(tmp_path):
    with pytest.raises(DataError) as caught:
        build_tables(Workspace(tmp_path), "shop", DataSettings(), **write_own(tmp_path))
    assert "read: 1 users, 2 items, 2 rows" in str(caught.value)
    assert "k-core: 0 users, 0 items, 0 rows" in str(caught.value)
    assert "data.min_user (now 5)" in caught.value.hint
    assert "data.min_item (now 5)" in caught.value.hint
    assert not (tmp_path / "data").exists()


def test_ids_of_two_files_that_do_not_meet(tmp_path):
    with pytest.raises(DataError, match="items in metadata: 0 users") as caught:
        build_tables(Workspace(tmp_path), "shop", LOOSE, **write_own(tmp_path, items="item_id,text\n7,Bond\n"))
    assert "compare the item ids" in caught.value.hint


def test_missing_raw_files_name_the_download(tmp_path):
    workspace = Workspace(tmp_path)
    write_raw(workspace, "magazine", [("i", "u", "1.0", 1)], [{"asin": "i"}])
    metadata = workspace.raw("magazine") / "meta_Magazine_Subscriptions.json.gz"
    metadata.unlink()
    with pytest.raises(DataError) as caught:
        build_tables(workspace, "magazine", LOOSE)
    assert caught.value.problems == (f"{metadata} is missing",)
    assert caught.value.hint == f"mmm4rec download --domain magazine --workspace {tmp_path}"
    with pytest.raises(DataError) as caught:
        build_tables(workspace, "fhckm", LOOSE)
    assert len(caught.value.problems) == 10
    assert caught.value.hint == f"mmm4rec download --mix fhckm --workspace {tmp_path}"


def test_plain_metadata_serve_as_well_as_packed(tmp_path):
    workspace = Workspace(tmp_path)
    write_raw(workspace, "magazine", [("i", "u", "1.0", 1)], [])
    (workspace.raw("magazine") / "meta_Magazine_Subscriptions.json.gz").unlink()
    (workspace.raw("magazine") / "meta_Magazine_Subscriptions.json").write_text('{"asin": "i", "title": "Tea"}\n')
    build_tables(workspace, "magazine", LOOSE)
    assert read_tables(workspace, "magazine").items["title"].to_pylist() == ["Tea"]


def test_usage(tmp_path):
    workspace, own = Workspace(tmp_path), write_own(tmp_path)
    with pytest.raises(UsageError, match="unknown domain 'magasine'"):
        build_tables(workspace, "magasine", LOOSE)
    with pytest.raises(UsageError, match="without --items"):
        build_tables(workspace, "shop", LOOSE, interactions=own["interactions"])
    with pytest.raises(UsageError, match="without --interactions"):
        build_tables(workspace, "shop", LOOSE, items=own["items"])
    with pytest.raises(UsageError, match="domain name"):
        build_tables(workspace, "my shop", LOOSE, **own)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_formats_of_own_tables_give_the_same_tables(tmp_path, kind):
    log = pl.DataFrame({"who": ["u", "é"], "what": ["007", "i"], "when": [5, 6], "more": [None, "x"]})
    things = pl.DataFrame({"what": ["i", "007"], "title": ["Tea", None], "brand": ["Ä", "B"], "extra": [1, 2]})
    for name, frame in (("log", log), ("things", things)):
        path = tmp_path / f"{name}.{kind}"
        {"csv": frame.write_csv, "parquet": frame.write_parquet, "jsonl": frame.write_ndjson}[kind](path)
    columns = {"user_id": "who", "item_id": "what", "timestamp": "when"}
    chosen = DataSettings(min_user=1, min_item=1, columns=columns)
    workspace = Workspace(tmp_path)
    build_tables(workspace, "shop", chosen, interactions=tmp_path / f"log.{kind}", items=tmp_path / f"things.{kind}")
    tables = read_tables(workspace, "shop")
    assert tables.raw_user_ids == ["u", "é"]
    assert tables.raw_item_ids == ["007", "i"]
    assert (tables.item_id.tolist(), tables.timestamp.tolist()) == ([1, 2], [5, 6])
    assert tables.items["text"].to_pylist() == ["Brand: B.", "Title: Tea. Brand: Ä."]


SHARED = os.environ.get("MMM4REC_TEST_DATA")
real = pytest.mark.skipif(not SHARED, reason="MMM4REC_TEST_DATA does not point to the real data")


@real
def test_magazine_has_the_published_counts(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.raw("magazine").parent.mkdir(parents=True)
    workspace.raw("magazine").symlink_to(Path(SHARED) / "amazon-raw")
    manifest = build_tables(workspace, "magazine", DataSettings())
    assert [count["rows"] for count in manifest["counts"]] == [2375, 2328, 2267, 1950]
    assert (manifest["users"], manifest["items"], manifest["rows"]) == (284, 126, 1950)
    assert round(manifest["tied_share_read"], 2) == 0.69
    items = read_tables(workspace, "magazine").items
    assert not any("<" in (text or "") for text in items["title"].to_pylist() + items["text"].to_pylist())


@real
def test_movielens_has_its_counts_and_posters(tmp_path):
    folder, reporter = Path(SHARED) / "movielens-posters", Listening()
    workspace = Workspace(tmp_path)
    manifest = build_tables(
        workspace,
        "ml100k",
        DataSettings(),
        interactions=folder / "interactions.csv",
        items=folder / "items.parquet",
        reporter=reporter,
    )
    assert (manifest["users"], manifest["items"], manifest["rows"]) == (943, 1349, 99287)
    assert manifest["counts"][0] | {"step": ""} == {"step": "", "users": 943, "items": 1682, "rows": 100_000}
    assert any("Amazon's order" in line for line in reporter.lines)
    pictures = pq.read_table(workspace.processed("ml100k") / "items.parquet")["image"].to_pylist()
    assert sum(picture is not None for picture in pictures) == 1290
    assert all(Path(picture).is_file() for picture in pictures if picture)
