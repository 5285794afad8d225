"""`mmm4rec preprocess` and `mmm4rec download` from the command line."""

import gzip
import json

import pytest
from PIL import Image

from mmm4rec_cli.app import main

N_USERS, N_ITEMS = 8, 6


@pytest.fixture(autouse=True)
def offline_models(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def run(tmp_path, capsys):
    def call(*words):
        code = main([*words, "--workspace", str(tmp_path)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def write_raw(workspace, domain, category):
    """Every user has every item: nothing falls to the k-core."""
    folder = workspace / "data" / "raw" / domain
    folder.mkdir(parents=True)
    rows = [f"i{i},u{u},5.0,{1_500_000_000 + 1000 * u + i}\n" for u in range(N_USERS) for i in range(N_ITEMS)]
    (folder / f"{category}.csv").write_text("".join(rows))
    with gzip.open(folder / f"meta_{category}.json.gz", "wt") as stream:
        for i in range(N_ITEMS):
            stream.write(json.dumps({"asin": f"i{i}", "title": f"thing number {i}"}) + "\n")


def write_own(folder):
    rows = [f"u{u},00{i},{1_500_000_000 + 1000 * u + i}\n" for u in range(N_USERS) for i in range(N_ITEMS)]
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    items = [{"item_id": f"00{i}", "text": f"thing {i}", "image": None if i else "red.png"} for i in range(N_ITEMS)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    vectors = [{"item_id": f"00{i}", "text": [1.0, i], "image": None if i else [0.5]} for i in range(N_ITEMS)]
    (folder / "vectors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in vectors))
    return ("--interactions", str(folder / "log.csv"), "--items", str(folder / "items.jsonl"), "--domain", "own")


def test_without_options_every_domain_with_raw_files_is_made(run, tmp_path):
    write_raw(tmp_path, "pantry", "Prime_Pantry")
    write_raw(tmp_path, "magazine", "Magazine_Subscriptions")
    (tmp_path / "data" / "raw" / "arts").mkdir()
    code, out, _ = run("preprocess", "--encoder", "sketch", "--json")
    assert code == 0
    manifests = json.loads(out)["domains"]
    assert {manifest["domain"] for manifest in manifests} == {"magazine", "pantry"}
    for domain in ("magazine", "pantry"):
        assert (tmp_path / f"data/processed/{domain}/manifest.json").is_file()
        assert (tmp_path / f"data/features/{domain}/sketch.parquet").is_file()


def test_a_mix_whose_domains_are_all_there_stands_for_them(run, tmp_path):
    for domain, category in (
        ("food", "Grocery_and_Gourmet_Food"),
        ("home", "Home_and_Kitchen"),
        ("cds", "CDs_and_Vinyl"),
        ("kindle", "Kindle_Store"),
        ("movies", "Movies_and_TV"),
        ("pantry", "Prime_Pantry"),
    ):
        write_raw(tmp_path, domain, category)
    code, out, _ = run("preprocess", "--skip-features")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "data" / "processed").iterdir()) == ["fhckm", "pantry"]
    assert "next: mmm4rec pretrain --mix fhckm" in out


def test_without_raw_files_the_commands_that_fetch_them_are_named(run):
    code, out, err = run("preprocess")
    assert (code, out) == (3, "")
    assert "mmm4rec download" in err
    assert "mmm4rec preprocess" in err


def test_one_domain_prints_its_manifest(run, tmp_path):
    write_raw(tmp_path, "pantry", "Prime_Pantry")
    code, out, _ = run("preprocess", "--domain", "pantry", "--skip-features", "--json")
    manifest = json.loads(out)
    assert code == 0
    assert (manifest["domain"], manifest["users"], manifest["items"]) == ("pantry", N_USERS, N_ITEMS)
    assert manifest["features"] is None
    assert not (tmp_path / "data" / "features").exists()
    code, out, _ = run("preprocess", "--domain", "pantry", "--skip-features")
    assert "k-core" in out
    assert f"next: mmm4rec finetune --domain pantry --workspace {tmp_path}" in out


def test_settings_of_the_data_reach_the_tables(run, tmp_path):
    write_raw(tmp_path, "pantry", "Prime_Pantry")
    code, _, err = run("preprocess", "--domain", "pantry", "--skip-features", "--set", "data.min_user=7")
    assert code == 3
    assert "data.min_user" in err
    assert not (tmp_path / "data" / "processed").exists()


def test_own_tables_own_vectors_and_pictures_that_come_and_go(run, tmp_path):
    own = write_own(tmp_path)
    code, out, _ = run("preprocess", *own, "--encoder", "sketch", "--json")
    assert (code, json.loads(out)["image_share"]) == (0, pytest.approx(1 / N_ITEMS))
    code, out, _ = run("preprocess", *own, "--encoder", "sketch", "--no-images", "--json")
    assert (code, json.loads(out)["image_share"]) == (0, 0)
    code, out, _ = run("preprocess", *own, "--encoder", "sketch", "--json")
    assert (code, json.loads(out)["image_share"]) == (0, pytest.approx(1 / N_ITEMS))
    code, out, _ = run("preprocess", "--domain", "own", "--features", str(tmp_path / "vectors.jsonl"), "--json")
    assert code == 0
    assert json.loads(out)["features"].endswith("data/features/own/own.parquet")
    code, out, _ = run(
        "preprocess", "--domain", "own", "--features", str(tmp_path / "vectors.jsonl"), "--encoder", "mine", "--json"
    )
    assert json.loads(out)["features"].endswith("data/features/own/mine.parquet")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--domain", "pantri"], 2, "pantry"),
        (["--mix", "fhkcm"], 2, "fhckm"),
        (["--domain", "pantry"], 3, "download --domain pantry"),
        (["--interactions", "x.csv"], 2, "--domain NAME"),
        (["--domain", "own", "--interactions", "x.csv"], 2, "--items"),
        (["--domain", "own", "--interactions", "x.csv", "--items", "y.csv"], 3, "x.csv"),
        (["--domain", "a", "--domain", "b", "--features", "x"], 2, "one domain"),
        (["--no-images", "--offline"], 2, "--offline"),
        (["--domain", "pantry", "--set", "data.min_usr=3"], 2, "data.min_user"),
        (["--domain", "pantry", "--encoder", "sketchy"], 2, "sketchy"),
        (["--domain", "pantry", "--encoder", "sketch", "--device", "gpu"], 2, "cuda"),
        (["--domain", "pantry", "--shard", "3/2"], 2, "--shard 3/2"),
        (["--domain", "pantry", "--shard", "1/2", "--merge"], 2, "--merge"),
        (["--domain", "pantry", "--shard", "1/2", "--skip-features"], 2, "--skip-features"),
        (["--domain", "pantry", "--set", "features.batch_size=none"], 2, "auto or a whole number at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left(run, tmp_path, words, code, says):
    got, out, err = run("preprocess", *words)
    assert (got, out) == (code, "")
    assert says in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_shards_are_joined_by_a_merge_and_a_merge_without_them_is_refused(run, tmp_path):
    write_raw(tmp_path, "pantry", "Prime_Pantry")
    words = ("preprocess", "--domain", "pantry", "--encoder", "sketch", "--set", "features.part_size=2")
    code, _, err = run(*words, "--merge")
    assert code == 3
    assert "3 of 3 text parts are missing" in err
    assert "--shard I/N" in err
    for shard in ("1/2", "2/2"):
        code, out, err = run(*words, "--shard", shard, "--json")
        assert (code, json.loads(out)["features"]) == (0, None)
        assert "preprocess --domain pantry --encoder sketch" in err
        assert "--merge" in err
    code, out, _ = run(*words, "--merge", "--json")
    path = tmp_path / "data" / "features" / "pantry" / "sketch.parquet"
    assert (code, json.loads(out)["features"]) == (0, str(path))
    assert [one.name for one in path.parent.iterdir()] == ["sketch.parquet"]


def test_files_fetched_by_hand_are_taken(run, tmp_path):
    write_raw(tmp_path / "elsewhere", "pantry", "Prime_Pantry")
    source = tmp_path / "elsewhere" / "data" / "raw" / "pantry"
    code, out, _ = run("download", "--domain", "pantry", "--from-dir", str(source), "--json")
    assert code == 0
    assert [file["path"].rpartition("/")[2] for file in json.loads(out)["files"]] == [
        "Prime_Pantry.csv",
        "meta_Prime_Pantry.json.gz",
    ]
    assert run("preprocess", "--skip-features")[0] == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--domain", "pantri"], 2, "pantry"),
        (["--kind", "rating"], 2, "ratings"),
        (["--mix", "x"], 2, "fhckm"),
        (["--domain", "pantry", "--from-dir", "/nowhere"], 3, "Prime_Pantry.csv"),
    ],
)
def test_downloads_that_cannot_be_are_refused(run, words, code, says):
    got, out, err = run("download", *words)
    assert (got, out) == (code, "")
    assert says in err
