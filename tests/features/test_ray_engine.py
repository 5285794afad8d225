"""Encoding through Ray Data on a Ray of this machine; without the extra `[ray]` only its absence can be tried."""

import importlib.util
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.features.extract import extract_features
from mmm4rec_cli.features.parts import Shard
from mmm4rec_cli.settings.schema import FeatureSettings


@pytest.fixture
def shop(workspace, write_domain):
    folder = workspace.root / "images"
    folder.mkdir(parents=True)
    items = {}
    for number in range(7):
        path = folder / f"{number}.png"
        Image.effect_noise((20 + number, 30), 90).convert("RGB").save(path)
        items[f"i{number}"] = ("red mug " * (number + 1), str(path))
    (folder / "3.png").write_bytes(b"no picture")
    write_domain(items)


@pytest.mark.usefixtures("shop")
def test_without_ray_the_extra_is_named(workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="Ray Data is not installed") as caught:
        extract_features(workspace, "shop", FeatureSettings(encoder="sketch"), "cpu", engine="ray")
    assert "mmm4rec[ray]" in caught.value.hint


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [ray]")
@pytest.mark.filterwarnings("ignore")  # Ray's own, many and of every kind
@pytest.mark.usefixtures("shop")
def test_ray_makes_the_very_file_that_this_process_makes(workspace, model, reporter):
    pair = {"text_model": model("bert"), "image_model": model("vit"), "encoder": "pair"}
    settings = FeatureSettings(**pair, batch_size=2, part_size=3)
    path = extract_features(workspace, "shop", settings, "cpu")
    expected, table = path.read_bytes(), pq.read_table(path)
    log = path.with_suffix(".log").read_bytes()
    path.unlink()
    extract_features(workspace, "shop", settings, "cpu", engine="ray", shard=Shard(2, 2))
    assert extract_features(workspace, "shop", settings, "cpu", reporter, engine="ray") == path
    assert pq.read_table(path) == table
    assert path.read_bytes() == expected
    assert path.with_suffix(".log").read_bytes() == log
    assert any("going on from 1 text and 1 image parts" in text for text in reporter.notes)
