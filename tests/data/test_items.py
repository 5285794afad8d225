import gzip
import json

import polars as pl
import pytest

from mmm4rec_cli.data import items
from mmm4rec_cli.data.columns import ITEM_ID
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.settings.schema import Columns
from mmm4rec_cli.workspace import Workspace


@pytest.mark.parametrize(
    ("dirty", "usable"),
    [
        ('<span class="a-size-medium a-color-secondary"', None),
        ("<span", None),
        ("<b>Tea</b> &amp; <i>milk</i><br>and <p>more</p>", "Tea & milk and more"),
        ("H<sub>2</sub>O", "H2O"),
        ("&lt;p&gt;escaped&lt;/p&gt; &amp;amp; twice &#39;so&#x27; &eacute;&nbsp;&hellip;", "escaped & twice 'so' é …"),
        ("a < b and c > d", "a < b and c > d"),
        ("I <3 tea, 5 <6", "I <3 tea, 5 <6"),
        ("<!-- hidden -->shown<script>var x = '<b>';</script><style>p {}</style>", "shown"),
        ("Tea <a href='x'>here</a>", "Tea here"),
        ("Tea <a href='cut", "Tea"),
        ("var aPageStart = (new Date()).getTime();\nvar ue_t0 = 1;", None),
        (" \n\t ", None),
        ("***", None),
        ("", None),
        (None, None),
        ("no &such; entity, AT&T", "no &such; entity, AT&T"),
        ("\u200bTea\x00\ufeff leaves", "Tea leaves"),
        ("日本語", "日本語"),
    ],
)
def test_cleaning(dirty, usable):
    assert items.clean(pl.Series("x", [dirty], dtype=pl.String)).to_list() == [usable]


def test_cleaning_a_column_treats_each_text_alone():
    assert items.clean(pl.Series("x", ["<b", "b>", "&am", "p;"])).to_list() == [None, "b>", "&am", "p;"]


def texts(**columns):
    frame = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).with_columns(
        pl.lit("i").alias(ITEM_ID), image=pl.lit(None, pl.String), image_url=pl.lit(None, pl.String)
    )
    return items.with_texts(frame).select("title", "text").rows()


def test_parts_are_joined_with_their_markers():
    assert texts(
        title=["Tea", "Really?", None, "<span", None],
        brand=["Twin & Co.", None, "B", " ", None],
        description=["Black", "Yes!", None, "D", None],
    ) == [
        ("Tea", "Title: Tea. Brand: Twin & Co. Description: Black."),
        ("Really?", "Title: Really? Description: Yes!"),
        (None, "Brand: B."),
        (None, "Description: D."),
        (None, None),
    ]


def test_a_text_of_its_own_stands_as_it_is_and_parts_fill_in():
    assert texts(text=["own <b>words</b>", None], title=["T", "T"]) == [("T", "own words"), ("T", "Title: T.")]
    assert texts(text=["own", "<p>"]) == [(None, "own"), (None, None)]


def amazon(path, *entries, rated=("a", "b", "c"), wanted=("a", "b")):
    path.write_bytes(gzip.compress("".join(json.dumps(entry) + "\n" for entry in entries).encode()))
    return items.read_metadata(path, pl.Series(rated), pl.Series(wanted), "fetch it")


def test_first_line_of_an_item_counts_and_repeats_are_counted(tmp_path):
    found = amazon(
        tmp_path / "meta.json.gz",
        {"asin": "b", "title": "B"},
        {"asin": "b", "title": "later"},
        {"asin": "z"},
        {"asin": "c"},
    )
    assert found.known.sort().to_list() == ["b", "c"]
    assert found.frame.select("raw_item_id", "title").rows() == [("b", "B")]
    assert (found.lines, found.repeated) == (4, 1)


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"imageURLHighRes": ["h1", "h2"], "imageURL": ["l1"], "image": ["o1"]}, "h1"),
        ({"imageURLHighRes": [], "imageURL": ["l1", "l2"], "image": ["o1"]}, "l1"),
        ({"imageURLHighRes": [""], "imageURL": None, "image": ["o1"]}, "o1"),
        ({"image": "o1"}, "o1"),
        ({"image": []}, None),
        ({}, None),
    ],
)
def test_image_address_is_the_first_high_resolution_one_else_the_first(tmp_path, fields, url):
    found = amazon(tmp_path / "meta.json.gz", {"asin": "a"} | fields)
    assert found.frame.select("image", "image_url").rows() == [(None, url)]


