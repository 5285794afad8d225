import gzip
import json

import pytest

from mmm4rec_cli.data import amazon_2023
from mmm4rec_cli.data.domains import CATEGORIES
from mmm4rec_cli.data.preprocess import build_tables
from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.settings.schema import DataSettings

HEADER = "user_id,parent_asin,rating,timestamp\n"


def write_raw(workspace, ratings=None, metadata=None):
    folder = workspace.raw("scientific")
    folder.mkdir(parents=True)
    rows = [f"u{u},B{i},5.0,{1_500_000_000_000 + 1000 * i + 7}\n" for u in range(6) for i in range(6)]
    text = HEADER + "".join(rows) if ratings is None else ratings
    with gzip.open(folder / "Industrial_and_Scientific.csv.gz", "wt") as stream:
        stream.write(text)
    lines = [
        {
            "parent_asin": f"B{i}",
            "title": f"tool {i}",
            "store": "Acme",
            "features": ["is sharp"],
            "description": ["cuts", "well"],
            "images": [
                {"thumb": f"http://x/t{i}", "large": f"http://x/l{i}", "hi_res": f"http://x/h{i}" if i else None}
            ],
            "details": {"Brand": "Acme"},
        }
        for i in range(6)
    ]
    with gzip.open(folder / "meta_Industrial_and_Scientific.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines) if metadata is None else metadata)


def test_ratings_and_metadata_of_2023_become_the_same_tables(workspace):
    write_raw(workspace)
    manifest = build_tables(workspace, "scientific", DataSettings())
    tables = read_tables(workspace, "scientific")
    assert (manifest["users"], manifest["items"], manifest["rows"]) == (6, 6, 36)
    assert tables.raw_item_ids == [f"B{i}" for i in range(6)]
    assert tables.timestamp[:2].tolist() == [1_500_000_000, 1_500_000_001]
    row = tables.items.to_pylist()[0]
    assert row["text"] == "Title: tool 0. Brand: Acme. Description: is sharp cuts well."
    assert tables.items["image_url"].to_pylist()[:2] == ["http://x/l0", "http://x/h1"]


def test_domains_without_a_2023_category_are_refused():
    assert set(CATEGORIES) - set(amazon_2023.CATEGORIES_2023) == {"luxury", "pantry"}
    assert amazon_2023.category("fashion") == "Amazon_Fashion"
    with pytest.raises(UsageError, match="pantry"):
        amazon_2023.category("pantry")


@pytest.mark.parametrize(
    ("ratings", "metadata", "says"),
    [
        (HEADER + "ann,B1,5.0,soon\n", None, "line 2"),
        ("a,b\n1,2\n", None, "user_id"),
        (None, "not json\n", "line 1: not a JSON object"),
        (None, '{"title": "x"}\n', "line 1: no parent_asin"),
        (None, "[1]\n", "line 1: not a JSON object"),
    ],
)
def test_broken_files_are_named_with_their_line(workspace, ratings, metadata, says):
    write_raw(workspace, ratings, metadata)
    with pytest.raises(DataError, match=says):
        build_tables(workspace, "scientific", DataSettings())
    assert not workspace.processed("scientific").exists()


def test_a_cut_ratings_file_is_a_data_error(workspace):
    write_raw(workspace)
    path = workspace.raw("scientific") / "Industrial_and_Scientific.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut off or damaged"):
        build_tables(workspace, "scientific", DataSettings())
    assert not list(workspace.raw("scientific").glob(".ratings-*"))
