import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from faulty_server import (
    FaultyServer,
    any_fault,
    chance,
    cut,
    other_content,
    page,
    promise,
    redirect,
    reset,
    serving,
    slow,
    status,
    without_ranges,
)

from mmm4rec_cli.data import amazon_2023, fetch, share
from mmm4rec_cli.data import download as module
from mmm4rec_cli.data.download import check_downloads, download
from mmm4rec_cli.errors import DataError, NetworkError, UsageError
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

RATINGS = b"B1,ann,5.0,1500000000\n" * 5000
METADATA = gzip.compress(b'{"asin": "B1", "title": "a mug"}\n' * 50)
CSV = "categoryFilesSmall/Magazine_Subscriptions.csv"
META = "metaFiles2/meta_Magazine_Subscriptions.json.gz"


@pytest.fixture
def mirrors():
    files = {CSV: RATINGS, META: METADATA}
    with serving(FaultyServer(files)) as first, serving(FaultyServer(files)) as second:
        yield first, second


@pytest.fixture
def mirror(mirrors):
    return mirrors[0]


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    waits = []

    async def pause(seconds):
        waits.append(seconds)

    monkeypatch.setattr(fetch, "pause", pause)
    monkeypatch.setattr(module, "MIRRORS", ())
    monkeypatch.setattr(module, "MIRRORS_2023", ())
    return waits


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "workspace")


def fetched(workspace, *mirrors, settings=None, **options):
    settings = DataSettings(download_attempts=4, download_timeout=5) if settings is None else settings
    return download(workspace, ["magazine"], mirrors=[one.url for one in mirrors], settings=settings, **options)


def check_whole(workspace):
    folder = workspace.raw("magazine")
    names = ["Magazine_Subscriptions.csv", "download.json", "meta_Magazine_Subscriptions.json.gz"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / names[0]).read_bytes() == RATINGS
    assert (folder / names[2]).read_bytes() == METADATA
    return json.loads((folder / "download.json").read_text())


def test_both_files_arrive_whole_with_their_hash_and_source_written_down(workspace, mirror):
    paths = fetched(workspace, mirror)
    assert [path.parent for path in paths] == [workspace.raw("magazine")] * 2
    entry = check_whole(workspace)["Magazine_Subscriptions.csv"]
    assert entry["sha256"] == hashlib.sha256(RATINGS).hexdigest()
    assert entry["size"] == len(RATINGS)
    assert entry["source"] == f"{mirror.url}/{CSV}"


def test_files_that_are_there_are_kept_without_a_question(workspace, mirror):
    fetched(workspace, mirror)
    mirror.asked.clear()
    fetched(workspace, mirror)
    assert not mirror.asked
    check_whole(workspace)


def test_one_kind_alone_can_be_had(workspace, mirror):
    assert [path.name for path in fetched(workspace, mirror, kinds=["metadata"])] == [
        "meta_Magazine_Subscriptions.json.gz"
    ]
    assert {path for path, _ in mirror.asked} == {META}


def test_a_file_that_breaks_off_is_continued_with_a_range(workspace, mirror):
    mirror.faults[CSV] = [cut(40_000), cut(30_000)]
    fetched(workspace, mirror)
    check_whole(workspace)
    assert [asked for path, asked in mirror.asked if path == CSV] == [
        *(None, "bytes=40000-", "bytes=70000-"),
        "bytes=110000-",  # is that all?
    ]


def test_an_interrupted_command_goes_on_where_it_was(workspace, mirror, monkeypatch):
    async def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "pause", interrupted)
        mirror.faults[CSV] = [cut(50_000)]
        with pytest.raises(KeyboardInterrupt):
            fetched(workspace, mirror)
    assert not (workspace.raw("magazine") / "Magazine_Subscriptions.csv").exists()
    fetched(workspace, mirror)
    check_whole(workspace)
    assert (CSV, "bytes=50000-") in mirror.asked


def test_a_file_that_changed_meanwhile_is_begun_anew(workspace, mirror):
    mirror.faults[CSV] = [other_content]
    fetched(workspace, mirror)
    check_whole(workspace)


def test_without_a_version_nothing_is_continued(workspace, mirror):
    mirror.faults[CSV] = [cut(40_000, version=False)]
    fetched(workspace, mirror)
    check_whole(workspace)
    assert [asked for path, asked in mirror.asked if path == CSV][:2] == [None, None]


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), reset, status(416)])
def test_a_server_that_stumbles_is_asked_again(workspace, mirror, fault):
    mirror.faults[CSV] = [fault, fault]
    fetched(workspace, mirror)
    check_whole(workspace)


