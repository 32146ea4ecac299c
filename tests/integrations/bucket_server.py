"""The clouds' services on this machine: moto's S3, a Google emulator, and a proxy that notes what is asked.

The emulator knows neither generations of what is downloaded, nor conditions of what is uploaded, nor parts of
listings, and takes no empty object. The proxy adds the first three as Google documents them
(x-goog-generation, ifGenerationMatch, startOffset and endOffset), and puts a line's end into the last, which
nobody reads.
"""

import http.client
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

BUCKET = "bucket"
NOT_INSTALLED = "needs the extra 'buckets': moto, gcp-storage-emulator"


class Proxy(ThreadingHTTPServer):
    """A proxy: requests and answers as they are, a note of each.

    Attributes:
      log: (method, path, headers, bytes of the answer).
      before: called with the method and the path before a request goes on.
    """

    daemon_threads = True

    def __init__(self, port, google):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.google, self.log, self.before = port, google, [], lambda method, path: None
        self.one = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def forward(self, method, path, body=b"", headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), data

    def generation(self, name):
        """Of an object; "0" where there is none."""
        path = f"/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}"
        status, _, data = self.forward("GET", path)
        return json.loads(data)["generation"] if status == 200 else "0"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # one packet per answer
    wbufsize = -1

    def log_message(self, *arguments):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.before(self.command, self.path)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding",)}
        headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
        headers["Content-Length"] = str(len(body))
        with self.server.one:
            status, found, data = self.answer(body, headers)
        self.server.log.append((self.command, self.path, dict(self.headers), len(data)))
        self.send_response(status)
        for key, value in found.items():
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, value)
        length = found.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def answer(self, body, headers):
        parts = urlsplit(self.path)
        asked = {k: v[0] for k, v in parse_qs(parts.query).items()}
        if self.server.google and "ifGenerationMatch" in asked:
            name = asked.get("name") or unquote(parts.path.rpartition("/o/")[2])
            if self.server.generation(name) != asked["ifGenerationMatch"]:
                return 412, {}, b"{}"
        if self.server.google and self.command == "POST" and not body:
            body, headers = b"\n", {**headers, "Content-Length": "1"}
        status, found, data = self.server.forward(self.command, self.path, body, headers)
        if self.server.google and asked.get("alt") == "media" and status in (200, 206):
            found["x-goog-generation"] = self.server.generation(unquote(parts.path.rpartition("/o/")[2]))
        if self.server.google and "startOffset" in asked:
            low, high = asked["startOffset"], asked.get("endOffset", chr(0x10FFFF))
            listing = json.loads(data)
            listing["items"] = [x for x in listing.get("items", ()) if low <= x["name"] < high]
            data = json.dumps(listing).encode()
        return status, found, data

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any


@contextmanager
def proxied(port, google):
    server = Proxy(port, google)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3(monkeypatch):
    """moto's S3 with a bucket, as the environment then has it."""
    moto = pytest.importorskip("moto.server", reason=NOT_INSTALLED)
    for key, value in (
        ("ACCESS_KEY_ID", "id"),
        ("SECRET_ACCESS_KEY", "secret"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{key}", value)
    service = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    try:
        with proxied(service.get_host_and_port()[1], False) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            assert server.forward("PUT", f"/{BUCKET}")[0] == 200
            yield f"s3://{BUCKET}", server
            server.forward("POST", "/moto-api/reset")
    finally:
        service.stop()


@contextmanager
def gcs(monkeypatch):
    """A Google emulator with a bucket, as the environment then has it."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=NOT_INSTALLED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    service.start()
    try:
        with proxied(port, True) as server:
            monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
            yield f"gs://{BUCKET}", server
    finally:
        service.stop()


SERVICES = {"s3": s3, "gcs": gcs}
