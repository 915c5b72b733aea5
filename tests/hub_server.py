"""A loopback imitation of the Hugging Face Hub: enough of its API to share models and Spaces and to load them.

It holds everything in memory and answers as the Hub does: reading public repositories is open to all, writing needs a
token, and each commit is kept with its files. A client finds it by `HF_ENDPOINT`, which huggingface_hub reads on
import, so that the client is another process than the test's. Large files (`LARGE`) are uploaded by git-LFS's basic
protocol, which the client uses where HF_HUB_DISABLE_XET is set; the Hub's own protocol, Xet, is not imitated.

`hub.fail(...)` has the answers to come fail: with a status, a connection cut in the middle, or other content.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


#: Files that go to the store of large files, as the Hub's `.gitattributes` say.
LARGE = "*.safetensors"
_NAME = r"(?P<name>(?:spaces/)?[^/]+/[^/]+)"
_REVISION, _PATH = r"(?P<revision>refs/pr/\d+|[^/]+)", r"(?P<path>.+)"
_API = r"/api/(?P<kind>model|space)s/(?P<name>[^/]+/[^/]+)"
#: Method, path and what answers it.
ROUTES = (
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", f"{_API}/commit/{_REVISION}", "commit"),
    ("POST", f"{_API}/branch/(?P<branch>.+)", "branch"),
    ("GET", f"{_API}(?:/revision/{_REVISION})?", "info"),
    ("GET", f"{_API}/tree/{_REVISION}", "tree"),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET", f"/{_NAME}/resolve/{_REVISION}/{_PATH}", "resolve"),
)
#: What some faults make of a file.
SPOILT = {
    "spoil": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "short": lambda content: content[: len(content) // 2],
}


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str  # 40 hexadecimal digits
    title: str  # the commit message
    token: str  # whose it is
    files: Mapping[str, bytes]  # all files after it, by path
    branch: str = "main"


class Refusal(Exception):
    """An answer that is an error: the status, and the code by which the client knows which error it is."""

    def __init__(self, status: int, code: str, **headers: str):
        super().__init__(f"{status} {code}")
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": code, **headers}


@dataclass
class Fault:
    """Something that goes wrong with requests: `status`, or `"cut"`, `"spoil"`, `"short"`, or `"lost"`.

    `"cut"` ends the connection in the middle of the answer, or of the upload; `"spoil"` changes the content of a file;
    `"short"` leaves its end out, and says so; `"lost"` does what was asked and ends the connection without an answer.
    """

    method: str
    pattern: re.Pattern
    kind: int | str
    times: int
    headers: dict[str, str]


class LoopbackHub:
    """The imitation, answering while it is entered.

    Args:
        tokens: those that may write.

    Attributes:
        repositories: commits by repository name (of Spaces with `spaces/` before it), oldest first; the first is that
            of the creation.
        private: names of the repositories that are read with a token alone.
        large: contents of large files by their SHA-256.
        downloads: the files that were fetched, as `(repository, path)`.
        asked: all requests, as method and path.
        not_imitated: requests that the Hub might answer and this imitation does not know.
    """

    def __init__(self, tokens: tuple[str, ...] = ()):
        self.tokens = tokens
        self.repositories: dict[str, list[Commit]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.downloads: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.not_imitated: list[str] = []
        self.faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def pushed(self, name: str, branch: str = "main") -> list[Commit]:
        """The commits to a branch of a repository after its creation, oldest first."""
        return [commit for commit in self.repositories[name] if commit.branch == branch][1:]

    def fail(self, method: str, pattern: str, kind: int | str, times: int = 1, **headers: str) -> None:
        """Have the next `times` requests whose path `pattern` is found in fail in the way of `Fault`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, re.compile(pattern), kind, times, named))

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_commit(
        self, name: str, title: str, token: str, files: Mapping[str, bytes], branch: str = "main"
    ) -> Commit:
        commits = self.repositories.setdefault(name, [])
        oid = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append(Commit(oid, title, token, dict(files), branch))
        return commits[-1]

    def find(self, name: str, revision: str | None) -> Commit:
        """The commit that a branch or an oid names."""
        if name not in self.repositories:
            raise Refusal(404, "RepoNotFound")
        for commit in reversed(self.repositories[name]):
            if (revision or "main") in (commit.branch, commit.oid):
                return commit
        raise Refusal(404, "RevisionNotFound")

    def fault_of(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets; it is one less to come then."""
        for fault in self.faults:
            if fault.times and fault.method == method and fault.pattern.search(path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; a method named in `ROUTES` gives status, content and headers."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"  # connections are kept, as the client expects

    def answer(self) -> None:
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        self.hub.asked.append(f"{self.command} {path}")
        self.query, headers, fault = query, {}, self.hub.fault_of(self.command, path)
        kind = fault.kind if fault else None
        length = int(self.headers.get("Content-Length", 0))
        if kind == "cut" and self.command in ("POST", "PUT"):
            self.rfile.read(length // 2)
            return self.hang_up()
        self.body = self.rfile.read(length)
        try:
            if isinstance(kind, int):
                raise Refusal(kind, "Refused", **fault.headers)
            status, content, headers = self.called(path)
        except Refusal as refusal:
            status, content, headers = refusal.status, {"error": str(refusal)}, refusal.headers
        if kind == "lost":
            return self.hang_up()
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        content = SPOILT.get(kind, bytes)(content)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if kind == "cut":
            self.wfile.write(content[: len(content) // 2])
            return self.hang_up()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def called(self, path: str) -> tuple:
        """What the method of the first route that fits gives."""
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                words = match.groupdict()
                if words.pop("kind", None) == "space":
                    words["name"] = f"spaces/{words['name']}"
                return getattr(self, name)(**words)
        self.hub.not_imitated.append(f"{self.command} {self.path}")
        raise Refusal(404, "NotImitated")

    def log_message(self, *args: Any) -> None:
        """Tests have no use for a log."""

    def token(self) -> str:
        """The token of the request, which must be one that may write."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "InvalidToken")
        return token

    def read(self, name: str, revision: str | None) -> Commit:
        """What the request may read; a private repository is as if it were not there."""
        if name in self.hub.private and self.headers.get("Authorization", "")[7:] not in self.hub.tokens:
            raise Refusal(401, "RepoNotFound")
        return self.hub.find(name, revision)

    def create(self) -> tuple:
        token, wanted = self.token(), json.loads(self.body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        kept = f"spaces/{name}" if wanted.get("type") == "space" else name
        answer = {"name": name, "url": f"{self.hub.endpoint}/{kept}"}
        if kept in self.hub.repositories:
            return 409, {**answer, "error": "You already created this repo"}, {}
        if wanted.get("visibility") == "private":
            self.hub.private.add(kept)
        self.hub.add_commit(kept, "initial commit", token, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, answer, {}

    def branch(self, name: str, branch: str) -> tuple:
        token, start = self.token(), self.hub.find(name, None)
        if any(commit.branch == branch for commit in self.hub.repositories[name]):
            return 409, {"error": "Reference already exists"}, {}
        self.hub.add_commit(name, start.title, token, start.files, branch)
        return 200, {}, {}

    def validate(self) -> tuple:
        """The Hub refuses a card whose metadata it cannot read, or that names a folder as its base model."""
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        try:
            metadata = (yaml.safe_load(match[1]) if match else None) or {}
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        base_model = str(metadata.get("base_model", "any"))
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):
            message = f'"base_model" with value "{base_model}" is not valid. Use a model id.'
            return 400, {"errors": [{"message": message}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing metadata"}]}, {}

    def preupload(self, name: str, revision: str) -> tuple:
        self.token()
        files = self.hub.find(name, revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if fnmatch.fnmatch(path, LARGE) else "regular"
            known = {"oid": _name_of(path, files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return 200, {"files": answers}, {}

    def batch(self, name: str) -> tuple:
        """Where each large file is to be sent; those that are here need not be."""
        self.token()
        objects = []
        for each in json.loads(self.body)["objects"]:
            known = {"oid": each["oid"], "size": each["size"]}
            upload = {"upload": {"href": f"{self.hub.endpoint}/large/{each['oid']}", "header": {}}}
            objects.append(known if each["oid"] in self.hub.large else {**known, "actions": upload})
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def upload(self, oid: str) -> tuple:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "WrongDigest")
        self.hub.large[oid] = self.body
        return 200, {}, {}

    def commit(self, name: str, revision: str) -> tuple:
        token, before = self.token(), self.hub.find(name, revision)
        files, title, branch = dict(before.files), "", before.branch
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title, parent = value["summary"], value.get("parentCommit")
                if parent not in (None, before.oid):
                    raise Refusal(412, "PreconditionFailed")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                self.hub.not_imitated.append(f"{line['key']} in a commit")
                raise Refusal(501, "NotImitated")
        url, more = f"{self.hub.endpoint}/{name}", {}
        if "create_pr=1" in self.query:
            number = 1 + len({each.branch for each in self.hub.repositories[name] if "refs/pr" in each.branch})
            branch, more = f"refs/pr/{number}", {"pullRequestUrl": f"{url}/discussions/{number}"}
            self.hub.add_commit(name, before.title, token, before.files, branch)
        commit = self.hub.add_commit(name, title, token, files, branch)
        return 200, {"commitUrl": f"{url}/commit/{commit.oid}", "commitOid": commit.oid, **more}, {}

    def info(self, name: str, revision: str | None) -> tuple:
        commit, kept = self.read(name, revision), name
        siblings = [{"rfilename": path} for path in commit.files]
        name = name.removeprefix("spaces/")
        facts = {"id": name, "sha": commit.oid, "private": kept in self.hub.private, "siblings": siblings}
        return 200, facts | {"modelId": name}, {}

    def tree(self, name: str, revision: str) -> tuple:
        entries = []
        for path, file in self.read(name, revision).files.items():
            entry = {"type": "file", "path": path, "size": len(file), "oid": _blob_oid(file)}
            if fnmatch.fnmatch(path, LARGE):
                entry["lfs"] = {"oid": _name_of(path, file), "size": len(file), "pointerSize": 134}
            entries.append(entry)
        return 200, entries, {}

    def resolve(self, name: str, revision: str, path: str) -> tuple:
        commit = self.read(name, revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        content = commit.files[path]
        if self.command == "GET":
            self.hub.downloads.append((name, path))
        return 200, content, {"ETag": f'"{_name_of(path, content)}"', "X-Repo-Commit": commit.oid}


def _name_of(path: str, content: bytes) -> str:
    """The digest that the Hub names a file by."""
    return hashlib.sha256(content).hexdigest() if fnmatch.fnmatch(path, LARGE) else _blob_oid(content)


def _blob_oid(content: bytes) -> str:
    """What git calls a file of this content, by which the client sees that a file has not changed."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
