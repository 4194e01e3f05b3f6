"""A Hub on this machine: the part of the Hub's HTTP API that `huggingface_hub` uses to push, list and load.

    with LocalHub() as hub:
        HfApi(endpoint=hub.url, token=hub.token("user")).create_repo("user/name")

It keeps repositories as commits of immutable files, in memory. Like the Hub it takes large files by LFS before the
commit that names them, answers a file's HEAD with its commit and ETag, redirects LFS files, honours Range, and tells
who may do what by tokens. `fail` and `cut` make it answer errors or drop a connection in the middle of a transfer.

Of repositories it keeps models alone.

    python tests/local_hub.py --folder hub     # prints what to export, runs until Ctrl-C
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".mp4", ".png", ".arrow", ".pt", ".bin")
"""Stored by LFS whatever their size, as the Hub's .gitattributes has it; everything above `LFS_SIZE` is too."""
LFS_SIZE = 1 << 20
DATE = "2026-01-01T00:00:00.000Z"


class Entry(NamedTuple):
    """A file of a commit: its git blob id, its SHA-256, and whether it lies in LFS."""

    blob_id: str
    sha256: str
    size: int
    lfs: bool


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Entry]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, Entry], branch: str, parent: str | None) -> Commit:
        content = json.dumps([title, parent, len(self.commits), sorted(files.items())])
        made = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, files)
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def log(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        found, sha = [], self.branches.get(branch)
        while sha is not None:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found


@dataclass
class Fault:
    method: str
    pattern: str
    status: int | None  # None: the connection is cut
    times: int
    headers: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None


class Reply(Exception):
    """An answer other than success."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None, extra: Any = ()
    ) -> None:
        super().__init__(message)
        self.status, self.extra = status, dict(extra)
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


class LocalHub:
    """A running server; `url` is what HF_ENDPOINT must say.

    Attributes:
        storage_url: where LFS files come from.
        repositories: by id.
        blobs: every stored file by its SHA-256, whether or not a commit names it yet.
        collections: by slug.
        requests: (method, path, has a token) of everything asked so far.
    """

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.users: dict[str, tuple[str, str]] = {}
        self._faults: list[Fault] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Another host, as the Hub's storage is one: what is meant for the Hub alone must not be sent there.
        self.storage_url = self.url.replace("127.0.0.1", "localhost")
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def changed(self) -> None:
        """Called after every request that may have changed something."""

    def token(self, user: str, role: str = "write") -> str:
        """A token of a user; `role` is read or write."""
        token = f"hf_{hashlib.sha256(f'{user}/{role}'.encode()).hexdigest()[:34]}"
        self.users[token] = (user, role)
        return token

    def fail(
        self,
        method: str,
        pattern: str,
        status: int,
        *,
        times: int = 1,
        headers: Any = (),
        before: Callable[[], None] | None = None,
    ) -> None:
        """Answer the next `times` requests whose path matches `pattern` with `status`, after calling `before`."""
        self._faults.append(Fault(method, pattern, status, times, dict(headers), before))

    def cut(self, method: str, pattern: str, *, times: int = 1, before: Callable[[], None] | None = None) -> None:
        """Drop the connection in the middle of the next `times` matching transfers, after calling `before`."""
        self._faults.append(Fault(method, pattern, None, times, before=before))

    def lose(self, method: str, pattern: str) -> None:
        """Do what the next matching request asks for, and drop the connection instead of answering."""
        self._faults.append(Fault(method, pattern, 0, 1))

    def heal(self) -> None:
        """Take back every fault that was not met yet."""
        self._faults.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, pattern: str) -> int:
        """How many requests matched."""
        return sum(one == method and bool(re.search(pattern, path)) for one, path, _ in self.requests)

    def file(self, repo: str, path: str, revision: str = "main") -> bytes:
        """The content of a committed file."""
        commit = self.repositories[repo].at(revision)
        assert commit is not None
        return self.blobs[commit.files[path].sha256]

    def files(self, repo: str, revision: str = "main") -> list[str]:
        commit = self.repositories[repo].at(revision)
        return sorted(commit.files) if commit else []

    def put(self, repo: str, files: Mapping[str, bytes], *, remove: Iterable[str] = ()) -> str:
        """Commit files as somebody else would have; returns the commit."""
        repository = self.repositories[repo]
        before = repository.at("main")
        entries = {
            **(before.files if before else {}),
            **{path: self.store(data, path) for path, data in files.items()},
        }
        entries = {path: entry for path, entry in entries.items() if path not in set(remove)}
        return repository.commit("put", entries, "main", before.sha if before else None).sha

    def store(self, data: bytes, path: str) -> Entry:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return entry(data, sha256, is_lfs(path, len(data)))


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


def entry(data: bytes, sha256: str, lfs: bool) -> Entry:
    stored = f"version https://git-lfs\noid sha256:{sha256}\nsize {len(data)}\n".encode() if lfs else data
    blob_id = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
    return Entry(blob_id, sha256, len(data), lfs)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LocalHub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_arguments: Any) -> None: ...

    # --- plumbing ----------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        hub, url = self.server_hub, urlsplit(self.path)
        self.path_only, self.query = unquote(url.path), {key: value[0] for key, value in parse_qs(url.query).items()}
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.requests.append((self.command, self.path_only, bool(bearer)))
        fault = hub.fault(self.command, self.path_only)
        length = int(self.headers.get("Content-Length", 0))
        if fault and fault.status is None and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            if fault.before:
                fault.before()
            self._drop()
            return
        self.body = (
            self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        self.cut = fault is not None and fault.status is None
        try:
            lost = fault is not None and fault.status == 0
            if fault and fault.status:
                if fault.before:
                    fault.before()
                raise Reply(fault.status, f"the test asked for {fault.status}", headers=fault.headers)
            if bearer and bearer not in hub.users:
                raise Reply(401, "Invalid credentials in Authorization header")
            self.user, self.role = hub.users.get(bearer, ("", ""))
            with hub.lock:
                reply = self._route()
                if self.command in ("POST", "PUT"):
                    hub.changed()
            if lost:
                self._drop()
                return
            self._send(*reply)
        except Reply as reply:
            self._send(reply.status, json.dumps({"error": str(reply), **reply.extra}).encode(), reply.headers)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
            if self.cut:
                self._drop()

    def _drop(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    # --- the API -----------------------------------------------------------------------------------------------------

    def _route(self) -> tuple[int, bytes, dict[str, str]]:
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", r"/api/whoami-v2", self._who),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._receive),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("GET", r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", self._commits),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/(.+)", self._paths),
            ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            ("GET", r"/api/models/([^/]+/[^/]+)", self._info),
            ("(GET|HEAD)", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("(GET|HEAD)", r"/cdn/([0-9a-f]{64})", self._content),
            ("POST", r"/api/collections", self._new_collection),
            ("POST", r"/api/collections/(.+)/items", self._add_item),
            ("GET", r"/api/collections/(.+)", self._collection),
            ("(GET|HEAD|POST)", r"(?:/api)?/(?:datasets|spaces)/.+", self._other_kind),
        ]
        for method, pattern, answer in routes:
            if re.fullmatch(method, self.command) and (match := re.fullmatch(pattern, self.path_only)):
                value = answer(*match.groups())
                return value if isinstance(value, tuple) else (200, json.dumps(value).encode(), {})
        raise Reply(404, f"no such endpoint: {self.command} {self.path_only}")

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        repository = self.server_hub.repositories.get(name)
        mine = name.split("/", maxsplit=1)[0] == self.user
        if repository is None or (repository.private and not mine):
            raise Reply(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not self.user:
            raise Reply(401, "Invalid username or password.")
        if write and not (mine and self.role == "write"):
            raise Reply(403, "you don't have the required permissions")
        return repository

    def _at(self, name: str, revision: str) -> tuple[Repository, Commit]:
        repository = self._repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise Reply(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    @property
    def _json(self) -> Any:
        return json.loads(self.body)

    def _who(self) -> Any:
        if not self.user:
            raise Reply(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": self.user, "auth": {"accessToken": {"role": self.role}}}

    def _create(self) -> Any:
        if not self.user:
            raise Reply(401, "Invalid username or password.")
        if self._json.get("type", "model") != "model":
            self._other_kind()
        name = f"{self._json.get('organization') or self.user}/{self._json['name']}"
        if name in self.server_hub.repositories:
            raise Reply(409, "You already created this model repo", extra={"url": f"{self.server_hub.url}/{name}"})
        if name.split("/", maxsplit=1)[0] != self.user or self.role != "write":
            raise Reply(403, "You don't have the rights to create a model under this namespace")
        repository = Repository(private=self._json.get("visibility") == "private")
        repository.commit("initial commit", {".gitattributes": self.server_hub.store(b"", "x")}, "main", None)
        self.server_hub.repositories[name] = repository
        return {"url": f"{self.server_hub.url}/{name}", "id": name, "name": name}

    def _other_kind(self) -> Any:
        raise Reply(404, "this Hub keeps models alone, no data sets and no spaces", "RepoNotFound")

    def _validate(self) -> Any:
        found = re.match(r"---\n(.*?)\n---", self._json["content"], re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
        problems = [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag", "base_model")
                    if not isinstance(data.get(key, ""), str)]  # fmt: skip
        for model in data.get("model-index", []):
            problems += ["model-index needs results" for _ in [0] if not model.get("results")]
        return {"errors": [{"message": problem} for problem in problems], "warnings": []}

    def _preupload(self, name: str, revision: str) -> Any:
        self._repository(name, write=True)
        _, commit = self._at(name, revision)
        files = []
        for file in self._json["files"]:
            assert base64.b64decode(file["sample"]) is not None
            known = commit.files.get(file["path"])
            lfs = is_lfs(file["path"], file["size"])
            files.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                         | ({"oid": known.sha256 if known.lfs else known.blob_id} if known else {}))  # fmt: skip
        return {"files": files}

    def _batch(self, name: str) -> Any:
        self._repository(name, write=True)
        objects = []
        for wanted in self._json["objects"]:
            found: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.blobs:
                found["actions"] = {"upload": {"href": f"{self.server_hub.url}/lfs/{wanted['oid']}"}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def _receive(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Reply(400, "the content does not have this SHA-256")
        self.server_hub.blobs[oid] = self.body
        return {}

    def _commit(self, name: str, revision: str) -> Any:
        repository = self._repository(name, write=True)
        _, before = self._at(name, revision)
        files, title = dict(before.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, before.sha):
                    raise Reply(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.server_hub.store(base64.b64decode(value["content"]), "x")
            elif key == "lfsFile":
                if value["oid"] not in self.server_hub.blobs:
                    raise Reply(400, f"LFS object {value['oid']} was not uploaded")
                data = self.server_hub.blobs[value["oid"]]
                files[value["path"]] = entry(data, value["oid"], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Reply(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                gone = [path for path in files if path.startswith(f"{value['path'].rstrip('/')}/")]
                if not gone:
                    raise Reply(404, "A folder with this name doesn't exist", "EntryNotFound")
                for path in gone:
                    del files[path]
            else:
                raise Reply(400, f"unknown operation {key}")
        made = repository.commit(title, files, revision, before.sha)
        return {"commitUrl": f"{self.server_hub.url}/{name}/commit/{made.sha}", "commitOid": made.sha}

    def _commits(self, name: str, revision: str) -> Any:
        repository, _ = self._at(name, revision)
        about = {"message": "", "authors": [], "date": DATE}
        return [{"id": commit.sha, "title": commit.title, **about} for commit in repository.log(revision)]

    def _branch(self, name: str, branch: str) -> Any:
        repository = self._repository(name, write=True)
        if branch in repository.branches:
            raise Reply(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def _info(self, name: str, revision: str = "main") -> Any:
        repository, commit = self._at(name, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"id": name, "sha": commit.sha, "private": repository.private, "siblings": siblings, "tags": []}
        if "README.md" in commit.files:
            text = self.server_hub.blobs[commit.files["README.md"].sha256].decode()
            about["cardData"] = (yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None) or {}
        return about

    def _tree(self, name: str, revision: str, folder: str | None = None) -> Any:
        below = f"{folder.rstrip('/')}/" if folder else ""
        inside = [item for item in self._listed(name, revision) if item["path"].startswith(below)]
        if below and not inside:
            raise Reply(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        every = self.query.get("recursive", "").lower() == "true"
        return [item for item in inside if every or "/" not in item["path"].removeprefix(below)]

    def _paths(self, name: str, revision: str) -> Any:
        wanted = {path.rstrip("/") for path in parse_qs(self.body.decode())["paths"]}
        return [item for item in self._listed(name, revision) if item["path"] in wanted]

    def _listed(self, name: str, revision: str) -> list[dict[str, Any]]:
        """Every folder and every file of a commit."""
        _, commit = self._at(name, revision)
        folders = {parent.as_posix() for path in commit.files for parent in PurePosixPath(path).parents} - {"."}
        listed: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path in sorted(folders)
        ]
        for path, file in sorted(commit.files.items()):
            item: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.blob_id}
            if file.lfs:
                item["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            listed.append(item)
        return listed

    def _resolve(self, name: str, revision: str, path: str) -> Any:
        _, commit = self._at(name, revision)
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            raise Reply(404, "Entry not found", "EntryNotFound", headers)
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            raise Reply(
                302, "Found", headers={**headers, "Location": f"{self.server_hub.storage_url}/cdn/{file.sha256}"}
            )
        return self._content(file.sha256, {**headers, "ETag": f'"{file.blob_id}"'})

    def _content(self, sha256: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
        data = self.server_hub.blobs[sha256]
        sent = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **(headers or {})}
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            return 206, data[start:], {**sent, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return 200, data, sent

    # --- collections -------------------------------------------------------------------------------------------------

    def _new_collection(self) -> Any:
        if not self.user or self.role != "write":
            raise Reply(403, "you may not create a collection")
        name = re.sub(r"\W+", "-", self._json["title"].lower())
        slug = f"{self._json['namespace']}/{name}-{hashlib.sha1(name.encode()).hexdigest()[:24]}"
        if slug in self.server_hub.collections:
            raise Reply(409, "This collection already exists", extra={"slug": slug})
        self.server_hub.collections[slug] = {
            "slug": slug, "title": self._json["title"], "description": self._json.get("description"),
            "owner": {"name": self.user}, "items": [], "lastUpdated": DATE, "position": 0,
            "private": self._json["private"], "theme": "orange", "upvotes": 0,
        }  # fmt: skip
        return self._collection(slug)

    def _add_item(self, slug: str) -> Any:
        items, item = self.server_hub.collections[slug]["items"], self._json["item"]
        self._repository(item["id"])
        if item["id"] in [known["id"] for known in items]:
            raise Reply(409, "This item is already in the collection")
        items.append({"_id": str(len(items)), "id": item["id"], "type": item["type"], "position": len(items)}
                     | ({"note": {"text": self._json["note"]}} if "note" in self._json else {}))  # fmt: skip
        return self._collection(slug)

    def _collection(self, slug: str) -> Any:
        if slug not in self.server_hub.collections:
            raise Reply(404, "Collection not found")
        return self.server_hub.collections[slug]


if __name__ == "__main__":
    from local_hub_folder import main

    main()
