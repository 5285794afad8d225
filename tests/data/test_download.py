import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmm4rec_cli.data import download as module
from mmm4rec_cli.data.download import download
from mmm4rec_cli.errors import DataError, NetworkError, UsageError
from mmm4rec_cli.workspace import Workspace

RATINGS = b"B1,ann,5.0,1500000000\n" * 5000
METADATA = gzip.compress(b'{"asin": "B1", "title": "a mug"}\n' * 50)
CSV = "categoryFilesSmall/Magazine_Subscriptions.csv"
META = "metaFiles2/meta_Magazine_Subscriptions.json.gz"


class Mirror(ThreadingHTTPServer):
    """Serves files with ranges; `faults` are functions of the handler, used up one a request of their path."""

    daemon_threads = True

    def __init__(self):
        self.files = {CSV: RATINGS, META: METADATA}
        self.faults, self.asked = {}, []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.lstrip("/")
        self.server.asked.append((path, self.headers.get("Range")))
        faults = self.server.faults.get(path, [])
        if faults:
            faults.pop(0)(self)
        elif path not in self.server.files:
            self.send_error(404)
        else:
            self.give(self.server.files[path])

    def give(self, content, cut=None, kind="application/octet-stream", version=True):
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if version and self.headers.get("If-Range") == etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if version:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(content[start : None if cut is None else start + cut])
        self.close_connection = cut is not None

    def log_message(self, *args):
        pass


def status(code, **headers):
    def fault(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def cut(size, version=True):
    return lambda handler: handler.give(handler.server.files[handler.path.lstrip("/")], cut=size, version=version)


def reset(handler):
    handler.connection.close()


def page(kind):
    return lambda handler: handler.give(b"<!DOCTYPE html><title>Moved</title>", kind=kind)


@pytest.fixture
def mirrors():
    servers = [Mirror(), Mirror()]
    threads = [threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}) for one in servers]
    for thread in threads:
        thread.start()
    yield servers
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def mirror(mirrors):
    return mirrors[0]


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module, "MIRRORS", ())
    return waits


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "workspace")


def fetch(workspace, *mirrors, **options):
    return download(workspace, ["magazine"], mirrors=[one.url for one in mirrors], **options)


def check_whole(workspace):
    folder = workspace.raw("magazine")
    names = ["Magazine_Subscriptions.csv", "download.json", "meta_Magazine_Subscriptions.json.gz"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / names[0]).read_bytes() == RATINGS
    assert (folder / names[2]).read_bytes() == METADATA
    return json.loads((folder / "download.json").read_text())


def test_both_files_arrive_whole_with_their_hash_and_source_written_down(workspace, mirror):
    paths = fetch(workspace, mirror)
    assert [path.parent for path in paths] == [workspace.raw("magazine")] * 2
    entry = check_whole(workspace)["Magazine_Subscriptions.csv"]
    assert entry["sha256"] == hashlib.sha256(RATINGS).hexdigest()
    assert entry["size"] == len(RATINGS)
    assert entry["source"] == f"{mirror.url}/{CSV}"


def test_files_that_are_there_are_kept_without_a_question(workspace, mirror):
    fetch(workspace, mirror)
    mirror.asked.clear()
    fetch(workspace, mirror)
    assert not mirror.asked
    check_whole(workspace)


def test_one_kind_alone_can_be_had(workspace, mirror):
    assert [path.name for path in fetch(workspace, mirror, kinds=["metadata"])] == [
        "meta_Magazine_Subscriptions.json.gz"
    ]
    assert mirror.asked == [(META, None)]


def test_a_file_that_breaks_off_is_continued_with_a_range(workspace, mirror):
    mirror.faults[CSV] = [cut(40_000), cut(30_000)]
    fetch(workspace, mirror)
    check_whole(workspace)
    assert [asked for path, asked in mirror.asked if path == CSV] == [None, "bytes=40000-", "bytes=70000-"]


def test_an_interrupted_command_goes_on_where_it_was(workspace, mirror, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.time, "sleep", interrupted)
        mirror.faults[CSV] = [cut(50_000)]
        with pytest.raises(KeyboardInterrupt):
            fetch(workspace, mirror)
    assert not (workspace.raw("magazine") / "Magazine_Subscriptions.csv").exists()
    fetch(workspace, mirror)
    check_whole(workspace)
    assert (CSV, "bytes=50000-") in mirror.asked


def test_a_file_that_changed_meanwhile_is_begun_anew(workspace, mirror):
    def changed(handler):
        handler.give(b"an older version\n" * 5000, cut=20_000)

    mirror.faults[CSV] = [changed]
    fetch(workspace, mirror)
    check_whole(workspace)


def test_without_a_version_nothing_is_continued(workspace, mirror):
    mirror.faults[CSV] = [cut(40_000, version=False)]
    fetch(workspace, mirror)
    check_whole(workspace)
    assert [asked for path, asked in mirror.asked if path == CSV] == [None, None]


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), reset, status(416)])
def test_a_server_that_stumbles_is_asked_again(workspace, mirror, fault):
    mirror.faults[CSV] = [fault, fault]
    fetch(workspace, mirror)
    check_whole(workspace)


