"""A real HTTP server on 127.0.0.1 that serves a folder, and fails as it is told to."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Fault = str
"""error, refused, truncated, stalled, changed: what becomes of one answer. whole: the range is ignored."""


class Web:
    """The server's address, what was asked of it, and the faults still to come: a list for each file's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[Fault]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.stall = 2.0
        self.url = ""


@contextmanager
def serve(folder: Path) -> Iterator[Web]:
    """Serve a folder until the block ends."""
    web = Web(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, web)

        do_HEAD = do_GET

        def log_message(self, format: str, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


def place_of(asked: str) -> str:
    """The file that is asked for, by its path or as an object of a Google bucket."""
    found = re.fullmatch(r"/download/storage/v1/b/[^/]+/o/([^?]+)\?alt=media", asked)
    return unquote(found[1]) if found else asked.lstrip("/")


def answer(request: BaseHTTPRequestHandler, web: Web) -> None:
    """One answer, with the file's next fault if there is one."""
    path = web.folder / place_of(request.path)
    span = request.headers.get("Range")
    web.asked.append((request.path, span))
    faults = web.faults.get(path.name, [])
    fault = faults.pop(0) if faults else None
    if fault in ("error", "refused") or not path.is_file():
        request.send_response({"error": 503, "refused": 403, None: 404}.get(fault, 404))
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    data = path.read_bytes()
    match = re.match(r"bytes=(\d+)-(\d*)", span or "") if fault != "whole" else None
    if match:
        start, end = int(match[1]), int(match[2] or len(data) - 1) + 1
        total, data = len(data), data[start:end]
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
    else:
        request.send_response(200)
    if fault == "changed":
        data = bytes([data[0] ^ 1]) + data[1:]
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command == "HEAD":
        return
    try:
        if fault == "truncated":
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return
        if fault == "stalled":
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            time.sleep(web.stall)
            request.close_connection = True
            return
        request.wfile.write(data)
    except OSError:
        pass  # the other side gave up
