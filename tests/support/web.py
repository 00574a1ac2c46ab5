"""A server of files that sends parts of them, as object stores and web servers do."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Files:
    """What is served by path, and how; `requests` are those that came: method, path, headers."""

    address: str = ""
    content: dict[str, bytes] = field(default_factory=dict)
    authorization: str = ""  # that is asked for
    etag: str = '"first"'
    elsewhere: dict[str, str] = field(default_factory=dict)  # paths that another address, or "", is given for
    ranges: bool = True
    failure: bytes = b""  # the body of an answer of 400 to whoever asks for content
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0  # bytes of content


@contextmanager
def serve_files(content: Mapping[str, bytes], tls: ssl.SSLContext | None = None) -> Iterator[Files]:
    """Serve `content` by name on loopback, from threads of this process; over https:// with `tls`."""
    files = Files(content={f"/{name}": data for name, data in content.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            files.requests.append((self.command, self.path, headers))
            data = files.content.get(self.path)
            if self.path in files.elsewhere:
                self.answer(302, b"")
            elif not headers.get("authorization", "").startswith(files.authorization):
                self.answer(401, b"")
            elif files.failure and self.command == "GET":
                self.answer(400, files.failure)
            elif data is None:
                self.answer(404, b"")
            elif files.ranges and (part := re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))):
                first, last = int(part[1]), min(int(part[2]), len(data) - 1)
                self.answer(206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}")
            else:
                self.answer(200, data)

        do_HEAD = do_PUT = do_GET

        def answer(self, status: int, data: bytes, part: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 302 and files.elsewhere[self.path]:
                self.send_header("Location", files.elsewhere[self.path])
            if files.etag:
                self.send_header("ETag", files.etag)
            if part:
                self.send_header("Content-Range", part)
            self.end_headers()
            if self.command == "GET":
                files.sent += len(data)
                self.wfile.write(data)

        def log_message(self, *about: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    files.address = f"{'https' if tls else 'http'}://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