def test_the_server_says_how_long_to_wait(workspace, mirror, waits):
    mirror.faults[CSV] = [status(429, Retry_After="17"), status(503, Retry_After="9999")]
    fetched(workspace, mirror)
    assert waits == [17, 60]


def test_mirrors_are_asked_in_order(workspace, mirrors):
    first, second = mirrors
    first.files = {META: METADATA}
    fetched(workspace, first, second)
    record = check_whole(workspace)
    assert record["Magazine_Subscriptions.csv"]["source"].startswith(second.url)
    assert record["meta_Magazine_Subscriptions.json.gz"]["source"].startswith(first.url)
    assert {path for path, _ in second.asked} == {CSV}


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "text/plain"])
def test_a_web_page_with_status_200_is_refused(workspace, mirrors, kind):
    mirrors[0].faults = {CSV: [page(kind)] * 9, META: [page(kind)] * 9}
    fetched(workspace, *mirrors)
    assert check_whole(workspace)["Magazine_Subscriptions.csv"]["source"].startswith(mirrors[1].url)


def test_the_last_word_names_every_address_and_its_answer(workspace, mirrors):
    first, second = mirrors
    first.files, second.files = {META: METADATA}, {}
    second.faults = {CSV: [status(503)] * 9}
    with pytest.raises(NetworkError) as caught:
        fetched(workspace, first, second)
    assert caught.value.problems == (
        f"{first.url}/{CSV}: HTTP 404 Not Found",
        f"{second.url}/{CSV}: HTTP 503 (4 attempts)",
    )
    assert "--mirror" in caught.value.hint
    assert "--from-dir" in caught.value.hint
    assert (workspace.raw("magazine") / "meta_Magazine_Subscriptions.json.gz").read_bytes() == METADATA
    assert not list(workspace.raw("magazine").glob("*.csv"))


def test_a_host_that_gives_no_connection_is_given_up_for_all_files(workspace, waits):
    settings = DataSettings(download_attempts=4, download_workers=1)
    with pytest.raises(NetworkError) as caught:
        download(workspace, ["magazine"], mirrors=["http://127.0.0.1:9/"], settings=settings)
    tried, spared = caught.value.problems
    assert tried.startswith(f"http://127.0.0.1:9/{CSV}: ")
    assert "4 attempts" in tried
    assert spared.startswith(f"http://127.0.0.1:9/{META}: not asked")
    assert [int(wait) for wait in waits] == [1, 2, 4]


def test_another_content_than_the_one_first_seen_is_refused(workspace, mirrors):
    first, second = mirrors
    fetched(workspace, first)
    (workspace.raw("magazine") / "Magazine_Subscriptions.csv").unlink()
    first.files = {CSV: RATINGS + b"one row more\n"}
    with pytest.raises(NetworkError, match="first seen"):
        fetched(workspace, first)
    fetched(workspace, first, second)
    check_whole(workspace)


