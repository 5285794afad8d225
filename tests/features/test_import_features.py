import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.features.extract import extract_features, import_features
from mmm4rec_cli.features.store import read_features
from mmm4rec_cli.settings.schema import FeatureSettings

ROWS = {
    "item_id": ["007", "b", "z"],
    "text": [[1.0, 2.0], None, [5.0, 6.0]],
    "image": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], None],
}


@pytest.fixture
def shop(write_domain):
    write_domain({"007": ("t", None), "b": ("t", None), "c": ("t", None)})


@pytest.fixture
def own(tmp_path):
    def write(rows=None, name="own.parquet", **types):
        path = tmp_path / name
        rows = ROWS if rows is None else rows
        if path.suffix == ".jsonl":
            lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            table = pa.table({key: pa.array(values, types.get(key)) for key, values in rows.items()})
            pq.write_table(table, path)
        return path

    return write


def read_back(workspace, path, domain="shop"):
    tables = read_tables(workspace, domain)
    return read_features(path, tables.catalogue, tables.n_items)


LIST_TYPES = [
    pa.list_(pa.float64()),
    pa.list_(pa.float32()),
    pa.large_list(pa.float16()),
    pa.list_(pa.float16(), 2),
    pa.list_(pa.float32(), 2),
]


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("name", ["own.parquet", "own.jsonl"])
def test_vectors_find_their_items_by_raw_id(workspace, own, reporter, name):
    path = import_features(workspace, "shop", own(name=name), "mine", reporter)
    assert path == workspace.features("shop", "mine")
    features = read_back(workspace, path)
    assert features.text.tolist() == [[0, 0], [1, 2], [0, 0], [0, 0]]
    assert features.image.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6], [0, 0, 0]]
    assert features.has_text.tolist() == [False, True, False, False]
    assert features.has_image.tolist() == [False, True, True, False]
    assert any("1 of 3 items have no row" in text for text in reporter.warnings)
    assert any("1 of 3 rows" in text for text in reporter.notes)
    assert features.metadata["source"]["without_row"] == 1
    assert not any("integers" in text for text in reporter.notes)


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("form", LIST_TYPES, ids=str)
def test_every_kind_of_list_is_taken_and_float16_stays(workspace, own, form):
    file = own({"item_id": ["b", "007"], "text": [[0.5, 1.5], None]}, text=form)
    path = import_features(workspace, "shop", file, "mine")
    assert read_back(workspace, path).text[2].tolist() == [0.5, 1.5]
    half = form.value_type == pa.float16()
    assert pq.read_schema(path).field("text").type == pa.list_(pa.float16() if half else pa.float32(), 2)


@pytest.mark.usefixtures("shop")
def test_a_modality_that_is_left_out_is_null_for_every_item(workspace, own):
    features = read_back(
        workspace, import_features(workspace, "shop", own({k: ROWS[k] for k in ("item_id", "text")}), "m")
    )
    assert features.image.shape == (4, 1)
    assert not features.has_image.any()


@pytest.mark.parametrize("name", ["own.parquet", "own.jsonl"])
def test_integer_ids_are_taken_as_text_and_it_is_said(workspace, write_domain, own, reporter, name):
    write_domain({"7": ("t", None), "12": ("t", None)})
    path = import_features(workspace, "shop", own({"item_id": [7, 12], "text": [[1.0], [2.0]]}, name), "mine", reporter)
    assert read_back(workspace, path).text.tolist() == [[0], [2], [1]]
    assert any("integers" in text for text in reporter.notes)


def test_ids_that_look_like_dates_stay_text(workspace, write_domain, own):
    write_domain({"2020-01-01": ("t", None)})
    path = import_features(workspace, "shop", own({"item_id": ["2020-01-01"], "text": [[1.0]]}, "own.jsonl"), "mine")
    assert read_back(workspace, path).has_text[1]


