import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmm4rec_cli.errors import DataError
from mmm4rec_cli.features.store import (
    encoder_name,
    features_command,
    fingerprint,
    model_slug,
    read_features,
    write_features,
)
from mmm4rec_cli.settings.schema import FeatureSettings
from mmm4rec_cli.workspace import Workspace

IDENTITY = {"kind": "test", "widths": [3, 2]}


def example():
    text = np.arange(12, dtype=np.float32).reshape(4, 3)
    image = np.arange(8, dtype=np.float32).reshape(4, 2)
    return text, np.array([True, False, True, True]), image, np.array([False, True, True, False])


def write(path, catalogue="c" * 64, dtype="float32", **changes):
    text, has_text, image, has_image = example()
    given_ = {"text": text, "has_text": has_text, "image": image, "has_image": has_image} | changes
    write_features(
        path, **given_, encoder="tiny", identity=IDENTITY, catalogue=catalogue, source={"texts": 3}, dtype=dtype
    )
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "features" / "shop" / "tiny.parquet"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_at_their_item_ids_and_missing_ones_are_zero(path, dtype):
    features = read_features(write(path, dtype=dtype), "c" * 64, 4)
    assert features.text.dtype == features.image.dtype == np.float32
    assert features.text.tolist() == [[0, 0, 0], [0, 1, 2], [0, 0, 0], [6, 7, 8], [9, 10, 11]]
    assert features.image.tolist() == [[0, 0], [0, 0], [2, 3], [4, 5], [0, 0]]
    assert features.has_text.tolist() == [False, True, False, True, True]
    assert features.has_image.tolist() == [False, False, True, True, False]
    assert features.metadata["encoder"] == "tiny"
    assert features.metadata["source"] == {"texts": 3}


def test_the_file_has_the_contracts_columns_with_nulls(path):
    table = pq.read_table(write(path, dtype="float16"))
    assert table.schema.names == ["item_id", "text", "image"]
    assert table.schema.types == [pa.int32(), pa.list_(pa.float16(), 3), pa.list_(pa.float16(), 2)]
    assert table["text"].to_pylist()[1] is None
    assert table["image"].null_count == 2


def test_the_fingerprint_is_of_the_encoder_and_not_of_the_catalogue(path):
    one = read_features(write(path, catalogue="a" * 64), "a" * 64, 4)
    other = read_features(write(path, catalogue="b" * 64), "b" * 64, 4)
    assert one.fingerprint == other.fingerprint == fingerprint(IDENTITY)
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1}) != fingerprint({"a": 2, "b": 2})


def test_a_missing_file_names_the_command_that_makes_it(path):
    with pytest.raises(DataError) as caught:
        read_features(path, "c" * 64, 4)
    workspace = path.parents[3]
    assert caught.value.hint == f"mmm4rec preprocess --domain shop --encoder tiny --workspace {workspace}"


def test_the_command_that_makes_the_features_is_exact():
    pair = FeatureSettings(text_model="org/bert", image_model="./my vit")
    assert features_command(Workspace(Path()), "shop", pair) == (
        "mmm4rec preprocess --domain shop --encoder siglip --text-model org/bert --image-model './my vit'"
    )
    with pytest.raises(DataError) as caught:
        read_features(Path("data/features/fhckm/org--bert+clip.parquet"), "c" * 64, 4)
    assert caught.value.hint.startswith("mmm4rec preprocess --mix fhckm --encoder org--bert+clip --text-model org/bert")


def test_features_of_another_catalogue_are_refused(path):
    with pytest.raises(DataError, match="another catalogue"):
        read_features(write(path), "d" * 64, 4)


def test_another_number_of_items_is_refused(path):
    with pytest.raises(DataError, match="4 rows for a catalogue of 5 items"):
        read_features(write(path), "c" * 64, 5)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_a_data_error(path, keep):
    whole = write(path).read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(DataError, match="damaged"):
        read_features(path, "c" * 64, 4)


