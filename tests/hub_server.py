"""A server on 127.0.0.1 that speaks what the client of the Hugging Face hub needs to make and fill repositories.

Large files take the LFS protocol, as if hf_xet were not installed. Commits keep the files' bytes, by path.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_" + "a1B2c3D4" * 4


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)  # branch, summary and paths of each
    is_writable: bool = True


class HubServer:
    """`repos` by id. `failures`: (part of a path, status, times) of requests that fail; each counts down."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.failures: list[list[Any]] = []
        self.requests: list[str] = []
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self) -> None:
                body = self.body()
                with server.lock:
                    status, content = server.answer(self.command, unquote(self.path), self.headers, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def fail(self, part: str, status: int, times: int = 10**6) -> None:
        self.failures.append([part, status, times])

    def pushes(self, repo: str) -> int:
        return len(self.repos[repo].commits)

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        for failure in self.failures:
            if failure[0] in path and failure[2] > 0:
                failure[2] -= 1
                return failure[1], {"error": f"a failure of status {failure[1]}"}
        if path.startswith("/lfs/"):
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/(.*))?", path)
        repo = self.repos.get(found[1]) if found else None
        if found is None or repo is None:
            return 404, {"error": "Repository not found"}
        return self.of_repo(found[1], repo, found[2] or "", body)

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        made = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return 409, {**made, "error": "You already created this model repo"}
        if asked["organization"] == "others":
            return 403, {"error": "You don't have the rights to create a model under the namespace others."}
        self.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, made

    def of_repo(self, name: str, repo: Repo, part: str, body: bytes) -> tuple[int, Any]:
        kind, _, branch = part.partition("/")
        if kind == "auth-check":
            return (200, {}) if repo.is_writable else (403, {"error": "Forbidden: no write access"})
        if kind == "branch":
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            return 200, {}
        if kind == "preupload":
            return 200, {"files": [self.mode(repo, branch, file) for file in json.loads(body)["files"]]}
        if kind == "info":  # /info/lfs/objects/batch
            objects = [self.action(**entry) for entry in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        if kind == "commit":
            return self.commit(name, repo, branch, [json.loads(line) for line in body.splitlines()])
        if kind == "tree":
            files = repo.branches[branch].items()
            return 200, [{"type": "file", "path": path, "size": len(x), "oid": "0" * 40} for path, x in files]
        branch = branch if kind == "revision" else "main"
        siblings = [{"rfilename": path} for path in repo.branches[branch]]
        sha = hashlib.sha1(repr(len(repo.commits)).encode()).hexdigest()
        return 200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}

    @staticmethod
    def mode(repo: Repo, branch: str, file: dict[str, Any]) -> dict[str, Any]:
        is_large = file["path"].endswith(".safetensors")
        answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        if (known := repo.branches[branch].get(file["path"])) is None:
            return answer
        blob = hashlib.sha1(f"blob {len(known)}\0".encode() + known).hexdigest()
        return {**answer, "oid": hashlib.sha256(known).hexdigest() if is_large else blob}

    def action(self, oid: str, size: int) -> dict[str, Any]:
        entry = {"oid": oid, "size": size}
        return entry if oid in self.stored else {**entry, "actions": {"upload": {"href": f"{self.url}/lfs/{oid}"}}}

    def commit(self, name: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files, paths = repo.branches[branch], []
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            paths.append(f"{kind} {value['path']}")
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.stored[value["oid"]]
        repo.commits.append({"branch": branch, "summary": lines[0]["value"]["summary"], "paths": paths})
        oid = hashlib.sha1(repr(len(repo.commits)).encode()).hexdigest()
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server to which the hub's client of this process goes, with a token, while the block runs."""
    import huggingface_hub
    from huggingface_hub import constants

    server = HubServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr("lora_dpo_jax.huggingface.hub.PAUSES", (0.0, 0.0))
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        huggingface_hub.utils.disable_progress_bars()
        try:
            yield server
        finally:
            huggingface_hub.utils.enable_progress_bars()
            huggingface_hub.close_session()
            server.http.shutdown()
            server.http.server_close()
            thread.join()
