"""The chain of the README, typed as it stands there, against a mirror on 127.0.0.1."""

import gzip
import io
import json

import numpy as np
import pytest
from faulty_server import FaultyServer, serving
from PIL import Image

from mmm4rec_cli.app import main
from mmm4rec_cli.data.domains import CATEGORIES, DOWNSTREAM, MIXES

USERS, ITEMS = 24, 14
SETTINGS = """
[data]
mirrors = ["{url}"]
download_timeout = 5
[features]
encoder = "sketch"
[model]
hidden_size = 16
inner_size = 16
d_state = 4
head_dim = 4
n_groups = 8
max_len = 6
[pretrain]
epochs = 1
batch_size = 64
accumulation = 1
[finetune]
epochs = 1
batch_size = 64
accumulation = 1
[runtime]
device = "cpu"
"""


def category_files(server, number, name):
    """Ratings, metadata and pictures of one category: users walk along a ring of items."""
    random = np.random.default_rng(number)
    rows = []
    for user in range(USERS):
        start = int(random.integers(ITEMS))
        steps = [(start + step) % ITEMS for step in range(8)]
        rows += [f"{name[:3]}{i:02d},u{user},5.0,{1_500_000_000 + 86_400 * t}\n" for t, i in enumerate(steps)]
    lines = []
    for i in range(ITEMS):
        item = f"{name[:3]}{i:02d}"
        stream = io.BytesIO()
        Image.effect_noise((24, 24), 20 + 3 * i).convert("RGB").save(stream, "PNG")
        server.files[f"images/{item}.png"] = stream.getvalue()
        address = f"{server.url}/images/{item}.png"
        lines.append(json.dumps({"asin": item, "title": f"{name} number {i}", "imageURLHighRes": [address]}) + "\n")
    server.files[f"categoryFilesSmall/{name}.csv"] = "".join(rows).encode()
    server.files[f"metaFiles2/meta_{name}.json.gz"] = gzip.compress("".join(lines).encode())


@pytest.mark.slow
def test_the_bare_chain_runs_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    domains = (*DOWNSTREAM, *MIXES["fhckm"])

    def typed(line):
        code = main(line.split()[1:])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured

    with serving(FaultyServer()) as server:
        for number, domain in enumerate(domains):
            category_files(server, number, CATEGORIES[domain])
        (tmp_path / "mmm4rec.toml").write_text(SETTINGS.format(url=server.url))
        assert "next: mmm4rec preprocess" in typed("mmm4rec download").out
        assert main(["pretrain"]) == 3
        said = capsys.readouterr().err
        assert "mmm4rec download --mix fhckm" in said
        assert "mmm4rec preprocess" in said
        typed("mmm4rec download --mix fhckm")
        assert "next: mmm4rec pretrain --mix fhckm" in typed("mmm4rec preprocess").out
        typed("mmm4rec pretrain")
        assert "taken over from" in typed("mmm4rec finetune --domain scientific").err
        assert "NDCG@10" in typed("mmm4rec evaluate").out
        assert "20 files" in typed("mmm4rec download --check").out
        for path in [path for path in server.files if path.startswith("images/")]:
            del server.files[path]
        assert "there" in typed("mmm4rec download --kind images").out
    items = json.loads((tmp_path / "data/processed/fhckm/manifest.json").read_text())
    assert (items["image_share"], items["images"]["failed"]) == (1.0, 0)
    left = [path for path in tmp_path.rglob(".*") if path.suffix in (".part", ".download")]
    assert left == []