@pytest.mark.parametrize("flat", [True, False])
def test_files_fetched_by_hand_are_taken_without_network(workspace, tmp_path, mirror, flat):
    for place, content in ((CSV, RATINGS), (META, METADATA)):
        path = tmp_path / "hand" / (place.split("/")[1] if flat else place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    fetched(workspace, mirror, from_dir=tmp_path / "hand")
    check_whole(workspace)
    assert not mirror.asked


def test_files_missing_or_odd_in_the_folder_are_data_errors_and_leave_nothing(workspace, tmp_path):
    (tmp_path / "Magazine_Subscriptions.csv").write_bytes(b"<html>sign in</html>")
    with pytest.raises(DataError, match="web page"):
        fetched(workspace, from_dir=tmp_path)
    (tmp_path / "Magazine_Subscriptions.csv").unlink()
    with pytest.raises(DataError, match=r"no Magazine_Subscriptions.csv there\n.*no meta_Magazine") as caught:
        fetched(workspace, from_dir=tmp_path)
    assert "amazon_v2" in caught.value.hint
    assert not list(workspace.raw("magazine").iterdir())


def test_a_file_put_in_place_by_hand_is_kept_and_written_down(workspace):
    folder = workspace.raw("magazine")
    folder.mkdir(parents=True)
    (folder / "Magazine_Subscriptions.csv").write_bytes(RATINGS)
    (folder / "meta_Magazine_Subscriptions.json.gz").write_bytes(METADATA)
    fetched(workspace)
    assert check_whole(workspace)["Magazine_Subscriptions.csv"]["source"] == "found in place"


def test_a_mix_stands_for_its_domains(workspace, mirror):
    with pytest.raises(NetworkError) as caught:
        download(workspace, ["fhckm", "food"], kinds=["ratings"], mirrors=[mirror.url])
    assert len(caught.value.problems) == 5
    assert "Grocery_and_Gourmet_Food" in caught.value.problems[0]


def test_unknown_domains_and_kinds_are_usage_errors(workspace):
    with pytest.raises(UsageError, match="magazin"):
        download(workspace, ["magazin"])
    with pytest.raises(UsageError, match="unknown kind 'weight'"):
        download(workspace, ["magazine"], kinds=["weight"])
    with pytest.raises(UsageError, match="unknown source 'amazon-2014'"):
        download(workspace, ["magazine"], source="amazon-2014")
    with pytest.raises(UsageError, match="'pantry' has no category"):
        download(workspace, ["pantry"], source="amazon-2023")


@pytest.mark.parametrize("difference", [-30_000, -22, 500])
def test_a_wrong_length_is_found_out(workspace, mirror, difference):
    mirror.faults[CSV] = [promise(difference)]
    fetched(workspace, mirror)
    check_whole(workspace)


def test_a_wrong_length_is_found_out_where_the_next_answer_knows_no_ranges(workspace, mirror):
    mirror.faults[CSV] = [promise(-22), without_ranges, promise(-30_000), promise(-40_000)]
    fetched(workspace, mirror)
    check_whole(workspace)


def test_redirects_are_followed_and_endless_ones_are_not(workspace, mirror):
    mirror.faults[CSV] = [redirect]
    fetched(workspace, mirror, kinds=["ratings"])
    mirror.faults[META] = [redirect] * 99
    with pytest.raises(NetworkError, match="redirects"):
        fetched(workspace, mirror)


def test_a_drip_is_given_up_and_gone_on_with(workspace, mirror):
    mirror.faults[CSV] = [slow(0.02)]
    fetched(workspace, mirror, settings=DataSettings(download_timeout=0.2, download_rate=10**7))
    check_whole(workspace)
    assert [asked is None for path, asked in mirror.asked if path == CSV][:2] == [True, False]


def test_without_ranges_it_is_begun_anew(workspace, mirror):
    mirror.faults[CSV] = [cut(50_000, ranges=False), without_ranges, without_ranges]
    fetched(workspace, mirror)
    check_whole(workspace)


def test_a_damaged_gzip_file_is_fetched_again(workspace, mirror):
    damaged = METADATA[:-8] + bytes(8)
    mirror.faults[META] = [lambda handler: handler.give(damaged, version=False)]
    fetched(workspace, mirror)
    check_whole(workspace)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(workspace, mirror, monkeypatch):
    usage = type("usage", (), {"free": 2**26 + len(RATINGS)})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="GB are free") as caught:
        fetched(workspace, mirror)
    assert "--workspace" in caught.value.hint
    assert not list(workspace.raw("magazine").iterdir())


def test_mirrors_of_the_settings_are_asked_behind_those_of_the_call(workspace, mirrors):
    first, second = mirrors
    first.files = {META: METADATA}
    fetched(workspace, first, settings=DataSettings(mirrors=(second.url,)))
    assert check_whole(workspace)["Magazine_Subscriptions.csv"]["source"].startswith(second.url)


def test_a_check_names_what_differs_or_is_gone(workspace, mirror):
    with pytest.raises(DataError, match="nothing is written down"):
        check_downloads(workspace)
    fetched(workspace, mirror)
    assert [one["bytes"] for one in check_downloads(workspace, ["magazine"])] == [len(RATINGS), len(METADATA)]
    folder = workspace.raw("magazine")
    (folder / "Magazine_Subscriptions.csv").write_bytes(RATINGS[:-1] + b"X")
    (folder / "meta_Magazine_Subscriptions.json.gz").unlink()
    with pytest.raises(DataError) as caught:
        check_downloads(workspace)
    assert len(caught.value.problems) == 2
    assert "Magazine_Subscriptions.csv" in caught.value.problems[0]
    assert "gone" in caught.value.problems[1]


