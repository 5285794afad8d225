import datetime

import numpy as np
import polars as pl
import pytest

from mmm4rec_cli.data import interactions
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.settings.schema import Columns

SECONDS, MILLISECONDS = 1_393_372_800, 1_393_372_800_123


def own(path, content, unit="auto", **columns):
    if isinstance(content, pl.DataFrame):
        content.write_parquet(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return interactions.read_own_interactions(path, Columns(**columns), unit)


def rows(log):
    times = (log.time // log.ticks).tolist()
    return list(zip(log.users.gather(log.user), log.items.gather(log.item), times, strict=True))


def test_amazon_rows_keep_their_order_and_ids_their_spelling(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('007,u,5.0,10\r\n7,"a,b",1.0,5\n\n007,é,2.0,7\n', encoding="utf-8")
    log = interactions.read_ratings(path, "")
    assert rows(log) == [("u", "007", 10), ("a,b", "7", 5), ("é", "007", 7)]
    assert sorted(log.users) == ["a,b", "u", "é"]
    assert log.rating.tolist() == [5.0, 1.0, 2.0]
    assert (log.user.dtype, log.item.dtype, log.time.dtype) == (np.uint32, np.uint32, np.int64)


GOOD = "i,u,5.0,10\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD + "i,u,5.0\n" + GOOD, "line 2: 3 fields instead of 4"),
        (GOOD + "\n" + "i,u,5.0,10,9\n", "line 3: 5 fields instead of 4"),
        (GOOD + "i,u,5.0,tomorrow\n", "line 2: timestamp 'tomorrow' is not a whole number"),
        (GOOD + "i,u,5.0,\n", "line 2: timestamp is empty"),
        (GOOD + "i,u,good,10\n", "line 2: rating 'good' is not a number"),
        (GOOD + ",u,5.0,10\n", "line 2: item_id is empty"),
        (GOOD + "i,,5.0,10\n", "line 2: user_id is empty"),
        (GOOD + 'i,"",5.0,10\n', "line 2: user_id is empty"),
        (GOOD + "  ,u,5.0,10\n", "line 2: item_id is empty"),
        (GOOD + ",,,\n", "line 2: user_id is empty"),
        (GOOD + "i,u,5.0,-1\n", "line 2: timestamp -1 is negative"),
        (GOOD + "i,u,5.0,1393372800000\n", "line 2: timestamp 1393372800000 is after the year 2099 in seconds"),
        (GOOD + "i,u,5.0,99999999999999999999\n", "line 2: timestamp 99999999999999999999 is out of range"),
        (GOOD + "i,u,5.0,1_0\n", "line 2: timestamp cannot be read"),
        (GOOD + 'i,"u,5.0,10\n', "line 2: not CSV"),
        (GOOD.encode() + b"i,\xe9,5.0,10\n", "line 2: not UTF-8"),
        ("", "is empty"),
        ("\n\n", "has no rows"),
        ("item,user,rating,timestamp\n" + GOOD, "line 1: rating 'rating' is not a number"),
    ],
)
def test_broken_amazon_rows_name_file_line_and_fault(tmp_path, content, says):
    path = tmp_path / "r.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        interactions.read_ratings(path, "")
    assert str(path) in caught.value.problems[0]
    assert says in caught.value.problems[0]
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("user_id,item_id,timestamp\nu,i,5\nu,i\n", "line 3: 2 fields instead of 3"),
        ("user_id,item_id,timestamp\nu,i,5\nu,i,5,6\n", "line 3: 4 fields instead of 3"),
        ("user_id,item_id,timestamp,note\nu,i,5,\nu,i,5\n", "line 3: 3 fields instead of 4"),
        ("user_id,item_id,timestamp\nu,i,soon\n", "line 2: timestamp 'soon' is neither a number nor an ISO 8601 date"),
        ("user_id,item_id,timestamp\nu,i,5\nu,,5\n", "line 3: item_id is empty"),
        ("user_id,item_id,timestamp\nu,i,-5\n", "line 2: timestamp -5 is negative"),
        ("user_id,item_id,timestamp\nu,i,1969-12-31\n", "line 2: timestamp -86400000 is negative"),
        (
            "user_id,item_id,timestamp\nu,i,5\nu,i,2020-01-01\n",
            "line 2: timestamp '5' is a number, most others are dates",
        ),
        ("user_id,item_id,timestamp\nu,i,5\nu,i,6\nu,i,2020-01-01\n", "line 4: timestamp '2020-01-01' is a date, most"),
        (
            "user_id,item_id,timestamp\nu,i,5\nu,i,6\n\nu,i,soon\n",
            "line 5: timestamp 'soon' is neither a number nor an",
        ),
        ("user_id,item_id,timestamp\nu,i,5\nu,i,99999999999999999999\n", "line 3: timestamp 1e+20 looks like m"),
        (
            f"user_id,item_id,timestamp\nu,i,5\nu,i,5\nu,i,{MILLISECONDS}\n",
            "line 4: timestamp 1393372800123 looks like m",
        ),
        (
            f"user_id,item_id,timestamp\nu,i,5\nu,i,{MILLISECONDS}\nu,i,{MILLISECONDS}\n",
            "line 2: timestamp 5 looks like s",
        ),
        (
            "user,item_id,timestamp\nu,i,5\n",
            "column 'user_id' (user_id) is missing; found 'user', 'item_id', 'timestamp'",
        ),
        ("user_id,item_id,timestamp,user_id\nu,i,5,u\n", "column 'user_id' occurs twice"),
        ("user_id,item_id,timestamp\n", "has no rows"),
    ],
)
def test_broken_own_csv_names_file_line_and_fault(tmp_path, content, says):
    with pytest.raises(DataError) as caught:
        own(tmp_path / "log.csv", content)
    assert str(tmp_path / "log.csv") in caught.value.problems[0]
    assert says in caught.value.problems[0]


