"""A Hub on loopback: what huggingface_hub's client asks of one to create repositories, upload, list and download."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional
from urllib.parse import unquote, urlsplit


class Repository:
    """Files of a repository by revision; each commit is one more revision."""

    def __init__(self, private: bool = False, gated: bool = False) -> None:
        self.private, self.gated = private, gated
        self.revisions: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit({})

    def commit(self, changes: dict[str, bytes], branch: str = "main") -> str:
        files = {**self.files(branch), **changes}
        sha = hashlib.sha1(repr((len(self.revisions), sorted(files))).encode()).hexdigest()
        self.revisions[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str) -> Optional[str]:
        return self.branches.get(revision, revision if revision in self.revisions else None)

    def files(self, revision: str) -> dict[str, bytes]:
        return self.revisions.get(self.sha(revision) or "", {})


class Hub:
    """The repositories of a server, and how it is to misbehave.

    Args:
        address: Where it is served.
        token: What private repositories and uploads ask for.
    """

    def __init__(self, address: str, token: str = "hf_secret") -> None:
        self.address, self.token = address, token
        self.repositories: dict[str, Repository] = {}
        self.cut: Optional[int] = None  # bytes of a file after which the connection breaks

    def add(self, name: str, files: dict[str, bytes], **options: bool) -> Repository:
        repository = self.repositories[name] = Repository(**options)
        repository.commit(files)
        return repository

    # Answers: (status, headers, body)

    def get(self, path: str, token: Optional[str]) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._listing("/".join(parts[2:4]), parts[4:], token)
        return self._file("/".join(parts[:2]), parts[2:], token)

    def _refusal(self, name: str, token: Optional[str]) -> Optional[tuple[int, dict[str, str], bytes]]:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != self.token):
            return error(401 if token is None else 404, "RepoNotFound")
        if repository.gated and token != self.token:
            return error(403, "GatedRepo")
        return None

    def _file(self, name: str, rest: list[str], token: Optional[str]) -> tuple[int, dict[str, str], bytes]:
        if refusal := self._refusal(name, token):
            return refusal
        if rest[:1] != ["resolve"] or len(rest) < 3:
            return error(404, "EntryNotFound")
        sha = self.repositories[name].sha(rest[1])
        if sha is None:
            return error(404, "RevisionNotFound")
        content = self.repositories[name].revisions[sha].get("/".join(rest[2:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}, b""
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}, content

    def _listing(self, name: str, rest: list[str], token: Optional[str]) -> tuple[int, dict[str, str], bytes]:
        if refusal := self._refusal(name, token):
            return refusal
        repository = self.repositories[name]
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        sha = repository.sha(revision)
        if sha is None:
            return error(404, "RevisionNotFound")
        if rest[:1] == ["tree"]:
            files = repository.revisions[sha]
            return answer([{"type": "file", "path": p, "size": len(c), "oid": sha} for p, c in files.items()])
        siblings = [{"rfilename": path} for path in repository.revisions[sha]]
        return answer({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def post(self, path: str, body: bytes, token: Optional[str]) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return answer({"errors": [], "warnings": []})
        if token != self.token:
            return error(401, "")
        if parts == ["api", "repos", "create"]:
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization") or "me", given["name"])))
            if name in self.repositories:
                return answer({"url": f"{self.address}/{name}"}, 409)
            self.repositories[name] = Repository(
                private=given.get("visibility") == "private" or bool(given.get("private"))
            )
            return answer({"url": f"{self.address}/{name}"})
        name, action, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if name not in self.repositories:
            return error(404, "RepoNotFound")
        repository = self.repositories[name]
        if action == "branch":
            if branch in repository.branches:
                return answer({"error": "exists"}, 409)
            repository.branches[branch] = repository.branches["main"]
            return answer({})
        if repository.sha(branch) is None:
            return error(404, "RevisionNotFound")
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return answer({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        values = [line["value"] for line in lines if line["key"] == "file"]
        sha = repository.commit({v["path"]: base64.b64decode(v["content"]) for v in values}, branch)
        return answer({"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha, "success": True})


def answer(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code} if code else {}, b""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HubServer"

    def log_message(self, *args: Any) -> None:
        pass

    @property
    def token(self) -> Optional[str]:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def respond(self, result: tuple[int, dict[str, str], bytes]) -> None:
        status, headers, body = result
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.hub.cut if "ETag" in headers else None
        self.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True

    def do_GET(self) -> None:
        self.respond(self.server.hub.get(unquote(urlsplit(self.path).path), self.token))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.respond(self.server.hub.post(unquote(urlsplit(self.path).path), body, self.token))


class HubServer(ThreadingHTTPServer):
    """Serves a hub on a free port from a thread of its own, as long as the process runs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.hub = Hub(self.address)
        threading.Thread(target=self.serve_forever, daemon=True).start()
