"""A hub on loopback with the API that huggingface_hub 2.4 uses; it stores everything in memory and fails on demand.

    with FakeHub() as hub:
        hub.add_file("user/name", "config.json", b"{}")
        hub.fail("GET", r"/cdn/", Fault.drop(after=1000), times=2)
        subprocess.run([...], env=hub.environment())           # a process of its own
        hub.patch(monkeypatch)                                 # or this one
        hub.files("user/name"), hub.commits("user/name"), hub.requests

Uploads: repos/create, branch, preupload, LFS batch (basic; multipart above `part_size`), NDJSON commits. Downloads:
model info, tree, paths-info, resolve (LFS files by a redirect to /cdn/ with Range, ETag, linked size and SHA-256).
A read of a private repository and every write need the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_a_secret_that_must_never_be_printed"
TEXT_LIMIT = 10_000_000


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer, or with a request (`refuse`)."""

    kind: str
    value: int = 0

    @classmethod
    def status(cls, code: int = 500) -> Fault:
        """An error before anything was done."""
        return cls("status", code)

    @classmethod
    def drop(cls, after: int = 0) -> Fault:
        """The connection breaks after so many bytes of the body."""
        return cls("drop", after)

    @classmethod
    def short(cls, missing: int = 1) -> Fault:
        """The body lacks its last bytes, and Content-Length says so."""
        return cls("short", missing)

    @classmethod
    def corrupt(cls, at: int = 0) -> Fault:
        """One bit of the body is flipped."""
        return cls("corrupt", at)


@dataclass
class Rule:
    method: str
    pattern: re.Pattern[str]
    fault: Fault
    times: int


@dataclass(frozen=True)
class Blob:
    """A file of a repository. `data` is None where it was only announced (xet), or a path where it lies on disk."""

    data: bytes | Path | None
    size: int
    sha256: str
    lfs: bool
    git_oid: str

    def read(self) -> bytes:
        assert self.data is not None, "the bytes went to xet storage"
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()


