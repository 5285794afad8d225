import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.errors import DataError, NetworkError
from mmm4rec_cli.features import encoders
from mmm4rec_cli.features.extract import extract_features
from mmm4rec_cli.features.sketch import SketchImage
from mmm4rec_cli.features.store import read_features
from mmm4rec_cli.settings.schema import FeatureSettings

SKETCH = FeatureSettings(encoder="sketch", batch_size=2)


@pytest.fixture
def shop(workspace, write_domain):
    """Six items: whole, whole, a copy of the first, no text, a broken picture, a picture that is not there."""
    folder = workspace.root / "data" / "raw" / "shop" / "images"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    Image.effect_noise((50, 50), 80).save(folder / "b.jpg")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "e.jpg").write_bytes((folder / "b.jpg").read_bytes()[:700])
    where = "data/raw/shop/images/"
    items = {
        "a": ("red cotton scarf", where + "a.png"),
        "b": ("a book about cats", where + "b.jpg"),
        "c": ("red cotton scarf", str(folder / "c.png")),
        "d": (None, where + "a.png"),
        "e": ("  ", where + "e.jpg"),
        "f": ("blue mug", where + "f.jpg"),
    }
    write_domain(items)
    return items


def features_of(workspace, path, domain="shop"):
    tables = read_tables(workspace, domain)
    return read_features(path, tables.catalogue, tables.n_items)


@pytest.mark.usefixtures("shop")
def test_each_item_gets_its_vectors_or_null(workspace, reporter):
    path = extract_features(workspace, "shop", SKETCH, "cpu", reporter)
    assert path == workspace.root / "data" / "features" / "shop" / "sketch.parquet"
    features = features_of(workspace, path)
    assert features.text.shape == (7, 128)
    assert features.image.shape == (7, 96)
    assert features.has_text[1:].tolist() == [True, True, True, False, False, True]
    assert features.has_image[1:].tolist() == [True, True, True, True, False, False]
    np.testing.assert_allclose(np.linalg.norm(features.text[features.has_text], axis=1), 1, rtol=1e-6)
    alone = encoders.load_encoder(SKETCH, "cpu", reporter)
    np.testing.assert_array_equal(features.text[2], alone.text.texts(["a book about cats"])[0])
    np.testing.assert_array_equal(features.text[3], features.text[1])
    np.testing.assert_array_equal(features.image[4], features.image[1])
    assert pq.read_table(path)["image"].null_count == 2


@pytest.mark.usefixtures("shop")
def test_missing_and_broken_pictures_are_counted_and_listed_with_their_reason(workspace, reporter):
    path = extract_features(workspace, "shop", SKETCH, "cpu", reporter)
    lines = path.with_suffix(".log").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["e", "f"]
    assert "e.jpg" in lines[0]
    assert "truncated" in lines[0]
    assert "no such file" in lines[1]
    assert any("2 pictures" in text for text in reporter.warnings)
    assert any("not for research" in text for text in reporter.warnings)
    assert features_of(workspace, path).metadata["source"]["unreadable_images"] == 2


@pytest.mark.usefixtures("shop")
def test_equal_texts_and_files_are_encoded_once(workspace, reporter):
    extract_features(workspace, "shop", SKETCH, "cpu", reporter)
    assert reporter.done == {"texts": 3, "images": 3}


@pytest.mark.usefixtures("shop")
def test_the_published_stand_ins_are_the_item_id_and_a_white_picture(workspace, reporter):
    settings = FeatureSettings(encoder="sketch", fallback="published")
    features = features_of(workspace, extract_features(workspace, "shop", settings, "cpu", reporter))
    assert features.has_text[1:].all()
    assert features.has_image[1:].all()
    encoder = encoders.load_encoder(settings, "cpu", reporter)
    white = encoder.image.images([encoder.image.prepare(Image.new("RGB", (200, 200), "white"))])[0]
    np.testing.assert_array_equal(features.image[5], white)
    np.testing.assert_array_equal(features.image[6], white)


def test_the_item_id_as_text_is_the_raw_one(workspace, write_domain):
    write_domain({"B00scarf": (None, None)})
    path = extract_features(workspace, "shop", FeatureSettings(encoder="sketch", fallback="published"), "cpu")
    expected = encoders.SketchText().texts(["B00scarf"])[0]
    np.testing.assert_array_equal(features_of(workspace, path).text[1], expected)


def test_a_domain_without_any_picture_or_text_has_columns_of_nulls_in_the_encoders_width(workspace, write_domain):
    write_domain({"a": (None, None), "b": (None, None)})
    features = features_of(workspace, extract_features(workspace, "shop", SKETCH, "cpu"))
    assert features.text.shape == (3, 128)
    assert features.image.shape == (3, 96)
    assert not features.has_text.any()
    assert not features.has_image.any()


def test_float16_is_stored_when_asked_for(workspace, write_domain):
    write_domain({"a": ("red mug", None)})
    path = extract_features(workspace, "shop", FeatureSettings(encoder="sketch", dtype="float16"), "cpu")
    assert str(pq.read_schema(path).field("text").type.value_type) == "halffloat"


