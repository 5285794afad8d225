import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmm4rec_cli.data import tables
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.workspace import Workspace


def small_tables():
    return {
        "interactions": pa.table(
            {
                "user_id": pa.array([0, 0, 1], pa.int32()),
                "item_id": pa.array([2, 1, 2], pa.int32()),
                "timestamp": pa.array([5, 5, 9], pa.int64()),
            }
        ),
        "items": pa.table(
            {
                "item_id": pa.array([1, 2], pa.int32()),
                "raw_item_id": ["007", "b"],
                "title": pa.array([None, "Tea"]),
                "text": pa.array([None, "Title: Tea."]),
                "image": pa.array([None, "data/raw/shop/images/b.jpg"]),
                "image_url": pa.array([None, None], pa.string()),
                "n_interactions": pa.array([1, 2], pa.int32()),
            }
        ),
        "users": pa.table(
            {
                "user_id": pa.array([0, 1], pa.int32()),
                "raw_user_id": ["ann", "é"],
                "n_interactions": pa.array([2, 1], pa.int32()),
            }
        ),
    }


@pytest.fixture
def workspace(tmp_path):
    workspace = Workspace(tmp_path)
    tables.write_tables(workspace, "shop", **small_tables(), manifest={"users": 2})
    return workspace


def replaced(table, name, values):
    index = table.schema.get_field_index(name)
    return table.set_column(index, name, pa.array(values, table.schema.field(name).type))


def test_what_was_written_is_read_back(workspace):
    read = tables.read_tables(workspace, "shop")
    assert (read.user_id.dtype, read.item_id.dtype, read.timestamp.dtype) == (np.int32, np.int32, np.int64)
    assert read.user_id.tolist() == [0, 0, 1]
    assert read.item_id.tolist() == [2, 1, 2]
    assert read.timestamp.tolist() == [5, 5, 9]
    assert read.raw_item_ids == ["007", "b"]
    assert read.raw_user_ids == ["ann", "é"]
    assert (read.n_users, read.n_items) == (2, 2)
    assert read.items.schema.equals(tables.ITEMS_SCHEMA)
    assert read.items["title"].to_pylist() == [None, "Tea"]
    assert read.manifest["users"] == 2
    assert read.manifest["fingerprint"] == read.fingerprint
    assert read.manifest["catalogue"] == read.catalogue
    assert sorted(path.name for path in workspace.processed("shop").iterdir()) == [
        "interactions.parquet",
        "items.parquet",
        "manifest.json",
        "users.parquet",
    ]


def test_catalogue_is_the_digest_of_count_lengths_and_bytes():
    by_hand = hashlib.sha256(
        b"\x02\0\0\0\0\0\0\0" + b"\x01\0\0\0\0\0\0\0" + b"\x02\0\0\0\0\0\0\0" + b"a" + "é".encode()
    )
    assert tables.catalogue_fingerprint(["a", "é"]) == by_hand.hexdigest()
    assert tables.catalogue_fingerprint(["a", "bc"]) != tables.catalogue_fingerprint(["ab", "c"])
    assert tables.catalogue_fingerprint(["a", "b"]) != tables.catalogue_fingerprint(["b", "a"])


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("interactions", "timestamp", [4, 5, 9]),
        ("interactions", "item_id", [1, 2, 2]),
        ("items", "raw_item_id", ["7", "b"]),
        ("items", "title", ["", "Tea"]),
        ("items", "text", [None, "Title: Coffee."]),
        ("items", "image_url", [None, "https://x/y.jpg"]),
        ("users", "raw_user_id", ["ann", "e"]),
    ],
)
def test_fingerprint_follows_every_content(workspace, tmp_path, table, column, values):
    changed = small_tables()
    changed[table] = replaced(changed[table], column, values)
    other = Workspace(tmp_path / "other")
    tables.write_tables(other, "shop", **changed, manifest={"users": 2})
    first, second = tables.read_tables(workspace, "shop"), tables.read_tables(other, "shop")
    assert first.fingerprint != second.fingerprint
    assert (first.catalogue == second.catalogue) is (column != "raw_item_id")


def test_places_of_pictures_are_set_without_changing_the_identity(workspace):
    before = tables.read_tables(workspace, "shop")
    manifest = tables.write_images(
        workspace, "shop", [str(workspace.root / "pics" / "a.png"), None], {"images": {"fetched": 1}}
    )
    after = tables.read_tables(workspace, "shop")
    assert after.items["image"].to_pylist() == ["pics/a.png", None]
    assert after.manifest == manifest
    assert (manifest["image_share"], manifest["images"]) == (0.5, {"fetched": 1})
    assert (after.fingerprint, after.catalogue) == (before.fingerprint, before.catalogue)


def test_pictures_outside_the_workspace_keep_their_absolute_path(tmp_path):
    workspace = Workspace(tmp_path / "w")
    assert tables.image_entry(workspace, tmp_path / "x.jpg") == str(tmp_path / "x.jpg")
    assert tables.image_entry(workspace, "data/x.jpg") == "data/x.jpg"


@pytest.mark.parametrize("name", ["interactions.parquet", "items.parquet", "users.parquet", "manifest.json"])
def test_missing_file_names_itself_and_the_command(workspace, name):
    path = workspace.processed("shop") / name
    path.unlink()
    with pytest.raises(DataError) as caught:
        tables.read_tables(workspace, "shop")
    assert str(path) in str(caught.value)
    assert caught.value.hint == (
        f"mmm4rec preprocess --interactions FILE --items FILE --domain shop --workspace {workspace.root}"
    )


