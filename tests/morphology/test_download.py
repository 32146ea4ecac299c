"""The downloader, against a server on this machine."""

import hashlib
import http.server
import re
import threading
from typing import ClassVar

import pytest

from experiments.morphology.download import Remote, fetch, sources

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).ranges.append(asked)
        start = int(re.findall(r"bytes=(\d+)-", asked)[0]) if asked and "plain" not in self.path else 0
        missing, beyond = "missing" in self.path, start >= len(CONTENT)
        body = b"" if missing or beyond else CONTENT[start:]
        self.send_response(404 if missing else 416 if beyond else 206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:1000] if "broken" in self.path and not asked else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    Handler.ranges = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def remote(url: str, content: bytes = CONTENT) -> Remote:
    return Remote("folder/file", url, hashlib.sha256(content).hexdigest())


def test_a_file_comes_once(address, tmp_path):
    assert fetch(remote(f"{address}/x"), tmp_path)
    assert (tmp_path / "folder/file").read_bytes() == CONTENT
    assert not fetch(remote(f"{address}/x"), tmp_path)
    assert len(Handler.ranges) == 1


def test_a_broken_download_goes_on(address, tmp_path):
    with pytest.raises(OSError, match="run again"):
        fetch(remote(f"{address}/broken"), tmp_path)
    assert fetch(remote(f"{address}/broken"), tmp_path)
    assert Handler.ranges == [None, "bytes=1000-"]
    assert (tmp_path / "folder/file").read_bytes() == CONTENT


@pytest.mark.parametrize(("path", "kept"), [("plain", 500), ("x", len(CONTENT))])
def test_servers_without_ranges_and_parts_that_are_whole(address, tmp_path, path, kept):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file.part").write_bytes(CONTENT[:kept])
    assert fetch(remote(f"{address}/{path}"), tmp_path)
    assert (tmp_path / "folder/file").read_bytes() == CONTENT


def test_other_content_is_refused_and_not_kept(address, tmp_path):
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(remote(f"{address}/x", b"other"), tmp_path)
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_missing_file_names_its_address(address, tmp_path):
    with pytest.raises(OSError, match="missing: the server answered 404"):
        fetch(remote(f"{address}/missing"), tmp_path)


def test_every_file_has_a_pinned_address():
    urls = [source.url for source in sources()]
    assert len(set(urls)) == 32
    assert any(u.endswith("/490e2e06/task1/surprise/polish-test") for u in urls)
    assert any(u.endswith("/490e2e06/task1/all/italian-dev") for u in urls)
    assert any(u.endswith("/185dfcf5/data/scrape/tsv/pol_latn_broad.tsv") for u in urls)