def test_one_folder_has_one_writer(workspace, mirror):
    from mmm4rec_cli.files import only_writer

    with only_writer(workspace.raw("magazine")), pytest.raises(DataError, match="another mmm4rec"):
        fetched(workspace, mirror)
    fetched(workspace, mirror)
    check_whole(workspace)


def test_downloads_work_inside_a_running_event_loop(workspace, mirror):
    import asyncio

    async def notebook():
        return fetched(workspace, mirror)

    assert len(asyncio.run(notebook())) == 2
    check_whole(workspace)


def test_2023_lies_under_the_same_name_and_never_beside_2018(workspace, mirror):
    ratings = gzip.compress(b"user_id,parent_asin,rating,timestamp\nann,B1,5.0,1500000000000\n")
    mirror.files = {
        "benchmark/0core/rating_only/Magazine_Subscriptions.csv.gz": ratings,
        "raw/meta_categories/meta_Magazine_Subscriptions.jsonl.gz": METADATA,
    }
    paths = fetched(workspace, mirror, source="amazon-2023")
    assert [path.name for path in paths] == [
        "Magazine_Subscriptions.csv.gz",
        "meta_Magazine_Subscriptions.jsonl.gz",
    ]
    assert amazon_2023.files(workspace.raw("magazine"), "magazine") == tuple(paths)
    with pytest.raises(DataError, match="holds the ratings of amazon-2023"):
        fetched(workspace, mirror)


def zipped(files):
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def figshare(mirror, monkeypatch):
    """An imitation of figshare on the mirror: a share page, the listing behind it, the files."""
    monkeypatch.setattr(share, "PAGE", f"{mirror.url}/s/{{share}}")
    monkeypatch.setattr(share, "API", f"{mirror.url}/v2/articles/{{article}}/files?private_link={{share}}")
    monkeypatch.setattr(share, "WHOLE", f"{mirror.url}/articles/{{article}}?private_link={{share}}")
    monkeypatch.setattr(module, "WEIGHTS_REPOSITORY", f"{mirror.url}/raw/HEAD")
    mirror.files[f"s/{share.SHARE}"] = b'<!doctype html><script>{"article_id": 1234567}</script>'
    return mirror


def listing(mirror, files):
    entries = []
    for number, (name, content) in enumerate(files.items()):
        mirror.files[f"files/{number}"] = content
        md5 = hashlib.md5(content).hexdigest()
        url = f"{mirror.url}/files/{number}"
        entries.append({"id": number, "name": name, "size": len(content), "download_url": url, "computed_md5": md5})
    return json.dumps(entries).encode()


def test_a_share_page_is_resolved_to_its_files_which_are_unpacked(workspace, figshare):
    archive = zipped({"Scientific/train_seq.jsonl": "[]", "Scientific/item2id.jsonl": "{}"})
    figshare.files["v2/articles/1234567/files"] = listing(figshare, {"processed.zip": archive, "README.md": b"read me"})
    paths = fetched(workspace, figshare, kinds=["processed"])
    assert [path.name for path in paths] == ["processed.zip", "README.md"]
    folder = workspace.published
    assert (folder / "processed" / "Scientific" / "train_seq.jsonl").read_text() == "[]"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "download.json",
        "processed",
        "processed.zip",
    ]
    record = json.loads((folder / "download.json").read_text())
    assert record["processed.zip"]["published"].startswith("size and md5 are published")
    figshare.asked.clear()
    fetched(workspace, figshare, kinds=["processed"])
    assert not figshare.asked


def test_a_listing_that_is_refused_leaves_the_whole_article(workspace, figshare):
    figshare.files["articles/1234567"] = zipped({"Scientific/train_seq.jsonl": "[]"})
    (path,) = fetched(workspace, figshare, kinds=["processed"])
    assert path.name == f"{share.SHARE}.zip"
    assert (workspace.published / share.SHARE / "Scientific" / "train_seq.jsonl").is_file()


def test_another_md5_than_the_published_one_is_refused(workspace, figshare):
    archive = zipped({"a": "b"})
    wrong = json.loads(listing(figshare, {"processed.zip": archive}))
    wrong[0]["computed_md5"] = "0" * 32
    figshare.files["v2/articles/1234567/files"] = json.dumps(wrong).encode()
    with pytest.raises(NetworkError, match="md5"):
        fetched(workspace, figshare, kinds=["processed"])


