"""Every kind of broken file through the command line: a clear message and a code, or a counted skip; never a part."""

import gzip
import json

import numpy as np
import polars as pl
import pytest

from mmm4rec_cli.app import main

ROWS = [(f"u{u}", f"i{i}", 1_500_000_000 + 86_400 * i) for u in range(6) for i in range(6)]
HEADER = "user_id,item_id,timestamp\n"
GOOD = HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)
ITEMS = [{"item_id": f"i{i}", "text": f"thing {i}", "image": None} for i in range(6)]
ITEM_LINES = "".join(json.dumps(item) + "\n" for item in ITEMS)
AMAZON = "".join(f"{i},{u},5.0,{t}\n" for u, i, t in ROWS)
META = "".join(json.dumps({"asin": item["item_id"], "title": item["text"]}) + "\n" for item in ITEMS)
META_GZ = gzip.compress(META.encode())
BOMB = gzip.compress(b"{" + b" " * (80 << 20), 1)


def put(path, content):
    match content:
        case None:
            path.mkdir(parents=True)
        case pl.DataFrame():
            content.write_parquet(path)
        case str():
            path.write_text(content, encoding="utf-8")
        case _:
            path.write_bytes(content)


def log(name, content):
    """The user's interactions, broken; the items are sound."""

    def write(folder):
        put(folder / name, content)
        put(folder / "items.jsonl", ITEM_LINES)
        return ["--interactions", str(folder / name), "--items", str(folder / "items.jsonl"), "--domain", "shop"]

    return write


def items(name, content):
    """The user's items, broken; the interactions are sound."""

    def write(folder):
        put(folder / "log.csv", GOOD)
        put(folder / name, content)
        return ["--interactions", str(folder / "log.csv"), "--items", str(folder / name), "--domain", "shop"]

    return write


def amazon(ratings=AMAZON, metadata=META_GZ):
    """A category's two raw files."""

    def write(folder):
        raw = folder / "data" / "raw" / "magazine"
        raw.mkdir(parents=True)
        put(raw / "Magazine_Subscriptions.csv", ratings)
        put(raw / "meta_Magazine_Subscriptions.json.gz", metadata)
        return ["--domain", "magazine"]

    return write


def features(name, content):
    """The user's vectors, broken, for sound tables."""

    def write(folder):
        words = log("log.csv", GOOD)(folder)
        put(folder / name, content)
        return [*words, "--features", str(folder / name)]

    return write


def frame(**changes):
    columns = {"user_id": [u for u, _, _ in ROWS], "item_id": [i for _, i, _ in ROWS]}
    columns["timestamp"] = [t for _, _, t in ROWS]
    return pl.DataFrame(columns).with_columns(**{name: pl.Series(values) for name, values in changes.items()})


def vectors(**changes):
    """Lines of vectors; `changes` replace those of item i3."""
    rows = [{"item_id": f"i{i}", "text": [1.0, i], "image": [0.5]} for i in range(6)]
    rows[3] |= changes
    return "".join(json.dumps(row) + "\n" for row in rows)


def jsonl(**changes):
    """The sound interactions as lines, the fifth one changed."""
    rows = [{"user_id": u, "item_id": i, "timestamp": t} for u, i, t in ROWS]
    rows[4] |= changes
    return "".join(json.dumps(row) + "\n" for row in rows)


