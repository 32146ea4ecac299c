"""A hub on this machine: what huggingface_hub asks of one, and the host that its large files are kept on.

Files lie at another host name than the hub, as they do, and are served by ranges; every request is noted.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Files(ThreadingHTTPServer):
    """A web server of some files: path -> bytes; ranges, entity tags, and what was sent.

    Attributes:
      ranges: whether it serves them.
      broken: how many of the next answers end after half their bytes.
    """

    daemon_threads = True

    def __init__(self, handler=None):
        super().__init__(("127.0.0.1", 0), handler or FileHandler)
        self.files, self.log, self.ranges, self.broken, self.status = {}, [], True, 0, 0

    @property
    def port(self):
        return self.server_address[1]

    @property
    def sent(self):
        """Bytes of all bodies."""
        return sum(n for *_, n in self.log)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", headers=(), length=None):
        self.server.log.append((self.command, self.path, dict(self.headers), len(body)))
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def json(self, value, status=200, headers=()):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **dict(headers)})

    def content(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def serve(self, data, headers):
        """A file, or the range of it that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return self.answer(412)
        if asked is None or not self.server.ranges:
            if self.server.broken:
                self.close_connection = True
                return self.answer(200, data[: len(data) // 2], headers, length=len(data))
            return self.answer(200, data, headers)
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            return self.answer(416)
        said = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        if self.server.broken:
            self.server.broken -= 1
            self.close_connection = True
            return self.answer(206, data[start : (start + stop) // 2], said, length=stop - start)
        return self.answer(206, data[start:stop], said)


class FileHandler(Handler):
    def do_GET(self):
        if self.server.status:
            return self.answer(self.server.status)
        data = self.server.files.get(urlsplit(self.path).path)
        if data is None:
            return self.answer(404)
        return self.serve(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()[:20]}"'})

    do_HEAD = do_GET

    def do_PUT(self):
        self.server.files[self.path] = self.content()
        self.answer(200)


class Hub(Files):
    """The hub: repositories, and `kept`, the server of their large files.

    Attributes:
      repositories: name -> commits, oldest first, each an id and path -> bytes.
      heads: (name, branch) -> id.
      token: what requests must have, "" for none.
    """

    def __init__(self):
        super().__init__(HubHandler)
        self.kept, self.repositories, self.heads, self.token = Files(), {}, {}, ""

    def commit(self, name, files, branch="main"):
        """A new commit of a branch, as if somebody had pushed it."""
        commits = self.repositories.setdefault(name, {})
        before = commits.get(self.heads.get((name, branch)), {})
        oid = hashlib.sha1(f"{name}{branch}{len(commits)}".encode()).hexdigest()
        commits[oid] = {**before, **files}
        self.heads[name, branch] = oid
        return oid

    def at(self, name, revision):
        """Id of a revision, None where there is none."""
        return self.heads.get((name, revision), revision if revision in self.repositories[name] else None)


class HubHandler(Handler):
    def refused(self, status, code):
        self.json({"error": code}, status, {"X-Error-Code": code})

    def allowed(self):
        fine = not self.server.token or self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if not fine:
            self.content()
            self.answer(401)
        return fine

    def route(self):
        path = unquote(urlsplit(self.path).path)
        for pattern, method in ROUTES[self.command]:
            match = re.fullmatch(pattern, path)
            if match is not None:
                if "repo" in match.groupdict() and match["repo"] not in self.server.repositories:
                    self.content()
                    return self.refused(404, "RepoNotFound")
                return self.allowed() and method(self, **match.groupdict())
        self.content()
        return self.answer(404)

    do_GET = do_HEAD = do_POST = route

    def info(self, repo, revision="main"):
        oid = self.server.at(repo, revision)
        if oid is None:
            return self.refused(404, "RevisionNotFound")
        card = self.server.repositories[repo][oid].get("README.md", b"").decode()
        license = re.search(r"^license: (.*)$", card, re.M)
        data = {"license": license[1]} if license else {}
        return self.json({"id": repo, "sha": oid, "cardData": data, "siblings": [], "tags": []})

    def resolve(self, repo, revision, file):
        oid = self.server.at(repo, revision)
        if oid is None:
            return self.refused(404, "RevisionNotFound")
        data = self.server.repositories[repo][oid].get(file)
        head = {"X-Repo-Commit": oid}
        if data is None:
            return self.json({}, 404, {"X-Error-Code": "EntryNotFound", **head})
        sha = hashlib.sha256(data).hexdigest()
        if not file.endswith(".safetensors"):
            return self.serve(data, {"ETag": f'"{sha}"', **head})
        self.server.kept.files[f"/{sha}"] = data
        there = f"http://localhost:{self.server.kept.port}/{sha}?X-Amz-Signature=signed"
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha}"', "Location": there}
        return self.answer(302, b"", {**head, **linked})

    def create(self):
        said = json.loads(self.content())
        name = f"{said['organization']}/{said['name']}"
        known = name in self.server.repositories
        if not known:
            self.server.commit(name, {".gitattributes": b""})
        self.json({"url": f"http://127.0.0.1:{self.server.port}/{name}"}, 409 if known else 200)

    def branch(self, repo, branch):
        self.content()
        known = (repo, branch) in self.server.heads
        self.server.heads.setdefault((repo, branch), self.server.heads[repo, "main"])
        self.json({}, 409 if known else 200)

    def validate(self):
        self.content()
        self.json({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        rows = json.loads(self.content())["files"]
        mode = lambda x: "lfs" if x["path"].endswith(".safetensors") else "regular"  # noqa: E731
        self.json(
            {"files": [{"path": x["path"], "uploadMode": mode(x), "shouldIgnore": False} for x in rows]}
        )

    def batch(self, repo):
        rows = json.loads(self.content())["objects"]
        there = f"http://127.0.0.1:{self.server.kept.port}"
        self.json(
            {
                "transfer": "basic",
                "objects": [{**x, "actions": {"upload": {"href": f"{there}/{x['oid']}"}}} for x in rows],
            }
        )

    def send_commit(self, repo, revision):
        rows = [json.loads(x) for x in self.content().splitlines()]
        parent = next(x["value"] for x in rows if x["key"] == "header").get("parentCommit")
        if parent != self.server.heads[repo, revision]:
            return self.answer(412)
        files = {}
        for x in (x["value"] for x in rows if x["key"] != "header"):
            whole = (
                base64.b64decode(x["content"]) if "content" in x else self.server.kept.files[f"/{x['oid']}"]
            )
            files[x["path"]] = whole
        oid = self.server.commit(repo, files, revision)
        return self.json({"commitUrl": f"http://127.0.0.1/{repo}/commit/{oid}", "commitOid": oid})


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = {
    "GET": [
        (rf"/api/models/{REPO}/revision/(?P<revision>.+)", HubHandler.info),
        (rf"/api/models/{REPO}", HubHandler.info),
        (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", HubHandler.resolve),
    ],
    "POST": [
        (r"/api/repos/create", HubHandler.create),
        (r"/api/validate-yaml", HubHandler.validate),
        (rf"/api/models/{REPO}/branch/(?P<branch>.+)", HubHandler.branch),
        (rf"/api/models/{REPO}/preupload/(?P<revision>.+)", HubHandler.preupload),
        (rf"/api/models/{REPO}/commit/(?P<revision>.+)", HubHandler.send_commit),
        (rf"/{REPO}\.git/info/lfs/objects/batch", HubHandler.batch),
    ],
}
ROUTES["HEAD"] = ROUTES["GET"]


@contextmanager
def running(server):
    """A server that answers."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