NAN, INF = float("nan"), float("inf")


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({"item_id": ["x", "y"], "text": [[1.0], [2.0]]}, "none of its 2 ids"),
        ({"item_id": ["007", "b", "b"], "text": [[1.0], [2.0], [3.0]]}, "repeat an item_id, 'b'"),
        ({"item_id": ["007", "b", "c"], "text": [[1.0], [2.0, 3.0], [4.0]]}, "different widths.*'b'"),
        ({"item_id": ["007", "b"], "text": [[1.0], [NAN]]}, "NaN.*'b'"),
        ({"item_id": ["007", "b"], "text": [None, [INF]]}, "infinite.*'b'"),
        ({"item_id": ["007", "b"], "text": [[1.0], [1e300]]}, "infinite.*'b'"),
        ({"item_id": ["007", "b"], "text": [[1.0, None], [1.0, 2.0]]}, "missing numbers.*'007'"),
        ({"item_id": ["007", None], "text": [[1.0], [2.0]]}, "1 rows have no item_id"),
        ({"item_id": [0.5], "text": [[1.0]]}, "not text"),
        ({"item": ["007"], "text": [[1.0]]}, "no column item_id"),
        ({"item_id": ["007"], "text": ["words"]}, "not lists of numbers"),
        ({"item_id": ["007"], "title": ["words"]}, "no vectors"),
        ({"item_id": ["007"], "text": [None]}, "no vectors"),
        ({"item_id": []}, "no rows"),
    ],
)
def test_what_cannot_be_right_is_refused_and_leaves_nothing(workspace, own, rows, complaint):
    with pytest.raises(DataError, match=complaint):
        import_features(workspace, "shop", own(rows), "mine")
    assert not workspace.features("shop", "mine").parent.exists()


@pytest.mark.usefixtures("shop")
def test_vectors_without_a_number_are_refused(workspace, own):
    file = own({"item_id": ["007"], "text": [[]]}, text=pa.list_(pa.float32()))
    with pytest.raises(DataError, match="at least 1"):
        import_features(workspace, "shop", file, "mine")


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing", None])
@pytest.mark.parametrize("name", ["own.parquet", "own.jsonl"])
def test_a_file_that_is_none_is_a_data_error(workspace, tmp_path, content, name):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        import_features(workspace, "shop", tmp_path / name, "mine")


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b"])
def test_a_name_that_is_no_file_name_is_a_usage_error(workspace, own, name):
    with pytest.raises(UsageError):
        import_features(workspace, "shop", own(), name)


@pytest.mark.usefixtures("shop")
def test_files_of_one_name_share_the_fingerprint_and_extraction_keeps_them(workspace, own, reporter, write_domain):
    path = import_features(workspace, "shop", own(), "sketch")
    before = path.read_bytes()
    assert extract_features(workspace, "shop", FeatureSettings(encoder="sketch"), "cpu", reporter) == path
    assert path.read_bytes() == before
    assert any("kept" in text for text in reporter.notes)
    write_domain({"b": ("t", None)}, domain="other")
    other = import_features(workspace, "other", own(), "sketch")
    assert read_back(workspace, path).fingerprint == read_back(workspace, other, "other").fingerprint
    renamed = import_features(workspace, "other", own(), "mine")
    assert read_back(workspace, path).fingerprint != read_back(workspace, renamed, "other").fingerprint


@pytest.mark.skipif("MMM4REC_TEST_DATA" not in os.environ, reason="MMM4REC_TEST_DATA names no folder with real data")
def test_real_embeddings_are_taken_whole(workspace, write_domain):
    file = Path(os.environ["MMM4REC_TEST_DATA"]) / "features" / "movielens-posters.parquet"
    given = pq.read_table(file)
    write_domain(dict.fromkeys(given["item_id"].to_pylist(), ("t", None)))
    features = read_back(workspace, import_features(workspace, "shop", file, "minilm"))
    assert features.text.shape == (1683, 384)
    assert features.image.shape == (1683, 1280)
    assert features.has_text.sum() == 1682
    assert features.has_image.sum() == len(given) - given["image"].null_count
    np.testing.assert_allclose(np.linalg.norm(features.text[1:], axis=1), 1, atol=1e-3)