BROKEN = [
    ("short row", log("log.csv", GOOD + "u1,i1\n"), "line 38: 2 fields instead of 3"),
    ("long row", log("log.csv", GOOD + "u1,i1,5,6\n"), "line 38: 4 fields instead of 3"),
    ("open quote", log("log.csv", GOOD + '"u1,i1,5\n'), "line 38: not CSV"),
    ("text behind a quote", log("log.csv", GOOD + '"u1"x,i1,5\n'), "line 38: not CSV"),
    ("negative time", log("log.csv", GOOD + "u1,i1,-5\n"), "timestamp -5 is negative"),
    ("milliseconds among seconds", log("log.csv", GOOD + "u1,i1,1500000000000\n"), "looks like milliseconds"),
    ("seconds among milliseconds", log("log.csv", GOOD.replace("00\n", "00000\n") + "u,i,15\n"), "looks like seconds"),
    ("year 9999", log("log.csv", HEADER + "u1,i1,9999-12-31\n"), "after the year 2099"),
    ("date among numbers", log("log.csv", GOOD + "u1,i1,2020-01-01\n"), "is a date, most others are numbers"),
    ("month 13", log("log.csv", HEADER + "u1,i1,2020-13-01\n"), "neither a number nor an ISO 8601 date"),
    ("words for a time", log("log.csv", GOOD + "u1,i1,yesterday\n"), "'yesterday' is neither a number"),
    ("NaN in CSV", log("log.csv", GOOD + "u1,i1,NaN\n"), "line 38: timestamp 'NaN'"),
    ("infinity in CSV", log("log.csv", GOOD + "u1,i1,inf\n"), "line 38: timestamp 'inf'"),
    ("no user", log("log.csv", GOOD + ",i1,5\n"), "line 38: user_id is empty"),
    ("blank item", log("log.csv", GOOD + "u1,  ,5\n"), "line 38: item_id is empty"),
    ("UTF-16", log("log.csv", GOOD.encode("utf-16")), "line 1: not UTF-8"),
    ("Latin-1", log("log.csv", GOOD.encode() + "ü,i1,5\n".encode("latin-1")), "line 38: not UTF-8"),
    ("NUL bytes in an id", log("log.csv", GOOD + "u\0,i1,5\n"), "line 38: user_id holds a NUL"),
    ("huge field", log("log.csv", GOOD + "u" * 200_000 + ",i1\n"), "line 38: not CSV (field larger than"),
    ("column missing", log("log.csv", GOOD.replace("timestamp", "when")), "column 'timestamp' (timestamp) is missing"),
    ("column twice", log("log.csv", GOOD.replace("item_id", "user_id")), "column 'item_id' (item_id) is missing"),
    ("header alone", log("log.csv", HEADER), "has no rows"),
    ("empty file", log("log.csv", ""), "is empty"),
    ("blank lines alone", log("log.csv", "\n\n\n"), "has no rows"),
    ("folder for a file", log("log.csv", None), "is not a file"),
    ("unknown ending", log("log.xlsx", GOOD), "unknown format '.xlsx'"),
    ("gzip under a CSV's name", log("log.csv", gzip.compress(GOOD.encode())), "not UTF-8"),
    ("text under Parquet's name", log("log.parquet", GOOD), "cannot be read as Parquet"),
    ("Parquet without a column", log("log.parquet", frame().drop("timestamp")), "column 'timestamp'"),
    ("ids as floats", log("log.parquet", frame(user_id=np.arange(36.0))), "user_id is Float64"),
    ("ids as lists", log("log.parquet", frame(item_id=[["i"]] * 36)), "item_id is List(String)"),
    ("times as lists", log("log.parquet", frame(timestamp=[[5]] * 36)), "timestamp is List(Int64)"),
    ("times as truth values", log("log.parquet", frame(timestamp=[True] * 36)), "timestamp is Boolean"),
    ("NaN in Parquet", log("log.parquet", frame(timestamp=[1e9] * 35 + [float("nan")])), "row 36: timestamp nan"),
    ("infinity in Parquet", log("log.parquet", frame(timestamp=[1e9] * 35 + [float("inf")])), "row 36: timestamp inf"),
    ("null in Parquet", log("log.parquet", frame(user_id=["u"] * 35 + [None])), "row 36: no user_id"),
    ("Parquet without rows", log("log.parquet", frame().clear()), "has no rows"),
    ("array for an object", log("log.jsonl", jsonl() + "[1, 2]\n"), "line 37: not a JSON object"),
    ("list for an id", log("log.jsonl", jsonl(user_id=["u", "v"])), "line 5: no user_id"),
    ("object for an id", log("log.jsonl", jsonl(item_id={"id": "i"})), "line 5: no item_id"),
    ("number of 30 digits for an id", log("log.jsonl", jsonl(item_id=10**29 + 1)), "line 5: no item_id"),
    ("null for a time", log("log.jsonl", jsonl(timestamp=None)), "line 5: no timestamp"),
    ("NaN in JSON", log("log.jsonl", jsonl(timestamp=float("nan"))), "line 5: timestamp 'NaN'"),
    ("cut JSON line", log("log.jsonl", jsonl()[:-9]), "line 36: not a JSON object"),
    ("endless nesting", log("log.jsonl", jsonl() + "[" * 200_000 + "\n"), "line 37: not a JSON object"),
    (
        "unknown items",
        log("log.csv", HEADER + "u1,x9,5\n"),
        "no item of the interactions is known",
    ),
    ("too few rows", log("log.csv", HEADER + "u1,i1,5\n"), "lower data.min_user"),
    ("item twice", items("items.jsonl", ITEM_LINES + '{"item_id": "i3", "text": "again"}\n'), "'i3' occurs again"),
    ("item without id", items("items.jsonl", ITEM_LINES + '{"text": "what"}\n'), "line 7: no item_id"),
    ("items without text", items("items.csv", "item_id,price\ni1,5\n"), "column 'text' (text) is missing"),
    ("items in Parquet with a list id", items("items.pq", pl.DataFrame({"item_id": [["a"]], "text": "a"})), "is List"),
    ("items cut in gzip", items("items.jsonl", gzip.compress(ITEM_LINES.encode())[:-20]), "gzip stream is cut off"),
    ("ratings with a header", amazon("item,user,rating,time\n" + AMAZON), "line 1: rating 'rating' is not a number"),
    ("ratings in milliseconds", amazon(AMAZON.replace("00\n", "00000\n")), "after the year 2099 in seconds"),
    ("ratings with an HTML page", amazon("<html>\n<body>503</body>\n</html>\n"), "line 1: 1 fields instead of 4"),
    ("time beyond 64 bits", amazon(AMAZON + "i1,u1,5.0," + "9" * 30 + "\n"), "is out of range"),
    ("metadata empty", amazon(metadata=b""), "is empty"),
    ("metadata of blank lines", amazon(metadata=gzip.compress(b"\n\n")), "has no lines"),
    ("metadata a web page", amazon(metadata=b"<html>404</html>"), "not a gzip file"),
    ("metadata cut", amazon(metadata=META_GZ[:-30]), "gzip stream is cut off"),
    ("metadata damaged", amazon(metadata=META_GZ[:-5] + b"\xff" + META_GZ[-4:]), "gzip stream is damaged"),
    ("metadata with a tail", amazon(metadata=META_GZ + b"tail"), "gzip stream is damaged"),
    ("metadata a bomb", amazon(metadata=BOMB), "line 1: longer than 64 MiB"),
    ("metadata with code", amazon(metadata=gzip.compress(b"{'asin': print(1)}\n")), "line 1: neither a JSON object"),
    ("metadata without asin", amazon(metadata=gzip.compress(META.encode() + b"{}\n")), "line 7: no asin"),
    ("metadata in Latin-1", amazon(metadata=gzip.compress(b'{"asin": "\xfc"}\n')), "line 1: not UTF-8"),
    ("metadata with NUL", amazon(metadata=gzip.compress(b"\0\0\0\n")), "line 1: neither a JSON object"),
    ("metadata a folder", amazon(metadata=None), "is not a file"),
]

