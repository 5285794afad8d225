import io
import struct
import threading
import zlib
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmm4rec_cli.data import fetch, images
from mmm4rec_cli.data.images import UnreadableImage, fetch_images, image_stem, open_image, safe_name
from mmm4rec_cli.data.tables import read_tables, write_tables
from mmm4rec_cli.errors import DataError, NetworkError
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace


def encoded(kind="JPEG", size=(20, 10), mode="RGB"):
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(stream, kind)
    return stream.getvalue()


class Shop(ThreadingHTTPServer):
    """Answers a path with its bytes, or with a function of the handler; counts what was asked for."""

    daemon_threads = True

    def __init__(self):
        self.answers, self.asked = {}, Counter()
        super().__init__(("127.0.0.1", 0), Answer)

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked[self.path] += 1
        answer = self.server.answers.get(self.path.lstrip("/"))
        if callable(answer):
            answer(self)
        elif answer is None:
            self.send_error(404)
        else:
            self.give(answer)

    def give(self, content, status=200, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Shop()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    async def pause(seconds):
        pass

    monkeypatch.setattr(fetch, "pause", pause)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


class Listener:
    def __init__(self):
        self.lines, self.done = [], 0

    def note(self, text):
        self.lines.append(text)

    warn = note

    @contextmanager
    def stage(self, name, total=None, unit=""):
        yield self
        assert self.done == total

    def advance(self, n=1, status=""):
        self.done += n


def write_domain(workspace, urls, domain="shop", paths=None):
    raw, n = sorted(urls), len(urls)
    items = {
        "item_id": range(1, n + 1),
        "raw_item_id": raw,
        "title": pa.nulls(n, pa.string()),
        "text": pa.nulls(n, pa.string()),
        "image": pa.array([(paths or {}).get(one) for one in raw], pa.string()),
        "image_url": pa.array([urls[one] for one in raw], pa.string()),
        "n_interactions": [1] * n,
    }
    write_tables(
        workspace,
        domain,
        interactions=pa.table({"user_id": [0] * n, "item_id": range(1, n + 1), "timestamp": range(n)}),
        items=pa.table(items),
        users=pa.table({"user_id": [0], "raw_user_id": ["ann"], "n_interactions": [n]}),
        manifest={},
    )


def images_of(workspace, domain="shop"):
    tables = read_tables(workspace, domain)
    return dict(zip(tables.raw_item_ids, tables.items["image"].to_pylist(), strict=True))


def slow(handler):
    handler.server.stopping.wait(5)
    handler.give(encoded())


def cut_short(handler):
    handler.give(encoded()[:100], length=len(encoded()))
    handler.close_connection = True


def test_each_picture_is_checked_and_lies_under_its_items_id(workspace, server):
    server.answers = {"a": encoded("JPEG"), "b": encoded("PNG"), "c": encoded("WEBP")}
    write_domain(workspace, {"007": server.url("a"), "B": server.url("b"), "C": server.url("c"), "none": None})
    manifest = fetch_images(workspace, "shop", DataSettings())
    folder = "data/raw/shop/images/"
    assert images_of(workspace) == {
        "007": folder + "007.jpg",
        "B": folder + "B.png",
        "C": folder + "C.webp",
        "none": None,
    }
    assert (workspace.root / folder / "B.png").read_bytes() == server.answers["b"]
    assert manifest["images"] == {"with_address": 3, "already_there": 0, "fetched": 3, "failed": 0}
    assert manifest["image_share"] == pytest.approx(0.75)
    assert not (workspace.raw("shop") / "images.log").exists()


def test_failures_are_counted_and_logged_and_leave_no_file(workspace, server):
    server.answers = {
        "good": encoded(),
        "page": b"<html>no picture here</html>",
        "half": encoded(size=(200, 200))[:900],
        "short": cut_short,
        "script": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    names = [*server.answers, "gone"]
    write_domain(workspace, {name: server.url(name) for name in names} | {"odd": "ftp://nowhere/x", "bad": "http://["})
    reporter = Listener()
    manifest = fetch_images(workspace, "shop", DataSettings(image_workers=3), reporter=reporter)
    assert manifest["images"] == {"with_address": 8, "already_there": 0, "fetched": 1, "failed": 7}
    assert [name for name, path in images_of(workspace).items() if path] == ["good"]
    assert [path.name for path in (workspace.raw("shop") / "images").iterdir()] == ["good.jpg"]
    log = (workspace.raw("shop") / "images.log").read_text()
    reasons = {line.split("\t")[0]: line.split("\t")[2] for line in log.splitlines()}
    assert reasons["gone"] == "HTTP 404"
    assert "not a picture" in reasons["page"]
    assert "not a picture" in reasons["script"]
    assert "truncated" in reasons["half"]
    assert "3 attempts" in reasons["short"]
    assert set(reasons) == {"page", "half", "short", "script", "gone", "odd", "bad"}
    assert any("7 of 8 pictures" in line for line in reporter.lines)
    assert server.asked["/gone"] == 1
    assert server.asked["/short"] == 3


def bare_png(width, height):
    """The header of a picture of that size, with next to nothing behind it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def test_each_item_has_a_row_on_what_became_of_its_picture(workspace, server):
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "JPEG")
    server.answers = {"good": encoded(), "dot": dot.getvalue(), "empty": b"", "huge": bare_png(40_000, 40_000)}
    write_domain(workspace, {name: server.url(name) for name in [*server.answers, "gone"]} | {"none": None})
    (workspace.raw("shop") / "images").mkdir(parents=True)
    (workspace.raw("shop") / "images" / ".left.jpg.x1.part").write_bytes(b"of a killed command")
    reporter = Listener()
    fetch_images(workspace, "shop", DataSettings(), reporter=reporter)
    rows = {row["raw_item_id"]: row for row in pq.read_table(workspace.raw("shop") / images.OUTCOMES).to_pylist()}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        **{"good": "fetched", "gone": "failed", "none": "no address"},
        **dict.fromkeys(("dot", "empty", "huge"), "rejected"),
    }
    assert rows["good"]["bytes"] == len(server.answers["good"])
    assert rows["gone"]["reason"] == "HTTP 404"
    assert "1 x 1" in rows["dot"]["reason"]
    assert "pixels" in rows["huge"]["reason"]
    assert any("1 fetched, 3 rejected, 1 failed" in line for line in reporter.lines)
    assert [path.name for path in (workspace.raw("shop") / "images").iterdir()] == ["good.jpg"]


def test_few_pictures_at_a_time_come_from_one_host(workspace, server):
    lock, now, most = threading.Lock(), Counter(), Counter()

    def counted(handler):
        with lock:
            now["here"] += 1
            most["here"] = max(most["here"], now["here"])
        threading.Event().wait(0.01)
        with lock:
            now["here"] -= 1
        handler.give(encoded())

    names = [f"p{i}" for i in range(40)]
    server.answers = dict.fromkeys(names, counted)
    write_domain(workspace, {name: server.url(name) for name in names})
    assert fetch_images(workspace, "shop", DataSettings(image_per_host=3))["images"]["fetched"] == 40
    assert 1 < most["here"] <= 3


def test_a_server_that_stumbles_is_asked_again(workspace, server):
    def stumbling(handler):
        if handler.server.asked[handler.path] < 3:
            handler.send_error(503)
        else:
            handler.give(encoded())

    server.answers = {"a": stumbling}
    write_domain(workspace, {"a": server.url("a")})
    assert fetch_images(workspace, "shop", DataSettings())["images"]["fetched"] == 1


def test_a_server_that_is_too_slow_is_given_up_in_time(workspace, server):
    server.stopping = threading.Event()
    server.answers = {"slow": slow, "good": encoded()}
    write_domain(workspace, {name: server.url(name) for name in server.answers})
    counts = fetch_images(workspace, "shop", DataSettings(image_timeout=0.05))["images"]
    server.stopping.set()
    assert counts["failed"] == 1
    assert "Timeout" in (workspace.raw("shop") / "images.log").read_text()


def test_what_is_there_is_not_fetched_again(workspace, server):
    server.answers = {"a": encoded()}
    write_domain(workspace, {"a": server.url("a"), "b": server.url("b"), "placed by hand": None})
    folder = workspace.raw("shop") / "images"
    fetch_images(workspace, "shop", DataSettings())
    (folder / (safe_name("placed by hand") + ".png")).write_bytes(encoded("PNG"))
    server.answers["b"] = encoded()
    counts = fetch_images(workspace, "shop", DataSettings())["images"]
    assert counts == {"with_address": 2, "already_there": 2, "fetched": 1, "failed": 0}
    assert server.asked["/a"] == 1
    assert all(images_of(workspace).values())
    assert not (workspace.raw("shop") / "images.log").exists()


def test_offline_takes_what_is_there_and_asks_nobody(workspace, server):
    server.answers = {"a": encoded(), "b": encoded()}
    write_domain(workspace, {"a": server.url("a"), "b": server.url("b")})
    (workspace.raw("shop") / "images").mkdir(parents=True)
    (workspace.raw("shop") / "images" / "a.jpg").write_bytes(encoded())
    counts = fetch_images(workspace, "shop", DataSettings(), offline=True)["images"]
    assert counts == {"with_address": 2, "already_there": 1, "fetched": 0, "failed": 0}
    assert images_of(workspace) == {"a": "data/raw/shop/images/a.jpg", "b": None}
    assert not server.asked


def test_not_one_picture_is_a_network_error_and_changes_no_table(workspace, server):
    write_domain(workspace, {"a": server.url("a"), "b": server.url("b"), "c": None})
    before = (workspace.processed("shop") / "items.parquet").read_bytes()
    with pytest.raises(NetworkError, match=r"2 items name a picture and not one.*HTTP 404") as caught:
        fetch_images(workspace, "shop", DataSettings())
    assert "--no-images" in caught.value.hint
    assert "--offline" in caught.value.hint
    assert (workspace.processed("shop") / "items.parquet").read_bytes() == before


def test_a_host_that_is_not_there_is_a_network_error(workspace):
    write_domain(workspace, {"a": "http://127.0.0.1:9/a.jpg"})
    with pytest.raises(NetworkError, match="ConnectError"):
        fetch_images(workspace, "shop", DataSettings(image_timeout=2))


def test_a_domain_without_addresses_needs_no_network_and_keeps_its_own_pictures(workspace):
    write_domain(workspace, {"a": None, "b": None}, paths={"a": "/pictures/a.jpg"})
    counts = fetch_images(workspace, "shop", DataSettings())["images"]
    assert counts == {"with_address": 0, "already_there": 0, "fetched": 0, "failed": 0}
    assert images_of(workspace) == {"a": "/pictures/a.jpg", "b": None}


def test_pictures_of_a_mix_lie_with_their_own_domain(workspace, server):
    server.answers = {"a": encoded()}
    write_domain(workspace, {"food-x": server.url("a"), "home-x": server.url("a")}, domain="fhckm")
    fetch_images(workspace, "fhckm", DataSettings())
    assert images_of(workspace, "fhckm") == {
        "food-x": "data/raw/food/images/x.jpg",
        "home-x": "data/raw/home/images/x.jpg",
    }
    write_domain(workspace, {"x": server.url("a")}, domain="food")
    assert fetch_images(workspace, "food", DataSettings())["images"]["already_there"] == 1


def test_an_interruption_leaves_whole_pictures_and_the_old_table(workspace, server, monkeypatch):
    class Impatient(Listener):
        def advance(self, n=1, status=""):
            raise KeyboardInterrupt

    server.answers = {name: encoded() for name in "abcdef"}
    write_domain(workspace, {name: server.url(name) for name in "abcdef"})
    with pytest.raises(KeyboardInterrupt):
        fetch_images(workspace, "shop", DataSettings(image_workers=1), reporter=Impatient())
    folder = workspace.raw("shop") / "images"
    assert all(open_image(path) for path in folder.iterdir())
    assert 1 <= len(list(folder.iterdir())) < 6
    assert not any(images_of(workspace).values())


def test_tables_are_needed_first(workspace):
    with pytest.raises(DataError, match="no tables"):
        fetch_images(workspace, "shop", DataSettings())


@given(st.lists(st.text(max_size=120), unique=True, max_size=6))
def test_every_id_gets_a_file_name_of_its_own_inside_the_folder(ids):
    names = [safe_name(raw) for raw in ids]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name.encode()) < 200
        assert not set(name) & set('/\\:*?"<>| \0')
        assert not name.startswith(".")


@pytest.mark.parametrize("raw", ["B00ABC", "007", "a.b-c_d"])
def test_plain_ids_keep_their_name(raw):
    assert safe_name(raw) == raw


@pytest.mark.parametrize("raw", ["..", "../../etc/passwd", "a/b", "", ".hidden", "a."])
def test_odd_ids_stay_in_the_folder(workspace, raw):
    stem = image_stem(workspace, "shop", raw)
    assert stem.resolve().parent == (workspace.raw("shop") / "images").resolve()
    assert not stem.name.startswith(".")


def test_transparent_places_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((1, 1)) == (255, 255, 255)


def test_a_decompression_bomb_is_not_unpacked(tmp_path, monkeypatch):
    Image.new("1", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with images.decoding(), pytest.raises(UnreadableImage, match=r"Bomb|pixels"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + b"\0" * 30, b"RIFF\0\0\0\0WEBPVP8 "])
def test_whatever_is_wrong_with_a_picture_is_one_error(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UnreadableImage):
        open_image(tmp_path / "x")
    with pytest.raises(UnreadableImage, match="no such file"):
        open_image(tmp_path / "y")