def test_own_csv_takes_other_column_names_in_any_place(tmp_path):
    log, notes = own(
        tmp_path / "log.csv", "\ufefft,x,what,who\n5,,007,u\n", timestamp="t", item_id="what", user_id="who"
    )
    assert rows(log) == [("u", "007", 5)]
    assert notes == [f"{tmp_path / 'log.csv'}: timestamps read as seconds"]


def test_headerless_amazon_order_is_recognised_and_said(tmp_path):
    log, notes = own(tmp_path / "log.csv", "7,ann,4.0,100\n8,bob,1,50\n")
    assert rows(log) == [("ann", "7", 100), ("bob", "8", 50)]
    assert "no header; read in Amazon's order item,user,rating,timestamp" in notes[0]
    with pytest.raises(DataError, match="line 2: rating 'x' is not a number"):
        own(tmp_path / "log.csv", "7,ann,4.0,100\n8,bob,x,50\n")


@pytest.mark.parametrize(
    ("texts", "seconds", "said"),
    [
        (["5", "1393372800"], [5, 1393372800], "seconds"),
        (["1393372800.75", "5"], [1393372800, 5], "seconds"),
        ([str(MILLISECONDS), "1393372801000"], [1393372800, 1393372801], "milliseconds"),
        (["2014-02-26", "2014-02-26 00:00:01"], [1393372800, 1393372801], "dates"),
        (["2014-02-26T02:00:00.999+02:00", "2014-02-25T19:00-0500"], [1393372800, 1393372800], "dates"),
        (["2014-02-26T00:00:00Z", "1970-01-01T00:00:00,5"], [1393372800, 0], "dates"),
    ],
)
def test_unit_of_times_is_found_out_and_said(tmp_path, texts, seconds, said):
    body = "".join(f'u,i,"{text}"\n' for text in texts)
    log, notes = own(tmp_path / "log.csv", "user_id,item_id,timestamp\n" + body)
    assert [row[2] for row in rows(log)] == seconds
    assert f"timestamps read as {said}" in notes[0]


@pytest.mark.parametrize("text", ["2014-02-30", "2014-13-01", "2014-02-26T25:00:00", "26.02.2014", "2014-02-26T"])
def test_dates_that_are_none_are_refused(tmp_path, text):
    with pytest.raises(DataError, match="line 3: timestamp"):
        own(tmp_path / "log.csv", f"user_id,item_id,timestamp\nu,i,2014-01-01\nu,i,{text}\n")


def test_a_set_unit_is_obeyed(tmp_path):
    head = "user_id,item_id,timestamp\n"
    assert rows(own(tmp_path / "a.csv", head + "u,i,5000\n", "ms")[0])[0][2] == 5
    with pytest.raises(DataError, match="after the year 2099 in seconds"):
        own(tmp_path / "b.csv", f"{head}u,i,{MILLISECONDS}\n", "s")
    with pytest.raises(DataError, match="'5' is not an ISO 8601 date"):
        own(tmp_path / "c.csv", head + "u,i,5\n", "iso")
    with pytest.raises(DataError, match="'2014-01-01' is not a number"):
        own(tmp_path / "d.csv", head + "u,i,2014-01-01\n", "s")