BROKEN_FEATURES = [
    ("uneven widths", features("v.jsonl", vectors(text=[1.0])), "vectors of different widths"),
    ("infinite number", features("v.jsonl", vectors(image=[1e999])), "v.jsonl"),
    ("words for numbers", features("v.jsonl", vectors(text="warm")), "cannot be read"),
    ("vector of nothing", features("v.jsonl", vectors(text=[])), "vectors of different widths, or empty ones"),
    (
        "id of another",
        features("v.jsonl", vectors().replace(': "i', ': "j')),
        "none of its 6 ids",
    ),
    ("id twice", features("v.jsonl", vectors(item_id="i1")), "rows repeat an item_id, 'i1'"),
    ("no vectors", features("v.parquet", pl.DataFrame({"item_id": ["i1"]})), "no vectors"),
    ("text for Parquet", features("v.parquet", "hello"), "cannot be read"),
]

TAKEN = [
    ("byte order mark", log("log.csv", "\ufeff" + GOOD), 36),
    ("carriage returns", log("log.csv", GOOD.replace("\n", "\r\n").encode()), 36),
    ("blank lines between", log("log.csv", GOOD.replace("\nu3", "\n\nu3")), 36),
    ("duplicates", log("log.csv", GOOD + GOOD.removeprefix(HEADER)), 36),
    ("quoted ids", log("log.csv", GOOD.replace("u1", '"u,1"')), 36),
    ("no last newline", log("log.csv", GOOD.removesuffix("\n")), 36),
    ("unknown item", log("log.csv", GOOD + "u1,i99,1500000000\n"), 36),
    ("Python literals", amazon(metadata=gzip.compress(META.replace('"', "'").encode())), 36),
    ("metadata twice", amazon(metadata=META_GZ + META_GZ), 36),
    ("half a surrogate", amazon(metadata=gzip.compress(META.replace("thing", "\\ud83d thing").encode())), 36),
    ("picture not there", items("items.jsonl", ITEM_LINES.replace("null", '"gone.png"')), 36),
]


def call(folder, words, capsys):
    code = main(["preprocess", *words, "--no-images", *([] if "--features" in words else ["--skip-features"]),
                 "--workspace", str(folder)])  # fmt: skip
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert not list(folder.rglob("*.part"))
    return code, out, err


@pytest.mark.parametrize(("write", "says"), [pytest.param(*case[1:], id=case[0]) for case in BROKEN])
def test_broken_tables_are_refused_with_their_fault_and_leave_nothing(write, says, tmp_path, capsys):
    code, _, err = call(tmp_path, write(tmp_path), capsys)
    assert code == 3, err
    assert says in err
    assert len(err) < 1000
    assert not (tmp_path / "data" / "processed").exists()


@pytest.mark.parametrize(("write", "says"), [pytest.param(*case[1:], id=case[0]) for case in BROKEN_FEATURES])
def test_broken_vectors_are_refused_with_their_fault_and_leave_no_features(write, says, tmp_path, capsys):
    code, _, err = call(tmp_path, write(tmp_path), capsys)
    assert code == 3, err
    assert says in err
    assert not (tmp_path / "data" / "features").exists()


@pytest.mark.parametrize(("write", "rows"), [pytest.param(*case[1:], id=case[0]) for case in TAKEN])
def test_odd_but_sound_files_are_taken(write, rows, tmp_path, capsys):
    code, _, err = call(tmp_path, write(tmp_path), capsys)
    assert code == 0, err
    [manifest] = (tmp_path / "data" / "processed").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["rows"] == rows
