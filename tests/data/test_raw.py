import gzip
import json

import pytest

from mmm4rec_cli.data import raw
from mmm4rec_cli.errors import DataError


def decode(path, literals=True):
    return [
        (number, raw.scalar(item.get("asin")), raw.joined(item.get("title")), raw.strings(item.get("image")))
        for number, item in raw.objects(path, "fetch it", literals=literals)
    ]


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_json_python_literals_and_their_mixture_are_read_in_order(tmp_path):
    path = write(
        tmp_path / "meta.json",
        '{"asin": "007", "title": "A \\u00e9 \\ud83d\\ude00", "image": ["x", "y"], "price": {"now": [1, 2]}}',
        "{'asin': 'b', 'title': \"It's\", 'image': ['x'], 'salesRank': {'Toys': 1}, 'gone': None, 'ok': True}",
        "",
        '{"asin": "c", "title": null, "price": NaN}',
        '{"asin": "d", "title": ["two", "parts"], "image": "lone"}',
        "{ 'asin': 'e', 'title': 'back\\slash \\d' }",
    )
    assert decode(path) == [
        (1, "007", "A é 😀", ["x", "y"]),
        (2, "b", "It's", ["x"]),
        (4, "c", None, None),
        (5, "d", "two parts", ["lone"]),
        (6, "e", "back\\slash \\d", None),
    ]


def test_gzip_is_told_by_its_bytes_and_pieces_join_without_a_seam(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "_PIECE_BYTES", 7)
    lines = [json.dumps({"asin": f"é{number}"}, ensure_ascii=False) for number in range(50)]
    packed = tmp_path / "meta.json"
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert [(row[0], row[1]) for row in decode(packed)] == [(number + 1, f"é{number}") for number in range(50)]


def test_byte_order_mark_and_carriage_returns_are_no_content(tmp_path):
    path = tmp_path / "meta.json"
    path.write_bytes(b'\xef\xbb\xbf{"asin": "a"}\r\n\r\n{"asin": "b"}\r\n')
    assert [(row[0], row[1]) for row in decode(path)] == [(1, "a"), (3, "b")]


def test_one_refused_line_among_many_is_found(tmp_path):
    lines = [f'{{"asin": "{number}"}}' for number in range(1000)]
    lines[617] = '{"asin": "617", "title": NaN}'
    assert decode(write(tmp_path / "meta.json", *lines))[617] == (618, "617", "NaN", None)
    lines[617] = '{"asin": "617"'
    with pytest.raises(DataError, match=r"meta\.json, line 618: neither a JSON object nor a Python dictionary"):
        decode(write(tmp_path / "meta.json", *lines))


@pytest.mark.parametrize("line", ['{"asin": "a"}, {"asin": "b"}', "[1]", "5", "{'a'", "__import__('os').getcwd()"])
def test_what_is_no_object_is_refused_with_its_line(tmp_path, line):
    with pytest.raises(DataError, match="line 2: "):
        decode(write(tmp_path / "meta.json", '{"asin": "x"}', line))


def test_literals_are_refused_where_only_json_is_expected(tmp_path):
    with pytest.raises(DataError, match="line 1: not a JSON object"):
        decode(write(tmp_path / "items.jsonl", "{'asin': 'x'}"), literals=False)


def test_cut_gzip_stream(tmp_path):
    path = tmp_path / "meta.json.gz"
    packed = gzip.compress(b"".join(b'{"asin": "%d%s"}\n' % (n, bytes(str(n * 7919), "ascii")) for n in range(5000)))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"meta\.json\.gz: its gzip stream is cut off after [\d,]+ bytes$") as caught:
        decode(path)
    assert caught.value.hint == "fetch it"


def test_damaged_gzip_stream(tmp_path):
    path = tmp_path / "meta.json.gz"
    packed = bytearray(gzip.compress(b'{"asin": "a"}\n' * 100))
    packed[-6] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(DataError, match="gzip stream is damaged"):
        decode(path)


@pytest.mark.parametrize(
    ("content", "says"), [(b"<html>503</html>", "not a gzip file"), (b"", "is empty"), (None, "is missing")]
)
def test_no_gzip_empty_or_missing(tmp_path, content, says):
    path = tmp_path / "meta.json.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        decode(path)


def test_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "meta.json"
    path.write_bytes(b'{"asin": "a"}\n{"asin": "\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        decode(path)
