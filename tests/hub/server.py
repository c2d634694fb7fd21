"""The part of the Hub's HTTP API that `datasets` and `huggingface_hub` use to push and to load, on loopback.

Checks what the real one checks: tokens, the hash of each upload, and that a commit's parent is the head of its branch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"hf_writer": True, "hf_reader": False}  # may it write?


@dataclass(frozen=True)
class File:
    """A file of a revision: small ones in the commit, others by their hash."""

    size: int
    oid: str
    content: bytes | None = None


Tree = dict[str, File]


@dataclass
class Repo:
    """Commits by their hash, and where each branch is."""

    private: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        """A new head of a branch."""
        self.messages.append(message)
        sha = hashlib.sha1(f"{self.branches.get(branch)} {len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def head(self, revision: str) -> str | None:
        """The commit of a branch or a hash."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong in the next `times` requests that match: a status, a callback before the answer, or a cut."""

    method: str
    path: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    before: Callable[[], None] | None = None
    after: int = 0  # matching requests that are let through first


class Hub(ThreadingHTTPServer):
    """A Hub; `url` is its HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.lock = folder, threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.gated: set[str] = set()  # models, of which there are no others
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fault_of(self, method: str, path: str) -> Fault | None:
        """What is to go wrong with a request."""
        with self.lock:
            self.seen.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def text(self, repo: str, path: str, revision: str = "main") -> str:
        """A small file."""
        content = self.repos[repo].commits[self.repos[repo].branches[revision]][path].content
        assert content is not None
        return content.decode()

    def files(self, repo: str, revision: str = "main") -> list[str]:
        """Names of all files."""
        return sorted(self.repos[repo].commits[self.repos[repo].branches[revision]])


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/datasets", "listing"),
        ("GET", r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/api/datasets/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/datasets/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/datasets/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", "paths"),
        ("GET", r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("POST", r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "upload"),
        ("POST", r"/lfs/verify", "verify"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/.*)?", "model"),
        ("GET", r"/([^/]+/[^/]+)/resolve/.*", "model"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/.*", "model"),
        ("GET", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        fault = self.server.fault_of(self.command, path)
        if fault is not None and fault.cut:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.connection.close()
            self.close_connection = True
            return
        self.body = self._body()
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.status:
            self._send({"error": "injected"}, fault.status, fault.headers)
            return
        self.query = parse_qs(url.query)
        writes = self.command in ("POST", "PUT") and not re.search(r"paths-info|validate-yaml|^/lfs", path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if writes and not TOKENS.get(token, False):
            known = token in TOKENS
            self._send({"error": "Forbidden" if known else "Invalid credentials"}, 403 if known else 401)
            return
        for method, pattern, name in self.ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                with self.server.lock:
                    getattr(self, name)(*match.groups())
                return
        self._send({"error": f"no such route: {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _at(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.server.repos.get(name)
        if repo is None:
            self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        sha = repo.head(revision)
        if sha is None:
            self._send({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, sha

    def model(self, name: str) -> None:
        gated = name in self.server.gated
        error = f"Access to model {name} is restricted." if gated else "Repository not found"
        code = "GatedRepo" if gated else "RepoNotFound"  # the real one has 401 for both, where there is no token
        self._send({"error": error}, 401, {"X-Error-Code": code, "X-Error-Message": error})

    def whoami(self) -> None:
        self._send({"type": "user", "name": "me", "orgs": []})

    def validate(self) -> None:
        self._send({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repos:
            self._send(
                {"error": "You already created this dataset repo", "url": f"{self.server.url}/datasets/{name}"}, 409
            )
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = self.server.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": _small(b"*.parquet filter=lfs\n")}, "initial commit")
        self._send({"url": f"{self.server.url}/datasets/{name}", "name": name, "id": name})

    def listing(self) -> None:
        [author] = self.query["author"]
        self._send([{"_id": name, "id": name} for name in self.server.repos if name.startswith(f"{author}/")])

    def info(self, name: str, revision: str | None) -> None:
        if (found := self._at(name, revision or "main")) is None:
            return
        repo, sha = found
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self._send({"_id": "1", "id": name, "author": name.partition("/")[0], "sha": sha, "private": repo.private,
                    "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
                    "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"})  # fmt: skip

    def preupload(self, name: str, revision: str) -> None:
        if self._at(name, revision) is None:
            return
        files = [{"path": f["path"], "shouldIgnore": False, "oid": None,
                  "uploadMode": "lfs" if f["path"].endswith((".parquet", ".png")) else "regular"}
                 for f in json.loads(self.body)["files"]]  # fmt: skip
        self._send({"files": files})

    def branch(self, name: str, branch: str) -> None:
        if (found := self._at(name, "main")) is None:
            return
        repo, sha = found
        if branch in repo.branches:
            self._send({"error": "Reference already exists"}, 409)
            return
        repo.branches[branch] = sha
        self._send({}, 201)

    def batch(self, name: str) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            | ({} if (self.server.folder / o["oid"]).exists() else {"actions": {
                "upload": {"href": f"{self.server.url}/lfs/{o['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs/verify"}}})
            for o in json.loads(self.body)["objects"]
        ]  # fmt: skip
        self._send({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._send({"error": "the content has another hash"}, 400)
            return
        (self.server.folder / oid).write_bytes(self.body)
        self.server.uploads.append(oid)
        self._send({})

    def verify(self) -> None:
        asked = json.loads(self.body)
        file = self.server.folder / asked["oid"]
        right = file.exists() and file.stat().st_size == asked["size"]
        self._send({} if right else {"error": "not there"}, 200 if right else 404)

    def commit(self, name: str, branch: str) -> None:
        if (found := self._at(name, branch)) is None:
            return
        repo, sha = found
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, tree = lines[0]["value"], dict(repo.commits[sha])
        if header.get("parentCommit") not in (None, sha):
            self._send({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                tree[path] = _small(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                file = self.server.folder / line["value"]["oid"]
                if not file.exists():
                    self._send({"error": f"{path} was not uploaded"}, 400)
                    return
                tree[path] = File(file.stat().st_size, line["value"]["oid"])
            elif line["key"] == "deletedFile":
                if tree.pop(path, None) is None:
                    self._send({"error": f"{path} is not there"}, 400)
                    return
            else:
                tree = {p: f for p, f in tree.items() if not p.startswith(path.rstrip("/") + "/")}
        new = repo.commit(branch, tree, header["summary"])
        self._send({"success": True, "commitOid": new, "commitUrl": f"{self.server.url}/datasets/{name}/commit/{new}",
                    "hookOutput": ""})  # fmt: skip

    def paths(self, name: str, revision: str) -> None:
        if (found := self._at(name, revision)) is None:
            return
        repo, sha = found
        text = self.body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        tree = repo.commits[sha]
        files = [_entry(path, tree[path]) for path in wanted if path in tree]
        folders = [p for p in wanted if p not in tree and any(f.startswith(p.rstrip("/") + "/") for f in tree)]
        self._send([*files, *({"type": "directory", "path": p, "oid": "0", "size": 0} for p in folders)])

    def tree(self, name: str, revision: str, path: str | None) -> None:
        if (found := self._at(name, revision)) is None:
            return
        repo, sha = found
        start = f"{path.rstrip('/')}/" if path else ""
        files = {p: f for p, f in repo.commits[sha].items() if p.startswith(start)}
        if start and not files:
            self._send({"error": "not there"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = {start + p.removeprefix(start).partition("/")[0] for p in files if "/" in p.removeprefix(start)}
        if deep:
            folders = {p.rpartition("/")[0] for p in files if "/" in p.removeprefix(start)}
        shown = [_entry(p, f) for p, f in sorted(files.items()) if deep or "/" not in p.removeprefix(start)]
        self._send([*({"type": "directory", "path": p, "oid": "0", "size": 0} for p in sorted(folders)), *shown])

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._at(name, revision)) is None:
            return
        repo, sha = found
        file = repo.commits[sha].get(path)
        if file is None:
            self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        content = file.content if file.content is not None else (self.server.folder / file.oid).read_bytes()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.content is None:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            first, last = int(part[1]), min(int(part[2] or file.size - 1), file.size - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
            self._send(content[first : last + 1], 206, headers)
            return
        self._send(content, 200, headers)


def _small(content: bytes) -> File:
    return File(len(content), hashlib.sha1(content).hexdigest(), content)


def _entry(path: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    return (
        entry
        if file.content is not None
        else {**entry, "lfs": {"oid": file.oid, "size": file.size, "pointerSize": 130}}
    )