def test_a_flipped_byte_in_the_metadata_or_a_foreign_table_is_a_data_error(path):
    table = pq.read_table(write(path))
    document = json.loads(table.schema.metadata[b"mmm4rec"])
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(DataError, match="not a features file"):
        read_features(path, "c" * 64, 4)
    document["identity"]["widths"] = [9, 9]
    pq.write_table(table.replace_schema_metadata({"mmm4rec": json.dumps(document)}), path)
    with pytest.raises(DataError, match="disagree"):
        read_features(path, "c" * 64, 4)


@pytest.mark.parametrize(
    ("column", "values", "complaint"),
    [
        ("text", pa.array([[1.0], [2.0], [3.0], [4.0]], pa.list_(pa.float32())), "not a fixed-size list"),
        ("text", pa.array([[1.0], [None], [3.0], [4.0]], pa.list_(pa.float32(), 1)), "null elements"),
        ("text", pa.array([[1.0], [float("nan")], [3.0], [4.0]], pa.list_(pa.float32(), 1)), "NaN"),
        ("item_id", pa.array([1, 2, 4, 3], pa.int32()), "not in the order"),
        ("item_id", pa.array([1, 2, 3, 4], pa.int64()), "not int32"),
    ],
)
def test_columns_of_the_wrong_kind_are_data_errors(path, column, values, complaint):
    table = pq.read_table(write(path))
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, path)
    with pytest.raises(DataError, match=complaint):
        read_features(path, "c" * 64, 4)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (1e6, "float16")])
def test_numbers_that_cannot_be_stored_are_refused_and_leave_no_file(path, value, dtype):
    text = example()[0].copy()
    text[2, 1] = value
    with pytest.raises(DataError, match="item id 3"):
        write(path, dtype=dtype, text=text)
    assert not path.exists()


def test_rows_without_a_modality_may_hold_anything(path):
    text = example()[0].copy()
    text[1] = np.nan
    assert not read_features(write(path, text=text), "c" * 64, 4).text[2].any()


@settings(max_examples=30, deadline=None)
@given(
    data=hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(-9, 9, width=32)),
    seed=st.integers(0, 2**16),
)
def test_writing_and_reading_is_the_identity_on_present_rows(tmp_path_factory, data, seed):
    path = tmp_path_factory.mktemp("features") / "f.parquet"
    present = np.random.default_rng(seed).random(len(data)) < 0.5
    write_features(
        path, text=data, has_text=present, image=data, has_image=~present, encoder="e", identity={}, catalogue="",
        source={},
    )  # fmt: skip
    features = read_features(path, "", len(data))
    np.testing.assert_array_equal(features.text[1:], np.where(present[:, None], data, 0))
    np.testing.assert_array_equal(features.image[1:], np.where(present[:, None], 0, data))


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("siglip", "siglip"),
        ("google/siglip-base-patch16-224", "google--siglip-base-patch16-224"),
        ("/models/my model/", "my-model"),
        ("./clip", "clip"),
        ("../a/b", "b"),
        ("C:\\models\\vit", "vit"),
        ("..", "model"),
    ],
)
def test_ids_and_folders_become_clean_file_names(name, slug):
    assert model_slug(name) == slug


@pytest.mark.parametrize(
    ("given_", "name"),
    [
        ({}, "siglip"),
        ({"encoder": "sketch"}, "sketch"),
        ({"encoder": "org/clip"}, "org--clip"),
        ({"text_model": "org/bert"}, "org--bert+siglip"),
        ({"image_model": "./vit"}, "siglip+vit"),
        ({"text_model": "org/bert", "image_model": "org/vit"}, "org--bert+org--vit"),
        ({"encoder": "mine", "text_model": "org/bert", "image_model": "org/vit"}, "mine"),
        ({"encoder": "clip", "text_model": "org/bert", "image_model": "org/vit"}, "org--bert+org--vit"),
    ],
)
def test_the_settings_name_the_features_file(given_, name):
    assert encoder_name(FeatureSettings(**given_)) == name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("store", ["torch", "transformers", "polars", "sklearn", "PIL", "httpx"]),
        ("extract", ["torch", "transformers", "polars", "sklearn"]),
    ],
)
def test_importing_the_rooms_needs_neither_models_nor_polars(module, absent):
    code = f"import sys, mmm4rec_cli.features.{module}; sys.exit(str([m for m in {absent} if m in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
