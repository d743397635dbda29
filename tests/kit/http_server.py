"""A web server of a folder, which can be told to fail: real requests over real sockets."""

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """address: of the folder.  requests: what was asked for.  fail: decides by the number of a request to answer 503.

    cut: of how many of the next answers to send only the first half.  etag: changes when the contents are to have.
    """

    address: str = ""
    requests: list[str] = field(default_factory=list[str])
    fail: Any = None
    cut: int = 0
    etag: str = ""

    def copies(self, name: str) -> int:
        """How many times a file was sent as a whole."""
        return sum(request == f"GET /{name} None" for request in self.requests)


class _Handler(SimpleHTTPRequestHandler):
    """Answers to GET and HEAD, with ranges of bytes, which the standard library's server does not know."""

    protocol_version = "HTTP/1.1"

    def __init__(self, server_state: Server, *args: Any, **kwargs: Any) -> None:
        self.state = server_state
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        state, wanted = self.state, self.headers.get("Range")
        state.requests.append(f"{self.command} {self.path} {wanted}")
        if state.fail is not None and state.fail(len(state.requests)):
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            body = "".join(f'<a href="{name}">{name}</a>\n' for name in sorted(os.listdir(path))).encode()
            self._send(200, body, len(body), "text/html")
            return
        if not path.is_file():
            self.send_error(404)
            return
        whole = path.read_bytes()
        body, status = whole, 200
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            body, status = whole[int(first) : int(last) + 1 if last else None], 206
        size = len(body)
        if state.cut and self.command == "GET":
            state.cut -= 1
            body = body[: size // 2]
        self._send(status, body, size, "application/octet-stream", f"{wanted or ''}/{len(whole)}")

    def _send(self, status: int, body: bytes, size: int, kind: str, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.send_header("Content-Type", kind)
        self.send_header("Accept-Ranges", "bytes")
        if self.state.etag:
            self.send_header("ETag", self.state.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {content_range.removeprefix('bytes=')}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        if len(body) < size:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    """A server that does not print the errors of connections that a killed client has left."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, **behavior: Any) -> Generator[Server]:
    """Serve a folder at ``Server.address`` while it is entered.  behavior: fields of ``Server``."""
    state = Server(**behavior)
    server = _Quiet(("127.0.0.1", 0), partial(_Handler, state, directory=str(folder)))
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
