"""A loopback imitation of the Hugging Face Hub: enough of its API to share model repositories and to load them.

It holds everything in memory and answers as the Hub does: reading is open to all, writing needs a token, and each
commit is kept with its files. A client finds it by `HF_ENDPOINT`, which huggingface_hub reads on import, so that the
client is another process than the test's. All files are uploaded as "regular" ones, within the commit; the Hub's large
files go to another store, which is not imitated.
"""

from __future__ import annotations

import base64
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


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
#: Method, path and what answers it.
ROUTES = (
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", "preupload"),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", "commit"),
    ("GET", f"/api/models/{_NAME}(?:/revision/{_REVISION})?", "info"),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", "tree"),
    ("GET", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str  # 40 hexadecimal digits
    title: str  # the commit message
    token: str  # whose it is
    files: Mapping[str, bytes]  # all files after it, by path


class Refusal(Exception):
    """An answer that is an error: the status, and the code by which the client knows which error it is."""

    def __init__(self, status: int, code: str, **headers: str):
        super().__init__(f"{status} {code}")
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": code, **headers}


class LoopbackHub:
    """The imitation, answering while it is entered.

    Args:
        tokens: those that may write.

    Attributes:
        repositories: commits by repository name, oldest first; the first is that of the creation.
        downloads: the files that were fetched, as `(repository, path)`.
        not_imitated: requests that the Hub might answer and this imitation does not know.
    """

    def __init__(self, tokens: tuple[str, ...] = ()):
        self.tokens = tokens
        self.repositories: dict[str, list[Commit]] = {}
        self.downloads: list[tuple[str, str]] = []
        self.not_imitated: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def pushed(self, name: str) -> list[Commit]:
        """The commits to a repository after its creation, oldest first."""
        return self.repositories[name][1:]

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_commit(self, name: str, title: str, token: str, files: Mapping[str, bytes]) -> Commit:
        commits = self.repositories.setdefault(name, [])
        commits.append(Commit(hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest(), title, token, dict(files)))
        return commits[-1]

    def find(self, name: str, revision: str | None) -> Commit:
        """The commit that a branch (there is `main` alone) or an oid names."""
        if name not in self.repositories:
            raise Refusal(404, "RepoNotFound")
        for commit in reversed(self.repositories[name]):
            if revision in (None, "main", commit.oid):
                return commit
        raise Refusal(404, "RevisionNotFound")


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; a method named in `ROUTES` gives status, content and headers."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"  # connections are kept, as the client expects

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, headers = unquote(urlsplit(self.path).path), {}
        try:
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    status, content, headers = getattr(self, name)(**match.groupdict())
                    break
            else:
                self.hub.not_imitated.append(f"{self.command} {self.path}")
                raise Refusal(404, "NotImitated")
        except Refusal as refusal:
            status, content, headers = refusal.status, {"error": str(refusal)}, refusal.headers
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {**headers, "Content-Type": "application/json"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        """Tests have no use for a log."""

    def token(self) -> str:
        """The token of the request, which must be one that may write."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "InvalidToken")
        return token

    def create(self) -> tuple:
        token, wanted = self.token(), json.loads(self.body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        answer = {"name": name, "url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return 409, {**answer, "error": "You already created this model repo"}, {}
        self.hub.add_commit(name, "initial commit", token, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, answer, {}

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
            known = {"oid": _blob_oid(files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": "regular", "shouldIgnore": False, **known})
        return 200, {"files": answers}, {}

    def commit(self, name: str, revision: str) -> tuple:
        token, files, title = self.token(), dict(self.hub.find(name, revision).files), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.hub.not_imitated.append(f"{line['key']} in a commit")
                raise Refusal(501, "NotImitated")
        commit = self.hub.add_commit(name, title, token, files)
        return 200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit.oid}", "commitOid": commit.oid}, {}

    def info(self, name: str, revision: str | None) -> tuple:
        commit = self.hub.find(name, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return 200, {"id": name, "modelId": name, "sha": commit.oid, "private": False, "siblings": siblings}, {}

    def tree(self, name: str, revision: str) -> tuple:
        files = self.hub.find(name, revision).files.items()
        entries = [{"type": "file", "path": path, "size": len(file), "oid": _blob_oid(file)} for path, file in files]
        return 200, entries, {}

    def resolve(self, name: str, revision: str, path: str) -> tuple:
        commit = self.hub.find(name, revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        content = commit.files[path]
        if self.command == "GET":
            self.hub.downloads.append((name, path))
        return 200, content, {"ETag": f'"{_blob_oid(content)}"', "X-Repo-Commit": commit.oid}


def _blob_oid(content: bytes) -> str:
    """What git calls a file of this content, by which the client sees that a file has not changed."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