def test_hint_is_the_exact_command_of_the_domain(tmp_path):
    here = Workspace(tmp_path)
    where = f"--workspace {tmp_path}"
    both = f"mmm4rec download --domain magazine {where} && mmm4rec preprocess --domain magazine {where}"
    assert tables.preprocess_command(here, "magazine") == both
    mix = f"mmm4rec download --mix fhckm {where} && mmm4rec preprocess --mix fhckm {where}"
    assert tables.preprocess_command(here, "fhckm") == mix
    here.raw("magazine").mkdir(parents=True)
    (here.raw("magazine") / "Magazine_Subscriptions.csv").touch()
    assert tables.preprocess_command(here, "magazine") == f"mmm4rec preprocess --domain magazine {where}"
    there = Workspace(Path("my shop"))
    assert tables.preprocess_command(there, "office").endswith(
        "mmm4rec preprocess --domain office --workspace 'my shop'"
    )


@pytest.mark.parametrize("name", ["interactions.parquet", "items.parquet", "users.parquet", "manifest.json"])
def test_truncated_file_is_a_data_error(workspace, name):
    path = workspace.processed("shop") / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=name):
        tables.read_tables(workspace, "shop")


def test_other_schema_names_each_column(workspace):
    path = workspace.processed("shop") / "interactions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["timestamp"]).set_column(0, "user_id", table["user_id"].cast("int64")), path)
    with pytest.raises(DataError) as caught:
        tables.read_tables(workspace, "shop")
    assert "column 'user_id' is int64, not int32" in caught.value.problems[0]
    assert "column 'timestamp' is missing" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("name", "column", "values", "says"),
    [
        ("interactions", "user_id", [0, 1, 0], "sorted"),
        ("interactions", "user_id", [0, 1, 2], "outside 0..1"),
        ("interactions", "item_id", [0, 1, 2], "outside 1..2"),
        ("interactions", "item_id", [3, 1, 2], "outside 1..2"),
        ("interactions", "timestamp", [6, 5, 9], "sorted"),
        ("interactions", "timestamp", [5, 6, 9], "not those"),
        ("items", "item_id", [0, 1], "1..2"),
        ("items", "n_interactions", [2, 1], "n_interactions"),
        ("users", "user_id", [1, 2], "0..1"),
        ("users", "n_interactions", [1, 2], "n_interactions"),
        ("users", "raw_user_id", ["ann", "e"], "not those"),
    ],
)
def test_tables_that_do_not_fit_one_another_are_refused(workspace, name, column, values, says):
    path = workspace.processed("shop") / f"{name}.parquet"
    pq.write_table(replaced(small_tables()[name], column, values), path)
    with pytest.raises(DataError, match=says):
        tables.read_tables(workspace, "shop")


def test_nulls_in_ids_are_refused(workspace):
    path = workspace.processed("shop") / "users.parquet"
    pq.write_table(replaced(small_tables()["users"], "raw_user_id", ["ann", None]), path)
    with pytest.raises(DataError, match="'raw_user_id' has nulls"):
        tables.read_tables(workspace, "shop")


def test_failed_writing_leaves_the_old_tables(workspace, monkeypatch):
    before = {path.name: path.read_bytes() for path in workspace.processed("shop").iterdir()}
    real = pq.write_table

    def fails_at_users(table, where, **options):
        if "raw_user_id" in table.column_names:
            raise OSError("disk full")
        real(table, where, **options)

    monkeypatch.setattr(pq, "write_table", fails_at_users)
    with pytest.raises(OSError, match="disk full"):
        tables.write_tables(workspace, "shop", **small_tables(), manifest={"users": 3})
    assert {path.name: path.read_bytes() for path in workspace.processed("shop").iterdir()} == before


KILLED = """
import os, sys
from pathlib import Path
import pyarrow.parquet as pq
from mmm4rec_cli.data import tables
from mmm4rec_cli.workspace import Workspace

root, allowed = Path(sys.argv[1]), int(sys.argv[2])
real, renamed = Path.replace, []

def replace(self, target):
    if len(renamed) == allowed:
        os._exit(9)
    renamed.append(target)
    return real(self, target)

Path.replace = replace
small = {name: pq.read_table(root / f"{name}.parquet") for name in ("interactions", "items", "users")}
tables.write_tables(Workspace(root), "shop", **small, manifest={"users": 3}, beside={"x.parquet": small["users"]})
"""


@pytest.mark.parametrize("renames", range(7))
def test_a_kill_at_any_rename_leaves_the_old_tables_or_the_new_ones(workspace, renames):
    small = small_tables()
    small["items"] = replaced(small["items"], "title", ["Cup", "Tea"])
    for name, table in small.items():
        pq.write_table(table, workspace.root / f"{name}.parquet")
    before = tables.read_tables(workspace, "shop")
    words = [sys.executable, "-c", KILLED, str(workspace.root), str(renames)]
    killed = subprocess.run(words, check=False, cwd=Path(__file__).parents[2])
    # The journal, three tables, one beside them, the manifest: the seventh rename does not come.
    assert killed.returncode == (9 if renames < 6 else 0)
    after = tables.read_tables(workspace, "shop")
    assert after.manifest["users"] == (3 if renames else 2)
    assert (after.fingerprint != before.fingerprint) == bool(renames)
    beside = tables.read_beside(workspace, "shop", after.manifest, "x.parquet")
    assert (beside is not None) == bool(renames)


def test_manifest_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        tables.write_tables(Workspace(tmp_path), "shop", **small_tables(), manifest={"share": float("nan")})
    assert not list(tmp_path.rglob("*.*"))


def test_manifest_is_plain_json(workspace):
    text = (workspace.processed("shop") / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text)["users"] == 2


def test_reading_needs_neither_polars_nor_torch():
    code = "import sys, mmm4rec_cli.data.tables; sys.exit(bool({'polars', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