@pytest.mark.usefixtures("shop")
def test_features_that_are_there_are_kept_until_something_changes(workspace, reporter, write_domain, shop):
    path = extract_features(workspace, "shop", SKETCH, "cpu", reporter)
    stamp = path.stat().st_mtime_ns

    def runs_again(settings=SKETCH):
        reporter.notes.clear()
        before = path.stat().st_mtime_ns
        extract_features(workspace, "shop", settings, "cpu", reporter)
        kept = any("kept" in text for text in reporter.notes)
        assert kept == (path.stat().st_mtime_ns == before)
        return not kept

    assert not runs_again()
    assert path.stat().st_mtime_ns == stamp
    images = workspace.root / "data" / "raw" / "shop" / "images"
    (images / "f.jpg").write_bytes((images / "b.jpg").read_bytes())
    assert runs_again()
    assert features_of(workspace, path).has_image[6]
    assert runs_again(FeatureSettings(encoder="sketch", dtype="float16"))
    assert runs_again()
    path.write_bytes(path.read_bytes()[:-20])
    assert runs_again()
    write_domain(shop | {"g": ("another", None)})
    assert runs_again()
    assert not runs_again()


@pytest.mark.usefixtures("shop")
def test_the_log_goes_when_every_picture_can_be_read(workspace):
    path = extract_features(workspace, "shop", SKETCH, "cpu")
    images = workspace.root / "data" / "raw" / "shop" / "images"
    for name in ("e.jpg", "f.jpg"):
        (images / name).write_bytes((images / "b.jpg").read_bytes())
    extract_features(workspace, "shop", SKETCH, "cpu")
    assert not path.with_suffix(".log").exists()


@pytest.mark.usefixtures("shop")
def test_other_weights_under_the_same_name_are_encoded_anew(workspace, model, reporter):
    folder = Path(model("siglip", seed=5, name="changing"))
    settings = FeatureSettings(encoder=str(folder), batch_size=2)
    path = extract_features(workspace, "shop", settings, "cpu", reporter)
    assert path.name == "changing.parquet"
    first = features_of(workspace, path)
    assert first.text.shape == first.image.shape == (7, 16)
    (folder / "model.safetensors").write_bytes((Path(model("siglip", seed=6)) / "model.safetensors").read_bytes())
    second = features_of(workspace, extract_features(workspace, "shop", settings, "cpu", reporter))
    assert second.fingerprint != first.fingerprint
    assert not np.allclose(second.image, first.image, atol=1e-3)


@pytest.mark.usefixtures("shop")
def test_vectors_do_not_depend_on_the_batch_size(workspace, model):
    def extracted(size):
        pair = {"text_model": model("bert"), "image_model": model("vit"), "text_pooling": "mean"}
        path = extract_features(workspace, "shop", FeatureSettings(**pair, batch_size=size), "cpu")
        features = features_of(workspace, path)
        path.unlink()
        return features

    one, many = extracted(1), extracted(64)
    np.testing.assert_allclose(one.text, many.text, atol=1e-6)
    np.testing.assert_allclose(one.image, many.image, atol=1e-6)
    np.testing.assert_array_equal(one.has_image, many.has_image)


@pytest.mark.usefixtures("shop")
def test_an_interrupted_extraction_leaves_whole_parts_alone_and_goes_on_from_them(workspace, monkeypatch, reporter):
    settings = FeatureSettings(encoder="sketch", batch_size=1, part_size=1)
    straight = extract_features(workspace, "shop", settings, "cpu")
    expected = straight.read_bytes()
    straight.unlink()
    straight.with_suffix(".log").unlink()
    encoded = SketchImage.stream

    def interrupted(self, batches):
        yield next(encoded(self, batches))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SketchImage, "stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract_features(workspace, "shop", settings, "cpu")
    folder = straight.with_suffix(".parts")
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["image", "text", "text", "text"]
    assert [path for path in straight.parent.iterdir() if path != folder] == []
    assert extract_features(workspace, "shop", settings, "cpu", reporter).read_bytes() == expected
    assert reporter.done == {"images": 2}
    assert any("going on from 3 text and 1 image parts" in text for text in reporter.notes)
    assert not folder.exists()


@pytest.mark.usefixtures("shop")
def test_without_network_features_of_these_items_are_kept_and_others_are_not(workspace, model, monkeypatch, reporter):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    remote = FeatureSettings(encoder="mmm4rec/not-on-this-disk")
    with pytest.raises(NetworkError):
        extract_features(workspace, "shop", remote, "cpu", reporter)
    path = extract_features(workspace, "shop", FeatureSettings(encoder=model("siglip")), "cpu", reporter)
    brought = workspace.features("shop", "mmm4rec--not-on-this-disk")
    path.rename(brought)
    assert extract_features(workspace, "shop", remote, "cpu", reporter) == brought
    assert any("without a look at its encoder" in text for text in reporter.warnings)


def test_a_domain_without_tables_is_a_data_error(workspace):
    with pytest.raises(DataError, match="no tables"):
        extract_features(workspace, "nowhere", SKETCH, "cpu")


@pytest.mark.skipif("MMM4REC_TEST_DATA" not in os.environ, reason="MMM4REC_TEST_DATA names no folder with real data")
def test_real_posters_are_sketched(workspace, write_domain, reporter):
    folder = Path(os.environ["MMM4REC_TEST_DATA"]) / "movielens-posters"
    rows = pq.read_table(folder / "items.parquet").slice(0, 100).to_pylist()
    write_domain({row["item_id"]: (row["text"], row["image"] and str(folder / row["image"])) for row in rows})
    features = features_of(workspace, extract_features(workspace, "shop", SKETCH, "cpu", reporter))
    assert features.has_text.sum() == 100
    assert features.has_image.sum() == sum(row["image"] is not None for row in rows)