def test_descriptions_in_parts_and_python_literals(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("{'asin': 'a', 'description': ['One', None, 'two'], 'brand': \"O'Hara\"}\n")
    found = items.read_metadata(path, pl.Series(["a"]), pl.Series(["a"]), "")
    assert found.frame["text"].to_list() == ["Brand: O'Hara. Description: One two."]


def test_metadata_without_asin_names_the_line(tmp_path):
    for entry in ({"title": "x"}, {"asin": None}, {"asin": " "}):
        with pytest.raises(DataError, match=r"line 2: no asin"):
            amazon(tmp_path / "meta.json.gz", {"asin": "a"}, entry)


def test_metadata_of_nothing_but_blank_lines(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="has no lines"):
        items.read_metadata(path, pl.Series(["a"]), pl.Series(["a"]), "")


def read_own(path, content):
    if isinstance(content, pl.DataFrame):
        content.write_parquet(path)
    else:
        path.write_text(content, encoding="utf-8")
    return items.read_own_items(path, Columns(), Workspace(path.parent / "w"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("i.csv", "item_id,text\na,x\nb,y\na,z\n", "line 4: item id 'a' occurs again (first in line 2); 1 such rows"),
        ("i.csv", "id,text\na,x\n", "column 'item_id' (item_id) is missing; found 'id', 'text'"),
        ("i.csv", "item_id,words\na,x\n", "column 'text' (text) is missing"),
        ("i.csv", "item_id,text\na,x\n,y\n", "line 3: item_id is empty"),
        ("i.csv", "item_id,text\na,x,y\n", "line 2: 3 fields instead of 2"),
        ("i.csv", "item_id,text\n", "has no rows"),
        ("i.csv", "", "is empty"),
        (
            "i.jsonl",
            '{"item_id": "a", "text": "x"}\n{"item_id": "a"}\n',
            "line 2: item id 'a' occurs again (first in line 1)",
        ),
        ("i.jsonl", '{"item_id": "a", "text": "x"}\n{"text": "y"}\n', "line 2: no item_id"),
        ("i.jsonl", '{"item_id": "a", "text": "x"}\n{"item_id: }\n', "line 2: not a JSON object"),
        ("i.jsonl", '{"item_id": "a"}\n', "column 'text' (text) is missing"),
        ("i.parquet", pl.DataFrame({"item_id": ["a", None], "text": ["x", "y"]}), "row 2: no item_id"),
        ("i.parquet", pl.DataFrame({"item_id": [7, 7], "text": ["x", "y"]}), "row 2: item id '7' occurs again"),
        ("i.parquet", pl.DataFrame({"item_id": [7.5], "text": ["x"]}), "item_id is Float64"),
        ("i.parquet", "text", "cannot be read as Parquet"),
        ("i.txt", "x", "unknown format '.txt'"),
    ],
)
def test_broken_own_items_name_file_place_and_fault(tmp_path, name, content, says):
    with pytest.raises(DataError) as caught:
        read_own(tmp_path / name, content)
    assert str(tmp_path / name) in caught.value.problems[0]
    assert says in caught.value.problems[0]


def test_quoted_newlines_stay_within_their_row(tmp_path):
    found = read_own(tmp_path / "i.csv", 'item_id,text\na,"one\n""two"""\n007,\n')
    assert found.frame.select("item_id", "text").rows() == [("a", 'one\n"two"'), ("007", None)]


def test_descriptions_may_be_lists(tmp_path):
    frame = pl.DataFrame({"item_id": [1], "description": [["one", None, "two"]]})
    assert read_own(tmp_path / "i.parquet", frame).frame["description"].to_list() == ["one two"]
    line = '{"item_id": 1, "description": ["one", null, "two"]}\n{"item_id": 2, "description": "three"}\n'
    assert read_own(tmp_path / "i.jsonl", line).frame["description"].to_list() == ["one two", "three"]


@pytest.mark.parametrize("name", ["i.csv", "i.jsonl", "i.parquet"])
def test_categories_are_a_list_or_a_text_parted_by_bars(tmp_path, name):
    content = {
        "i.csv": "item_id,text,categories\na,x,Tea| Black tea |\nb,y, | \nc,z,\n",
        "i.jsonl": '{"item_id": "a", "text": "x", "categories": ["Tea", "Black tea", ""]}\n'
        '{"item_id": "b", "categories": []}\n{"item_id": "c"}\n',
        "i.parquet": pl.DataFrame(
            {
                "item_id": ["a", "b", "c"],
                "text": ["x", "y", "z"],
                "categories": [["Tea", "Black tea"], [" ", None], None],
            }
        ),
    }[name]
    found = items.with_texts(read_own(tmp_path / name, content).frame)
    assert found["categories"].to_list() == [["Tea", "Black tea"], None, None]


def test_a_text_of_categories_in_other_formats_and_under_another_name(tmp_path):
    path = tmp_path / "i.jsonl"
    path.write_text('{"item_id": "a", "text": "x", "genres": "Drama|War"}\n')
    columns = Columns(categories="genres")
    assert items.read_own_items(path, columns, Workspace(tmp_path)).frame["categories"].to_list() == [["Drama", "War"]]
    pl.DataFrame({"item_id": ["a"], "text": ["x"], "genres": ["Drama|War"]}).write_parquet(tmp_path / "i.parquet")
    found = items.read_own_items(tmp_path / "i.parquet", columns, Workspace(tmp_path))
    assert found.frame["categories"].to_list() == [["Drama", "War"]]
    assert "categories" not in items.read_own_items(path, Columns(), Workspace(tmp_path)).frame


def test_pictures_are_found_beside_the_table(tmp_path):
    (tmp_path / "w" / "pics").mkdir(parents=True)
    (tmp_path / "w" / "pics" / "a b.png").write_bytes(b"x")
    (tmp_path / "own.jpg").write_bytes(b"x")
    paths = [
        "w/pics/a b.png",
        "./w/../own.jpg",
        str(tmp_path / "own.jpg"),
        "w/pics",
        "gone.png",
        "HTTP://x/y.png",
        " ",
        None,
    ]
    frame = pl.DataFrame({"item_id": range(8), "text": ["x"] * 8, "image": paths})
    found = read_own(tmp_path / "i.parquet", frame)
    outside = str(tmp_path / "own.jpg")
    assert found.frame["image"].to_list() == ["pics/a b.png", outside, outside, None, None, None, None, None]
    assert found.frame["image_url"].to_list() == [None] * 5 + ["HTTP://x/y.png", None, None]
    assert (found.named, found.missing) == (5, 2)
