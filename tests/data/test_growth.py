"""Tables that grow: what was there stays, what comes in is what the k-core of old and new lets in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmm4rec_cli.app import main
from mmm4rec_cli.data.growth import append_to_tables
from mmm4rec_cli.data.preprocess import build_tables
from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.reporter import SilentReporter
from mmm4rec_cli.settings.schema import DataSettings

CORE = DataSettings(min_user=2, min_item=2)
DAY = 86_400
FIRST = [(u, i, DAY * (1 + n)) for u in ("ann", "eve") for n, i in enumerate(("b", "d", "é"))]
LONELY = [("bob", "b", DAY), ("ann", "z", DAY)]
"""A user and an item that the first k-core drops."""


def write(path, rows):
    lines = "".join(f"{user},{item},{time}\n" for user, item, time in rows)
    path.write_text("user_id,item_id,timestamp\n" + lines, encoding="utf-8")
    return path


def write_items(path, names):
    lines = (json.dumps({"item_id": name, "text": f"about {name}"}) + "\n" for name in names)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def shop(workspace):
    log = write(workspace.root / "log.csv", FIRST + LONELY)
    items = write_items(workspace.root / "items.jsonl", ["b", "d", "é", "z", "idle"])
    build_tables(workspace, "shop", CORE, interactions=log, items=items)
    return workspace


def append(workspace, rows, items=None):
    log = write(workspace.root / "more.csv", rows)
    new = None if items is None else write_items(workspace.root / "new.jsonl", items)
    return append_to_tables(workspace, "shop", CORE, log, items=new)


def rows_of(tables):
    columns = zip(tables.user_id, tables.item_id - 1, tables.timestamp.tolist(), strict=True)
    return [(tables.raw_user_ids[user], tables.raw_item_ids[item], time) for user, item, time in columns]


def test_new_rows_of_known_users_and_items_stand_in_the_order_of_time(shop):
    append(shop, [("eve", "b", 2 * DAY), ("eve", "é", 0)])
    tables = read_tables(shop, "shop")
    assert tables.raw_user_ids == ["ann", "eve"]
    assert tables.raw_item_ids == ["b", "d", "é"]
    # Of one second, what was there stays before what came.
    expected = [("eve", "é", 0), ("eve", "b", DAY), ("eve", "d", 2 * DAY), ("eve", "b", 2 * DAY), ("eve", "é", 3 * DAY)]
    assert rows_of(tables) == [row for row in FIRST if row[0] == "ann"] + expected
    assert tables.items["n_interactions"].to_pylist() == [3, 2, 3]


def test_new_ids_lie_behind_the_old_ones_by_raw_id(shop):
    before = read_tables(shop, "shop")
    new = [(user, item, 9 * DAY) for user in ("zoe", "abe") for item in ("c", "a")]
    manifest = append(shop, new, items=["c", "a"])
    tables = read_tables(shop, "shop")
    assert tables.raw_user_ids == [*before.raw_user_ids, "abe", "zoe"]
    assert tables.raw_item_ids == [*before.raw_item_ids, "a", "c"]
    assert tables.items["text"].to_pylist()[3:] == ["about a", "about c"]
    assert rows_of(tables)[: len(before.user_id)] == rows_of(before)
    assert manifest["appended"][0]["added"] == {"users": 2, "items": 2, "rows": 4}
    assert (manifest["users"], manifest["items"], manifest["rows"]) == (4, 5, 10)
    assert manifest["text_share"] == 1


def test_what_is_too_rare_waits_until_it_is_not(shop):
    append(shop, [("new", "b", DAY), ("ann", "new", DAY)], items=["new"])
    assert read_tables(shop, "shop").n_users == 2
    # bob and z were left out when the tables were made, the new ones by the first file.
    append(shop, [("bob", "d", 2 * DAY), ("eve", "z", DAY), ("new", "d", 2 * DAY), ("eve", "new", DAY)])
    tables = read_tables(shop, "shop")
    assert tables.raw_user_ids == ["ann", "eve", "bob", "new"]
    assert tables.raw_item_ids == ["b", "d", "é", "new", "z"]
    assert tables.items["text"].to_pylist()[3:] == ["about new", "about z"]
    assert sorted(rows_of(tables)) == sorted(
        FIRST + LONELY + [("new", "b", DAY), ("ann", "new", DAY)]
        + [("bob", "d", 2 * DAY), ("eve", "z", DAY), ("new", "d", 2 * DAY), ("eve", "new", DAY)]
    )  # fmt: skip


def test_a_new_user_and_a_new_item_cannot_carry_each_other(shop):
    append(shop, [("new", "n1", DAY), ("new", "n2", DAY), ("ann", "n1", DAY)], items=["n1", "n2"])
    tables = read_tables(shop, "shop")
    assert (tables.n_users, tables.n_items) == (2, 3)


def test_the_same_file_again_changes_nothing_but_the_notes(shop):
    rows = [("ann", "b", 9 * DAY), ("bob", "é", 9 * DAY), ("new", "b", DAY), ("ann", "unknown", DAY)]
    append(shop, rows)
    once = read_tables(shop, "shop")
    manifest = append(shop, rows)
    assert read_tables(shop, "shop").fingerprint == once.fingerprint
    assert manifest["appended"][1]["added"] == {"users": 0, "items": 0, "rows": 0}
    assert manifest["appended"][1]["already_there"] == 4
    assert manifest["appended"][0]["rows_of_unknown_items"] == 1


def test_an_unknown_item_comes_in_when_it_becomes_known(shop):
    append(shop, [("ann", "late", DAY), ("eve", "late", DAY)])
    assert "late" not in read_tables(shop, "shop").raw_item_ids
    append(shop, [("ann", "b", 9 * DAY)], items=["late"])
    assert read_tables(shop, "shop").raw_item_ids[-1] == "late"


def test_categories_of_old_and_new_items_are_kept(workspace):
    def items(path, **names):
        path.write_text("".join(f'{{"item_id": "{i}", "text": "t", "categories": "{c}"}}\n' for i, c in names.items()))
        return path

    log, first = write(workspace.root / "log.csv", FIRST + LONELY), items(workspace.root / "a.jsonl", b="x|y", z="w")
    with (workspace.root / "a.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"item_id": "d", "text": "t"}\n{"item_id": "é", "text": "t"}\n')
    build_tables(workspace, "shop", CORE, interactions=log, items=first)
    assert read_tables(workspace, "shop").categories == [["x", "y"], None, None]
    more = write(workspace.root / "more.csv", [(u, i, DAY) for u in ("ann", "eve") for i in ("n", "z")])
    append_to_tables(workspace, "shop", CORE, more, items=items(workspace.root / "new.jsonl", n="v", b="later"))
    tables = read_tables(workspace, "shop")
    assert tables.raw_item_ids == ["b", "d", "é", "n", "z"]
    assert tables.categories == [["x", "y"], None, None, ["v"], ["w"]]


def test_tables_without_categories_stay_without(shop):
    append(shop, [("ann", "c", DAY), ("eve", "c", DAY)], items=["c"])
    tables = read_tables(shop, "shop")
    assert (tables.n_items, tables.categories) == (4, None)


def test_known_items_of_the_catalogue_keep_their_text(shop):
    before = read_tables(shop, "shop").items["text"].to_pylist()
    path = shop.root / "new.jsonl"
    path.write_text('{"item_id": "b", "text": "another text"}\n')
    log = write(shop.root / "more.csv", [("ann", "b", 9 * DAY)])
    append_to_tables(shop, "shop", CORE, log, items=path)
    assert read_tables(shop, "shop").items["text"].to_pylist() == before


def test_the_filters_are_those_that_the_tables_were_made_with(shop):
    log = write(shop.root / "more.csv", [("new", "b", DAY)])
    append_to_tables(shop, "shop", DataSettings(min_user=1, min_item=1), log)
    assert read_tables(shop, "shop").n_users == 2


def test_making_the_tables_again_keeps_what_was_appended(shop):
    append(shop, [("ann", "b", 9 * DAY)])
    grown = read_tables(shop, "shop").fingerprint
    build_tables(shop, "shop", CORE)
    assert read_tables(shop, "shop").fingerprint == grown


def test_making_them_anew_after_a_change_says_what_is_left_out(shop):
    append(shop, [("ann", "b", 9 * DAY)])
    said = []

    class Listening(SilentReporter):
        def warn(self, text):
            said.append(text)

    build_tables(shop, "shop", DataSettings(min_user=1, min_item=2), reporter=Listening())
    assert "append it again (more.csv)" in said[0]
    assert "appended" not in read_tables(shop, "shop").manifest


def test_a_mix_a_missing_domain_and_a_broken_file_are_refused(shop):
    log = write(shop.root / "more.csv", [("ann", "b", 9 * DAY)])
    with pytest.raises(UsageError, match="is a mix"):
        append_to_tables(shop, "fhckm", CORE, log)
    with pytest.raises(UsageError, match="unknown domain"):
        append_to_tables(shop, "shopp", CORE, log)
    before = read_tables(shop, "shop").fingerprint
    log.write_text("user_id,item_id,timestamp\nann,b\n")
    with pytest.raises(DataError, match="line 2: 2 fields instead of 3"):
        append_to_tables(shop, "shop", CORE, log)
    assert read_tables(shop, "shop").fingerprint == before


KILLED = """
import os, sys
from pathlib import Path
from mmm4rec_cli.data import growth
from mmm4rec_cli.reporter import SilentReporter
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