@dataclass(frozen=True)
class Commit:
    oid: str
    branch: str
    summary: str
    paths: tuple[str, ...]


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, dict[str, Blob]] = field(default_factory=lambda: {"main": {}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: list[Commit] = field(default_factory=list)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def make_blob(path: str, data: bytes | Path) -> Blob:
    content = data if isinstance(data, bytes) else data.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    lfs = is_lfs(path, len(content), content[:512])
    return Blob(data, len(content), sha256, lfs, git_oid(pointer if lfs else content))


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > TEXT_LIMIT or b"\0" in sample or path.endswith((".safetensors", ".model", ".png"))


class FakeHub:
    """The server. `objects` holds the bytes of LFS files by SHA-256; `requests` all (method, path, status, range)."""

    def __init__(self, part_size: int | None = None, xet_store: Path | None = None):
        """
        Args:
            part_size: LFS files above it are uploaded in parts of it; None: in one piece.
            xet_store: folder of hf_xet's own local store, for clients that upload with xet; commits are then believed.
        """
        self.part_size, self.xet_store = part_size, xet_store
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes | Path] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, int, str]] = []
        self.rules: list[Rule] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def environment(self, home: Path | None = None, token: str | None = TOKEN) -> dict[str, str]:
        """os.environ for a client process; `home` is an empty folder for its HF_HOME."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        if self.xet_store is None:
            environment["HF_HUB_DISABLE_XET"] = "1"
        if home is not None:
            environment["HF_HOME"] = str(home)
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment

    def patch(self, monkeypatch: Any, token: str | None = TOKEN) -> None:
        """Point this process, where huggingface_hub is imported, at the server; retries do not wait."""
        import huggingface_hub.constants as constants
        import huggingface_hub.utils._http as http

        for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(key, raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", self.xet_store is None)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        monkeypatch.setattr(http.time, "sleep", lambda seconds: None)

    def fail(self, method: str, pattern: str, fault: Fault, times: int = 1) -> None:
        """The next `times` requests of `method` whose path matches `pattern` (searched) meet the fault."""
        self.rules.append(Rule(method, re.compile(pattern), fault, times))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for rule in self.rules:
                if rule.times > 0 and rule.method == method and rule.pattern.search(path):
                    rule.times -= 1
                    return rule.fault
        return None

    def add_repo(self, repo_id: str, private: bool = False) -> Repo:
        return self.repos.setdefault(repo_id, Repo(private))

    def add_file(self, repo_id: str, path: str, data: bytes | Path, branch: str = "main") -> None:
        """Put a file in a repository, which is made where it is not there."""
        repo = self.add_repo(repo_id)
        blob = make_blob(path, data)
        if blob.lfs:
            self.objects[blob.sha256] = data
        repo.branches.setdefault(branch, {})[path] = blob
        self.commit(repo, branch, "add", (path,))

    def commit(self, repo: Repo, branch: str, summary: str, paths: tuple[str, ...]) -> str:
        listing = json.dumps([len(repo.commits), *sorted((p, b.sha256) for p, b in repo.branches[branch].items())])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        repo.heads[branch] = oid
        repo.commits.append(Commit(oid, branch, summary, paths))
        return oid

    def files(self, repo_id: str, branch: str = "main") -> dict[str, Blob]:
        return self.repos[repo_id].branches[branch]

    def commits(self, repo_id: str) -> list[Commit]:
        return self.repos[repo_id].commits

    def sent(self, method: str, pattern: str) -> list[tuple[str, str, int, str]]:
        """The requests of `method` whose path matches `pattern` (searched), in the order of their answers."""
        return [r for r in self.requests if r[0] == method and re.search(pattern, r[1])]


class _Handler(BaseHTTPRequestHandler):
    """One request. Every route is a method whose docstring is a regular expression of the path."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.dispatch("GET")

    def do_HEAD(self) -> None:
        self.dispatch("HEAD")

    def do_POST(self) -> None:
        self.dispatch("POST")

    def do_PUT(self) -> None:
        self.dispatch("PUT")

    def dispatch(self, method: str) -> None:
        self.method, split = method, urlsplit(self.path)
        self.route, self.query = split.path, parse_qs(split.query)
        body = self.read_body()
        self.fault = self.hub.take_fault(method, self.route)
        if self.fault is not None and self.fault.kind == "status":
            self.answer(self.fault.value, {"error": "injected"})
            return
        if self.fault is not None and self.fault.kind == "drop" and method in ("POST", "PUT"):
            self.hub.requests.append((method, self.route, 0, ""))
            self.close_connection = True
            self.connection.close()
            return
        for wanted, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and (method == wanted or (method, wanted) == ("HEAD", "GET")):
                with self.hub.lock:
                    handle(self, body, *(unquote(group) for group in match.groups()))
                return
        self.answer(404, {"error": f"no route for {method} {self.route}"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self.read_chunks())
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def read_chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = dict(headers or {})
        self.hub.requests.append((self.method, self.route, status, self.headers.get("Range", "")))
        sent = data
        if self.fault is not None and self.method == "GET":
            if self.fault.kind == "short":
                sent = data = data[: -self.fault.value]
            elif self.fault.kind == "drop":
                sent = data[: self.fault.value]
            elif self.fault.kind == "corrupt":
                at = min(self.fault.value, len(data) - 1)
                sent = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.method != "HEAD":
            self.wfile.write(sent)
        if len(sent) != len(data):
            self.close_connection = True
            self.connection.close()

    def repo(self, repo_id: str, write: bool = False) -> Repo | None:
        """The repository, or None after an answer that says why not."""
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        repo = self.hub.repos.get(repo_id)
        if write and not allowed:
            self.answer(401, {"error": "Invalid username or password."}, {"X-Error-Message": "Invalid credentials"})
            return None
        if repo is None or (repo.private and not allowed):
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]] | None:
        branch = next((b for b, oid in repo.heads.items() if revision in (b, oid)), None)
        if branch is None:
            self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return branch, repo.branches[branch]

    # --------------------------------------------------------------------------------------------------------- reads

    def whoami(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        self.answer(200, {"type": "user", "name": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def model_info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        if (repo := self.repo(repo_id)) is None or (found := self.tree(repo, revision)) is None:
            return
        branch, files = found
        siblings = [
            {"rfilename": path, "size": blob.size, "blobId": blob.git_oid}
            | ({"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}} if blob.lfs else {})
            for path, blob in files.items()
        ]
        info = {"_id": "1", "id": repo_id, "modelId": repo_id, "sha": repo.heads[branch], "private": repo.private}
        self.answer(200, {**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    @staticmethod
    def entry(path: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        return entry

    def list_tree(self, body: bytes, repo_id: str, revision: str, under: str = "") -> None:
        if (repo := self.repo(repo_id)) is None or (found := self.tree(repo, revision)) is None:
            return
        prefix = f"{under}/" if under else ""
        inside = {p: b for p, b in sorted(found[1].items()) if p.startswith(prefix)}
        if under and not inside:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = sorted({prefix + p[len(prefix) :].split("/")[0] for p in inside if "/" in p[len(prefix) :]})
        entries = [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in folders]
        entries += [self.entry(p, b) for p, b in inside.items() if recursive or "/" not in p[len(prefix) :]]
        self.answer(200, entries)

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        if (repo := self.repo(repo_id)) is None or (found := self.tree(repo, revision)) is None:
            return
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        self.answer(200, [self.entry(p, found[1][p]) for p in paths if p in found[1]])

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        if (repo := self.repo(repo_id)) is None or (found := self.tree(repo, revision)) is None:
            return
        branch, files = found
        headers = {"X-Repo-Commit": repo.heads[branch], "Accept-Ranges": "bytes"}
        blob = files.get(path)
        if blob is None:
            self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        elif blob.lfs:
            headers |= {
                "X-Linked-Size": str(blob.size),
                "X-Linked-ETag": f'"{blob.sha256}"',
                "ETag": f'"{blob.git_oid}"',
            }
            # Another host, as the real one: the client follows a redirect within the hub while it asks for metadata.
            storage = self.hub.endpoint.replace("127.0.0.1", "localhost")
            self.answer(302, b"", {**headers, "Location": f"{storage}/cdn/{blob.sha256}"})
        else:
            self.send_content(blob.read(), {**headers, "ETag": f'"{blob.git_oid}"'})

    def cdn(self, body: bytes, sha256: str) -> None:
        data = self.hub.objects.get(sha256)
        if data is None:
            self.answer(404, b"")
            return
        self.send_content(data if isinstance(data, bytes) else data.read_bytes(), {"ETag": f'"{sha256}"'})

    def send_content(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, data, headers)
            return
        begin, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if begin >= len(data):
            self.answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
            return
        self.answer(206, data[begin : end + 1], {**headers, "Content-Range": f"bytes {begin}-{end}/{len(data)}"})

    # -------------------------------------------------------------------------------------------------------- writes

    def create_repo(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": "1"}
        if repo_id in self.hub.repos:
            self.answer(409, {**answer, "error": "You already created this model repo"})
            return
        self.hub.add_repo(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.answer(200, answer)

    def create_branch(self, body: bytes, repo_id: str, branch: str) -> None:
        if (repo := self.repo(repo_id, write=True)) is None:
            return
        if branch in repo.branches:
            self.answer(409, {"error": "Reference already exists"})
            return
        repo.branches[branch], repo.heads[branch] = dict(repo.branches["main"]), repo.heads["main"]
        self.answer(200, {})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if (repo := self.repo(repo_id, write=True)) is None or (found := self.tree(repo, revision)) is None:
            return
        answer = []
        for file in json.loads(body)["files"]:
            there = found[1].get(file["path"])
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            oid = None if there is None else (there.sha256 if there.lfs else there.git_oid)
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answer})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        if self.repo(repo_id, write=True) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.endpoint}/lfs/{oid}"}
                part = self.hub.part_size
                if part is not None and size > part:
                    count = -(-size // part)
                    parts = {f"{n:05d}": f"{self.hub.endpoint}/lfs/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.endpoint}/lfs/{oid}/complete",
                        "header": {"chunk_size": str(part), **parts},
                    }
                verify = {"href": f"{self.hub.endpoint}/{repo_id}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "checksum mismatch"})
            return
        self.hub.objects[oid] = body
        self.answer(200, b"", {"ETag": f'"{oid}"'})

    def lfs_part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = body
        self.answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def lfs_complete(self, body: bytes, oid: str) -> None:
        parts = json.loads(body)["parts"]
        data = b"".join(self.hub.parts.pop((oid, part["partNumber"])) for part in parts)
        if hashlib.sha256(data).hexdigest() != oid:
            self.answer(400, {"error": "checksum mismatch"})
            return
        self.hub.objects[oid] = data
        self.answer(200, {})

    def lfs_verify(self, body: bytes, repo_id: str) -> None:
        wanted = json.loads(body)
        data = self.hub.objects.get(wanted["oid"])
        size = None if data is None else (len(data) if isinstance(data, bytes) else data.stat().st_size)
        self.answer(200 if size == wanted["size"] else 404, {})

    def xet_token(self, body: bytes, repo_id: str, revision: str) -> None:
        if self.repo(repo_id, write=True) is None:
            return
        url, expires = f"local://{self.hub.xet_store}", 4_000_000_000
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(expires)}
        self.answer(200, {"casUrl": url, "accessToken": "t", "exp": expires}, headers)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if (repo := self.repo(repo_id, write=True)) is None or (found := self.tree(repo, revision)) is None:
            return
        branch, files = found
        header, *operations = [json.loads(line) for line in body.splitlines()]
        changed = dict(files)
        paths = []
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                changed[path] = make_blob(path, base64.b64decode(value["content"]))
            elif key == "lfsFile":
                stored = self.hub.objects.get(value["oid"])
                if stored is None and self.hub.xet_store is None:
                    self.answer(400, {"error": f"the content of {path} was never uploaded"})
                    return
                changed[path] = Blob(stored, value["size"], value["oid"], True, git_oid(value["oid"].encode()))
            elif key == "deletedFile":
                changed.pop(path)
            paths.append(path)
        repo.branches[branch] = changed
        oid = self.hub.commit(repo, branch, header["value"]["summary"], tuple(paths))
        self.answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"}
        )

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        ok = content.startswith("---\n") and "\n---\n" in content
        self.answer(200 if ok else 400, {"errors": [], "warnings": []})


REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("GET", rf"/api/models/{REPO}", _Handler.model_info),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", _Handler.model_info),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)", _Handler.list_tree),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)/(.+)", _Handler.list_tree),
    ("POST", rf"/api/models/{REPO}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", r"/cdn/([0-9a-f]{64})", _Handler.cdn),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", _Handler.create_branch),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", _Handler.lfs_verify),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("PUT", r"/lfs/([0-9a-f]{64})/(\d+)", _Handler.lfs_part),
    ("POST", r"/lfs/([0-9a-f]{64})/complete", _Handler.lfs_complete),
    ("GET", rf"/api/models/{REPO}/xet-write-token/([^/]+)", _Handler.xet_token),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", _Handler.commit),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
]