def test_a_share_page_without_an_article_is_a_network_error(workspace, figshare):
    figshare.files[f"s/{share.SHARE}"] = b"<!doctype html>are you a robot?"
    with pytest.raises(NetworkError, match="names no article") as caught:
        fetched(workspace, figshare, kinds=["processed"])
    assert "--from-dir" in caught.value.hint


def test_weights_come_from_the_repository_else_from_the_share(workspace, figshare):
    weights = zipped({"archive/data.pkl": "x"})
    figshare.files["raw/HEAD/pre_weights/pretrained_weight.ckpt"] = weights
    (path,) = fetched(workspace, figshare, kinds=["weights"])
    assert path == workspace.weights / "pretrained_weight.ckpt"
    assert path.read_bytes() == weights
    path.unlink()
    figshare.files["raw/HEAD/pre_weights/pretrained_weight.ckpt"] = b"version https://git-lfs.github.com/spec/v1\n"
    figshare.files["v2/articles/1234567/files"] = listing(figshare, {"pretrained.ckpt": weights})
    assert fetched(workspace, figshare, kinds=["weights"]) == [path]
    assert path.read_bytes() == weights


def test_archives_and_weights_fetched_by_hand_are_taken(workspace, tmp_path):
    (tmp_path / "hand").mkdir()
    (tmp_path / "hand" / "data.zip").write_bytes(zipped({"Scientific/train_seq.jsonl": "[]"}))
    (tmp_path / "hand" / "pretrained_weight.ckpt").write_bytes(zipped({"archive/data.pkl": "x"}))
    paths = fetched(workspace, kinds=["processed", "weights"], from_dir=tmp_path / "hand")
    assert {path.name for path in paths} == {"pretrained_weight.ckpt", "data.zip"}
    assert (workspace.published / "data" / "Scientific" / "train_seq.jsonl").is_file()


def random_files(random, count, most=60_000):
    """Small raw files of as many domains, one a category's two."""
    files = {}
    for number in range(count):
        rows = b"".join(
            b"B%d,u%d,5.0,1500000000\n" % (i, random.randrange(10**6)) for i in range(random.randrange(200, most // 24))
        )
        files[f"file/{number}"] = rows if number % 2 else gzip.compress(rows)
    return files


def test_under_faults_of_every_kind_each_file_comes_whole(tmp_path):
    random = chance(5)
    files = random_files(random, 30)
    with serving(FaultyServer(files)) as server:
        server.fate = any_fault(random, drip=0.001)
        settings = DataSettings(download_attempts=30, download_timeout=2, download_workers=8)
        wanted = [
            fetch.Wanted(
                tmp_path / f"{name.replace('/', '-')}{'.csv' if i % 2 else '.json.gz'}", (f"{server.url}/{name}",)
            )
            for i, name in enumerate(files)
        ]
        module.fetch_files(wanted, settings)
    for one, content in zip(wanted, files.values(), strict=True):
        assert one.path.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {one.path.name for one in wanted} | {"download.json"}
    assert server.sent <= 2 * sum(map(len, files.values()))


def test_a_killed_download_goes_on_and_leaves_nothing(tmp_path):
    content = gzip.compress(os.urandom(300_000))
    with serving(FaultyServer({META: content, CSV: RATINGS})) as server:
        server.fate = lambda handler: slow(0.005)
        command = [sys.executable, "-m", "mmm4rec_cli", "download", "--domain", "magazine", "--mirror", server.url]
        command += ["--workspace", str(tmp_path), "--quiet"]
        for _ in range(3):
            before = server.sent
            running = subprocess.Popen(command)
            while server.sent < before + 60_000 and running.poll() is None:
                time.sleep(0.005)
            running.send_signal(signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
        server.fate = None
        assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    folder = tmp_path / "data" / "raw" / "magazine"
    assert sorted(path.name for path in folder.iterdir()) == [
        "Magazine_Subscriptions.csv",
        "download.json",
        "meta_Magazine_Subscriptions.json.gz",
    ]
    assert (folder / "meta_Magazine_Subscriptions.json.gz").read_bytes() == content
    assert (folder / "Magazine_Subscriptions.csv").read_bytes() == RATINGS
    assert server.sent <= 2 * (len(content) + len(RATINGS))