root, allowed = Path(sys.argv[1]), int(sys.argv[2])
real, renamed = Path.replace, []

def replace(self, target):
    if len(renamed) == allowed:
        os._exit(9)
    renamed.append(target)
    return real(self, target)

Path.replace = replace
settings = DataSettings(min_user=2, min_item=2)
growth.append_to_tables(Workspace(root), "shop", settings, root / "more.csv", items=root / "new.jsonl")
"""


@pytest.mark.parametrize("renames", [0, 1, 4])
def test_killed_it_leaves_the_old_tables_or_the_new_ones(shop, renames):
    write(shop.root / "more.csv", [("ann", "a", DAY), ("eve", "a", DAY)])
    write_items(shop.root / "new.jsonl", ["a"])
    old = read_tables(shop, "shop")
    words = [sys.executable, "-c", KILLED, str(shop.root), str(renames)]
    assert subprocess.run(words, check=False, cwd=Path(__file__).parents[2]).returncode == 9
    found = read_tables(shop, "shop")
    assert (found.fingerprint == old.fingerprint) == (renames == 0)
    append_to_tables(shop, "shop", CORE, shop.root / "more.csv", items=shop.root / "new.jsonl")
    assert read_tables(shop, "shop").raw_item_ids == ["b", "d", "é", "a"]


def test_a_run_made_before_is_evaluated_on_the_grown_tables(tmp_path, capsys):
    folder = tmp_path
    rows = [(f"u{u:02}", f"i{(u + n) % 8}", DAY * (n + 1)) for u in range(12) for n in range(6)]
    write(folder / "log.csv", rows)
    write_items(folder / "items.jsonl", [f"i{i}" for i in range(8)])
    more = [(f"u{u:02}", "a-new", 9 * DAY) for u in range(6)] + [("u-new", f"i{i}", 9 * DAY + i) for i in range(6)]
    write(folder / "more.csv", more)
    write_items(folder / "new.jsonl", ["a-new"])
    place = ["--workspace", str(folder)]
    encode = ["--domain", "shop", "--encoder", "sketch", "--no-images", *place]
    own = ["--interactions", str(folder / "log.csv"), "--items", str(folder / "items.jsonl")]
    assert main(["preprocess", *own, *encode]) == 0
    small = ["hidden_size=16", "inner_size=16", "d_state=4", "head_dim=4"]
    settings = [word for one in small for word in ("--set", f"model.{one}")]
    train = ["--pretrained", "none", "--epochs", "1", "--domain", "shop", "--set", "features.encoder=sketch"]
    assert main(["finetune", *train, *settings, *place]) == 0
    grown = ["--append", str(folder / "more.csv"), "--items", str(folder / "new.jsonl")]
    assert main(["preprocess", *grown, *encode]) == 0
    capsys.readouterr()
    assert main(["evaluate", *place, "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["n_users"], document["n_items"]) == (13, 9)
    assert "1 new" in err
