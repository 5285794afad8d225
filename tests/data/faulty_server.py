"""A server on 127.0.0.1 that serves files and, in between, does everything that goes wrong on the net.

`faults[path]` is a list of functions of the handler, used up one a request; `fate`, if set, is asked for a fault where
that list is empty. `sent` counts the bytes of bodies that were written.
"""

import contextlib
import hashlib
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files=None):
        self.files = dict(files or {})
        self.faults, self.asked, self.sent = {}, [], 0
        self.fate = None
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        content = self.server.files.get(self.key)
        if content is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

    def do_GET(self):
        with self.server.lock:
            self.server.asked.append((self.key, self.headers.get("Range")))
            faults = self.server.faults.get(self.key, [])
            fault = faults.pop(0) if faults else self.server.fate and self.server.fate(self)
        if fault:
            fault(self)
        elif self.key not in self.server.files:
            self.send_error(404)
        else:
            self.give(self.server.files[self.key])

    @property
    def key(self):
        return self.path.partition("?")[0].lstrip("/")

    def give(
        self, content, cut=None, kind="application/octet-stream", version=True, ranges=True, length=None, pause=None
    ):
        """Answer with `content`, from where the client asks; `cut`: hang up behind so many bytes; `length`: promise."""
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if version and ranges and self.headers.get("Range") and self.headers.get("If-Range", etag) == etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        promised = len(content) - start if length is None else max(length - start, 0)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(promised))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + promised - 1}/{start + promised}")
        if version:
            self.send_header("ETag", etag)
        if version and ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        body = content[start : None if cut is None else start + cut][:promised]
        step = len(body) or 1 if pause is None else max(1, len(body) // 200)
        for at in range(0, len(body), step):
            self.wfile.write(body[at : at + step])
            with self.server.lock:
                self.server.sent += len(body[at : at + step])
            if pause is not None:
                self.wfile.flush()
                time.sleep(pause)
        self.close_connection = cut is not None or len(body) < promised or length is not None

    def whole(self, **how):
        self.give(self.server.files[self.key], **how)

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


def cut(size, **how):
    return lambda handler: handler.whole(cut=size, **how)


def promise(difference):
    """Promise so many bytes more (or fewer) than there are."""
    return lambda handler: handler.whole(length=len(handler.server.files[handler.key]) + difference)


def without_ranges(handler):
    handler.whole(ranges=False)


def reset(handler):
    handler.connection.close()


def page(kind="text/html"):
    return lambda handler: handler.give(b"<!DOCTYPE html><title>Moved</title>", kind=kind, version=False)


def redirect(handler):
    handler.send_response(302)
    handler.send_header("Location", f"{handler.server.url}{handler.path}")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def other_content(handler):
    """Another version of the file, broken off: what came of it is no part of the file."""
    content = b"an older version\n" * (len(handler.server.files[handler.key]) // 17 + 1)
    handler.give(content, cut=len(content) // 8)


def slow(pause):
    return lambda handler: handler.whole(pause=pause)


def any_fault(chance, drip=0.05):
    """A fate that lets `chance` of the requests go wrong, each in a way of its own; drawn from the random `chance`."""

    def fate(handler):
        size = len(handler.server.files.get(handler.key, b""))
        if not size or chance.random() < 0.45:
            return None
        return chance.choice(
            [
                cut(chance.randrange(size)),
                cut(chance.randrange(size)),
                cut(chance.randrange(size // 3), version=False),
                cut(chance.randrange(size // 3), ranges=False),
                promise(chance.randrange(1, 1000)),
                promise(-chance.randrange(1, size)),
                status(429, Retry_After="0"),
                status(429, Retry_After="1") if chance.random() < 0.1 else status(503),
                status(500),
                redirect,
                reset,
                page(),
                page("text/plain"),
                other_content,
                slow(drip),
            ]
        )

    return fate


def chance(seed):
    return random.Random(seed)