def test_milliseconds_order_rows_within_a_second(tmp_path):
    head = "user_id,item_id,timestamp\n"
    log, _ = own(tmp_path / "a.csv", f"{head}u,b,{MILLISECONDS + 1}\nu,a,{MILLISECONDS}\n")
    assert [row[1] for row in rows(interactions.in_order(log))] == ["a", "b"]
    assert interactions.tied_rows(log) == 2


@pytest.mark.parametrize(
    "times",
    [
        pl.Series([SECONDS, 5]),
        pl.Series([SECONDS, 5], dtype=pl.Float64),
        pl.Series([SECONDS * 1000 + 7, 5000]).cast(pl.Datetime("ms")),
        pl.Series([SECONDS * 10**9, 5 * 10**9]).cast(pl.Datetime("ns", "UTC")),
        pl.Series(["2014-02-26", "1970-01-01T00:00:05"]),
    ],
    ids=["integers", "floats", "datetimes", "zoned", "strings"],
)
def test_parquet_types_of_time(tmp_path, times):
    frame = pl.DataFrame({"user_id": [7, 8], "item_id": ["007", "7"], "timestamp": times})
    assert rows(own(tmp_path / "log.parquet", frame)[0]) == [("7", "007", SECONDS), ("8", "7", 5)]


def test_dates_of_parquet_are_midnights(tmp_path):
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": [datetime.date(2014, 2, 26)]})
    assert rows(own(tmp_path / "log.parquet", frame)[0]) == [("u", "i", SECONDS)]


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("user_id", [1.0, 2.0], "user_id is Float64, not a string or a whole number"),
        ("user_id", ["u", None], "row 2: no user_id"),
        ("timestamp", [None, 5], "row 1: no timestamp"),
        ("timestamp", [5.0, float("nan")], "row 2: timestamp nan is not a number"),
        ("timestamp", [5, -1], "row 2: timestamp -1 is negative (before 1970)"),
        ("item_id", ["i", " "], "row 2: item_id is empty"),
    ],
)
def test_broken_parquet_names_file_row_and_fault(tmp_path, column, values, says):
    columns = {"user_id": ["u", "v"], "item_id": ["i", "j"], "timestamp": [5, 6]} | {column: values}
    with pytest.raises(DataError) as caught:
        own(tmp_path / "log.parquet", pl.DataFrame(columns))
    assert caught.value.problems == (
        f"{tmp_path / 'log.parquet'}, {says}".replace("parquet, user_id is", "parquet: user_id is"),
    )


def test_parquet_that_is_none_or_lacks_a_column(tmp_path):
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        own(tmp_path / "log.parquet", b"PAR1 but not really")
    with pytest.raises(DataError, match="column 'timestamp'"):
        own(tmp_path / "log.parquet", pl.DataFrame({"user_id": ["u"], "item_id": ["i"]}))


def test_jsonl_numbers_become_their_digits(tmp_path):
    log, _ = own(
        tmp_path / "log.jsonl",
        '{"user_id": 7, "item_id": "007", "timestamp": 5}\n{"user_id": "u", "item_id": 7, "timestamp": 6.0}\n',
    )
    assert rows(log) == [("7", "007", 5), ("u", "7", 6)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"user_id": "u", "item_id": "i", "timestamp": }', "line 3: not a JSON object"),
        ('{"item_id": "i", "timestamp": 5}', "line 3: no user_id"),
        ('{"user_id": null, "item_id": "i", "timestamp": 5}', "line 3: no user_id"),
        ('{"user_id": "u", "item_id": "i", "timestamp": -5}', "line 3: timestamp -5 is negative"),
    ],
)
def test_broken_jsonl_names_file_line_and_fault(tmp_path, line, says):
    good = '{"user_id": "u", "item_id": "i", "timestamp": 5}\n\n'
    with pytest.raises(DataError) as caught:
        own(tmp_path / "log.jsonl", good + line + "\n")
    assert f"{tmp_path / 'log.jsonl'}, {says}" in caught.value.problems[0]


def test_unknown_format_and_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"unknown format '\.xlsx'"):
        own(tmp_path / "log.xlsx", "x")
    with pytest.raises(DataError, match="is missing"):
        interactions.read_own_interactions(tmp_path / "none.csv", Columns(), "auto")