def test_the_server_says_how_long_to_wait(workspace, mirror, waits):
    mirror.faults[CSV] = [status(429, Retry_After="17"), status(503, Retry_After="9999")]
    fetch(workspace, mirror)
    assert waits == [17, 60]


def test_mirrors_are_asked_in_order(workspace, mirrors):
    first, second = mirrors
    first.files = {META: METADATA}
    fetch(workspace, first, second)
    record = check_whole(workspace)
    assert record["Magazine_Subscriptions.csv"]["source"].startswith(second.url)
    assert record["meta_Magazine_Subscriptions.json.gz"]["source"].startswith(first.url)
    assert [path for path, _ in second.asked] == [CSV]


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "text/plain"])
def test_a_web_page_with_status_200_is_refused(workspace, mirrors, kind):
    mirrors[0].faults = {CSV: [page(kind)], META: [page(kind)]}
    fetch(workspace, *mirrors)
    assert check_whole(workspace)["Magazine_Subscriptions.csv"]["source"].startswith(mirrors[1].url)


def test_the_last_word_names_every_address_and_its_answer(workspace, mirrors):
    first, second = mirrors
    first.files, second.files = {META: METADATA}, {}
    second.faults = {CSV: [status(503)] * 9}
    with pytest.raises(NetworkError) as caught:
        fetch(workspace, first, second)
    assert caught.value.problems == (
        f"{first.url}/{CSV}: HTTP 404 Not Found",
        f"{second.url}/{CSV}: HTTP 503 (4 attempts)",
    )
    assert "--mirror" in caught.value.hint
    assert "--from-dir" in caught.value.hint
    assert (workspace.raw("magazine") / "meta_Magazine_Subscriptions.json.gz").read_bytes() == METADATA
    assert not list(workspace.raw("magazine").glob("*.csv"))


def test_a_host_that_gives_no_connection_is_given_up_for_all_files(workspace, waits):
    with pytest.raises(NetworkError) as caught:
        download(workspace, ["magazine"], mirrors=["http://127.0.0.1:9/"])
    tried, spared = caught.value.problems
    assert tried.startswith(f"http://127.0.0.1:9/{CSV}: ")
    assert "4 attempts" in tried
    assert spared.startswith(f"http://127.0.0.1:9/{META}: not asked")
    assert waits == [1, 2, 4]


def test_another_content_than_the_one_first_seen_is_refused(workspace, mirrors):
    first, second = mirrors
    fetch(workspace, first)
    (workspace.raw("magazine") / "Magazine_Subscriptions.csv").unlink()
    first.files = {CSV: RATINGS + b"one row more\n"}
    with pytest.raises(NetworkError, match="first seen"):
        fetch(workspace, first)
    fetch(workspace, first, second)
    check_whole(workspace)


@pytest.mark.parametrize("flat", [True, False])
def test_files_fetched_by_hand_are_taken_without_network(workspace, tmp_path, mirror, flat):
    for place, content in ((CSV, RATINGS), (META, METADATA)):
        path = tmp_path / "hand" / (place.split("/")[1] if flat else place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    fetch(workspace, mirror, from_dir=tmp_path / "hand")
    check_whole(workspace)
    assert not mirror.asked


def test_files_missing_or_odd_in_the_folder_are_data_errors_and_leave_nothing(workspace, tmp_path):
    (tmp_path / "Magazine_Subscriptions.csv").write_bytes(b"<html>sign in</html>")
    with pytest.raises(DataError, match="web page"):
        fetch(workspace, from_dir=tmp_path)
    (tmp_path / "Magazine_Subscriptions.csv").unlink()
    with pytest.raises(DataError, match=r"no Magazine_Subscriptions.csv there\n.*no meta_Magazine") as caught:
        fetch(workspace, from_dir=tmp_path)
    assert "amazon_v2" in caught.value.hint
    assert not list(workspace.raw("magazine").iterdir())


def test_a_file_put_in_place_by_hand_is_kept_and_written_down(workspace):
    folder = workspace.raw("magazine")
    folder.mkdir(parents=True)
    (folder / "Magazine_Subscriptions.csv").write_bytes(RATINGS)
    (folder / "meta_Magazine_Subscriptions.json.gz").write_bytes(METADATA)
    fetch(workspace)
    assert check_whole(workspace)["Magazine_Subscriptions.csv"]["source"] == "found in place"


def test_a_mix_stands_for_its_domains(workspace, mirror):
    with pytest.raises(NetworkError) as caught:
        download(workspace, ["fhckm", "food"], kinds=["ratings"], mirrors=[mirror.url])
    assert len(caught.value.problems) == 5
    assert "Grocery_and_Gourmet_Food" in caught.value.problems[0]


def test_unknown_domains_and_kinds_are_usage_errors(workspace):
    with pytest.raises(UsageError, match="magazin"):
        download(workspace, ["magazin"])
    with pytest.raises(UsageError, match="unknown kind 'weights'"):
        download(workspace, ["magazine"], kinds=["weights"])
